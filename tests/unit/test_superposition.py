"""Arrangements of dopants as sums of single defects, with defects made up exactly and with computed ones."""

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.neighborlist import neighbor_list
from fakes import blocks as as_blocks
from fakes import exact_hessian
from test_crystal import MONOCLINIC, RUTILE, changed_by

from defectnet.config import Phonons, Relaxation
from defectnet.errors import PhysicsError
from defectnet.phonons.blocks import Blocks, unfold
from defectnet.phonons.crystal import Folding, space_group
from defectnet.phonons.hessian import reference_phonons
from defectnet.phonons.library import single_defect
from defectnet.phonons.modes import diagonalise
from defectnet.phonons.superposition import Defect, Superposition
from defectnet.relaxation import relax_defect, relax_host
from defectnet.supercells import Plan, apply

ONE = np.eye(3, dtype=int)
SALT = bulk("NaCl", "rocksalt", a=5.64)
CUBE = np.array([[-1, 1, 1], [1, -1, 1], [1, 1, -1]])
TIGHT, FINE = Relaxation(fmax_eV_per_A=1e-4), Phonons(displacement_A=1e-3)

# --- made up: a defect that pushes everything within 3.3 Å, and stiffens how these atoms move together --------------

REACH_A = 3.3


def push(symbol, dopant, vector):
    """[3] any function of a neighbour's element and distance, times the vector that leads there."""
    return 10 * len(dopant + symbol) * np.exp(-np.linalg.norm(vector) * len(symbol)) * vector


def made_up(primitive, site, dopant):
    """ΔH = w wᵀ with w_i the pushes, which has blocks of every kind; Σ w = 0 keeps the acoustic sum rule."""
    addresses, pushes = [], []
    i, j, vectors, cells = neighbor_list("ijDS", primitive, REACH_A)
    for k in np.flatnonzero(i == site):
        addresses.append([j[k], *cells[k]])
        pushes.append(push(primitive.symbols[j[k]], dopant, vectors[k]))
    addresses, pushes = np.array([[site, 0, 0, 0], *addresses]), np.array([-np.sum(pushes, axis=0), *pushes])
    first, second = np.triu_indices(len(pushes))
    values = pushes[first][:, :, None] * pushes[second][:, None]
    shifts = np.abs(pushes).sum(axis=1, keepdims=True) * pushes
    return Defect(site, dopant, addresses, shifts, Blocks(addresses[first], addresses[second], values))


def expected(folding, plan):
    """The same in Cartesian terms, around the actual atoms: displacements [N, 3] and ΔH [3N, 3N]."""
    i, j, vectors = neighbor_list("ijD", folding.atoms, REACH_A)
    displacements, change = np.zeros((len(folding), 3)), 0
    for atom, dopant in zip(plan.sites, plan.dopants, strict=True):
        near = np.flatnonzero(i == atom)
        pushes = np.array([push(folding.atoms.symbols[j[k]], dopant, vectors[k]) for k in near])
        pushes, where = np.array([*pushes, -pushes.sum(axis=0)]), [*j[near], atom]
        folded = np.zeros((len(folding), 3))
        np.add.at(folded, where, pushes)
        np.add.at(displacements, where, np.abs(pushes).sum(axis=1, keepdims=True) * pushes)
        change = change + np.outer(folded, folded)
    return displacements - displacements.mean(axis=0), change


def superposition_of(primitive, matrix):
    dopants = {"Na": ["Li", "K"], "Cl": ["F"], "Mg": ["Zn", "Be"], "F": ["O"]}
    sites = sorted(set(space_group(primitive).sites.tolist()))
    defects = [made_up(primitive, site, dopant) for site in sites for dopant in dopants[primitive.symbols[site]]]
    rows = len(primitive) * abs(round(np.linalg.det(matrix)))
    return Superposition(primitive, np.array(matrix), np.zeros((len(primitive), rows, 3, 3)), defects)


CELLS = {
    "rock salt": (SALT, 2 * CUBE),
    "small": (RUTILE, ONE),  # everything wraps around
    "rutile": (RUTILE, np.diag([2, 2, 3])),
    "skew rutile": (RUTILE, np.array([[2, 0, 1], [1, 2, 0], [0, -1, 2]])),
    "monoclinic": (MONOCLINIC, np.array([[2, 0, 0], [0, 1, 1], [0, -1, 1]])),
}


@pytest.mark.parametrize("name", CELLS)
def test_a_defect_may_sit_on_any_equivalent_site(name):
    primitive, matrix = CELLS[name]
    superposition = superposition_of(primitive, matrix)
    folding, group = superposition.folding, superposition.group
    if name == "skew rutile":  # what carries one site to another does not always keep the supercell
        assert not all(folding.kept_by(group.rotations[o]) for o in superposition._operations)
    for parent in range(len(primitive)):
        atom = int(np.flatnonzero(folding.parent == parent)[-1])
        dopant = next(d for s, d in superposition.defects if s == group.sites[parent])
        plan = Plan((atom,), (dopant,))
        displacements, change = expected(folding, plan)
        found = superposition(plan)
        assert np.abs(change).max() > 1e-3
        np.testing.assert_allclose(found.hessian, change, atol=1e-9)
        np.testing.assert_allclose(found.displacements, displacements, atol=1e-9)


