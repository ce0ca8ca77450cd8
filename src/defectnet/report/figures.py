"""The figures of a run. Each function draws one, saves ``<stem>.png`` and ``<stem>.svg`` and returns their paths."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from ase.data import atomic_masses
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatterSciNotation, MaxNLocator

from defectnet.dataset.schema import FIDELITIES, Dataset
from defectnet.elements import MAX_Z
from defectnet.phonons.pdos import bin_centers
from defectnet.report.style import (
    BLACK,
    BLUE,
    DOUBLE_COLUMN,
    GREEN,
    GREY,
    LEVEL_NAMES,
    MODEL_NAMES,
    ORANGE,
    SINGLE_COLUMN,
    SPLIT_NAMES,
    VERMILION,
    letter,
    new_figure,
    save,
    style,
)

ENERGY_LABEL = "Energy (meV)"
MAX_HOSTS_SHOWN = 12
MARKERS = "osD^vPX<>*"
UMAP_SEED = 0
DOTS_MAX = 20_000
"""Most entries that a panel of predictions shows, chosen at random."""

FIDELITY_COLOURS = dict(zip(FIDELITIES, (BLUE, GREEN, ORANGE, GREY), strict=True))

QUALITY_LABELS = {
    "relax_steps": ("Relaxation steps", False),
    "residual_force_eV_per_A": ("Residual force (eV Å$^{-1}$)", True),
    "imaginary_weight": ("Share of imaginary modes", True),
    "acoustic_residual_eV_per_A2": ("Acoustic-sum residual (eV Å$^{-2}$)", True),
    "probing_error": ("Error of probing (share of doping's change)", True),
    "force_evaluations": ("Force evaluations", True),
}
"""Axis label and whether the axis is logarithmic, of the quality columns that are drawn when present."""


def figures(dataset: Path, metrics: Path, predictions: Path, histories: Sequence[Path], output: Path) -> list[Path]:
    """Draw every figure of a run into the directory ``output``; returns the files written.

    Parameters: the dataset, the two files of ``evaluate``, and the ``history.csv`` of every training.
    """
    answers = pd.read_csv(predictions)
    scores = json.loads(metrics.read_text())["splits"]
    curves = pd.concat([pd.read_csv(path) for path in histories], ignore_index=True)
    with Dataset(dataset) as data:
        return [
            *hosts_figure(data, output / "hosts"),
            *spectra_figure(data, answers, output / "spectra"),
            *parity_figure(answers, scores, output / "parity"),
            *umap_figure(data, output / "umap"),
            *training_figure(curves, output / "training"),
            *quality_figure(data, output / "quality"),
            *fidelity_figure(data, output / "fidelity"),
        ]


def hosts_figure(data: Dataset, stem: Path) -> list[Path]:
    """Pristine densities of states, one line per host, ordered by band edge; at most twelve, evenly picked."""
    rows = data.hosts.pristine
    hosts = np.flatnonzero(rows >= 0)
    density = data.spectra.pdos[rows[hosts]]
    top = _band_edges(density)
    order = np.argsort(top, kind="stable")
    shown = order[np.unique(np.linspace(0, len(order) - 1, min(len(order), MAX_HOSTS_SHOWN)).round().astype(int))]
    with style():
        figure = new_figure(SINGLE_COLUMN, 0.6 + 0.28 * len(shown))
        axes = figure.subplots()
        centers = bin_centers(data.edges_meV)
        window = _window(density[shown], data.edges_meV)
        for level, host in enumerate(shown):
            curve = level + 0.88 * density[host] / density[host].max()
            axes.fill_between(centers, level, curve, color=BLUE, alpha=0.25, lw=0)
            axes.plot(centers, curve, color=BLUE, lw=0.8)
            axes.annotate(
                _formula(data.hosts.formula[hosts[host]]), (1, level), xycoords=("axes fraction", "data"),
                xytext=(3, 0), textcoords="offset points", va="baseline",
            )  # fmt: skip
        axes.set(xlim=window, ylim=(0, len(shown)), xlabel=ENERGY_LABEL, yticks=[])
        axes.set_ylabel("Phonon DOS (arb. units)")
        if len(shown) < len(hosts):
            axes.set_title(f"{len(shown)} of {len(hosts)} hosts", loc="left")
        return save(figure, stem)


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
            left.set(xlim=_window(pair, data.edges_meV), ylabel="DOS (eV$^{-1}$)")
            left.set_ylim(0, 1.15e3 * pair.max())
            left.yaxis.set_major_locator(MaxNLocator(4))
            left.set_title(_formula(data.hosts.formula[host]), loc="left", fontweight="bold")
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


def umap_figure(data: Dataset, stem: Path) -> list[Path]:
    """Map of the doped spectra by likeness: colour is the mean mass of the dopants, marker the host."""
    rows = data.doped
    places = _embed(data.spectra.pdos[rows])
    share = data.spectra.concentrations[rows]
    mass = share @ atomic_masses[1 : MAX_Z + 1] / share.sum(axis=1)
    hosts = np.unique(data.spectra.host[rows])
    distinct = len(hosts) <= len(MARKERS)
    size = float(np.clip(900 / len(rows), 3, 22))
    colours = ScalarMappable(Normalize(mass.min(), mass.max()), "viridis")
    with style():
        figure = new_figure(SINGLE_COLUMN * (1.3 if distinct else 1.1), 2.7)
        axes = figure.subplots()
        for index, host in enumerate(hosts):
            member = data.spectra.host[rows] == host
            axes.scatter(
                *places[member].T, c=colours.to_rgba(mass[member]), s=size, lw=0,
                marker=MARKERS[index] if distinct else "o",
            )  # fmt: skip
            if distinct:
                axes.scatter(
                    [], [], color=GREY, s=18, lw=0, marker=MARKERS[index], label=_formula(data.hosts.formula[host])
                )
        axes.set(xlabel="UMAP 1", ylabel="UMAP 2", xticks=[], yticks=[])
        bar = figure.colorbar(colours, ax=axes, pad=0.02, aspect=30)
        bar.set_label("Mean dopant mass (u)")
        bar.outline.set_visible(False)
        if distinct:
            figure.legend(loc="outside right upper", title="Host", handletextpad=0.2)
        return save(figure, stem)


def _embed(spectra: np.ndarray) -> np.ndarray:
    """Places [n, 2] in the plane; the two principal components when there are too few spectra for neighbourhoods."""
    if len(spectra) < 10:
        centred = spectra - spectra.mean(axis=0)
        left, scale, _ = np.linalg.svd(centred, full_matrices=False)
        return np.pad(left[:, :2] * scale[:2], ((0, 0), (0, max(0, 2 - len(scale)))))
    from umap import UMAP  # compiles for seconds: only when it is needed

    neighbours = min(15, len(spectra) // 3)
    layout = UMAP(n_neighbors=neighbours, min_dist=0.8, spread=2.0, init="pca", random_state=UMAP_SEED, n_jobs=1)
    return layout.fit_transform(spectra)


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


def quality_figure(data: Dataset, stem: Path) -> list[Path]:
    """Distributions of the reported quality numbers, by fidelity; the share of exact zeros is written out."""
    columns = {name: data.spectra.quality[name] for name in QUALITY_LABELS if name in data.spectra.quality}
    columns = {name: values for name, values in columns.items() if np.isfinite(values).any()}
    fidelity = np.array(data.spectra.fidelity)
    kinds = [kind for kind in FIDELITIES if (fidelity == kind).any()]
    across = 2 if len(columns) == 4 else min(3, max(1, len(columns)))
    down = max(1, -(-len(columns) // across))
    with style():
        figure = new_figure(DOUBLE_COLUMN * across / 3, 0.45 + 1.55 * down)
        grid = figure.subplots(down, across, squeeze=False).ravel()
        for axes in grid[len(columns) :]:
            axes.set_axis_off()
        for index, (name, values) in enumerate(columns.items()):
            axes = grid[index]
            label, logarithmic = QUALITY_LABELS[name]
            drawn = np.isfinite(values) & (values > 0) if logarithmic else np.isfinite(values)
            if drawn.any():
                low, high = values[drawn].min(), values[drawn].max()
                if logarithmic:
                    edges = np.geomspace(low / 1.1, high * 1.1, 25)
                    axes.set_xscale("log")
                    axes.xaxis.set_minor_formatter(LogFormatterSciNotation(minor_thresholds=(0.5, 0.2)))
                else:
                    edges = np.linspace(low, high + (high == low), 25)
                parts = [values[drawn & (fidelity == kind)] for kind in kinds]
                axes.hist(
                    parts, edges, stacked=True, color=[FIDELITY_COLOURS[kind] for kind in kinds],
                    label=[kind.replace("_", " ") for kind in kinds],
                )  # fmt: skip
            if logarithmic and (zeros := np.mean(values[np.isfinite(values)] == 0)):
                axes.set_title(f"{100 * zeros:.0f} % are exactly 0", loc="right")
            axes.set(xlabel=label, ylabel="Spectra")
            axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
            letter(axes, index)
        if columns:
            figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(kinds))
        return save(figure, stem)


def fidelity_figure(data: Dataset, stem: Path) -> list[Path]:
    """Errors of superposition and of changing masses only against direct spectra, per host and against total doping;
    errors of the superposed displacements against their size.
    """
    compared, bound = data.comparison, data.provenance["config"]["superposition"]["error_max"]
    kinds = [(kind, 100 * compared[f"{kind}_l1"], FIDELITY_COLOURS[kind]) for kind in ("mass_only", "superposed")]
    with style():
        figure = new_figure(DOUBLE_COLUMN, 2.35)
        if not len(compared["host"]):
            figure.text(0.5, 0.5, "No direct spectrum that superposition could be compared with", ha="center")
            return save(figure, stem)
        by_host, by_doping, moved = figure.subplots(1, 3)
        by_doping.sharey(by_host)
        _errors_by_host(by_host, data, kinds)
        for _, errors, colour in kinds:
            by_doping.scatter(100 * compared["total_doping"], errors, s=9, color=colour, alpha=0.7, lw=0)
        for axes in (by_host, by_doping):
            axes.axhline(100 * bound, color=VERMILION, lw=0.7, ls="--", zorder=0)
        by_host.set_ylim(0, 1.05 * max(100 * bound, *(errors.max() for _, errors, _ in kinds)))
        by_host.set_ylabel("Error (% of what doping changed)")
        by_doping.set(xlim=(0, None), xlabel="Total doping (at.%)")
        by_doping.tick_params(labelleft=False)
        size, error = compared["displacement_mean_A"], compared["displacement_mae_A"]
        most = 1.08 * size.max()
        for share, dashes, name in ((1.0, "-", "the displacement"), (0.1, ":", "10 % of it")):
            moved.plot([0, most], [0, share * most], color=BLACK, lw=0.6, ls=dashes, label=name, zorder=0)
        moved.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0, handlelength=1.3)
        moved.scatter(size, error, s=9, color=FIDELITY_COLOURS["superposed"], alpha=0.7, lw=0)
        moved.set(xlabel="Mean displacement (Å)", ylabel="Error of displacements (Å)")
        if error.max() > 0:  # a dopant at a centre of symmetry may move nothing
            moved.set(xlim=(0, most), ylim=(0, 1.1 * error.max()))
        for axes in (by_doping, moved):
            axes.xaxis.set_major_locator(MaxNLocator(5))
        for index, axes in enumerate((by_host, by_doping, moved)):
            letter(axes, index)
        marks = [Line2D([], [], marker="o", ls="", ms=3, color=colour) for _, _, colour in reversed(kinds)]
        marks.append(Line2D([], [], color=VERMILION, lw=0.7, ls="--"))
        names = ["superposed", "masses only", "bound of superposition"]
        figure.legend(marks, names, loc="outside upper center", ncols=3, handletextpad=0.4)
        return save(figure, stem)


def _errors_by_host(axes: Any, data: Dataset, kinds: Sequence[tuple[str, np.ndarray, str]]) -> None:
    """Every comparison of each host and their median, hosts in ascending order of the superposed median."""
    rows = data.comparison["host"]
    hosts = np.unique(rows)
    medians = {kind: np.array([np.median(errors[rows == host]) for host in hosts]) for kind, errors, _ in kinds}
    order = np.argsort(medians["superposed"], kind="stable")
    place = np.argsort(order)
    for kind, errors, colour in kinds:
        axes.scatter(place[np.searchsorted(hosts, rows)], errors, s=9, color=colour, alpha=0.5, lw=0)
        axes.hlines(medians[kind], place - 0.35, place + 0.35, color=colour, lw=1.4)
    axes.set_xlim(-0.6, len(hosts) - 0.4)
    if len(hosts) <= MAX_HOSTS_SHOWN:
        axes.set_xticks(place, [_formula(data.hosts.formula[host]) for host in hosts], rotation=90)
        axes.tick_params(axis="x", length=0)
    else:
        axes.set_xlabel("Hosts, by error")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _band_edges(density: np.ndarray) -> np.ndarray:
    """Bin number [n] below which 99.5 % of each spectrum [n, B] lie."""
    below = np.cumsum(density, axis=1)
    return (below < 0.995 * below[:, -1:]).sum(axis=1)


def _window(density: np.ndarray, edges_meV: np.ndarray) -> tuple[float, float]:
    """Energy range in meV that shows all of some spectra [n, B] and zero, rounded to 5 meV."""
    visible = np.flatnonzero((density > 2e-3 * density.max()).any(axis=0))
    low, high = min(0.0, edges_meV[visible[0]]), edges_meV[visible[-1] + 1]
    return 5 * np.floor(low / 5), 5 * np.ceil(high / 5)


def _formula(formula: str) -> str:
    """Formula with subscripts for Matplotlib."""
    return re.sub(r"(\d+(?:\.\d+)?)", r"$_{\1}$", formula)
