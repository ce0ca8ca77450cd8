import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.data import atomic_numbers, covalent_radii
from fakes import exact_hessian, rock_salt

from defectnet.batches import atoms_of
from defectnet.config import Phonons, Potential, Relaxation
from defectnet.errors import PhysicsError
from defectnet.phonons.hessian import reference_phonons
from defectnet.potentials import ForceModel, HasHessianVectorProduct, LazyModel, identify, load
from defectnet.potentials.analytic import CUTOFF_A, DEPTH_eV
from defectnet.potentials.base import ForceModelCalculator
from defectnet.relaxation import relax_host


@pytest.fixture(scope="module")
def crystal():
    """A doped, sheared and rattled cell of 8 atoms: no symmetry hides an error."""
    atoms = bulk("NaCl", "rocksalt", a=5.5, cubic=True)
    atoms.symbols[[0, 5]] = ["Mg", "S"]
    strain = np.array([[0.02, 0.03, -0.01], [0, -0.03, 0.02], [0.01, 0, 0.01]])
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
    atoms.positions += np.random.default_rng(5).normal(0, 0.1, atoms.positions.shape)
    return atoms


def energy(model, atoms):
    return model.evaluate([atoms]).energies[0]


def moved(atoms, atom, axis, length):
    atoms = atoms.copy()
    atoms.positions[atom, axis] += length
    return atoms


def strained(atoms, strain):
    atoms = atoms.copy()
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
    return atoms


def test_forces_are_the_slope_of_the_energy(model, crystal):
    forces = model.evaluate([crystal]).forces[0]
    assert forces.shape == (8, 3)
    assert np.abs(forces).max() > 0.1
    step = 1e-4
    for atom in range(8):
        for axis in range(3):
            up, down = (energy(model, moved(crystal, atom, axis, s)) for s in (step, -step))
            assert forces[atom, axis] == pytest.approx(-(up - down) / 2 / step, abs=1e-6)


def test_stress_is_the_slope_of_the_energy_under_strain(model, crystal):
    stress = model.evaluate([crystal]).stresses[0]
    np.testing.assert_allclose(stress, stress.T, atol=1e-12)
    step = 1e-4
    for i in range(3):
        for j in range(3):
            strain = np.zeros((3, 3))
            strain[i, j] = step
            slope = (energy(model, strained(crystal, strain)) - energy(model, strained(crystal, -strain))) / 2 / step
            assert stress[i, j] == pytest.approx(slope / crystal.get_volume(), abs=1e-7)


def test_stress_is_positive_under_tension(model):
    compressed, stretched = (bulk("Cu", "fcc", a=a) for a in (4.5, 5.8))
    result = model.evaluate([compressed, stretched])
    assert np.trace(result.stresses[0]) < 0 < np.trace(result.stresses[1])


def test_hessian_vector_products_are_the_slope_of_the_forces(model, crystal):
    vectors = np.random.default_rng(1).normal(size=(3, 8, 3))
    products = model.hessian_vector_products(crystal, vectors)
    step = 1e-4
    for vector, product in zip(vectors, products, strict=True):
        up, down = crystal.copy(), crystal.copy()
        up.positions += step * vector
        down.positions -= step * vector
        forces = model.evaluate([up, down]).forces
        np.testing.assert_allclose(product, -(forces[0] - forces[1]) / 2 / step, atol=1e-5)


def test_exact_hessian_is_symmetric_and_ignores_translations(model, crystal):
    hessian = exact_hessian(model, crystal)
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-11)
    np.testing.assert_allclose(hessian.reshape(24, 8, 3).sum(axis=1), 0, atol=1e-11)


def test_no_net_force_and_no_torque_on_a_cluster(model):
    atoms = Atoms("NaClMgO", np.random.default_rng(2).uniform(0, 4, (4, 3)), cell=[40, 40, 40], pbc=True)
    force = model.evaluate([atoms]).forces[0]
    np.testing.assert_allclose(force.sum(axis=0), 0, atol=1e-11)
    np.testing.assert_allclose(np.cross(atoms.positions, force).sum(axis=0), 0, atol=1e-10)


def test_energy_is_smooth_where_pairs_enter_the_cutoff(model):
    """The potential and its slope vanish at the cutoff."""

    def pair(distance):
        return Atoms("KCl", [[0, 0, 0], [distance, 0, 0]], cell=[40, 40, 40], pbc=True)

    inside, outside = model.evaluate([pair(CUTOFF_A - 1e-3), pair(CUTOFF_A + 1e-3)]).energies
    assert outside == 0
    assert abs(inside) < 1e-9
    assert abs(model.evaluate([pair(CUTOFF_A - 1e-3)]).forces[0]).max() < 1e-5


def test_bond_length_is_the_sum_of_covalent_radii(model):
    def pair(distance):
        return Atoms("HF", [[0, 0, 0], [distance, 0, 0]], cell=[40, 40, 40], pbc=True)

    lengths = np.linspace(0.7, 1.1, 81)
    energies = model.evaluate([pair(length) for length in lengths]).energies
    expected = covalent_radii[atomic_numbers["H"]] + covalent_radii[atomic_numbers["F"]]
    assert lengths[energies.argmin()] == pytest.approx(expected, abs=0.05)  # the cutoff moves it a little
    assert energies.min() == pytest.approx(-DEPTH_eV, rel=0.15)


