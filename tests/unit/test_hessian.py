import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.vibrations import Vibrations
from fakes import Broken, Interrupted, Wrapped, blocks, exact_hessian
from phonopy import Phonopy
from phonopy.harmonic.dynmat_to_fc import get_commensurate_points
from phonopy.structure.atoms import PhonopyAtoms

from defectnet.config import Phonons
from defectnet.errors import PhysicsError
from defectnet.phonons.hessian import evaluate_forces, force_constants, reference_phonons, setup
from defectnet.phonons.modes import diagonalise
from defectnet.potentials.base import ForceModelCalculator
from defectnet.potentials.passes import OutOfMemoryError, Passes
from defectnet.supercells import expand
from defectnet.units import SQRT_EIGENVALUE_TO_MEV

ONE = np.eye(3, dtype=int)
SKEW = np.array([[2, 0, 1], [0, 2, 0], [-1, 1, 2]])
CUBE = np.array([[-1, 1, 1], [1, -1, 1], [1, 1, -1]])

pytestmark = pytest.mark.filterwarnings("ignore:Warning. Point group symmetries")


@pytest.fixture(scope="module")
def host():
    return bulk("NaCl", "rocksalt", a=6.03)


@pytest.fixture(scope="module")
def symmetric():
    """One Mg in a cube of 8 atoms: the point group of the cube is left."""
    atoms = bulk("NaCl", "rocksalt", a=6.03, cubic=True)
    atoms.symbols[0] = "Mg"
    return atoms


@pytest.fixture(scope="module")
def disordered(symmetric):
    """The same, rattled: no symmetry is left."""
    atoms = symmetric.copy()
    atoms.positions += np.random.default_rng(0).normal(0, 0.05, atoms.positions.shape)
    return atoms


def plain_phonopy(atoms, expansion, model, distance, **how):
    """phonopy as its manual uses it, with forces from an ASE calculator."""
    cell = PhonopyAtoms(
        symbols=list(atoms.symbols),
        scaled_positions=atoms.get_scaled_positions(wrap=False),
        cell=atoms.cell[:],
        masses=atoms.get_masses(),  # phonopy's own table differs in the fifth digit
    )
    primitive = how.pop("primitive_matrix", None)
    phonon = Phonopy(cell, np.transpose(expansion), primitive_matrix=primitive, log_level=0, **how.pop("cell", {}))
    phonon.generate_displacements(distance=distance, **how)
    forces = []
    for displaced in phonon.supercells_with_displacements:
        one = Atoms(displaced.symbols, scaled_positions=displaced.scaled_positions, cell=displaced.cell, pbc=True)
        one.calc = ForceModelCalculator(model)
        forces.append(one.get_forces())
    phonon.forces = forces
    phonon.produce_force_constants()
    phonon.symmetrize_force_constants()
    return phonon


def supercell(phonon):
    cell = phonon.supercell
    return Atoms(cell.symbols, scaled_positions=cell.scaled_positions, cell=cell.cell, pbc=True)


# --- agreement ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expansion", "tolerance"),
    # A skew supercell has less symmetry than its host: which of the host's operations carries a displacement to an
    # equivalent atom is then a matter of choice, and choices differ by the anharmonicity of the displacements.
    [(2 * ONE, 1e-10), (CUBE, 1e-10), (SKEW, 5e-5)],
    ids=["diagonal", "cube", "skew"],
)
def test_agrees_with_plain_phonopy_on_a_host(host, model, expansion, tolerance):
    ours = reference_phonons(host, expansion, model, Phonons(), 64).hessian
    theirs = plain_phonopy(host, expansion, model, 0.01, primitive_matrix=np.eye(3))
    assert ours.displacements == len(theirs.forces) < 6 * len(theirs.supercell)
    np.testing.assert_allclose(blocks(ours.matrix), theirs.force_constants, atol=tolerance)
    np.testing.assert_allclose(ours.compact, theirs.force_constants[theirs.primitive.p2s_map], atol=tolerance)


@pytest.mark.parametrize("cell", ["symmetric", "disordered"])
def test_agrees_with_plain_phonopy_on_a_doped_cell(cell, model, request):
    atoms = request.getfixturevalue(cell)
    ours = reference_phonons(atoms, ONE, model, Phonons(), 64).hessian
    theirs = plain_phonopy(atoms, ONE, model, 0.01, primitive_matrix=np.eye(3))
    np.testing.assert_allclose(blocks(ours.matrix), theirs.force_constants, atol=1e-10)


