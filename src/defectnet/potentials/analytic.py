"""A tiny pair potential for tests and dry runs of the workflow: physically sensible, evaluated in microseconds.

Morse pairs, V(r) = D [(1 - exp(-a (r - r0)))² - 1], smoothly cut off, where r0 is the sum of covalent radii between
unlike ions and √2 times that between like ones, which are bound far more weakly, so that rock salt is stable.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols, covalent_radii
from ase.neighborlist import neighbor_list
from pymatgen.core import Element

from defectnet.config import Potential
from defectnet.digests import digest
from defectnet.elements import MAX_Z
from defectnet.potentials.base import Evaluation, Identity, require_elements
from defectnet.potentials.copies import SkinnedGraph, displaced_vectors

DEPTH_eV = 0.5
LIKE_SHARE = 0.05  # depth of the wells between like ions, as a share of DEPTH_eV
STEEPNESS_PER_A = 1.4
CUTOFF_A = 6.0
ANION_ELECTRONEGATIVITY = 2.4  # Pauling; above: anion-like


def identify(settings: Potential) -> Identity:
    """Identity of the potential; its parameters stand in for weights."""
    weights = digest(parameters=[DEPTH_eV, LIKE_SHARE, STEEPNESS_PER_A, CUTOFF_A, ANION_ELECTRONEGATIVITY])
    return Identity("analytic", "morse", weights, "float64")


def load(settings: Potential) -> MorsePairs:
    """The potential itself; model, checkpoint, device and dtype of the settings do not apply."""
    return MorsePairs(identify(settings))


class MorsePairs:
    """See the module's docstring; implements :class:`~defectnet.potentials.base.ForceModel`."""

    package = "defectnet"
    device = "cpu"
    cutoff_A = CUTOFF_A
    elements = frozenset(chemical_symbols[1 : MAX_Z + 1])

    def __init__(self, identity: Identity):
        self.identity = identity
        self._anion = np.zeros(MAX_Z + 1, dtype=bool)
        for z in range(1, MAX_Z + 1):
            # Noble gases have no electronegativity (nan), which compares as False.
            self._anion[z] = Element.from_Z(z).data.get("X", 0.0) > ANION_ELECTRONEGATIVITY
        self._skinned = SkinnedGraph(lambda atoms, skin: neighbor_list("ijD", atoms, CUTOFF_A + skin))

    def _pairs(self, atoms: Atoms) -> tuple[np.ndarray, ...]:
        """Directed pairs i, j, vectors D [P, 3], distances r, and V, V', V'' of each pair."""
        i, j, vectors, r = neighbor_list("ijDd", atoms, CUTOFF_A)
        return i, j, vectors, r, *self._morse(atoms.numbers[i], atoms.numbers[j], r)

    def _morse(self, zi: np.ndarray, zj: np.ndarray, r: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """V, V', V'' [..., P] of pairs of the atomic numbers zi, zj [P] at the distances r [..., P]."""
        like = self._anion[zi] == self._anion[zj]
        r0 = (covalent_radii[zi] + covalent_radii[zj]) * np.where(like, np.sqrt(2), 1.0)
        e = np.exp(-STEEPNESS_PER_A * (r - r0))
        depth = DEPTH_eV * np.where(like, LIKE_SHARE, 1.0)
        v, dv = depth * (e * e - 2 * e), 2 * depth * STEEPNESS_PER_A * (e - e * e)
        ddv = 2 * depth * STEEPNESS_PER_A**2 * (2 * e * e - e)
        # Multiply by s(r) = (1 - (r/rc)²)³, which vanishes at rc with two derivatives, and beyond.
        x = np.maximum(1 - (r / CUTOFF_A) ** 2, 0)
        s, ds = x**3, -6 * r / CUTOFF_A**2 * x**2
        dds = -6 / CUTOFF_A**2 * x**2 + 24 * r**2 / CUTOFF_A**4 * x
        return v * s, dv * s + v * ds, ddv * s + 2 * dv * ds + v * dds

    def evaluate(self, structures: Sequence[Atoms]) -> Evaluation:
        """See :class:`~defectnet.potentials.base.ForceModel`."""
        require_elements(self, structures)
        energies, forces, stresses = [], [], []
        for atoms in structures:
            i, _, vectors, r, v, dv, _ = self._pairs(atoms)
            pull = (dv / r)[:, None] * vectors  # force on atom i of each directed pair
            force = np.zeros((len(atoms), 3))
            np.add.at(force, i, pull)
            energies.append(0.5 * v.sum())
            forces.append(force)
            stresses.append(0.5 * vectors.T @ pull / atoms.get_volume())
        return Evaluation(np.array(energies), forces, np.array(stresses))

    def forces_of_displaced(self, atoms: Atoms, displacements: np.ndarray) -> np.ndarray:
        """See :class:`~defectnet.potentials.base.ForceModel`."""
        require_elements(self, [atoms])
        i, j, vectors = self._skinned(atoms, displacements)
        vectors = displaced_vectors(vectors, i, j, displacements)
        r = np.linalg.norm(vectors, axis=-1)
        _, dv, _ = self._morse(atoms.numbers[i], atoms.numbers[j], r)  # nothing beyond the cutoff
        forces = np.zeros(displacements.shape)
        np.add.at(forces, (slice(None), i), (dv / r)[..., None] * vectors)
        return forces

    def hessian_vector_products(self, atoms: Atoms, vectors: np.ndarray) -> np.ndarray:
        """See :class:`~defectnet.potentials.base.HasHessianVectorProduct`."""
        i, j, separation, r, _, dv, ddv = self._pairs(atoms)
        unit = separation / r[:, None]
        relative = vectors[:, i] - vectors[:, j]  # [K, P, 3]
        along = np.einsum("kpc,pc->kp", relative, unit)
        change = (ddv - dv / r)[:, None] * along[..., None] * unit + (dv / r)[:, None] * relative
        products = np.zeros_like(vectors, dtype=float)
        np.add.at(products, (slice(None), i), change)
        return products
