"""Hessian and relaxed structure of any arrangement of dopants, as a sum of single defects.

H ≈ H_host + Σ_d g_d ΔH_d and u ≈ Σ_d g_d u_d, where g_d is the symmetry operation of the host that carries the
representative site of the library to the actual one. Exact for defects far apart; what it misses is how near
defects change each other. Masses are exact anyway, they enter later.

A vacancy is a defect like others on the sites of the host; the rows and columns of missing atoms, to which it adds
what takes their bonds away, leave the sum at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from copy import copy
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from ase import Atoms

from defectnet.errors import PhysicsError
from defectnet.phonons.blocks import Blocks, cut_out, fold, impose_sum_rule, put_back, unfold_all
from defectnet.phonons.crystal import Folding, space_group
from defectnet.supercells import Plan, apply


@dataclass(frozen=True)
class Defect:
    """One substitution in an otherwise perfect host, in terms of addresses relative to the substituted atom.

    site          : the primitive atom that is replaced or missing
    dopant        : symbol of what replaces it, or :data:`~defectnet.elements.VACANCY`
    atoms         : [K, 4] addresses of displaced atoms
    displacements : [K, 3] in Å, without rigid translation; 0 of a missing atom
    blocks        : ΔH = H(defect) - H(host); H(defect) is 0 for a missing atom
    """

    site: int
    dopant: str
    atoms: np.ndarray
    displacements: np.ndarray
    blocks: Blocks


@dataclass(frozen=True)
class Superposed:
    """A doped supercell predicted from single defects.

    atoms         : N atoms at their predicted relaxed positions, in the order of their sites
    displacements : [N, 3] in Å from the sites of the host
    hessian       : [3N, 3N] in eV/Å²
    """

    atoms: Atoms
    displacements: np.ndarray
    hessian: np.ndarray


class Superposition:
    """A host and its single defects, ready to be arranged in one supercell.

    Parameters: relaxed ``primitive`` cell; integer ``matrix`` T of the supercell; ``force_constants`` [n, N, 3, 3] of
    the pristine supercell in eV/Å², rows of the primitive cell's atoms; ``defects``, one per (site, dopant), where
    site is the first of its symmetry-equivalent atoms.
    """

    def __init__(self, primitive: Atoms, matrix: np.ndarray, force_constants: np.ndarray, defects: Iterable[Defect]):
        self.folding = Folding.of(primitive, matrix)
        self.group = space_group(primitive)
        self.primitive = primitive
        self.hessian = self.folding.hessian(force_constants)
        self.defects = {(defect.site, defect.dopant): defect for defect in defects}

    def into(self, matrix: np.ndarray, force_constants: np.ndarray) -> Superposition:
        """The same defects in the supercell ``matrix`` with the host's ``force_constants`` there.

        What defects change beyond the supercell that they were computed in is taken as zero. The host's own forces
        may reach farther, which is why they have to be computed anew.
        """
        return Superposition(self.primitive, matrix, force_constants, self.defects.values())

    def holding(self, defects: Iterable[Defect]) -> Superposition:
        """The same supercell with other single defects."""
        other = copy(self)
        other.defects = {(defect.site, defect.dopant): defect for defect in defects}
        return other

    def repeated_plan(self, smaller: Superposition, plan: Plan) -> Plan:
        """The arrangement ``plan`` of a smaller supercell of the same host, repeated over this supercell."""
        within = self._within(smaller).tolist()
        dopants = dict(zip(plan.sites, plan.dopants, strict=True))
        sites = [atom for atom, original in enumerate(within) if original in dopants]
        return Plan(tuple(sites), tuple(dopants[within[atom]] for atom in sites))

    def repeated_positions(self, smaller: Superposition, plan: Plan, positions: np.ndarray) -> np.ndarray:
        """Positions [N, 3] in Å of a smaller supercell of the same host, doped by ``plan``, repeated over this one."""
        sites, kept = smaller.folding.atoms.positions, plan.occupied(len(smaller.folding))
        moved = np.zeros_like(sites)
        moved[kept] = positions - sites[kept]
        here = self.repeated_plan(smaller, plan).occupied(len(self.folding))
        return (self.folding.atoms.positions + moved[self._within(smaller)])[here]

    def repeated_hessian(self, smaller: Superposition, plan: Plan, hessian: np.ndarray) -> np.ndarray:
        """Hessian [3N, 3N] of a smaller supercell of the same host, doped by ``plan``, repeated over this supercell.

        What doping changed, ``hessian`` less the host's, acts between nearest images and is repeated; what reaches
        farther is the host's here. Its modes are those of the smaller supercell at all wave vectors that fit this one:
        exact at Γ, and interpolated as phonopy does it elsewhere.
        """
        n_sites = len(smaller.folding)
        change = unfold_all(smaller.folding, put_back(hessian, plan.occupied(n_sites), n_sites) - smaller.hessian)
        total = self.hessian.copy()
        for origin in self.folding.lattice[self._within(smaller) == 0] - smaller.folding.lattice[0]:
            shift = np.append(0, origin)
            fold(Blocks(change.first + shift, change.second + shift, change.values), self.folding, total)
        total = cut_out(total, self.repeated_plan(smaller, plan).occupied(len(self.folding)))
        impose_sum_rule(total)
        return total

    def _within(self, smaller: Superposition) -> np.ndarray:
        """[N] the atom of a smaller supercell that each atom of this one is a repetition of."""
        return smaller.folding.index(self.folding.parent, self.folding.lattice)

    def unchanged(self, plan: Plan) -> np.ndarray:
        """The host's Hessian [3N, 3N] in eV/Å² for the N atoms that ``plan`` leaves, bonds to missing ones cut."""
        return cut_out(self.hessian, plan.occupied(len(self.folding)))

    def needs(self, plan: Plan) -> set[tuple[int, str]]:
        """The (site, dopant) of every single defect that an arrangement is made of."""
        sites = self.group.sites[self.folding.parent[list(plan.sites)]]
        return set(zip(sites.tolist(), plan.dopants, strict=True))

    @cached_property
    def _operations(self) -> np.ndarray:
        """[n] for each primitive atom the operation that carries its representative there.

        Operations that keep the supercell come first: then even what wraps around its boundary is carried exactly.
        Among them, proper rotations: not every potential is invariant under reflections.
        """
        strays = np.array([not self.folding.kept_by(rotation) for rotation in self.group.rotations])
        improper = np.linalg.det(self.group.rotations) < 0
        order = np.lexsort((improper, strays))
        sites = self.group.sites
        arrives = self.group.images[order][:, sites] == np.arange(len(sites))
        return order[arrives.argmax(axis=0)]

    def _placed(self, plan: Plan) -> Iterator[tuple[Defect, np.ndarray, Callable[[np.ndarray], np.ndarray]]]:
        """The defects of an arrangement, each with its Cartesian rotation [3, 3] and what carries its addresses there.

        Raises :class:`PhysicsError` for a single defect that is not known.
        """
        unknown = self.needs(plan) - set(self.defects)
        if unknown:
            told = ", ".join(f"{dopant} on site {site}" for site, dopant in sorted(unknown))
            raise PhysicsError(f"single defects that are not in the library: {told}")
        for atom, dopant in zip(plan.sites, plan.dopants, strict=True):
            parent = self.folding.parent[atom]
            defect = self.defects[int(self.group.sites[parent]), dopant]
            operation = self._operations[parent]
            origin = self.folding.lattice[atom] - self.group.shifts[operation, defect.site]
            yield defect, self.group.cartesian[operation], partial(self._carried, operation, origin)

    def displacements(self, plan: Plan) -> np.ndarray:
        """[N, 3] in Å by which the atoms of an arrangement leave their sites; errors as of :meth:`__call__`."""
        displacements = np.zeros((len(self.folding), 3))
        for defect, rotation, carried in self._placed(plan):
            moved = carried(defect.atoms)
            where = self.folding.index(moved[:, 0], moved[:, 1:])
            np.add.at(displacements, where, defect.displacements @ rotation.T)
        displacements = displacements[plan.occupied(len(self.folding))]
        return displacements - displacements.mean(axis=0)

    def __call__(self, plan: Plan) -> Superposed:
        """The arrangement ``plan``. Raises :class:`PhysicsError` for a single defect that is not known."""
        hessian = self.hessian.copy()
        for defect, rotation, carried in self._placed(plan):
            blocks = defect.blocks
            turned = rotation @ blocks.values @ rotation.T
            fold(Blocks(carried(blocks.first), carried(blocks.second), turned), self.folding, hessian)
        hessian = cut_out(hessian, plan.occupied(len(self.folding)))
        # Blocks that meet at a corner of the supercell they are from may part in a larger one.
        impose_sum_rule(hessian)
        displacements = self.displacements(plan)
        atoms = apply(plan, self.folding.atoms)
        atoms.positions += displacements
        return Superposed(atoms, displacements, hessian)

    def _carried(self, operation: int, origin: np.ndarray, addresses: np.ndarray) -> np.ndarray:
        """Addresses [K, 4] around the representative defect, as they are around the actual one."""
        atoms, lattice = self.group.carry(operation, addresses[:, 0], addresses[:, 1:])
        return np.column_stack([atoms, lattice + origin])
