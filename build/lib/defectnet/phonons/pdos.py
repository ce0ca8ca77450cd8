"""Phonon density of states: energy grid, Gaussian broadening, partial and neutron-weighted spectra.

A density of states is a histogram of mode energies smeared by a Gaussian of standard deviation σ. Each bin
holds the *integral* of the smeared density over the bin divided by the bin width, so that a spectrum integrates
to 1 over energy exactly as far as the grid covers it, whatever σ and bin width are.
"""

from __future__ import annotations

import numpy as np
import periodictable
from scipy.special import ndtr

from defectnet.config import Spectra
from defectnet.errors import InputError
from defectnet.phonons.modes import Modes


def energy_edges(settings: Spectra) -> np.ndarray:
    """Bin edges [B + 1] in meV of the configured grid; the upper edge is rounded up to a whole bin."""
    bins = int(np.ceil((settings.energy_max_meV - settings.energy_min_meV) / settings.bin_meV - 1e-9))
    return settings.energy_min_meV + settings.bin_meV * np.arange(bins + 1)


def bin_centers(edges_meV: np.ndarray) -> np.ndarray:
    """Centres [B] in meV of bins with the given edges [B + 1]."""
    return 0.5 * (edges_meV[:-1] + edges_meV[1:])


def partial_pdos(modes: Modes, edges_meV: np.ndarray, sigma_meV: float) -> np.ndarray:
    """Element-projected densities of states [E, B] in 1/meV; their sum over elements is the total.

    g_X(E) = 1/M Σ_modes w_X(mode) N(E; E_mode, σ), averaged over each bin.
    """
    # Probability mass of each mode's Gaussian below each edge: [M, B + 1].
    below = ndtr((edges_meV[None, :] - modes.energies_meV[:, None]) / sigma_meV)
    in_bin = np.diff(below, axis=1) / np.diff(edges_meV)
    return modes.weights.T @ in_bin / len(modes.energies_meV)


def pdos(modes: Modes, edges_meV: np.ndarray, sigma_meV: float) -> np.ndarray:
    """Total density of states [B] in 1/meV, integrating to 1 over an axis that covers every mode."""
    return partial_pdos(modes, edges_meV, sigma_meV).sum(axis=0)


def neutron_weights(elements: tuple[str, ...]) -> np.ndarray:
    """σ/m per element [E] in barn/amu: bound total scattering cross section over atomic mass.

    Values from `periodictable` (NIST compilation of Sears, Neutron News 3, 26 (1992)).
    Raises :class:`InputError` for an element without a tabulated cross section.
    """
    weights = []
    for symbol in elements:
        element = periodictable.elements.symbol(symbol)
        if not element.neutron.has_sld():
            raise InputError(f"{symbol}: no neutron cross section is tabulated; use spectra.weighting: none")
        weights.append((element.neutron.coherent + element.neutron.incoherent) / element.mass)
    return np.array(weights)


def neutron_pdos(modes: Modes, edges_meV: np.ndarray, sigma_meV: float) -> np.ndarray:
    """Generalised density of states [B] in 1/meV as seen by neutrons, normalised like :func:`pdos`.

    GPDoS(E) ∝ Σ_X (σ_X / m_X) g_X(E), where the partial g_X already contains the concentration c_X
    (arXiv:2506.00725, Eq. 6; Debye-Waller factors set to 1).
    """
    weights = neutron_weights(modes.elements)
    norm = (modes.weights @ weights).mean()
    return weights @ partial_pdos(modes, edges_meV, sigma_meV) / norm


def spectrum(modes: Modes, edges_meV: np.ndarray, settings: Spectra) -> np.ndarray:
    """The configured kind of spectrum [B] in 1/meV on the given axis."""
    kind = neutron_pdos if settings.weighting == "neutron" else pdos
    return kind(modes, edges_meV, settings.sigma_meV)


def share_outside(modes: Modes, edges_meV: np.ndarray) -> float:
    """Fraction of modes whose energy the axis does not cover: spectral weight lost to truncation."""
    return float(np.mean((modes.energies_meV < edges_meV[0]) | (modes.energies_meV > edges_meV[-1])))
