"""The axis of a measured pristine spectrum fitted to that of the computed one.

Machine-learned potentials make crystals too soft by 5 to 20 %. A measured spectrum whose energies are multiplied by the
same factor looks to a network like those that it was trained on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.optimize import least_squares

from defectnet.errors import InputError
from defectnet.experiments.resolution import Resolution, area_below, broadened
from defectnet.experiments.spectrum import MeasuredSpectrum

STRETCHES = np.arange(0.6, 1.4001, 0.01)
EXPLAINED_MIN = 0.5
PARTS = 4
"""Parts of a bin of the computed spectrum, to be broadened."""


@dataclass(frozen=True)
class AxisCalibration:
    """E_computed = ``stretch`` × E_measured + ``shift_meV``.

    stretch_error, shift_error_meV : standard deviations. Where the two spectra differ by more than the measured errors,
                                     these are scaled up by √χ² (per degree of freedom); a softening that is not the
                                     same for all modes shows there and is not corrected.
    chi2      : χ² per degree of freedom; without measured errors 1 by construction
    explained : share of the measured variation that the computed spectrum explains
    """

    stretch: float
    stretch_error: float
    shift_meV: float
    shift_error_meV: float
    chi2: float
    explained: float

    def apply(self, spectrum: MeasuredSpectrum) -> MeasuredSpectrum:
        """A spectrum of the same experiment on the computed axis."""
        return spectrum.moved(self.stretch, self.shift_meV)


def calibrate_axis(
    measured: MeasuredSpectrum,
    density: np.ndarray,
    edges_meV: np.ndarray,
    resolution: Resolution | None = None,
    fit_shift: bool = False,
) -> AxisCalibration:
    """Stretch, and with ``fit_shift`` shift, of a measured pristine spectrum's axis to that of the computed one.

    ``density`` [B] in 1/meV on bins [B + 1], weighted like the measured one and broadened here by ``resolution``.
    Least squares of the areas in the measured points' cells, weighted by their errors, with free amplitude; started
    from the best of :data:`STRETCHES`. Raises :class:`InputError` when the two are not spectra of one host.
    """
    use = measured.measured
    cells = measured.cells_meV[use]
    areas = measured.areas[use]
    known = measured.error is not None and bool((measured.error[use] > 0).any())
    error = measured.error[use] * np.diff(cells)[:, 0] if known else np.ones(len(areas))
    error = np.where(error > 0, error, error[error > 0].min())

    def model(stretch: float, shift: float, below: PchipInterpolator) -> np.ndarray:
        return np.diff(below((stretch * cells + shift).clip(*below.x[[0, -1]])))[:, 0]

    def misfit(parameters: np.ndarray, below: PchipInterpolator) -> np.ndarray:
        shift = parameters[2] if fit_shift else 0.0
        return (parameters[0] * model(parameters[1], shift, below) - areas) / error

    def start(stretch: float, below: PchipInterpolator) -> tuple[float, float, float]:
        """Misfit with the best amplitude, that amplitude, and the stretch."""
        shape = model(stretch, 0.0, below) / error
        amplitude = float(shape @ (areas / error)) / max(float(shape @ shape), 1e-300)
        return float(((amplitude * shape - areas / error) ** 2).sum()), amplitude, stretch

    below = _cumulative(density, edges_meV, resolution, 1.0)
    _, amplitude, stretch = min(start(one, below) for one in STRETCHES)
    begin = [amplitude, stretch, 0.0][: 3 if fit_shift else 2]
    for _ in range(3 if resolution else 1):  # the width belongs to the measured axis: known when the stretch is
        below = _cumulative(density, edges_meV, resolution, begin[1])
        found = least_squares(
            misfit, begin, args=(below,), x_scale=[max(abs(amplitude), 1e-9), 0.01, 0.1][: len(begin)]
        )
        begin = list(found.x)
    free = len(areas) - len(begin)
    chi2 = float(2 * found.cost / free)
    weight = 1 / error**2
    mean = float((weight * areas).sum() / weight.sum())
    explained = 1 - 2 * found.cost / float((weight * (areas - mean) ** 2).sum())
    stretch = float(found.x[1])
    if explained < EXPLAINED_MIN or not STRETCHES[0] < stretch < STRETCHES[-1]:
        raise InputError(
            f"{measured.source}: the computed spectrum explains {max(explained, 0.0):.0%} of it with energies "
            f"multiplied by {stretch:.3f}; check that it is the pristine sample of this host, with unit "
            "and weighting as stated"
        )
    covariance = np.linalg.inv(found.jac.T @ found.jac) * (max(chi2, 1.0) if known else chi2)
    deviations = np.sqrt(np.diag(covariance))
    return AxisCalibration(
        stretch=stretch,
        stretch_error=float(deviations[1]),
        shift_meV=float(found.x[2]) if fit_shift else 0.0,
        shift_error_meV=float(deviations[2]) if fit_shift else 0.0,
        chi2=chi2 if known else 1.0,
        explained=float(explained),
    )


def _cumulative(
    density: np.ndarray, edges_meV: np.ndarray, resolution: Resolution | None, stretch: float
) -> PchipInterpolator:
    """Area of the computed spectrum below an energy, smooth enough to be differentiated."""
    below = area_below(density, edges_meV)
    if resolution is None:
        return below
    parts = np.linspace(0, len(edges_meV) - 1, PARTS * (len(edges_meV) - 1) + 1)
    fine = np.interp(parts, np.arange(len(edges_meV)), edges_meV)
    # Broadened on the measured axis, where the widths are known.
    measured = fine / stretch
    return area_below(broadened(np.diff(below(fine)) / np.diff(measured), measured, resolution) / stretch, fine)
