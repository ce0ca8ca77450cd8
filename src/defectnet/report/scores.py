"""Figures of the scores in metrics.json: all models at a glance, and what makes an answer good or bad."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from defectnet.report.style import (
    BLACK,
    BLUE,
    DOUBLE_COLUMN,
    GREEN,
    GREY,
    LEVEL_NAMES,
    MODEL_NAMES,
    ORANGE,
    PURPLE,
    SPLIT_NAMES,
    VERMILION,
    letter,
    name_of,
    new_figure,
    save,
    style,
)

LINES = {
    ("response", "library"): (BLUE, "-"),
    ("response", "mass_only"): (BLUE, "--"),
    ("response", "none"): (BLUE, ":"),
    ("gls", "library"): (PURPLE, "-"),
    ("nnls", "library"): (GREEN, "-"),
    ("nnls", "mass_only"): (GREEN, "--"),
    ("trees", "none"): (ORANGE, ":"),
    ("published", "none"): (VERMILION, ":"),
    ("mean", "none"): (GREY, ":"),
}
"""Colour by model, dashes by level of knowledge."""

PARTS = {
    "all spectra": (None, None, BLACK),
    "5 at.% of dopants in all and less": ("total_doping_at", "<=5", BLUE),
    "relaxed crystals": ("fidelity", "direct", VERMILION),
}
"""Entries whose errors are shown side by side: division and class among the subsets, colour."""

BEYOND = 1.6
"""Errors of more than this times that of the training mean are left outside the frame, with an arrow."""


def scores_figure(scores: dict[str, Any], stem: Path) -> list[Path]:
    """RMSE with intervals of every model at every level of knowledge, one panel per kind of split."""
    kinds = [kind for kind in SPLIT_NAMES if kind in scores]
    rows = [
        (model, level)
        for model in MODEL_NAMES
        for level in LEVEL_NAMES
        if any(level in scores[kind].get(model, {}) for kind in kinds)
    ]
    with style():
        figure = new_figure(DOUBLE_COLUMN, 0.9 + 0.24 * len(rows))
        for index, (axes, kind) in enumerate(
            zip(figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0], kinds, strict=True)
        ):
            means = [_part(scores[kind].get("mean", {}).get("none"), *part[:2]) for part in PARTS.values()]
            most = BEYOND * max((mean["rmse_at"] for mean in means if mean), default=np.inf)
            for place, (division, one, colour) in enumerate(PARTS.values()):
                for row, (model, level) in enumerate(rows):
                    part = _part(scores[kind].get(model, {}).get(level), division, one)
                    if part is not None:
                        _dot(axes, row + 0.22 * (place - 1), part, colour, most)
                if means[place] is not None:
                    axes.axvline(means[place]["rmse_at"], color=colour, lw=0.5, ls=":", zorder=0)
            axes.set(xlim=(0, most if np.isfinite(most) else None), xlabel="RMSE (at.%)")
            axes.set_ylim(len(rows) - 0.5, -0.5)
            axes.set_yticks(range(len(rows)), [name_of(*row) for row in rows])
            axes.tick_params(axis="y", length=0)
            axes.set_title(fill(SPLIT_NAMES[kind].capitalize(), 18), loc="left")
            if len(kinds) > 1:
                letter(axes, index, left=8)
        marks = [Line2D([], [], marker="o", ms=3, lw=0.8, color=colour) for _, _, colour in PARTS.values()]
        figure.legend(marks, list(PARTS), loc="outside upper center", ncols=len(PARTS))
        return save(figure, stem)


def _part(score: dict[str, Any] | None, division: str | None, one: str | None) -> dict[str, Any] | None:
    """A score, or that of one of its subsets; None where there is none."""
    if score is None or division is None:
        return score
    return score["subsets"].get(division, {}).get(one)


def _dot(axes: Axes, height: float, part: dict[str, Any], colour: str, most: float) -> None:
    """RMSE and its interval."""
    if part["rmse_at"] > most:
        axes.plot(most, height, ">", ms=3, color=colour, clip_on=False)
        return
    if part["intervals"]:
        axes.plot(part["intervals"]["rmse_at"], [height, height], color=colour, lw=0.8)
    axes.plot(part["rmse_at"], height, "o", ms=3, color=colour)


def errors_figure(scores: dict[str, Any], stem: Path) -> list[Path]:
    """On unseen hosts, RMSE by number of dopants, mass ratio and concentration, and average precision by the latter."""
    kind = next(kind for kind in SPLIT_NAMES if kind in scores)
    panels = (
        ("species", "rmse_at", "Dopants in the spectrum", "RMSE (at.%)"),
        ("mass_ratio", "rmse_at", "Mass over that of the replaced element", "RMSE (at.%)"),
        ("present_at", "rmse_at", "Concentration (at.%)", "RMSE of what is there (at.%)"),
        ("concentration_at", "average_precision", "Concentration (at.%)", "Average precision"),
    )
    with style():
        figure = new_figure(DOUBLE_COLUMN, 4.6)
        for index, (axes, panel) in enumerate(zip(figure.subplots(2, 2).flat, panels, strict=True)):
            _by_class(axes, scores[kind], *panel)
            letter(axes, index)
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
        return save(figure, stem)


def traces_figure(scores: dict[str, Any], stem: Path) -> list[Path]:
    """On unseen hosts, how well 0.2 to 0.5 at.% are told from nothing, by mass ratio."""
    kind = next(kind for kind in SPLIT_NAMES if kind in scores)
    label = "Mass over that of the replaced element"
    panels = (
        ("traces_by_mass_ratio", "auroc", label, "AUROC"),
        ("traces_by_mass_ratio", "fpr_at_90_recall", label, "False alarms at 90 % recall"),
    )
    with style():
        figure = new_figure(DOUBLE_COLUMN, 2.7)
        for index, (axes, panel) in enumerate(zip(figure.subplots(1, 2), panels, strict=True)):
            _by_class(axes, scores[kind], *panel)
            axes.axhline(0.5 if panel[1] == "auroc" else 0.9, color=BLACK, lw=0.6, zorder=0)
            letter(axes, index)
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
        return save(figure, stem)


def _by_class(axes: Axes, scores: dict[str, Any], division: str, quantity: str, label: str, name: str) -> None:
    """A quantity with its intervals over the classes of a division, one line per model and level of knowledge."""
    told = {key: scores.get(key[0], {}).get(key[1], {}).get("subsets", {}).get(division, {}) for key in LINES}
    told = {
        key: {one: part for one, part in parts.items() if part[quantity] is not None and one != ">=0.5"}
        for key, parts in told.items()  # >=0.5 sums up other classes
    }
    classes = max(told.values(), key=len, default={})
    classes = list(classes)
    shown = [key for key, parts in told.items() if parts]
    for number, key in enumerate(shown):
        colour, dashes = LINES[key]
        parts = {one: part for one, part in told[key].items() if one in classes}
        x = np.array([classes.index(one) for one in parts]) + 0.5 * ((number + 0.5) / len(shown) - 0.5)
        axes.plot(
            x, [part[quantity] for part in parts.values()], color=colour, ls=dashes, marker="o", ms=2.5, lw=1,
            label=name_of(*key),
        )  # fmt: skip
        for place, part in zip(x, parts.values(), strict=True):
            if part["intervals"] and quantity in part["intervals"]:
                axes.plot([place, place], part["intervals"][quantity], color=colour, lw=0.6, alpha=0.6)
    axes.set_xticks(range(len(classes)), classes)
    axes.set(xlabel=label, ylabel=name)
    axes.set_ylim(0, None if quantity == "rmse_at" else 1.02)