def test_symmetry_changes_nothing_but_the_number_of_displacements(symmetric, model):
    """Displacements differ in direction, so they agree as far as the crystal is harmonic."""
    ours = reference_phonons(symmetric, ONE, model, Phonons(displacement_A=1e-3), 64).hessian
    brute = plain_phonopy(
        symmetric, ONE, model, 1e-3, primitive_matrix=np.eye(3), is_diagonal=False, cell={"is_symmetry": False}
    )
    assert len(brute.forces) == 48
    assert ours.displacements <= 10
    np.testing.assert_allclose(blocks(ours.matrix), brute.force_constants, atol=2e-4)


def test_symmetric_cells_need_fewer_displacements(symmetric, disordered, host):
    def number(atoms, expansion):
        return len(setup(atoms, expansion, Phonons()).supercells_with_displacements)

    assert number(host, 2 * ONE) == 2  # one per element
    assert number(symmetric, ONE) < number(disordered, ONE) == 6 * 8


def test_forces_at_rest_do_not_count(symmetric, model):
    """Forces that a potential without inversion symmetry leaves where the crystal allows none."""
    phonon = setup(symmetric, ONE, Phonons())
    forces = evaluate_forces(phonon, model, 64)
    at_rest = np.random.default_rng(0).normal(0, 0.01, forces.shape[1:])
    exact = force_constants(phonon, forces).matrix
    np.testing.assert_allclose(force_constants(phonon, forces + at_rest, at_rest).matrix, exact, atol=1e-10)
    assert np.abs(force_constants(phonon, forces + at_rest).matrix - exact).max() > 0.1


@pytest.mark.parametrize("cell", ["symmetric", "disordered"])
def test_error_of_finite_differences_is_of_second_order(cell, model, request):
    atoms = request.getfixturevalue(cell)
    exact = exact_hessian(model, atoms)

    def error(length):
        hessian = reference_phonons(atoms, ONE, model, Phonons(displacement_A=length), 64).hessian.matrix
        return hessian - exact

    coarse, fine = error(0.02), error(0.01)
    assert np.abs(coarse).max() / np.abs(fine).max() == pytest.approx(4, rel=0.03)
    # Richardson: without the term of second order the exact second derivatives are left.
    assert np.abs(4 * fine - coarse).max() / 3 < 1e-4 * np.abs(exact).max()
    assert np.abs(fine).max() > 1e-6 * np.abs(exact).max()


@pytest.mark.parametrize("expansion", [2 * ONE, SKEW], ids=["diagonal", "skew"])
def test_host_agrees_with_exact_second_derivatives(host, model, expansion):
    phonon = setup(host, expansion, Phonons(displacement_A=1e-3))
    hessian = force_constants(phonon, evaluate_forces(phonon, model, 64))
    exact = exact_hessian(model, supercell(phonon))
    np.testing.assert_allclose(hessian.matrix, exact, atol=1e-5 * np.abs(exact).max())


def test_agrees_with_vibrations_of_ase(disordered, model, tmp_path):
    atoms = disordered.copy()
    atoms.calc = ForceModelCalculator(model)
    vibrations = Vibrations(atoms, delta=0.005, name=str(tmp_path / "vib"))
    vibrations.run()
    energies = vibrations.get_energies() * 1e3
    signed = np.sort(energies.real - energies.imag)
    signed = np.delete(signed, np.argsort(np.abs(signed))[:3])  # the translations
    ours = reference_phonons(disordered, ONE, model, Phonons(displacement_A=0.005), 64).modes
    np.testing.assert_allclose(ours.energies_meV, signed, rtol=2e-5, atol=1e-3)


def test_supercell_modes_are_the_commensurate_wave_vectors(host, model):
    ours = reference_phonons(host, SKEW, model, Phonons(), 64).modes
    phonon = plain_phonopy(host, SKEW, model, 0.01, primitive_matrix=np.eye(3))
    wave_vectors = get_commensurate_points(SKEW.T)
    assert len(wave_vectors) == round(np.linalg.det(SKEW))
    eigenvalues = [np.linalg.eigvalsh(phonon.get_dynamical_matrix_at_q(q)) for q in wave_vectors]
    eigenvalues = np.sort(np.concatenate(eigenvalues))
    acoustic = np.argsort(np.abs(eigenvalues))[:3]
    np.testing.assert_allclose(eigenvalues[acoustic], 0, atol=1e-10)
    rest = np.delete(eigenvalues, acoustic)
    expected = np.sign(rest) * np.sqrt(np.abs(rest)) * SQRT_EIGENVALUE_TO_MEV
    np.testing.assert_allclose(ours.energies_meV, expected, atol=1e-5)


