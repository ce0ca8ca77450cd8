"""How little of a dopant a spectrum can show, given its noise: no estimator without prior knowledge does better.

A doped spectrum is the host's plus Σ concentration × response, and both are measured with independent noise of equal
variance in every bin. Then least squares is the best unbiased estimator (Gauss-Markov), and the covariance of the
concentrations follows from the responses alone.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import norm

ERRORS = 0.05
"""Chance of missing an amount at the limit, and of finding one where there is none."""


def detection_limits(responses: np.ndarray, noise: float, known: bool = False) -> np.ndarray:
    """Lowest concentration [K] of each candidate that is found with 95 % chance and 5 % false alarms, a fraction.

    Parameters: ``responses`` [K, B], change of the intensity per unit concentration; ``noise``, standard deviation per
    bin of either spectrum, in units of the mean intensity. A candidate competes with all others of the list, as if
    nothing were known of any, or, with ``known``, with none. The limit is (z_0.95 + z_0.95) σ, here 3.29 σ (Currie,
    Anal. Chem. 40, 586 (1968)), with σ² = 2 noise² (R Rᵀ)⁻¹; infinite where responses are zero or depend linearly.
    """
    gram = responses @ responses.T
    size = np.diag(gram)
    if known:
        with np.errstate(divide="ignore"):
            variance = 1 / size
    else:
        # A response is told apart by what the others cannot imitate: its square less that of its projection.
        values, vectors = np.linalg.eigh(gram)
        usable = values > 1e-9 * max(values[-1], 1e-300)
        inverse = (vectors[:, usable] / values[usable]) @ vectors[:, usable].T
        imitated = (vectors[:, ~usable] ** 2).sum(axis=1) > 1e-6
        variance = np.where(imitated, np.inf, np.diag(inverse))
    return 2 * norm.ppf(1 - ERRORS) * np.sqrt(2 * variance) * noise
