import ase.units
import numpy as np
import pytest
from ase import Atoms
from ase.vibrations import VibrationsData
from hypothesis import given, settings
from hypothesis import strategies as st

from defectnet.phonons.modes import Modes, diagonalise
from defectnet.phonons.pdos import partial_pdos

# ħ sqrt(eV / (Å² amu)) in meV from ASE's constants.
MEV = ase.units._hbar * 1e10 / np.sqrt(ase.units._e * ase.units._amu) * 1e3
QUICK = settings(deadline=None, max_examples=30)
MASSES = {"H": 1.008, "Si": 28.085, "Sb": 121.76}


def random_crystal(seed, n=6):
    """Hessian [3N, 3N] with the acoustic sum rule, masses and symbols of N atoms."""
    rng = np.random.default_rng(seed)
    symbols = list(rng.choice(list(MASSES), size=n))
    a = rng.normal(size=(3 * n, 3 * n))
    shift = np.tile(np.eye(3), (n, 1)) / np.sqrt(n)
    rigid = np.eye(3 * n) - shift @ shift.T
    return rigid @ (a + a.T) @ rigid, np.array([MASSES[s] for s in symbols]), symbols


def chain(cells, k, heavy, light):
    """Diatomic ring of springs, the same in x, y and z."""
    n = 2 * cells
    line = 2 * k * np.eye(n)
    for i in range(n):
        line[i, (i + 1) % n] -= k
        line[(i + 1) % n, i] -= k
    return np.kron(line, np.eye(3)), np.array([heavy, light] * cells)


@pytest.mark.parametrize(("first", "second"), [("H", "H"), ("H", "Si"), ("Si", "Sb")])
def test_molecule_vibrates_at_the_root_of_k_over_reduced_mass(first, second):
    k, m, n = 31.4, MASSES[first], MASSES[second]
    along = np.array([1, 2, 2]) / 3
    spring = k * np.outer(along, along)
    hessian = np.block([[spring, -spring], [-spring, spring]])
    modes = diagonalise(hessian, np.array([m, n]), [first, second])
    assert modes.energies_meV.shape == (3,)
    assert modes.energies_meV[-1] == pytest.approx(MEV * np.sqrt(k * (1 / m + 1 / n)), rel=1e-7)
    np.testing.assert_allclose(modes.energies_meV[:2], 0, atol=1e-4)  # rotations
    if first != second:  # amplitudes are as 1/m, so kinetic energies are as 1/m too
        assert modes.weights[-1, modes.elements.index(first)] == pytest.approx(n / (m + n), rel=1e-9)


@pytest.mark.parametrize(("heavy", "light"), [(121.76, 28.085), (28.085, 28.085)])
def test_diatomic_chain_has_the_textbook_dispersion(heavy, light):
    cells, k = 7, 5.0
    hessian, masses = chain(cells, k, heavy, light)
    modes = diagonalise(hessian, masses, ["Sb", "Si"] * cells)
    phase = 2 * np.pi * np.arange(cells) / cells
    total = 1 / heavy + 1 / light
    root = np.sqrt(total**2 - 4 * np.sin(phase / 2) ** 2 / (heavy * light))
    squares = np.sort(np.repeat(np.concatenate([k * (total - root), k * (total + root)]), 3))
    np.testing.assert_allclose(modes.energies_meV, MEV * np.sqrt(squares[3:]), rtol=1e-6)


def test_agrees_with_ase():
    hessian, _, symbols = random_crystal(3)
    atoms = Atoms(symbols, np.random.default_rng(0).uniform(0, 5, (6, 3)))
    energies = VibrationsData.from_2d(atoms, hessian).get_energies() * 1e3
    signed = np.sort(energies.real - energies.imag)
    signed = np.delete(signed, np.argsort(np.abs(signed))[:3])  # the translations
    modes = diagonalise(hessian, atoms.get_masses(), symbols)
    np.testing.assert_allclose(modes.energies_meV, signed, rtol=1e-6)


@QUICK
@given(st.integers(0, 10**6), st.integers(2, 8))
def test_rigid_translations_are_absent_even_without_a_sum_rule(seed, n):
    hessian, masses, symbols = random_crystal(seed, n)
    stuck = hessian + 3.0 * np.diag(np.repeat(masses, 3))  # tied to the ground: translations at sqrt(3)
    modes = diagonalise(hessian, masses, symbols)
    tied = diagonalise(stuck, masses, symbols)
    assert len(modes.energies_meV) == len(tied.energies_meV) == 3 * n - 3

    def square(energies):
        return np.sign(energies) * (energies / MEV) ** 2

    np.testing.assert_allclose(square(tied.energies_meV), square(modes.energies_meV) + 3.0, atol=1e-5)


