"""A measured spectrum: what each of its points stands for, and its way onto another energy grid."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from defectnet.errors import InputError

GAP_FACTOR = 3.0
"""A step so many times larger than both its neighbours and the median is a range that was not measured."""


@dataclass(frozen=True, eq=False)
class GriddedSpectrum:
    """A spectrum on a grid of B bins.

    edges_meV : [B + 1]
    density   : [B] in 1/meV, mean over the bin; NaN where it was not measured
    error     : [B] standard deviations, or None. Bins that share a measured point have correlated errors.
    measured  : [B] bool, bins that the measurement covers completely
    source    : file and what was read from it
    """

    edges_meV: np.ndarray
    density: np.ndarray
    error: np.ndarray | None
    measured: np.ndarray
    source: str


@dataclass(frozen=True, eq=False)
class MeasuredSpectrum:
    """A density of states as it was measured, cleaned up, of unit area.

    energies_meV : [P] ascending
    intensity    : [P] in 1/meV; NaN where the file has no value
    error        : [P] standard deviations, or None
    cells_meV    : [P, 2] the range of energy that each point stands for: the file's bins, or half-way to its neighbours
    weighting    : what the user states the intensity to be: ``none`` (density of states) or ``neutron`` (each
                   element's part weighted by σ/m, as :func:`~defectnet.phonons.pdos.neutron_pdos` does)
    source       : file and what was read from it
    notes        : what was assumed and changed on the way
    """

    energies_meV: np.ndarray
    intensity: np.ndarray
    error: np.ndarray | None
    cells_meV: np.ndarray
    weighting: Literal["none", "neutron"]
    source: str
    notes: tuple[str, ...] = ()

    @property
    def measured(self) -> np.ndarray:
        """Which points [P] have a value."""
        return np.isfinite(self.intensity)

    @property
    def areas(self) -> np.ndarray:
        """Intensity × width of each point's cell [P], zero where nothing was measured."""
        return np.nan_to_num(self.intensity) * np.diff(self.cells_meV)[:, 0]

    @property
    def range_meV(self) -> tuple[float, float]:
        """Lower and upper end of what was measured."""
        cells = self.cells_meV[self.measured]
        return float(cells[0, 0]), float(cells[-1, 1])

    def rows(self, chosen: np.ndarray, *notes: str) -> MeasuredSpectrum:
        """Some points, by index or mask, with notes on why."""
        return replace(
            self,
            energies_meV=self.energies_meV[chosen],
            intensity=self.intensity[chosen],
            error=None if self.error is None else self.error[chosen],
            cells_meV=self.cells_meV[chosen],
            notes=(*self.notes, *notes),
        )

    def scaled(self, factor: float) -> MeasuredSpectrum:
        """Intensities and errors times ``factor``."""
        error = None if self.error is None else self.error * factor
        return replace(self, intensity=self.intensity * factor, error=error)

    def normalised(self) -> MeasuredSpectrum:
        """Unit area over what was measured. Raises :class:`InputError` without positive area."""
        area = self.areas.sum()
        if not area > 0:
            raise InputError(f"{self.source}: the area under the spectrum is {area:.3g}; it must be positive")
        return self.scaled(1.0 / area)

    def within(self, low_meV: float, high_meV: float) -> MeasuredSpectrum:
        """The points whose cells lie within a range, of unit area."""
        tolerance = 1e-6 * (self.cells_meV[-1, 1] - self.cells_meV[0, 0])
        inside = (self.cells_meV[:, 0] >= low_meV - tolerance) & (self.cells_meV[:, 1] <= high_meV + tolerance)
        if not (inside & self.measured).any():
            raise InputError(f"{self.source}: nothing was measured between {low_meV:g} and {high_meV:g} meV")
        return self.rows(inside).normalised()

    def moved(self, stretch: float, shift_meV: float = 0.0) -> MeasuredSpectrum:
        """The spectrum on the axis E' = ``stretch`` × E + ``shift_meV``, of the same area."""
        moved = self.scaled(1.0 / stretch)
        return replace(
            moved,
            energies_meV=stretch * self.energies_meV + shift_meV,
            cells_meV=stretch * self.cells_meV + shift_meV,
            notes=(*self.notes, f"energies multiplied by {stretch:.4f} and raised by {shift_meV:.3f} meV"),
        )

    def on_grid(self, edges_meV: np.ndarray) -> GriddedSpectrum:
        """The spectrum on bins with the given finite, ascending edges [B + 1]; area is neither lost nor made.

        The area of a cell is shared out evenly over its width, with independent errors of the points.
        """
        edges = np.asarray(edges_meV, dtype=float)
        area, variance, covered = rebinned(self, np.stack([edges[:-1], edges[1:]], axis=1))
        width = np.diff(edges)
        measured = covered >= (1 - 1e-6) * width
        density = np.where(measured, area / width, np.nan)
        error = None if self.error is None else np.where(measured, np.sqrt(variance) / width, np.nan)
        return GriddedSpectrum(edges, density, error, measured, self.source)


def rebinned(spectrum: MeasuredSpectrum, targets_meV: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Area, its variance, and the measured width in meV, each [B], in ranges [B, 2] that ascend and do not overlap."""
    use = spectrum.measured
    cells, intensity = spectrum.cells_meV[use], spectrum.intensity[use]
    breaks = np.union1d(cells, targets_meV)
    middle, width = 0.5 * (breaks[:-1] + breaks[1:]), np.diff(breaks)
    cell, target = _inside(middle, cells), _inside(middle, targets_meV)
    both = (cell >= 0) & (target >= 0)
    cell, target, width = cell[both], target[both], width[both]
    count = len(targets_meV)
    area = np.bincount(target, intensity[cell] * width, count)
    covered = np.bincount(target, width, count)
    error = np.zeros(len(cells)) if spectrum.error is None else np.nan_to_num(spectrum.error[use])
    return area, np.bincount(target, (error[cell] * width) ** 2, count), covered


def _inside(points: np.ndarray, ranges: np.ndarray) -> np.ndarray:
    """Index of the range [B, 2] that holds each point, -1 where none does."""
    index = np.searchsorted(ranges[:, 0], points, side="right") - 1
    return np.where((index >= 0) & (points < ranges[index, 1]), index, -1)


def cells_around(energies_meV: np.ndarray) -> np.ndarray:
    """Cells [P, 2] of P >= 3 ascending energies: half-way to the neighbours, not across gaps (:data:`GAP_FACTOR`)."""
    steps = np.diff(energies_meV)
    usual = np.median(steps)
    beside = np.maximum(np.append(0.0, steps[:-1]), np.append(steps[1:], 0.0))
    half = np.where(steps > GAP_FACTOR * np.maximum(beside, usual), np.nan, steps / 2)
    below, above = np.append(np.nan, half), np.append(half, np.nan)
    below, above = np.where(np.isnan(below), above, below), np.where(np.isnan(above), below, above)
    cells = np.stack([energies_meV - below, energies_meV + above], axis=1)
    alone = np.isnan(cells[:, 0])  # a first or last point with a gap beside it
    cells[alone] = energies_meV[alone, None] + [-usual / 2, usual / 2]
    return cells
