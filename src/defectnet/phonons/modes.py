"""Normal modes of a supercell: signed energies and how much each element moves in them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigh

from defectnet.units import SQRT_EIGENVALUE_TO_MEV

IMAGINARY_BELOW_meV = -0.1
"""Modes between this and zero are soft, not unstable: float32 forces leave that much noise."""


@dataclass(frozen=True)
class Modes:
    """Γ-point modes of a supercell without its three rigid translations.

    energies_meV : [M] ascending; imaginary modes are negative.
    weights      : [M, E] Σ_{i of element} |e_i|², the share of each element; rows sum to 1.
    elements     : E symbols, in the order of the columns of ``weights``.
    """

    energies_meV: np.ndarray
    weights: np.ndarray
    elements: tuple[str, ...]


def diagonalise(hessian: np.ndarray, masses: np.ndarray, symbols: list[str]) -> Modes:
    """Modes of a mass-weighted Hessian with the rigid translations projected out.

    Parameters: ``hessian`` [3N, 3N] in eV/Å², ``masses`` [N] in amu, ``symbols`` of the N atoms.
    D = M^-1/2 H M^-1/2, ħω = ħ sqrt(eigenvalue); negative eigenvalues give -ħ sqrt(|eigenvalue|).
    The three translations e_i ∝ sqrt(m_i) are removed exactly, so M = 3N - 3 (Born & Huang, §15).
    """
    n = len(masses)
    eigenvalues, vectors = np.linalg.eigh(_without_translations(hessian, masses))
    energies = np.sign(eigenvalues) * np.sqrt(np.abs(eigenvalues)) * SQRT_EIGENVALUE_TO_MEV
    share = (_of_atoms(vectors, masses) ** 2).reshape(n, 3, -1).sum(axis=1)  # [N, M]
    elements = tuple(sorted(set(symbols)))
    names = np.array(symbols)
    weights = np.stack([share[names == element].sum(axis=0) for element in elements], axis=1)
    return Modes(energies, weights, elements)


def _without_translations(hessian: np.ndarray, masses: np.ndarray) -> np.ndarray:
    """D = M^-1/2 H M^-1/2 in an orthonormal basis [3N, 3N - 3] of everything but the translations."""
    root_mass = np.repeat(np.sqrt(masses), 3)
    dynamical = hessian / np.outer(root_mass, root_mass)
    dynamical = 0.5 * (dynamical + dynamical.T)
    return _reflect(_reflect(dynamical, masses).T, masses)[3:, 3:]


def _of_atoms(vectors: np.ndarray, masses: np.ndarray) -> np.ndarray:
    """From that basis [3N - 3, M] to mass-weighted displacements of atoms [3N, M]."""
    return _reflect(np.concatenate([np.zeros((3, vectors.shape[1])), vectors]), masses)


def _reflect(rows: np.ndarray, masses: np.ndarray) -> np.ndarray:
    """``rows`` [3N, M] reflected such that the three translations and the first atom's displacements change places.

    Translations along x, y and z are the same vector over atoms, so one Householder reflection serves all.
    """
    normal = np.sqrt(masses / masses.sum())
    normal[0] += 1.0  # the sign that does not cancel; the translations end up with the opposite one
    normal /= np.linalg.norm(normal)
    of_atoms = rows.reshape(len(masses), -1)
    return (of_atoms - 2 * np.outer(normal, normal @ of_atoms)).reshape(rows.shape)


def lowest_mode(hessian: np.ndarray, masses: np.ndarray) -> np.ndarray:
    """Displacements [N, 3] of the mode with the lowest eigenvalue, of norm 1; parameters as in :func:`diagonalise`."""
    vector = eigh(_without_translations(hessian, masses), subset_by_index=(0, 0))[1]
    displacements = _of_atoms(vector, masses).reshape(-1, 3) / np.sqrt(masses)[:, None]
    return displacements / np.linalg.norm(displacements)


def stability(modes: Modes) -> dict[str, float]:
    """imaginary_modes (number below :data:`IMAGINARY_BELOW_meV`), imaginary_weight (their share), energy_lowest_meV."""
    imaginary = modes.energies_meV < IMAGINARY_BELOW_meV
    return {
        "imaginary_modes": int(imaginary.sum()),
        "imaginary_weight": float(imaginary.mean()),
        "energy_lowest_meV": float(modes.energies_meV[0]),
    }