@QUICK
@given(st.integers(0, 10**6), st.integers(2, 8))
def test_shares_add_up(seed, n):
    hessian, masses, symbols = random_crystal(seed, n)
    modes = diagonalise(hessian, masses, symbols)
    assert (modes.weights >= 0).all()
    assert (np.diff(modes.energies_meV) >= 0).all()
    assert modes.elements == tuple(sorted(set(symbols)))
    np.testing.assert_allclose(modes.weights.sum(axis=1), 1, atol=1e-12)
    for column, element in enumerate(modes.elements):
        count = symbols.count(element)
        in_translations = 3 * count * MASSES[element] / masses.sum()
        assert modes.weights[:, column].sum() == pytest.approx(3 * count - in_translations, abs=1e-10)


@QUICK
@given(st.integers(0, 10**6), st.integers(2, 8))
def test_squared_frequencies_sum_to_the_trace_element_by_element(seed, n):
    hessian, masses, symbols = random_crystal(seed, n)
    modes = diagonalise(hessian, masses, symbols)
    squares = np.sign(modes.energies_meV) * (modes.energies_meV / MEV) ** 2
    traces = np.diag(hessian).reshape(n, 3).sum(axis=1) / masses
    for column, element in enumerate(modes.elements):
        expected = sum(t for t, s in zip(traces, symbols, strict=True) if s == element)
        assert squares @ modes.weights[:, column] == pytest.approx(expected, rel=1e-6, abs=1e-6)


@QUICK
@given(st.integers(0, 10**6), st.floats(0.1, 10))
def test_energies_scale_with_the_root_of_mass_and_stiffness(seed, factor):
    hessian, masses, symbols = random_crystal(seed)
    modes = diagonalise(hessian, masses, symbols)
    heavier = diagonalise(hessian, factor * masses, symbols)
    stiffer = diagonalise(factor * hessian, masses, symbols)
    np.testing.assert_allclose(heavier.energies_meV * np.sqrt(factor), modes.energies_meV, rtol=1e-8)
    np.testing.assert_allclose(stiffer.energies_meV / np.sqrt(factor), modes.energies_meV, rtol=1e-8)
    np.testing.assert_allclose(heavier.weights, modes.weights, atol=1e-6)


def test_a_heavier_isotope_raises_no_energy():
    """Rayleigh's theorem on one changed mass."""
    hessian, masses = chain(5, 4.0, 28.085, 28.085)
    light = diagonalise(hessian, masses, ["Si"] * 10).energies_meV
    masses[3] = 29.974
    heavy = diagonalise(hessian, masses, ["Si"] * 10).energies_meV
    assert (heavy <= light + 1e-9).all()
    assert heavy.sum() < light.sum() - 0.01


@QUICK
@given(st.integers(0, 10**6))
def test_reversed_curvature_gives_the_negative_energies(seed):
    hessian, masses, symbols = random_crystal(seed)
    up = diagonalise(hessian, masses, symbols)
    down = diagonalise(-hessian, masses, symbols)
    np.testing.assert_allclose(down.energies_meV, -up.energies_meV[::-1], rtol=1e-8)
    assert (down.energies_meV < 0).any()


def assert_same_spectra(one: Modes, other: Modes):
    """Energies agree, and so do partial spectra: within degenerate modes single weights are arbitrary."""
    np.testing.assert_allclose(one.energies_meV, other.energies_meV, rtol=1e-7, atol=1e-6)
    assert one.elements == other.elements
    edges = np.linspace(-60, 60, 240)
    np.testing.assert_allclose(partial_pdos(one, edges, 0.5), partial_pdos(other, edges, 0.5), atol=1e-6)


@QUICK
@given(st.integers(0, 10**6))
def test_nothing_depends_on_orientation_or_order_of_atoms(seed):
    hessian, masses, symbols = random_crystal(seed)
    modes = diagonalise(hessian, masses, symbols)
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    every = np.kron(np.eye(6), turn)
    assert_same_spectra(modes, diagonalise(every @ hessian @ every.T, masses, symbols))
    order = rng.permutation(6)
    shuffled = hessian.reshape(6, 3, 6, 3)[order][:, :, order].reshape(18, 18)
    assert_same_spectra(modes, diagonalise(shuffled, masses[order], [symbols[i] for i in order]))