def test_structures_in_one_pass_do_not_see_each_other(model, crystal):
    other = bulk("MgO", "rocksalt", a=4.3)
    together = model.evaluate([crystal, other, crystal])
    for i, atoms in enumerate([crystal, other, crystal]):
        alone = model.evaluate([atoms])
        assert together.energies[i] == alone.energies[0]
        np.testing.assert_array_equal(together.forces[i], alone.forces[0])
        np.testing.assert_array_equal(together.stresses[i], alone.stresses[0])


@pytest.fixture
def displacements():
    return np.random.default_rng(6).uniform(-0.05, 0.05, (5, 8, 3))


def alone(model, atoms, displacements):
    """Forces [K, N, 3] of the copies as structures of their own."""
    structures = []
    for displacement in displacements:
        structures.append(atoms.copy())
        structures[-1].positions += displacement
    return np.array(model.evaluate(structures).forces)


def test_displaced_copies_are_structures_of_their_own(model, crystal, displacements):
    forces = model.forces_of_displaced(crystal, displacements)
    np.testing.assert_allclose(forces, alone(model, crystal, displacements), atol=1e-13)


def test_displaced_copies_find_pairs_that_enter_the_cutoff(model):
    """Both atoms move, which needs a skin of twice their displacement."""
    pair = Atoms("KCl", [[0, 0, 0], [CUTOFF_A + 0.15, 0, 0]], cell=[40, 40, 40], pbc=True)
    towards = np.array([[[0.1, 0, 0], [-0.1, 0, 0]]])
    forces = model.forces_of_displaced(pair, np.concatenate([towards, 0 * towards]))
    assert np.abs(forces[0]).max() > 1e-6
    np.testing.assert_allclose(forces[0], alone(model, pair, towards)[0], atol=1e-15)
    np.testing.assert_array_equal(forces[1], 0)


def test_neighbour_list_serves_one_structure(crystal, displacements):
    fresh = load(Potential(name="analytic"))
    built = []
    build = fresh._skinned._build
    fresh._skinned._build = lambda atoms, skin: built.append(skin) or build(atoms, skin)
    other = crystal.copy()
    other.set_cell(crystal.cell * 1.001)
    for atoms, factor, count in (
        (crystal, 1, 1),
        (crystal.copy(), 1 + 1e-9, 1),  # the same, moved as far
        (crystal, 1.5, 2),
        (crystal, 0.5, 3),  # shorter, but the bits of the forces must not depend on the past
        (other, 1, 4),
    ):
        forces = fresh.forces_of_displaced(atoms, factor * displacements)
        np.testing.assert_allclose(forces, alone(fresh, atoms, factor * displacements), atol=1e-13)
        assert len(built) == count
        assert built[-1] >= 2 * factor * np.linalg.norm(displacements, axis=-1).max()


def test_energy_per_cell_does_not_depend_on_the_cell(model):
    primitive = bulk("NaCl", "rocksalt", a=5.6)
    cubic = bulk("NaCl", "rocksalt", a=5.6, cubic=True)
    assert energy(model, cubic) == pytest.approx(4 * energy(model, primitive), rel=1e-12)
    assert energy(model, primitive.repeat((1, 2, 3))) == pytest.approx(6 * energy(model, primitive), rel=1e-12)


def test_unknown_element_is_named(model):
    with pytest.raises(PhysicsError, match="La"):
        model.evaluate([bulk("LaN", "rocksalt", a=5.3)])
    with pytest.raises(PhysicsError, match="La"):
        model.forces_of_displaced(bulk("LaN", "rocksalt", a=5.3), np.zeros((1, 2, 3)))


def test_calculator_gives_ase_what_ase_expects(model, crystal):
    atoms = crystal.copy()
    atoms.calc = ForceModelCalculator(model)
    result = model.evaluate([crystal])
    assert atoms.get_potential_energy() == result.energies[0]
    np.testing.assert_array_equal(atoms.get_forces(), result.forces[0])
    # ASE builds the matrix from its own Voigt order.
    np.testing.assert_allclose(atoms.get_stress(voigt=False), result.stresses[0], atol=1e-15)
    xx, yy, zz, yz, xz, xy = atoms.get_stress()
    stress = result.stresses[0]
    assert (xx, yy, zz) == tuple(np.diag(stress))
    assert (yz, xz, xy) == (stress[1, 2], stress[0, 2], stress[0, 1])
    assert len({yz, xz, xy}) == 3
    assert atoms.calc.evaluations == 1
    atoms.positions[0, 0] += 0.01
    atoms.get_forces()
    assert atoms.calc.evaluations == 2


def test_meets_the_protocols(model):
    assert isinstance(model, HasHessianVectorProduct)
    protocol = set(ForceModel.__annotations__) | {"evaluate", "forces_of_displaced"}
    assert not [name for name in protocol if not hasattr(model, name)]


def test_identity_is_known_before_loading(model):
    lazy = LazyModel(Potential(name="analytic"))
    assert "model" not in vars(lazy)
    assert lazy.identity == identify(Potential(name="analytic")) == model.identity
    assert lazy.model.identity == lazy.identity
    assert lazy.model is lazy.model


@pytest.mark.parametrize(("cation", "anion", "a"), [("Na", "Cl", 5.64), ("Mg", "O", 4.21), ("Ca", "S", 5.69)])
def test_rock_salt_is_stable_near_its_lattice_constant(model, cation, anion, a):
    start = atoms_of(rock_salt(cation + anion, cation, anion, a))
    relaxed = relax_host(start, model, Relaxation())
    phonons = reference_phonons(relaxed.atoms, 2 * np.eye(3, dtype=int), model, Phonons(), 64)
    assert abs(relaxed.quality["volume_change"]) < 0.25
    assert phonons.quality["imaginary_modes"] == 0
