"""The picture of an answer about a measured sample."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from defectnet.experiments.predict import Identification
from defectnet.phonons.pdos import bin_centers
from defectnet.report.style import (
    BLACK,
    BLUE,
    DOUBLE_COLUMN,
    ENERGY_LABEL,
    GREY,
    VERMILION,
    energy_window,
    letter,
    new_figure,
    save,
    style,
)

SHOWN = 6
"""Dopants with contributions of their own, the largest; the others are added up."""


def identification_figure(found: Identification, stem: Path) -> list[Path]:
    """Spectra and answer; below, what doping changed, what each dopant contributes to it, and what is left.

    Returns the paths of PNG and SVG.
    """
    centers = np.where(found.measured, bin_centers(found.edges_meV), np.nan)
    fitted = found.contributions.sum(axis=0)
    low, high = energy_window(np.nan_to_num([found.pristine, found.pristine + found.difference]), found.edges_meV)
    with style():
        figure = new_figure(DOUBLE_COLUMN, 4.2)
        grid = figure.subplots(2, 2, width_ratios=(2.2, 1), height_ratios=(1.2, 1))
        spectra, amounts, changes, rest = grid.ravel()
        spectra.plot(centers, found.pristine, color=GREY, label="undoped")
        spectra.plot(centers, found.pristine + found.difference, color=BLACK, label="sample")
        spectra.plot(centers, found.pristine + fitted, color=VERMILION, ls="--", label="undoped + dopants found")
        spectra.set_ylabel("Density of states (meV$^{-1}$)")
        spectra.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
        changes.plot(centers, found.difference, color=BLACK, label="sample - undoped")
        order = np.argsort([-dopant.concentration for dopant in found.dopants])
        for rank, k in enumerate(order[:SHOWN]):
            dopant = found.dopants[k]
            label = f"{100 * dopant.concentration:.1f} at.% {dopant.element}"
            changes.plot(centers, found.contributions[k], color=f"C{rank}", lw=0.8, label=label)
        changes.plot(centers, found.difference - fitted, color=GREY, ls=":", label="left over")
        changes.set(xlabel=ENERGY_LABEL, ylabel="Change (meV$^{-1}$)")
        changes.legend(ncols=5, loc="lower left", bbox_to_anchor=(0, 1), columnspacing=1.0, handlelength=1.2)
        for axes in (spectra, changes):
            axes.set_xlim(low, high)
        places = np.arange(len(found.dopants))
        value = 100 * np.array([[one.low, one.concentration, one.high, one.detection_limit] for one in found.dopants])
        amounts.barh(places, value[:, 3], color="0.9", height=0.8, label="detection limit")
        amounts.errorbar(
            value[:, 1], places, xerr=np.abs(value[:, [0, 2]] - value[:, [1]]).T, fmt="o", ms=3, lw=0.8, color=BLACK,
            label=f"{found.coverage:.0%} interval",
        )  # fmt: skip
        amounts.set(yticks=places, yticklabels=[one.element for one in found.dopants], xlabel="Concentration (at.%)")
        amounts.set_xlim(0, 1.1 * max(value[:, 2].max(), 1e-3))
        amounts.invert_yaxis()
        amounts.legend(ncols=2, loc="lower left", bbox_to_anchor=(0, 1), handlelength=1.2)
        rest.barh(places, [one.presence for one in found.dopants], color=BLUE, height=0.6)
        rest.set(yticks=places, yticklabels=[one.element for one in found.dopants], xlabel="Probability of presence")
        rest.set_xlim(0, 1)
        rest.invert_yaxis()
        for index, axes in enumerate((spectra, amounts, changes, rest)):
            letter(axes, index)
        return save(figure, stem)