@pytest.mark.parametrize("name", ["rock salt", "skew rutile"])
def test_defects_add_up_in_any_order(name):
    superposition = superposition_of(*CELLS[name])
    symbols = np.array(superposition.folding.atoms.symbols)
    cations, anions = (np.flatnonzero(symbols == s) for s in dict.fromkeys(symbols))
    (_, one), (_, two), (_, three) = sorted(superposition.defects)
    plan = Plan((int(cations[0]), int(cations[-1]), int(anions[2])), (one, two, three))
    found, (displacements, change) = superposition(plan), expected(superposition.folding, plan)
    np.testing.assert_allclose(found.hessian, change, atol=1e-9)
    np.testing.assert_allclose(found.displacements, displacements, atol=1e-9)
    backwards = superposition(Plan(plan.sites[::-1], plan.dopants[::-1]))
    np.testing.assert_allclose(backwards.hessian, found.hessian, atol=1e-12)
    np.testing.assert_allclose(backwards.atoms.positions, found.atoms.positions, atol=1e-12)
    assert (backwards.atoms.numbers == found.atoms.numbers).all()
    assert [found.atoms.symbols[s] for s in plan.sites] == list(plan.dopants)
    # Contracts.
    np.testing.assert_allclose(found.hessian, found.hessian.T, atol=1e-12)
    np.testing.assert_allclose(as_blocks(found.hessian).sum(axis=1), 0, atol=1e-9)
    np.testing.assert_allclose(found.displacements.sum(axis=0), 0, atol=1e-9)
    moved = found.atoms.positions - superposition.folding.atoms.positions
    np.testing.assert_allclose(moved, found.displacements, atol=1e-12)


def test_defects_that_are_not_known_are_named():
    superposition = superposition_of(SALT, CUBE)
    plan = Plan((0, 1, 5), ("Rb", "Li", "Br"))
    assert superposition.needs(plan) == {(0, "Rb"), (0, "Li"), (1, "Br")}
    with pytest.raises(PhysicsError, match="Rb on site 0, Br on site 1"):
        superposition(plan)


# --- computed -----------------------------------------------------------------------------------------------------


class Computed:
    """A relaxed rock salt in a supercell, and its single defects there."""

    def __init__(self, model, matrix, defects):
        self.model = model
        primitive = relax_host(bulk("NaCl", "rocksalt", a=6.03), model, TIGHT).atoms
        self.folding = Folding.of(primitive, matrix)
        host = reference_phonons(primitive, matrix, model, FINE, 256).hessian
        self.host = host.matrix
        computed = [
            single_defect(self.folding, site, dopant, host.matrix, model, TIGHT, FINE, 0.0, 256).defect
            for site, dopant in defects
        ]
        self.superposition = Superposition(primitive, matrix, host.compact, computed)

    def start(self, plan):
        return apply(plan, self.folding.atoms)


@pytest.fixture(scope="module")
def small(model):
    return Computed(model, 2 * ONE, [(0, "K"), (1, "F")])


