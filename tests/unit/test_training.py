"""Training, evaluation and use: reproducible, resumable, honest about what was held out."""

import json
import logging
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from synthetic import host_entry, make_dataset, make_dataset_with_responses, spectra

from defectnet.config import Spectra, Training
from defectnet.dataset.samples import Axis, load_samples
from defectnet.dataset.schema import Dataset
from defectnet.dataset.splits import split
from defectnet.elements import element_amounts
from defectnet.errors import InputError, RecordError
from defectnet.models.baselines import BASELINES
from defectnet.models.defectnet import count_parameters
from defectnet.models.response import LEVELS
from defectnet.training import fit
from defectnet.training.evaluate import evaluate
from defectnet.training.metrics import metrics

FORMULAS = ["Si", "Ge", "GaAs", "MgO", "NaCl"]
SETTINGS = Training(epochs=4, batch_size=8, learning_rate=1e-3)
SEED = 7


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("training") / "dataset.h5"
    make_dataset(path, FORMULAS, 6)
    return path


@pytest.fixture(scope="module")
def runs(dataset):
    """Run directories: three host splits and one row split."""
    plan = [("host", 0), ("host", 1), ("host", 2), ("row", 0)]
    directories = [dataset.parent / f"{kind}-{repeat}" for kind, repeat in plan]
    for (kind, repeat), directory in zip(plan, directories, strict=True):
        fit.train(dataset, SETTINGS, "published", kind, repeat, SEED, directory)
    return directories


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_run_directory(dataset, runs):
    assert set(contents(runs[0])) == {"checkpoint.pt", "history.csv", "split.json"}
    history = pd.read_csv(runs[0] / "history.csv")
    assert tuple(history.columns) == fit.HISTORY_COLUMNS
    assert list(history["epoch"]) == [1, 2, 3, 4]
    checkpoint = fit.load_checkpoint(runs[0] / "checkpoint.pt")
    best = history.loc[history["validation_rmse_at_percent"].idxmin()]
    assert checkpoint.about["best_epochs"] == [best["epoch"]]
    assert checkpoint.about["validation_rmse_at_percent"] == pytest.approx([best["validation_rmse_at_percent"]])
    assert checkpoint.about["potentials"] == ["springs"]
    assert checkpoint.axis == Axis("host", 100, 0.0)
    (model,) = checkpoint.models
    assert count_parameters(model) == 238_456
    assert not model.training
    content = torch.load(runs[0] / "checkpoint.pt", weights_only=True)
    assert isinstance(content["vocabulary"], list)


def test_split_file_never_leaks(dataset, runs):
    tested = []
    for directory in runs[:3]:
        parts = json.loads((directory / "split.json").read_text())
        hosts = [set(parts[name]["hosts"]) for name in ("train", "validation", "test")]
        assert sum(map(len, hosts)) == len(set.union(*hosts)) == len(FORMULAS)
        tested += parts["test"]["hosts"]
    assert len(set(tested)) == 3


