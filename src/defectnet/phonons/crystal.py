"""Atoms of an infinite host crystal: addresses, symmetry, and how supercells fold them.

An *address* is (p, l): atom p of the primitive cell, moved by the lattice vector l (three integers). Symmetry
operations and foldings into supercells are exact integer arithmetic on addresses, whatever the shape of the supercell.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
import spglib
from ase import Atoms
from ase.geometry import minkowski_reduce

from defectnet.supercells import expand

SYMPREC_A = 1e-3
TIE_A = 1e-3
"""Images whose distances differ by less are equally near."""


@dataclass(frozen=True)
class SpaceGroup:
    """The G symmetry operations of a primitive cell of n atoms, acting on addresses.

    rotations : [G, 3, 3] integers acting on columns of lattice vectors: l -> rotations @ l
    cartesian : [G, 3, 3] the same rotations acting on columns of Cartesian vectors
    images    : [G, n] the primitive atom that each primitive atom becomes
    shifts    : [G, n, 3] and the lattice vector by which it leaves the cell
    """

    rotations: np.ndarray
    cartesian: np.ndarray
    images: np.ndarray
    shifts: np.ndarray

    @property
    def sites(self) -> np.ndarray:
        """[n] the first primitive atom that is symmetry-equivalent to each one."""
        return self.images.min(axis=0)

    def carry(self, operation: int, atoms: np.ndarray, lattice: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Addresses ([K], [K, 3]) after an operation."""
        turned = lattice @ self.rotations[operation].T + self.shifts[operation, atoms]
        return self.images[operation, atoms], turned


def space_group(primitive: Atoms) -> SpaceGroup:
    """Symmetry operations of a primitive cell (spglib), as permutations of its atoms with lattice shifts."""
    fractional = primitive.get_scaled_positions(wrap=False)
    found = spglib.get_symmetry((primitive.cell.array, fractional, primitive.numbers), symprec=SYMPREC_A)
    moved = np.einsum("gij,pj->gpi", found["rotations"], fractional) + found["translations"][:, None]
    # [G, n, n, 3]: from each atom to where each image falls; the right one is a whole lattice vector away.
    difference = moved[:, :, None] - fractional[None, None]
    off = np.linalg.norm((difference - np.rint(difference)) @ primitive.cell.array, axis=-1)
    off[:, primitive.numbers[:, None] != primitive.numbers[None]] = np.inf
    images = off.argmin(axis=2)
    shifts = np.take_along_axis(difference, images[..., None, None], axis=2)[:, :, 0]
    column_lattice = primitive.cell.array.T
    cartesian = column_lattice @ found["rotations"] @ np.linalg.inv(column_lattice)
    return SpaceGroup(found["rotations"].astype(int), cartesian, images, np.rint(shifts).astype(int))


@dataclass(frozen=True)
class Folding:
    """A supercell as a set of addresses modulo its lattice vectors.

    atoms   : the N atoms in the order of :func:`defectnet.supercells.expand`, undoped
    matrix  : integer [3, 3] expansion matrix T
    parent  : [N] primitive atom of each
    lattice : [N, 3] lattice vector of each
    """

    atoms: Atoms
    matrix: np.ndarray
    parent: np.ndarray
    lattice: np.ndarray

    @classmethod
    def of(cls, primitive: Atoms, matrix: np.ndarray) -> Folding:
        """The supercell ``matrix @ primitive.cell``."""
        supercell = expand(primitive, matrix)
        inside = np.linalg.solve(primitive.cell.array.T, supercell.atoms.positions.T).T
        lattice = np.rint(inside - primitive.get_scaled_positions(wrap=False)[supercell.parent]).astype(int)
        return cls(supercell.atoms, np.asarray(matrix), supercell.parent, lattice)

    def __len__(self) -> int:
        return len(self.atoms)

    @cached_property
    def _adjugate(self) -> tuple[np.ndarray, int]:
        volume = round(abs(np.linalg.det(self.matrix)))
        return np.rint(np.linalg.inv(self.matrix) * volume).astype(int), volume

    def _residues(self, parent: np.ndarray, lattice: np.ndarray) -> np.ndarray:
        """One integer per address, equal for addresses that a supercell lattice vector connects."""
        adjugate, volume = self._adjugate
        digits = (lattice @ adjugate) % volume
        return ((parent * volume + digits[..., 0]) * volume + digits[..., 1]) * volume + digits[..., 2]

    @cached_property
    def _order(self) -> tuple[np.ndarray, np.ndarray]:
        residues = self._residues(self.parent, self.lattice)
        order = np.argsort(residues)
        return order, residues[order]

    def index(self, parent: np.ndarray, lattice: np.ndarray) -> np.ndarray:
        """Which atom of the supercell each address ([...], [..., 3]) folds onto."""
        order, residues = self._order
        return order[np.searchsorted(residues, self._residues(np.asarray(parent), np.asarray(lattice)))]

    def hessian(self, compact: np.ndarray) -> np.ndarray:
        """Hessian [3N, 3N] from its rows [n, N, 3, 3] of the first atom of each parent, by translation symmetry."""
        away = self.lattice[None, :] - self.lattice[:, None] + self.lattice[self._first[self.parent]][:, None]
        columns = self.index(np.broadcast_to(self.parent, away.shape[:2]), away)  # [N, N]
        blocks = compact[self.parent[:, None], columns]
        return blocks.transpose(0, 2, 1, 3).reshape(3 * len(self), 3 * len(self))

    def compact(self, hessian: np.ndarray) -> np.ndarray:
        """Inverse of :meth:`hessian`."""
        n = len(self)
        return hessian.reshape(n, 3, n, 3).transpose(0, 2, 1, 3)[self._first]

    @cached_property
    def _first(self) -> np.ndarray:
        """[n] the first atom of each parent."""
        return np.unique(self.parent, return_index=True)[1]

    def kept_by(self, rotation: np.ndarray) -> bool:
        """Whether an operation's integer rotation maps the supercell lattice onto itself."""
        adjugate, volume = self._adjugate
        return not np.any((self.matrix @ rotation.T @ adjugate) % volume)

    @cached_property
    def _reduction(self) -> np.ndarray:
        """Integer [3, 3] that makes the supercell vectors Minkowski-reduced."""
        return minkowski_reduce(self.atoms.cell.array)[1]

    @cached_property
    def periods(self) -> tuple[np.ndarray, np.ndarray]:
        """The 125 shortest combinations of supercell vectors: lattice vectors [125, 3] and the same in Å."""
        steps = np.array(list(product((-2, -1, 0, 1, 2), repeat=3))) @ self._reduction
        return steps @ self.matrix, steps @ self.atoms.cell.array

    def nearby(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images [K, 3] in Å of vectors in the reduced cell around zero, and lattice vectors [K, 3] that lead there.

        From such an image, :attr:`periods` reach every nearest one.
        """
        reduced = self._reduction @ self.atoms.cell.array
        steps = -np.rint(vectors @ np.linalg.inv(reduced)).astype(int)
        return vectors + steps @ reduced, steps @ self._reduction @ self.matrix

    def nearest(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All shortest images of vectors [K, 3] in Å.

        Returns, of P images, the vector [P] that each belongs to, ascending; the image [P, 3] in Å; and the lattice
        vector [P, 3] that leads there.
        """
        bonds, hops = self.nearby(vectors)
        shifts, steps = self.periods
        apart = np.linalg.norm(bonds[:, None] + steps, axis=2)  # [K, 125]
        which, image = np.nonzero(apart <= apart.min(axis=1, keepdims=True) + TIE_A)
        return which, bonds[which] + steps[image], hops[which] + shifts[image]
