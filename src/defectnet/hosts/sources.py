"""Where candidate crystals come from: the curated sheet, a directory of structure files, an OPTIMADE JSON-lines file.

Each source returns :class:`Candidates`: hosts with their crystal written inline (symmetrised with spglib), and a
rejection with its reason for whatever could not be read. One bad entry never stops the others.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ase.data import chemical_symbols

from defectnet.errors import InputError
from defectnet.hosts.filters import Candidates, Rejection
from defectnet.hosts.sheet import Host, read_sheet

if TYPE_CHECKING:
    from defectnet.hosts.crystallography import Description

CURATED_SHEET = Path("config/hosts/curated.tsv")
"""Sheet of well-known materials that comes with the workflow, relative to the repository root."""

GAP_FIELDS = ("_*hse*gap*", "*gap*")
"""Patterns of OPTIMADE fields with band gaps in eV, best first."""

INLINE_P1_ATOMS_MAX = 25
"""A larger cell without any symmetry (amorphous, say) stays in its file: inline, it would be an unreadable row."""

STRUCTURE_FILES = ("*.cif", "poscar*", "contcar*", "*.poscar", "*.vasp", "*.extxyz")
"""Names of structure files, whatever their case."""

Progress = Callable[[Sequence[Any]], Iterable[Any]]


def curated(path: str | Path = CURATED_SHEET) -> Candidates:
    """Hosts of a sheet. Raises :class:`InputError` when it is missing or malformed."""
    return Candidates(read_sheet(path), [])


def directory(path: str | Path, progress: Progress = iter) -> Candidates:
    """Structure files (:data:`STRUCTURE_FILES`) anywhere below a directory, in alphabetical order.

    The id is the path below the directory without suffix, with ``-`` between folders. A crystal that Wyckoff sites
    cannot give back, or a P1 cell of more than :data:`INLINE_P1_ATOMS_MAX` atoms, keeps its file in ``structure``.
    Raises :class:`InputError` when the directory is missing or holds no such file.
    """
    root = Path(path)
    files = sorted(
        file
        for file in root.rglob("*")
        if file.is_file() and any(fnmatch(file.name.lower(), pattern) for pattern in STRUCTURE_FILES)
    )
    if not files:
        raise InputError(f"--path: {root} holds no structure files ({', '.join(STRUCTURE_FILES)})")
    hosts, rejected = [], []
    for file in progress(files):
        name = file.relative_to(root)
        host_id = _as_id("-".join(name.with_suffix("").parts if _has_format_suffix(name) else name.parts))
        try:
            hosts.append(_from_file(file, host_id, name.as_posix()))
        except InputError as error:
            rejected.append(Rejection(host_id, "", "unreadable", str(error)))
    return Candidates(hosts, rejected)


def optimade_file(path: str | Path, gap_fields: Sequence[str] = GAP_FIELDS, progress: Progress = iter) -> Candidates:
    """Structures of an OPTIMADE JSON-lines file: one ``structures`` resource per line, other lines are skipped.

    ``gap_fields`` are shell patterns of attribute names, best first: the gap is the first number found, or the lower
    median of the first list of numbers (databases that join gaps by formula list one per polymorph). Entries with
    partial occupancy, vacancies, missing positions or fewer than three periodic directions are rejected.
    Raises :class:`InputError` when the file is missing or holds no structures.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--path: {path} cannot be read ({error}); give an OPTIMADE JSON-lines file") from None
    hosts, rejected = [], []
    for number, line in enumerate(progress(lines), 1):
        place = f"{path.name}:{number}"
        try:
            entry = json.loads(line) if line.strip() else {}
        except json.JSONDecodeError as error:
            rejected.append(Rejection(place, "", "unreadable", f"{place}: not JSON ({error}); correct the line"))
            continue
        if not isinstance(entry, dict) or entry.get("type") != "structures":
            continue
        name, attributes = str(entry.get("id", number)), entry.get("attributes")
        if not isinstance(attributes, dict):
            attributes = {}
        host_id = _as_id(name)
        try:
            hosts.append(_from_optimade(host_id, attributes, gap_fields, f"{path.name} {name}"))
        except _UnusableError as error:
            formula = str(attributes.get("chemical_formula_reduced") or "")
            rejected.append(Rejection(host_id, formula, error.rule, f"{place}: {error}"))
    if not hosts and not rejected:
        raise InputError(
            f"--path: {path} holds no OPTIMADE structures; give one JSON object of type structures per line"
        )
    return Candidates(hosts, rejected)


