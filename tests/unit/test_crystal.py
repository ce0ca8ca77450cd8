"""Addresses of atoms, their symmetry, and force constants folded from one supercell into another."""

from itertools import product

import numpy as np
import pytest
import spglib
from ase import Atoms
from ase.build import bulk
from ase.spacegroup import crystal
from fakes import blocks as as_blocks
from fakes import exact_hessian
from hypothesis import given, settings
from hypothesis import strategies as st

from defectnet.config import Phonons
from defectnet.phonons.blocks import Blocks, fold, unfold
from defectnet.phonons.crystal import Folding, space_group
from defectnet.phonons.hessian import reference_phonons
from defectnet.supercells import expand, expansion_matrix

RUTILE = crystal(
    ["Mg", "F"], [(0, 0, 0), (0.31, 0.31, 0)], spacegroup=136, cellpar=[4.5, 4.5, 3.2, 90, 90, 90], primitive_cell=True
)
MONOCLINIC = crystal(["Na", "Cl"], [(0.1, 0.2, 0.3), (0.4, 0.15, 0.8)], spacegroup=14, cellpar=[5, 6, 7, 90, 105, 90])
OUTSIDE = RUTILE.copy()  # the same crystal, its atoms in other cells
OUTSIDE.positions += np.array([[0, 0, 0], [2, -1, 0], [0, 0, -3], [1, 1, 1], [-1, 0, 0], [0, 4, 0]]) @ RUTILE.cell.array
HOSTS = {  # with the order of the space group modulo the lattice translations of the cell
    "fcc": (48, bulk("Cu", "fcc", a=3.6)),
    "rock salt": (48, bulk("NaCl", "rocksalt", a=5.64)),
    "conventional": (192, bulk("NaCl", "rocksalt", a=5.64, cubic=True)),
    "wurtzite": (12, bulk("ZnO", "wurtzite", a=3.25, c=5.2, u=0.382)),
    "rutile": (16, RUTILE),
    "outside": (16, OUTSIDE),
    "monoclinic": (4, MONOCLINIC),
    "triclinic": (1, Atoms("HHeLi", scaled_positions=[(0, 0, 0), (0.3, 0.4, 0.1), (0.6, 0.2, 0.7)], cell=[3, 4, 5])),
}
SKEW = np.array([[2, 0, 1], [0, 2, 0], [-1, 1, 2]])
CUBE = np.array([[-1, 1, 1], [1, -1, 1], [1, 1, -1]])

hosts = st.sampled_from(sorted(HOSTS)).map(lambda name: HOSTS[name][1])
shears = st.lists(st.integers(-3, 3), min_size=9, max_size=9).map(lambda entries: np.reshape(entries, (3, 3)))
sizes = st.sampled_from([(1, 1, 1), (2, 1, 1), (1, 1, 3), (2, 2, 1)])
# Determinants of 1 to 4 in any shape, most of them far from reduced.
matrices = st.builds(
    lambda size, shear: (np.diag(size) + np.triu(shear, 1)) @ (np.eye(3, dtype=int) + np.tril(shear, -1)), sizes, shears
)
few = settings(deadline=None, max_examples=10)


def symmetric(n, seed=0):
    matrix = np.random.default_rng(seed).normal(size=(3 * n, 3 * n))
    return matrix + matrix.T


def refold(blocks, folding):
    hessian = np.zeros((3 * len(folding), 3 * len(folding)))
    fold(blocks, folding, hessian)
    return hessian


# --- symmetry -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTS)
def test_operations_move_addresses_as_they_move_points(name):
    order, primitive = HOSTS[name]
    group = space_group(primitive)
    assert len(group.rotations) == order
    rng = np.random.default_rng(0)
    atoms, lattice = rng.integers(0, len(primitive), 30), rng.integers(-3, 4, (30, 3))

    def points(atoms, lattice):
        return primitive.positions[atoms] + lattice @ primitive.cell.array

    for operation, rotation in enumerate(group.cartesian):
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-9)
        assert sorted(group.images[operation]) == list(range(len(primitive)))
        after = group.carry(operation, atoms, lattice)
        np.testing.assert_array_equal(primitive.numbers[after[0]], primitive.numbers[atoms])
        # What is left is one translation for all atoms.
        translations = points(*after) - points(atoms, lattice) @ rotation.T
        np.testing.assert_allclose(translations, translations[[0] * 30], atol=1e-6)


