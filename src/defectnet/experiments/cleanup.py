"""From the rows of a file to a spectrum: order, sides, background, and what no density of states can be."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from defectnet.errors import InputError
from defectnet.experiments.columns import Columns
from defectnet.experiments.spectrum import MeasuredSpectrum, cells_around, rebinned

POINTS_MIN = 10
NEGATIVE_SIDE_MAX = 1e-3
"""Share of the absolute area at negative energies that is dropped with a note only."""
ELASTIC_meV = 3.0
"""A spectrum that is highest below this holds the elastic line."""
NEGATIVE_SIGMAS, NEGATIVE_SHARE = 5.0, 0.05
"""How far below zero noise may reach: in errors, or without errors as a share of the maximum."""
END_SHARE, END_HEIGHT = 0.05, 0.2
"""A band goes on where the last such share of the range is in the mean higher than this share of the maximum."""
FIT_POINTS_MIN = 8

Side = Literal["loss", "gain", "fold"]


@dataclass(frozen=True)
class Background:
    """What to subtract: a constant or a straight line.

    kind            : ``constant`` or ``linear``
    above_meV       : fit it to all points above this energy, where the band has ended
    level, slope    : or take level + slope × E (E in meV), in the file's units of intensity
    """

    kind: Literal["constant", "linear"] = "constant"
    above_meV: float | None = None
    level: float = 0.0
    slope: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("constant", "linear"):
            raise InputError(f"--background {self.kind}: must be constant or linear")


def arranged(columns: Columns, weighting: Literal["none", "neutron"], source: str) -> MeasuredSpectrum:
    """Rows in ascending order, one per energy, each with its cell; missing values stay as NaN.

    Rows of equal energy are averaged. Raises :class:`InputError` for too few rows, negative errors, or no values.
    """
    notes = []
    infinite = ~np.isfinite(columns.intensity)
    if columns.error is not None:
        if (columns.error < 0).any():
            row = int(np.argmax(columns.error < 0))
            raise InputError(
                f"{source}: the error at {columns.energy[row]:g} meV is {columns.error[row]:g}; errors are standard "
                "deviations, never negative: say with --columns which column is what"
            )
        infinite |= ~np.isfinite(columns.error)
    intensity = np.where(infinite, np.nan, columns.intensity)
    cells = None if columns.edges is None else np.sort(np.stack([columns.edges[:-1], columns.edges[1:]], 1), axis=1)
    known = np.isfinite(columns.energy)
    if lost := int((~known).sum()):
        notes.append(f"{lost} rows without energy left out")
    if count := int(np.isnan(intensity[known]).sum()):
        if count == known.sum():
            raise InputError(f"{source}: no row has an intensity, all are NaN; export the reduced data again")
        notes.append(f"{count} rows without intensity (NaN): nothing counts as measured there")
    energy = columns.energy[known]
    order = np.argsort(energy, kind="stable")
    if (np.diff(energy) < 0).any() and (np.diff(energy) > 0).any():
        notes.append("rows sorted by energy")
    rows = np.flatnonzero(known)[order]
    distinct, group = np.unique(columns.energy[rows], return_inverse=True)
    values = intensity[rows]
    error = None if columns.error is None else columns.error[rows]
    if len(distinct) < len(rows):
        notes.append(f"{len(rows) - len(distinct)} rows of an energy that stood there already averaged with it")
        values, error = _averaged(values, error, group)
    if len(distinct) < POINTS_MIN:
        raise InputError(f"{source}: {len(distinct)} energies; a spectrum needs {POINTS_MIN} or more")
    cells = cells_around(distinct) if cells is None else cells[rows]
    if error is not None and not (error[np.isfinite(values)] > 0).any():
        notes.append("all errors are zero: taken as unknown")
        error = None
    return MeasuredSpectrum(distinct, values, error, cells, weighting, source, tuple(notes))


def _averaged(values: np.ndarray, error: np.ndarray | None, group: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Means over rows of equal ``group``, of those that have a value."""
    known = np.isfinite(values)
    count = np.bincount(group, known).astype(float)
    count[count == 0] = np.nan
    mean = np.bincount(group, np.where(known, values, 0)) / count
    if error is None:
        return mean, None
    return mean, np.sqrt(np.bincount(group, np.where(known, error, 0) ** 2)) / count


def one_side(spectrum: MeasuredSpectrum, side: Side | None) -> MeasuredSpectrum:
    """Positive energies only: what the neutron lost (``loss``), what it gained (``gain``), or the mean (``fold``).

    Raises :class:`InputError` when the file has both and ``side`` does not say.
    """
    energy, source = spectrum.energies_meV, spectrum.source
    if side not in (None, *get_args(Side)):
        raise InputError(f"--side {side}: must be {', '.join(get_args(Side))}")
    if (energy >= 0).all():
        if side in ("gain", "fold"):
            raise InputError(f"{source}: no negative energies, so --side {side} has nothing to take; leave it out")
        return spectrum
    low, high = energy[0], energy[-1]
    if side is None:
        below = np.abs(spectrum.areas[energy < 0]).sum()
        if below <= NEGATIVE_SIDE_MAX * np.abs(spectrum.areas).sum():
            return spectrum.rows(energy >= 0, f"{(energy < 0).sum()} rows at negative energies left out, all but empty")
        raise InputError(
            f"{source}: energies from {low:g} to {high:g} meV; say --side loss to keep the positive ones, "
            "--side gain to mirror the negative ones, or --side fold to average both"
        )
    if side == "loss":
        if high <= 0:
            raise InputError(f"{source}: energies from {low:g} to {high:g} meV hold no energy loss; say --side gain")
        return spectrum.rows(energy >= 0, "negative energies left out (--side loss)")
    gain = spectrum.rows(np.flatnonzero(energy <= 0)[::-1])
    gain = replace(gain, energies_meV=-gain.energies_meV, cells_meV=-gain.cells_meV[:, ::-1])
    if side == "gain":
        return replace(gain, notes=(*gain.notes, "negative energies mirrored, positive left out (--side gain)"))
    return _folded(spectrum.rows(energy >= 0), gain)


