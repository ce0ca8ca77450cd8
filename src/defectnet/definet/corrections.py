"""What the network still misses in hosts that it knows, from what it misses of their other single defects.

Dopants on one site move its surroundings in much the same few patterns. What the network leaves of the training data
(of several networks, the one that has not seen a dopant) is carried over to others by Gaussian process regression over
the properties of elements, and added for each defect of a cell, as single defects are superposed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols

from defectnet.definet.pairs import Pair
from defectnet.elements import VACANCY
from defectnet.models.definet import ELEMENTS, NOTHING
from defectnet.phonons.blocks import Blocks
from defectnet.phonons.crystal import Folding
from defectnet.phonons.superposition import Defect, Superposition
from defectnet.supercells import Plan

LENGTH = 1.0
"""Over which distance of properties elements are alike."""
NOISE = 0.2
"""Variance of what has nothing to do with properties, as a share of what has."""
NOISE_OF_HOST = 1e-3
"""The host's own element is no defect: nothing moves."""
SAME_HOST_A = 1e-3


@dataclass(frozen=True)
class KnownSite:
    """Single defects of one host on one site, and what the network misses of them.

    primitive : the host's primitive cell; ``matrix`` that of the supercell of N atoms
    site      : atom of the primitive cell
    numbers   : [n] atomic numbers of the dopants, the host's own first
    missed    : [n, N, 3] in Å, true less predicted displacements
    """

    primitive: Atoms
    matrix: np.ndarray
    site: int
    numbers: np.ndarray
    missed: np.ndarray

    def defect(self, number: int) -> Defect:
        """What the network is expected to miss of a dopant."""
        noise = np.diag([NOISE_OF_HOST, *[NOISE] * (len(self.numbers) - 1)])
        weights = np.linalg.solve(_alike(self.numbers, self.numbers) + noise, _alike(self.numbers, [number])[:, 0])
        missed = np.tensordot(weights, self.missed, 1)
        # Around the defect, in whatever supercell: images of an atom that are equally near share it.
        folding = Folding.of(self.primitive, self.matrix)
        positions, (origin,) = folding.atoms.positions, Plan.single(folding.parent, self.site, "").sites
        atom, _, hop = folding.nearest(positions - positions[origin])
        lattice = folding.lattice[atom] - folding.lattice[origin] + hop
        addresses = np.column_stack([folding.parent[atom], lattice])
        shared = missed[atom] / np.bincount(atom)[atom, None]
        return Defect(self.site, _symbol(number), addresses, shared, Blocks.none())

    def fits(self, lattice: Superposition, site: int) -> bool:
        """Whether it is about that site of a host."""
        other = lattice.primitive
        return (
            site == self.site
            and np.array_equal(other.numbers, self.primitive.numbers)
            and np.abs(other.cell.array - self.primitive.cell.array).max() < SAME_HOST_A
            and np.abs(other.positions - self.primitive.positions).max() < SAME_HOST_A
        )


@dataclass(frozen=True)
class Corrections:
    """All known sites; without any, nothing is corrected."""

    sites: Sequence[KnownSite] = field(default_factory=list)

    @classmethod
    def fit(cls, pairs: Sequence[Pair], predicted: Sequence[np.ndarray]) -> Corrections:
        """From the single defects among training pairs, and the displacements [N, 3] that the network says."""
        found: dict[tuple[int, int], list[tuple[Pair, np.ndarray]]] = {}
        for pair, displacements in zip(pairs, predicted, strict=True):
            where = np.flatnonzero(pair.defects)
            if len(where) != 1 or pair.lattice is None:
                continue
            parent = pair.lattice.folding.parent
            site = int(pair.lattice.group.sites[parent[where[0]]])
            if Plan.single(parent, site, "").sites == tuple(where):
                found.setdefault((id(pair.lattice), site), []).append((pair, pair.displacements - displacements))
        sites = []
        for (_, site), missed in found.items():
            lattice = missed[0][0].lattice
            own = lattice.primitive.numbers[site]
            numbers = [own, *(int(pair.numbers[pair.defects][0]) for pair, _ in missed)]
            fields = np.array([np.zeros_like(missed[0][1]), *(left for _, left in missed)])
            sites.append(KnownSite(lattice.primitive, lattice.folding.matrix, site, np.array(numbers), fields))
        return cls(sites)

    def __call__(self, lattice: Superposition, numbers: np.ndarray) -> np.ndarray:
        """[N, 3] in Å to be added to the displacements of a cell that holds ``numbers`` [N] on the sites of a host."""
        held = lattice.folding.atoms.numbers
        total = np.zeros((len(numbers), 3))
        defects, plan = {}, {}
        for atom in np.flatnonzero(numbers != held).tolist():
            site = int(lattice.group.sites[lattice.folding.parent[atom]])
            known = [one for one in self.sites if one.fits(lattice, site)]
            if known:
                number = int(numbers[atom])
                same = lattice.folding.matrix
                best = max(known, key=lambda one: (np.array_equal(one.matrix, same), len(one.numbers)))
                defects[site, number] = defects.get((site, number)) or best.defect(number)
                plan[atom] = _symbol(number)
        if not plan:
            return total
        arrangement = Plan(tuple(plan), tuple(plan.values()))
        kept = arrangement.occupied(len(numbers))
        total[kept] = lattice.holding(defects.values()).displacements(arrangement)
        atoms = numbers != NOTHING
        total[~atoms] = 0
        total[atoms] -= total[atoms].mean(axis=0)
        return total

    def state(self) -> list[dict[str, Any]]:
        """Tensors and plain values, for a checkpoint."""
        return [
            {
                "primitive": [
                    torch.tensor(array)
                    for array in (one.primitive.numbers, one.primitive.positions, one.primitive.cell.array)
                ],
                "matrix": one.matrix.tolist(),
                "site": one.site,
                "numbers": one.numbers.tolist(),
                "missed": torch.tensor(one.missed, dtype=torch.float16),
            }
            for one in self.sites
        ]

    @classmethod
    def of(cls, state: list[dict[str, Any]]) -> Corrections:
        """Inverse of :meth:`state`, but for rounding."""
        sites = []
        for one in state:
            numbers, positions, cell = (array.numpy() for array in one["primitive"])
            primitive = Atoms(numbers, positions, cell=cell, pbc=True)
            missed = one["missed"].double().numpy()
            sites.append(KnownSite(primitive, np.array(one["matrix"]), one["site"], np.array(one["numbers"]), missed))
        return cls(sites)


def _alike(some: Sequence[int], others: Sequence[int]) -> np.ndarray:
    """Covariance [n, m] of what the network misses of elements; row 0 of the properties is that of a vacancy."""
    first, second = ELEMENTS[np.asarray(some)], ELEMENTS[np.asarray(others)]
    apart = ((first[:, None] - second[None]) ** 2).sum(axis=2)
    return np.exp(-0.5 * apart / LENGTH**2) + 0.05 * first @ second.T + 0.2


def _symbol(number: int) -> str:
    return VACANCY if number == NOTHING else chemical_symbols[number]
