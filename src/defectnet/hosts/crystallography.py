"""Crystals as space group, cell parameters and Wyckoff sites, and back.

Symmetry operations and setting names come from spglib's database of the 530 Hall settings
(A. Togo et al., Sci. Technol. Adv. Mater. Meth. 4, 2384822 (2024)). Lengths in Å, angles in degrees, positions
fractional. Errors are :class:`InputError` with ``field: what is wrong; remedy`` per line, fields being sheet columns.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np
import spglib
from ase.data import atomic_numbers, chemical_symbols, covalent_radii
from pymatgen.core import Lattice, Structure

from defectnet.errors import InputError

SYMPREC_A = 0.01
"""Tolerance in Å of the symmetry search in structures that others made."""

EXACT_SYMPREC_A = 1e-3
"""Tolerance in Å for cells built from Wyckoff sites: they are symmetric up to printed digits."""

ON_SITE_A = 0.005
"""A position this close in Å to its image under an operation lies on that symmetry element ("0.3333" is a third)."""

CONTACT_RATIO = 0.6
"""Atoms closer than this times the sum of covalent radii overlap; real crystals start at 0.64 (Cs-Cs in CsCr5S8)."""

CONTACT_MIN_A = 0.5
"""Atoms closer than this in Å overlap whatever they are."""

ISOLATED_A = 6.0
"""A crystal whose closest atoms are farther apart than this in Å has its cell in another unit."""

NO_SYMMETRY = "structure: spglib finds no symmetry, atoms overlap or the cell is flat; correct the structure"

_SITE = re.compile(r"(?P<element>[A-Z][a-z]?)\s+(?P<multiplicity>\d+)(?P<letter>[A-Za-z])\s+(?P<xyz>\S+\s+\S+\s+\S+)")

_CELL_RULES = {
    "triclinic": "any cell",
    "monoclinic": "90° for both angles other than the one of the unique axis",
    "orthorhombic": "alpha = beta = gamma = 90°",
    "tetragonal": "a = b, alpha = beta = gamma = 90°",
    "hexagonal": "a = b, alpha = beta = 90°, gamma = 120°",
    "rhombohedral": "a = b = c, alpha = beta = gamma",
    "cubic": "a = b = c, alpha = beta = gamma = 90°",
}


@dataclass(frozen=True)
class Site:
    """One Wyckoff site: the element, its stated multiplicity and letter, and one position of the orbit."""

    element: str
    multiplicity: int
    letter: str
    position: tuple[float, float, float]


@dataclass(frozen=True)
class ConventionalCell:
    """Every atom of a conventional cell in the setting ``hall_number``.

    ``lattice`` [3, 3] has the vectors as rows, in Å; ``positions`` [N, 3] are fractional in [0, 1);
    ``symbols`` and ``orbits`` have length N, ``orbits[i]`` being the index in ``sites`` of the site atom i belongs to.
    """

    hall_number: int
    lattice: np.ndarray
    positions: np.ndarray
    symbols: tuple[str, ...]
    orbits: tuple[int, ...]
    sites: tuple[Site, ...]

    @property
    def spglib_cell(self) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Lattice, positions and atomic numbers, as spglib takes them."""
        return self.lattice, self.positions, [atomic_numbers[symbol] for symbol in self.symbols]


@dataclass(frozen=True)
class Description:
    """A crystal in the words of a host sheet: the fields that :func:`conventional_cell` takes, and the number of atoms
    in its primitive cell.
    """

    spacegroup: str
    parameters: tuple[float, float, float, float, float, float]
    sites: str
    n_atoms: int


# --- space groups -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Setting:
    hall_number: int
    number: int
    symbol: str
    choice: str
    names: frozenset[str]

    @property
    def label(self) -> str:
        return f"{self.symbol}:{self.choice}" if self.choice else self.symbol


@cache
def _settings() -> tuple[_Setting, ...]:
    """The 530 settings of spglib's database, with every name each of them is called by."""
    settings = []
    for hall in range(1, 531):
        kind = spglib.get_spacegroup_type(hall)
        spellings = [kind.international_full, kind.international_short, *kind.international.split("=")]
        if 3 <= kind.number <= 15:  # "P 1 2_1/n 1" is usually written P2_1/n
            spellings += [" ".join(part for part in name.split() if part != "1") for name in spellings]
        names = frozenset([str(kind.number), *(name.replace(" ", "") for name in spellings)])
        settings.append(_Setting(hall, kind.number, kind.international_short, kind.choice, names))
    return tuple(settings)


