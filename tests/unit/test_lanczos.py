from functools import partial

import numpy as np
import pytest
from ase.build import bulk
from ase.data import atomic_masses
from ase.optimize import FIRE
from fakes import exact_hessian

from defectnet.config import Spectra
from defectnet.errors import PhysicsError
from defectnet.phonons.lanczos import estimate, lanczos_modes, lanczos_until
from defectnet.phonons.modes import diagonalise
from defectnet.phonons.pdos import bin_centers, energy_edges, neutron_pdos, partial_pdos, pdos
from defectnet.potentials.base import ForceModelCalculator

SPECTRA = Spectra(energy_max_meV=70.0)
EDGES = energy_edges(SPECTRA)
SIGMA = SPECTRA.sigma_meV


class Case:
    """A doped rock salt, its Hessian-vector products (counted) and its modes by full diagonalisation."""

    def __init__(self, model, expansion, seed):
        rng = np.random.default_rng(seed)
        atoms = bulk("NaCl", "rocksalt", a=5.64, cubic=True) * expansion
        symbols = np.array(atoms.symbols)
        for host, dopant in (("Na", "Li"), ("Na", "K"), ("Cl", "Br")):
            sites = np.flatnonzero(symbols == host)
            symbols[rng.choice(sites, max(1, len(sites) // 10), replace=False)] = dopant
        atoms.symbols = symbols
        atoms.calc = ForceModelCalculator(model)
        FIRE(atoms, logfile=None).run(fmax=0.05, steps=60)
        atoms.calc = None
        self.masses, self.symbols = atomic_masses[atoms.numbers], list(atoms.symbols)
        self.set_hessian(exact_hessian(model, atoms))
        self.exact = partial(model.hessian_vector_products, atoms)

    def set_hessian(self, hessian):
        self.hessian, self.calls = hessian, 0
        self.modes = diagonalise(hessian, self.masses, self.symbols)

    def product(self, vectors):
        self.calls += len(vectors)
        return (vectors.reshape(len(vectors), -1) @ self.hessian).reshape(vectors.shape)

    def lanczos(self, steps, vectors, seed, **options):
        rng = np.random.default_rng(seed)
        return lanczos_modes(self.product, self.masses, self.symbols, steps, vectors, rng, **options)

    def distance(self, recursions):
        """L1 distance of the total density of states from that of full diagonalisation."""
        found = estimate(recursions, EDGES, SPECTRA).density
        return np.abs(found - pdos(self.modes, EDGES, SIGMA)) @ np.diff(EDGES)


@pytest.fixture(scope="module")
def crystal(model):
    """216 atoms of five elements."""
    return Case(model, (3, 3, 3), 1)


@pytest.fixture
def small(model):
    """16 atoms without a degenerate mode: dopants and a rattle leave no symmetry."""
    case = Case(model, (2, 1, 1), 2)
    noise = np.random.default_rng(0).normal(0, 0.05, case.hessian.shape)
    rigid = np.eye(48) - np.kron(np.ones((16, 16)) / 16, np.eye(3))
    case.set_hessian(case.hessian + rigid @ (noise + noise.T) @ rigid)
    return case


def mean_partial(recursions, edges=EDGES):
    """[E, B]"""
    return np.mean([partial_pdos(modes, edges, SIGMA) for modes in recursions.modes(SIGMA)], axis=0)


def internal(vector, masses):
    """A mass-weighted vector [3N] without its part along the rigid translations."""
    rigid = np.kron(np.sqrt(masses / masses.sum())[:, None], np.eye(3))
    return vector - rigid @ (rigid.T @ vector)


# --- against full diagonalisation ---------------------------------------------------------------------------------


def test_spectrum_approaches_that_of_full_diagonalisation(crystal):
    distances = {vectors: crystal.distance(crystal.lanczos(50, vectors, 3)) for vectors in (2, 8, 64)}
    assert distances[2] > distances[8] > distances[64]
    assert distances[8] < 0.06
    assert distances[64] < 0.025


def test_partial_spectra_approach_those_of_full_diagonalisation(crystal):
    """Without the bias of reading shares off single Ritz vectors, which misses the dopant Br by 4 to 5 per cent."""
    recursions = crystal.lanczos(50, 128, 4, together=16)
    found, expected = mean_partial(recursions), partial_pdos(crystal.modes, EDGES, SIGMA)
    assert recursions.elements == crystal.modes.elements == ("Br", "Cl", "K", "Li", "Na")
    distances = np.abs(found - expected).sum(axis=1) / expected.sum(axis=1)
    assert (distances < [0.035, 0.025, 0.06, 0.06, 0.025]).all()


def test_neutron_weighted_spectrum_approaches_that_of_full_diagonalisation(crystal):
    settings = SPECTRA.model_copy(update={"weighting": "neutron"})
    recursions = crystal.lanczos(50, 64, 5)
    found = estimate(recursions, EDGES, settings).density
    expected = neutron_pdos(crystal.modes, EDGES, SIGMA)
    assert np.abs(found - expected) @ np.diff(EDGES) < 0.04
    assert np.abs(found - estimate(recursions, EDGES, SPECTRA).density) @ np.diff(EDGES) > 0.2


# --- exactness ----------------------------------------------------------------------------------------------------


def test_all_steps_give_all_modes(small):
    recursions = small.lanczos(1000, 2, 7)  # 45 modes, so 45 steps
    assert recursions.products == small.calls == 2 * 45
    for modes in recursions.modes(1e-6):  # without broadening only the Ritz values themselves keep any weight
        kept = modes.energies_meV[np.abs(modes.weights).sum(axis=1) > 0]
        np.testing.assert_allclose(np.sort(kept), small.modes.energies_meV, rtol=1e-8)


@pytest.mark.parametrize("steps", [5, 20, 45])
def test_moments_of_the_start_vector_are_exact(small, steps):
    """A Gauss quadrature of m nodes is exact up to the power 2m - 1."""
    recursions = small.lanczos(steps, 1, 8)
    start = internal(np.random.default_rng(8).choice([-1.0, 1.0], size=48), small.masses)
    start /= np.linalg.norm(start)
    root = np.repeat(np.sqrt(small.masses), 3)
    dynamical = small.hessian / np.outer(root, root)
    scale = np.abs(np.linalg.eigvalsh(dynamical)).max()  # so that high powers stay of order 1
    alpha, beta = recursions.alpha[0], recursions.beta[0, 1:]
    nodes, vectors = np.linalg.eigh(np.diag(alpha) + np.diag(beta, 1) + np.diag(beta, -1))
    power = start
    for exponent in range(2 * steps):
        assert vectors[0] ** 2 @ (nodes / scale) ** exponent == pytest.approx(start @ power, abs=1e-8)
        power = internal(dynamical @ power / scale, small.masses)


def test_lanczos_vectors_are_orthonormal_and_elements_add_up(crystal):
    recursions = crystal.lanczos(120, 2, 9)
    for overlaps in recursions.overlaps:
        np.testing.assert_allclose(overlaps.sum(axis=0), np.eye(120), atol=1e-12)


def test_degenerate_modes_end_the_recursion_early(model):
    """A perfect rock salt of 8 atoms has 21 modes but few different energies, and needs no more products than those."""
    atoms = bulk("NaCl", "rocksalt", a=5.64, cubic=True)
    product, masses = partial(model.hessian_vector_products, atoms), atomic_masses[atoms.numbers]
    expected = diagonalise(exact_hessian(model, atoms), masses, list(atoms.symbols))
    energies = np.unique(expected.energies_meV.round(6))
    assert len(energies) < 10
    recursions = lanczos_modes(product, masses, list(atoms.symbols), 21, 400, np.random.default_rng(10), 100)
    # Now and then a start vector of ±1 is orthogonal to all modes of one energy by symmetry.
    assert 0.95 * 400 * len(energies) < recursions.products <= 400 * len(energies)
    found = mean_partial(recursions)
    assert np.abs(found - partial_pdos(expected, EDGES, SIGMA)).sum() < 0.06


def test_enough_steps_leave_nothing_to_more_steps(crystal):
    """About E_max / σ of them; the estimate of their error bounds it."""
    long = crystal.lanczos(160, 4, 11)
    final = estimate(long, EDGES, SPECTRA)
    assert final.l1_steps < 1e-6
    for steps in (20, 30, 40, 60):
        short = estimate(long.shortened(steps), EDGES, SPECTRA)
        error = np.abs(short.density - final.density) @ np.diff(EDGES)
        assert error < max(short.l1_steps, 1e-6)
    settled = int(np.ceil(crystal.modes.energies_meV[-1] / SIGMA))
    assert estimate(long.shortened(settled), EDGES, SPECTRA).l1_steps < 0.02


def test_shortened_recursions_are_those_of_fewer_steps(small):
    long, short = small.lanczos(30, 2, 12).shortened(12), small.lanczos(12, 2, 12)
    assert long.products == short.products == 24
    np.testing.assert_allclose(long.alpha, short.alpha)
    np.testing.assert_allclose(long.overlaps, short.overlaps, atol=1e-12)


# --- conventions --------------------------------------------------------------------------------------------------


def test_imaginary_modes_stay_at_negative_energies(small):
    """Reversed curvature mirrors the spectrum; nothing is folded."""
    up = estimate(small.lanczos(45, 4, 13), np.arange(-70.0, 71.0), SPECTRA).density
    small.set_hessian(-small.hessian)
    down = estimate(small.lanczos(45, 4, 13), np.arange(-70.0, 71.0), SPECTRA).density
    np.testing.assert_allclose(down, up[::-1], atol=1e-8)
    assert down[:70].sum() > 0.9


def test_share_of_imaginary_modes(model):
    case = Case(model, (2, 1, 1), 2)
    case.set_hessian(case.hessian - 0.25 * np.linalg.norm(case.hessian, 2) * np.eye(48))
    below = bin_centers(EDGES) < 0
    exact = pdos(case.modes, EDGES, SIGMA)[below].sum()
    assert exact > 0.2
    assert estimate(case.lanczos(45, 400, 14, together=100), EDGES, SPECTRA).density[below].sum() == pytest.approx(
        exact, abs=0.02
    )


def test_rigid_translations_are_absent_even_without_a_sum_rule(small):
    """Tied to the ground by springs that shift every squared frequency alike, translations included."""
    tied = small.hessian + 3.0 * np.diag(np.repeat(small.masses, 3))
    free = small.lanczos(45, 1, 15)
    small.set_hessian(tied)
    shifted = small.lanczos(45, 1, 15)
    np.testing.assert_allclose(shifted.alpha, free.alpha + 3.0, atol=1e-6)
    assert shifted.products == 45


def test_rows_add_up_to_the_exact_share_of_each_element(crystal):
    expected = crystal.modes.weights.mean(axis=0)
    recursions = crystal.lanczos(40, 3, 16)
    np.testing.assert_allclose(recursions.shares, expected, rtol=1e-9)
    wide = np.arange(-100.0, 200.0)
    for modes in recursions.modes(SIGMA):
        np.testing.assert_allclose(modes.weights.mean(axis=0), expected, rtol=1e-9)
        partials = partial_pdos(modes, wide, SIGMA)
        assert partials.min() > -1e-12
        np.testing.assert_allclose(partials.sum(axis=1), expected, rtol=1e-9)
    for weighting in ("none", "neutron"):
        settings = SPECTRA.model_copy(update={"weighting": weighting})
        assert estimate(recursions, wide, settings).density.sum() == pytest.approx(1, abs=1e-9)


def test_products_of_a_potential(model, crystal):
    """Recursions from the potential itself, side by side or one by one, are those from its Hessian."""
    run = partial(lanczos_modes, masses=crystal.masses, symbols=crystal.symbols, steps=6, vectors=3)
    expected = crystal.lanczos(6, 3, 17)
    for together in (1, 2):
        found = run(crystal.exact, rng=np.random.default_rng(17), together=together)
        np.testing.assert_allclose(found.alpha, expected.alpha, atol=1e-10)
        np.testing.assert_allclose(found.overlaps, expected.overlaps, atol=1e-8)


def test_products_that_are_not_finite(small):
    with pytest.raises(PhysicsError, match="not finite"):
        lanczos_modes(lambda v: v * np.nan, small.masses, small.symbols, 5, 1, np.random.default_rng(0))


# --- errors -------------------------------------------------------------------------------------------------------


def test_standard_errors_are_honest(crystal):
    """Over many seeds, true errors are as large as the estimated ones, bin by bin and integrated."""
    exact, widths = pdos(crystal.modes, EDGES, SIGMA), np.diff(EDGES)
    runs = [estimate(crystal.lanczos(50, 8, 100 + seed), EDGES, SPECTRA) for seed in range(12)]
    occupied = exact > 1e-3
    scores = np.array([(run.density - exact)[occupied] / run.standard_error[occupied] for run in runs])
    assert 0.8 < np.sqrt(np.mean(scores**2)) < 1.4  # Student's t with 7 degrees of freedom: 1.18
    assert np.mean(np.abs(scores) > 3) < 0.05
    ratios = [np.abs(run.density - exact) @ widths / run.l1_error for run in runs]
    assert np.mean(ratios) == pytest.approx(np.sqrt(2 / np.pi), rel=0.2)
    assert max(ratios) < 2


def test_seeds_differ_only_within_the_error(crystal):
    one, other = (estimate(crystal.lanczos(50, 16, seed), EDGES, SPECTRA) for seed in (18, 19))
    difference = np.abs(one.density - other.density)
    assert difference.max() > 1e-4
    assert difference.sum() < 2 * np.hypot(one.l1_error, other.l1_error)
    again = estimate(crystal.lanczos(50, 16, 18), EDGES, SPECTRA)
    np.testing.assert_array_equal(again.density, one.density)


def test_vectors_are_added_until_the_error_is_small(crystal):
    def until(tolerance, **options):
        crystal.calls = 0
        rng = np.random.default_rng(20)
        return lanczos_until(
            crystal.product, crystal.masses, crystal.symbols, 50, tolerance, EDGES, SPECTRA, rng, **options
        )

    recursions, found = until(0.04)
    assert found.l1_error <= 0.04
    assert found.products == recursions.products == crystal.calls
    before = crystal.lanczos(50, len(recursions.alpha) - 1, 20)
    assert len(before.alpha) < 4 or estimate(before, EDGES, SPECTRA).l1_error > 0.04
    recursions, found = until(1e-9, vectors_max=6, together=4)
    assert found.l1_error > 1e-9
    assert len(recursions.alpha) == 6
    assert crystal.calls == 300
    assert np.isnan(until(0.04, vectors_max=1)[1].l1_error)


# --- checkpoints --------------------------------------------------------------------------------------------------


def killed_after(product, calls):
    """The product, interrupted after so many calls."""
    left = iter(range(calls))

    def limited(vectors):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return product(vectors)

    return limited


@pytest.mark.parametrize("together", [1, 2])
def test_resumed_recursions_are_the_same_bit_by_bit(small, tmp_path, together):
    path = tmp_path / "lanczos.npz"
    whole = small.lanczos(10, 6, 21, together=together)
    killed = killed_after(small.product, 25)
    with pytest.raises(KeyboardInterrupt):
        lanczos_modes(
            killed, small.masses, small.symbols, 10, 6, np.random.default_rng(21), together=together, checkpoint=path
        )
    small.calls = 0
    resumed = small.lanczos(10, 6, 21, together=together, checkpoint=path)
    assert small.calls == (6 - 2 * together) * 10  # two batches were finished
    for one, other in ((whole.alpha, resumed.alpha), (whole.beta, resumed.beta), (whole.overlaps, resumed.overlaps)):
        np.testing.assert_array_equal(one, other)
    small.calls = 0
    more = small.lanczos(10, 8, 21, together=together, checkpoint=path)
    assert small.calls == 20
    np.testing.assert_array_equal(more.alpha[:6], whole.alpha)
    assert len(small.lanczos(10, 3, 21, checkpoint=path).alpha) == 3


def test_checkpoint_of_something_else_is_not_used(small, tmp_path):
    path = tmp_path / "lanczos.npz"
    small.lanczos(10, 2, 22, checkpoint=path)
    kept = path.read_bytes()

    def calls(steps=10, seed=22):
        small.calls = 0
        small.lanczos(steps, 2, seed, checkpoint=path)
        path.write_bytes(kept)
        return small.calls

    assert calls() == 0
    assert calls(steps=11) == 22
    assert calls(seed=23) == 20
    small.masses = small.masses * 2
    assert calls() == 20
    small.masses = small.masses / 2
    for damaged in (b"", kept[: len(kept) // 2], b"x" * 100):
        path.write_bytes(damaged)
        assert calls() == 20
