"""The host sheet: one crystal per line, complete enough to rebuild its cell, readable and diffable.

A tab-separated file with one header line; lines that start with ``#`` are comments. A crystal is given either by space
group, conventional cell and Wyckoff sites, or by a structure file, never both; :class:`Host` explains the columns.
This module imports nothing heavy, because workflows read sheets of thousands of hosts at parse time.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from defectnet.errors import InputError
from defectnet.files import write_atomically

if TYPE_CHECKING:
    from pymatgen.core import Structure

SOURCES = ("curated", "directory", "extxyz", "amorphous", "optimade", "snumat", "materials-project")

CELL_COLUMNS = ("spacegroup", "a", "b", "c", "alpha", "beta", "gamma", "sites")

IN_PARALLEL = 200
"""Sheets with more hosts than this are checked by several processes: symmetry takes up to 25 ms of each."""

_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Host:
    """One row of a host sheet; None where a column is empty.

    id: unique, letters, digits, ``_ . -``: it becomes a file name.
    formula: reduced formula. family: readable name of the structure type.
    spacegroup: Hermann-Mauguin symbol or number, with ``:choice`` of spglib where there are several settings.
    a, b, c (Å), alpha, beta, gamma (degrees): conventional cell in that setting.
    sites: ``Ga 4a 0 0 0; As 4c 1/4 1/4 1/4``.
    structure: file with the crystal instead; relative to the sheet's folder in the sheet, a usable path here.
    gap_eV: band gap. n_atoms: atoms in the primitive cell.
    source: one of :data:`SOURCES`. reference: citation, or the database's id with the date it was downloaded.
    line: line of the sheet it was read from, for messages.
    """

    id: str
    formula: str
    family: str | None = None
    spacegroup: str | None = None
    a: float | None = None
    b: float | None = None
    c: float | None = None
    alpha: float | None = None
    beta: float | None = None
    gamma: float | None = None
    sites: str | None = None
    structure: Path | None = None
    gap_eV: float | None = None
    n_atoms: int | None = None
    source: str | None = None
    reference: str | None = None
    line: int | None = field(default=None, compare=False, repr=False)

    @property
    def parameters(self) -> tuple[float | None, ...]:
        """a, b, c in Å and alpha, beta, gamma in degrees; None for a host given by a structure file."""
        return self.a, self.b, self.c, self.alpha, self.beta, self.gamma

    def build(self) -> Structure:
        """Symmetrised primitive cell in spglib's standard orientation; the same row always gives the same cell.

        Raises :class:`InputError` with ``id: field: what is wrong; remedy`` per line.
        """
        from defectnet.hosts import crystallography as xtal

        with _naming(self.id):
            if self.structure is not None:
                read = xtal.read_structure(self.structure)
                symbols = [site.specie.symbol for site in read]
                return xtal.primitive_cell(read.lattice.matrix, read.frac_coords, symbols, xtal.SYMPREC_A)
            cell = xtal.conventional_cell(self.spacegroup, self.parameters, self.sites)
            return xtal.primitive_cell(cell.lattice, cell.positions, cell.symbols)


COLUMNS = tuple(column.name for column in fields(Host) if column.name != "line")
"""Columns of a sheet, in order."""


def read_sheet(path: str | Path) -> list[Host]:
    """Hosts of a sheet, in its order.

    Checks form only (columns, numbers, unique ids); :func:`check_hosts` checks the crystals.
    Raises :class:`InputError` that lists all problems as ``path:line: id: field: what is wrong; remedy``.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise InputError(f"{path}: no such host sheet; make one with `defectnet hosts select`") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason}); save the sheet as UTF-8") from None
    rows = [(number, line) for number, line in enumerate(lines, 1) if line.strip() and not line.startswith("#")]
    if not rows or tuple(rows[0][1].split("\t")) != COLUMNS:
        number = rows[0][0] if rows else 1
        raise InputError(f"{path}:{number}: header: must be these columns, separated by tabs: {' '.join(COLUMNS)}")
    hosts, problems = [], []
    for number, line in rows[1:]:
        values = line.split("\t")
        if len(values) != len(COLUMNS):
            problems.append(
                f"{path}:{number}: {values[0]}: columns: {len(values)} values for {len(COLUMNS)} columns; "
                "separate them by single tabs and leave empty values empty"
            )
            continue
        try:
            hosts.append(_parse_row(values, path.parent, number))
        except InputError as error:
            problems += [f"{path}:{number}: {values[0]}: {text}" for text in str(error).splitlines()]
    problems += _id_problems(hosts, path)
    if problems:
        raise InputError("\n".join(problems))
    return hosts


def write_sheet(path: str | Path, hosts: Iterable[Host], comment: str = "") -> None:
    """Write a sheet, replacing the file in one step; ``structure`` paths become relative to its folder.

    ``comment`` is a line of its own above the header.
    """
    path = Path(path)
    lines = [*_format_comment(comment), "\t".join(COLUMNS), *(_format_row(host, path.parent) for host in hosts)]
    write_atomically(path, ("\n".join(lines) + "\n").encode())


