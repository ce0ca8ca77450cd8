"""Where candidate crystals come from: sheets, files, archives and databases.

Each source returns :class:`Candidates`: hosts with their crystal written inline (symmetrised with spglib), and a
rejection with its reason for whatever could not be read. One bad entry never stops the others.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ase.data import chemical_symbols

from defectnet.errors import InputError
from defectnet.hosts import downloads
from defectnet.hosts.filters import DISORDERED_ABOVE, Candidates, Rejection
from defectnet.hosts.sheet import Host, read_sheet

if TYPE_CHECKING:
    from pymatgen.core import Structure

    from defectnet.hosts.crystallography import Description

CURATED_SHEET = Path("config/hosts/curated.tsv")
"""Sheet of well-known materials that comes with the workflow, relative to the repository root."""

GAP_FIELDS = ("_*hse*gap*", "*gap*")
"""Patterns of OPTIMADE fields with band gaps in eV, best first."""

SNUMAT_GAP_FIELDS = ("band_gap_hse", "band_gap_hse0?", "*hse*gap")
"""Patterns of keys of a SNUMAT entry with fundamental gaps of the hybrid functional in eV, best first: not the direct
gaps (``*_optical``) and not those of the semilocal functional (``Band_gap_GGA``), which are a third too small."""

DOWNLOADS = Path("results/downloads")
"""Where answers of databases are kept, relative to the repository root."""

STRUCTURE_FILES = ("*.cif", "poscar*", "contcar*", "*.poscar", "*.vasp", "*.extxyz")
"""Names of structure files, whatever their case."""

Progress = Callable[[Sequence[Any]], Iterable[Any]]


def curated(path: str | Path = CURATED_SHEET) -> Candidates:
    """Hosts of a sheet. Raises :class:`InputError` when it is missing or malformed."""
    return Candidates(read_sheet(path), [])


def directory(path: str | Path, progress: Progress = iter) -> Candidates:
    """Structure files (:data:`STRUCTURE_FILES`) anywhere below a directory, in alphabetical order.

    The id is the path below the directory without suffix, with ``-`` between folders. A crystal that Wyckoff sites
    cannot give back, or a P1 cell of more than :data:`DISORDERED_ABOVE` atoms, keeps its file in ``structure``.
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
        host_id = as_id("-".join(name.with_suffix("").parts if _has_format_suffix(name) else name.parts))
        try:
            hosts.append(from_file(file, host_id, name.as_posix()))
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
    found: list[Host | Rejection] = []
    for number, line in enumerate(progress(lines), 1):
        place = f"{path.name}:{number}"
        try:
            entry = json.loads(line) if line.strip() else {}
        except json.JSONDecodeError as error:
            found.append(Rejection(place, "", "unreadable", f"{place}: not JSON ({error}); correct the line"))
            continue
        if not isinstance(entry, dict) or entry.get("type") != "structures":
            continue
        name = str(entry.get("id", number))
        found.append(_optimade_candidate(entry, as_id(name), gap_fields, f"{path.name} {name}", place))
    if not found:
        raise InputError(
            f"--path: {path} holds no OPTIMADE structures; give one JSON object of type structures per line"
        )
    return _split(found)


def optimade(
    providers: Sequence[str],
    query: str,
    folder: str | Path = DOWNLOADS,
    gap_fields: Sequence[str] = GAP_FIELDS,
    page_limit: int | None = None,
    progress: Progress = iter,
) -> Candidates:
    """Structures of OPTIMADE databases that match a filter.

    ``providers``, ``query``, ``page_limit`` and what is kept in ``folder``: :func:`downloads.optimade`; gaps and
    rejections: :func:`optimade_file`. Ids start with the provider's prefix; the reference is database, id and date.
    """
    pages = [
        page
        for provider in providers
        for page in downloads.optimade(provider, query, gap_fields, Path(folder), page_limit)
    ]
    found: list[Host | Rejection] = []
    for file in progress(pages):
        page = json.loads(file.read_bytes())
        prefix = str((page["meta"].get("provider") or {}).get("prefix") or "optimade")
        for entry in page["data"]:
            name = str(entry.get("id"))
            host_id = as_id(name if name.startswith(f"{prefix}-") else f"{prefix}-{name}")
            reference = f"OPTIMADE {prefix} {name}, {page['retrieved']}"
            found.append(_optimade_candidate(entry, host_id, gap_fields, reference, f"{file} {name}"))
    return _split(found)


