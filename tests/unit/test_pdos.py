from math import erf, sqrt

import numpy as np
import periodictable
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from defectnet.config import Spectra
from defectnet.elements import PUBLISHED_VOCABULARY
from defectnet.errors import InputError
from defectnet.phonons.modes import Modes
from defectnet.phonons.pdos import (
    Broadening,
    bin_centers,
    energy_edges,
    neutron_pdos,
    neutron_weights,
    partial_pdos,
    pdos,
    share_outside,
    spectrum,
)

QUICK = settings(deadline=None, max_examples=40)
ELEMENTS = ("Ge", "H", "Si", "V")

sigmas = st.floats(0.02, 30)
widths = st.floats(0.05, 15)


@st.composite
def modes(draw, low=-60.0, high=150.0):
    energies = draw(st.lists(st.floats(low, high), min_size=1, max_size=30))
    number = draw(st.integers(1, len(ELEMENTS)))
    row = st.lists(st.floats(0.01, 1), min_size=number, max_size=number)
    weights = np.array([draw(row) for _ in energies])
    return Modes(np.sort(energies), weights / weights.sum(axis=1, keepdims=True), ELEMENTS[:number])


def grid(low, high, width):
    return low + width * np.arange(int(np.ceil((high - low) / width)) + 1)


def below(energy, mode, sigma):
    """Share of a Gaussian below an energy."""
    return 0.5 * (1 + erf((energy - mode) / (sigma * sqrt(2))))


# --- sum rules ----------------------------------------------------------------------------------------------------


@QUICK
@given(modes(), sigmas, widths)
def test_integral_is_one_on_a_wide_grid(modes, sigma, width):
    edges = grid(-60 - 9 * sigma, 150 + 9 * sigma, width)
    assert pdos(modes, edges, sigma) @ np.diff(edges) == pytest.approx(1, abs=1e-12)
    assert neutron_pdos(modes, edges, sigma) @ np.diff(edges) == pytest.approx(1, abs=1e-12)


@QUICK
@given(modes(), sigmas, widths, st.floats(-80, 60), st.floats(10, 120))
def test_integral_is_the_share_of_the_smeared_modes_on_the_grid(modes, sigma, width, low, extent):
    edges = grid(low, low + extent, width)
    covered = np.mean([below(edges[-1], e, sigma) - below(edges[0], e, sigma) for e in modes.energies_meV])
    assert pdos(modes, edges, sigma) @ np.diff(edges) == pytest.approx(covered, abs=1e-12)


@QUICK
@given(modes(), sigmas, widths)
def test_partial_spectra_add_up_and_hold_their_elements_share(modes, sigma, width):
    edges = grid(-60 - 9 * sigma, 150 + 9 * sigma, width)
    partial = partial_pdos(modes, edges, sigma)
    assert partial.shape == (len(modes.elements), len(edges) - 1)
    np.testing.assert_allclose(partial.sum(axis=0), pdos(modes, edges, sigma), atol=1e-14)
    np.testing.assert_allclose(partial @ np.diff(edges), modes.weights.mean(axis=0), atol=1e-12)


@QUICK
@given(modes(), sigmas, widths)
def test_nothing_is_negative(modes, sigma, width):
    edges = grid(-60, 150, width)
    assert (partial_pdos(modes, edges, sigma) >= 0).all()
    assert (neutron_pdos(modes, edges, sigma) >= 0).all()


@QUICK
@given(modes(), modes(), sigmas)
def test_spectra_of_two_cells_average_by_their_number_of_modes(one, other, sigma):
    edges = grid(-60, 150, 2.0)
    number = min(len(one.elements), len(other.elements))

    def cut(modes):
        weights = modes.weights[:, :number]
        return Modes(modes.energies_meV, weights / weights.sum(axis=1, keepdims=True), ELEMENTS[:number])

    one, other = cut(one), cut(other)
    n, m = len(one.energies_meV), len(other.energies_meV)
    energies = np.concatenate([one.energies_meV, other.energies_meV])
    both = Modes(energies, np.concatenate([one.weights, other.weights]), one.elements)
    average = (n * partial_pdos(one, edges, sigma) + m * partial_pdos(other, edges, sigma)) / (n + m)
    np.testing.assert_allclose(partial_pdos(both, edges, sigma), average, atol=1e-14)


# --- axes ---------------------------------------------------------------------------------------------------------


@QUICK
@given(modes(), sigmas, st.floats(-200, 200))
def test_shifting_modes_and_axis_together_changes_nothing(modes, sigma, shift):
    edges = grid(-60, 150, 1.5)
    moved = Modes(modes.energies_meV + shift, modes.weights, modes.elements)
    np.testing.assert_allclose(pdos(moved, edges + shift, sigma), pdos(modes, edges, sigma), atol=1e-10)


