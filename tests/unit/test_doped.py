"""Phonons of doped supercells: unstable modes are followed to lower minima, probing agrees with all force constants."""

from __future__ import annotations

import numpy as np
import pytest
from ase.build import bulk
from fakes import Wrapped, exact_hessian

from defectnet.config import Phonons, Relaxation
from defectnet.phonons.crystal import Folding
from defectnet.phonons.doped import ENERGY_GAIN_eV, doped_phonons
from defectnet.phonons.hessian import reference_phonons
from defectnet.phonons.library import single_defect
from defectnet.phonons.modes import diagonalise
from defectnet.phonons.probing import probe
from defectnet.phonons.superposition import Superposition
from defectnet.relaxation import relax_defect, relax_doped
from defectnet.supercells import Plan, apply
from defectnet.units import SQRT_EIGENVALUE_TO_MEV

TIGHT = Relaxation(fmax_eV_per_A=1e-3)


def energy(model, atoms):
    return float(model.evaluate([atoms]).energies[0])


def follow(atoms, model, most, relaxation=TIGHT):
    return doped_phonons(atoms, model, relaxation, Phonons(), 64, None, most, np.random.default_rng(0))


@pytest.fixture(scope="module")
def saddle(model):
    """Li in the middle of a Na site of stretched NaCl, where it is too small to stay: three unstable modes."""
    atoms = bulk("NaCl", "rocksalt", a=5.8, cubic=True)
    atoms.symbols[0] = "Li"
    return relax_defect(atoms, model, TIGHT).atoms


@pytest.fixture(scope="module")
def minimum(saddle, model):
    """Where following unstable modes leads."""
    return follow(saddle, model, 5)


# --- instabilities ------------------------------------------------------------------------------------------------


def test_without_following_the_structure_stays_and_energies_are_negative(saddle, model):
    here = follow(saddle, model, 0)
    np.testing.assert_array_equal(here.atoms.positions, saddle.positions)
    assert here.quality["followed"] == 0
    assert here.quality["imaginary_modes"] == 3
    # Squares of the energies are the eigenvalues with their signs: nothing is folded.
    root_mass = np.repeat(np.sqrt(saddle.get_masses()), 3)
    eigenvalues = np.linalg.eigvalsh(exact_hessian(model, saddle) / np.outer(root_mass, root_mass))
    lowest = np.sort(np.sign(here.modes.energies_meV) * here.modes.energies_meV**2)[:3]
    np.testing.assert_allclose(lowest, eigenvalues[:3] * SQRT_EIGENVALUE_TO_MEV**2, rtol=0.01)
    assert (here.modes.energies_meV[:3] < -10).all()


def test_unstable_modes_are_followed_to_a_minimum(saddle, minimum, model):
    assert 1 <= minimum.quality["followed"] <= 5
    assert minimum.quality["imaginary_modes"] == 0
    assert minimum.quality["energy_lowest_meV"] == minimum.modes.energies_meV[0] > 1
    assert energy(model, minimum.atoms) < energy(model, saddle) - ENERGY_GAIN_eV
    assert np.linalg.norm(model.evaluate([minimum.atoms]).forces[0], axis=1).max() < TIGHT.fmax_eV_per_A
    # The modes are those of the structure that comes with them.
    exact = diagonalise(exact_hessian(model, minimum.atoms), minimum.atoms.get_masses(), list(minimum.atoms.symbols))
    np.testing.assert_allclose(minimum.modes.energies_meV, exact.energies_meV, atol=0.05)


@pytest.mark.parametrize("most", [0, 1, 3])
def test_following_is_bounded(saddle, model, monkeypatch, most):
    """Where every step leads to another unstable structure, the last one stays so, with negative energies."""
    monkeypatch.setattr("defectnet.phonons.doped._downhill", lambda atoms, *rest: (atoms, 7))
    result = follow(saddle, model, most)
    assert result.quality["followed"] == most
    assert result.quality["force_evaluations"] == (most + 1) * (result.quality["displacements"] + 1) + 7 * most
    assert result.quality["imaginary_modes"] == 3
    assert result.modes.energies_meV[0] < -10


def test_a_stable_cell_is_not_touched(minimum, model):
    stable = minimum.atoms
    counting = Wrapped(model)
    again = follow(stable, counting, 3)
    assert again.quality["followed"] == 0
    np.testing.assert_array_equal(again.atoms.positions, stable.positions)
    assert len(counting.structures) == again.quality["displacements"] + 1 == again.quality["force_evaluations"]


def test_a_step_that_does_not_converge_is_taken_back(saddle, model):
    counting = Wrapped(model)
    result = follow(saddle, counting, 2, Relaxation(steps_max=1))
    assert result.quality["followed"] == 0
    np.testing.assert_array_equal(result.atoms.positions, saddle.positions)
    assert result.modes.energies_meV[0] < -10
    assert result.quality["force_evaluations"] == len(counting.structures)  # what was in vain is counted, too