def test_training_is_deterministic(dataset, runs, tmp_path):
    fit.train(dataset, SETTINGS, "published", "host", 0, SEED, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(runs[0])
    assert contents(runs[1])["checkpoint.pt"] != contents(runs[0])["checkpoint.pt"]


def test_training_leaves_the_callers_torch_alone(dataset, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    fit.train(dataset, SETTINGS.model_copy(update={"epochs": 1}), "published", "host", 0, SEED, tmp_path)
    assert torch.equal(torch.rand(1), expected)
    assert not torch.are_deterministic_algorithms_enabled()


def interrupted(dataset, output, monkeypatch, settings=SETTINGS, after=2):
    """Train until a kill in the epoch after ``after``."""
    monkeypatch.setattr(fit, "SAVE_INTERVAL_s", 0.0)
    sound, calls = fit.DefectNet.predict, []

    def killed(self, samples):
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return sound(self, samples)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fit.DefectNet, "predict", killed)
        fit.train(dataset, settings, "published", "host", 0, SEED, output)
    assert set(contents(output)) == {"member-0.pt"}


def test_resumed_equals_uninterrupted_bit_for_bit(dataset, runs, tmp_path, monkeypatch, caplog):
    interrupted(dataset, tmp_path, monkeypatch)
    with caplog.at_level(logging.INFO):
        fit.train(dataset, SETTINGS, "published", "host", 0, SEED, tmp_path)
    assert "continuing after epoch 2 of 4" in caplog.text
    assert contents(tmp_path) == contents(runs[0])


def test_a_response_network_is_resumed(tmp_path, monkeypatch, caplog):
    make_dataset_with_responses(tmp_path / "d.h5", FORMULAS[:3], 4)
    arguments = tmp_path / "d.h5", Training(epochs=3), "response", "host", 0, SEED
    fit.train(*arguments, tmp_path / "whole")
    monkeypatch.setattr(fit, "SAVE_INTERVAL_s", 0.0)
    sound, calls = fit._validated, []

    def killed(recipe):
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return sound(recipe)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fit, "_validated", killed)
        fit.train(*arguments, tmp_path / "killed")
    with caplog.at_level(logging.INFO):
        fit.train(*arguments, tmp_path / "killed")
    assert "continuing after epoch 2 of 3" in caplog.text
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_state_of_other_settings_or_damaged_is_not_resumed(dataset, runs, tmp_path, monkeypatch, caplog):
    other = SETTINGS.model_copy(update={"learning_rate": 5e-3})
    interrupted(dataset, tmp_path, monkeypatch, settings=other)
    fit.train(dataset, SETTINGS, "published", "host", 0, SEED, tmp_path)
    assert "other data or settings" in caplog.text
    assert contents(tmp_path) == contents(runs[0])
    (tmp_path / "member-0.pt").write_bytes(b"PK\x03\x04 half a file")
    fit.train(dataset, SETTINGS, "published", "host", 0, SEED, tmp_path)
    assert "not a readable checkpoint" in caplog.text
    assert contents(tmp_path) == contents(runs[0])


@pytest.mark.parametrize("name", ["published", "response"])
def test_finetuning_starts_from_a_trained_network(name, tmp_path):
    formulas = FORMULAS[:4]
    make_dataset_with_responses(tmp_path / "d.h5", formulas, 6)
    path = fit.train(tmp_path / "d.h5", Training(epochs=3), name, "host", 0, SEED, tmp_path / "first")
    base = fit.load_checkpoint(path)
    frozen = "encoder" if name == "published" else "corrector"
    settings = Training(epochs=2, pretrained=str(path), frozen=[frozen])
    tuned = fit.load_checkpoint(
        fit.train(tmp_path / "d.h5", settings, "finetuned", "host", 0, SEED, tmp_path / "second")
    )
    assert (tuned.network, tuned.axis) == (base.network, base.axis)
    assert tuned.about["pretrained"] == base.about
    # On the data that the network was trained on, what it was is the bar: in validation nothing gets worse.
    before, after = (one.about["validation_rmse_at_percent"][0] for one in (base, tuned))
    assert after <= before + 1e-9
    moved = {
        name.split(".")[0]
        for (name, one), other in zip(
            base.models[0].state_dict().items(), tuned.models[0].state_dict().values(), strict=True
        )
        if not torch.equal(one, other)
    }
    assert frozen not in moved
    assert bool(moved) == (tuned.about["best_epochs"] != [0])


def test_finetuning_that_cannot_start_is_refused(dataset, runs, tmp_path):
    path = runs[0] / "checkpoint.pt"
    for frozen, message in ((["judge"], "no part judge; it has encoder"), (["encoder", "query", "attention", "head"],
                                                                           "nothing is left to train")):  # fmt: skip
        settings = SETTINGS.model_copy(update={"pretrained": str(path), "frozen": frozen})
        with pytest.raises(InputError, match=message):
            fit.train(dataset, settings, "finetuned", "host", 0, SEED, tmp_path)
    with pytest.raises(InputError, match=r"gone.pt: no such checkpoint"):
        fit.train(dataset, Training(pretrained="gone.pt"), "finetuned", "host", 0, SEED, tmp_path)
    absolute = fit.train(dataset, SETTINGS, "absolute", "host", 0, SEED, tmp_path / "absolute")
    make_dataset(tmp_path / "other.h5", FORMULAS, 3, settings=Spectra(energy_max_meV=100))
    with pytest.raises(InputError, match=r"the network knows -20 to 120 meV .* has -20 to 100 meV"):
        fit.train(
            tmp_path / "other.h5", Training(pretrained=str(absolute)), "finetuned", "host", 0, SEED, tmp_path / "o"
        )


