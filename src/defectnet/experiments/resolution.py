"""What an instrument does to a spectrum: a Gaussian whose width depends on the energy transfer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.special import ndtr

from defectnet.errors import InputError
from defectnet.phonons.pdos import bin_centers

FWHM_PER_SIGMA = 2 * np.sqrt(2 * np.log(2))


@dataclass(frozen=True)
class Resolution:
    """Full width at half maximum over energy: constant, a fraction of it, both in quadrature, or a table.

    constant_meV : FWHM at all energies
    fraction     : ΔE/E
    table        : (energy, FWHM) pairs in meV, ascending; linear in between, constant beyond
    """

    constant_meV: float = 0.0
    fraction: float = 0.0
    table: tuple[tuple[float, float], ...] = ()

    def fwhm_meV(self, energies_meV: np.ndarray) -> np.ndarray:
        """FWHM in meV at the given energies, of the same shape."""
        energies = np.abs(np.asarray(energies_meV, dtype=float))
        width = np.hypot(self.constant_meV, self.fraction * energies)
        return np.hypot(width, np.interp(energies, *zip(*self.table, strict=True))) if self.table else width

    def stretched(self, factor: float) -> Resolution:
        """The same instrument on an axis whose energies are multiplied by ``factor``."""
        table = tuple((factor * energy, factor * fwhm) for energy, fwhm in self.table)
        return Resolution(factor * self.constant_meV, self.fraction, table)


def parse_resolution(text: str) -> Resolution:
    """``1.2`` (FWHM in meV), ``2%`` (of the energy transfer), or a file of two columns, energy and FWHM in meV.

    Raises :class:`InputError` for anything else.
    """
    number, percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        value = float(number)
    except ValueError:
        return _table(Path(text))
    if not 0 <= value < (100 if percent else np.inf):
        raise InputError(f"--resolution {text}: give a width in meV such as 1.2, a share such as 2%, or a file")
    return Resolution(fraction=value / 100) if percent else Resolution(constant_meV=value)


def _table(path: Path) -> Resolution:
    try:
        table = np.loadtxt(path, ndmin=2)
    except (OSError, ValueError) as error:
        raise InputError(f"--resolution {path}: neither a width nor a table of energy and FWHM ({error})") from None
    if table.shape[1] != 2 or len(table) < 2 or not (np.diff(table[:, 0]) > 0).all() or not (table[:, 1] >= 0).all():
        raise InputError(f"--resolution {path}: needs two columns, ascending energy and FWHM >= 0, both in meV")
    return Resolution(table=tuple((float(energy), float(fwhm)) for energy, fwhm in table))


def broadened(density: np.ndarray, edges_meV: np.ndarray, resolution: Resolution) -> np.ndarray:
    """A spectrum [B] in 1/meV on the bins [B + 1] as the instrument shows it.

    Each bin's area is spread by a Gaussian around its centre, as wide as the resolution is there. What would leave the
    axis stays on it, so that the area is conserved. Bins should be narrower than the resolution.
    """
    edges, width = np.asarray(edges_meV, dtype=float), np.diff(edges_meV)
    centers = bin_centers(edges)
    fwhm = resolution.fwhm_meV(centers)
    if not fwhm.any():
        return np.array(density, dtype=float)
    sigma = np.maximum(fwhm / FWHM_PER_SIGMA, 1e-6 * width)
    spread = np.diff(ndtr((edges[:, None] - centers) / sigma), axis=0)  # [B to, B from]
    return (spread / spread.sum(axis=0)) @ (density * width) / width


def area_below(density: np.ndarray, edges_meV: np.ndarray) -> PchipInterpolator:
    """The area of a spectrum [B] in 1/meV on bins [B + 1] below an energy: monotone, with a continuous derivative."""
    areas = density * np.diff(edges_meV)
    areas = np.where(areas > 1e-9 * areas.max(), areas, 0.0)  # its slopes are harmonic means: no denormal numbers
    return PchipInterpolator(edges_meV, np.append(0.0, np.cumsum(areas)))
