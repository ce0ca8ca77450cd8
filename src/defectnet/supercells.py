"""Supercells of a host and the substitutions made in them.

Conventions. Lattices are [3, 3] with one vector per row, in Å. An expansion matrix T of integers holds the supercell
vectors in units of the primitive ones, row by row: ``supercell = T @ primitive``. phonopy writes vectors as columns,
so its ``supercell_matrix`` is ``T.T``. Concentrations are changed sites / sites of the undoped supercell, as fractions.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import spglib
from ase import Atoms
from ase.geometry import minkowski_reduce
from phonopy.structure.atoms import PhonopyAtoms
from phonopy.structure.cells import get_supercell
from pymatgen.core import Structure

from defectnet.config import Supercells
from defectnet.dopants import Candidate
from defectnet.elements import VACANCY
from defectnet.errors import InputError, PhysicsError, RecordError
from defectnet.seeds import generator

EDGES_RATIO_MAX = 3.0
"""Longest over shortest edge of repeated supercells: no needles."""

SHAPE_TOLERANCE = 0.05
"""Share of the shape that is given up for symmetry and size."""

SUBLATTICE_FRACTION_MAX = 0.5
"""Dopants together take at most this share of the sites of one host element, so that the host stays the host."""

EXHAUSTIVE_MAX = 10_000
"""Most superlattices that are compared without a choice; see :func:`expansion_matrix`."""

SIZES_MAX = 50
"""Most supercell sizes, counted from the largest, that are compared where the search is not exhaustive."""

_ROTATION_ORDER = {3: 1, -1: 2, 0: 3, 1: 4, 2: 6}  # trace -> order
_SYMPREC_A = 1e-3
_PLAN_ATTEMPTS = 20


@dataclass(frozen=True)
class Supercell:
    """A supercell that remembers where its atoms come from.

    atoms  : N atoms in phonopy's order (all images of primitive atom 0, then of atom 1 …), no doping.
    parent : [N] index of the primitive atom of which each atom is a lattice translation.
    """

    atoms: Atoms
    parent: np.ndarray


@dataclass(frozen=True)
class Plan:
    """Which atoms of a supercell are replaced: ``dopants[i]`` goes to atom ``sites[i]``; sites ascend.

    A dopant :data:`~defectnet.elements.VACANCY` leaves its site empty.
    """

    sites: tuple[int, ...]
    dopants: tuple[str, ...]

    @classmethod
    def single(cls, parent: np.ndarray, atom: int, dopant: str) -> Plan:
        """One ``dopant`` on the first copy of an ``atom`` of the primitive cell; ``parent`` [N] as in Supercell."""
        return cls((int(np.flatnonzero(parent == atom)[0]),), (dopant,))

    def concentrations(self, n_sites: int) -> dict[str, float]:
        """Substituted sites / ``n_sites`` of every dopant element, as fractions, by symbol in alphabetical order.

        What counts is the substitution: Ga on an As site of GaAs is a dopant, Ga on its own site is not.
        """
        return {dopant: count / n_sites for dopant, count in sorted(Counter(self.dopants).items())}

    def occupied(self, n_sites: int) -> np.ndarray:
        """[N] the sites that hold an atom, ascending."""
        empty = [site for site, dopant in zip(self.sites, self.dopants, strict=True) if dopant == VACANCY]
        return np.delete(np.arange(n_sites), empty)


@dataclass(frozen=True)
class HostPlan:
    """Everything that is decided for one host before any force is computed.

    matrix     : integer [3, 3] expansion matrix T.
    n_sites    : atoms of the supercell ``expand(primitive, matrix)``, which the sites of ``plans`` index.
    orbits     : (atom, symbol) of the first of each set of symmetry-equivalent atoms of the primitive cell.
    candidates : the dopants that could have been chosen.
    """

    host_id: str
    matrix: np.ndarray
    n_sites: int
    orbits: tuple[tuple[int, str], ...]
    candidates: tuple[Candidate, ...]
    plans: tuple[Plan, ...]

    def plan_of(self, item: str) -> Plan:
        """The arrangement of the doped supercell ``doped-0``, ``doped-1`` … ."""
        return self.plans[int(item.removeprefix("doped-"))]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, ready for JSON."""
        return {
            "host_id": self.host_id,
            "matrix": self.matrix.tolist(),
            "n_sites": self.n_sites,
            "orbits": self.orbits,
            "candidates": [candidate.to_dict() for candidate in self.candidates],
            "plans": [{"sites": list(plan.sites), "dopants": list(plan.dopants)} for plan in self.plans],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> HostPlan:
        """Inverse of :meth:`to_dict`."""
        return cls(
            host_id=values["host_id"],
            matrix=np.array(values["matrix"], dtype=int),
            n_sites=values["n_sites"],
            orbits=tuple((atom, symbol) for atom, symbol in values["orbits"]),
            candidates=tuple(Candidate.from_dict(candidate) for candidate in values["candidates"]),
            plans=tuple(Plan(tuple(plan["sites"]), tuple(plan["dopants"])) for plan in values["plans"]),
        )


def read_plans(path: Path) -> tuple[dict[str, HostPlan], dict[str, str]]:
    """Plans by host of one batch, and for hosts without one the reason. Raises :class:`RecordError`."""
    try:
        made = json.loads(path.read_text())
        return {host_id: HostPlan.from_dict(plan) for host_id, plan in made["plans"].items()}, made["failed"]
    except FileNotFoundError:
        raise RecordError(f"{path}: no such file; run `defectnet supercells` for this batch, or the workflow") from None
    except (ValueError, KeyError, TypeError) as error:
        raise RecordError(
            f"{path}: not a file of plans ({type(error).__name__}: {error}); delete it and run again"
        ) from None


# --- expansion ---------------------------------------------------------------------------------------------------


def expansion_matrix(
    lattice: np.ndarray, n_primitive: int, atoms_min: int, atoms_max: int, rotations: np.ndarray | None = None
) -> np.ndarray:
    """The expansion matrix T, integer [3, 3] with positive determinant, of the best supercell in a range of sizes.

    Parameters: ``lattice`` [3, 3] in Å and ``n_primitive`` atoms of the primitive cell; the supercell has
    ``atoms_min`` to ``atoms_max`` atoms; ``rotations`` integer [G, 3, 3], the point group of the crystal acting on
    columns of fractional coordinates, as spglib gives it (default: the point group of the lattice).

    *Shape* is the distance between an atom and its nearest periodic image over the cube root of the volume: 1 for a
    cube, 1.12 at most (fcc), and the same for every basis of a superlattice. A cube is good enough, so among
    superlattices whose shape is within 5 % of a cube (of the best one, where that is worse), the order is

    1. most rotations of the host that map the superlattice onto itself, because symmetry saves displacements,
    2. most atoms,
    3. best shape.

    All superlattices of every allowed size are compared, not only diagonal T (Hart & Forcade, Phys. Rev. B 77, 224115
    (2008)). Where they are more than :data:`EXHAUSTIVE_MAX`, these are compared: of the :data:`SIZES_MAX` largest
    sizes all superlattices that keep a rotation and are not obviously flat; if none of them has a good shape (always
    so for triclinic hosts) also an even sample of all superlattices of the largest size.
    The rows of T are the Minkowski-reduced basis of the chosen superlattice.

    Raises :class:`InputError` if no multiple of ``n_primitive`` lies in the range.
    """
    indices = range(-(-atoms_min // n_primitive), atoms_max // n_primitive + 1)
    if not indices:
        raise InputError(_no_multiple(n_primitive, atoms_min, atoms_max))
    if rotations is None:
        rotations = spglib.get_symmetry_dataset((lattice, [[0, 0, 0]], [1]), symprec=_SYMPREC_A).rotations
    reduced, operation = minkowski_reduce(lattice)  # reduced = operation @ lattice
    turns = _turns(rotations, operation)

    if sum(_count(index) for index in indices) <= EXHAUSTIVE_MAX:
        found = np.concatenate([_superlattices(index) for index in indices])
        shapes = _shapes(found, reduced)
    else:
        largest = indices[-SIZES_MAX:]
        found = np.concatenate(
            [np.empty((0, 3, 3), int)] + [_invariant(largest, turn, reduced) for turn in _axes(turns)]
        )
        shapes = _shapes(found, reduced)
        if shapes.max(initial=0) < 1 - SHAPE_TOLERANCE:
            found = np.concatenate([found, _superlattices(indices[-1], EXHAUSTIVE_MAX)])
            shapes = _shapes(found, reduced)

    good = shapes >= (1 - SHAPE_TOLERANCE) * min(shapes.max(), 1)
    found, shapes = found[good], shapes[good]
    volume = np.rint(np.linalg.det(found)).astype(int)
    order = np.lexsort((-shapes.round(6), -volume, -_kept(found, volume, turns)))
    chosen = found[order[0]]
    matrix = minkowski_reduce(chosen @ reduced)[1] @ chosen @ operation
    return matrix if np.linalg.det(matrix) > 0 else -matrix


def repetition(cell: np.ndarray, n_atoms: int, atoms_min: int) -> np.ndarray:
    """How often to repeat a supercell along its vectors, [3] integers, until it has ``atoms_min`` atoms.

    Parameters: ``cell`` [3, 3] in Å (rows), its number of atoms. Of repetitions to at most half as many atoms again
    whose longest edge is at most :data:`EDGES_RATIO_MAX` times the shortest, or as near to that as there are, the one
    with the fewest atoms, because modes cost as the cube of their number.
    """
    least = -(-atoms_min // n_atoms)
    most = -(-3 * least // 2)
    times = [
        (a, b, c)
        for a in range(1, most + 1)
        for b in range(1, most // a + 1)
        for c in range(-(-least // (a * b)), most // (a * b) + 1)
    ]
    edges = np.array(times) * np.linalg.norm(cell, axis=1)
    longer = np.round(edges.max(axis=1) / edges.min(axis=1), 6)
    limit = max(EDGES_RATIO_MAX, longer.min())
    return np.array(min((math.prod(k), far, k) for k, far in zip(times, longer, strict=True) if far <= limit)[2])


def _no_multiple(n_primitive: int, atoms_min: int, atoms_max: int) -> str:
    above = -(-atoms_min // n_primitive) * n_primitive
    below = atoms_max // n_primitive * n_primitive
    remedy = f"raise atoms_max to {above}"
    if below > 0 and atoms_min - below < above - atoms_max:
        remedy = f"lower atoms_min to {below}"
    return (
        f"supercells.atoms_min/atoms_max: no multiple of the {n_primitive}-atom primitive cell lies in "
        f"{atoms_min}-{atoms_max}; {remedy}"
    )


def _turns(rotations: np.ndarray, operation: np.ndarray) -> np.ndarray:
    """The distinct proper rotations [P, 3, 3] that act on rows of integers in the basis ``operation @ lattice``.

    A lattice is its own inversion image, so improper operations count as their proper halves.
    """
    proper = rotations * np.rint(np.linalg.det(rotations)).astype(int)[:, None, None]
    inverse = np.rint(np.linalg.inv(operation)).astype(int)
    return np.unique(operation @ proper.transpose(0, 2, 1) @ inverse, axis=0)


def _axes(turns: np.ndarray) -> list[np.ndarray]:
    """One rotation of order 2 or 3 for every class of equivalent axes; a lattice with any rotation has one of these."""
    inverses = np.rint(np.linalg.inv(turns)).astype(int)
    axes, seen = [], set()
    for turn in turns:
        order = _ROTATION_ORDER[int(np.trace(turn))]
        if order in (2, 3) and turn.tobytes() not in seen:
            axes.append(turn)
            for power in (turn, turn @ turn):
                seen |= {conjugate.tobytes() for conjugate in inverses @ power @ turns}
    return axes


def _blocks(index: int) -> Iterator[tuple[int, int, int]]:
    """The diagonals (a, d, f) of all Hermite normal forms of determinant ``index``."""
    for a in _divisors(index):
        for d in _divisors(index // a):
            yield a, d, index // a // d


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _count(index: int) -> int:
    """Number of superlattices whose cell is ``index`` times the primitive one."""
    return sum(d * f * f for _, d, f in _blocks(index))


def _superlattices(index: int, at_most: int | None = None) -> np.ndarray:
    """Row Hermite normal forms [[a, b, c], [0, d, e], [0, 0, f]] of determinant ``index``, [M, 3, 3].

    Each stands for one superlattice (b < d; c, e < f). ``at_most`` takes that many, evenly spread over the list.
    """
    total = _count(index)
    picked = np.arange(total) if at_most is None or at_most >= total else np.linspace(0, total - 1, at_most).astype(int)
    forms, start = [], 0
    for a, d, f in _blocks(index):
        here = picked[(picked >= start) & (picked < start + d * f * f)] - start
        b, c, e = np.unravel_index(here, (d, f, f))
        forms.append(_hermite(a, b, c, d, e, f))
        start += d * f * f
    return np.concatenate(forms)


def _hermite(*entries: int | np.ndarray) -> np.ndarray:
    """Matrices [[a, b, c], [0, d, e], [0, 0, f]] from scalars or arrays [M] a, b, c, d, e, f."""
    a, b, c, d, e, f = entries
    rows = np.broadcast_arrays(a, b, c, 0, d, e, 0, 0, f)
    return np.stack(rows, axis=-1).reshape(-1, 3, 3)


def _invariant(indices: Sequence[int], turn: np.ndarray, reduced: np.ndarray) -> np.ndarray:
    """All superlattices of the given indices that a rotation of order n = 2 or 3 leaves unchanged, [M, 3, 3].

    In a basis whose last vector u spans the axis, the sum of the n images of a vector is a multiple of u, and for a
    row of an invariant Hermite normal form it lies in the superlattice, so it is a multiple of f u. That leaves at
    most n values each for c and e; for n = 2 they all work, for n = 3 the rest is filtered. Superlattices with
    |f u| too short for a good shape are left out.
    """
    order = _ROTATION_ORDER[int(np.trace(turn))]
    total = sum((np.linalg.matrix_power(turn, k) for k in range(order)), np.zeros((3, 3), int))
    along = total[np.abs(total).sum(axis=1).argmax()]
    axis = along // np.gcd.reduce(along)
    basis = _completed(axis)
    projection = basis @ total @ axis // (axis @ axis)  # [3]: sum of the images of each basis vector, in units of u

    length, volume = np.linalg.norm(axis @ reduced), abs(np.linalg.det(reduced))
    diagonals = [
        (a, d, f)
        for index in indices
        for a, d, f in _blocks(index)
        if f * length >= (1 - SHAPE_TOLERANCE) * (index * volume) ** (1 / 3)
    ]
    if not diagonals:
        return np.empty((0, 3, 3), int)
    a, d, f = np.repeat(np.array(diagonals), [d for _, d, _ in diagonals], axis=0).T
    b = np.concatenate([np.arange(d) for _, d, _ in diagonals])
    multiples = np.array(list(product(range(order), repeat=2)))  # n c = i f - …, n e = j f - …
    c = multiples[:, 0, None] * f + (-(a * projection[0] + b * projection[1])) % f
    e = multiples[:, 1, None] * f + (-d * projection[1]) % f
    whole = (c % order == 0) & (e % order == 0)
    a, b, d, f = (np.broadcast_to(x, c.shape)[whole] for x in (a, b, d, f))
    forms = _hermite(a, b, c[whole] // order, d, e[whole] // order, f) @ basis
    return forms if order == 2 else forms[_is_kept(forms, a * d * f, turn)]


def _completed(axis: np.ndarray) -> np.ndarray:
    """A basis of the integer lattice, [3, 3] with determinant 1, whose last row is the primitive vector ``axis``."""
    short = np.array(list(product((-1, 0, 1), repeat=3)))
    volume = np.cross(short[:, None], short[None]) @ axis
    i, j = np.argwhere(volume == 1)[0]
    return np.stack([short[i], short[j], axis])


def _is_kept(forms: np.ndarray, volume: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """[M] whether a rotation maps each superlattice onto itself: T R T^-1 is integer. Exact."""
    adjugate = np.stack(
        [np.cross(forms[:, 1], forms[:, 2]), np.cross(forms[:, 2], forms[:, 0]), np.cross(forms[:, 0], forms[:, 1])],
        axis=2,
    )
    return ((forms @ turn @ adjugate) % volume[:, None, None] == 0).all(axis=(1, 2))


def _kept(forms: np.ndarray, volume: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """[M] number of rotations that map each superlattice onto itself."""
    return sum((_is_kept(forms, volume, turn).astype(int) for turn in turns), np.zeros(len(forms), int))


def _shapes(forms: np.ndarray, reduced: np.ndarray) -> np.ndarray:
    """[M] length of the shortest vector of each superlattice over the cube root of its volume.

    Selling's reduction: once no two of the vectors v0, v1, v2, v3 = -(v0 + v1 + v2) make an acute angle, the shortest
    lattice vector is one of them or a sum of two (Conway & Sloane, Proc. R. Soc. A 436, 55 (1992)).
    """
    basis = forms @ reduced
    for _ in range(3):  # Gauss steps shorten the long vectors quickly; Selling's steps finish the work
        for i, j in ((0, 2), (1, 2), (0, 1), (2, 1), (1, 0), (2, 0)):
            x, y = basis[:, i], basis[:, j]
            x -= np.rint((x * y).sum(axis=1) / (y * y).sum(axis=1))[:, None] * y
    vectors = np.concatenate([basis, -basis.sum(axis=1, keepdims=True)], axis=1)  # [M, 4, 3]
    scale = np.abs(np.linalg.det(forms @ reduced)) ** (1 / 3)
    active = np.arange(len(forms))
    first, second = np.triu_indices(4, k=1)
    while len(active):
        now = vectors[active]
        dots = (now[:, first] * now[:, second]).sum(axis=2)
        worst = dots.argmax(axis=1)
        acute = dots[np.arange(len(now)), worst] > 1e-9 * scale[active] ** 2
        active, now, worst = active[acute], now[acute], worst[acute]
        each, i, j = np.arange(len(now)), first[worst], second[worst]
        turned = now[each, i]
        now += turned[:, None]
        now[each, j] -= turned
        now[each, i] = -turned
        vectors[active] = now
    sums = vectors[:, :1] + vectors[:, 1:]
    return np.sqrt((np.concatenate([vectors, sums], axis=1) ** 2).sum(axis=2).min(axis=1)) / scale


def expand(primitive: Atoms, matrix: np.ndarray) -> Supercell:
    """The supercell ``matrix @ primitive.cell`` with the atoms in phonopy's order.

    Parameters: ``primitive`` cell and integer ``matrix`` [3, 3] with positive determinant. The order depends on
    ``matrix`` alone, so an atom of the supercell stays the same atom when the primitive cell is relaxed, unless
    atoms of the primitive cell were wrapped to its other side in between.
    """
    unit = PhonopyAtoms(
        symbols=primitive.get_chemical_symbols(),
        cell=primitive.cell.array,
        scaled_positions=primitive.get_scaled_positions(wrap=False),
    )
    # phonopy's newer algorithm (is_old_style=False) misplaces atoms for matrices that are not symmetric.
    cell = get_supercell(unit, matrix.T, is_old_style=True)
    atoms = Atoms(cell.symbols, scaled_positions=cell.scaled_positions, cell=matrix @ primitive.cell.array, pbc=True)
    return Supercell(atoms, cell.s2u_map // (len(atoms) // len(primitive)))


# --- substitution ------------------------------------------------------------------------------------------------


def lowest_concentration(settings: Supercells, n_sites: int) -> float:
    """Lowest concentration, as a fraction, in a cell of ``n_sites``: as configured, but never below one atom."""
    return max(settings.concentration_min, 1 / n_sites)


def plan_substitutions(
    symbols: Sequence[str], candidates: Sequence[Candidate], settings: Supercells, rng: np.random.Generator
) -> Plan:
    """Draw dopants, concentrations and sites for one doped supercell.

    Parameters: ``symbols`` of the N atoms of the undoped supercell; ``candidates`` to choose from.

    - The number of species is uniform in ``species_min`` … ``species_max``, both lowered to what fits.
    - Concentrations are independent and log-uniform between :func:`lowest_concentration` and ``concentration_max``,
      rounded to whole atoms, *on condition that* they total at most ``concentration_max`` and that at most
      :data:`SUBLATTICE_FRACTION_MAX` of the sites of each host element are taken. The conditional distribution is
      drawn exactly, which is what rejection would give: ratios between arrangements that fit stay as they were, so
      each species is log-uniform at low concentrations and rarer only where it leaves the others no room.
      (Rescaling to the maximum would pile up totals there and smear the log-uniform shape.)
    - Sites are uniform among those of the replaced element, without repetition.

    Raises :class:`InputError` if not even one atom fits.
    """
    n_sites = len(symbols)
    room = int(settings.concentration_max * n_sites + 1e-9)
    weights = _count_weights(settings, n_sites, room)
    least = int(np.flatnonzero(weights)[0]) if weights.any() else room + 1
    sublattices = {element: np.flatnonzero(np.array(symbols) == element) for element in dict.fromkeys(symbols)}
    most = {element: int(SUBLATTICE_FRACTION_MAX * len(sites)) for element, sites in sublattices.items()}

    # Take candidates in random order while each can still get its least number of atoms.
    order = [candidates[i] for i in rng.permutation(len(candidates))]
    fitting: list[Candidate] = []
    for candidate in order:
        on_sublattice = 1 + sum(other.replaces == candidate.replaces for other in fitting)
        if on_sublattice * least <= most[candidate.replaces] and (len(fitting) + 1) * least <= room:
            fitting.append(candidate)
    if not fitting:
        raise InputError(
            f"supercells: no dopant fits into {n_sites} atoms at {settings.concentration_min:g}-"
            f"{settings.concentration_max:g}; raise atoms_min or concentration_max, or lower concentration_min"
        )
    high = min(settings.species_max, len(fitting))
    number = int(rng.integers(min(settings.species_min, high), high, endpoint=True))

    groups: dict[str, list[Candidate]] = {}
    for candidate in fitting[:number]:
        groups.setdefault(candidate.replaces, []).append(candidate)
    sums = [_convolve([weights] * len(group), most[element]) for element, group in groups.items()]
    totals = _convolve(sums, room)
    chosen: dict[int, str] = {}
    for (element, group), atoms in zip(
        groups.items(), _split(int(rng.choice(len(totals), p=totals / totals.sum())), sums, rng), strict=True
    ):
        sites = rng.choice(sublattices[element], size=atoms, replace=False)
        species = np.repeat([candidate.dopant for candidate in group], _split(atoms, [weights] * len(group), rng))
        chosen.update(zip(sites.tolist(), species.tolist(), strict=True))
    return Plan(tuple(sorted(chosen)), tuple(chosen[site] for site in sorted(chosen)))


def _count_weights(settings: Supercells, n_sites: int, room: int) -> np.ndarray:
    """[room + 1] probability, up to a factor, that a log-uniform concentration rounds to n atoms."""
    low = n_sites * lowest_concentration(settings, n_sites)
    high = max(n_sites * settings.concentration_max, low)
    count = np.arange(room + 1)
    edges = np.clip([count - 0.5, count + 0.5], low, high)
    weights = np.log(edges[1] / edges[0])
    if not weights.any() and round(low) <= room:  # a single concentration was asked for
        weights[round(low)] = 1
    return weights


def _convolve(weights: Sequence[np.ndarray], largest: int) -> np.ndarray:
    """Weights of the sum of independent counts, up to ``largest``."""
    return reduce(lambda one, other: np.convolve(one, other)[: largest + 1], weights)[: largest + 1]


def _split(total: int, weights: Sequence[np.ndarray], rng: np.random.Generator) -> list[int]:
    """Independent counts with the given weights, drawn on condition that they sum to ``total``."""
    counts = []
    for i in range(len(weights) - 1):
        rest = np.zeros(total + 1)
        tail = _convolve(weights[i + 1 :], total)
        rest[: len(tail)] = tail
        own = weights[i][: total + 1]
        probability = own * rest[::-1][: len(own)]
        counts.append(int(rng.choice(len(own), p=probability / probability.sum())))
        total -= counts[-1]
    return [*counts, total]


def plan_host(
    host_id: str, structure: Structure, candidates: Sequence[Candidate], settings: Supercells, seed: int
) -> HostPlan:
    """Choose the supercell of a host and all its substitutions.

    ``structure`` is the primitive cell. Plan k depends on ``seed``, ``host_id``, k and whether it is a dilute one, so
    raising ``doped_per_host`` keeps the earlier plans, and other hosts change nothing. Two plans differ in composition
    (atoms of each dopant on each host element), and dilute ones hold more than one dopant atom, as long as a few
    attempts find such a one; positions alone may be equivalent by symmetry.

    Raises :class:`InputError` if no supercell or no dopant fits, :class:`PhysicsError` without candidates.
    """
    if not candidates:
        raise PhysicsError(f"{host_id}: no dopant candidates; list some in dopants.overrides.{host_id}")
    primitive = Atoms(
        [species.symbol for species in structure.species],
        scaled_positions=structure.frac_coords,
        cell=structure.lattice.matrix,
        pbc=True,
    )
    crystal = (primitive.cell.array, primitive.get_scaled_positions(), primitive.numbers)
    symmetry = spglib.get_symmetry_dataset(crystal, symprec=_SYMPREC_A)
    try:
        matrix = expansion_matrix(
            primitive.cell.array, len(primitive), settings.atoms_min, settings.atoms_max, symmetry.rotations
        )
        symbols = expand(primitive, matrix).atoms.get_chemical_symbols()
        plans: list[Plan] = []
        used: set[frozenset] = set()
        for k in range(settings.cells_per_host):
            rng = generator(seed, host_id, "plan", str(k))
            for _ in range(_PLAN_ATTEMPTS):
                plan = plan_substitutions(symbols, candidates, settings.of_cell(k), rng)
                composition = frozenset(
                    Counter(
                        (dopant, symbols[site]) for site, dopant in zip(plan.sites, plan.dopants, strict=True)
                    ).items()
                )
                # Dilute cells with a single dopant atom would only repeat the library.
                if composition not in used and (k < settings.doped_per_host or len(plan.sites) > 1):
                    break
            used.add(composition)
            plans.append(plan)
    except InputError as error:
        raise InputError(f"{host_id}: {error}") from None
    orbits = tuple((atom, primitive.symbols[atom]) for atom in sorted(set(symmetry.equivalent_atoms.tolist())))
    return HostPlan(host_id, matrix, len(symbols), orbits, tuple(candidates), tuple(plans))


def apply(plan: Plan, supercell: Atoms) -> Atoms:
    """A copy of the undoped ``supercell`` with the planned atoms replaced or left out; masses follow.

    The atoms are those of ``plan.occupied``, in the order of their sites.
    """
    doped = supercell.copy()
    for site, dopant in zip(plan.sites, plan.dopants, strict=True):
        if dopant != VACANCY:
            doped.symbols[site] = dopant
    return doped[plan.occupied(len(doped))]