def test_divergence_is_an_error(dataset, tmp_path):
    with pytest.raises(InputError, match=r"diverged.*learning_rate"):
        fit.train(dataset, SETTINGS.model_copy(update={"learning_rate": 1e30}), "published", "host", 0, SEED, tmp_path)


def test_damaged_checkpoints_are_refused(runs, tmp_path):
    damaged = tmp_path / "checkpoint.pt"
    content = (runs[0] / "checkpoint.pt").read_bytes()
    for share in (0.0, 0.5):
        damaged.write_bytes(content[: int(share * len(content))])
        with pytest.raises(RecordError, match=r"checkpoint\.pt: not a readable checkpoint.*rerun"):
            fit.load_checkpoint(damaged)
    for foreign in ({"weights": torch.zeros(3)}, [1, 2]):
        torch.save(foreign, damaged)
        with pytest.raises(RecordError, match="not a checkpoint of this version"):
            fit.load_checkpoint(damaged)
    torch.save(fit.load_checkpoint(runs[0] / "checkpoint.pt").models[0], damaged)  # a pickle that could run code
    with pytest.raises(RecordError, match="neither tensors nor plain values"):
        fit.load_checkpoint(damaged)
    with pytest.raises(InputError, match="no such checkpoint"):
        fit.load_checkpoint(tmp_path / "absent.pt")


# Evaluation


@pytest.fixture(scope="module")
def evaluated(dataset, runs):
    metrics, predictions = dataset.parent / "metrics.json", dataset.parent / "predictions.csv.gz"
    evaluate(dataset, [run / "checkpoint.pt" for run in runs], metrics, predictions)
    return metrics, predictions


def test_predictions_cover_the_test_parts(dataset, runs, evaluated):
    table = pd.read_csv(evaluated[1])
    with Dataset(dataset) as data:
        for directory in runs:
            kind, repeat = directory.name.split("-")
            part = table[(table["split"] == kind) & (table["repeat"] == int(repeat))]
            split = json.loads((directory / "split.json").read_text())
            assert set(part["spectrum"]) == set(split["test"]["spectra"])
        for _, row in table.iterrows():  # the mask is the full candidate list, and the truth is the dataset's
            host, spectrum = data.hosts.id.index(row["host"]), data.spectra.id.index(row["spectrum"])
            assert row["replaces"] == data.hosts.replaces[host][row["element"]]
            assert row["formula"] == data.hosts.formula[host]
            assert row["fidelity"] == data.spectra.fidelity[spectrum]
            concentrations = element_amounts(data.spectra.concentrations[spectrum])
            assert row["true"] == pytest.approx(concentrations.get(row["element"], 0.0), rel=1e-5)
        counts = table.groupby(["split", "repeat", "level", "spectrum", "host"]).size().reset_index(name="n")
        for _, row in counts.iterrows():
            assert row["n"] == len(data.hosts.replaces[data.hosts.id.index(row["host"])])
    host_split = table[table["split"] == "host"]
    constant = host_split.groupby("repeat")["mean"].nunique()
    assert (constant == 1).all()


def test_models_answer_once_at_each_level_where_answers_differ(evaluated):
    table = pd.read_csv(evaluated[1])
    levels = {model: set(table["level"][table[model].notna()]) for model in ("published", *BASELINES) if model in table}
    once = {model: {"none"} for model in ("published", "trees", "ridge", "mean")}
    assert levels == {**once, "nnls": {"mass_only"}, "nnls_scaled": {"mass_only"}}  # there are no single defects


def test_elements_of_the_training_part_are_told(dataset, runs, evaluated):
    table = pd.read_csv(evaluated[1])
    with Dataset(dataset) as data:
        for directory in runs:
            kind, repeat = directory.name.split("-")
            part = table[(table["split"] == kind) & (table["repeat"] == int(repeat))]
            names = json.loads((directory / "split.json").read_text())["train"]["spectra"]
            present = [data.spectra.concentrations[data.spectra.id.index(name)] for name in names]
            seen = set(element_amounts(np.max(present, axis=0)))
            assert set(part["element"][part["seen"]]) == set(part["element"]) & seen


