"""Which candidate crystals become hosts, and for every other one the reason why not.

Rules and limits as published (arXiv:2506.00725): two to five elements between H and Ba without noble gases, at most
25 atoms in the primitive cell, a band gap, no duplicates. Every limit is a field of :class:`Criteria`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from defectnet.elements import PUBLISHED_VOCABULARY
from defectnet.errors import InputError
from defectnet.files import write_atomically
from defectnet.hosts.sheet import Host

if TYPE_CHECKING:
    from pymatgen.analysis.structure_matcher import StructureMatcher
    from pymatgen.core import Structure

DISORDERED_ABOVE = 25
"""A larger primitive cell without any symmetry is disordered: comparing two of 216 atoms site by site takes seconds."""

COPY_A = 0.01
"""Disordered cells whose sorted distances between atoms differ by less than this in Å are copies."""


@dataclass(frozen=True)
class Rejection:
    """A candidate that is not a host: ``rule`` is one word for counting, ``reason`` one line for reading."""

    id: str
    formula: str
    rule: str
    reason: str


class Candidates(NamedTuple):
    """Crystals that passed so far, and all that did not."""

    hosts: list[Host]
    rejected: list[Rejection]


@dataclass(frozen=True)
class Criteria:
    """Limits that hosts have to meet. Gaps in eV; None means no limit."""

    vocabulary: tuple[str, ...] = PUBLISHED_VOCABULARY
    elements_min: int = 2
    elements_max: int = 5
    elemental: bool = False
    atoms_min: int = 1
    atoms_max: int = 25
    gap_min_eV: float | None = None
    gap_max_eV: float | None = None
    require_gap: bool = False

    def __post_init__(self):
        """Raise :class:`InputError` for limits that nothing can meet."""
        if self.elements_min > self.elements_max:
            raise InputError(f"elements: minimum {self.elements_min} exceeds maximum {self.elements_max}; swap them")
        if self.atoms_min > self.atoms_max:
            raise InputError(f"atoms: minimum {self.atoms_min} exceeds maximum {self.atoms_max}; swap them")
        if self.gap_min_eV is not None and self.gap_max_eV is not None and self.gap_min_eV > self.gap_max_eV:
            raise InputError(f"gap: minimum {self.gap_min_eV:g} eV exceeds maximum {self.gap_max_eV:g} eV; swap them")


def apply_criteria(hosts: Iterable[Host], criteria: Criteria) -> Candidates:
    """Split hosts by everything that a single row tells; order is kept."""
    kept, rejected = [], []
    for host in hosts:
        verdict = _verdict(host, criteria)
        if verdict is None:
            kept.append(host)
        else:
            rejected.append(Rejection(host.id, host.formula, *verdict))
    return Candidates(kept, rejected)


def _verdict(host: Host, criteria: Criteria) -> tuple[str, str] | None:
    """Rule and reason of the first limit that a host fails; None when it meets all."""
    from pymatgen.core import Composition

    try:
        elements = [element.symbol for element in Composition(host.formula).elements]
    except ValueError:
        return "formula", f"{host.formula!r} is not a chemical formula"
    outside = sorted(set(elements) - set(criteria.vocabulary))
    if outside:
        return "vocabulary", f"{', '.join(outside)} not in the vocabulary"
    count = len(elements)
    allowed = criteria.elements_min <= count <= criteria.elements_max or (criteria.elemental and count == 1)
    if not allowed:
        limits = f"{criteria.elements_min} to {criteria.elements_max}"
        return "elements", f"{count} element{'s' * (count != 1)}; {limits} allowed"
    if host.n_atoms > criteria.atoms_max:
        return "atoms", f"{host.n_atoms} atoms in the primitive cell; at most {criteria.atoms_max} allowed"
    if host.n_atoms < criteria.atoms_min:
        return "atoms", f"{host.n_atoms} atoms in the primitive cell; at least {criteria.atoms_min} wanted"
    if host.gap_eV is None:
        return ("gap", "no known gap; one is required") if criteria.require_gap else None
    if criteria.gap_min_eV is not None and host.gap_eV < criteria.gap_min_eV:
        return "gap", f"gap {host.gap_eV:g} eV below {criteria.gap_min_eV:g} eV"
    if criteria.gap_max_eV is not None and host.gap_eV > criteria.gap_max_eV:
        return "gap", f"gap {host.gap_eV:g} eV above {criteria.gap_max_eV:g} eV"
    return None


def drop_duplicates(
    hosts: Sequence[Host],
    existing: Sequence[Host] = (),
    progress: Callable[[Sequence[Host]], Iterable[Host]] = iter,
) -> Candidates:
    """Keep one of each crystal, and none that ``existing`` has already.

    Crystals of equal reduced formula and space group are compared by pymatgen's ``StructureMatcher`` (default
    tolerances, cells scaled to equal volume), disordered ones by their distances. Of equals, one with a known gap goes
    first, then the first id in alphabetical order, so that the result does not depend on input order. Hosts that cannot
    be built, and ids that are taken, are rejected. ``progress`` may wrap the loop over ``hosts``.
    """
    from pymatgen.analysis.structure_matcher import StructureMatcher

    matcher = StructureMatcher()
    taken = {host.id: host for host in existing}
    groups: dict[tuple[str, int], list[tuple[Host, Structure | np.ndarray]]] = defaultdict(list)
    for host in existing:
        group, crystal = _comparable(host, host.build())
        groups[group].append((host, crystal))
    kept, rejected = [], []
    for host in progress(sorted(hosts, key=_precedence)):
        if host.id in taken:
            owner = taken[host.id].reference or taken[host.id].formula
            rejected.append(
                Rejection(host.id, host.formula, "id", f"{host.reference}: {owner} has this id; rename one")
            )
            continue
        try:
            structure = host.build()
        except InputError as error:
            rejected.append(Rejection(host.id, host.formula, "unreadable", str(error).replace("\n", "; ")))
            continue
        group, crystal = _comparable(host, structure)
        twin = next((other for other, known in groups[group] if _same(matcher, known, crystal)), None)
        if twin is not None:
            rejected.append(Rejection(host.id, host.formula, "duplicate", f"same crystal as {twin.id}"))
            continue
        taken[host.id] = host
        groups[group].append((host, crystal))
        kept.append(host)
    return Candidates(kept, rejected)


def _precedence(host: Host) -> tuple:
    """Total order of rows, whatever order they came in."""
    columns = host.formula, host.reference, host.spacegroup, host.parameters, host.sites, host.structure
    return host.gap_eV is None, host.id, *map(str, columns)


def _comparable(host: Host, structure: Structure) -> tuple[tuple[str, int], Structure | np.ndarray]:
    """Reduced formula and space-group number, which equal crystals share, and what tells them apart within these.

    That is the structure itself, or the sorted distances [N (N - 1) / 2] in Å of a disordered one.
    """
    from defectnet.hosts import crystallography as xtal

    if host.spacegroup is not None:
        number = xtal.spacegroup_number(host.spacegroup)
    else:
        number = structure.get_space_group_info(xtal.SYMPREC_A)[1]
    group = structure.reduced_formula, number
    if number > 1 or len(structure) <= DISORDERED_ABOVE:
        return group, structure
    return group, np.sort(structure.distance_matrix[np.triu_indices(len(structure), k=1)])


def _same(matcher: StructureMatcher, one: Structure | np.ndarray, other: Structure | np.ndarray) -> bool:
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.shape == other.shape and bool(np.abs(one - other).max() < COPY_A)
    return type(one) is type(other) and matcher.fit(one, other)


def write_rejections(path: str | Path, rejected: Iterable[Rejection]) -> None:
    """Tab-separated table of rejected candidates, sorted by id."""
    lines = [f"{r.id}\t{r.formula}\t{r.rule}\t{' '.join(r.reason.split())}" for r in sorted(rejected, key=_by_id)]
    write_atomically(Path(path), ("\n".join(["id\tformula\trule\treason", *lines]) + "\n").encode())


def _by_id(rejection: Rejection) -> tuple[str, str]:
    return rejection.id, rejection.reason
