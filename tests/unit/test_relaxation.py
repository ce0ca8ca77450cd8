import numpy as np
import pytest
import spglib
from ase.build import bulk
from ase.spacegroup import crystal
from fakes import Broken, Wrapped, exact_hessian, rock_salt

from defectnet import relaxation
from defectnet.batches import atoms_of
from defectnet.config import Relaxation
from defectnet.errors import PhysicsError
from defectnet.potentials.base import Evaluation
from defectnet.relaxation import relax_defect, relax_doped, relax_host

RUTILE = crystal(
    ["Mg", "F"], [(0, 0, 0), (0.31, 0.31, 0)], spacegroup=136, cellpar=[4.5, 4.5, 3.2, 90, 90, 90], primitive_cell=True
)
HOSTS = {  # space group and a start that the potential wants to change
    "fcc": (225, bulk("Cu", "fcc", a=4.6)),
    "rock salt": (225, atoms_of(rock_salt("NaCl", "Na", "Cl", 5.64))),  # unstable, but held by symmetry
    "hcp": (194, bulk("Zn", "hcp", a=3.5, c=5.5)),
    "rutile": (136, RUTILE),
}


def space_group(atoms):
    cell = (atoms.cell[:], atoms.get_scaled_positions(), atoms.numbers)
    return spglib.get_symmetry_dataset(cell, symprec=1e-4).number


def energy(model, atoms):
    return float(model.evaluate([atoms]).energies[0])


@pytest.fixture(scope="module")
def doped(model):
    """32 atoms of an fcc metal, which pair potentials hold together well, with three dopants, shaken."""
    a = 2**0.5 * relax_host(bulk("Cu", "fcc", a=4.8), model, Relaxation()).atoms.cell.lengths()[0]
    atoms = bulk("Cu", "fcc", a=a, cubic=True).repeat(2)
    atoms.symbols[[3, 11, 20]] = ["Ni", "Zn", "Ga"]
    atoms.rattle(0.05, seed=1)
    return atoms


# --- hosts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "optimizer"), [*((name, "LBFGS") for name in HOSTS), ("rutile", "FIRE")])
def test_host_keeps_its_space_group_and_loses_its_forces(model, name, optimizer):
    group, start = HOSTS[name]
    settings = Relaxation(optimizer=optimizer)
    relaxed = relax_host(start, model, settings)
    assert space_group(start) == group == space_group(relaxed.atoms)
    assert relaxed.quality["converged"] == 1
    assert relaxed.quality["relax_steps"] > 0
    result = model.evaluate([relaxed.atoms])
    assert np.linalg.norm(result.forces[0], axis=1).max() <= settings.fmax_eV_per_A
    # Stress times volume per atom is what ASE's cell filter compares with forces.
    virial = np.abs(result.stresses[0]).max() * relaxed.atoms.get_volume() / len(start)
    assert virial <= settings.fmax_eV_per_A
    assert result.energies[0] < energy(model, start)


@pytest.mark.parametrize("name", ["hcp", "rutile"])
def test_optimizers_agree_on_hosts(model, name):
    start, tight = HOSTS[name][1], {"fmax_eV_per_A": 1e-3}
    one, other = (relax_host(start, model, Relaxation(optimizer=o, **tight)) for o in ("LBFGS", "FIRE"))
    assert one.quality["energy_eV_per_atom"] == pytest.approx(other.quality["energy_eV_per_atom"], abs=1e-5)
    np.testing.assert_allclose(one.atoms.cell.cellpar(), other.atoms.cell.cellpar(), rtol=2e-3)


@pytest.mark.parametrize("name", ["rock salt", "rutile"])
def test_noise_of_the_forces_does_not_break_the_symmetry(model, name):
    """In single precision forces on equivalent atoms differ a little."""

    class Noisy(Wrapped):
        def changed(self, result):
            rng = np.random.default_rng(self.calls)
            forces = [force + rng.normal(0, 1e-3, force.shape) for force in result.forces]
            return Evaluation(result.energies, forces, result.stresses + rng.normal(0, 1e-5, (1, 3, 3)))

    group, start = HOSTS[name]
    relaxed = relax_host(start, Noisy(model), Relaxation())
    assert relaxed.quality["relax_steps"] > 2
    assert space_group(relaxed.atoms) == group


