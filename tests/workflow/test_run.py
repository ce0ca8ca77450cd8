"""A complete run: what it leaves behind, and that it is left alone afterwards."""

from __future__ import annotations

import json
from collections import Counter
from itertools import product

import numpy as np
from conftest import campaign

from defectnet.dataset.schema import Dataset
from defectnet.layout import FIGURES
from defectnet.phonons.pdos import share_outside


def test_everything_that_was_promised_is_there(finished):
    with Dataset(finished.results / "dataset.h5") as dataset:
        assert dataset.hosts.id == ["LiF", "MgO", "NaCl"]
        # Of each host two doped cells by finite differences, as few displacements are left in cells this small.
        fidelity = [dataset.spectra.fidelity[row] for row in dataset.doped]
        assert Counter(fidelity) == {"direct": 6, "superposed": 3}
        assert dataset.comparison["host"].tolist() == [0, 1, 2]
        # A spectrum integrates to 1 but for modes off the grid, which unstable cells may have.
        area = dataset.spectra.pdos @ np.diff(dataset.edges_meV)
        outside = [share_outside(dataset.modes(row), dataset.edges_meV) for row in range(len(area))]
        np.testing.assert_allclose(area, 1 - np.array(outside), atol=0.01)
    metrics = json.loads((finished.results / "metrics.json").read_text())
    assert set(metrics["splits"]) == {"host", "row"}
    assert "Unseen hosts" in (finished.results / "summary.html").read_text()
    for name in FIGURES:
        for suffix in ("png", "svg"):
            assert (finished.results / "figures" / f"{name}.{suffix}").stat().st_size > 1000
    for run in product(("published", "response"), ("host", "row"), "0"):
        assert (finished.results / "models" / "-".join(run) / "checkpoint.pt").exists()


def test_every_job_left_log_and_benchmark(finished):
    for rule in ("dopants", "supercells", "library", "relax", "phonons", "superpose"):
        for host in ("LiF", "MgO", "NaCl"):
            assert (finished.results / "logs" / rule / f"{host}.log").exists()
            assert (finished.results / "benchmarks" / rule / f"{host}.tsv").exists()


def test_running_again_does_nothing(finished):
    assert "Nothing to be done" in finished.snakemake()


def test_a_network_is_trained_on_relaxations_alone(tmp_path):
    """Neither force constants of doped cells nor spectra are computed for it."""
    bare = {"force_constants": False, "superposed_per_host": 0}
    run = campaign(tmp_path, "LiF", "MgO", "NaCl", "CaO", superposition=bare, dopants={"n_type": 2, "p_type": 2})
    run.snakemake("--cores", "2", "definet")
    assert {path.name for path in (run.results / "definet").glob("*.*")} >= {
        "checkpoint.pt", "force_calls.csv", "history.csv", "metrics.json", "relaxations.h5",
    }  # fmt: skip
    rows = json.loads((run.results / "definet" / "metrics.json").read_text())["rows"]
    assert {row["split"] for row in rows} == {"dopant", "host"}
    assert any(row.get("force_calls_warm") for row in rows)
    for host in ("LiF", "MgO", "NaCl", "CaO"):
        assert len(run.records("phonons", host)) == 1  # the host's own
    assert run.planned("--cores", "2", "definet") == {}


def test_finished_data_and_networks_are_evaluated_without_hosts_and_training(finished, tmp_path):
    given = {
        "results": "again",
        "dataset": str(finished.results / "dataset.h5"),
        "models": str(finished.results / "models"),
    }
    again = campaign(tmp_path, run=given | {"results": "again"})
    (tmp_path / "hosts.tsv").unlink()
    assert again.planned() == {"evaluate": 1, "figures": 1, "all": 1}
    again.snakemake()
    assert (tmp_path / "again" / "metrics.json").read_text() == (finished.results / "metrics.json").read_text()
    told = again.defectnet("train", "--config", "config.yaml", succeeds=False)
    assert "run.models" in told
    (lost := tmp_path / "lost").mkdir()
    again.values["run"] |= {"models": str(lost), "results": "other"}
    again.write()
    assert str(lost) in again.snakemake(succeeds=False)


def test_report_is_made(finished, tmp_path):
    report = tmp_path / "report.html"
    finished.snakemake("--report", str(report))
    text = report.read_text()
    assert all(name in text for name in FIGURES)
