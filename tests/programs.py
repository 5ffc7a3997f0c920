"""Programs of launch in the process of the tests, and what they answer."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

Answer = tuple[int, str, str]


def fixture_for(module: ModuleType, *flags: str) -> Callable[..., Any]:
    """A fixture: program(*flags) -> (status, stdout, stderr) of `module`, after `flags` of its own.

    A module of tests says `program = fixture_for(isvd_link, "--devices=1")`.
    """
    name = module.__name__.rpartition(".")[2]

    @pytest.fixture
    def program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable:
        def call(*args: Any) -> Answer:
            argv = [name, "--compilation_cache=", *flags, *map(str, args)]
            monkeypatch.setattr(sys, "argv", argv)
            with pytest.raises(SystemExit) as ended:
                module.cli()
            return (ended.value.code or 0, *capsys.readouterr())

        return call

    return program


def summary(answer: Answer, status: int = 0) -> dict[str, Any]:
    """The last line of stdout, of a program that ended with this status."""
    assert answer[0] == status, answer[2]
    return json.loads(answer[1].splitlines()[-1])


def assert_refused(answer: Answer, *texts: str, program: str) -> None:
    """Status 2, one sentence on stderr, nothing on stdout."""
    status, out, err = answer
    assert (status, out) == (2, "")
    assert err.startswith(f"{program}: ")
    assert err.count("\n") == 1
    for text in texts:
        assert text in err


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file of a folder, to compare with later."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
