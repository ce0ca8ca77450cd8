"""The figures of a run. Each function draws one, saves ``<stem>.png`` and ``<stem>.svg`` and returns their paths."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatterSciNotation, MaxNLocator

from defectnet.dataset.schema import FIDELITIES, Dataset
from defectnet.elements import MASSES
from defectnet.phonons.pdos import bin_centers
from defectnet.report.answers import calibration_figure, detection_figure, parity_figure, training_figure
from defectnet.report.examples import attribution_figure, spectra_figure
from defectnet.report.scores import errors_figure, scores_figure, traces_figure
from defectnet.report.style import (
    BLACK,
    BLUE,
    DOUBLE_COLUMN,
    ENERGY_LABEL,
    GREEN,
    GREY,
    ORANGE,
    SINGLE_COLUMN,
    VERMILION,
    energy_window,
    formula_text,
    letter,
    new_figure,
    save,
    style,
)

MAX_HOSTS_SHOWN = 12
MARKERS = "osD^vPX<>*"
UMAP_SEED, UMAP_MAX = 0, 4000
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
    found = json.loads(metrics.read_text())
    scores = found["splits"]
    curves = pd.concat([pd.read_csv(path) for path in histories], ignore_index=True)
    with Dataset(dataset) as data:
        return [
            *hosts_figure(data, output / "hosts"),
            *spectra_figure(data, answers, output / "spectra"),
            *attribution_figure(data, answers, output / "attribution"),
            *scores_figure(scores, output / "scores"),
            *parity_figure(answers, scores, output / "parity"),
            *errors_figure(scores, output / "errors"),
            *traces_figure(scores, output / "traces"),
            *calibration_figure(answers, found["open_set"], output / "calibration"),
            *detection_figure(data, output / "detection"),
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
        window = energy_window(density[shown], data.edges_meV)
        for level, host in enumerate(shown):
            curve = level + 0.88 * density[host] / density[host].max()
            axes.fill_between(centers, level, curve, color=BLUE, alpha=0.25, lw=0)
            axes.plot(centers, curve, color=BLUE, lw=0.8)
            axes.annotate(
                formula_text(data.hosts.formula[hosts[host]]), (1, level), xycoords=("axes fraction", "data"),
                xytext=(3, 0), textcoords="offset points", va="baseline",
            )  # fmt: skip
        axes.set(xlim=window, ylim=(0, len(shown)), xlabel=ENERGY_LABEL, yticks=[])
        axes.set_ylabel("Phonon DOS (arb. units)")
        if len(shown) < len(hosts):
            axes.set_title(f"{len(shown)} of {len(hosts)} hosts", loc="left")
        return save(figure, stem)


def umap_figure(data: Dataset, stem: Path) -> list[Path]:
    """Map of the doped spectra by likeness: colour is the mean mass of the dopants, marker the host.

    At most :data:`UMAP_MAX`, chosen at random.
    """
    rows = data.doped
    if len(rows) > UMAP_MAX:
        rows = np.sort(np.random.default_rng(UMAP_SEED).choice(rows, UMAP_MAX, replace=False))
    places = _embed(data.spectra.pdos[rows])
    share = data.spectra.concentrations[rows]
    mass = share @ MASSES[: share.shape[1]] / share.sum(axis=1)
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
                    [], [], color=GREY, s=18, lw=0, marker=MARKERS[index], label=formula_text(data.hosts.formula[host])
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
        axes.set_xticks(place, [formula_text(data.hosts.formula[host]) for host in hosts], rotation=90)
        axes.tick_params(axis="x", length=0)
    else:
        axes.set_xlabel("Hosts, by error")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _band_edges(density: np.ndarray) -> np.ndarray:
    """Bin number [n] below which 99.5 % of each spectrum [n, B] lie."""
    below = np.cumsum(density, axis=1)
    return (below < 0.995 * below[:, -1:]).sum(axis=1)