def hall_number(spacegroup: str) -> int:
    """Hall number (1-530) of a Hermann-Mauguin symbol or number, with an optional ``:choice`` in spglib's notation.

    Without a choice the standard setting of the International Tables is meant (unique axis b, cell choice 1), or the
    only one that carries the symbol (``Pbnm``, ``P2_1/n``). Groups with two origins or with hexagonal and rhombohedral
    axes have no usual setting: the :class:`InputError` lists their choices.
    """
    symbol, colon, choice = spacegroup.replace(" ", "").partition(":")
    named = [setting for setting in _settings() if symbol in setting.names]
    if not named:
        raise InputError(
            f"spacegroup: {symbol!r} is not in spglib's database; write a symbol such as F-43m or P6_3/mmc, or 1 to 230"
        )
    if colon:
        chosen = [setting for setting in named if setting.choice == choice]
    else:
        chosen = [setting for setting in named if setting.choice in ("", "b", "b1")]
        if len(chosen) != 1:  # a non-standard symbol that names one setting, or one with unique axis b
            chosen = named if len(named) == 1 else [setting for setting in named if setting.choice.startswith("b")]
    if len(chosen) != 1:
        choices = ", ".join(f"{symbol}:{setting.choice}" if setting.choice else symbol for setting in named)
        what = f"has no choice {choice!r}" if colon else "does not say which setting"
        raise InputError(f"spacegroup: {spacegroup!r} {what}; write one of {choices}")
    return chosen[0].hall_number


def spacegroup_number(spacegroup: str) -> int:
    """Number (1-230) of a space group written as for :func:`hall_number`."""
    return _settings()[hall_number(spacegroup) - 1].number


def spacegroup_label(hall: int) -> str:
    """Symbol, and choice where there are several: the inverse of :func:`hall_number`."""
    return _settings()[hall - 1].label


@cache
def _operations(hall: int) -> tuple[np.ndarray, np.ndarray]:
    """Rotations [G, 3, 3] and translations [G, 3] of a setting, centring included."""
    operations = spglib.get_symmetry_from_database(hall)
    return operations["rotations"], operations["translations"]


def general_positions(spacegroup: str) -> int:
    """Multiplicity of the general position in the conventional cell; divided by that of a site, the order of the
    site's symmetry.
    """
    return len(_operations(hall_number(spacegroup))[0])


# --- sites ------------------------------------------------------------------------------------------------------------


def parse_sites(text: str) -> tuple[Site, ...]:
    """Sites from text such as ``Ga 4a 0 0 0; As 4c 1/4 1/4 1/4``. :class:`InputError` lists all bad ones."""
    sites, problems = [], []
    for part in (part.strip() for part in text.split(";")):
        match = _SITE.fullmatch(part)
        if match is None or match["element"] not in chemical_symbols[1:]:
            problems.append(
                f"sites: {part!r} is not a site; write element, Wyckoff position, x y z: 'As 4c 1/4 1/4 1/4'"
            )
            continue
        try:
            x, y, z = (float(Fraction(value)) for value in match["xyz"].split())
        except (ValueError, ZeroDivisionError):
            problems.append(
                f"sites: {match['xyz']!r} in {part!r} are not three numbers; write decimals or fractions (1/3)"
            )
            continue
        sites.append(Site(match["element"], int(match["multiplicity"]), match["letter"], (x, y, z)))
    if problems:
        raise InputError("\n".join(problems))
    return tuple(sites)


def _format_coordinate(value: float) -> str:
    fraction = Fraction(value).limit_denominator(12)
    if abs(value - fraction) < 1e-6:  # a special position; 1e-6 of a cell edge is below any tolerance used here
        return str(fraction % 1)
    return f"{value % 1:.7f}".rstrip("0")


def format_sites(sites: Sequence[Site]) -> str:
    """Text that :func:`parse_sites` reads back to 1e-6 of a cell edge."""
    return "; ".join(
        f"{site.element} {site.multiplicity}{site.letter} {' '.join(map(_format_coordinate, site.position))}"
        for site in sites
    )


def _separation_A(a: np.ndarray, b: np.ndarray, lattice: np.ndarray) -> np.ndarray:
    """Distance in Å between fractional positions [..., 3], up to lattice translations (exact for short distances)."""
    difference = a - b
    return np.linalg.norm((difference - np.round(difference)) @ lattice, axis=-1)


def _orbit(position: np.ndarray, hall: int, lattice: np.ndarray) -> np.ndarray:
    """All positions [M, 3] in [0, 1) equivalent to one, which is first moved onto the symmetry elements it lies on."""
    rotations, translations = _operations(hall)
    images = rotations @ position + translations
    onto_itself = images[_separation_A(images, position, lattice) < ON_SITE_A]
    position = np.mean(onto_itself - np.round(onto_itself - position), axis=0)
    images = rotations @ position + translations
    same = _separation_A(images[:, None], images[None, :], lattice) < ON_SITE_A
    return _wrap(images[same.argmax(axis=1) == np.arange(len(images))])