def _folded(loss: MeasuredSpectrum, gain: MeasuredSpectrum) -> MeasuredSpectrum:
    """Mean of both sides where both are measured, one of them elsewhere, on the points of ``loss`` while they last."""
    if not len(loss.energies_meV):
        return gain
    beyond = gain.cells_meV[:, 0] >= loss.cells_meV[-1, 1]
    cells = np.concatenate([loss.cells_meV, gain.cells_meV[beyond]])
    width = np.diff(cells)[:, 0]
    sides = []
    for one in (loss, gain):
        area, variance, covered = rebinned(one, cells)
        known = covered >= (1 - 1e-6) * width
        sides.append((np.where(known, area / width, np.nan), variance / width**2))
    values, variances = np.array([side[0] for side in sides]), np.array([side[1] for side in sides])
    known = np.isfinite(values)
    # Where both have errors the better known side counts more.
    weighted = known.all(axis=0) & (variances > 0).all(axis=0)
    weight = np.where(known, np.where(weighted, 1 / np.where(variances > 0, variances, 1.0), 1.0), 0.0)
    total = np.where(known.any(axis=0), weight.sum(axis=0), np.nan)
    mean = (weight * np.nan_to_num(values)).sum(axis=0) / total
    error = np.sqrt((weight**2 * variances).sum(axis=0)) / total
    return replace(
        loss,
        energies_meV=np.concatenate([loss.energies_meV, gain.energies_meV[beyond]]),
        intensity=mean,
        error=None if loss.error is None else error,
        cells_meV=cells,
        notes=(*loss.notes, "energy gain and loss averaged (--side fold)"),
    )


def without_background(spectrum: MeasuredSpectrum, background: Background) -> MeasuredSpectrum:
    """The spectrum less a background, whose own uncertainty is added to the errors.

    Raises :class:`InputError` where there is too little above the band to fit it to.
    """
    energy = spectrum.energies_meV
    if background.above_meV is None:
        slope = background.slope if background.kind == "linear" else 0.0
        coefficients, variance = np.array([slope, background.level]), np.zeros(len(energy))
    else:
        use = spectrum.measured & (energy >= background.above_meV)
        if use.sum() < FIT_POINTS_MIN:
            raise InputError(
                f"{spectrum.source}: --background: {use.sum()} points above {background.above_meV:g} meV, the file "
                f"ends at {energy[-1]:g} meV; {FIT_POINTS_MIN} are needed; name an energy just above the band"
            )
        # Without weights: errors of counts are smallest where counts are low by chance, which would bias the fit.
        degree = 1 if background.kind == "linear" else 0
        coefficients, covariance = np.polyfit(energy[use], spectrum.intensity[use], degree, cov=True)
        terms = np.vander(energy, degree + 1)
        variance = np.einsum("pi,ij,pj->p", terms, covariance, terms)
    error = None if spectrum.error is None else np.sqrt(spectrum.error**2 + variance)
    left = replace(spectrum, intensity=spectrum.intensity - np.polyval(coefficients, energy), error=error)
    slope, level = np.append(0.0, coefficients)[-2:]
    share = 1 - left.areas.sum() / spectrum.areas.sum()
    note = f"background {level:.4g} {slope:+.4g} × E subtracted, {share:.1%} of the area"
    return replace(left, notes=(*spectrum.notes, note))


def refuse_impossible(spectrum: MeasuredSpectrum, partial: bool) -> None:
    """Raises :class:`InputError` for what no density of states is: negative, highest at zero energy, cut off."""
    use = spectrum.measured
    energy, values = spectrum.energies_meV[use], spectrum.intensity[use]
    if len(values) < POINTS_MIN:
        raise InputError(f"{spectrum.source}: {len(values)} points are left; a spectrum needs {POINTS_MIN} or more")
    top = values.max()
    if spectrum.error is None:
        lowest = np.full(len(values), -NEGATIVE_SHARE * top)
    else:
        lowest = np.minimum(-NEGATIVE_SIGMAS * spectrum.error[use], -1e-3 * abs(top))
    if (values < lowest).any():
        row = int(np.argmin(values - lowest))
        beyond = (
            f"{-values[row] / top:.0%} of the maximum, and the file has no errors"
            if spectrum.error is None
            else f"its error is {spectrum.error[use][row]:.2g}"
        )
        raise InputError(
            f"{spectrum.source}: the intensity at {energy[row]:g} meV is {values[row]:.4g} ({beyond}); noise does not "
            "reach so far below zero: subtract less background, or say with --columns which column is what"
        )
    if energy[values.argmax()] < ELASTIC_meV:
        raise InputError(
            f"{spectrum.source}: highest at {energy[values.argmax()]:g} meV, which is the elastic line, not phonons; "
            "leave it out with --minimum, and give a density of states, not S(Q,E)"
        )
    low, high = spectrum.range_meV
    last = values[energy > min(high - END_SHARE * (high - low), energy[-2])]
    height = last.mean() / top
    if not partial and height > END_HEIGHT:
        raise InputError(
            f"{spectrum.source}: ends at {high:g} meV with {height:.0%} of its maximum: the band goes on, "
            "or background is left; give the whole band, subtract with --background, or accept a part with "
            "--allow-partial"
        )