@QUICK
@given(modes(), sigmas, st.floats(0.1, 10))
def test_scaling_all_energies_scales_the_density_inversely(modes, sigma, factor):
    edges = grid(-60, 150, 1.5)
    scaled = Modes(modes.energies_meV * factor, modes.weights, modes.elements)
    wide = pdos(scaled, edges * factor, sigma * factor)
    np.testing.assert_allclose(wide * factor, pdos(modes, edges, sigma), atol=1e-10)


@QUICK
@given(modes(), sigmas, widths, st.integers(2, 7))
def test_a_coarse_bin_is_the_mean_of_the_fine_ones_in_it(modes, sigma, width, several):
    coarse = -60 + width * several * np.arange(9)
    fine = -60 + width * np.arange(8 * several + 1)
    means = pdos(modes, fine, sigma).reshape(8, several).mean(axis=1)
    np.testing.assert_allclose(pdos(modes, coarse, sigma), means, atol=1e-12)


@QUICK
@given(modes(), widths)
def test_without_broadening_it_is_a_histogram(modes, width):
    edges = grid(-60 - width, 150 + width, width)
    assume(np.abs(modes.energies_meV[:, None] - edges[None]).min() > 1e-4)  # half of a mode on an edge falls either way
    expected = np.histogram(modes.energies_meV, edges, density=True)[0]
    np.testing.assert_allclose(pdos(modes, edges, 1e-6), expected, rtol=1e-9, atol=1e-12)


def test_one_mode_is_a_gaussian():
    edges = np.linspace(-10, 50, 6001)
    spread = pdos(Modes(np.array([20.0]), np.ones((1, 1)), ("Si",)), edges, 2.5)
    x = bin_centers(edges)
    np.testing.assert_allclose(spread, np.exp(-((x - 20) ** 2) / 2 / 2.5**2) / 2.5 / sqrt(2 * np.pi), atol=1e-6)


@QUICK
@given(st.floats(-50, 0), st.floats(1, 200), st.floats(0.01, 20))
def test_grid_starts_at_the_minimum_and_reaches_the_maximum(low, extent, width):
    edges = energy_edges(Spectra(energy_min_meV=low, energy_max_meV=low + extent, bin_meV=width))
    assert edges[0] == low
    np.testing.assert_allclose(np.diff(edges), width, rtol=1e-6)
    assert edges[-1] >= low + extent - 1e-6 * width
    assert edges[-1] < low + extent + width
    np.testing.assert_allclose(bin_centers(edges) - edges[:-1], width / 2, rtol=1e-6)


def test_imaginary_modes_stay_at_negative_energies():
    modes = Modes(np.array([-10.0, 30.0, 30.0, 30.0]), np.ones((4, 1)), ("Si",))
    edges = energy_edges(Spectra(sigma_meV=0.5))
    density = pdos(modes, edges, 0.5)
    negative = bin_centers(edges) < 0
    assert density[negative].sum() == pytest.approx(0.25)
    assert bin_centers(edges)[negative][density[negative].argmax()] == pytest.approx(-10, abs=1)
    assert density[(bin_centers(edges) > 0) & (bin_centers(edges) < 25)].max() < 1e-9


@QUICK
@given(modes(), st.floats(-80, 60), st.floats(10, 120))
def test_share_outside_is_what_the_histogram_lacks(modes, low, extent):
    edges = np.array([low, low + extent])
    inside = np.histogram(modes.energies_meV, edges)[0].sum() / len(modes.energies_meV)
    assert share_outside(modes, edges) == pytest.approx(1 - inside)


# --- many at once -------------------------------------------------------------------------------------------------


@QUICK
@given(st.lists(modes(), min_size=1, max_size=4), sigmas, widths, st.sampled_from(["none", "neutron"]))
def test_many_at_once_agree_with_the_exact_integrals(several, sigma, width, weighting):
    """Axes that cut through the modes; cells of several sizes and compositions."""
    edges = grid(-20, 100, width)
    configured = Spectra(sigma_meV=sigma, weighting=weighting)
    exact = np.array([spectrum(one, edges, configured) for one in several])
    found = Broadening(edges, configured).spectra(several)
    assert (found >= 0).all()
    assert (np.abs(found - exact) @ np.diff(edges)).max() < 4e-4


def test_errors_of_many_at_once_cancel_between_modes():
    crowd = Modes(np.sort(np.random.default_rng(0).gamma(6, 6, 1287)), np.ones((1287, 1)), ("Si",))
    edges = energy_edges(Spectra())
    found = Broadening(edges, Spectra()).spectra([crowd])[0]
    assert np.abs(found - pdos(crowd, edges, 1.0)) @ np.diff(edges) < 5e-5