def test_a_checkpoint_belongs_to_the_first_structure(saddle, minimum, model, tmp_path):
    """After a step downhill there is another; a job that was killed then begins with the first one again."""
    checkpoint = tmp_path / "forces.npy"
    for _ in range(2):
        result = doped_phonons(saddle, model, TIGHT, Phonons(), 64, None, 5, np.random.default_rng(0), checkpoint)
        np.testing.assert_allclose(result.modes.energies_meV, minimum.modes.energies_meV, atol=1e-9)
        assert checkpoint.exists()


# --- probing ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def probed_cell(model):
    """NaCl with Mg and K as neighbours: its superposition, the plan, the relaxed cell."""
    primitive = bulk("NaCl", "rocksalt", a=5.41)
    folding = Folding.of(primitive, np.array([[-2, 2, 2], [2, -2, 2], [2, 2, -2]]))
    pristine = reference_phonons(primitive, folding.matrix, model, Phonons(), 64)
    host = Superposition(primitive, folding.matrix, pristine.hessian.compact, [])
    defects = [
        single_defect(folding, 0, dopant, host.hessian, model, TIGHT, Phonons(), 1e-3, 64).defect
        for dopant in ("Mg", "K")
    ]
    superpose = Superposition(primitive, folding.matrix, pristine.hessian.compact, defects)
    sodium = np.flatnonzero(folding.atoms.symbols == "Na")
    near = folding.atoms.get_distances(sodium[0], sodium[1:], mic=True).argmin()
    plan = Plan((int(sodium[0]), int(sodium[1 + near])), ("Mg", "K"))
    start = apply(plan, folding.atoms)
    return superpose, plan, relax_doped(start, model, TIGHT, superpose(plan).displacements).atoms


def changed_share(hessian, exact, superpose, atoms):
    """|D - D_exact| / |D_exact - D_host| of mass-weighted Hessians."""
    weigh = np.sqrt(np.repeat(atoms.get_masses(), 3))
    host = np.sqrt(np.repeat(superpose.folding.atoms.get_masses(), 3))
    exact = exact / np.outer(weigh, weigh)
    left = np.linalg.norm(hessian / np.outer(weigh, weigh) - exact)
    return left / np.linalg.norm(exact - superpose.hessian / np.outer(host, host))


def probing(probed_cell, model, **phonons):
    superpose, plan, atoms = probed_cell
    settings = Phonons(**phonons)
    return doped_phonons(atoms, model, TIGHT, settings, 64, (superpose, plan), 0, np.random.default_rng(1))


def test_probing_agrees_with_all_force_constants(probed_cell, model):
    superpose, _, atoms = probed_cell
    result = probing(probed_cell, model, probing_tolerance=0.1)
    direct = follow(atoms, model, 0)
    assert (result.fidelity, direct.fidelity) == ("probed", "direct")
    assert result.quality["probing_error"] <= 0.1
    assert result.quality["force_evaluations"] == 2 * result.quality["probes"]
    assert "displacements" not in result.quality
    # Masses alone account for part of what doping changed; the error of the mode energies is far below that.
    host = diagonalise(superpose.hessian, superpose.folding.atoms.get_masses(), list(superpose.folding.atoms.symbols))
    left = np.abs(result.modes.energies_meV - direct.modes.energies_meV).mean()
    assert left < 0.1 * np.abs(host.energies_meV - direct.modes.energies_meV).mean()


def test_estimated_error_is_honest(probed_cell, model):
    """On average over the random vectors it is at least the true error, and never far below it."""
    superpose, plan, atoms = probed_cell
    exact = exact_hessian(model, atoms)
    results = [probe(superpose, plan, atoms, model, 1e-6, 16, np.random.default_rng(seed)) for seed in range(6)]
    true = np.array([changed_share(result.hessian, exact, superpose, atoms) for result in results])
    told = np.array([result.error for result in results])
    assert told.mean() > true.mean()
    assert (told > 0.5 * true).all()
    # Probing improves on what it started from.
    assert true.max() < changed_share(superpose(plan).hessian, exact, superpose, atoms)


def test_where_probing_misses_its_tolerance_all_force_constants_are_computed(probed_cell, model):
    result = probing(probed_cell, model, probing_tolerance=1e-9, probes_max=12)
    direct = follow(probed_cell[2], model, 0)
    assert result.fidelity == "direct"
    assert result.quality["probing_error"] > 1e-9
    np.testing.assert_allclose(result.modes.energies_meV, direct.modes.energies_meV, atol=1e-9)
    spent = 2 * result.quality["probes"] + result.quality["displacements"] + 1
    assert result.quality["force_evaluations"] == spent


def test_a_model_without_products_is_not_probed(probed_cell, model):
    result = probing(probed_cell, Wrapped(model))
    assert result.fidelity == "direct"
    assert "probes" not in result.quality
