"""How far an approximate phonon spectrum is from the direct one, measured by what doping changed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import wasserstein_distance

from defectnet.config import Spectra
from defectnet.phonons.modes import Modes, diagonalise
from defectnet.phonons.pdos import energy_edges, pdos
from defectnet.phonons.superposition import Superposition
from defectnet.supercells import Plan


def l1_share(approximate: np.ndarray, exact: np.ndarray, pristine: np.ndarray) -> float:
    """∫|g_approximate - g_exact| / ∫|g_exact - g_pristine| of densities of states [B] on equal bins."""
    return float(np.abs(approximate - exact).sum() / np.abs(exact - pristine).sum())


@dataclass(frozen=True)
class Comparison:
    """Errors of superposition, and of changing masses only, for one doped supercell.

    superposed_l1, mass_only_l1        : :func:`l1_share` of the broadened densities of states
    superposed_w1_meV, mass_only_w1_meV: Wasserstein distances of the mode energies in meV
    displacement_mae_A, displacement_mean_A: mean |component| of what is left of the displacements, and of them all
    """

    superposed_l1: float
    mass_only_l1: float
    superposed_w1_meV: float
    mass_only_w1_meV: float
    displacement_mae_A: float
    displacement_mean_A: float


def compare(
    superpose: Superposition, plan: Plan, direct: Modes, positions: np.ndarray, settings: Spectra
) -> Comparison:
    """Superposition against the ``direct`` modes of the same N atoms, relaxed to ``positions`` [N, 3] in Å."""
    edges = energy_edges(settings)
    superposed = superpose(plan)
    atoms, folding = superposed.atoms, superpose.folding
    masses, symbols = atoms.get_masses(), list(atoms.symbols)
    candidates = [diagonalise(hessian, masses, symbols) for hessian in (superposed.hessian, superpose.unchanged(plan))]
    host = diagonalise(superpose.hessian, folding.atoms.get_masses(), list(folding.atoms.symbols))
    exact, pristine = pdos(direct, edges, settings.sigma_meV), pdos(host, edges, settings.sigma_meV)
    l1 = [l1_share(pdos(modes, edges, settings.sigma_meV), exact, pristine) for modes in candidates]
    w1 = [float(wasserstein_distance(modes.energies_meV, direct.energies_meV)) for modes in candidates]
    moved = positions - folding.atoms.positions[plan.occupied(len(folding))]
    moved -= moved.mean(axis=0)
    left = float(np.abs(moved - superposed.displacements).mean())
    return Comparison(*l1, *w1, left, float(np.abs(moved).mean()))
