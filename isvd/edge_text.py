"""Edge lists that are texts: two columns of ids, with the place of each row for messages.

Axes: E edges; a literal 2 for the two ends.
"""

import csv
import gzip
import itertools
import re
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

_GZIP_ERRORS = (EOFError, gzip.BadGzipFile, zlib.error)
_COMMENT = re.compile(r"(^|\s)[#%].*")
_WHOLE_NUMBER = re.compile(r"[+-]?[0-9]+")


def load_text(
    path: Path, delimiter: str | None, header: bool | None, names: bool, ignore_extra: bool
) -> tuple[np.ndarray, Callable[[int], str]]:
    """The ids (E, 2) of a text, int64 or str, and what tells the place of a row."""
    if delimiter is not None and (len(delimiter) != 1 or delimiter in '"#%\r\n'):
        raise ValueError(f'delimiter={delimiter!r}: expected one character, not one of # % and "')
    rows = list(itertools.islice(rows_of(path, delimiter), 2))
    if header is None:
        header = _has_header(path, rows, delimiter, names, ignore_extra)
    if len(rows) <= header:
        raise ValueError(f"{path}: no edges, expected at least one row")
    line, first = rows[header]
    _check_columns(path, line, first, delimiter, ignore_extra)
    numbers = all(map(is_number, first[:2]))
    ids_E2 = _load_numbers(path, delimiter, line - 1, ignore_extra) if numbers else None
    if ids_E2 is None:  # names, or damage: the slow way finds the line
        rows = itertools.islice(rows_of(path, delimiter), int(header), None)
        ids_E2 = _parse(path, rows, delimiter, numbers, names, ignore_extra)

    def place(row: int) -> str:
        line, _ = next(itertools.islice(rows_of(path, delimiter), row + header, None))
        return f"{path}, line {line}"

    return ids_E2, place


def _load_numbers(
    path: Path, delimiter: str | None, skip: int, ignore_extra: bool
) -> np.ndarray | None:
    """The quick way, in C: None where the text is not all whole numbers."""
    try:
        with _open_text(path) as lines, warnings.catch_warnings():
            warnings.simplefilter("error")  # numpy only warns of 1.5 as a whole number
            return np.loadtxt(
                lines,
                np.int64,
                # numpy has quotes or two signs of comments; a % in a .csv is left to the slow way.
                comments="#" if delimiter else ("#", "%"),
                delimiter=delimiter,
                quotechar='"' if delimiter else None,
                skiprows=skip,
                usecols=(0, 1) if ignore_extra else None,
                ndmin=2,
            )
    except (ValueError, Warning, *_GZIP_ERRORS):
        return None


def _parse(
    path: Path,
    rows: Iterator,
    delimiter: str | None,
    numbers: bool,
    names: bool,
    ignore_extra: bool,
) -> np.ndarray:
    ids = []
    for line, columns in rows:
        _check_columns(path, line, columns, delimiter, ignore_extra)
        for name in columns[:2]:
            if numbers or not names:
                _check_number(path, line, name, names)
            else:
                _check_name(path, line, name)
        ids.append(columns[:2])
    return np.array(ids, dtype=str).astype(np.int64) if numbers else np.array(ids, dtype=str)


def rows_of(path: Path, delimiter: str | None) -> Iterator[tuple[int, list[str]]]:
    """The number of each line that has columns, from 1, and the columns."""
    line = 0
    try:
        with _open_text(path) as lines:
            for line, text in enumerate(lines, 1):
                text = _COMMENT.sub("", text).strip()
                if text and delimiter is None:
                    yield line, text.split()
                elif text:
                    yield line, [c.strip() for c in next(csv.reader([text], delimiter=delimiter))]
    except _GZIP_ERRORS as error:
        raise ValueError(f"{path}, line {line + 1}: damaged gzip file: {error}") from error
    except csv.Error as error:
        raise ValueError(f"{path}, line {line}: {error}") from error


def _open_text(path: Path) -> Any:
    # A comment may be in any encoding: bytes that are not UTF-8 are refused only in ids.
    opener = gzip.open if path.suffix == ".gz" else open
    return opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape")


def _has_header(
    path: Path, rows: list, delimiter: str | None, names: bool, ignore_extra: bool
) -> bool:
    if not rows or any(map(is_number, rows[0][1])):
        return False
    if len(rows) == 2 and any(map(is_number, rows[1][1])):
        return True
    if names:
        _check_white_space(path, *rows[0], delimiter)
        # The last of these rows is an edge, whatever the first one is.
        line, columns = rows[-1]
        _check_columns(path, line, columns, delimiter, ignore_extra)
        for name in columns[:2]:
            _check_name(path, line, name)
        raise ValueError(
            f"{path}, line {rows[0][0]}: {(delimiter or ' ').join(rows[0][1])!r} may be a header "
            "or an edge; give header=True or header=False"
        )
    return True


def is_number(text: str) -> bool:
    return _WHOLE_NUMBER.fullmatch(text) is not None


def _check_white_space(path: Path, line: int, columns: list[str], delimiter: str | None) -> None:
    """Without a delimiter no name begins or ends with one: "0, 1" is not from node "0," to 1."""
    marks = [mark for name in columns[:2] for mark in (name[:1], name[-1:]) if mark in (",", ";")]
    if marks and delimiter is None:
        raise ValueError(
            f"{path}, line {line}: a {marks[0]!r} stands at the white space between columns, "
            f"expected white space alone; give delimiter={marks[0]!r}"
        )


def _check_columns(
    path: Path, line: int, columns: list[str], delimiter: str | None, ignore_extra: bool
) -> None:
    _check_white_space(path, line, columns, delimiter)
    if len(columns) < 2 or (len(columns) > 2 and not ignore_extra):
        if len(columns) > 2:
            hint = "; ignore_extra=True leaves the others aside"
        else:
            marks = [mark for mark in ",;\t|" if mark in columns[0]]
            hint = f"; give delimiter={marks[0]!r}" if marks else ""
        few = "1 column" if len(columns) == 1 else f"{len(columns)} columns"
        raise ValueError(f"{path}, line {line}: {few}, expected 2{hint}")


def _check_name(path: Path, line: int, name: str) -> None:
    if not name or not name.isprintable():
        raise ValueError(f"{path}, line {line}: {name!r} is not a name in UTF-8")


def _check_number(path: Path, line: int, text: str, names: bool) -> None:
    if not is_number(text):
        hint = "as in the first row" if names else "for ids are not remapped"
        raise ValueError(f"{path}, line {line}: {text!r} is not a whole number, {hint}")
    if len(text) > 18 and not -(2**63) <= int(text) < 2**63:
        raise ValueError(f"{path}, line {line}: id {text} is over 63 bits")
