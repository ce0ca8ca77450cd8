"""Figures of how well networks and baselines answer, each a function that draws one and returns the paths written."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from defectnet.dataset.samples import Axis, Responses, intensities_of, load_responses
from defectnet.dataset.schema import Dataset
from defectnet.elements import MASSES, index_of
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
    SINGLE_COLUMN,
    SPLIT_NAMES,
    VERMILION,
    energy_window,
    formula_text,
    letter,
    new_figure,
    save,
    style,
)
from defectnet.training.detection import detection_limits

DOTS_MAX = 20_000
"""Most entries that a panel of predictions shows, chosen at random."""

EXAMPLES = ("SiC", "AlAs", "AgGaS2", "CuInSe2")
"""Hosts of the published figures, shown where the test holds them."""

NOISE = 0.01
"""Standard deviation per bin, over the mean intensity, that detection limits are shown for."""

LINES = {
    ("response", "library"): (BLUE, "-"),
    ("response", "mass_only"): (BLUE, "--"),
    ("response", "none"): (BLUE, ":"),
    ("nnls", "library"): (GREEN, "-"),
    ("nnls", "mass_only"): (GREEN, "--"),
    ("trees", "none"): (ORANGE, ":"),
    ("published", "none"): (VERMILION, ":"),
    ("mean", "none"): (GREY, ":"),
}
"""Colour by model, dashes by level of knowledge."""


def spectra_figure(data: Dataset, predictions: pd.DataFrame, stem: Path, count: int = 4) -> list[Path]:
    """Test spectra over the range of prediction errors, beside true concentrations and those of the network.

    Taken from the host split where there is one: ``count`` spectra at equal steps from small to large error.
    """
    model = next(model for model in MODEL_NAMES if model in predictions)
    answered = _at_best_level(predictions, model)
    kind = "host" if (answered["split"] == "host").any() else answered["split"].iloc[0]
    chosen = answered[answered["split"] == kind].drop_duplicates(["spectrum", "element"])
    errors = (chosen[model] - chosen["true"]).pow(2).groupby(chosen["spectrum"]).mean().sort_values()
    quantiles = np.linspace(0.1, 0.9, min(count, len(errors)))
    names = [errors.index[int(q * (len(errors) - 1))] for q in quantiles]
    row_of = {name: row for row, name in enumerate(data.spectra.id)}
    with style():
        figure = new_figure(DOUBLE_COLUMN, 0.45 + 1.35 * len(names))
        grid = figure.subplots(len(names), 2, width_ratios=(2.2, 1), squeeze=False)
        for index, name in enumerate(names):
            left, right = grid[index]
            row = row_of[name]
            host = data.spectra.host[row]
            centers = bin_centers(data.edges_meV)
            pair = data.spectra.pdos[[data.hosts.pristine[host], row]]
            left.fill_between(centers, pair[0] * 1e3, color=GREY, alpha=0.35, lw=0, label="pristine")
            left.plot(centers, pair[1] * 1e3, color=BLUE, label="doped")
            left.set(xlim=energy_window(pair, data.edges_meV), ylabel="DOS (eV$^{-1}$)")
            left.set_ylim(0, 1.15e3 * pair.max())
            left.yaxis.set_major_locator(MaxNLocator(4))
            left.set_title(formula_text(data.hosts.formula[host]), loc="left", fontweight="bold")
            letter(left, index)
            part = chosen[chosen["spectrum"] == name].sort_values(["true", "element"], ascending=[False, True])
            _dumbbells(right, part["element"], part["true"], part[model])
        grid[0, 0].legend(loc="upper right", ncols=2)
        grid[0, 1].legend(loc="lower center", ncols=2, bbox_to_anchor=(0.5, 1.0), borderaxespad=0.1)
        grid[-1, 0].set_xlabel(ENERGY_LABEL)
        return save(figure, stem)


def _at_best_level(predictions: pd.DataFrame, model: str) -> pd.DataFrame:
    """The answers that a model gives when it knows most."""
    answered = predictions[predictions[model].notna()]
    return answered[answered["level"] == next(level for level in LEVEL_NAMES if (answered["level"] == level).any())]


def _dumbbells(axes: Any, elements: pd.Series, true: pd.Series, predicted: pd.Series) -> None:
    """True and predicted concentration of each candidate, joined by their difference."""
    x = np.arange(len(elements))
    true, predicted = 100 * true.to_numpy(), 100 * predicted.to_numpy()
    axes.axhline(0, color=BLACK, lw=0.5)
    axes.vlines(x, true, predicted, color=GREY, lw=0.8, zorder=1)
    axes.scatter(x, true, s=16, facecolor="white", edgecolor=BLACK, linewidth=0.8, zorder=2, label="true")
    axes.scatter(x, predicted, s=12, color=VERMILION, lw=0, zorder=3, label="predicted")
    axes.set_xticks(x, elements)
    axes.tick_params(axis="x", length=0)
    axes.set(xlim=(-0.7, len(elements) - 0.3), ylabel="Concentration (at.%)")
    axes.yaxis.set_major_locator(MaxNLocator(4))


def parity_figure(predictions: pd.DataFrame, scores: dict[str, Any], stem: Path) -> list[Path]:
    """Predicted against true concentration: one row per kind of split, one column per model when it knows most."""
    kinds = [kind for kind in SPLIT_NAMES if kind in scores]
    answers = {model: _at_best_level(predictions, model) for model in MODEL_NAMES if model in predictions}
    true = 100 * predictions["true"].to_numpy()
    guesses = 100 * np.concatenate([part[model].to_numpy() for model, part in answers.items()])
    # A few wild predictions would squeeze all others into a line: they are left outside the frame.
    low, high = min(0.0, np.quantile(guesses, 0.005)), max(true.max(), np.quantile(guesses, 0.995))
    margin = 0.04 * (high - low)
    right = 1.06 * true.max()
    with style():
        figure = new_figure(DOUBLE_COLUMN, 0.5 + 2.0 * len(kinds))
        grid = figure.subplots(len(kinds), len(answers), sharex=True, sharey=True, squeeze=False)
        for row, kind in enumerate(kinds):
            for axes, (model, answer) in zip(grid[row], answers.items(), strict=True):
                part = answer[answer["split"] == kind]
                level = next(level for level in LEVEL_NAMES if level in scores[kind][model])
                axes.set_title(_score_text(scores[kind][model][level]), loc="left")
                part = part.sample(min(len(part), DOTS_MAX), random_state=0)
                true, guess = 100 * part["true"].to_numpy(), 100 * part[model].to_numpy()
                size = float(np.clip(400 / np.sqrt(len(part)), 1.5, 9))
                dots = {"s": size, "alpha": 0.35, "lw": 0, "rasterized": True}
                axes.plot([0, right], [0, right], color=BLACK, lw=0.6, zorder=0)
                axes.scatter(true[true == 0], guess[true == 0], color=ORANGE, **dots)
                axes.scatter(true[true > 0], guess[true > 0], color=BLUE, **dots)
                axes.set(xlim=(-0.06 * right, right), ylim=(low - margin, high + margin))
                axes.xaxis.set_major_locator(MaxNLocator(5))
                axes.yaxis.set_major_locator(MaxNLocator(5))
                if row == 0:
                    axes.annotate(
                        f"{MODEL_NAMES[model]}\n{LEVEL_NAMES[level]}", (0, 1), xycoords="axes fraction",
                        xytext=(0, 36), textcoords="offset points", fontweight="bold",
                    )  # fmt: skip
            grid[row, 0].set_ylabel(f"{SPLIT_NAMES[kind].capitalize()}\nPredicted concentration (at.%)")
            letter(grid[row, 0], row)
        absent, present = (Line2D([], [], marker="o", ls="", ms=3, color=colour) for colour in (ORANGE, BLUE))
        grid[0, 0].legend((absent, present), ("absent", "present"), handletextpad=0.1, borderaxespad=0.1)
        figure.supxlabel("True concentration (at.%)", fontsize=7)
        return save(figure, stem)


def _score_text(score: dict[str, Any]) -> str:
    lines = [f"RMSE {score['rmse_at']:.2f} at.%"]
    if score["intervals"]:
        low, high = score["intervals"]["rmse_at"]
        lines.append(f"({low:.2f} to {high:.2f})")
    if score["r2"] is not None:
        lines.append(f"R² {round(score['r2'], 2) + 0.0:.2f}".replace("-", "−"))  # + 0.0 turns −0.00 into 0.00
    if score["auroc"] is not None:
        lines[-1] += f", AUROC {score['auroc']:.2f}"
    return "\n".join(lines)


def training_figure(history: pd.DataFrame, stem: Path) -> list[Path]:
    """Error over epochs in training and validation, one row per network and one column per kind of split.

    One pair of lines per repeat and member.
    """
    presets = [preset for preset in MODEL_NAMES if (history["preset"] == preset).any()]
    kinds = [kind for kind in SPLIT_NAMES if (history["split"] == kind).any()]
    panels = list(product(presets, kinds))
    with style():
        figure = new_figure(SINGLE_COLUMN * (1 if len(kinds) == 1 else 1.7), 0.4 + 1.7 * len(presets))
        grid = figure.subplots(len(presets), len(kinds), sharex=True, sharey=True, squeeze=False)
        for index, (axes, (preset, kind)) in enumerate(zip(grid.flat, panels, strict=True)):
            part = history[(history["split"] == kind) & (history["preset"] == preset)]
            runs = part.groupby(["repeat", "member"])
            alpha = max(0.35, 1 / np.sqrt(len(runs)))
            for number, (_, run) in enumerate(runs):
                named = number == 0
                best = run.loc[run["validation_rmse_at_percent"].idxmin()]
                for column, colour, name in (
                    ("train_rmse_at_percent", GREY, "training"),
                    ("validation_rmse_at_percent", BLUE, "validation"),
                ):
                    axes.plot(
                        run["epoch"], run[column], color=colour, alpha=alpha, lw=0.8, label=name if named else None
                    )
                axes.scatter(
                    best["epoch"], best["validation_rmse_at_percent"], s=14, color=VERMILION, lw=0, zorder=3,
                    label="kept weights" if named else None,
                )  # fmt: skip
            axes.set_title(f"{MODEL_NAMES[preset]}\n{SPLIT_NAMES[kind]}", loc="left")
            axes.set_xlim(0, history["epoch"].max() * 1.02)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            letter(axes, index)
        for axes in grid[:, 0]:
            axes.set_ylabel("RMSE (at.%)")
        for axes in grid[-1]:
            axes.set_xlabel("Epoch")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        for handle in figure.legend(handles, labels, loc="outside upper center", ncols=3).legend_handles:
            handle.set_alpha(1)
        return save(figure, stem)


def _name(model: str, level: str) -> str:
    """A model and what it knows, for a legend."""
    return ", ".join(filter(None, (MODEL_NAMES[model], LEVEL_NAMES[level])))


def errors_figure(scores: dict[str, Any], stem: Path) -> list[Path]:
    """On unseen hosts, RMSE by number of dopants and by mass ratio, and average precision by concentration."""
    kind = next(kind for kind in SPLIT_NAMES if kind in scores)
    panels = (
        ("species", "rmse_at", "Dopants in the spectrum", "RMSE (at.%)"),
        ("mass_ratio", "rmse_at", "Mass over that of the replaced element", "RMSE (at.%)"),
        ("concentration_at", "average_precision", "Concentration (at.%)", "Average precision"),
    )
    with style():
        figure = new_figure(DOUBLE_COLUMN, 2.7)
        for index, (axes, (division, quantity, label, name)) in enumerate(
            zip(figure.subplots(1, 3), panels, strict=True)
        ):
            classes: list[str] = []
            for (model, level), (colour, dashes) in LINES.items():
                told = scores[kind].get(model, {}).get(level)
                if told is None:
                    continue
                parts = told["subsets"].get(division, {})
                # >=0.5 sums up other classes.
                found = {one: part for one, part in parts.items() if part[quantity] is not None and one != ">=0.5"}
                classes = classes or list(found)
                x = [classes.index(one) for one in found if one in classes]
                values = [found[one][quantity] for one in found if one in classes]
                axes.plot(
                    x, values, color=colour, ls=dashes, marker="o", ms=2.5, lw=1,
                    label=_name(model, level),
                )  # fmt: skip
            axes.set_xticks(range(len(classes)), classes, rotation=30 if max(map(len, classes), default=0) > 3 else 0)
            axes.set(xlabel=label, ylabel=name)
            axes.set_ylim(0, None if quantity == "rmse_at" else 1)
            letter(axes, index)
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
        return save(figure, stem)


def calibration_figure(predictions: pd.DataFrame, open_set: dict[str, Any], stem: Path) -> list[Path]:
    """On unseen hosts: is presence as frequent as predicted, do intervals hold, is what is foreign noticed?"""
    kind = next(kind for kind in SPLIT_NAMES if (predictions["split"] == kind).any())
    told = predictions[predictions["split"] == kind]
    with style():
        figure = new_figure(DOUBLE_COLUMN, 2.5)
        presence, coverage, foreign = figure.subplots(1, 3)
        for (model, level), (colour, dashes) in LINES.items():
            look = {"color": colour, "ls": dashes, "marker": "o", "ms": 2.5, "lw": 1}
            named = {"label": _name(model, level)}
            part = told[told["level"] == level]
            if f"{model}_presence" in part and part[model].notna().any():
                presence.plot(*_mean_in_bins(part[f"{model}_presence"], part["true"] > 0, equal=True), **look, **named)
                inside = (part[model] - part["true"]).abs() <= part[f"{model}_width"]
                coverage.plot(*_mean_in_bins(100 * part[f"{model}_width"], inside, equal=False), **look)
            if level in open_set.get(kind, {}).get(model, {}):
                ranges = open_set[kind][model][level]["at"]
                foreign.plot(list(ranges), list(ranges.values()), **look, **named)
        presence.plot([0, 1], [0, 1], color=BLACK, lw=0.6, zorder=0)
        presence.set(xlabel="Predicted probability of presence", ylabel="Share that is present")
        coverage.set(
            xlabel="Half width of the 90 % interval (at.%)", ylabel="Share that holds the truth", ylim=(0, 1.02)
        )
        if any(len(line.get_xdata()) for line in coverage.lines):
            coverage.set_xscale("log")
        coverage.axhline(0.9, color=BLACK, lw=0.6, zorder=0)
        foreign.axhline(0.5, color=BLACK, lw=0.6, zorder=0)
        foreign.set(xlabel="Dopant not asked about (at.%)", ylabel="AUROC of noticing it", ylim=(0.4, 1.02))
        for index, axes in enumerate((presence, coverage, foreign)):
            letter(axes, index)
        handles = {label: handle for axes in (presence, foreign) for handle, label in
                   zip(*axes.get_legend_handles_labels(), strict=True)}  # fmt: skip
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=3)
        return save(figure, stem)


def _mean_in_bins(x: pd.Series, y: pd.Series, equal: bool, bins: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Means of both in bins of ``x``, of equal width or content; bins with less than 20 entries are left out."""
    edges = np.linspace(0, 1, bins + 1) if equal else np.unique(np.quantile(x, np.linspace(0, 1, bins + 1)))
    groups = pd.DataFrame({"x": x, "y": y.astype(float)}).groupby(pd.cut(x, edges, include_lowest=True), observed=True)
    means = groups.mean()[groups.size() >= 20]
    return means["x"].to_numpy(), means["y"].to_numpy()


