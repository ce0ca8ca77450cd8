"""Baselines: what they may learn from, what they find, and that least squares is exact where its model is."""

from dataclasses import replace

import numpy as np
import pytest
from synthetic import make_dataset_with_responses

from defectnet.dataset.samples import load_responses, load_samples
from defectnet.dataset.schema import Dataset
from defectnet.models.baselines import (
    BASELINE_AXIS,
    BASELINES,
    GeneralisedLeastSquares,
    LeastSquares,
    Mean,
    Ridge,
    ScaledLeastSquares,
    Trees,
)

FORMULAS = ["Si", "GaAs", "ZnSe", "MgO"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Samples, eight of each host in order, and responses."""
    path = tmp_path_factory.mktemp("baselines") / "dataset.h5"
    make_dataset_with_responses(path, FORMULAS, 8)
    with Dataset(path) as dataset:
        return load_samples(dataset, BASELINE_AXIS), load_responses(dataset, BASELINE_AXIS)


def mixed(samples, known):
    """The same questions about spectra that are exact linear combinations of responses."""
    doped = samples.pristine.astype(float)
    for row, host in enumerate(samples.host):
        places = known.elements[host] >= 0
        doped[row] += samples.targets[row, known.elements[host][places]] @ known.library[host][places]
    return replace(samples, doped=doped)


def rmse(values, samples):
    return float(np.sqrt(np.mean((values - samples.targets)[samples.candidates] ** 2)))


@pytest.mark.parametrize("name", BASELINES)
def test_answers_outside_the_mask_are_zero(data, name):
    samples, known = data
    model = BASELINES[name](samples, known)
    fewer = replace(samples, candidates=samples.candidates & (np.arange(56) % 2 == 0))
    for level in model.levels:
        values, presence, *_ = model.predict(fewer, known, level)
        assert values.shape == presence.shape == samples.targets.shape
        assert (values[~fewer.candidates] == 0).all()
        assert (presence[~fewer.candidates] == 0).all()
        assert np.isfinite(values).all()
        assert len(model.predict(samples[np.arange(0)], known, level).concentrations) == 0


@pytest.mark.parametrize("name", BASELINES)
def test_learns_from_masked_entries_of_the_training_part_only(data, name):
    samples, known = data
    training, test = samples[np.arange(24)], samples[np.arange(24, 32)]
    polluted = replace(training, targets=training.targets + np.where(training.candidates, 0, 5).astype(np.float32))
    first, second = (BASELINES[name](part, known) for part in (training, polluted))
    for level in first.levels:
        expected = first.predict(test, known, level).concentrations
        blind = replace(test, targets=np.zeros_like(test.targets))
        np.testing.assert_array_equal(second.predict(blind, known, level).concentrations, expected)


def test_mean(data):
    samples, known = data
    values = Mean(samples, known).predict(samples, known, "none").concentrations
    np.testing.assert_allclose(values[samples.candidates], samples.targets[samples.candidates].mean(), rtol=1e-6)


@pytest.mark.parametrize("model", [Ridge, Trees])
def test_what_is_learned_beats_the_mean_on_known_spectra(data, model):
    samples, known = data
    mean = Mean(samples, known).predict(samples, known, "none").concentrations
    values = model(samples, known).predict(samples, known, "none").concentrations
    assert rmse(values, samples) < 0.8 * rmse(mean, samples)


def test_ridge_answers_unknown_elements_with_the_mean(data):
    samples, known = data
    silicon = Ridge(samples[np.arange(8)], known)
    other = samples[np.arange(24, 32)]  # MgO
    unknown = other.candidates & ~samples.candidates[0]
    assert unknown.any()
    values = silicon.predict(other, known, "none").concentrations
    np.testing.assert_allclose(values[unknown], silicon.mean.mean, rtol=1e-6)


def test_trees_tell_hosts_and_elements_apart_that_they_never_saw(data):
    samples, known = data
    trees = Trees(samples[np.arange(24)], known)
    values = trees.predict(samples[np.arange(24, 32)], known, "none").concentrations
    assert len(np.unique(values[samples.candidates[24:32]])) > 8


def test_trees_take_no_more_pairs_than_allowed(data, monkeypatch):
    samples, known = data
    monkeypatch.setattr("defectnet.models.baselines.PAIRS_MAX", 60)
    first, again = (Trees(samples, known).predict(samples, known, "none").concentrations for _ in range(2))
    np.testing.assert_array_equal(first, again)
    monkeypatch.setattr("defectnet.models.baselines.PAIRS_MAX", 10**6)
    assert not np.array_equal(first, Trees(samples, known).predict(samples, known, "none").concentrations)


def test_least_squares_is_exact_for_linear_combinations(data):
    samples, known = data
    linear = mixed(samples, known)
    values = LeastSquares(linear, known).predict(linear, known, "library").concentrations
    np.testing.assert_allclose(values, linear.targets, atol=2e-5)


def test_least_squares_knows_levels(data):
    """True responses are better than those of masses; what the library lacks is taken from the masses."""
    samples, known = mixed(*data), data[1]
    model = LeastSquares(samples, known)
    library, mass_only = (model.predict(samples, known, level).concentrations for level in model.levels)
    assert rmse(library, samples) < 0.01 * rmse(mass_only, samples)
    without = replace(known, knows_library=np.zeros_like(known.knows_library), library=np.zeros_like(known.library))
    model.weights["library"] = model.weights["mass_only"]
    np.testing.assert_array_equal(model.predict(samples, without, "library").concentrations, mass_only)


def test_a_factor_makes_up_for_what_relaxed_crystals_do_besides(data):
    """Where a dopant does in relaxed crystals 0.7 times what responses say, the factor is 1 / 0.7, and no other's."""
    samples, known = data
    linear = mixed(samples, known)
    weaker = linear.doped - samples.pristine
    relaxed = np.arange(len(samples)) % 2 == 0
    weaker[relaxed] *= 0.7
    training = replace(linear, doped=samples.pristine + weaker, relaxed=relaxed)
    test = training[np.flatnonzero(relaxed)]
    model = ScaledLeastSquares(training, known)
    model.weights["library"] = 0.0, 0.0
    exact = model.predict(test, known, "library").concentrations
    np.testing.assert_allclose(exact, test.targets, atol=5e-4)
    assert rmse(exact, test) < 0.1 * rmse(LeastSquares(training, known).predict(test, known, "library")[0], test)
    absent = ~(test.targets > 0).any(axis=0)
    assert absent.any() and (model.factors["library"][absent] == 1).all()


def test_a_dopant_that_hardly_shows_gets_no_large_factor(data):
    samples, known = data
    linear = mixed(samples, known)
    faint = replace(linear, doped=samples.pristine + 1e-3 * (linear.doped - samples.pristine))
    factors = ScaledLeastSquares(faint, known).factors["library"]
    assert (factors[(faint.targets > 0).any(axis=0)] < 30).all()  # not 1000


def test_generalised_least_squares_is_plain_where_superposed_spectra_are_few(data):
    samples, known = mixed(*data), data[1]
    values = GeneralisedLeastSquares(samples, known).predict(samples, known, "library").concentrations
    np.testing.assert_allclose(values, samples.targets, atol=2e-5)


def test_superposed_spectra_of_the_host_teach_what_single_defects_do_not(tmp_path):
    """Springs of dopants that are neighbours are not those of single ones."""
    make_dataset_with_responses(tmp_path / "dataset.h5", ["GaAs", "MgO"], 240)
    with Dataset(tmp_path / "dataset.h5") as dataset:
        samples, known = load_samples(dataset, BASELINE_AXIS), load_responses(dataset, BASELINE_AXIS)
    plain, general = (
        model(samples, known).predict(samples, known, "library").concentrations
        for model in (LeastSquares, GeneralisedLeastSquares)
    )
    assert rmse(general, samples) < 0.6 * rmse(plain, samples)


def test_candidates_without_any_response_get_zero(data):
    samples, known = data
    nothing = np.zeros_like(known.knows_mass)
    blind = replace(known, knows_library=nothing, knows_mass=nothing)
    values = LeastSquares(samples, blind).predict(samples, blind, "library").concentrations
    assert (values == 0).all()