@pytest.mark.parametrize("expansion", [CUBE, SKEW], ids=["cube", "skew"])
def test_undoped_supercell_has_the_modes_of_its_host(host, model, expansion):
    """The host's expansion and the cell that dopants are put in are one and the same crystal."""
    as_host = reference_phonons(host, expansion, model, Phonons(displacement_A=1e-3), 64)
    as_cell = reference_phonons(expand(host, expansion).atoms, ONE, model, Phonons(displacement_A=1e-3), 64)
    np.testing.assert_allclose(as_cell.modes.energies_meV, as_host.modes.energies_meV, atol=2e-3)
    np.testing.assert_allclose(as_cell.hessian.matrix, as_host.hessian.matrix, atol=1e-3)


def test_orientation_of_the_crystal_does_not_matter(symmetric, model):
    turned = symmetric.copy()
    turned.rotate(37, (1, 2, 3), rotate_cell=True)
    one = reference_phonons(symmetric, ONE, model, Phonons(), 64)
    other = reference_phonons(turned, ONE, model, Phonons(), 64)
    assert one.hessian.displacements == other.hessian.displacements
    np.testing.assert_allclose(one.modes.energies_meV, other.modes.energies_meV, atol=1e-5)


# --- contracts ----------------------------------------------------------------------------------------------------


def test_hessian_is_symmetric_and_ignores_translations(disordered, model):
    hessian = reference_phonons(disordered, ONE, model, Phonons(), 64).hessian
    np.testing.assert_allclose(hessian.matrix, hessian.matrix.T, atol=1e-12)
    np.testing.assert_allclose(blocks(hessian.matrix).sum(axis=1), 0, atol=1e-9)


def test_residual_measures_the_noise_of_the_forces(disordered, model):
    class Noisy(Wrapped):
        def changed(self, result):
            rng = np.random.default_rng(self.calls)
            for force in result.forces:
                force += rng.normal(0, 1e-4, force.shape)
            return result

    clean = reference_phonons(disordered, ONE, model, Phonons(), 64).quality["acoustic_residual_eV_per_A2"]
    noisy = reference_phonons(disordered, ONE, Noisy(model), Phonons(), 64).quality["acoustic_residual_eV_per_A2"]
    # The sum of 8 central differences has a standard deviation of sqrt(8 / 2) 1e-4 / 0.01 = 0.02 eV/Å².
    assert clean < 1e-8
    assert 0.02 < noisy < 0.2


def test_quality_counts_unstable_modes(host, model):
    stretched = host.copy()
    stretched.set_cell(host.cell * 1.15, scale_atoms=True)
    result = reference_phonons(stretched, CUBE, model, Phonons(), 64)
    phonon = setup(stretched, CUBE, Phonons())
    atoms = supercell(phonon)
    exact = diagonalise(exact_hessian(model, atoms), atoms.get_masses(), list(atoms.symbols)).energies_meV
    unstable = int((exact < -0.1).sum())
    assert unstable > 0
    assert result.quality["imaginary_modes"] == unstable
    assert result.quality["imaginary_weight"] == pytest.approx(unstable / (3 * 8 - 3))
    assert result.quality["energy_lowest_meV"] == pytest.approx(exact[0], abs=0.01)
    assert result.quality["displacements"] == result.hessian.displacements


@pytest.mark.parametrize(("atoms_per_pass", "copies"), [(1, 1), (8, 1), (20, 2), (10_000, 48), ("auto", 4)])
def test_forces_do_not_depend_on_the_size_of_a_pass(disordered, model, atoms_per_pass, copies):
    phonon = setup(disordered, ONE, Phonons())
    counting = Wrapped(model)
    forces = evaluate_forces(phonon, counting, atoms_per_pass)
    np.testing.assert_array_equal(forces, evaluate_forces(phonon, model, 64))
    assert len(counting.structures) == 48
    assert counting.calls == 48 / copies


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("after", [0, 3])
def test_forces_that_are_not_finite_are_refused(disordered, model, value, after, tmp_path):
    broken = Broken(model, value, after)
    with pytest.raises(PhysicsError, match="not finite"):
        reference_phonons(disordered, ONE, broken, Phonons(), 64)
    with pytest.raises(PhysicsError, match="not finite"):
        reference_phonons(disordered, ONE, Broken(model, value, after), Phonons(), 64, tmp_path / "forces.npy")


# --- size of a pass -----------------------------------------------------------------------------------------------