def extend_sheet(path: str | Path, hosts: Iterable[Host], comment: str = "") -> None:
    """Append rows to a sheet, in one step; what is there, comments included, stays byte for byte.

    ``comment`` is a line of its own above the new rows.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    if not text.endswith("\n"):
        text += "\n"
    lines = [*_format_comment(comment), *(_format_row(host, path.parent) for host in hosts)]
    write_atomically(path, (text + "".join(f"{line}\n" for line in lines)).encode())


def check_hosts(
    hosts: Sequence[Host],
    sheet_path: str | Path,
    vocabulary: Iterable[str],
    progress: Callable[[Sequence[Host]], Iterable[Host]] = iter,
) -> None:
    """Build every host and compare it with what its row says.

    ``vocabulary`` are the allowed element symbols; ``progress`` may wrap the loop. Raises one :class:`InputError` that
    lists all problems as ``path:line: id: field: what is wrong; remedy``.
    """
    find = partial(_host_problems, allowed=frozenset(vocabulary))
    problems = _id_problems(hosts, sheet_path)
    with ProcessPoolExecutor() if len(hosts) > IN_PARALLEL else nullcontext() as pool:
        found = pool.map(find, hosts, chunksize=IN_PARALLEL // 10) if pool else map(find, hosts)
        for host, texts in zip(progress(hosts), found, strict=True):
            problems += [f"{_place(host, sheet_path)}: {text}" for text in texts]
    if problems:
        raise InputError("\n".join(problems))


def _host_problems(host: Host, allowed: frozenset[str]) -> list[str]:
    """Everything wrong with one host, as ``id: field: problem; remedy``."""
    from pymatgen.core import Composition, Structure

    from defectnet.hosts import crystallography as xtal

    try:
        if host.structure is None:
            with _naming(host.id):
                cell = xtal.conventional_cell(host.spacegroup, host.parameters, host.sites)
            structure = Structure(cell.lattice, cell.symbols, cell.positions)
            problems = xtal.symmetry_problems(cell, host.n_atoms)
        else:
            structure = host.build()
            problems = xtal.n_atoms_problems(host.n_atoms, len(structure))
    except InputError as error:
        return str(error).splitlines()
    outside = sorted({site.specie.symbol for site in structure} - allowed)
    if outside:
        problems.append(
            f"sites: {', '.join(outside)} not in the vocabulary; remove the host or extend hosts.vocabulary"
        )
    try:
        stated = Composition(host.formula).reduced_formula
    except ValueError:
        problems.append(f"formula: {host.formula!r} is not a chemical formula; write {structure.reduced_formula}")
    else:
        if stated != structure.reduced_formula:
            problems.append(f"formula: {host.formula} but the crystal is {structure.reduced_formula}; correct either")
    problems += xtal.contact_problems(structure)
    return [f"{host.id}: {problem}" for problem in problems]


@contextmanager
def _naming(host_id: str) -> Iterator[None]:
    """Put the host's id before every line of an :class:`InputError`."""
    try:
        yield
    except InputError as error:
        raise InputError("\n".join(f"{host_id}: {line}" for line in str(error).splitlines())) from None


def _place(host: Host, sheet_path: str | Path) -> str:
    return f"{sheet_path}:{host.line}" if host.line else str(sheet_path)


def _id_problems(hosts: Sequence[Host], sheet_path: str | Path) -> list[str]:
    problems, first = [], {}
    for host in hosts:
        if not _ID.fullmatch(host.id):
            problems.append(
                f"{_place(host, sheet_path)}: {host.id}: id: is no file name; "
                "use letters, digits, _ . - and start with none of the last two"
            )
        if host.id in first:
            where = f"on line {first[host.id].line}" if first[host.id].line else "above"
            problems.append(f"{_place(host, sheet_path)}: {host.id}: id: already used {where}; rename one")
        first.setdefault(host.id, host)
    return problems


def _number(text: str) -> float:
    """A finite float; ValueError otherwise."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


_PARSERS: dict[str, Callable[[str], object]] = dict.fromkeys(
    ("a", "b", "c", "alpha", "beta", "gamma", "gap_eV"), _number
)
_PARSERS["n_atoms"] = int


def _parse_row(values: Sequence[str], folder: Path, line: int) -> Host:
    """One host; :class:`InputError` with ``field: problem; remedy`` per line."""
    row: dict[str, object] = {}
    problems = []
    for column, text in zip(COLUMNS, map(str.strip, values), strict=True):
        try:
            row[column] = _PARSERS.get(column, str)(text) if text else None
        except ValueError:
            kind = "an integer" if column == "n_atoms" else "a number"
            problems.append(f"{column}: {text!r} is not {kind}; correct it")
            row[column] = text
    problems += [
        f"{column}: is empty; every host needs one"
        for column in ("id", "formula", "n_atoms", "source")
        if not row[column]
    ]
    if row["source"] and row["source"] not in SOURCES:
        problems.append(f"source: {row['source']!r} is unknown; write one of {', '.join(SOURCES)}")
    if row["structure"]:
        problems += [
            f"{column}: must be empty when a structure file is given; keep one of the two"
            for column in CELL_COLUMNS
            if row[column] is not None
        ]
        row["structure"] = folder / str(row["structure"])
    else:
        problems += [
            f"{column}: is empty; give {', '.join(CELL_COLUMNS)}, or a structure file"
            for column in CELL_COLUMNS
            if row[column] is None
        ]
    if problems:
        raise InputError("\n".join(problems))
    return Host(**row, line=line)


def _format_comment(comment: str) -> list[str]:
    return [f"# {' '.join(comment.split())}"] if comment else []


def _format_row(host: Host, folder: Path) -> str:
    values = {column: getattr(host, column) for column in COLUMNS}
    if host.structure is not None:
        values["structure"] = Path(os.path.relpath(host.structure, folder)).as_posix()
    return "\t".join("" if values[column] is None else _format_value(values[column]) for column in COLUMNS)


def _format_value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.10g}"
    return " ".join(str(value).split())  # a tab or line break inside a value would break the table