@pytest.mark.parametrize(("atom", "dopant"), [(0, "K"), (7, "K"), (8, "F"), (13, "F")])
def test_single_defects_are_what_they_are_computed_to_be(small, model, atom, dopant):
    plan = Plan((atom,), (dopant,))
    found = small.superposition(plan)
    direct = relax_defect(small.start(plan), model, TIGHT).atoms
    hessian = reference_phonons(direct, ONE, model, FINE, 256).hessian.matrix
    moved = direct.positions - small.folding.atoms.positions
    np.testing.assert_allclose(found.displacements, moved - moved.mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(found.hessian, hessian, atol=1e-3)
    assert np.abs(hessian - small.host).max() > 0.5


def test_without_dopants_there_is_the_host(small):
    found = small.superposition(Plan((), ()))
    np.testing.assert_allclose(found.hessian, small.host, atol=1e-12)
    np.testing.assert_array_equal(found.displacements, 0)
    assert found.atoms == small.folding.atoms


@pytest.mark.parametrize(("cells", "far"), [(1, False), (2, True)])
def test_error_vanishes_beyond_the_range_of_the_potential(model, cells, far):
    """Dopants that are 4.1 or 8.2 Å apart, where the potential ends at 6 Å and nothing moves."""
    primitive = Atoms("Cu", cell=[4.1, 4.1, 4.1], pbc=True)
    cube, change = changed_by("Zn", primitive, 3 * ONE, model)
    defect = Defect(0, "Zn", np.zeros((1, 4), int), np.zeros((1, 3)), unfold(cube, 0, change, 1e-12))
    folding = Folding.of(primitive, np.diag([3, 3, 4]))
    host = exact_hessian(model, folding.atoms)
    superposition = Superposition(primitive, folding.matrix, as_blocks(host)[:1], [defect])
    plan = Plan((0, int(folding.index(0, [0, 0, cells]))), ("Zn", "Zn"))
    exact = exact_hessian(model, apply(plan, folding.atoms))
    error = np.linalg.norm(superposition(plan).hessian - exact) / np.linalg.norm(exact - host)
    assert error < 1e-9 if far else 1e-3 < error < 0.2


def test_in_a_larger_supercell_it_is_the_same_crystal(model):
    """A cell of 12.3 Å knows all that a defect changes if forces end at 6 Å; the larger one is not even a multiple."""
    primitive = Atoms("Cu", cell=[4.1, 4.1, 4.1], pbc=True)
    cube, change = changed_by("Zn", primitive, 3 * ONE, model)
    defect = Defect(0, "Zn", np.zeros((1, 4), int), np.zeros((1, 3)), unfold(cube, 0, change, 1e-12))
    small = Superposition(primitive, cube.matrix, as_blocks(exact_hessian(model, cube.atoms))[:1], [defect])
    folding = Folding.of(primitive, np.array([[3, 1, 0], [0, 4, 0], [0, 0, 4]]))
    host = exact_hessian(model, folding.atoms)
    wide = small.into(folding.matrix, as_blocks(host)[:1])
    plan = Plan((17,), ("Zn",))
    exact = exact_hessian(model, apply(plan, folding.atoms))
    found = wide(plan).hessian
    assert np.linalg.norm(found - exact) < 1e-9 * np.linalg.norm(exact - host)


def test_in_another_supercell_sum_rule_and_symmetry_stay(small, model):
    """Even where the defects reach beyond the cell they were computed in."""
    matrix = np.diag([2, 2, 3])
    host = reference_phonons(small.superposition.primitive, matrix, model, FINE, 256).hessian
    hessian = small.superposition.into(matrix, host.compact)(Plan((3, 20), ("K", "F"))).hessian
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-9)
    np.testing.assert_allclose(as_blocks(hessian).sum(axis=1), 0, atol=1e-2)
    assert np.abs(hessian - host.matrix).max() > 0.5


def test_repeated_it_is_the_same_crystal(model):
    """A cell of 12.3 Å knows all that doping changes if forces end at 6 Å."""
    primitive = Atoms("Cu", cell=[4.1, 4.1, 4.1], pbc=True)
    plan = Plan((0, 5), ("Zn", "Zn"))
    matrices = 3 * ONE, np.diag([3, 6, 3])
    atoms = [Folding.of(primitive, matrix).atoms for matrix in matrices]
    hosts = [exact_hessian(model, one) for one in atoms]
    small, wide = (
        Superposition(primitive, matrix, as_blocks(host)[:1], []) for matrix, host in zip(matrices, hosts, strict=True)
    )
    larger, positions = wide.repeated_plan(small, plan), wide.repeated_positions(small, plan, atoms[0].positions)
    assert len(larger.sites) == 4
    np.testing.assert_allclose(positions, atoms[1].positions)
    exact = exact_hessian(model, apply(larger, atoms[1]))
    found = wide.repeated_hessian(small, plan, exact_hessian(model, apply(plan, atoms[0])))
    assert np.linalg.norm(found - exact) < 1e-9 * np.linalg.norm(exact - hosts[1])


def test_repeated_it_has_the_modes_of_the_smaller_supercell(small, model):
    """Also where all forces reach beyond it."""
    plan = Plan((3, 12), ("K", "F"))
    doped = relax_defect(small.start(plan), model, TIGHT).atoms
    hessian = reference_phonons(doped, ONE, model, FINE, 256).hessian.matrix
    modes = diagonalise(hessian, doped.get_masses(), list(doped.symbols))
    matrix = np.diag([2, 4, 2])
    host = reference_phonons(small.superposition.primitive, matrix, model, FINE, 256).hessian
    wide = small.superposition.into(matrix, host.compact)
    larger = wide.repeated_plan(small.superposition, plan)
    positions = wide.repeated_positions(small.superposition, plan, doped.positions)
    atoms = apply(larger, wide.folding.atoms)
    assert atoms.get_chemical_formula() == (doped * (1, 2, 1)).get_chemical_formula()
    repeated = Atoms(atoms.symbols, positions, cell=atoms.cell, pbc=True)
    assert model.evaluate([repeated]).forces[0] == pytest.approx(0, abs=1e-3)
    found = wide.repeated_hessian(small.superposition, plan, hessian)
    np.testing.assert_allclose(found, found.T, atol=1e-9)
    of_wide = diagonalise(found, atoms.get_masses(), list(atoms.symbols)).energies_meV
    assert np.abs(of_wide[:, None] - modes.energies_meV).min(axis=0).max() < 0.01
    # At the other wave vectors they are interpolated: better than without the dopants.
    exact = reference_phonons(repeated, ONE, model, FINE, 256).modes.energies_meV
    masses_only = diagonalise(host.matrix, atoms.get_masses(), list(atoms.symbols)).energies_meV
    assert np.abs(of_wide - exact).mean() < 0.1 * np.abs(masses_only - exact).mean()