class Small(Wrapped):
    """Has memory for ``fits`` copies."""

    class OutOfMemoryError(RuntimeError):
        """Stands for torch's."""

    def __init__(self, inner, fits, error=None):
        super().__init__(inner)
        self.fits, self.error = fits, error or self.OutOfMemoryError("CUDA memory is full")
        self.sizes = []

    def forces_of_displaced(self, atoms, displacements):
        self.sizes.append(len(displacements))
        if len(displacements) > self.fits:
            raise self.error
        return super().forces_of_displaced(atoms, displacements)


class Meter:
    """Memory in which the last pass of ``model`` needed ``fixed + copies * per_copy`` bytes."""

    def __init__(self, model, fixed, per_copy, free):
        self.model, self.fixed, self.per_copy, self.left = model, fixed, per_copy, free
        self.watched = self.released = 0

    def watch(self):
        self.watched += 1

    def peak(self):
        return self.fixed + self.model.sizes[-1] * self.per_copy

    def free(self):
        return self.left

    def release(self):
        self.released += 1


@pytest.mark.parametrize(("n", "copies"), [(1, 32), (8, 4), (31, 2), (32, 1), (33, 1), (500, 1)])
def test_auto_takes_32_atoms_on_a_cpu(model, n, copies):
    assert Passes(model, Atoms(f"H{n}"), "auto").copies == copies


@pytest.mark.parametrize(("n", "copies"), [(8, 8), (20, 3), (64, 1), (65, 1)])
def test_a_number_of_atoms_is_a_limit(model, n, copies):
    assert Passes(model, Atoms(f"H{n}"), 64).copies == copies


@pytest.fixture
def pushes():
    directions = np.random.default_rng(4).normal(size=(30, 8, 3))
    return 0.01 * directions / np.linalg.norm(directions, axis=-1, keepdims=True)


def in_passes(passes, displacements):
    forces, first = [], 0
    while first < len(displacements):
        forces.append(passes.forces(displacements[first : first + passes.copies]))
        first += len(forces[-1])
    return np.concatenate(forces)


@pytest.mark.parametrize(
    ("fits", "sizes"),
    [
        (30, [1, 2, 16, 11]),  # 80 % of 1000 bytes hold 16 copies of 50
        (16, [1, 2, 16, 11]),
        (10, [1, 2, 16, 8, 8, 8, 3]),
        (3, [1, 2, 16, 8, 4, *[2] * 13, 1]),
        (1, [1, 2, *[1] * 29]),
    ],
)
def test_probing_fills_the_memory_and_halving_corrects_it(disordered, model, pushes, fits, sizes):
    small = Small(model, fits)
    meter = Meter(small, fixed=700, per_copy=50, free=1000)
    forces = in_passes(Passes(small, disordered, "auto", meter), pushes)
    np.testing.assert_array_equal(forces, model.forces_of_displaced(disordered, pushes))
    assert small.sizes == sizes
    assert len(small.structures) == 30  # nothing that fitted was computed twice
    assert meter.watched == 2
    assert meter.released == len([size for size in sizes if size > fits])


@pytest.mark.parametrize(("per_copy", "free", "then"), [(0, 1000, 27), (50, 10, 1)])
def test_probing_survives_odd_measurements(disordered, model, pushes, per_copy, free, then):
    small = Small(model, 30)
    in_passes(Passes(small, disordered, "auto", Meter(small, 700, per_copy, free)), pushes)
    assert small.sizes[:3] == [1, 2, then]


def test_a_number_of_atoms_is_not_probed_but_halved(disordered, model, pushes):
    small = Small(model, 10)
    meter = Meter(small, 700, 50, 1000)
    in_passes(Passes(small, disordered, 160, meter), pushes)
    assert small.sizes == [20, *[10] * 3]
    assert (meter.watched, meter.released) == (0, 1)


ERRORS = [Small.OutOfMemoryError("CUDA memory is full"), RuntimeError("TorchScript: RuntimeError: CUDA out of memory")]


@pytest.mark.parametrize("error", ERRORS, ids=["torch", "TorchScript"])
def test_memory_that_runs_out_is_recognised(disordered, model, pushes, error, tmp_path):
    small = Small(model, 4, error)
    Passes(small, disordered, 64).forces(pushes[:8])
    assert small.sizes == [8, 4, 4]
    with pytest.raises(OutOfMemoryError, match=f"{error}; not even one structure of 8 atoms fits"):
        evaluate_forces(setup(disordered, ONE, Phonons()), Small(model, 0, error), 64, tmp_path / "forces.npy")


def test_other_errors_are_not_tried_again(disordered, model, pushes):
    class Broken(Wrapped):
        def forces_of_displaced(self, atoms, displacements):
            self.calls += 1
            raise RuntimeError("no kernel")

    broken = Broken(model)
    with pytest.raises(RuntimeError, match="no kernel"):
        Passes(broken, disordered, 64).forces(pushes)
    assert broken.calls == 1


