"""Figures of how well networks and baselines answer, each a function that draws one and returns the paths written."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter, MaxNLocator

from defectnet.dataset.samples import Axis, Responses, load_responses
from defectnet.dataset.schema import Dataset
from defectnet.elements import MASSES, VACANCY
from defectnet.report.examples import at_best_level
from defectnet.report.scores import LINES
from defectnet.report.style import (
    BLACK,
    BLUE,
    DOUBLE_COLUMN,
    GREY,
    LEVEL_NAMES,
    MODEL_NAMES,
    ORANGE,
    SINGLE_COLUMN,
    SPLIT_NAMES,
    VERMILION,
    letter,
    name_of,
    new_figure,
    save,
    style,
)
from defectnet.training.detection import detection_limits

COLUMNS = 4
"""Models that predicted and true concentrations are compared of."""

DOTS_MAX = 20_000
"""Most entries that a panel of predictions shows, chosen at random."""

NOISE = 0.01
"""Standard deviation per bin, over the mean intensity, that detection limits are shown for."""


def parity_figure(predictions: pd.DataFrame, scores: dict[str, Any], stem: Path) -> list[Path]:
    """Predicted against true concentration: one row per kind of split, one column per model when it knows most.

    Of the models, the first :data:`COLUMNS` in the order of :data:`~defectnet.report.style.MODEL_NAMES`.
    """
    kinds = [kind for kind in SPLIT_NAMES if kind in scores]
    shown = [model for model in MODEL_NAMES if model in predictions][:COLUMNS]
    answers = {model: at_best_level(predictions, model) for model in shown}
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
            # The first epoch of training begins anywhere.
            later = history.loc[history["epoch"] > 1, "train_rmse_at_percent"]
            axes.set_ylim(None, 1.15 * max(history["validation_rmse_at_percent"].max(), later.max()))
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


def calibration_figure(predictions: pd.DataFrame, open_set: dict[str, Any], stem: Path) -> list[Path]:
    """On unseen hosts: is presence as frequent as predicted, do intervals hold, is what is foreign noticed?"""
    kind = next(kind for kind in SPLIT_NAMES if (predictions["split"] == kind).any())
    told = predictions[predictions["split"] == kind]
    with style():
        figure = new_figure(DOUBLE_COLUMN, 2.5)
        presence, coverage, foreign = figure.subplots(1, 3)
        for (model, level), (colour, dashes) in LINES.items():
            look = {"color": colour, "ls": dashes, "marker": "o", "ms": 2.5, "lw": 1}
            named = {"label": name_of(model, level)}
            part = told[told["level"] == level]
            if f"{model}_width" in part and part[model].notna().any():
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
            for which in (coverage.xaxis.set_major_formatter, coverage.xaxis.set_minor_formatter):
                which(LogFormatter(minor_thresholds=(1.5, 0.5)))
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
    """Detection limits: against mass ratio at one noise, vacancies apart; and how many are found at several noises."""
    responses = load_responses(data, Axis("absolute"), ())
    with style():
        figure = new_figure(DOUBLE_COLUMN * 0.75, 2.4)
        by_mass, by_noise = figure.subplots(1, 2)
        found = list(_limits(responses))
        if not found:
            figure.clear()
            figure.text(0.5, 0.5, "No response is known", ha="center")
            return save(figure, stem)
        ratio, alone, among = (np.concatenate(values) for values in zip(*found, strict=True))
        dopants = ratio[ratio > 0]
        lightest, heaviest = dopants.min(initial=1), dopants.max(initial=1)
        vacancy = lightest / 4  # has no place on a logarithmic axis of its own
        ratio = np.where(ratio > 0, ratio, vacancy)
        for limits, colour, label in ((among, BLUE, "among all candidates"), (alone, ORANGE, "alone")):
            shown = np.isfinite(limits)
            by_mass.scatter(ratio[shown], 100 * NOISE * limits[shown], s=5, lw=0, alpha=0.6, color=colour, label=label)
        by_mass.set(xscale="log", yscale="log", xlabel="Mass over that of the replaced element")
        by_mass.set_ylabel(f"Detection limit (at.%), noise {100 * NOISE:g} %")
        ticks = {tick: f"{tick:g}" for tick in (0.1, 0.25, 0.5, 1, 2, 4, 8) if lightest / 1.5 < tick < 1.5 * heaviest}
        if len(dopants) < len(ratio):
            ticks[vacancy] = VACANCY
        by_mass.set_xticks(list(ticks), list(ticks.values()))
        by_mass.xaxis.minorticks_off()
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