@pytest.mark.parametrize("name", HOSTS)
def test_sites_are_the_orbits_of_spglib(name):
    primitive = HOSTS[name][1]
    dataset = spglib.get_symmetry_dataset((primitive.cell.array, primitive.get_scaled_positions(), primitive.numbers))
    np.testing.assert_array_equal(space_group(primitive).sites, dataset.equivalent_atoms)


# --- foldings -----------------------------------------------------------------------------------------------------


@few
@given(primitive=hosts, matrix=matrices, far=shears)
def test_addresses_are_periodic_and_name_every_atom_once(primitive, matrix, far):
    folding = Folding.of(primitive, matrix)
    np.testing.assert_array_equal(folding.atoms.positions, expand(primitive, matrix).atoms.positions)
    points = primitive.positions[folding.parent] + folding.lattice @ primitive.cell.array
    np.testing.assert_allclose(points, folding.atoms.positions, atol=1e-9)
    for steps in (np.zeros((3, 3), int), np.eye(3, dtype=int), far):
        for period in steps @ matrix:
            found = folding.index(folding.parent, folding.lattice + period)
            np.testing.assert_array_equal(found, np.arange(len(folding)))


@few
@given(primitive=hosts, matrix=matrices, lattice=shears)
def test_an_address_folds_onto_the_atom_that_is_there(primitive, matrix, lattice):
    folding = Folding.of(primitive, matrix)
    parents = np.arange(3) % len(primitive)
    points = primitive.positions[parents] + lattice @ primitive.cell.array
    atoms = folding.atoms[folding.index(parents, lattice)]
    apart = np.linalg.solve(folding.atoms.cell.array.T, (atoms.positions - points).T)
    np.testing.assert_allclose(apart, apart.round(), atol=1e-9)
    np.testing.assert_array_equal(atoms.numbers, primitive.numbers[parents])


@few
@given(primitive=hosts, matrix=matrices)
def test_operations_that_keep_a_supercell(primitive, matrix):
    folding = Folding.of(primitive, matrix)
    for rotation in space_group(primitive).rotations:
        turned = matrix @ rotation.T @ np.linalg.inv(matrix)
        assert folding.kept_by(rotation) == bool((np.abs(turned - turned.round()) < 1e-6).all())


@pytest.mark.filterwarnings("ignore:Warning. Point group symmetries")
@pytest.mark.parametrize("matrix", [CUBE, SKEW, "chosen"], ids=["cube", "skew", "chosen"])
def test_hessian_of_a_host_from_the_rows_of_its_primitive_cell(model, matrix):
    primitive = bulk("NaCl", "rocksalt", a=6.03)
    if isinstance(matrix, str):
        matrix = expansion_matrix(primitive.cell.array, 2, 14, 18)
    hessian = reference_phonons(primitive, matrix, model, Phonons(), 64).hessian
    np.testing.assert_allclose(Folding.of(primitive, matrix).hessian(hessian.compact), hessian.matrix, atol=1e-12)


# --- force constants ----------------------------------------------------------------------------------------------


@few
@given(primitive=hosts, matrix=matrices, pick=st.integers(0, 1000))
def test_any_symmetric_matrix_folds_back_into_its_supercell(primitive, matrix, pick):
    folding = Folding.of(primitive, matrix)
    hessian = symmetric(len(folding))
    origin = pick % len(folding)
    blocks = unfold(folding, origin, hessian, 0)
    back = np.append(0, folding.lattice[origin])  # blocks count from the origin
    moved = Blocks(blocks.first + back, blocks.second + back, blocks.values)
    np.testing.assert_allclose(refold(moved, folding), hessian, atol=1e-12)