def materials_project(
    query: Mapping[str, Any], folder: str | Path = DOWNLOADS, progress: Progress = iter
) -> Candidates:
    """Materials of the Materials Project, with its semilocal gaps.

    ``query`` and what is kept in ``folder``: :func:`downloads.materials_project`. The reference is version of the
    database and date.
    """
    from pymatgen.core import Structure

    from defectnet.hosts import crystallography as xtal

    found: list[Host | Rejection] = []
    for file in progress(downloads.materials_project(query, Path(folder))):
        page = json.loads(file.read_bytes())
        for document in page["data"]:
            name = str(document["material_id"])
            reference = f"Materials Project {page['database']} {name}, {page['retrieved']}"
            try:
                structure = xtal.ordered(Structure.from_dict(document["structure"]), name)
                gap_eV = _number(document.get("band_gap"))
                found.append(_described(structure, name, "materials-project", reference, gap_eV))
            except _UnusableError as error:
                found.append(Rejection(name, "", error.rule, f"{file} {name}: {error}"))
            except (InputError, AttributeError, KeyError, TypeError, ValueError) as error:
                reason = f"no ordered structure in the summary ({error})"
                found.append(Rejection(name, "", "unreadable", f"{file} {name}: {reason}"))
    return _split(found)


def snumat(path: str | Path, gap_fields: Sequence[str] = SNUMAT_GAP_FIELDS, progress: Progress = iter) -> Candidates:
    """Crystals of a SNUMAT archive (S. Kim et al., Sci. Data 7, 387 (2020)), read where it lies.

    The archive is a zip file with one ``Formula_ICSD.json`` per compound: the relaxed crystal as POSCAR in
    ``Structure_rlx``, ``ICSD_number``, ``SNUMAT_id`` and band gaps. ``gap_fields`` are shell patterns of their keys,
    best first. A second entry of the same ICSD number is rejected, as is whatever cannot be read.
    Raises :class:`InputError` when the archive is missing, damaged or holds no such files.
    """
    path = Path(path)
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(
            f"--path: {path} cannot be read ({error}); give the hybrid_bandgap_*.zip of Kim et al. (2020) as it is"
        ) from None
    found: list[Host | Rejection] = []
    first_of: dict[str, str] = {}
    with archive:
        members = [member for member in archive.infolist() if _is_entry(PurePosixPath(member.filename))]
        if not members:
            raise InputError(f"--path: {path} holds no Formula_ICSD.json; give the hybrid_bandgap_*.zip itself")
        for member in progress(sorted(members, key=lambda member: member.filename)):
            name = PurePosixPath(member.filename).stem
            try:
                entry = _snumat_entry(archive, member)
                icsd = str(entry.get("ICSD_number") or name)
                if icsd in first_of:
                    raise _UnusableError("duplicate", f"same ICSD number as {first_of[icsd]}")
                found.append(_from_snumat(entry, name, gap_fields))
                first_of[icsd] = member.filename
            except _UnusableError as error:
                found.append(Rejection(as_id(name), "", error.rule, f"{member.filename}: {error}"))
    return _split(found)


def _is_entry(name: PurePosixPath) -> bool:
    """Whether a file of an archive is an entry, not what an operating system puts beside it (``._GaAs_1.json``)."""
    return name.suffix.lower() == ".json" and not name.name.startswith(".")


