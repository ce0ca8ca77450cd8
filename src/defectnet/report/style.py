"""One look for all figures: sizes, colours, and how a figure is saved."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from defectnet.files import write_atomically

SINGLE_COLUMN, DOUBLE_COLUMN = 89 / 25.4, 183 / 25.4
"""Widths in inches of one and two journal columns (89 and 183 mm)."""

# Okabe & Ito's palette, told apart by all common kinds of colour vision.
BLUE, GREEN, ORANGE, VERMILION = "#0072B2", "#009E73", "#E69F00", "#D55E00"
PURPLE, GREY, BLACK = "#CC79A7", "#8A8A8A", "#1A1A1A"
MODEL_NAMES = {
    "finetuned": "Fine-tuned network",
    "response": "Response network",
    "absolute": "Published, absolute axis",
    "published": "Published network",
    "gls": "Generalised least squares",
    "nnls": "Least squares",
    "nnls_scaled": "Scaled least squares",
    "trees": "Boosted trees",
    "ridge": "Ridge regression",
    "mean": "Training mean",
}
SPLIT_NAMES = {
    "host": "unseen hosts",
    "row": "unseen arrangements, known hosts",
    "configuration": "relaxed spectra of known hosts",
    "element": "unseen dopants",
    "potential": "unseen hosts, other potential",
}
LEVEL_NAMES = {"library": "knows single defects", "mass_only": "knows masses", "none": ""}
"""What models are told beside the spectra, best first."""


def name_of(model: str, level: str) -> str:
    """A model and what it knows."""
    return ", ".join(filter(None, (MODEL_NAMES[model], LEVEL_NAMES[level])))


ENERGY_LABEL = "Energy (meV)"

STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Arial", "Helvetica", "Liberation Sans", "DejaVu Sans"],
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.labelsize": 7,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "legend.fontsize": 6.5,
    "legend.frameon": False,
    "lines.linewidth": 1.0,
    "mathtext.default": "regular",
    "svg.fonttype": "none",
    "svg.hashsalt": "defectnet",
}


@contextmanager
def style() -> Iterator[None]:
    """The figures' Matplotlib settings inside, the caller's again outside."""
    with matplotlib.rc_context(STYLE):
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure in inches, bound to the Agg backend without touching the caller's backend."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def letter(axes: Axes, index: int, left: float = 18) -> None:
    """Bold panel letter above the upper left corner, so many points ``left`` of it."""
    axes.annotate(
        chr(ord("a") + index), (0, 1), xycoords="axes fraction", xytext=(-left, 4), textcoords="offset points",
        fontweight="bold", fontsize=8,
    )  # fmt: skip


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write ``<stem>.png`` (300 dpi) and ``<stem>.svg``, the same bytes for the same figure; returns both paths."""
    paths = []
    # The layout's solver is exact to rounding only, which would show in the names of clip paths.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes in figure.axes:
        axes.set_position(np.round(axes.get_position().bounds, 6))
    for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=suffix[1:], dpi=300, metadata=metadata)
        path = stem.with_name(stem.name + suffix)
        write_atomically(path, buffer.getvalue())
        paths.append(path)
    return paths


def energy_window(density: np.ndarray, edges_meV: np.ndarray) -> tuple[float, float]:
    """Energy range in meV that shows all of some spectra [n, B] and zero, rounded to 5 meV."""
    visible = np.flatnonzero((density > 2e-3 * density.max()).any(axis=0))
    low, high = min(0.0, edges_meV[visible[0]]), edges_meV[visible[-1] + 1]
    return 5 * np.floor(low / 5), 5 * np.ceil(high / 5)


def formula_text(formula: str) -> str:
    """Formula with subscripts for Matplotlib."""
    return re.sub(r"(\d+(?:\.\d+)?)", r"$_{\1}$", formula)