class _UnusableError(Exception):
    """One OPTIMADE entry that cannot become a host, with the rule it is counted under."""

    def __init__(self, rule: str, reason: str):
        super().__init__(reason)
        self.rule = rule


def _as_id(name: str) -> str:
    """A file name made of the characters that ids may have."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name).lstrip(".-") or "_"


def _has_format_suffix(name: Path) -> bool:
    return name.suffix.lower() in {Path(pattern).suffix for pattern in STRUCTURE_FILES if pattern.startswith("*")}


def _from_file(file: Path, host_id: str, reference: str) -> Host:
    """Host of a structure file, inline where that is readable and exact. Raises :class:`InputError`."""
    from defectnet.hosts import crystallography as xtal

    structure = xtal.read_structure(file)
    words = xtal.describe(structure)
    formula = structure.reduced_formula
    if words is None or (words.spacegroup == "P1" and words.n_atoms > INLINE_P1_ATOMS_MAX):
        in_file = Host(host_id, formula, structure=file, source="directory", reference=reference)
        return replace(in_file, n_atoms=len(in_file.build()))
    return _inline(words, id=host_id, formula=formula, source="directory", reference=reference)


def _from_optimade(host_id: str, attributes: Mapping[str, Any], gap_fields: Sequence[str], reference: str) -> Host:
    """Host of an ordered, three-dimensional OPTIMADE structure. Raises :class:`_UnusableError`."""
    from pymatgen.core import Structure

    from defectnet.hosts import crystallography as xtal

    try:
        if attributes.get("dimension_types", [1, 1, 1]) != [1, 1, 1]:
            raise _UnusableError("dimensions", "not periodic in three directions")
        symbol_of = {species["name"]: _only_symbol(species) for species in attributes["species"]}
        structure = Structure(
            attributes["lattice_vectors"],
            [symbol_of[name] for name in attributes["species_at_sites"]],
            attributes["cartesian_site_positions"],
            coords_are_cartesian=True,
        )
        words = xtal.describe(structure)
    except InputError as error:
        raise _UnusableError("unreadable", str(error)) from None
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise _UnusableError("unreadable", f"required OPTIMADE fields are missing or malformed ({error!r})") from None
    if words is None:
        raise _UnusableError(
            "unreadable", "Wyckoff sites do not reproduce it; export it as CIF and use --source directory"
        )
    gap = _gap(attributes, gap_fields)
    formula = structure.reduced_formula
    return _inline(words, id=host_id, formula=formula, gap_eV=gap, source="optimade", reference=reference)


def _only_symbol(species: Mapping[str, Any]) -> str:
    """The one element that fully occupies a species' sites. Raises :class:`_UnusableError` for any other species."""
    symbols, shares = species["chemical_symbols"], species.get("concentration", [1.0])
    if len(symbols) != 1 or symbols[0] not in chemical_symbols[1:] or shares[0] < 1.0 - 1e-6:
        raise _UnusableError("disorder", f"species {species['name']} is partially occupied, a vacancy or unknown")
    return symbols[0]


def _inline(words: Description, **columns: Any) -> Host:
    a, b, c, alpha, beta, gamma = words.parameters
    cell = {"a": a, "b": b, "c": c, "alpha": alpha, "beta": beta, "gamma": gamma}
    return Host(spacegroup=words.spacegroup, sites=words.sites, n_atoms=words.n_atoms, **cell, **columns)


def _gap(attributes: Mapping[str, Any], patterns: Sequence[str]) -> float | None:
    """Gap in eV from the first field, in the order of the patterns and then of names, that holds numbers."""
    for pattern in patterns:
        for name in sorted(name for name in attributes if fnmatch(name.lower(), pattern.lower())):
            value = attributes[name]
            numbers = [v for v in (value if isinstance(value, list) else [value]) if _is_number(v)]
            if numbers:
                return float(statistics.median_low(numbers))
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
