"""What superposed spectra teach: exact where they are linear, and never about themselves."""

from dataclasses import replace

import numpy as np
import pytest
from synthetic import make_dataset, responses, spectra

from defectnet.dataset.samples import Axis, load_responses, load_samples
from defectnet.dataset.scatter import DIRECTIONS, FEWEST, FOLDS, folds_of, taught
from defectnet.dataset.schema import Dataset

AXIS = Axis("absolute")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def linear(rng):
    """Concentrations [200, 4], responses [4, 90] and what single defects say of these."""
    concentrations = rng.exponential(0.02, (200, 4)) * (rng.random((200, 4)) < 0.6)
    truth = rng.normal(size=(4, 90))
    return concentrations, truth, truth + rng.normal(size=truth.shape)


def test_responses_are_those_of_the_spectra(linear):
    concentrations, truth, dilute = linear
    response, scatter = taught(concentrations @ truth, concentrations, dilute)
    assert scatter.shape == (DIRECTIONS, 90)
    np.testing.assert_allclose(response, truth, atol=5e-3)  # a hundredth of a spectrum tells of single defects
    assert np.abs(scatter).max() < 1e-3


def test_what_no_spectrum_holds_is_known_from_single_defects(linear):
    concentrations, truth, dilute = linear
    concentrations[:, 2] = 0
    response, _ = taught(concentrations @ truth, concentrations, dilute)
    np.testing.assert_allclose(response[2], dilute[2])


def test_directions_hold_the_variance_of_what_is_left(linear, rng):
    concentrations, truth, dilute = linear
    along = rng.normal(size=(2, 90))
    added = rng.normal(size=(200, 2)) * (0.3, 0.1) @ along
    _, scatter = taught(concentrations @ truth + added, concentrations, dilute)
    assert np.linalg.matrix_rank(scatter, tol=1e-2) == 2
    np.testing.assert_allclose(np.sum(scatter**2), np.mean(np.sum(added**2, axis=1)), rtol=0.1)


def dataset_of(path, per_host, shift=None):
    """Samples and responses of two crystals; the spectrum of that name has other energies."""
    formulas = ["MgO", "NaCl"]
    made = list(spectra(formulas, per_host, 1))
    for place, entry in enumerate(made):
        if entry.id == shift:
            modes = replace(entry.modes, energies_meV=1.2 * entry.modes.energies_meV)
            made[place] = replace(entry, modes=modes)
    make_dataset(path, formulas, 0, spectra=[*made, *responses(formulas, 1)])
    with Dataset(path) as data:
        return data.spectra, load_samples(data, AXIS), load_responses(data, AXIS)


def test_no_spectrum_teaches_what_it_is_judged_by(tmp_path):
    table, samples, known = dataset_of(tmp_path / "one.h5", 90)
    name = "MgO-4"  # superposed
    _, _, other = dataset_of(tmp_path / "other.h5", 90, name)
    (row,) = np.flatnonzero(np.array(table.id)[samples.row] == name)
    host, fold = samples.host[row], samples.fold[row]
    assert fold < FOLDS
    for field in ("finite", "scatter"):
        same = (getattr(known, field) == getattr(other, field)).all(axis=(2, 3))
        expected = np.ones_like(same)
        expected[host, np.arange(FOLDS + 1) != fold] = False
        np.testing.assert_array_equal(same, expected)


def test_folds_are_even_and_only_of_superposed_spectra(tmp_path):
    table, samples, _ = dataset_of(tmp_path / "one.h5", 90)
    fold, superposed = folds_of(table), np.array(table.fidelity) == "superposed"
    doped = np.array(table.role) == "doped"
    assert (fold[~(superposed & doped)] == FOLDS).all()
    counts = [np.bincount(fold[superposed & doped & (table.host == host)]) for host in range(2)]
    assert np.ptp(counts) <= 1 and len(counts[0]) == FOLDS
    np.testing.assert_array_equal(samples.fold, fold[samples.row])


def test_few_spectra_teach_nothing(tmp_path):
    per_host = FEWEST  # of which two thirds are superposed
    _, _, known = dataset_of(tmp_path / "one.h5", per_host)
    assert (known.scatter == 0).all()
    np.testing.assert_array_equal(known.finite, np.repeat(known.library[:, None], FOLDS + 1, axis=1))