def test_baselines_are_not_asked_about_unseen_elements_in_training(dataset, runs, tmp_path, monkeypatch):
    """Of an element split, here made by hand, baselines must not learn that unseen elements are always absent."""
    with Dataset(dataset) as data:
        samples = load_samples(data, Axis("absolute"))
        parts = split(samples.host, "element", 0.1, 0.2, SEED, targets=samples.targets)
    content = torch.load(runs[0] / "checkpoint.pt", weights_only=True)
    content["about"]["split"] = "element"
    for name, rows in vars(parts).items():
        content["parts"][rows] = fit.PARTS.index(name)
    torch.save(content, tmp_path / "checkpoint.pt")
    asked = []

    class Watch(BASELINES["mean"]):
        def __init__(self, training, responses):
            asked.append(training.candidates)
            super().__init__(training, responses)

    monkeypatch.setitem(BASELINES, "mean", Watch)
    evaluate(dataset, [tmp_path / "checkpoint.pt"], tmp_path / "m.json", tmp_path / "p.csv.gz")
    unseen = ~(samples.targets[parts.train] > 0).any(axis=0)
    assert samples.candidates[parts.train][:, unseen].any()
    assert not asked[0][:, unseen].any()
    subsets = json.loads((tmp_path / "m.json").read_text())["splits"]["element"]["mean"]["none"]["subsets"]["element"]
    assert subsets["unseen"]["n_present"] >= len(parts.test)


def test_metrics_are_deterministic_and_pooled(dataset, runs, evaluated, tmp_path):
    evaluate(dataset, [run / "checkpoint.pt" for run in runs], tmp_path / "m.json", tmp_path / "p.csv.gz")
    assert (tmp_path / "m.json").read_bytes() == evaluated[0].read_bytes()
    assert (tmp_path / "p.csv.gz").read_bytes() == evaluated[1].read_bytes()
    found = json.loads(evaluated[0].read_text())
    assert found["parameters"] == {"published": 238_456}
    assert set(found["splits"]) == {"host", "row"}
    for models in found["splits"].values():
        assert set(models) == {"published", *BASELINES} - {"gls"}  # which needs single defects
        for pooled in (scores for levels in models.values() for scores in levels.values()):
            parts = pooled["subsets"]["fidelity"].values()
            assert sum(part["n"] for part in parts) == pooled["n"]
            squares = sum(part["rmse_at"] ** 2 * part["n"] for part in parts)
            assert squares == pytest.approx(pooled["rmse_at"] ** 2 * pooled["n"])
    pooled = found["splits"]["host"]["published"]["none"]
    assert pooled["n_hosts"] == 3
    low, high = pooled["intervals"]["rmse_at"]
    assert low <= pooled["rmse_at"] <= high


def test_network_that_knows_responses(tmp_path):
    """Its presence and intervals are scored at each level, beside least squares that knows the same responses."""
    formulas = FORMULAS[:3]
    make_dataset_with_responses(tmp_path / "d.h5", formulas, 4)
    fit.train(tmp_path / "d.h5", Training(epochs=1), "response", "host", 0, SEED, tmp_path)
    fit.train(tmp_path / "d.h5", Training(epochs=1), "published", "host", 0, SEED, tmp_path / "other")
    evaluate(
        tmp_path / "d.h5",
        [run / "checkpoint.pt" for run in (tmp_path, tmp_path / "other")],
        tmp_path / "m.json",
        tmp_path / "p.csv.gz",
    )
    scores = json.loads((tmp_path / "m.json").read_text())["splits"]["host"]
    assert {level: scores["response"][level]["n"] for level in LEVELS} == dict.fromkeys(
        LEVELS, scores["mean"]["none"]["n"]
    )
    table = pd.read_csv(tmp_path / "p.csv.gz")
    assert table["response_presence"].between(0, 1).all()
    assert table["published"].notna().equals(table["level"] == "none")
    for level in LEVELS:
        part = table[table["level"] == level]
        covered = (part["response"] - part["true"]).abs() <= part["response_width"]
        assert scores["response"][level]["coverage_90"] == pytest.approx(covered.mean())
    assert scores["nnls"]["library"]["coverage_90"] is None
    suspected = json.loads((tmp_path / "m.json").read_text())["open_set"]["host"]
    assert set(suspected) == {"nnls", "response"} and set(suspected["response"]) == set(LEVELS)
    n_spectra = table["spectrum"].nunique()
    assert all(one["n"] == 2 * n_spectra for levels in suspected.values() for one in levels.values())
    # Three crystals with other bands: what doping changed looks like none of another host's.
    strangers = json.loads((tmp_path / "m.json").read_text())["wrong_host_auroc"]["host"]
    assert set(strangers) == {"nnls", "response"} and set(strangers["response"]) == set(LEVELS)
    assert strangers["nnls"]["library"]["all"] > 0.9
    # The library is that of the very crystals, with one atom in eight replaced.
    assert scores["nnls"]["library"]["rmse_at"] < scores["mean"]["none"]["rmse_at"]


