"""Figures of single spectra: what networks say about some, and how they explain it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from defectnet.dataset.samples import Axis, intensities_of, load_responses
from defectnet.dataset.schema import Dataset
from defectnet.elements import index_of
from defectnet.phonons.pdos import bin_centers
from defectnet.report.style import (
    BLACK,
    BLUE,
    DOUBLE_COLUMN,
    ENERGY_LABEL,
    GREEN,
    GREY,
    LEVEL_NAMES,
    MODEL_NAMES,
    ORANGE,
    SPLIT_NAMES,
    VERMILION,
    energy_window,
    formula_text,
    letter,
    new_figure,
    save,
    style,
)

EXAMPLES = ("SiC", "AlAs", "AgGaS2", "CuInSe2")
"""Hosts of the published figures, shown where the test holds them."""

QUARTERS = ("best", "second", "third", "worst")


def at_best_level(predictions: pd.DataFrame, model: str) -> pd.DataFrame:
    """The answers that a model gives when it knows most."""
    answered = predictions[predictions[model].notna()]
    return answered[answered["level"] == next(level for level in LEVEL_NAMES if (answered["level"] == level).any())]


def _of_first_network(predictions: pd.DataFrame) -> tuple[str, pd.DataFrame]:
    """Name of the best known network, and its answers when it knows most, each spectrum of a split once."""
    model = next(model for model in MODEL_NAMES if model in predictions)
    return model, at_best_level(predictions, model).drop_duplicates(["split", "spectrum", "element"])


def _errors(told: pd.DataFrame, model: str) -> pd.DataFrame:
    """By spectrum, from small to large: root mean squared error ``off`` in at.%, ``formula`` and ``host``."""
    squares = told.assign(square=(100 * (told[model] - told["true"])) ** 2).groupby("spectrum", observed=True)
    found = squares.agg(off=("square", "mean"), formula=("formula", "first"), host=("host", "first"))
    return found.assign(off=np.sqrt(found["off"])).sort_values("off", kind="stable")


def spectra_figure(data: Dataset, predictions: pd.DataFrame, stem: Path) -> list[Path]:
    """A test spectrum of each quarter of the errors, beside true concentrations and those of the network.

    On the left of unseen hosts, on the right of known ones, as far as there are such splits.
    """
    model, answered = _of_first_network(predictions)
    outside = next((kind for kind in ("host", "element") if (answered["split"] == kind).any()), None)
    inside = next((kind for kind in ("row", "configuration") if (answered["split"] == kind).any()), None)
    kinds = [kind for kind in (outside, inside) if kind is not None]
    row_of = {name: row for row, name in enumerate(data.spectra.id)}
    with style():
        figure = new_figure(DOUBLE_COLUMN * (1 if len(kinds) == 2 else 0.6), 0.5 + 1.3 * len(QUARTERS))
        grid = figure.subplots(len(QUARTERS), 2 * len(kinds), width_ratios=(1.9, 1) * len(kinds), squeeze=False)
        for column, kind in enumerate(kinds):
            told = answered[answered["split"] == kind]
            errors = _errors(told, model)
            quarters = [errors.iloc[part] for part in np.array_split(np.arange(len(errors)), len(QUARTERS))]
            shown: set[str] = set()
            for quarter, (axes, amounts) in enumerate(grid[:, 2 * column : 2 * column + 2]):
                name = _typical(quarters[quarter], shown)
                if name is None:  # fewer test spectra than quarters
                    axes.set_axis_off()
                    amounts.set_axis_off()
                    continue
                shown.add(errors.loc[name, "formula"])
                _pair(axes, data, row_of[name])
                title = f"{formula_text(errors.loc[name, 'formula'])}, RMSE {errors.loc[name, 'off']:.2g} at.%"
                axes.set_title(title, loc="left")
                if column == 0:
                    axes.set_ylabel(f"{QUARTERS[quarter].capitalize()} quarter\nDOS (eV$^{{-1}}$)")
                part = told[told["spectrum"] == name].sort_values(["true", "element"], ascending=[False, True])
                _dumbbells(amounts, part["element"], part["true"], part[model])
            grid[0, 2 * column].annotate(
                f"{SPLIT_NAMES[kind].capitalize()}", (0, 1), xycoords="axes fraction", xytext=(0, 16),
                textcoords="offset points", fontweight="bold",
            )  # fmt: skip
            letter(grid[0, 2 * column], column)
            grid[-1, 2 * column].set_xlabel(ENERGY_LABEL)
            grid[-1, 2 * column + 1].set_xlabel("Concentration (at.%)")
        handles = [*grid[0, 0].get_legend_handles_labels()[0], *grid[0, 1].get_legend_handles_labels()[0]]
        figure.legend(handles, [one.get_label() for one in handles], loc="outside upper right", ncols=4)
        return save(figure, stem)


def _typical(errors: pd.DataFrame, shown: set[str]) -> str | None:
    """The spectrum nearest to the middle of some sorted ones, of a published example that was not shown if possible."""
    wanted = errors[errors["formula"].isin(set(EXAMPLES) - shown)]
    some = wanted if len(wanted) else errors
    if not len(some):
        return None
    place = np.abs(errors.index.get_indexer(some.index) - (len(errors) - 1) / 2)
    return some.index[place.argmin()]


def _pair(axes: Axes, data: Dataset, row: int) -> None:
    """Densities of states of a doped crystal and of its host."""
    centers = bin_centers(data.edges_meV)
    pair = data.spectra.pdos[[data.spectra.reference[row], row]]
    axes.fill_between(centers, pair[0] * 1e3, color=GREY, alpha=0.35, lw=0, label="pristine")
    axes.plot(centers, pair[1] * 1e3, color=BLUE, label="doped", lw=0.8)
    axes.set(xlim=energy_window(pair, data.edges_meV), ylim=(0, 1.1e3 * pair.max()))
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.xaxis.set_major_locator(MaxNLocator(4))


def _dumbbells(axes: Any, elements: pd.Series, true: pd.Series, predicted: pd.Series) -> None:
    """True and predicted concentration of each candidate, joined by their difference."""
    y = np.arange(len(elements))
    true, predicted = 100 * true.to_numpy(), 100 * predicted.to_numpy()
    axes.axvline(0, color=BLACK, lw=0.5)
    axes.plot([true, predicted], [y, y], color=GREY, lw=0.8, zorder=1)
    axes.scatter(true, y, s=10, facecolor="white", edgecolor=BLACK, linewidth=0.7, zorder=2, label="true")
    axes.scatter(predicted, y, s=8, color=VERMILION, lw=0, zorder=3, label="predicted")
    axes.set_yticks(y, elements, fontsize=5)
    axes.tick_params(axis="y", length=0, pad=1)
    axes.set_ylim(len(elements) - 0.4, -0.6)
    axes.xaxis.set_major_locator(MaxNLocator(3))


def attribution_figure(data: Dataset, predictions: pd.DataFrame, stem: Path) -> list[Path]:
    """What doping changed in held-out spectra, and what predicted dopants explain of it by their responses."""
    model, answered = _of_first_network(predictions)
    kind = next(kind for kind in SPLIT_NAMES if (answered["split"] == kind).any())
    told = answered[answered["split"] == kind]
    responses, spectra = load_responses(data, Axis("absolute")), intensities_of(data, Axis("absolute"))
    row_of = {name: row for row, name in enumerate(data.spectra.id)}
    chosen = _examples(_errors(told, model))
    with style():
        figure = new_figure(DOUBLE_COLUMN, 0.4 + 1.45 * len(chosen))
        for index, (axes, name) in enumerate(
            zip(figure.subplots(len(chosen), squeeze=False)[:, 0], chosen, strict=True)
        ):
            row = row_of[name]
            host, centers = data.spectra.host[row], bin_centers(data.edges_meV)
            change = spectra[row] - spectra[data.spectra.reference[row]]
            part = told[told["spectrum"] == name].sort_values(model, ascending=False)
            left = change.copy()
            axes.plot(centers, change, color=BLACK, lw=1, label="doped − pristine")
            for colour, (_, answer) in zip((BLUE, ORANGE, GREEN, VERMILION), part.iterrows(), strict=False):
                place = np.flatnonzero(responses.elements[host] == index_of(answer["element"]))[0]
                curve = answer[model] * responses.finite[host, -1, place]
                left -= curve
                text = f"{answer['element']} {100 * answer[model]:.1f} ({100 * answer['true']:.1f}) at.%"
                axes.fill_between(centers, curve, color=colour, alpha=0.35, lw=0, label=text)
            axes.plot(centers, left, color=GREY, lw=0.6, ls="--", label="not explained")
            axes.axhline(0, color=BLACK, lw=0.4)
            pair = np.abs(spectra[[row, data.spectra.reference[row]]])
            axes.set(xlim=energy_window(pair, data.edges_meV), ylabel="Change of intensity")
            title = f"{formula_text(data.hosts.formula[host])} ({data.spectra.fidelity[row].replace('_', ' ')})"
            axes.set_title(title, loc="left", fontweight="bold")
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
            letter(axes, index)
        axes.set_xlabel(ENERGY_LABEL)
        return save(figure, stem)


def _examples(errors: pd.DataFrame, count: int = 4) -> list[str]:
    """Of the published examples where there are any, else of hosts at equal steps, the spectrum of median error."""
    middle = {host: part.index[len(part) // 2] for host, part in errors.groupby("host", sort=False, observed=True)}
    formula = errors.groupby("host", observed=True)["formula"].first()
    published = [host for one in EXAMPLES for host in middle if formula[host] == one]
    others = [host for host in middle if host not in published]
    steps = np.linspace(0, len(others) - 1, min(max(count - len(published), 0), len(others))).round().astype(int)
    return [middle[host] for host in [*published, *(others[step] for step in steps)][:count]]