@QUICK
@given(st.lists(modes(), min_size=1, max_size=4), sigmas, widths)
def test_many_at_once_conserve_area(several, sigma, width):
    edges = grid(-60 - 9 * sigma, 150 + 9 * sigma, width)
    found = Broadening(edges, Spectra(sigma_meV=sigma)).spectra(several)
    np.testing.assert_allclose(found @ np.diff(edges), 1, atol=1e-12)


def test_many_at_once_lose_no_more_than_what_lies_off_the_axis():
    """A third below, a third above, however far; the imaginary third on the axis stays where it is."""
    edges = grid(-20, 100, 1.0)
    for far in (30.0, 1e3, 1e6):
        found = Broadening(edges, Spectra()).spectra(
            [Modes(np.array([-far, -10, 100 + far]), np.ones((3, 1)), ("Si",))]
        )[0]
        assert found.sum() == pytest.approx(1 / 3, abs=1e-12)
        assert found @ bin_centers(edges) / found.sum() == pytest.approx(-10, abs=1e-3)


def test_many_at_once_with_hardly_any_broadening():
    """Too fine a grid for a matrix: the exact integrals instead."""
    one = Modes(np.array([-3.3, 20.2, 20.4, 41.7]), np.ones((4, 1)), ("Si",))
    edges = energy_edges(Spectra())
    histogram = np.histogram(one.energies_meV, edges, density=True)[0]
    np.testing.assert_allclose(Broadening(edges, Spectra(sigma_meV=1e-4)).spectra([one])[0], histogram, atol=1e-12)


# --- neutrons -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("symbol", "barn", "amu"),
    [  # total bound scattering cross sections of Sears, Neutron News 3, 26 (1992)
        ("H", 82.02, 1.008),
        ("O", 4.232, 15.999),
        ("Si", 2.167, 28.0855),
        ("V", 5.10, 50.9415),  # 5.08 of it incoherent
        ("Ge", 8.60, 72.63),
    ],
)
def test_weights_agree_with_the_tables(symbol, barn, amu):
    assert neutron_weights((symbol,))[0] == pytest.approx(barn / amu, rel=0.01)


def test_vanadium_scatters_incoherently():
    neutron = periodictable.V.neutron
    assert neutron.coherent < 0.01 * neutron.incoherent
    assert neutron_weights(("V",))[0] * periodictable.V.mass == pytest.approx(neutron.incoherent, rel=0.01)


def test_every_element_of_the_vocabulary_has_a_weight():
    weights = neutron_weights(PUBLISHED_VOCABULARY)
    assert np.isfinite(weights).all()
    assert (weights > 0).all()


def test_element_without_cross_section_is_named():
    with pytest.raises(InputError, match=r"Po.*weighting: none"):
        neutron_weights(("Po",))


def test_weighted_sum_by_hand():
    """Two elements that move in separate modes: each peak is weighted by σ/m alone."""
    modes = Modes(np.array([20.0, 20.0, 40.0]), np.array([[1, 0], [1, 0], [0, 1.0]]), ("Ge", "Si"))
    edges = np.array([0.0, 30.0, 60.0])
    ge, si = 8.60 / 72.63, 2.167 / 28.0855
    expected = np.array([2 * ge, si]) / (2 * ge + si) / 30
    np.testing.assert_allclose(neutron_pdos(modes, edges, 0.5), expected, rtol=0.01)


@QUICK
@given(modes(), sigmas)
def test_equal_weights_give_the_plain_spectrum(modes, sigma):
    edges = grid(-60, 150, 2.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("defectnet.phonons.pdos.neutron_weights", lambda elements: np.full(len(elements), 0.37))
        np.testing.assert_allclose(neutron_pdos(modes, edges, sigma), pdos(modes, edges, sigma), rtol=1e-12, atol=1e-15)


@QUICK
@given(modes(), sigmas)
def test_elements_with_equal_spectra_give_the_plain_spectrum(modes, sigma):
    """When every element takes the same share of every mode, no weighting can change the shape."""
    edges = grid(-60, 150, 2.0)
    same = Modes(modes.energies_meV, np.broadcast_to(modes.weights[0], modes.weights.shape), modes.elements)
    np.testing.assert_allclose(neutron_pdos(same, edges, sigma), pdos(same, edges, sigma), rtol=1e-10, atol=1e-15)


def test_configured_kind_of_spectrum():
    modes = Modes(np.array([20.0, 40.0]), np.array([[0.9, 0.1], [0.2, 0.8]]), ("H", "Si"))
    edges = grid(0, 60, 1.0)
    plain = spectrum(modes, edges, Spectra(sigma_meV=3.0))
    weighted = spectrum(modes, edges, Spectra(sigma_meV=3.0, weighting="neutron"))
    np.testing.assert_array_equal(plain, pdos(modes, edges, 3.0))
    # Hydrogen outshines silicon by three orders of magnitude, so its mode dominates.
    assert weighted[20] > 3 * weighted[40]
    assert plain[20] == pytest.approx(plain[40], rel=1e-9)
