"""Force constants between atoms of an infinite crystal, taken out of one supercell and folded into another.

A supercell's Hessian sums over periodic images. Taking it apart assigns each block to the nearest pair of images
(equally near ones share it, as phonopy does for its dynamical matrix); folding adds the blocks up again. Into the
supercell they came from they fold exactly; into another one as well as the forces have died away at its boundary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from defectnet.phonons.crystal import TIE_A, Folding


@dataclass(frozen=True)
class Blocks:
    """P blocks of a symmetric Hessian; each pair of atoms stands once and implies its transpose.

    first, second : [P, 4] addresses (p, l) of the two atoms, relative to an origin
    values        : [P, 3, 3] in eV/Å²
    """

    first: np.ndarray
    second: np.ndarray
    values: np.ndarray

    @classmethod
    def none(cls) -> Blocks:
        """Nothing acts between any atoms."""
        return cls(np.zeros((0, 4), int), np.zeros((0, 4), int), np.zeros((0, 3, 3)))

    def __len__(self) -> int:
        return len(self.values)


def unfold(folding: Folding, origin: int, hessian: np.ndarray, tolerance: float) -> Blocks:
    """Take a supercell's Hessian apart around the atom ``origin``, whose lattice vector becomes zero.

    Parameters: ``hessian`` [3N, 3N] in eV/Å², symmetric; blocks whose largest entry is below ``tolerance`` (eV/Å²) are
    left out, and what that takes from the acoustic sum of an atom is added to its own block (its symmetric part, so
    that the Hessian stays symmetric). Of the images of a pair (i, j), those with the smallest |r_i - r_j| are taken,
    and of these the ones with the smallest |r_i|² + |r_j|², r counted from the origin.
    """
    n = len(folding)
    every = hessian.reshape(n, 3, n, 3).transpose(0, 2, 1, 3)
    kept = (np.abs(every).max(axis=(2, 3)) >= tolerance) | np.eye(n, dtype=bool)
    lost = np.where(kept[..., None, None], 0.0, every).sum(axis=1)
    lost = 0.5 * (lost + lost.transpose(0, 2, 1))
    positions = folding.atoms.positions
    lattice = folding.lattice - folding.lattice[origin]
    shifts, steps = folding.periods
    first, second = np.nonzero(np.triu(kept))
    parts = []
    for chosen in np.array_split(np.arange(len(first)), len(first) // 20_000 + 1):
        i, j = first[chosen], second[chosen]
        pair, bond, hop = folding.nearest(positions[j] - positions[i])
        arm, leap = folding.nearby(positions[i] - positions[origin])
        start = arm[pair][:, None] + steps  # [Q, 125, 3]
        end = start + bond[:, None]
        extent = (start**2).sum(axis=2) + (end**2).sum(axis=2)
        least = np.full(len(chosen), np.inf)
        np.minimum.at(least, pair, extent.min(axis=1))
        tie = 2 * TIE_A * np.sqrt(least[pair])  # of a sum of squares whose lengths differ by TIE_A
        which, where = np.nonzero(extent <= (least[pair] + tie)[:, None])
        owner = pair[which]
        values = every[i[owner], j[owner]] + np.where((i == j)[owner, None, None], lost[i[owner]], 0.0)
        share = np.bincount(owner, minlength=len(chosen))[owner]
        here = lattice[i[owner]] + leap[owner] + shifts[where]
        there = lattice[j[owner]] + leap[owner] + shifts[where] + hop[which]
        addresses = np.column_stack([folding.parent[i[owner]], here, folding.parent[j[owner]], there])
        parts.append((addresses, values / share[:, None, None]))
    addresses, values = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Blocks(addresses[:, :4], addresses[:, 4:], values)


def unfold_all(folding: Folding, hessian: np.ndarray) -> Blocks:
    """Take a supercell's Hessian [3N, 3N] apart as that of an infinite crystal with the supercell's periodicity.

    Of the images of a pair those with the smallest |r_i - r_j| share its block.
    """
    n = len(folding)
    every = hessian.reshape(n, 3, n, 3).transpose(0, 2, 1, 3)
    first, second = np.nonzero(np.triu(np.abs(every).max(axis=(2, 3)) > 0))
    positions = folding.atoms.positions
    pair, _, hop = folding.nearest(positions[second] - positions[first])
    i, j = first[pair], second[pair]
    share = np.bincount(pair)[pair]
    there = folding.lattice[j] + hop
    return Blocks(
        np.column_stack([folding.parent[i], folding.lattice[i]]),
        np.column_stack([folding.parent[j], there]),
        every[i, j] / share[:, None, None],
    )


def fold(blocks: Blocks, folding: Folding, matrix: np.ndarray) -> None:
    """Add blocks, transposes included, to the contiguous Hessian ``matrix`` [3N, 3N] of a supercell, in place."""
    i = folding.index(blocks.first[:, 0], blocks.first[:, 1:])
    j = folding.index(blocks.second[:, 0], blocks.second[:, 1:])
    itself = (blocks.first == blocks.second).all(axis=1)
    size = len(matrix)
    axes = np.arange(3)
    flat = matrix.reshape(-1)
    for a, b, values in ((i, j, blocks.values), (j[~itself], i[~itself], blocks.values[~itself].transpose(0, 2, 1))):
        entries = (3 * a[:, None, None] + axes[:, None]) * size + 3 * b[:, None, None] + axes
        np.add.at(flat, entries.ravel(), values.ravel())


def impose_sum_rule(matrix: np.ndarray) -> None:
    """Take what a symmetric Hessian [3N, 3N] violates of the acoustic sum rule from each atom's own block, in place.

    Only the symmetric part of an atom's violation can be taken, so that the Hessian stays symmetric.
    """
    n = len(matrix) // 3
    excess = matrix.reshape(n, 3, n, 3).sum(axis=2)  # [N, 3, 3]
    atoms = np.arange(n)
    matrix.reshape(n, 3, n, 3)[atoms, :, atoms, :] -= 0.5 * (excess + excess.transpose(0, 2, 1))


def cut_out(matrix: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Hessian [3K, 3K] of the atoms ``kept`` [K] (ascending) of a larger one, all bonds to the others cut.

    The sum rule holds for what is left, as an atom has no self-interaction but by its bonds. Without any others the
    Hessian is returned as it is.
    """
    if 3 * len(kept) == len(matrix):
        return matrix
    rows = _rows(kept)
    left = matrix[np.ix_(rows, rows)]
    impose_sum_rule(left)
    return left


def put_back(matrix: np.ndarray, kept: np.ndarray, n_sites: int) -> np.ndarray:
    """Hessian [3K, 3K] of the atoms on the sites ``kept`` [K] among all sites, with zeros for those that are empty."""
    whole = np.zeros((3 * n_sites, 3 * n_sites))
    rows = _rows(kept)
    whole[np.ix_(rows, rows)] = matrix
    return whole


def _rows(atoms: np.ndarray) -> np.ndarray:
    return (3 * atoms[:, None] + np.arange(3)).ravel()
