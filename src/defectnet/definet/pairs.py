"""Pairs of unrelaxed and relaxed defective crystals, from the records of finished runs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from ase.data import chemical_symbols
from ase.formula import Formula
from ase.geometry import find_mic

from defectnet.definet.hosts import SAME_CELL_A, FinishedHost, finished_hosts
from defectnet.errors import InputError
from defectnet.models.definet import NOTHING
from defectnet.phonons.superposition import Superposition
from defectnet.screening import STAYS_A

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pair:
    """One relaxation at fixed lattice, seen from the perfect host. N sites, vacancies included.

    id            : names the pair in tables
    host          : formula of the perfect host, reduced; hosts of equal composition count as one
    numbers       : [N] what each site holds, 0 where it is vacant
    host_numbers  : [N] what it holds in the perfect host
    positions     : [N, 3] unrelaxed sites in Å, those of the host
    cell          : [3, 3] in Å, one vector per row
    displacements : [N, 3] from there to the relaxed position in Å, the nearest image, mean over atoms 0; 0 at vacancies
    superposed    : of a doped supercell, the same as the host's single defects predict it, or None if these are unknown
    lattice       : the perfect supercell with its force constants, or None where they are not known
    forces        : [N, 3] in eV/Å that the potential finds on the unrelaxed sites, 0 at vacancies, or None
    stays         : whether every atom keeps its site (:data:`STAYS_A`) and no mode that was computed is imaginary
    part          : of a published division: train, validation or test; empty if there is none
    also          : names of the same relaxation in other runs
    """

    id: str
    host: str
    numbers: np.ndarray
    host_numbers: np.ndarray
    positions: np.ndarray
    cell: np.ndarray
    displacements: np.ndarray
    superposed: np.ndarray | None = None
    lattice: Superposition | None = None
    forces: np.ndarray | None = None
    stays: bool = True
    part: str = ""
    also: list[str] = field(default_factory=list)

    @property
    def names(self) -> tuple[str, ...]:
        """All that this relaxation goes by, its own first."""
        return self.id, *self.also

    @property
    def atoms(self) -> np.ndarray:
        """[N] whether a site holds an atom."""
        return self.numbers != NOTHING

    @property
    def defects(self) -> np.ndarray:
        """[N] whether a site holds something else than in the host."""
        return self.numbers != self.host_numbers

    @property
    def species(self) -> set[str]:
        """Symbols of the dopants, "X" for vacancies."""
        return {chemical_symbols[z] for z in self.numbers[self.defects]}


def reduced_formula(numbers: np.ndarray) -> str:
    """Of the elements of a host, alphabetically."""
    formula = Formula.from_list([chemical_symbols[z] for z in numbers])
    return formula.reduce()[0].format("abc")


def net_displacements(start: np.ndarray, end: np.ndarray, cell: np.ndarray, atoms: np.ndarray) -> np.ndarray:
    """[N, 3] from ``start`` to the nearest image of ``end`` (both [N, 3] in Å), less the mean over ``atoms`` [N]."""
    moved = find_mic(end - start, cell)[0]
    moved[atoms] -= moved[atoms].mean(axis=0)
    moved[~atoms] = 0
    return moved


def pairs_of_runs(configs: Sequence[Path], *, superpose: bool = True) -> list[Pair]:
    """Single defects and doped supercells of every batch that some runs have finished; unconverged ones are left out.

    Runs that share records may be given together, a relaxation counts once.
    Parameters: configuration files of the runs; whether to superpose the single defects of doped supercells, which
    takes longest. Raises :class:`InputError` where there is nothing to learn from, or two runs have one name.
    """
    pairs: dict[str, Pair] = {}
    of_record: dict[str, Pair] = {}
    for config in configs:
        for host in finished_hosts(config):
            for item, (_, entry) in host.entries.items():
                name = f"{host.name}/{item}"
                if entry.key in of_record:
                    of_record[entry.key].also.append(name)
                    continue
                if name in pairs:
                    raise InputError(f"{config}: there are two relaxations {name}; give every run its own run.name")
                pair = _pair(name, host, item, superpose)
                if pair is not None:
                    pairs[name] = of_record[entry.key] = pair
    if not pairs:
        raise InputError(
            f"{', '.join(map(str, configs))}: no relaxed single defects or doped supercells; run the stages library "
            "and relax first"
        )
    log.info("%d relaxations of %d host compositions", len(pairs), len({pair.host for pair in pairs.values()}))
    return list(pairs.values())


def _pair(name: str, host: FinishedHost, item: str, superpose: bool) -> Pair | None:
    """A relaxation of the atoms that a plan leaves on the sites of the host, or None if it did not converge."""
    record = host.record(item)
    arrays, quality = record.arrays, record.header["quality"]
    if not quality["converged"]:
        return None
    if np.abs(arrays["cell"] - arrays["start_cell"]).max() > SAME_CELL_A:
        raise InputError(f"{name}: relaxed with its lattice; only runs with relaxation.doped_cell: false can be used")
    sites, plan = host.lattice.folding.atoms, host.plan_of(item)
    kept = plan.occupied(len(sites))
    numbers = np.full(len(sites), NOTHING)
    numbers[kept] = arrays["numbers"]
    ends, guess = sites.positions.copy(), None
    ends[kept] = arrays["positions"]
    if superpose and host.entries[item][0] == "relax" and host.library.digest(plan):
        guess = np.zeros_like(ends)
        guess[kept] = host.library.superpose.displacements(plan)
    displacements = net_displacements(sites.positions, ends, arrays["cell"], numbers != NOTHING)
    forces = None
    if "start_forces" in arrays:
        forces = np.zeros_like(ends)
        forces[kept] = arrays["start_forces"]
    stable = not quality.get("imaginary_modes", 0)
    return Pair(
        id=name,
        host=reduced_formula(sites.numbers),
        numbers=numbers,
        host_numbers=sites.numbers.astype(int),
        positions=sites.positions,
        cell=arrays["cell"],
        displacements=displacements,
        superposed=guess,
        lattice=host.lattice,
        forces=forces,
        stays=stable and bool(np.linalg.norm(displacements, axis=1).max() <= STAYS_A),
    )