def test_metrics_follow_from_the_predictions(evaluated):
    scores = json.loads(evaluated[0].read_text())["splits"]
    again = metrics(pd.read_csv(evaluated[1]), list(scores["host"]))
    for split_kind, models in scores.items():
        for model, levels in models.items():
            for level, found in levels.items():
                assert again[split_kind][model][level]["rmse_at"] == pytest.approx(found["rmse_at"], rel=1e-4)


def softened(formulas, per_host, potential="soft springs"):
    """The crystals of the dataset with frequencies 10 % lower, said to be by another potential."""
    for entry in spectra(formulas, per_host, 1):
        modes = replace(entry.modes, energies_meV=0.9 * entry.modes.energies_meV)
        yield replace(entry, modes=modes, potential=potential)


def test_spectra_by_another_potential(dataset, runs, evaluated, tmp_path):
    """The networks of the host split are asked about their own test hosts, with the same hosts' candidates."""
    known = [*reversed(FORMULAS[1:]), "AgBr"]  # in another order, one lacking, one more
    make_dataset(tmp_path / "soft.h5", known, 3, spectra=softened(known, 3), comparisons={})
    checkpoints = [run / "checkpoint.pt" for run in runs]
    evaluate(dataset, checkpoints, tmp_path / "m.json", tmp_path / "p.csv.gz", tmp_path / "soft.h5")
    table = pd.read_csv(tmp_path / "p.csv.gz")
    again, own = table[table["split"] == "potential"], table[table["split"] == "host"]
    for repeat, part in again.groupby("repeat"):
        assert set(part["host"]) == set(own["host"][own["repeat"] == repeat]) - {f"host-{FORMULAS[0]}"}
    with Dataset(tmp_path / "soft.h5") as data:
        for _, row in again.iterrows():
            true = data.spectra.concentrations[data.spectra.id.index(row["spectrum"])]
            assert row["true"] == pytest.approx(element_amounts(true).get(row["element"], 0.0), rel=1e-5)
    before, after = (json.loads(path.read_text())["splits"] for path in (evaluated[0], tmp_path / "m.json"))
    scores = after.pop("potential")
    assert after == before
    assert scores["published"]["none"]["n"] == len(again[again["level"] == "none"])
    # Undoped and doped spectrum soften alike, and the mean does not look at them.
    same = own[own["level"] == "none"].merge(again, on=["repeat", "level", "spectrum", "element"])
    assert len(same) and (same["mean_x"] == same["mean_y"]).all() and (same["ridge_x"] != same["ridge_y"]).any()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"spectra": softened(FORMULAS, 1, "springs")}, "is by springs, as is"),
        ({"settings": Spectra(energy_max_meV=130.0)}, "another energy grid"),
        ({"hosts": [replace(host_entry(name), candidates={"Zr": "Mg"}) for name in FORMULAS]}, "other candidates"),
    ],
)
def test_other_potential_that_cannot_be_compared(dataset, runs, tmp_path, changes, says):
    made = {"spectra": softened(FORMULAS, 0 if "hosts" in changes else 1), "comparisons": {}} | changes
    if "hosts" in changes:
        pristine = list(made["spectra"])
        doped = [
            replace(one, id=f"{one.id}-Zr", role="doped", concentrations={"Zr": 0.125}, fidelity="direct")
            for one in pristine
        ]
        made["spectra"] = pristine + doped
    make_dataset(tmp_path / "soft.h5", FORMULAS, 1, **made)
    files = tmp_path / "m.json", tmp_path / "p.csv.gz"
    with pytest.raises(InputError, match=says):
        evaluate(dataset, [runs[0] / "checkpoint.pt"], *files, tmp_path / "soft.h5")


def test_networks_of_another_dataset_are_refused(runs, tmp_path):
    make_dataset(tmp_path / "other.h5", FORMULAS, 5)
    with pytest.raises(RecordError, match="trained on another dataset"):
        evaluate(
            tmp_path / "other.h5", [run / "checkpoint.pt" for run in runs], tmp_path / "m.json", tmp_path / "p.csv.gz"
        )