def test_lattice_of_a_host_stays_where_asked(model):
    start = HOSTS["rutile"][1]
    relaxed = relax_host(start, model, Relaxation(host_cell=False))
    np.testing.assert_array_equal(relaxed.atoms.cell, start.cell)
    assert relaxed.quality["volume_change"] == 0
    assert relaxed.quality["displacement_max_A"] > 0
    assert relaxed.quality["converged"] == 1


def test_volume_change_is_that_of_the_cells(model):
    start = HOSTS["hcp"][1]
    relaxed = relax_host(start, model, Relaxation())
    assert relaxed.quality["volume_change"] == pytest.approx(relaxed.atoms.get_volume() / start.get_volume() - 1)
    assert abs(relaxed.quality["volume_change"]) > 0.01


# --- doped cells --------------------------------------------------------------------------------------------------


def test_doped_cell_relaxes_at_fixed_lattice(model, doped):
    before = doped.copy()
    relaxed = relax_doped(doped, model, Relaxation())
    np.testing.assert_array_equal(relaxed.atoms.cell, doped.cell)
    np.testing.assert_array_equal(relaxed.atoms.numbers, doped.numbers)
    assert relaxed.quality["converged"] == 1
    result = model.evaluate([relaxed.atoms])
    assert np.linalg.norm(result.forces[0], axis=1).max() <= 0.01
    assert energy(model, relaxed.atoms) < energy(model, doped)
    # What is reported is what is there.
    np.testing.assert_allclose(relaxed.forces, result.forces[0], atol=1e-12)
    quality = relaxed.quality
    assert quality["residual_force_eV_per_A"] == pytest.approx(np.linalg.norm(result.forces[0], axis=1).max())
    assert quality["energy_eV_per_atom"] == pytest.approx(result.energies[0] / 32)
    moved = relaxed.atoms.positions - doped.positions
    moved -= moved.mean(axis=0)
    assert quality["displacement_max_A"] == pytest.approx(np.linalg.norm(moved, axis=1).max())
    # The structure that was handed in is still the start.
    assert before == doped


def test_optimizers_agree_on_doped_cells(model, doped):
    one, other = (relax_doped(doped, model, Relaxation(optimizer=o, fmax_eV_per_A=1e-3)) for o in ("LBFGS", "FIRE"))
    assert one.quality["energy_eV_per_atom"] == pytest.approx(other.quality["energy_eV_per_atom"], abs=1e-6)
    apart = one.atoms.positions - other.atoms.positions
    np.testing.assert_allclose(apart - apart.mean(axis=0), 0, atol=0.01)


def test_lattice_of_a_doped_cell_relaxes_where_asked(model, doped):
    doped = doped.copy()
    doped.set_cell(0.97 * doped.cell, scale_atoms=True)
    fixed = relax_doped(doped, model, Relaxation())
    free = relax_doped(doped, model, Relaxation(doped_cell=True))
    assert free.quality["volume_change"] > 0.01
    assert energy(model, free.atoms) < energy(model, fixed.atoms)
    virial = np.abs(model.evaluate([free.atoms]).stresses[0]).max() * free.atoms.get_volume() / 32
    assert virial <= 0.01


def test_nothing_moves_in_a_relaxed_structure(model, doped):
    relaxed = relax_doped(doped, model, Relaxation())
    again = relax_doped(relaxed.atoms, model, Relaxation())
    assert again.quality["relax_steps"] == 0
    assert again.quality["displacement_max_A"] == 0
    np.testing.assert_array_equal(again.atoms.positions, relaxed.atoms.positions)


def test_same_start_same_end(model, doped):
    one, other = relax_doped(doped, model, Relaxation()), relax_doped(doped, model, Relaxation())
    np.testing.assert_array_equal(one.atoms.positions, other.atoms.positions)
    assert one.quality == other.quality


def test_evaluations_are_counted(model, doped):
    counting = Wrapped(model)
    relaxed = relax_doped(doped, counting, Relaxation())
    assert relaxed.quality["relax_evaluations"] == len(counting.structures)


# --- trouble ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["LBFGS", "FIRE"])
@pytest.mark.parametrize("steps", [1, 3])
def test_running_out_of_steps_is_no_error(model, doped, optimizer, steps):
    relaxed = relax_doped(doped, model, Relaxation(optimizer=optimizer, steps_max=steps))
    assert relaxed.quality["converged"] == 0
    assert relaxed.quality["relax_steps"] == steps
    assert relaxed.quality["residual_force_eV_per_A"] > 0.01
    assert energy(model, relaxed.atoms) < energy(model, doped)