@few
@given(primitive=hosts, matrix=matrices)
def test_each_pair_is_unfolded_to_its_nearest_images(primitive, matrix):
    folding = Folding.of(primitive, matrix)
    blocks = unfold(folding, 0, symmetric(len(folding)), 0)
    first, second = (primitive.positions[a[:, 0]] + a[:, 1:] @ primitive.cell for a in (blocks.first, blocks.second))
    i, j = (folding.index(a[:, 0], a[:, 1:]) for a in (blocks.first, blocks.second))
    # All images, because ASE's get_distances misses the nearest one in some skewed cells.
    reduced = spglib.niggli_reduce(folding.atoms.cell.array)
    images = np.array(list(product(range(-2, 3), repeat=3))) @ reduced
    between = folding.atoms.positions[j] - folding.atoms.positions[i]
    between -= np.round(between @ np.linalg.inv(reduced)) @ reduced
    nearest = np.linalg.norm(between[:, None] + images, axis=2).min(axis=1)
    np.testing.assert_allclose(np.linalg.norm(second - first, axis=1), nearest, atol=2e-3)


def test_tolerance_bounds_the_error_and_keeps_the_acoustic_sum():
    folding = Folding.of(HOSTS["rock salt"][1], SKEW)
    n = len(folding)
    spread = np.exp(-np.arange(n)[:, None] - np.arange(n))  # blocks of all magnitudes
    hessian = symmetric(n) * np.kron(spread, np.ones((3, 3)))
    exact = unfold(folding, 0, hessian, 0)
    previous = len(exact)
    for tolerance in (1e-12, 1e-8, 1e-4):
        blocks = unfold(folding, 0, hessian, tolerance)
        assert len(blocks) < previous
        previous = len(blocks)
        cut = refold(blocks, folding)
        error = as_blocks(cut - hessian)
        off_diagonal = ~np.eye(n, dtype=bool)
        assert 0 < np.abs(error[off_diagonal]).max() < tolerance
        assert np.abs(error).max() < n * tolerance
        np.testing.assert_array_equal(cut, cut.T)
        # A symmetric matrix can take over the symmetric part of what was cut off.
        sums = error.sum(axis=1)
        np.testing.assert_allclose(sums + sums.transpose(0, 2, 1), 0, atol=1e-15)


def changed_by(dopant, primitive, matrix, model):
    """Change of the Hessian when atom 0 of a supercell is replaced and nothing moves."""
    folding = Folding.of(primitive, matrix)
    doped = folding.atoms.copy()
    doped.symbols[0] = dopant
    return folding, exact_hessian(model, doped) - exact_hessian(model, folding.atoms)


def test_unfolded_blocks_have_the_site_symmetry(model):
    primitive = bulk("NaCl", "rocksalt", a=5.64)
    folding, change = changed_by("K", primitive, 2 * np.eye(3, dtype=int), model)
    group, blocks = space_group(primitive), unfold(folding, 0, change, 0)
    larger = Folding.of(primitive, 5 * np.eye(3, dtype=int))
    expected = refold(blocks, larger)
    for operation, rotation in enumerate(group.cartesian):
        back = np.append(0, group.shifts[operation, 0])  # the site stays where it is
        ends = [
            np.column_stack(group.carry(operation, end[:, 0], end[:, 1:])) - back
            for end in (blocks.first, blocks.second)
        ]
        turned = refold(Blocks(*ends, rotation @ blocks.values @ rotation.T), larger)
        np.testing.assert_allclose(turned, expected, atol=1e-10)


@pytest.mark.parametrize(
    "matrix", [np.diag([3, 3, 4]), [[3, 0, 0], [1, 3, 0], [0, -1, 3]], [[0, 0, 3], [3, 0, 1], [1, 3, 0]]]
)
def test_a_short_ranged_change_folds_into_any_supercell(model, matrix):
    """Where no pair of the potential (6 Å) reaches half way to an image (12.3 Å), nothing is lost."""
    primitive = Atoms("Cu", cell=[4.1, 4.1, 4.1], pbc=True)
    folding, change = changed_by("Zn", primitive, 3 * np.eye(3, dtype=int), model)
    other, expected = changed_by("Zn", primitive, np.array(matrix), model)
    assert np.abs(expected).max() > 1e-3
    blocks = unfold(folding, 0, change, 1e-12)
    np.testing.assert_allclose(refold(blocks, other), expected, atol=1e-10)