def detection_figure(data: Dataset, stem: Path) -> list[Path]:
    """Detection limits: against mass ratio at one noise, but of vacancies; and how many are found at several noises."""
    responses = load_responses(data, Axis("absolute"))
    with style():
        figure = new_figure(DOUBLE_COLUMN * 0.75, 2.4)
        by_mass, by_noise = figure.subplots(1, 2)
        found = list(_limits(responses))
        if not found:
            figure.clear()
            figure.text(0.5, 0.5, "No response is known", ha="center")
            return save(figure, stem)
        ratio, alone, among = (np.concatenate(values) for values in zip(*found, strict=True))
        for limits, colour, label in ((among, BLUE, "among all candidates"), (alone, ORANGE, "alone")):
            shown = np.isfinite(limits) & (ratio > 0)
            by_mass.scatter(ratio[shown], 100 * NOISE * limits[shown], s=5, lw=0, alpha=0.6, color=colour, label=label)
        by_mass.set(xscale="log", yscale="log", xlabel="Mass over that of the replaced element")
        by_mass.set_ylabel(f"Detection limit (at.%), noise {100 * NOISE:g} %")
        ratio = ratio[ratio > 0]
        lightest, heaviest = ratio.min(initial=np.inf), ratio.max(initial=0)
        ticks = [tick for tick in (0.1, 0.25, 0.5, 1, 2, 4, 8) if lightest / 1.5 < tick < 1.5 * heaviest]
        by_mass.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        by_mass.minorticks_off()
        by_mass.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, handletextpad=0.1)
        amounts = np.geomspace(1e-4, 0.25, 80)
        for noise, dashes in ((0.001, "-"), (0.01, "--"), (0.05, "-."), (0.2, ":")):
            share = (noise * among[:, None] <= amounts).mean(axis=0)
            by_noise.plot(100 * amounts, 100 * share, color=BLUE, ls=dashes, label=f"noise {100 * noise:g} %")
        by_noise.set(xscale="log", xlabel="Concentration (at.%)", ylabel="Candidates above their limit (%)")
        by_noise.set_ylim(0, 100)
        by_noise.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        for index, axes in enumerate((by_mass, by_noise)):
            letter(axes, index)
        return save(figure, stem)