def _snumat_entry(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> dict[str, Any]:
    """One file of an archive. Raises :class:`_UnusableError` when it is damaged or no JSON object."""
    try:
        entry = json.loads(archive.read(member))
    except ValueError as error:
        raise _UnusableError("unreadable", f"not JSON ({error})") from None
    except (OSError, EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise _UnusableError("unreadable", f"damaged in the archive ({error}); download it again") from None
    if not isinstance(entry, dict):
        raise _UnusableError("unreadable", "not a JSON object")
    return entry


def _from_snumat(entry: Mapping[str, Any], name: str, gap_fields: Sequence[str]) -> Host:
    """Host of a SNUMAT entry. Raises :class:`_UnusableError`."""
    from defectnet.hosts import crystallography as xtal

    lines = str(entry.get("Structure_rlx") or "").splitlines()
    try:
        structure = xtal.read_poscar("\n".join([name, *lines[1:]]), "Structure_rlx")  # the first line is of no use
    except InputError as error:
        raise _UnusableError("unreadable", str(error)) from None
    numbers = {"ICSD": entry.get("ICSD_number"), "SNUMAT": entry.get("SNUMAT_id")}
    reference = ", ".join([*(f"{label} {number}" for label, number in numbers.items() if number), "Kim et al. (2020)"])
    return _described(structure, as_id(name), "snumat", reference, _gap(entry, gap_fields))


class _UnusableError(Exception):
    """One entry that cannot become a host, with the rule it is counted under."""

    def __init__(self, rule: str, reason: str):
        super().__init__(reason)
        self.rule = rule


def _split(found: Sequence[Host | Rejection]) -> Candidates:
    hosts = [one for one in found if isinstance(one, Host)]
    return Candidates(hosts, [one for one in found if isinstance(one, Rejection)])


def as_id(name: str) -> str:
    """A file name made of the characters that ids may have."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name).lstrip(".-") or "_"


def _has_format_suffix(name: Path) -> bool:
    return name.suffix.lower() in {Path(pattern).suffix for pattern in STRUCTURE_FILES if pattern.startswith("*")}


def from_file(file: Path, host_id: str, reference: str) -> Host:
    """Host of a structure file, inline where that is readable and exact. Raises :class:`InputError`."""
    from defectnet.hosts import crystallography as xtal

    structure = xtal.read_structure(file)
    words = xtal.describe(structure)
    formula = structure.reduced_formula
    if words is None or (words.spacegroup == "P1" and words.n_atoms > DISORDERED_ABOVE):
        in_file = Host(host_id, formula, structure=file, source="directory", reference=reference)
        return replace(in_file, n_atoms=len(in_file.build()))
    return _inline(words, id=host_id, formula=formula, source="directory", reference=reference)


def _optimade_candidate(
    entry: Mapping[str, Any], host_id: str, gap_fields: Sequence[str], reference: str, place: str
) -> Host | Rejection:
    attributes = entry.get("attributes")
    if not isinstance(attributes, dict):
        attributes = {}
    try:
        return _from_optimade(host_id, attributes, gap_fields, reference)
    except _UnusableError as error:
        formula = str(attributes.get("chemical_formula_reduced") or "")
        return Rejection(host_id, formula, error.rule, f"{place}: {error}")


def _from_optimade(host_id: str, attributes: Mapping[str, Any], gap_fields: Sequence[str], reference: str) -> Host:
    """Host of an ordered, three-dimensional OPTIMADE structure. Raises :class:`_UnusableError`."""
    from pymatgen.core import Structure

    try:
        if (attributes.get("dimension_types") or [1, 1, 1]) != [1, 1, 1]:  # null where a database does not know
            raise _UnusableError("dimensions", "not periodic in three directions")
        symbol_of = {species["name"]: _only_symbol(species) for species in attributes["species"]}
        structure = Structure(
            attributes["lattice_vectors"],
            [symbol_of[name] for name in attributes["species_at_sites"]],
            attributes["cartesian_site_positions"],
            coords_are_cartesian=True,
        )
        return _described(structure, host_id, "optimade", reference, _gap(attributes, gap_fields))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise _UnusableError("unreadable", f"required OPTIMADE fields are missing or malformed ({error!r})") from None


def _described(structure: Structure, host_id: str, source: str, reference: str, gap_eV: float | None) -> Host:
    """Host with its crystal inline. Raises :class:`_UnusableError` where that is not possible."""
    from defectnet.hosts import crystallography as xtal

    try:
        words = xtal.describe(structure)
    except InputError as error:
        raise _UnusableError("unreadable", str(error)) from None
    if words is None:
        raise _UnusableError(
            "unreadable", "Wyckoff sites do not reproduce it; export it as CIF and use --source directory"
        )
    formula = structure.reduced_formula
    return _inline(words, id=host_id, formula=formula, gap_eV=gap_eV, source=source, reference=reference)


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
            numbers = [_number(each) for each in (value if isinstance(value, list) else [value])]
            known = [number for number in numbers if number is not None]
            if known:
                return float(statistics.median_low(known))
    return None


def _number(value: Any) -> float | None:
    """A finite number, or text of one; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
