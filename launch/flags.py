"""From a frozen dataclass to a command line: flags, presets, flagfiles, a program wrapper.

    @dataclasses.dataclass(frozen=True)
    class TrainConfig:
        steps: int = field(1000, "length of the run", unit="steps", min=1, group="Training")
        optimizer: Literal["adamw", "muon"] = field("adamw", "update rule")

    PRESETS = {"demo": {"steps": 400}}

    if __name__ == "__main__":
        run(main, TrainConfig, presets=PRESETS)

A value comes from the dataclass default, over it the preset, over it the flags given explicitly, on
the command line or in a flagfile (the last one wins). Fields may be bool, int, float, str, a
`Literal`, `tuple[T, ...]` of these, and any of them `| None`, for which one writes `none`.
"""

import dataclasses
import difflib
import inspect
import math
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import flags as absl_flags

from launch import UsageError

Presets = Mapping[str, Mapping[str, object]]
_NOUN = {int: "an integer", float: "a finite number", str: "text"}
_METAVAR = {int: "INT", float: "FLOAT", str: "TEXT"}
_BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def field(
    default: Any,
    help: str,
    *,
    unit: str = "",
    choices: Collection[Any] | None = None,
    min: float | None = None,
    max: float | None = None,
    group: str = "",
) -> Any:
    """A dataclass field that knows its flag.

    Bounds are inclusive; for a tuple they and `choices` hold for each element. `group` is a heading
    of --help, which the fields below inherit until the next one.
    """
    meta = {"help": help, "unit": unit, "choices": choices, "min": min, "max": max, "group": group}
    return dataclasses.field(default=default, metadata=meta)


class _Parser(absl_flags.ArgumentParser):
    """Text to a checked value of one field, whatever its source."""

    def __init__(self, hint: Any, meta: Mapping[str, Any]) -> None:
        options = typing.get_args(hint)
        self.optional = type(None) in options
        if self.optional:
            (hint,) = (option for option in options if option is not type(None))
        self.many = typing.get_origin(hint) is tuple
        if self.many:
            hint = typing.get_args(hint)[0]
        self.choices = meta.get("choices")
        if typing.get_origin(hint) is typing.Literal:
            self.choices = typing.get_args(hint)
            hint = type(self.choices[0])
        self.type = hint
        self.min, self.max = meta.get("min"), meta.get("max")
        if self.type is not bool and self.type not in _NOUN:
            raise TypeError(f"no flag for {hint}; known: bool, int, float, str, Literal, tuple")

    def bounds(self) -> str:
        low = None if self.min is None else f"at least {_text(self.min)}"
        high = None if self.max is None else f"at most {_text(self.max)}"
        return " and ".join(part for part in (low, high) if part)

    def wanted(self) -> str:
        if self.type is bool:
            text = "true or false"
        elif self.choices:
            text = "one of " + ", ".join(map(_text, self.choices))
        else:
            text = f"{_NOUN[self.type]} {self.bounds()}".strip()
        text = f"a comma-separated list, each {text}" if self.many else text
        return f"{text}, or none" if self.optional else text

    def metavar(self) -> str:
        text = "|".join(map(_text, self.choices)) if self.choices else _METAVAR.get(self.type, "")
        return f"{text},..." if self.many else text

    def parse(self, argument: Any) -> Any:
        text = argument if isinstance(argument, str) else _text(argument)
        if self.optional and text.lower() == "none":
            return None
        try:
            if self.many:
                return tuple(self._one(part.strip()) for part in text.split(",")) if text else ()
            return self._one(text)
        except (KeyError, ValueError, OverflowError):
            raise ValueError(f"expected {self.wanted()}") from None

    def _one(self, text: str) -> Any:
        value = _BOOLS[text.lower()] if self.type is bool else self.type(text)
        low = self.min is None or value >= self.min
        high = self.max is None or value <= self.max
        finite = not isinstance(value, float) or math.isfinite(value)
        if not (low and high and finite) or (self.choices and value not in self.choices):
            raise ValueError
        return value


