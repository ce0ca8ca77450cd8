"""Scores: by hand, at their limits, and against scikit-learn; intervals that resample hosts; subsets."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import average_precision_score, r2_score, roc_auc_score

from defectnet.training.metrics import metrics, nominal, open_set, score, wrong_host_auroc


def scored(true, predicted, presence=None, host=None):
    true, predicted = np.array(true, float), np.array(predicted, float)
    presence = predicted if presence is None else np.array(presence, float)
    return score(true, predicted, presence, np.zeros(len(true)) if host is None else np.array(host))


def test_by_hand():
    found = scored([0, 0, 0, 0, 0.02, 0.04], [0, 0.001, 0.005, 0.03, 0.02, 0.04])
    assert found["rmse_at"] == pytest.approx(100 * np.sqrt((0.001**2 + 0.005**2 + 0.03**2) / 6))
    assert found["mae_at"] == pytest.approx(100 * 0.036 / 6)
    assert found["auroc"] == pytest.approx(7 / 8)
    assert found["fpr_at_90_recall"] == 0.25
    assert found["intervals"] is None
    assert found["coverage_90"] is None
    assert (found["n"], found["n_present"], found["n_hosts"]) == (6, 2, 1)


@pytest.mark.parametrize("decimals", [1, 9], ids=["many ties", "no ties"])
def test_agrees_with_scikit_learn(decimals):
    rng = np.random.default_rng(0)
    true = np.where(rng.random(500) < 0.3, rng.uniform(0.002, 0.1, 500), 0)
    predicted = np.abs(true + rng.normal(0, 0.03, 500))
    presence = np.round(true + rng.normal(0, 0.4, 500) ** 2, decimals)
    found = scored(true, predicted, presence)
    assert found["r2"] == pytest.approx(r2_score(true, predicted))
    assert found["auroc"] == pytest.approx(roc_auc_score(true > 0, presence))
    assert found["average_precision"] == pytest.approx(average_precision_score(true > 0, presence))
    threshold = np.quantile(presence[true > 0], 0.1, method="lower")
    assert found["fpr_at_90_recall"] == pytest.approx(np.mean(presence[true == 0] >= threshold))


HOSTS = np.repeat(np.arange(5), 20)


def test_perfect_predictor():
    true = np.where(np.arange(100) % 3, 0, 0.001 * np.arange(100) + 0.002)
    found = scored(true, true, host=HOSTS)
    best = {"rmse_at": 0, "mae_at": 0, "r2": 1, "auroc": 1, "average_precision": 1, "fpr_at_90_recall": 0}
    assert {name: found[name] for name in best} == pytest.approx(best)
    for name, value in best.items():
        assert found["intervals"][name] == pytest.approx([value, value], abs=0.02)


def test_constant_predictor():
    true = np.where(np.arange(100) % 4, 0, 0.04)
    found = scored(true, np.full(100, true.mean()), host=HOSTS)
    assert found["rmse_at"] == pytest.approx(100 * true.std())
    assert found["r2"] == pytest.approx(0, abs=1e-12)
    assert found["auroc"] == 0.5
    assert found["average_precision"] == 0.25
    assert found["fpr_at_90_recall"] == 1


def test_one_class_only():
    found = scored([0.01, 0.01], [0.02, 0.0])
    assert found["auroc"] is found["average_precision"] is found["fpr_at_90_recall"] is found["r2"] is None
    assert found["rmse_at"] == pytest.approx(1)


def test_intervals_resample_hosts():
    """One bad host of three: the interval must reach from no error to its error, however many entries it has."""
    host = np.repeat([0, 1, 2], 50)
    found = scored(np.where(host == 2, 0.1, 0), np.zeros(150), host=host)
    low, high = found["intervals"]["rmse_at"]
    assert low == 0
    assert high > 8
    shuffled = np.random.default_rng(0).permutation(150)
    again = scored(np.where(host == 2, 0.1, 0)[shuffled], np.zeros(150), host=host[shuffled])
    assert again["intervals"]["rmse_at"] == pytest.approx([low, high])


def test_intervals_cover_the_estimates():
    """The coarse ranks of the intervals are fine enough: equal hosts leave only the estimate itself."""
    rng = np.random.default_rng(1)
    true = np.where(rng.random(3000) < 0.3, rng.uniform(0.002, 0.1, 3000), 0)
    predicted = true + rng.normal(0, 0.05, 3000)
    found = scored(np.tile(true, 4), np.tile(predicted, 4), host=np.repeat(np.arange(4), 3000))
    for name, (low, high) in found["intervals"].items():
        assert low == pytest.approx(high)
        assert low == pytest.approx(found[name], abs=0.01)


ENTRIES = [
    # spectrum, fidelity, displacement_max_A, element, replaces, seen, true
    ("a", "direct", 0.1, "Ge", "Si", True, 0.003),
    ("a", "direct", 0.1, "C", "Si", True, 0.0),
    ("b", "probed", 0.7, "Ge", "Si", True, 0.01),
    ("b", "probed", 0.7, "C", "Si", True, 0.06),
    ("c", "superposed", np.nan, "Al", "Mg, O", False, 0.03),
    ("c", "superposed", np.nan, "S", "O", True, 0.0),
]


def table(**columns):
    names = ("spectrum", "fidelity", "displacement_max_A", "element", "replaces", "seen", "true")
    rows = pd.DataFrame(ENTRIES, columns=names)
    return rows.assign(split="host", repeat=0, level="none", host=rows["spectrum"], **columns)


def test_subsets():
    found = metrics(table(m=np.zeros(6)), ["m"])["host"]["m"]["none"]
    counts = {name: {kind: scores["n"] for kind, scores in parts.items()} for name, parts in found["subsets"].items()}
    assert counts == {
        "fidelity": {"direct": 4, "superposed": 2},
        "displacement_max_A": {"<0.5": 2, ">=0.5": 2},
        "total_doping_at": {"<=5": 4, ">5": 2},
        "species": {"1": 4, "2": 2},
        "element": {"seen": 5, "unseen": 1},
        # C on Si 0.43, Al on Mg and O 1.34, S on O 2.0 (32.06 / 15.999), Ge on Si 2.6
        "mass_ratio": {"<0.5": 2, "1.25-2": 1, ">=2": 3},
        "traces_by_mass_ratio": {">=2": 2},  # Ge in a, and S, which is not in c
        "concentration_at": {"0.2-0.5": 3, "0.5-2": 3, "2-5": 3, ">=5": 3, ">=0.5": 5},
        "present_at": {"0.2-0.5": 1, "0.5-2": 1, "2-5": 1, ">=5": 1, ">=0.5": 3},
    }
    assert found["subsets"]["concentration_at"]["0.5-2"]["n_present"] == 1
    assert found["n"] == 6
    only = metrics(table(m=np.zeros(6)).iloc[:2], ["m"])["host"]["m"]["none"]["subsets"]
    assert set(only["concentration_at"]) == {"0.2-0.5"}  # nothing to be detected in the others


def test_coverage_of_intervals():
    """Half of the six intervals reach from the prediction to the truth, and all of the two superposed entries."""
    width = np.array([0.002, 0.0, 0.009, 0.05, 0.031, 0.0])
    found = metrics(table(m=np.zeros(6), m_width=width), ["m"])["host"]["m"]["none"]
    assert found["coverage_90"] == pytest.approx(3 / 6)
    assert found["subsets"]["fidelity"]["superposed"]["coverage_90"] == 1


def test_levels_and_models_are_scored_by_themselves():
    """A model is scored where it answers, and ranked by its own scores of presence if it has some."""
    known = table(m=[0, 0, 0, 0, 0, 0.1], other=np.nan, m_presence=[5, 1, 5, 5, 5, 1]).assign(level="library")
    both = pd.concat([table(m=np.nan, other=0.0), known])
    found = metrics(both, ["m", "other"])["host"]
    assert {model: set(levels) for model, levels in found.items()} == {"m": {"library"}, "other": {"none"}}
    assert found["m"]["library"]["auroc"] == 1
    assert found["other"]["none"]["auroc"] == 0.5
    assert found["other"]["none"]["rmse_at"] == pytest.approx(100 * np.sqrt(np.mean(table()["true"] ** 2)))


def test_hidden_dopants_that_are_noticed():
    rng = np.random.default_rng(0)
    hidden = np.concatenate([np.zeros(400), np.full(200, 0.001), np.full(200, 0.1)])
    unexplained = rng.random(800) + 2 * (hidden > 0.05)  # large amounts are noticed, small ones are not
    rows = pd.DataFrame({"hidden": hidden, "unexplained": unexplained, "split": "host", "model": "m", "level": "none"})
    scores = open_set(rows.assign(host=np.arange(800) % 7))["host"]["m"]["none"]
    assert scores["at"][">=5"] == 1 and scores["at"]["<0.5"] == pytest.approx(0.5, abs=0.06)
    assert scores["auroc"] == pytest.approx((scores["at"][">=5"] + scores["at"]["<0.5"]) / 2)
    assert scores["n"] == 800 and scores["n_hosts"] == 7


def test_hosts_that_leave_more_unexplained_are_told_apart():
    rng = np.random.default_rng(0)
    wrong = np.repeat([False, True], 500)
    fits = pd.DataFrame(
        {"wrong": wrong, "unexplained": rng.random(1000) + 0.5 * wrong, "split": "host", "level": "none"}
    )
    fits["relaxed"] = np.arange(1000) % 5 == 0
    blind = fits.assign(unexplained=rng.random(1000))
    found = wrong_host_auroc(pd.concat([fits.assign(model="m"), blind.assign(model="blind")]))["host"]
    # Uniform scores, one of them shifted by half their range: 1 - (1 - 1/2)² / 2.
    assert found["m"]["none"]["all"] == pytest.approx(7 / 8, abs=0.03)
    assert found["m"]["none"]["direct"] == pytest.approx(7 / 8, abs=0.1)
    assert found["blind"]["none"]["all"] == pytest.approx(1 / 2, abs=0.06)
    without = wrong_host_auroc(fits.assign(model="m", relaxed=False))["host"]["m"]["none"]
    assert without["direct"] is None and without["all"] == found["m"]["none"]["all"]


def test_studies_of_one_dopant_are_listed_by_concentration():
    rng = np.random.default_rng(5)
    true = np.repeat([0.02, 0.05, 0.1], 40)
    told = 1.1 * true + rng.normal(0, 0.004, len(true))
    host = np.tile(np.arange(8), 15)
    rows = nominal(true, told, host, np.full(len(true), 0.01))
    assert [(row["true_at"], row["n"]) for row in rows] == [(2.0, 40), (5.0, 40), (10.0, 40)]
    for row in rows:
        assert row["mean_at"] == pytest.approx(1.1 * row["true_at"], abs=4 * 0.4 / 40**0.5)
        low, high = row["mean_interval_at"]
        assert low < row["mean_at"] < high < low + 4 * 2 * 0.4 / 40**0.5
        assert row["deviation_at"] == pytest.approx(0.4, rel=0.4)
        # Spread and a bias of a tenth of the concentration.
        assert row["rmse_at"] ** 2 == pytest.approx(row["deviation_at"] ** 2 + (row["mean_at"] - row["true_at"]) ** 2)
        assert row["high_at"] - row["low_at"] == pytest.approx(2, abs=0.1)
    assert rows[0]["coverage_90"] > 0.9 > rows[2]["coverage_90"] > 0  # a bias of 1 at.% is the half width
    alone = nominal(true, told, np.zeros(len(true)))[0]
    assert all(alone[name] is None for name in ("low_at", "high_at", "coverage_90", "mean_interval_at"))


def test_bias():
    assert scored([0.1, 0.2], [0.08, 0.21])["bias_at"] == pytest.approx(-0.5)