def _wrap(positions: np.ndarray) -> np.ndarray:
    """Positions in [0, 1), without the 0.9999999999 that rounding makes of a zero."""
    return np.round(positions, 10) % 1.0


# --- from sheet to crystal --------------------------------------------------------------------------------------------


def conventional_cell(spacegroup: str, parameters: Sequence[float], sites: str) -> ConventionalCell:
    """Expand Wyckoff sites into all atoms of the conventional cell.

    ``parameters`` are a, b, c in Å and alpha, beta, gamma in degrees. Raises :class:`InputError` that lists every
    problem: an unknown or ambiguous space group, a cell without the group's symmetry, a site that cannot be parsed,
    or whose orbit does not have the stated multiplicity, or that falls on another site.
    """
    problems: list[str] = []
    parsed: tuple[Site, ...] = ()
    hall = lattice = None
    try:
        parsed = parse_sites(sites)
    except InputError as error:
        problems.append(str(error))
    try:
        hall = hall_number(spacegroup)
        lattice = _lattice(hall, parameters)
    except InputError as error:
        problems.append(str(error))
    if hall is None or lattice is None or not parsed:
        raise InputError("\n".join(problems))

    orbits = [_orbit(np.array(site.position), hall, lattice) for site in parsed]
    for i, (site, orbit) in enumerate(zip(parsed, orbits, strict=True)):
        stated, where = f"{site.multiplicity}{site.letter}", " ".join(map(_format_coordinate, site.position))
        if len(orbit) != site.multiplicity:
            problems.append(
                f"sites: {site.element} {stated} at {where} has {len(orbit)} equivalent positions in "
                f"{spacegroup_label(hall)}, not {site.multiplicity}; correct the coordinates, the Wyckoff position "
                "or the setting"
            )
        for other, taken in zip(parsed[:i], orbits[:i], strict=True):
            if _separation_A(taken, orbit[0], lattice).min() < ON_SITE_A:
                problems.append(
                    f"sites: {site.element} {stated} at {where} is already taken by {other.element} "
                    f"{other.multiplicity}{other.letter}; remove one or correct its coordinates"
                )
    if problems:
        raise InputError("\n".join(problems))
    return ConventionalCell(
        hall_number=hall,
        lattice=lattice,
        positions=np.concatenate(orbits),
        symbols=tuple(site.element for site, orbit in zip(parsed, orbits, strict=True) for _ in orbit),
        orbits=tuple(i for i, orbit in enumerate(orbits) for _ in orbit),
        sites=parsed,
    )


def _lattice(hall: int, parameters: Sequence[float]) -> np.ndarray:
    """Lattice vectors [3, 3] as rows, in Å; :class:`InputError` unless they have the symmetry of the setting."""
    lengths, angles = parameters[:3], parameters[3:]
    # 1 + 2 cos α cos β cos γ − Σ cos² is the squared volume of the cell with unit edges.
    cosines = np.cos(np.radians(angles))
    spanned = 1 + 2 * cosines.prod() - (cosines**2).sum() > 1e-6
    if not (min(lengths) > 0 and min(angles) > 0 and max(angles) < 180 and spanned):
        raise InputError("a..gamma: these lengths and angles span no cell; give Å and degrees of the conventional cell")
    lattice = np.array(Lattice.from_parameters(*parameters).matrix)
    metric = lattice @ lattice.T
    rotations, _ = _operations(hall)
    if np.abs(rotations.transpose(0, 2, 1) @ metric @ rotations - metric).max() > 1e-3 * np.trace(metric) / 3:
        system = _crystal_system(hall)
        raise InputError(
            f"a..gamma: the cell does not have the symmetry of {spacegroup_label(hall)} ({system}); "
            f"it needs {_CELL_RULES[system]}, or another setting"
        )
    return lattice


def _crystal_system(hall: int) -> str:
    setting = _settings()[hall - 1]
    lasts = {2: "triclinic", 15: "monoclinic", 74: "orthorhombic", 142: "tetragonal", 194: "hexagonal", 230: "cubic"}
    if setting.choice == "R":
        return "rhombohedral"
    return next(system for last, system in lasts.items() if setting.number <= last)