def test_rows_survive_passes_that_do_not_fit(disordered, model, tmp_path):
    """Killed after memory had run out: what was written is whole."""

    class Killed(Small):
        def changed(self, result):
            if self.calls > 5:
                raise KeyboardInterrupt
            return result

    phonon, checkpoint = setup(disordered, ONE, Phonons()), tmp_path / "forces.npy"
    with pytest.raises(KeyboardInterrupt):
        evaluate_forces(phonon, Killed(model, 5), 64, checkpoint)  # a pass of 8 that took two, then passes of 4
    rest = Wrapped(model)
    np.testing.assert_array_equal(evaluate_forces(phonon, rest, 64, checkpoint), evaluate_forces(phonon, model, 64))
    assert len(rest.structures) == 48 - 5 * 4


# --- checkpoint ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def phonon(disordered):
    return setup(disordered, ONE, Phonons())


@pytest.fixture(scope="module")
def complete(phonon, model):
    return evaluate_forces(phonon, model, 64)


@pytest.mark.parametrize("after", [0, 1, 4])
def test_interrupted_work_goes_on_where_it_stopped(phonon, complete, model, tmp_path, after):
    checkpoint = tmp_path / "new" / "forces.npy"
    with pytest.raises(KeyboardInterrupt):
        evaluate_forces(phonon, Interrupted(model, after), 64, checkpoint)
    rest = Wrapped(model)
    forces = evaluate_forces(phonon, rest, 64, checkpoint)
    np.testing.assert_array_equal(forces, complete)
    assert len(rest.structures) == 48 - 8 * after
    # The rows that were left are the ones that were computed.
    left = [atoms.positions for atoms in rest.structures]
    expected = [cell.positions for cell in phonon.supercells_with_displacements[8 * after :]]
    np.testing.assert_allclose(left, expected, atol=1e-12)


def test_finished_work_is_not_repeated(phonon, complete, model, tmp_path):
    evaluate_forces(phonon, model, 64, tmp_path / "forces.npy")
    again = Wrapped(model)
    np.testing.assert_array_equal(evaluate_forces(phonon, again, 64, tmp_path / "forces.npy"), complete)
    assert again.calls == 0


@pytest.mark.parametrize(
    "left",
    [
        b"",
        b"\x93NUMPY\x01\x00",
        b"not an array at all" * 50,
        np.zeros((3, 8, 3)),
        np.zeros((48, 24)),
    ],
    ids=["empty", "torn header", "foreign", "fewer rows", "other shape"],
)
def test_unusable_checkpoint_is_replaced(phonon, complete, model, tmp_path, left):
    checkpoint = tmp_path / "forces.npy"
    if isinstance(left, bytes):
        checkpoint.write_bytes(left)
    else:
        np.save(checkpoint, left)
    counting = Wrapped(model)
    np.testing.assert_array_equal(evaluate_forces(phonon, counting, 64, checkpoint), complete)
    assert len(counting.structures) == 48
    again = Wrapped(model)
    np.testing.assert_array_equal(evaluate_forces(phonon, again, 64, checkpoint), complete)
    assert again.calls == 0


def test_what_another_copy_of_the_job_does_to_the_checkpoint_changes_no_forces(phonon, complete, model, tmp_path):
    checkpoint = tmp_path / "forces.npy"

    class Disturbed(Wrapped):
        def changed(self, evaluation):
            if self.calls == 2:
                kept = np.lib.format.open_memmap(checkpoint, mode="r+")
                kept[:] = np.nan
                kept.flush()
            if self.calls == 4:
                checkpoint.unlink()
            return evaluation

    np.testing.assert_array_equal(evaluate_forces(phonon, Disturbed(model), 64, checkpoint), complete)


def test_truncated_checkpoint_gives_no_wrong_forces(phonon, complete, model, tmp_path):
    checkpoint = tmp_path / "forces.npy"
    evaluate_forces(phonon, model, 64, checkpoint)
    data = checkpoint.read_bytes()
    checkpoint.write_bytes(data[: len(data) // 2])
    np.testing.assert_array_equal(evaluate_forces(phonon, model, 64, checkpoint), complete)


def test_checkpoint_that_was_killed_while_it_was_created_gives_no_wrong_forces(phonon, complete, model, tmp_path):
    checkpoint = tmp_path / "forces.npy"
    np.lib.format.open_memmap(checkpoint, mode="w+", dtype=float, shape=complete.shape).flush()
    np.testing.assert_array_equal(evaluate_forces(phonon, model, 64, checkpoint), complete)
