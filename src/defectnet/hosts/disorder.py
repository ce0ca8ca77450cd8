"""How disordered a tetrahedral network is: coordination, bond angles, pair distribution, rings.

Every function takes periodic ``ase.Atoms``. Two atoms are bonded when they are closer than a cutoff, by default the
first minimum of the pair distribution of amorphous silicon.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ase import Atoms
from ase.neighborlist import neighbor_list

from defectnet.errors import InputError

BOND_CUTOFF_A = 2.85
"""Between the first (2.35 Å) and second (3.8 Å) neighbours of silicon, amorphous or not."""

RING_MAX = 8
"""Largest rings that are counted by default."""


@dataclass(frozen=True)
class Disorder:
    """Measures of one structure, or means over several.

    coordination : bonds per atom. fourfold : share of atoms with four bonds.
    angle_deg, angle_spread_deg : mean and standard deviation of the angles between two bonds of an atom.
    rings : [RING_MAX + 1] shortest-path rings per atom, by number of members.
    """

    coordination: float
    fourfold: float
    angle_deg: float
    angle_spread_deg: float
    rings: np.ndarray


def measure(structures: Sequence[Atoms], cutoff_A: float = BOND_CUTOFF_A) -> Disorder:
    """Measures of structures; all atoms, bonds and angles count alike. Raises :class:`InputError` without matscipy."""
    bonds = np.concatenate([coordination(atoms, cutoff_A) for atoms in structures])
    angles = np.concatenate([bond_angles(atoms, cutoff_A) for atoms in structures])
    rings = sum(len(atoms) * ring_sizes(atoms, cutoff_A) for atoms in structures) / len(bonds)
    spread = angles.std() if len(angles) else np.nan
    return Disorder(bonds.mean(), np.mean(bonds == 4), angles.mean() if len(angles) else np.nan, spread, rings)


def coordination(atoms: Atoms, cutoff_A: float = BOND_CUTOFF_A) -> np.ndarray:
    """[N] number of bonds of each atom."""
    return np.bincount(neighbor_list("i", atoms, cutoff_A), minlength=len(atoms))


def bond_angles(atoms: Atoms, cutoff_A: float = BOND_CUTOFF_A) -> np.ndarray:
    """[M] angles in degrees between every two bonds that share an atom."""
    centre, bond = neighbor_list("iD", atoms, cutoff_A)
    bond /= np.linalg.norm(bond, axis=1)[:, None]
    angles = [np.empty(0)]
    for atom in range(len(atoms)):
        own = bond[centre == atom]
        cosines = (own @ own.T)[np.triu_indices(len(own), k=1)]
        angles.append(np.degrees(np.arccos(np.clip(cosines, -1, 1))))
    return np.concatenate(angles)


def pair_distribution(atoms: Atoms, r_max_A: float = 10.0, bin_A: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """Distances r in Å (centres of bins) and g(r), which is 1 for a gas without correlations."""
    edges = np.arange(0, r_max_A + bin_A / 2, bin_A)
    counts, _ = np.histogram(neighbor_list("d", atoms, edges[-1]), edges)
    shells = 4 / 3 * np.pi * np.diff(edges**3)
    density = len(atoms) / atoms.get_volume()
    return (edges[:-1] + edges[1:]) / 2, counts / (len(atoms) * density * shells)


def ring_sizes(atoms: Atoms, cutoff_A: float = BOND_CUTOFF_A, largest: int = RING_MAX) -> np.ndarray:
    """[largest + 1] shortest-path rings per atom, by number of members (D. S. Franzblau, Phys. Rev. B 44, 4925 (1991)).

    Diamond has two rings of six per atom and no others. Raises :class:`InputError` without matscipy.
    """
    try:
        from matscipy.rings import ring_statistics
    except ImportError:
        raise InputError("rings: matscipy is not installed; pip install 'defectnet[amorphous]'") from None
    # A path around a periodic cell is no shortcut between members of a ring once it takes more bonds than the ring.
    heights = atoms.get_volume() / np.linalg.norm(np.cross(atoms.cell[[1, 2, 0]], atoms.cell[[2, 0, 1]]), axis=1)
    repeated = atoms.repeat(np.ceil(largest * cutoff_A / heights).astype(int))
    # matscipy counts rings smaller than an even maxlength, and fails for odd ones.
    found = ring_statistics(repeated, cutoff_A, maxlength=2 * (largest // 2 + 1))[: largest + 1]
    return np.pad(found, (0, largest + 1 - len(found))) / len(repeated)