def _text(value: object) -> str:
    """The text that `_Parser.parse` turns back into `value`."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return ",".join(map(_text, value))
    return repr(value) if isinstance(value, float) else str(value)


def _parsers(cls: type) -> dict[str, _Parser]:
    hints = typing.get_type_hints(cls)
    return {f.name: _Parser(hints[f.name], meta=f.metadata) for f in dataclasses.fields(cls)}


def _preset_values(cls: type, presets: Presets) -> dict[str, dict[str, Any]]:
    """Checked values of every preset; a mistake here is ours, so it is not a UsageError."""
    parsers = _parsers(cls)
    for name, values in presets.items():
        if unknown := sorted(set(values) - set(parsers)):
            raise ValueError(f"preset {name}: {cls.__name__} has no field {', '.join(unknown)}")
    return {
        name: {key: parsers[key].parse(value) for key, value in values.items()}
        for name, values in presets.items()
    }


def define(
    cls: type,
    *,
    presets: Presets = types.MappingProxyType({}),
    flag_values: absl_flags.FlagValues = absl_flags.FLAGS,
) -> None:
    """Define one absl flag for each field of `cls`, and --preset if there are any."""
    _preset_values(cls, presets)
    parsers = _parsers(cls)
    rows = [(f.name, f.default, f.metadata.get("help", f.name)) for f in dataclasses.fields(cls)]
    if presets:
        parsers["preset"] = _Parser(str, meta={"choices": tuple(presets)})
        rows.append(("preset", None, "start from these values"))
    for name, default, help in rows:
        boolean = parsers[name].type is bool
        flag = absl_flags.Flag(parsers[name], None, name, default, help, boolean=boolean)
        absl_flags.DEFINE_flag(flag, flag_values)


def build(
    cls: type,
    presets: Presets = types.MappingProxyType({}),
    flag_values: absl_flags.FlagValues = absl_flags.FLAGS,
) -> Any:
    """The `cls` that the parsed flags describe; UsageError where its own checks refuse them.

    Its checks are `__post_init__` and, if there is one, `validate()`: they raise ValueError.
    """
    preset = flag_values["preset"].value if presets else None
    values = _preset_values(cls, presets)[preset] if preset else {}
    for f in dataclasses.fields(cls):
        if f.name not in values or flag_values[f.name].present:
            values[f.name] = flag_values[f.name].value
    try:
        cfg = cls(**values)
        if hasattr(cfg, "validate"):
            cfg.validate()
    except ValueError as error:
        raise UsageError(str(error)) from error
    return cfg


def to_flagfile(cfg: Any) -> str:
    """A flagfile that gives every field of `cfg` (a dataclass, or its `asdict`) this value."""
    values = dict(cfg) if isinstance(cfg, Mapping) else dataclasses.asdict(cfg)
    lines = [f"--{name}={_text(value)}" for name, value in values.items()]
    for line in lines:
        if line.splitlines() != [line.strip()]:
            raise UsageError(f"{line!r}: expected one line without blanks at the end")
    return "".join(f"{line}\n" for line in lines)


def usage(cls: type, presets: Presets, *, doc: str, program: str) -> str:
    """What --help prints: every flag with type, unit, default, range and values in presets."""
    parsers, values, lines = _parsers(cls), _preset_values(cls, presets), []

    def add(flag: str, text: str) -> None:
        lines.append(f"  {flag}")
        lines.extend(textwrap.wrap(text, 92, initial_indent=" " * 8, subsequent_indent=" " * 8))

    preset = "[--preset=NAME] " if presets else ""
    lines += [f"usage: {program} {preset}[--flagfile=FILE] [--FLAG=VALUE ...]", "", doc.strip(), ""]
    if presets:
        add("--preset=" + "|".join(presets), "start from these values; flags given explicitly win")
    add("--flagfile=FILE", "read flags from a file: one on each line, # begins a comment line")
    for f in dataclasses.fields(cls):
        parser, meta = parsers[f.name], f.metadata
        if meta.get("group"):
            lines += ["", meta["group"]]
        default = _text(f.default) or "empty"
        facts = [f"default {default} {meta.get('unit', '')}".strip()]
        facts += [parser.bounds()] if parser.bounds() else []
        facts += ["or none"] if parser.optional and f.default is not None else []
        facts += [f"{name}: {_text(own[f.name])}" for name, own in values.items() if f.name in own]
        flag = f"--[no]{f.name}" if parser.type is bool else f"--{f.name}={parser.metavar()}"
        add(flag, f"{meta.get('help', '')} [{'; '.join(facts)}]")
    return "\n".join(lines)


def parse(
    cls: type, presets: Presets, argv: Sequence[str], flag_values: absl_flags.FlagValues
) -> Any:
    """`build` from a command line; whatever is wrong with it is a UsageError."""
    if "--flagfile=" in argv:
        raise UsageError("--flagfile=: expected the path of a file with one flag on each line")
    try:
        rest = flag_values(argv)[1:]
    except absl_flags.UnrecognizedFlagError as error:
        close = difflib.get_close_matches(error.flagname, list(flag_values), 3)
        hint = f"did you mean --{' or --'.join(close)}? " if close else ""
        raise UsageError(f"--{error.flagname}: unknown flag; {hint}(see --help)") from error
    except absl_flags.CantOpenFlagFileError as error:
        cause = typing.cast(OSError, error.__context__)
        raise UsageError(
            f"--flagfile={cause.filename}: {cause.strerror}; expected a readable file"
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError("--flagfile: expected a text file with one flag on each line") from error
    except (absl_flags.Error, ValueError) as error:  # absl: "flag --name=value: <our sentence>"
        raise UsageError(str(error).removeprefix("flag ")) from error
    if rest:
        raise UsageError(f"{rest[0]!r}: unexpected argument; expected --flag=value (see --help)")
    return build(cls, presets, flag_values)


def run(
    main: Callable[[Any], int | None],
    cls: type,
    *,
    presets: Presets = types.MappingProxyType({}),
    doc: str | None = None,
    argv: Sequence[str] | None = None,
) -> NoReturn:
    """Parse the command line, call `main(cfg)`, exit with the status that it returns (None: 0).

    A UsageError, ours or main's, is one sentence on stderr and status 2. --help prints `doc`
    (default: the docstring of main's module) and the flags on stdout, status 0.
    """
    argv = list(sys.argv if argv is None else argv)
    program = Path(argv[0]).stem
    flag_values = absl_flags.FlagValues()  # a fresh one: only our flags, and callable twice
    flag_values.set_gnu_getopt(True)
    define(cls, presets=presets, flag_values=flag_values)
    if {"--help", "-help", "-h"} & set(argv[1:]):
        doc = doc or inspect.getdoc(inspect.getmodule(main)) or ""
        print(usage(cls, presets, doc=doc, program=program))
        sys.exit(0)
    try:
        sys.exit(main(parse(cls, presets, argv, flag_values)))
    except UsageError as error:
        print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