@pytest.mark.parametrize("steps", [5, 500])
def test_fire_goes_on_where_lbfgs_gets_nowhere(model, doped, monkeypatch, steps):
    """To the same minimum, and no step is given twice."""
    expected = relax_doped(doped, model, Relaxation(fmax_eV_per_A=1e-3))
    monkeypatch.setattr(relaxation, "LBFGS_STEPS_MAX", 3)
    relaxed = relax_doped(doped, model, Relaxation(fmax_eV_per_A=1e-3, steps_max=steps))
    assert relaxed.quality["converged"] == (steps > 5)
    if steps == 5:
        assert relaxed.quality["relax_steps"] == steps
        assert relaxed.quality["energy_eV_per_atom"] > expected.quality["energy_eV_per_atom"]
    else:
        assert 3 < expected.quality["relax_steps"] < relaxed.quality["relax_steps"] < steps
        energies = [each.quality["energy_eV_per_atom"] for each in (relaxed, expected)]
        assert energies[0] == pytest.approx(energies[1], abs=1e-5)


def test_atoms_on_top_of_each_other(model, doped):
    broken = doped.copy()
    broken.positions[5] = broken.positions[3] + [0.3, 0, 0]
    with pytest.raises(PhysicsError, match="exploded at step 0"):
        relax_doped(broken, model, Relaxation())

    class Blind(Wrapped):
        def changed(self, result):
            return Evaluation(result.energies, [0 * force for force in result.forces], result.stresses)

    with pytest.raises(PhysicsError, match=r"(Ni-Cu|Cu-Ni) atoms 0\.30 Å apart"):
        relax_doped(broken, Blind(model), Relaxation())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_atoms_at_the_same_place(model, doped):
    broken = doped.copy()
    broken.positions[5] = broken.positions[3]
    with pytest.raises(PhysicsError, match="exploded at step 0"):
        relax_doped(broken, model, Relaxation())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("after", [0, 2])
def test_forces_that_are_not_finite(model, doped, value, after):
    with pytest.raises(PhysicsError, match=f"exploded at step {after}: forces are not finite"):
        relax_doped(doped, Broken(model, value, after), Relaxation())


@pytest.mark.parametrize("value", [5e4, -5e4])
def test_forces_beyond_all_chemistry(model, doped, value):
    with pytest.raises(PhysicsError, match=r"exploded at step 1: .*5e\+04 eV/Å"):
        relax_doped(doped, Broken(model, value, 1), Relaxation())
    with pytest.raises(PhysicsError, match="exploded"):
        relax_host(HOSTS["rutile"][1], Broken(model, value), Relaxation())


def test_collapse_on_the_way_is_noticed(model, doped):
    """A model that pulls two neighbours into each other, as extrapolating networks do."""

    class Attractive(Wrapped):
        def changed(self, result):
            atoms = self.structures[-1]
            force = np.zeros((32, 3))
            direction = atoms.get_distance(3, 5, mic=True, vector=True)
            force[3], force[5] = 50 * direction, -50 * direction
            return Evaluation(result.energies, [force], result.stresses)

    with pytest.raises(PhysicsError, match=r"atoms 0\.\d\d Å apart"):
        relax_doped(doped, Attractive(model), Relaxation())


def test_unknown_element(model, doped):
    foreign = doped.copy()
    foreign.symbols[0] = "Gd"
    with pytest.raises(PhysicsError, match="Gd"):
        relax_doped(foreign, model, Relaxation())


def test_evaporated_crystal_is_an_explosion(model):
    """No attraction: the cell grows until no atom feels another."""

    class Repulsive(Wrapped):
        def evaluate(self, structures):
            energies, forces, stresses = [], [], []
            for atoms in structures:
                volume = atoms.get_volume() / len(atoms)
                energies.append(len(atoms) * 20 / volume)
                forces.append(np.zeros((len(atoms), 3)))
                stresses.append(-np.eye(3) * 20 / volume**2)
            return Evaluation(np.array(energies), forces, np.array(stresses))

    with pytest.raises(PhysicsError, match="volume"):
        relax_host(HOSTS["rutile"][1], Repulsive(model), Relaxation())


def test_end_is_never_above_the_start(model):
    start = bulk("ZnS", "zincblende", a=5.4)
    try:
        end = relax_host(start, model, Relaxation()).atoms
    except PhysicsError:
        return
    assert energy(model, end) <= energy(model, start)