def symmetry_problems(cell: ConventionalCell, n_atoms: int) -> list[str]:
    """What spglib finds that space group, Wyckoff letters and the ``n_atoms`` of the primitive cell do not say.

    One ``field: problem; remedy`` each. All from one search, which takes most of the time of checking a sheet.
    Letters are compared where spglib's search ends in the same origin and axes, as it does for all but a few crystals.
    """
    stated = _settings()[cell.hall_number - 1]
    found = spglib.get_symmetry_dataset(cell.spglib_cell, symprec=EXACT_SYMPREC_A)
    if found is None:
        return [NO_SYMMETRY]
    problems = n_atoms_problems(n_atoms, len(set(found.mapping_to_primitive)))
    if found.number != stated.number:
        return [
            *problems,
            f"spacegroup: the sites have the symmetry {found.international} ({found.number}), not {stated.symbol} "
            f"({stated.number}); state that group or correct the sites",
        ]
    if found.hall_number != cell.hall_number:
        found = spglib.get_symmetry_dataset(cell.spglib_cell, symprec=EXACT_SYMPREC_A, hall_number=cell.hall_number)
    shift = found.origin_shift - np.round(found.origin_shift)
    if not (np.allclose(found.transformation_matrix, np.eye(3), atol=1e-4) and np.allclose(shift, 0, atol=1e-4)):
        return problems
    for i, site in enumerate(cell.sites):
        letter = found.wyckoffs[cell.orbits.index(i)]
        if letter != site.letter:
            problems.append(
                f"sites: {site.element} {site.multiplicity}{site.letter} lies on {site.multiplicity}{letter}; "
                "write that letter or correct the coordinates"
            )
    return problems


def n_atoms_problems(stated: int, found: int) -> list[str]:
    """Whether a row's number of atoms is that of the primitive cell."""
    return [] if stated == found else [f"n_atoms: {stated} but the primitive cell has {found}; write {found}"]


def primitive_cell(
    lattice: np.ndarray, positions: np.ndarray, symbols: Sequence[str], symprec_A: float = EXACT_SYMPREC_A
) -> Structure:
    """Symmetrised primitive cell in spglib's standard orientation, a function of the crystal's setting alone.

    ``lattice`` [3, 3] in Å (rows), ``positions`` [N, 3] fractional. Raises :class:`InputError` when spglib finds no
    symmetry, which means overlapping atoms or a degenerate cell.
    """
    numbers = [atomic_numbers[symbol] for symbol in symbols]
    cell = spglib.standardize_cell((lattice, positions, numbers), to_primitive=True, symprec=symprec_A)
    if cell is None:
        raise InputError(NO_SYMMETRY)
    lattice, positions, numbers = cell
    return Structure(np.round(lattice, 10), [chemical_symbols[z] for z in numbers], _wrap(positions))


def contact_problems(structure: Structure) -> list[str]:
    """Overlapping atoms or an implausibly empty cell, as ``field: problem; remedy``; empty when all is well."""
    i, j, _, distances = structure.get_neighbor_list(ISOLATED_A)
    if len(distances) == 0:
        return [f"a..gamma: no two atoms are within {ISOLATED_A:g} Å; give the cell in Å"]
    radii = covalent_radii[[site.specie.Z for site in structure]]
    shortest = np.maximum(CONTACT_RATIO * (radii[i] + radii[j]), CONTACT_MIN_A)
    worst = np.argmin(distances / shortest)
    if distances[worst] >= shortest[worst]:
        return []
    pair = "-".join(structure[int(atom)].specie.symbol for atom in sorted((i[worst], j[worst])))
    return [
        f"sites: {pair} are {distances[worst]:.2f} Å apart, below {shortest[worst]:.2f} Å "
        f"(covalent radii); correct the cell or the coordinates"
    ]


# --- from crystal to sheet --------------------------------------------------------------------------------------------


