"""Figures: every one is drawn, whatever the size of the run, and drawn the same twice."""

import json
import xml.etree.ElementTree as ElementTree
from itertools import chain

import matplotlib
import numpy as np
import pandas as pd
import pytest
from synthetic import comparisons, make_dataset, responses, spectra

from defectnet.config import Training
from defectnet.dataset.schema import Dataset
from defectnet.layout import FIGURES
from defectnet.report import answers, examples
from defectnet.report import figures as report
from defectnet.report.style import SPLIT_NAMES, formula_text, name_of, style
from defectnet.report.summary import limits, write_summary
from defectnet.training.evaluate import evaluate
from defectnet.training.fit import train

NAMES = [
    "hosts", "spectra", "attribution", "scores", "parity", "errors", "traces", "calibration", "detection", "umap",
    "training", "quality", "fidelity",
]  # fmt: skip


def run(directory, formulas, per_host, plan, preset="published", **changes):
    """A whole small run: dataset, networks, metrics."""
    dataset = directory / "dataset.h5"
    make_dataset(dataset, formulas, per_host, **changes)
    models = [directory / f"{kind}-{repeat}" for kind, repeat in plan]
    for (kind, repeat), model in zip(plan, models, strict=True):
        train(dataset, Training(epochs=2), preset, kind, repeat, 0, model)
    evaluate(
        dataset,
        [model / "checkpoint.pt" for model in models],
        directory / "metrics.json",
        directory / "predictions.csv.gz",
    )
    histories = [model / "history.csv" for model in models]
    return dataset, directory / "metrics.json", directory / "predictions.csv.gz", histories


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Eight spectra of four hosts: too few for UMAP, one test spectrum or two."""
    return run(tmp_path_factory.mktemp("report"), ["Si", "GaAs", "MgO", "NaCl"], 2, [("host", 0), ("row", 0)])


def assert_drawn(paths):
    for path in paths:
        content = path.read_bytes()
        if path.suffix == ".png":
            assert content.startswith(b"\x89PNG")
        else:
            assert ElementTree.fromstring(content).tag.endswith("svg")


def test_all_figures_of_a_small_run(small, tmp_path):
    before = dict(matplotlib.rcParams)
    paths = report.figures(*small, tmp_path / "figures")
    assert [path.name for path in paths] == [f"{name}.{suffix}" for name in NAMES for suffix in ("png", "svg")]
    assert_drawn(paths)
    assert dict(matplotlib.rcParams) == before
    again = report.figures(*small, tmp_path / "again")
    for first, second in zip(paths, again, strict=True):
        assert first.read_bytes() == second.read_bytes(), first.name


@pytest.mark.slow
def test_all_figures_of_a_network_that_knows_responses(tmp_path):
    formulas = ["Si", "GaAs", "MgO", "NaCl"]
    made = chain(spectra(formulas, 9, 1), responses(formulas, 1))
    files = run(tmp_path, formulas, 9, [("host", 0)], "response", spectra=made)
    paths = report.figures(*files, tmp_path / "figures")
    assert {path.stem for path in paths} == set(NAMES)
    assert_drawn(paths)


def test_summary_tells_the_scores(small, tmp_path):
    scores = json.loads(small[1].read_text())["splits"]
    write_summary(scores, tmp_path / "summary.html")
    page = (tmp_path / "summary.html").read_text()
    for kind, models in scores.items():
        assert SPLIT_NAMES[kind].capitalize() in page
        for model, levels in models.items():
            for level, score in levels.items():
                cells = f"<td>{score['rmse_at']:.2f}</td>\n<td>{score['mae_at']:.2f}</td>"
                assert f"<tr><td>{name_of(model, level)}</td>\n{cells}" in page
    told = list(limits(scores))
    assert f"{scores['host']['published']['none']['rmse_at']:.2f}" in told[0]
    assert f"{scores['host']['mean']['none']['rmse_at']:.2f}" in told[0]
    assert any(SPLIT_NAMES["row"] in sentence for sentence in told)
    assert list(limits({"host": scores["host"]})) == [one for one in told if SPLIT_NAMES["row"] not in one]


def test_umap_figure(tmp_path):
    make_dataset(tmp_path / "dataset.h5", ["Si", "GaAs", "MgO"], 8)
    with Dataset(tmp_path / "dataset.h5") as data:
        places = report._embed(data.spectra.pdos[data.doped])
        assert places.shape == (24, 2)
        np.testing.assert_array_equal(places, report._embed(data.spectra.pdos[data.doped]))
        assert_drawn(report.umap_figure(data, tmp_path / "umap"))


@pytest.mark.parametrize("n", [1, 2, 9])
def test_few_spectra_are_placed_by_principal_components(n):
    spectra = np.random.default_rng(0).random((n, 30))
    places = report._embed(spectra)
    assert places.shape == (n, 2)
    kept = np.linalg.norm(places[:, None] - places[None], axis=-1)
    true = np.linalg.norm(spectra[:, None] - spectra[None], axis=-1)
    assert (kept <= true + 1e-9).all()


def test_one_host_split_alone(small, tmp_path):
    predictions = pd.read_csv(small[2])
    scores = json.loads(small[1].read_text())["splits"]
    only = predictions[predictions["split"] == "row"]
    with Dataset(small[0]) as data:
        assert_drawn(examples.spectra_figure(data, only, tmp_path / "spectra"))
    assert_drawn(answers.parity_figure(only, {"row": scores["row"]}, tmp_path / "parity"))
    history = pd.read_csv(small[3][1])
    assert_drawn(answers.training_figure(history, tmp_path / "training"))


def test_quality_without_any_column(tmp_path):
    make_dataset(tmp_path / "dataset.h5", ["Si"], 0)
    with Dataset(tmp_path / "dataset.h5") as data:
        data.spectra.quality.clear()
        assert_drawn(report.quality_figure(data, tmp_path / "quality"))


def test_every_figure_of_the_layout_is_drawn():
    assert set(NAMES) == set(FIGURES)


@pytest.mark.parametrize("per_host", [0, 1, 3], ids=["nothing compared", "one", "several"])
def test_fidelity_figure(tmp_path, per_host):
    formulas = ["Si", "MgO"]
    compared = comparisons(formulas, per_host) if per_host else None
    make_dataset(tmp_path / "dataset.h5", formulas, 0, comparisons=compared)
    with Dataset(tmp_path / "dataset.h5") as data:
        assert_drawn(report.fidelity_figure(data, tmp_path / "fidelity"))


def test_formula_subscripts():
    assert formula_text("Si0.9Ge0.1") == "Si$_{0.9}$Ge$_{0.1}$"
    assert formula_text("MgB2") == "MgB$_{2}$"


def test_style_is_local():
    with style():
        assert matplotlib.rcParams["font.size"] == 7
    assert matplotlib.rcParams["font.size"] != 7