def _limits(responses: Responses) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of each host: mass ratios of its candidates, and their detection limits at noise 1, alone and among all."""
    for host, elements in enumerate(responses.elements):
        known = np.flatnonzero(responses.knows_library[host] & (elements >= 0))
        if len(known):
            curves = responses.library[host, known].astype(float)
            ratio = MASSES[elements[known]] / MASSES[responses.replaced[host, known]]
            yield ratio, detection_limits(curves, 1.0, known=True), detection_limits(curves, 1.0)


def attribution_figure(data: Dataset, predictions: pd.DataFrame, stem: Path) -> list[Path]:
    """What doping changed in held-out spectra, and what predicted dopants explain of it by their responses."""
    model = next(model for model in MODEL_NAMES if model in predictions)
    answered = _at_best_level(predictions, model)
    kind = next(kind for kind in SPLIT_NAMES if (answered["split"] == kind).any())
    told = answered[answered["split"] == kind].drop_duplicates(["spectrum", "element"])
    responses, spectra = load_responses(data, Axis("absolute")), intensities_of(data, Axis("absolute"))
    row_of = {name: row for row, name in enumerate(data.spectra.id)}
    chosen = _examples(told)
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
                curve = answer[model] * responses.library[host, place]
                left -= curve
                text = f"{answer['element']} {100 * answer[model]:.1f} ({100 * answer['true']:.1f}) at.%"
                axes.fill_between(centers, curve, color=colour, alpha=0.35, lw=0, label=text)
            axes.plot(centers, left, color=GREY, lw=0.6, ls="--", label="not explained")
            axes.axhline(0, color=BLACK, lw=0.4)
            axes.set(xlim=energy_window(np.abs(spectra[[row]]), data.edges_meV), ylabel="Change of intensity")
            axes.set_title(formula_text(data.hosts.formula[host]), loc="left", fontweight="bold")
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
            letter(axes, index)
        axes.set_xlabel(ENERGY_LABEL)
        return save(figure, stem)


def _examples(told: pd.DataFrame, count: int = 4) -> list[str]:
    """Names of spectra to show: of the published examples where there are any, else of hosts at equal steps."""
    published = [told[told["formula"] == formula]["spectrum"] for formula in EXAMPLES]
    names = [spectra.iloc[0] for spectra in published if len(spectra)]
    firsts = told.drop_duplicates("host")["spectrum"]
    steps = firsts.iloc[np.linspace(0, len(firsts) - 1, min(count, len(firsts))).round().astype(int)]
    return [*names, *(name for name in steps if name not in names)][:count]
