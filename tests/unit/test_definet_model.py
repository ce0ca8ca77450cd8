"""The network that relaxes in one step: symmetries, independence of the cell, limits."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, make_supercell
from ase.neighborlist import neighbor_list
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from defectnet.definet.graphs import SOFTEST_eV_PER_A2, batch, crystal_graph, green_function
from defectnet.errors import InputError
from defectnet.models.definet import HEAVIEST, PERFECT, SUBSTITUTED, VACANT, DefiNet, loss

LI, NA, CL, K, BR, W, X = 3, 11, 17, 19, 35, 74, 0
TOLERANCE_A = {torch.float32: 1e-5, torch.float64: 1e-10}
TYPES = pytest.mark.parametrize("dtype", TOLERANCE_A)


class Crystal:
    """A cell with sites of a perfect host and what they hold."""

    def __init__(self, host: Atoms, changes: dict[int, int]):
        self.host_numbers, self.positions, self.cell = host.numbers, host.positions, host.cell.array
        self.numbers = host.numbers.copy()
        self.numbers[list(changes)] = list(changes.values())


def rock_salt(changes, cubic=True, shift=0.0):
    host = bulk("NaCl", "rocksalt", a=5.64, cubic=cubic) * ((2, 1, 1) if cubic else (2, 2, 2))
    rng = np.random.default_rng(1)
    host.positions += shift * rng.normal(size=(len(host), 3))
    return Crystal(host, changes)


@pytest.fixture
def crystal():
    """Of no symmetry, with two kinds of dopants and a vacancy."""
    return rock_salt({0: K, 5: BR, 10: LI, 3: X}, shift=0.1)


@pytest.fixture(scope="module")
def network():
    """Random weights that move atoms as far as relaxations do."""
    torch.manual_seed(3)
    model = DefiNet(scalars=16, vectors=8, layers=3, radial=8, cutoff_A=4.5).eval()
    with torch.no_grad():
        model.learned += torch.randn_like(model.learned)
        for gate in (module for module in model.modules() if isinstance(module, torch.nn.Embedding)):
            gate.weight += 0.3 * torch.randn_like(gate.weight)
        crystal = rock_salt({0: K, 5: BR, 10: LI, 3: X}, shift=0.1)
        guess = (green_function(springs(crystal)) @ pushes(crystal).ravel()).reshape(-1, 3)
        moves = moved(model, crystal, torch.float32) - guess  # what it says of its own
        for last in (model.move[-1], model.push[-1]):
            last.weight *= 0.3 / np.abs(moves).max()
            last.bias *= 0.3 / np.abs(moves).max()
    return model


def springs(crystal, reach_A=4.0):
    """Hessian [3N, 3N] of a crystal whose sites are held together, and a little at their places, by springs."""
    cell = {"cell": crystal.cell, "pbc": True}
    i, j, vectors = neighbor_list("ijD", Atoms(crystal.host_numbers, crystal.positions, **cell), reach_A)
    lengths = np.linalg.norm(vectors, axis=1)[:, None, None]
    bonds = 9 * (1 - lengths / reach_A) ** 2 * vectors[:, :, None] * vectors[:, None, :] / lengths**2
    blocks = np.zeros((len(crystal.numbers), len(crystal.numbers), 3, 3))
    np.add.at(blocks, (i, i), bonds)
    np.add.at(blocks, (i, j), -bonds)
    return blocks.transpose(0, 2, 1, 3).reshape(3 * len(blocks), -1) + np.eye(3 * len(blocks))


def pushes(crystal, reach_A=4.0):
    """Forces [N, 3] in eV/Å away from what was replaced, by the difference of atomic numbers."""
    i, j, vectors = neighbor_list("ijD", Atoms(crystal.host_numbers, crystal.positions, cell=crystal.cell, pbc=True),
                                  reach_A)  # fmt: skip
    lengths = np.linalg.norm(vectors, axis=1)[:, None]
    misfit = (crystal.numbers - crystal.host_numbers)[j, None] / 20
    forces = np.zeros_like(crystal.positions)
    np.add.at(forces, i, -misfit * (1 - lengths / reach_A) ** 2 * vectors / lengths)
    return forces * (crystal.numbers != X)[:, None]


def graph_of(crystal, model):
    return crystal_graph(
        crystal.numbers,
        crystal.host_numbers,
        crystal.positions,
        crystal.cell,
        model.config["cutoff_A"],
        torch.from_numpy(green_function(springs(crystal))),
        pushes(crystal),
    )


@torch.no_grad()
def both(model, crystal, dtype):
    """Displacements and logarithms of expected errors."""
    moves = model.to(dtype)(graph_of(crystal, model).to(dtype))
    return moves.displacements.numpy(), moves.log_error.numpy()


def moved(model, crystal, dtype=torch.float64):
    return both(model, crystal, dtype)[0]


def changed(crystal, **attributes):
    new = rock_salt({})
    vars(new).update(vars(crystal) | attributes)
    return new


def test_the_fixture_moves_atoms_as_relaxations_do(network, crystal):
    assert 0.1 < np.abs(moved(network, crystal)).max() < 1


@TYPES
def test_rotations_and_reflections_turn_the_answer(network, crystal, dtype):
    displacements, error = both(network, crystal, dtype)
    for turn in (*Rotation.random(4, random_state=0).as_matrix(), np.diag([1.0, 1.0, -1.0])):
        turned = changed(crystal, positions=crystal.positions @ turn.T, cell=crystal.cell @ turn.T)
        found, found_error = both(network, turned, dtype)
        assert np.abs(found - displacements @ turn.T).max() < TOLERANCE_A[dtype]
        assert np.abs(found_error - error).max() < 10 * TOLERANCE_A[dtype]


@TYPES
def test_translations_and_the_choice_of_images_change_nothing(network, crystal, dtype):
    images = np.random.default_rng(0).integers(-2, 3, size=(len(crystal.numbers), 3))
    shifted = changed(crystal, positions=crystal.positions + [0.3, -7.0, 1.1] + images @ crystal.cell)
    assert np.abs(moved(network, shifted, dtype) - moved(network, crystal, dtype)).max() < TOLERANCE_A[dtype]


@TYPES
def test_permutations_permute_the_answer(network, crystal, dtype):
    order = np.random.default_rng(0).permutation(len(crystal.numbers))
    names = ("numbers", "host_numbers", "positions")
    permuted = changed(crystal, **{name: getattr(crystal, name)[order] for name in names})
    assert np.abs(moved(network, permuted, dtype) - moved(network, crystal, dtype)[order]).max() < TOLERANCE_A[dtype]


@TYPES
def test_a_repeated_cell_moves_like_the_cell(network, crystal, dtype):
    times = (2, 1, 3)
    origins = np.array([[i, j, k] for i in range(2) for j in range(1) for k in range(3)]) @ crystal.cell
    repeated = changed(
        crystal,
        numbers=np.tile(crystal.numbers, 6),
        host_numbers=np.tile(crystal.host_numbers, 6),
        positions=np.concatenate([crystal.positions + origin for origin in origins]),
        cell=crystal.cell * np.array(times)[:, None],
    )
    once, error = both(network, crystal, dtype)
    found, found_error = both(network, repeated, dtype)
    assert np.abs(found - np.tile(once, (6, 1))).max() < TOLERANCE_A[dtype]
    assert np.abs(found_error - np.tile(error, 6)).max() < 10 * TOLERANCE_A[dtype]


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(3)), st.lists(st.integers(-2, 2), min_size=3, max_size=3))
def test_other_vectors_of_the_same_lattice_change_nothing(network, order, steps):
    crystal = rock_salt({0: K, 5: BR, 10: LI, 3: X}, shift=0.1)
    shear = np.eye(3, dtype=int)
    shear[0, 1], shear[1, 2], shear[2, 0] = steps
    shear[2, 0] = 0  # unit upper triangular: determinant 1
    other = changed(crystal, cell=shear[list(order)] @ crystal.cell)
    assert np.abs(moved(network, other) - moved(network, crystal)).max() < TOLERANCE_A[torch.float64]


def test_a_batch_gives_what_its_crystals_give_alone(network, crystal):
    other = rock_salt({1: BR}, cubic=False)
    model = network.double()
    with torch.no_grad():
        together = model(batch([graph_of(one, model) for one in (crystal, other)])).displacements.numpy()
    alone = np.concatenate([moved(network, one) for one in (crystal, other)])
    assert np.abs(together - alone).max() < TOLERANCE_A[torch.float64]


def test_a_perfect_crystal_does_not_move(network):
    assert np.array_equal(moved(network, rock_salt({}, shift=0.1)), np.zeros((16, 3)))


def test_the_mean_of_the_atoms_stays_and_vacancies_do(network, crystal):
    displacements = moved(network, crystal)
    atoms = crystal.numbers != X
    assert np.abs(displacements[atoms].mean(axis=0)).max() < 1e-12
    assert np.array_equal(displacements[~atoms], np.zeros((1, 3)))


def test_the_greens_function_answers_forces_of_a_harmonic_crystal(crystal):
    hessian = springs(crystal) - np.eye(48)  # free to move as a whole
    forces = np.random.default_rng(0).normal(size=(16, 3))
    forces -= forces.mean(axis=0)
    stiff = 200 * hessian  # no mode is softer than SOFTEST but for the translations
    assert np.linalg.eigvalsh(stiff)[3] > SOFTEST_eV_PER_A2
    moved = green_function(stiff) @ forces.ravel()
    assert np.allclose(stiff @ moved, forces.ravel())
    assert np.abs(moved.reshape(16, 3).mean(axis=0)).max() < 1e-12


def test_force_constants_matter_and_may_be_unknown(network, crystal):
    graph = graph_of(crystal, network.double())
    with torch.no_grad():
        found = [
            network(replace(graph, green=(green,))).displacements.numpy()
            for green in (graph.green[0], 2 * graph.green[0], graph.green[0][:0, :0])
        ]
    assert all(np.abs(one - other).max() > 1e-2 for one, other in itertools.combinations(found, 2))


def test_what_is_learned_of_elements_is_hidden_at_times_in_training_only(network, crystal):
    assert np.array_equal(moved(network, crystal), moved(network, crystal))
    torch.manual_seed(0)
    found = [moved(network.train(), crystal) for _ in range(20)]
    network.eval()
    assert max(np.abs(one - found[0]).max() for one in found) > 1e-3


def test_a_single_defect_keeps_its_site_symmetry(network):
    host = bulk("NaCl", "rocksalt", a=5.64, cubic=True) * (2, 2, 2)
    crystal = Crystal(host, {0: K})
    displacements = moved(network, crystal)
    vectors = host.get_distances(0, range(len(host)), mic=True, vector=True)
    shell = np.isclose(np.linalg.norm(vectors, axis=1), 2.82)
    radial = (displacements[shell] * vectors[shell]).sum(axis=1) / 2.82
    assert shell.sum() == 6
    assert np.ptp(radial) < 1e-10
    assert np.abs(displacements[shell] - radial[:, None] * vectors[shell] / 2.82).max() < 1e-10
    assert abs(radial[0]) > 1e-4
    assert np.abs(displacements[0]).max() < 1e-10


def test_markers_say_what_a_site_is(crystal, network):
    markers = graph_of(crystal, network).markers.numpy()
    assert [markers[site] for site in (0, 3, 5, 10, 1)] == [SUBSTITUTED, VACANT, SUBSTITUTED, SUBSTITUTED, PERFECT]


@pytest.mark.parametrize("marker", [PERFECT, SUBSTITUTED, VACANT])
def test_every_marker_gates_messages(network, crystal, marker):
    model = DefiNet(**network.config).double().eval()
    model.load_state_dict(network.state_dict())
    before = moved(model, crystal)
    with torch.no_grad():
        for layer in model.layers:
            layer.gate_source.weight[marker] = 0
    assert np.abs(moved(model, crystal) - before).max() > 1e-4


def test_a_ghost_tells_more_than_its_absence(network, crystal):
    rest = crystal.numbers != X
    names = ("numbers", "host_numbers", "positions")
    without = changed(crystal, **{name: getattr(crystal, name)[rest] for name in names})
    assert np.abs(moved(network, without) - moved(network, crystal)[rest]).max() > 1e-4


def test_what_the_host_held_matters(network, crystal):
    held = crystal.host_numbers.copy()
    held[0] = LI
    assert np.abs(moved(network, changed(crystal, host_numbers=held)) - moved(network, crystal)).max() > 1e-4


def test_elements_that_no_training_has_seen_have_properties(network):
    found = {z: moved(network, rock_salt({0: z})) for z in (W, HEAVIEST)}
    assert all(np.isfinite(displacements).all() for displacements in found.values())
    assert np.abs(found[W] - found[HEAVIEST]).max() > 1e-6


def test_neighbours_come_and_go_smoothly(network):
    cutoff_A = network.config["cutoff_A"]

    def displacements(distance):
        cell = np.diag([30.0, 30.0, 30.0])
        positions = np.array([[0, 0, 0], [2.8, 0, 0], [0, 2.8 + distance, 0], [0, 2.8, 0]])
        crystal = changed(rock_salt({}), numbers=np.array([K, CL, BR, NA]), host_numbers=np.array([NA, CL, CL, NA]))
        return moved(network, changed(crystal, positions=positions, cell=cell))

    inside, outside = displacements(cutoff_A - 1e-4), displacements(cutoff_A + 1e-4)
    assert np.abs(inside - outside).max() < 1e-6
    assert np.abs(displacements(cutoff_A - 1) - outside).max() > 1e-6


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"numbers": np.full(16, 95)}, "atomic numbers"),
        ({"host_numbers": np.full(16, X)}, "atomic numbers"),
        ({"host_numbers": np.full(15, NA)}, "perfect host"),
        ({"cell": np.ones((3, 3))}, "no volume"),
        ({"positions": np.zeros((16, 3))}, "one place"),
    ],
)
def test_nonsense_is_refused(network, crystal, wrong, told):
    bad = changed(crystal, **wrong)
    with pytest.raises(InputError, match=told):
        crystal_graph(bad.numbers, bad.host_numbers, bad.positions, bad.cell, network.config["cutoff_A"])


def test_the_expected_error_is_learned_as_the_mean_length(network, crystal):
    """The likelihood is least where the expected error is the mean length of the errors."""
    model = network.double()
    moves = model(graph_of(crystal, model).to(torch.float64))
    truth = torch.zeros_like(moves.displacements)
    atoms = torch.ones(len(truth), dtype=torch.bool)
    lengths = moves.displacements.detach().norm(dim=1).mean()

    def value(expected):
        return loss(replace(moves, log_error=torch.full_like(moves.log_error, np.log(expected))), truth, atoms)

    best = float(lengths)
    assert value(best) < min(value(0.9 * best), value(1.1 * best))


def test_supercell_matrices_of_ase_are_understood(network):
    """A host that ASE repeats with a skewed matrix moves like the primitive description of the same crystal."""
    primitive = bulk("NaCl", "rocksalt", a=5.64)
    cells = [
        make_supercell(primitive, matrix)
        for matrix in ([[2, 0, 0], [0, 2, 0], [0, 0, 2]], [[2, 2, 0], [0, 2, 0], [0, 0, 2]])
    ]
    found = [moved(network, Crystal(host, {0: K})) for host in cells]
    assert np.allclose(cells[0].positions[0], cells[1].positions[0])
    lengths = [np.sort(np.linalg.norm(one, axis=1)) for one in found]
    assert np.abs(lengths[0] - lengths[1]).max() < 1e-10