# --- guesses and single defects -----------------------------------------------------------------------------------


def superposed(model, doped, **settings):
    """Displacements of three dopants from the sites of the host, as the sum of what each does alone."""
    host = bulk("Cu", "fcc", a=doped.cell.lengths()[0] / 2, cubic=True).repeat(2)
    total = np.zeros((32, 3))
    for site in (3, 11, 20):
        single = host.copy()
        single.symbols[site] = doped.symbols[site]
        relaxed = relax_defect(single, model, Relaxation(**settings)).atoms
        total += relaxed.positions - single.positions
    host.numbers = doped.numbers
    return host, total


def test_sum_of_single_defects_is_a_good_start(model, doped):
    start, guess = superposed(model, doped, fmax_eV_per_A=1e-4)
    settings = Relaxation(fmax_eV_per_A=1e-3)
    cold, warm = relax_doped(start, model, settings), relax_doped(start, model, settings, guess)
    assert warm.quality["converged"] == warm.quality["warm"] == 1
    assert "warm" not in cold.quality
    assert warm.quality["relax_steps"] < cold.quality["relax_steps"]
    assert warm.quality["energy_eV_per_atom"] == pytest.approx(cold.quality["energy_eV_per_atom"], abs=1e-5)
    apart = warm.atoms.positions - cold.atoms.positions
    np.testing.assert_allclose(apart - apart.mean(axis=0), 0, atol=0.02)
    # Displacements count from the host's sites, not from the guess.
    moved = warm.atoms.positions - start.positions
    moved -= moved.mean(axis=0)
    assert warm.quality["displacement_max_A"] == pytest.approx(np.linalg.norm(moved, axis=1).max())


def test_force_constants_save_steps(model, doped):
    """Those of the doped crystal at its sites lead to the same minimum as none, in a fraction of the evaluations."""
    settings = Relaxation(fmax_eV_per_A=1e-4)
    nowhere = np.zeros((32, 3))
    plain = relax_doped(doped, model, settings)
    knowing = relax_doped(doped, model, settings, nowhere, exact_hessian(model, doped))
    assert knowing.quality["relax_evaluations"] < 0.5 * plain.quality["relax_evaluations"]
    apart = knowing.atoms.positions - plain.atoms.positions
    np.testing.assert_allclose(apart - apart.mean(axis=0), 0, atol=1e-3)
    # A lattice that relaxes as well has more degrees of freedom than force constants.
    free = Relaxation(doped_cell=True)
    with_them, without = (relax_doped(doped, model, free, nowhere, h) for h in (np.eye(96), None))
    np.testing.assert_array_equal(with_them.atoms.positions, without.atoms.positions)


@pytest.mark.parametrize("trouble", ["contact", "steps"])
def test_a_guess_that_leads_astray_is_forgotten(model, doped, trouble):
    cold = relax_doped(doped, model, Relaxation())
    guess = np.zeros((32, 3))
    if trouble == "contact":
        guess[5] = doped.positions[3] - doped.positions[5] + [0.3, 0, 0]
        settings = Relaxation()
    else:
        guess += np.random.default_rng(2).normal(0, 0.25, guess.shape)
        settings = Relaxation(steps_max=cold.quality["relax_steps"])
    warm = relax_doped(doped, model, settings, guess)
    spent = warm.quality["relax_evaluations"] - cold.quality["relax_evaluations"]
    assert spent >= 0  # what the guess cost is counted, as far as it got
    assert warm.quality == cold.quality | {"warm": 0, "relax_evaluations": warm.quality["relax_evaluations"]}
    np.testing.assert_array_equal(warm.atoms.positions, cold.atoms.positions)


def test_a_defect_keeps_its_site_symmetry(model):
    class Noisy(Wrapped):
        def changed(self, result):
            rng = np.random.default_rng(self.calls)
            forces = [force + rng.normal(0, 1e-3, force.shape) for force in result.forces]
            return Evaluation(result.energies, forces, result.stresses)

    start = bulk("NaCl", "rocksalt", a=5.64, cubic=True)
    start.symbols[0] = "K"
    relaxed = relax_defect(start, Noisy(model), Relaxation(fmax_eV_per_A=0.02))
    assert space_group(relaxed.atoms) == space_group(start) == 221
    np.testing.assert_array_equal(relaxed.atoms.cell, start.cell)
    assert relaxed.quality["displacement_max_A"] < 1e-6  # by symmetry, nothing can move in so small a cell
