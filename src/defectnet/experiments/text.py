"""Text tables of one spectrum: comments, headers, commas, semicolons or blanks, decimal points or commas."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from defectnet.errors import InputError
from defectnet.experiments.columns import Columns, unit_in, unit_in_header

COMMENT = ("#", "%", "!", "//", "@", "&", "'", '"')
MISSING = frozenset({"", "nan", "na", "n/a", "null", "none", "-", "--", "inf", "-inf", "+inf"})
"""Fields that stand for no value."""

_NUMBER = re.compile(r"[-+]?(?:\d+[.,]?\d*|[.,]\d+)(?:[eEdD][-+]?\d+)?")
_ENERGY_NAME = re.compile(r"energ|freq|omega|ω|wave\s?number|^(?:e|x|w|hw|de)$|^e\s*[\[(]", re.IGNORECASE)
_INTENSITY_NAME = re.compile(r"intens|dos|signal|counts|^(?:y|i|g|s)$|^[gs]\s*\(", re.IGNORECASE)
_PROSE = frozenset({"in", "of", "the", "and", "from", "at", "with", "by", "is", "are", "for"})
_ERROR_NAME = re.compile(r"err|sigma|σ|unc|std|±|^d[yi]$", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of numbers.

    values : [P, C]
    lines  : [P] number of each row's line in the file
    names  : of the columns, if the header gives them
    header : lines of comments and words
    """

    values: np.ndarray
    lines: np.ndarray
    names: list[str] | None
    header: list[str]


def read_text(content: bytes, source: str, columns: Sequence[str | int] | None) -> Columns:
    """Energy, intensity and, where there is one, error from a text table.

    ``columns`` names or numbers (from 1) two or three columns, in that order; without it, two columns are energy and
    intensity, a third is the error, and of more than three the names in the header decide. LAMP's INX files are known
    by their first line. Raises :class:`InputError` naming line or column.
    """
    text = _decoded(content)
    table = _read_inx(text, source) or read_table(text, source)
    chosen = _columns(table, columns, source)
    picked = [table.values[:, column] for column in chosen]
    _refuse_swapped(picked[0], picked[1], columns is None, source)
    _refuse_several(picked[0], table.lines, source)
    unit = unit_in(table.names[chosen[0]]) if table.names else None
    error = picked[2] if len(picked) == 3 else None
    return Columns(picked[0], picked[1], error, None, unit or unit_in_header(table.header, source))