def describe(structure: Structure, symprec_A: float = SYMPREC_A) -> Description | None:
    """Symmetrise an ordered structure and put it in the words of a host sheet.

    The result is the standardised conventional cell of spglib, with the lexicographically first position of each orbit;
    None when that text does not rebuild the symmetrised cell to :data:`ON_SITE_A`.
    Raises :class:`InputError` when spglib finds no symmetry at all.
    """
    symbols = [site.specie.symbol for site in structure]
    cell = (structure.lattice.matrix, structure.frac_coords, [atomic_numbers[symbol] for symbol in symbols])
    found = spglib.get_symmetry_dataset(cell, symprec=symprec_A)
    if found is None:
        raise InputError(NO_SYMMETRY)
    letter_of = dict(zip(found.mapping_to_primitive, found.wyckoffs, strict=True))
    letters = [letter_of[atom] for atom in found.std_mapping_to_primitive]
    standard_symbols = [chemical_symbols[z] for z in found.std_types]

    sites = []
    pending = np.ones(len(letters), dtype=bool)
    for atom in range(len(letters)):
        if not pending[atom]:
            continue
        orbit = _orbit(found.std_positions[atom], found.hall_number, found.std_lattice)
        gap = _separation_A(found.std_positions[:, None], orbit[None, :], found.std_lattice).min(axis=1)
        pending &= gap > ON_SITE_A
        first = np.lexsort((np.round(orbit, 6) % 1).T[::-1])[0]
        sites.append(Site(standard_symbols[atom], len(orbit), letters[atom], tuple(map(float, orbit[first]))))
    order = {element.symbol: i for i, element in enumerate(sorted(structure.elements))}  # by electronegativity
    sites.sort(key=lambda site: (order[site.element], site.letter, site.position))

    spacegroup = spacegroup_label(found.hall_number)
    parameters = tuple(round(float(p), 6) for p in Lattice(found.std_lattice).parameters)
    text = format_sites(sites)
    try:
        rebuilt = conventional_cell(spacegroup, parameters, text)
    except InputError:
        return None
    if not _same_atoms(rebuilt, found.std_positions, standard_symbols):
        return None
    return Description(spacegroup, parameters, text, n_atoms=len(set(found.mapping_to_primitive)))


def _same_atoms(cell: ConventionalCell, positions: np.ndarray, symbols: Sequence[str]) -> bool:
    """Whether both list the same atoms of one cell, in whatever order."""
    apart = _separation_A(positions[:, None], cell.positions[None, :], cell.lattice)
    nearest = apart.argmin(axis=1)
    return (
        sorted(nearest) == list(range(len(cell.symbols)))
        and apart.min(axis=1).max() < ON_SITE_A
        and [cell.symbols[i] for i in nearest] == list(symbols)
    )


def read_structure(path: Path) -> Structure:
    """Ordered crystal from a CIF, POSCAR/CONTCAR/``.vasp`` or single-frame ``.extxyz`` file.

    Raises :class:`InputError` when the file is missing or unreadable, disordered, or not periodic in three directions.
    """
    if not path.is_file():
        raise InputError(f"structure: {path} does not exist; paths are relative to the folder of the sheet")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            structure = _read_extxyz(path) if path.suffix.lower() == ".extxyz" else _read_with_pymatgen(path)
    except InputError:
        raise
    except Exception as error:  # parsers raise whatever they stumble over
        message = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"structure: {path} cannot be read ({message}); correct or remove the file") from None
    return ordered(structure, str(path))


def read_poscar(text: str, name: str) -> Structure:
    """Ordered crystal from the text of a POSCAR, called ``name`` in messages. Raises :class:`InputError`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            structure = _parse_poscar(text)
    except Exception as error:  # parsers raise whatever they stumble over
        message = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"structure: {name} cannot be read ({message}); correct or remove it") from None
    return ordered(structure, name)


def ordered(structure: Structure, name: str) -> Structure:
    """The structure without oxidation states, once it is known to have one chemical element on every site.

    Raises :class:`InputError` that calls it ``name`` otherwise.
    """
    if not structure.is_ordered:
        raise InputError(f"structure: {name} has partial occupancy; give an ordered structure")
    structure.remove_oxidation_states()
    unknown = sorted({site.specie.symbol for site in structure} - set(chemical_symbols[1:]))
    if unknown:
        raise InputError(f"structure: {name} contains {', '.join(unknown)}, not a chemical element; correct it")
    return structure


def _read_with_pymatgen(path: Path) -> Structure:
    return Structure.from_file(path) if path.suffix.lower() == ".cif" else _parse_poscar(path.read_text())


def _parse_poscar(text: str) -> Structure:
    from pymatgen.io.vasp.inputs import BadPoscarWarning

    with warnings.catch_warnings():
        warnings.simplefilter("error", BadPoscarWarning)  # a POSCAR without symbols gets invented elements otherwise
        return Structure.from_str(text, fmt="poscar")


def _read_extxyz(path: Path) -> Structure:
    from ase.io import read

    frames = read(path, index=":", format="extxyz")
    if len(frames) != 1:
        raise InputError(f"structure: {path} has {len(frames)} frames; write one structure per file")
    atoms = frames[0]
    if not atoms.pbc.all() or atoms.cell.rank != 3:
        raise InputError(
            f"structure: {path} is not periodic in three directions; add Lattice and pbc to its comment line"
        )
    return Structure(atoms.cell.array, atoms.get_chemical_symbols(), atoms.get_scaled_positions())
