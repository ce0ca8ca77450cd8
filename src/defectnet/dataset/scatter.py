"""What a host's own superposed spectra teach: what a dopant does where others are, too, and how arrangements scatter.

Whoever knows the single defects of a host can make any number of its spectra. To what doping changed in these,

    doped - pristine = Σ concentration × response + scatter,

responses are fitted: those of finite concentration, averaged over arrangements. What they leave has principal
directions, in which differences between spectra say little about concentrations. Least squares that weigh them less are
generalised least squares (Aitken, Proc. R. Soc. Edinb. 55, 42 (1936)).

A spectrum must not be judged by what it has taught itself: superposed spectra are dealt out to :data:`FOLDS` folds, and
each is judged by what the others teach. All other spectra are judged by what all teach, fold number :data:`FOLDS`.
"""

from __future__ import annotations

import numpy as np

from defectnet.dataset.schema import SpectrumTable

FOLDS = 4
FEWEST = 40
"""Superposed spectra that a host must have to teach anything."""

DIRECTIONS = 32
"""Principal directions that are kept: those that change of 240 bins, in a host with ten candidates."""

DILUTE = 0.02
"""Total concentration from which on a spectrum counts less, as scatter grows with it."""

PRIOR = 0.01
"""Weight of the response in the limit of low doping, in units of (concentration / total concentration)²."""


def folds_of(table: SpectrumTable) -> np.ndarray:
    """Fold [S] of each spectrum, see the module's description."""
    fold = np.full(len(table.id), FOLDS)
    superposed = (np.array(table.role) == "doped") & (np.array(table.fidelity) == "superposed")
    for host in np.unique(table.host[superposed]):
        rows = np.flatnonzero(superposed & (table.host == host))
        fold[rows] = np.arange(len(rows)) % FOLDS
    return fold


def taught(change: np.ndarray, concentrations: np.ndarray, dilute: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Responses [K, B] of finite concentration, and principal directions [DIRECTIONS, B] of the scatter.

    Of n superposed spectra less the pristine one, ``change`` [n, B], with ``concentrations`` [n, K] of the candidates,
    whose responses in the limit of low doping are ``dilute`` [K, B]. The squares of the directions sum to the variance.
    """
    weight = 1 / (DILUTE + concentrations.sum(axis=1, keepdims=True))
    shares = concentrations * weight
    normal = shares.T @ shares + PRIOR * np.eye(len(dilute))
    response = np.linalg.solve(normal, shares.T @ (change * weight) + PRIOR * dilute)
    _, size, direction = np.linalg.svd(change - concentrations @ response, full_matrices=False)
    scatter = np.zeros((DIRECTIONS, change.shape[1]))
    count = min(DIRECTIONS, len(size))
    scatter[:count] = direction[:count] * size[:count, None] / len(change) ** 0.5
    return response, scatter