def _decoded(content: bytes) -> str:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16", errors="replace")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def read_table(text: str, source: str) -> Table:
    """The only table of a text. Raises :class:`InputError` naming the line that is no row of it."""
    header: list[str] = []
    rows: list[tuple[int, str]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        bare = line.strip()
        if bare.startswith(COMMENT):
            header.append(bare.lstrip("#%!/@&'\" \t").rstrip("'\""))
            continue
        bare = re.split(r"[#!]", bare, maxsplit=1)[0].strip()
        if not bare:
            continue
        if _is_row(bare):
            rows.append((number, bare))
        elif rows:
            raise InputError(f"{source}: line {number}: {bare[:40]!r} is not a row of numbers; correct or remove it")
        else:
            header.append(bare)
    if not rows:
        what = "is empty" if not text.strip() else f"holds no rows of numbers, it begins {text.strip()[:40]!r}"
        raise InputError(f"{source}: {what}; give a table of energy, intensity and, if known, error")
    separator, decimal_comma = _separation([row for _, row in rows], source)
    fields = [(number, _split(row, separator)) for number, row in rows]
    fields = _without_spectrum_number(fields, source)
    width = len(fields[0][1])
    for number, row in fields:
        if len(row) != width:
            raise InputError(
                f"{source}: line {number}: {len(row)} columns where line {fields[0][0]} has {width}; "
                "write nan where a value is missing"
            )
    values = np.array([[_number(field, decimal_comma) for field in row] for _, row in fields])
    if width > 1 and np.isnan(values[:, -1]).all():  # rows that end with a separator
        values = values[:, :-1]
    lines = np.array([number for number, _ in fields])
    return Table(values, lines, _names(header, separator, values.shape[1]), header)


def _read_inx(text: str, source: str) -> Table | None:
    """The table of an INX file, None if it is none: three more lines of header, then energy, intensity and error.

    The first line's eight integers begin with the number of lines that follow and end with the number of rows. Masked
    points have an error of -1.
    """
    lines = text.splitlines()
    counts = lines[0].split() if lines else []
    if len(counts) != 8 or not all(re.fullmatch(r"-?\d+", count) for count in counts):
        return None
    count = int(counts[-1])
    if int(counts[0]) != count + 3 or len(lines) < count + 4:
        return None
    if any(line.strip() for line in lines[count + 4 :]):
        raise InputError(f"{source}: line {count + 5}: begins another spectrum; sum them, or save one per file")
    table = read_table("\n".join(lines[4 : count + 4]), source)
    if table.values.shape[1] == 3:
        table.values[table.values[:, 2] < 0, 1:] = np.nan
    return replace(table, lines=table.lines + 4, header=[lines[1]])


def _is_row(line: str) -> bool:
    fields = [field for field in re.split(r"[\s,;]+", line) if field]
    numbers = [field for field in fields if _NUMBER.fullmatch(field)]
    return bool(numbers) and all(_NUMBER.fullmatch(field) or field.lower() in MISSING for field in fields)


def _separation(rows: list[str], source: str) -> tuple[str | None, bool]:
    """What separates fields (None: blanks), and whether commas are decimal signs."""
    points, commas = any("." in row for row in rows), any("," in row for row in rows)
    ambiguous = InputError(
        f"{source}: commas may separate columns or decimals here; separate columns by semicolons or blanks, "
        "or write decimal points"
    )
    if any(";" in row for row in rows):
        if commas and points:
            raise ambiguous
        return ";", commas
    if not commas:
        return None, False
    if points:
        return ",", False
    blanks = [row.split() for row in rows]
    loose = any(field.startswith(",") or field.endswith(",") for row in blanks for field in row)
    if all(len(row) > 1 for row in blanks):
        if not loose:
            return None, True
        if any("," in field.strip(",") for row in blanks for field in row):
            raise ambiguous
        return ",", False
    # Only commas and whole numbers: counts at whole energies, unless that makes no energy axis.
    first = [row.split(",")[0] for row in rows]
    if any(row.count(",") > 2 for row in rows) or len(set(first)) < len(first):
        raise ambiguous
    return ",", False


def _split(row: str, separator: str | None) -> list[str]:
    if separator == ",":  # commas and blanks may both separate, as in "1.0, 2.0 0.1"
        return re.split(r"\s*,\s*|\s+", row)
    return [field.strip() for field in row.split(separator)]


def _number(field: str, decimal_comma: bool) -> float:
    if field.lower() in MISSING:
        return np.nan
    return float(re.sub("[dD]", "e", field.replace(",", ".") if decimal_comma else field))


def _without_spectrum_number(fields: list[tuple[int, list[str]]], source: str) -> list[tuple[int, list[str]]]:
    """Mantid's SaveAscii writes the number of a spectrum on a line of its own, above its rows."""
    alone = [number for number, row in fields if len(row) == 1]
    if not alone or len(alone) == len(fields):
        return fields
    if len(alone) > 1:
        raise InputError(f"{source}: line {alone[1]}: begins another spectrum; sum them, or save one per file")
    return [(number, row) for number, row in fields if number != alone[0]]


def _names(header: list[str], separator: str | None, count: int) -> list[str] | None:
    """Names of the columns: the last line of the header that has as many as there are columns, an energy among them."""
    for line in reversed(header):
        if "=" in line or ":" in line or _PROSE & set(line.lower().split()):  # says something else
            continue
        splits = [re.split(r"[,;\t]" if separator is None else separator, line), re.split(r"\t+|\s{2,}", line)]
        splits.append(re.findall(r"[^\s,;(\[]+(?:\s*[(\[][^)\]]*[)\]])*", line))  # blanks belong to brackets
        for split in splits:
            names = [name.strip(" \t\"'") for name in split]
            if len(names) == count and all(names) and any(_ENERGY_NAME.search(one) or unit_in(one) for one in names):
                return names
    return None


def _columns(table: Table, wanted: Sequence[str | int] | None, source: str) -> list[int]:
    count, names = table.values.shape[1], table.names
    told = ", ".join(f"{i + 1} {names[i]!r}" if names else str(i + 1) for i in range(count))
    if wanted is not None:
        if len(wanted) not in (2, 3):
            raise InputError(f"--columns: {len(wanted)} given; give energy, intensity and, if there is one, error")
        return [
            _column(one, count, names, f"{source}: --columns {one}: no such column; there are {told}") for one in wanted
        ]
    if count == 1:
        raise InputError(f"{source}: one column of numbers; energy and intensity are needed, error is welcome")
    if count == 2:
        return [0, 1]
    if names is None:
        if count == 3:
            return [0, 1, 2]
    else:
        if [name.lower() for name in names[:3]] == ["x", "y", "e"]:  # Mantid; a fourth is the error of x
            return [0, 1, 2]
        kinds = (_ENERGY_NAME, _INTENSITY_NAME, _ERROR_NAME)
        errors = {i for i, name in enumerate(names) if _ERROR_NAME.search(name)}
        found = [[i for i, name in enumerate(names) if kind.search(name) and i not in errors] for kind in kinds[:2]]
        found.append(sorted(errors))
        if count == 3 and errors == {2}:
            return [0, 1, 2]
        if len(found[0]) == 1 and len(found[1]) == 1 and len(errors) <= 1:
            return [found[0][0], found[1][0], *found[2]]
    raise InputError(
        f"{source}: {count} columns ({told}); say with --columns which are energy, intensity and, if any, error"
    )


def _column(wanted: str | int, count: int, names: list[str] | None, complaint: str) -> int:
    text = str(wanted).strip()
    if text.isdecimal() and 1 <= int(text) <= count:
        return int(text) - 1
    plain = [re.split(r"[(\[]", name)[0].strip().lower() for name in names or []]
    for candidates in ([name.lower() for name in names or []], plain):
        if candidates.count(text.lower()) == 1:
            return candidates.index(text.lower())
    raise InputError(complaint)


def _refuse_swapped(energy: np.ndarray, intensity: np.ndarray, guessed: bool, source: str) -> None:
    """Energies go one way; if only the second column does, it is the energy."""
    steps = [np.diff(values[np.isfinite(values)]) for values in (energy, intensity)]
    one_way = [len(step) > 3 and bool((step > 0).all() or (step < 0).all()) for step in steps]
    turns = np.count_nonzero(np.diff(np.sign(steps[0])) != 0)
    if guessed and one_way[1] and not one_way[0] and turns > 3:
        raise InputError(
            f"{source}: column 2 ascends or descends from row to row and column 1 does not: intensity and energy are "
            "swapped; say --columns 2,1"
        )


def _refuse_several(energy: np.ndarray, lines: np.ndarray, source: str) -> None:
    """Blocks of rows, between them comments or empty lines, must not cover the same energies: those are two spectra."""
    low, high = np.inf, -np.inf
    for start, stop in pairwise([0, *(np.flatnonzero(np.diff(lines) > 1) + 1), len(lines)]):
        block = energy[start:stop]
        block = block[np.isfinite(block)]
        if not len(block):
            continue
        if block.min() < high and block.max() > low:
            raise InputError(
                f"{source}: line {lines[start]}: begins another spectrum over the same energies; sum them, or save one "
                "per file"
            )
        low, high = min(low, block.min()), max(high, block.max())
