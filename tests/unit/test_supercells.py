import json
from collections import Counter

import numpy as np
import pytest
import spglib
from ase import Atoms
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from phonopy.structure.atoms import PhonopyAtoms
from phonopy.structure.cells import get_supercell
from pymatgen.core import Lattice, Structure

from defectnet import supercells
from defectnet.config import Supercells
from defectnet.dopants import Candidate
from defectnet.errors import InputError, PhysicsError
from defectnet.supercells import (
    HostPlan,
    Plan,
    apply,
    expand,
    expansion_matrix,
    lowest_concentration,
    plan_host,
    plan_substitutions,
    repetition,
)

FCC = np.array([[0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]]) * 5.43
HEXAGONAL = np.array([[3.19, 0, 0], [-1.595, 3.19 * 3**0.5 / 2, 0], [0, 0, 5.19]])
MONOCLINIC = np.array([[5, 0, 0], [0, 4, 0], [-1.2, 0, 6.7]])
TRICLINIC = np.array([[4, 0.3, 0.2], [-0.7, 5.1, 0.4], [0.9, 1.3, 6.2]])
RHOMBOHEDRAL = np.array([[2, 2 / 3**0.5, 9], [-2, 2 / 3**0.5, 9], [0, -4 / 3**0.5, 9]])
TETRAGONAL = np.array([[-2.9, 2.9, 5.0], [2.9, -2.9, 5.0], [2.9, 2.9, -5.0]])
LATTICES = [FCC, HEXAGONAL, MONOCLINIC, TRICLINIC, RHOMBOHEDRAL, TETRAGONAL]


def published(**changes) -> Supercells:
    """Settings with the published range: up to six species, 0.2-25 at.%."""
    return Supercells(**{"species_max": 6, "concentration_max": 0.25} | changes)


def point_group(lattice):
    return spglib.get_symmetry_dataset((lattice, [[0, 0, 0]], [1]), symprec=1e-4).rotations


def shortest(lattice, reach=8):
    n = np.stack(np.meshgrid(*[np.arange(-reach, reach + 1)] * 3, indexing="ij"), -1).reshape(-1, 3)
    lengths = np.linalg.norm(n[(n != 0).any(axis=1)] @ lattice, axis=1)
    return lengths.min()


def shape(matrix, lattice):
    return shortest(matrix @ lattice) / abs(np.linalg.det(matrix @ lattice)) ** (1 / 3)


def kept(matrix, lattice):
    """Operations W of the lattice for which the rows of T are again combinations of themselves."""
    images = matrix @ point_group(lattice).transpose(0, 2, 1) @ np.linalg.inv(matrix)
    return int((np.abs(images - images.round()) < 1e-6).all(axis=(1, 2)).sum())


def size(matrix):
    return round(np.linalg.det(matrix))


# --- expansion ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("index", "number"), [(1, 1), (2, 7), (3, 13), (4, 35), (8, 155), (12, 455)])
def test_all_superlattices_are_listed_once(index, number):
    forms = supercells._superlattices(index)
    assert len(forms) == number == supercells._count(index)
    assert (np.linalg.det(forms).round() == index).all()
    # Two bases span the same superlattice exactly if one is an integer combination of the other.
    ratios = forms[:, None] @ np.linalg.inv(forms)[None]
    same = (np.abs(ratios - ratios.round()) < 1e-9).all(axis=(2, 3))
    assert same.sum() == number


def test_sample_of_superlattices_is_even():
    sample = supercells._superlattices(240, 500)
    assert len(sample) == 500
    assert len(np.unique(sample, axis=0)) == 500
    assert len(set(sample[:, 2, 2])) > 10


@settings(deadline=None, max_examples=60)
@given(
    lattice=st.sampled_from(LATTICES),
    strain=st.lists(st.floats(-0.2, 0.2), min_size=9, max_size=9),
    index=st.integers(1, 30),
    pick=st.integers(0, 10**6),
)
def test_shape_is_the_true_shortest_vector(lattice, strain, index, pick):
    lattice = lattice @ (np.eye(3) + np.reshape(strain, (3, 3)))
    assume(abs(np.linalg.det(lattice)) > 20)
    forms = supercells._superlattices(index)
    form = forms[pick % len(forms)]
    # Brute force over a reduced basis reaches the shortest vector within a few cells.
    reduced = supercells.minkowski_reduce(form @ lattice)[0]
    expected = shortest(reduced, reach=2) / abs(np.linalg.det(reduced)) ** (1 / 3)
    assert supercells._shapes(form[None], lattice)[0] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("lattice", LATTICES)
def test_choice_agrees_with_brute_force(lattice):
    forms = np.concatenate([supercells._superlattices(index) for index in range(5, 8)])
    shapes = np.array([shape(supercells.minkowski_reduce(f @ lattice)[0], np.eye(3)) for f in forms])
    good = shapes >= 0.95 * min(1, shapes.max())
    best = max((kept(f, lattice), size(f), s.round(6)) for f, s in zip(forms[good], shapes[good], strict=True))
    matrix = expansion_matrix(lattice, 4, 20, 31)
    assert (kept(matrix, lattice), size(matrix)) == best[:2]
    assert shape(matrix, lattice) == pytest.approx(best[2], abs=1e-5)


@pytest.mark.parametrize("lattice", [FCC, HEXAGONAL, MONOCLINIC, RHOMBOHEDRAL, TETRAGONAL])
def test_search_by_symmetry_misses_no_symmetric_superlattice(lattice):
    """Every well-shaped superlattice that keeps a rotation is generated, whatever its orientation."""
    reduced, operation = supercells.minkowski_reduce(lattice)
    turns = supercells._turns(point_group(lattice), operation)
    everything = supercells._superlattices(24)
    symmetric = supercells._kept(everything, np.full(len(everything), 24), turns) > 1
    symmetric &= supercells._shapes(everything, reduced) >= 0.95

    def signature(forms):
        counts = supercells._kept(forms, np.full(len(forms), 24), turns)
        return set(zip(counts.tolist(), supercells._shapes(forms, reduced).round(6).tolist(), strict=True))

    found = np.concatenate([supercells._invariant([24], turn, reduced) for turn in supercells._axes(turns)])
    assert (np.linalg.det(found).round() == 24).all()
    assert (supercells._kept(found, np.full(len(found), 24), turns) > 1).all()
    good = found[supercells._shapes(found, reduced) >= 0.95]
    assert signature(everything[symmetric]) == signature(good)


@pytest.mark.parametrize("lattice", [*LATTICES, FCC @ np.diag([1, 1, 1.02])])
@pytest.mark.parametrize(("low", "high"), [(30, 40), (60, 70), (433, 500)])
def test_expansion_contract(lattice, low, high):
    matrix = expansion_matrix(lattice, 2, low, high)
    assert matrix.dtype.kind == "i"
    assert low <= 2 * size(matrix) <= high
    assert shape(matrix, lattice) >= 0.95
    # Rows are a reduced basis, so none can be shortened by another.
    rows = matrix @ lattice
    gram = rows @ rows.T
    assert (2 * np.abs(gram - np.diag(np.diag(gram))) <= np.minimum.outer(np.diag(gram), np.diag(gram)) + 1e-6).all()
    assert (matrix == expansion_matrix(lattice, 2, low, high)).all()


@pytest.mark.parametrize(("n_atoms", "least"), [(2, 100), (32, 200), (40, 200), (250, 200)])
def test_repetitions_are_no_needles_and_just_large_enough(n_atoms, least):
    cube, rod = np.eye(3) * 6.0, np.diag([4.0, 4.0, 16.0])
    for cell in (cube, rod):
        times = repetition(cell, n_atoms, least)
        assert least <= n_atoms * times.prod() <= 1.5 * least + 2 * n_atoms
        edges = times * np.diag(cell)
        assert edges.max() <= max(3, 16 / 4) * edges.min()

    assert repetition(cube, 48, 200).tolist() in ([1, 2, 3], [2, 2, 2])  # five in a row would do, but for their shape
    assert len(set(repetition(cube, 32, 250))) == 1
    assert repetition(rod, 32, 500).tolist() == [4, 4, 1]


def test_cubic_hosts_get_cubic_supercells():
    body_centred = expansion_matrix(FCC, 2, 30, 40)
    assert 2 * size(body_centred) == 32
    assert kept(body_centred, FCC) == 48
    cube = expansion_matrix(FCC, 2, 60, 70)
    assert 2 * size(cube) == 64
    assert cube @ FCC @ FCC.T @ cube.T == pytest.approx(np.eye(3) * (2 * 5.43) ** 2)


def test_symmetry_of_the_crystal_counts_not_that_of_its_lattice():
    cube = np.eye(3) * 4.0
    monoclinic = np.array([np.eye(3), np.diag([-1, 1, -1])]).astype(int)
    for rotations in (monoclinic, monoclinic[:, [1, 0, 2]][:, :, [1, 0, 2]], -monoclinic):
        matrix = expansion_matrix(cube, 10, 60, 79, rotations)
        images = matrix @ rotations[1] @ np.linalg.inv(matrix)
        assert images == pytest.approx(images.round())
    # Free of the cubic operations, the choice goes to a better shape than 2 x 2 x 2.
    assert (expansion_matrix(cube, 10, 80, 89) @ expansion_matrix(cube, 10, 80, 89).T == 4 * np.eye(3)).all()
    assert shape(expansion_matrix(cube, 10, 80, 89, monoclinic), cube) > 1


def test_a_skewed_basis_of_the_same_lattice_gives_an_equally_good_cell():
    skew = np.array([[1, 0, 0], [3, 1, 0], [-2, 5, 1]])
    straight, skewed = (expansion_matrix(basis, 2, 433, 500) for basis in (TETRAGONAL, skew @ TETRAGONAL))
    assert size(straight) == size(skewed)
    assert shortest(straight @ TETRAGONAL, 3) == pytest.approx(shortest(skewed @ skew @ TETRAGONAL, 3))


@pytest.mark.parametrize(
    ("atoms", "low", "high", "remedy"),
    [
        (9, 30, 35, "raise atoms_max to 36"),
        (50, 30, 40, "raise atoms_max to 50"),
        (24, 50, 69, "lower atoms_min to 48"),
    ],
)
def test_impossible_sizes_name_the_nearest_possible_one(atoms, low, high, remedy):
    with pytest.raises(InputError, match=rf"supercells.atoms_min/atoms_max.*{remedy}"):
        expansion_matrix(FCC, atoms, low, high)


# --- supercells --------------------------------------------------------------------------------------------------

PRIMITIVE = Atoms("GaAsN", cell=TRICLINIC, scaled_positions=[[0, 0, 0], [0.3, 0.2, 0.4], [0.95, 0.6, 0.7]], pbc=True)
SKEWED = np.array([[2, 1, 0], [0, 2, 1], [0, 0, 3]])


def test_phonopy_takes_the_transposed_matrix():
    unit = PhonopyAtoms(symbols=["Ga", "As", "N"], cell=TRICLINIC, scaled_positions=PRIMITIVE.get_scaled_positions())
    assert get_supercell(unit, SKEWED.T).cell == pytest.approx(SKEWED @ TRICLINIC)
    assert np.abs(get_supercell(unit, SKEWED).cell - SKEWED @ TRICLINIC).max() > 1


@pytest.mark.parametrize("matrix", [SKEWED, np.diag([3, 2, 1]), expansion_matrix(TRICLINIC, 3, 90, 120)])
def test_every_atom_is_a_translation_of_its_parent(matrix):
    supercell = expand(PRIMITIVE, matrix)
    images = size(matrix)
    assert len(supercell.atoms) == 3 * images
    assert supercell.atoms.cell.array == pytest.approx(matrix @ TRICLINIC)
    assert supercell.parent.tolist() == np.repeat([0, 1, 2], images).tolist()
    assert (supercell.atoms.symbols == PRIMITIVE.symbols[supercell.parent]).all()
    shifts = (supercell.atoms.positions - PRIMITIVE.positions[supercell.parent]) @ np.linalg.inv(TRICLINIC)
    assert shifts == pytest.approx(shifts.round(), abs=1e-9)
    scaled = supercell.atoms.get_scaled_positions().round(6) % 1
    assert len(np.unique(scaled, axis=0)) == len(scaled)


def test_relaxing_the_host_keeps_the_order():
    rng = np.random.default_rng(0)
    relaxed = PRIMITIVE.copy()
    relaxed.set_cell(TRICLINIC @ (np.eye(3) + rng.normal(scale=0.02, size=(3, 3))), scale_atoms=True)
    relaxed.positions += rng.normal(scale=0.05, size=(3, 3))
    before, after = expand(PRIMITIVE, SKEWED), expand(relaxed, SKEWED)
    assert (before.parent == after.parent).all()
    shifts = [
        (cell.atoms.positions - unit.positions[cell.parent]) @ np.linalg.inv(cell.atoms.cell.array)
        for cell, unit in ((before, PRIMITIVE), (after, relaxed))
    ]
    difference = shifts[0] - shifts[1]
    assert difference == pytest.approx(difference.round(), abs=1e-8)


# --- substitution ------------------------------------------------------------------------------------------------


def candidate(dopant, replaces, kind="n"):
    return Candidate(dopant, replaces, kind, "user", 1.0)


GAAS = ["Ga"] * 32 + ["As"] * 32
CANDIDATES = [
    *(candidate(x, "Ga") for x in ("Si", "Ge", "Zn", "Mg", "As")),
    *(candidate(x, "As") for x in ("Se", "S", "C", "Ga")),
]


def violations(plan, symbols, candidates, limits):
    """Everything a plan must satisfy, by name; empty if it does."""
    allowed = {(c.dopant, c.replaces) for c in candidates}
    pairs = [(dopant, symbols[site]) for site, dopant in zip(plan.sites, plan.dopants, strict=True)]
    taken = Counter(element for _, element in pairs)
    present = Counter(symbols)
    checks = {
        "sites": list(plan.sites) == sorted(set(plan.sites)),
        "sublattice": set(pairs) <= allowed,
        "species": 1 <= len(set(pairs)) <= limits.species_max,
        "total": 0 < len(pairs) <= limits.concentration_max * len(symbols) + 1e-9,
        "lowest": min(Counter(pairs).values()) >= round(lowest_concentration(limits, len(symbols)) * len(symbols)),
        "host stays": all(2 * n <= present[element] for element, n in taken.items()),
        "labels": sum(plan.concentrations(len(symbols)).values()) == pytest.approx(len(pairs) / len(symbols)),
    }
    return [name for name, holds in checks.items() if not holds]


@settings(deadline=None, max_examples=150)
@given(
    ga=st.integers(2, 60),
    arsenic=st.integers(2, 60),
    few=st.integers(1, 6),
    more=st.integers(0, 5),
    low=st.floats(0.001, 0.2),
    span=st.floats(0, 0.3),
    seed=st.integers(0, 10**6),
)
def test_plans_keep_their_promises(ga, arsenic, few, more, low, span, seed):
    symbols = ["Ga"] * ga + ["As"] * arsenic
    limits = published(
        species_min=few, species_max=min(few + more, 6), concentration_min=low, concentration_max=low + span
    )
    try:
        plan = plan_substitutions(symbols, CANDIDATES, limits, np.random.default_rng(seed))
    except InputError:
        assume(False)
    assert violations(plan, symbols, CANDIDATES, limits) == []


def many(limits, number=3000, symbols=GAAS, candidates=CANDIDATES):
    rng = np.random.default_rng(5)
    return [plan_substitutions(symbols, candidates, limits, rng) for _ in range(number)]


def test_number_of_species_is_uniform():
    pairs = [len({(d, GAAS[s]) for s, d in zip(p.sites, p.dopants, strict=True)}) for p in many(published())]
    counts = np.bincount(pairs, minlength=7)[1:]
    assert counts.min() > 430
    assert counts.max() < 570


def test_one_species_is_log_uniform():
    symbols = ["Si"] * 500
    limits = published(species_max=1)
    counts = np.array([len(p.sites) for p in many(limits, 4000, symbols, [candidate("P", "Si")])])
    # 0.2-25 at.% of 500 sites is 1 to 125 atoms; equal factors in concentration hold equal shares.
    edges = np.array([1, 4.5, 24.5, 125])
    shares = np.histogram(counts, edges)[0] / len(counts)
    assert shares == pytest.approx(np.diff(np.log(edges)) / np.log(125), abs=0.025)


def test_coexisting_species_stay_log_uniform_where_there_is_room():
    symbols = ["Si"] * 500
    limits = published(species_min=6)
    candidates = [candidate(x, "Si") for x in ("P", "As", "Sb", "B", "Al", "Ga")]
    plans = many(limits, 1500, symbols, candidates)
    counts = np.concatenate([list(Counter(plan.dopants).values()) for plan in plans])
    edges = np.array([1.5, 3.5, 7.5, 15.5])
    shares = np.histogram(counts, edges)[0] / ((counts > 1.5) & (counts < 15.5)).sum()
    assert shares == pytest.approx(np.diff(np.log(edges)) / np.log(15.5 / 1.5), abs=0.03)
    assert max(len(plan.sites) for plan in plans) <= 125
    assert np.mean([len(plan.sites) >= 120 for plan in plans]) < 0.15


def test_conditional_counts_equal_rejection():
    """Drawing on condition of the total is the same distribution as throwing away what does not fit."""
    limits = published(species_min=3, species_max=3, concentration_max=0.2)
    symbols = ["Si"] * 40
    plans = many(limits, 4000, symbols, [candidate(x, "Si") for x in ("P", "As", "Sb")])
    exact = Counter(tuple(Counter(plan.dopants)[x] for x in ("P", "As", "Sb")) for plan in plans)
    rng = np.random.default_rng(1)
    draws = np.rint(40 * np.exp(rng.uniform(np.log(1 / 40), np.log(0.2), size=(40000, 3)))).astype(int)
    draws = draws[draws.sum(axis=1) <= 8]
    rejected = Counter(map(tuple, draws.tolist()))
    assert set(exact) <= set(rejected)
    for counts, n in rejected.items():
        assert exact[counts] / 4000 == pytest.approx(n / len(draws), abs=0.03)


def test_sites_are_uniform_on_the_sublattice():
    plans = many(published(species_max=1), 2000, candidates=[candidate("Se", "As")])
    hits = np.bincount(np.concatenate([plan.sites for plan in plans]), minlength=64)
    assert hits[:32].sum() == 0
    assert hits[32:].std() / hits[32:].mean() < 0.12


def test_small_cells_start_at_one_atom():
    limits = published(concentration_min=0.002)
    assert lowest_concentration(limits, 32) == 1 / 32
    assert lowest_concentration(limits, 1000) == 0.002
    plan = plan_substitutions(["Si"] * 4, [candidate("P", "Si")], limits, np.random.default_rng(0))
    assert plan.concentrations(4) == {"P": 0.25}


def test_single_concentration():
    limits = published(concentration_min=0.1, concentration_max=0.1)
    plans = many(limits, 20, ["Si"] * 64, [candidate("P", "Si"), candidate("B", "Si")])
    assert {len(plan.sites) for plan in plans} == {6}


def test_nothing_fits():
    with pytest.raises(InputError, match=r"supercells.*raise atoms_min"):
        plan_substitutions(["Si"] * 3, [candidate("P", "Si")], published(), np.random.default_rng(0))
    with pytest.raises(InputError, match=r"supercells.*raise atoms_min"):  # the only O would vanish
        plan_substitutions(["Si"] * 31 + ["O"], [candidate("F", "O")], published(), np.random.default_rng(0))


def test_antisites_are_labelled_as_dopants():
    plan = Plan(sites=(0, 40, 41), dopants=("Si", "Ga", "Ga"))
    assert plan.concentrations(64) == {"Ga": 2 / 64, "Si": 1 / 64}
    doped = apply(plan, Atoms(GAAS, positions=np.zeros((64, 3))))
    assert doped.symbols[[0, 1, 40, 41, 42]].get_chemical_formula(mode="reduce") == "SiGa3As"
    # The composition alone would say 33 Ga, that is one more; the label says two.
    assert Counter(doped.symbols)["Ga"] - 32 == 1


# --- hosts -------------------------------------------------------------------------------------------------------


def gallium_arsenide():
    return Structure.from_spacegroup(
        "F-43m", Lattice.cubic(5.65), ["Ga", "As"], [[0, 0, 0], [0.25] * 3]
    ).get_primitive_structure()


def primitive_atoms():
    structure = gallium_arsenide()
    symbols = [species.symbol for species in structure.species]
    return Atoms(symbols, scaled_positions=structure.frac_coords, cell=structure.lattice.matrix, pbc=True)


def host(host_id="GaAs", seed=1, **limits):
    return plan_host(host_id, gallium_arsenide(), CANDIDATES, published(**limits), seed)


def test_host_plan():
    planned = host(doped_per_host=30)
    assert planned.n_sites == 32
    assert planned.candidates == tuple(CANDIDATES)
    symbols = expand(primitive_atoms(), planned.matrix).atoms.get_chemical_symbols()
    compositions = set()
    for plan in planned.plans:
        assert violations(plan, symbols, CANDIDATES, published()) == []
        pairs = Counter((d, symbols[s]) for s, d in zip(plan.sites, plan.dopants, strict=True))
        compositions.add(frozenset(pairs.items()))
    assert len(compositions) == 30


def test_more_plans_keep_the_old_ones():
    assert host(doped_per_host=12).plans[:5] == host(doped_per_host=5).plans


def test_dilute_plans_follow_the_others():
    planned = host(doped_per_host=5, dilute_per_host=6, dilute_max=0.07)
    assert planned.plans[:5] == host(doped_per_host=5).plans
    assert len(planned.plans) == 11
    assert [len(plan.sites) for plan in planned.plans[5:]] == [2] * 6  # more would be too many, one is in the library
    assert all(len(plan.sites) == 1 for plan in host(doped_per_host=1, dilute_per_host=3, dilute_max=0.04).plans[1:])
    assert any(len(plan.sites) > 0.07 * planned.n_sites for plan in planned.plans[:5])


def test_plans_depend_on_seed_and_host_only():
    alone = host()
    host("other")
    assert host().plans == alone.plans
    assert host("other").plans != alone.plans
    assert host(seed=2).plans != alone.plans


def test_repeats_where_nothing_else_is_possible():
    planned = plan_host(
        "GaAs", gallium_arsenide(), [candidate("Se", "As")], published(doped_per_host=12, concentration_max=0.1), 0
    )
    assert sorted({len(plan.sites) for plan in planned.plans}) == [1, 2, 3]
    assert len(planned.plans) == 12


def test_host_errors():
    with pytest.raises(PhysicsError, match=r"GaAs.*dopants.overrides.GaAs"):
        plan_host("GaAs", gallium_arsenide(), [], published(), 0)
    with pytest.raises(InputError, match=r"^GaAs: supercells.atoms_min/atoms_max"):
        host(atoms_min=33, atoms_max=33)


def test_json_round_trip():
    planned = host()
    copy = HostPlan.from_dict(json.loads(json.dumps(planned.to_dict())))
    assert copy.to_dict() == planned.to_dict()
    assert copy.plans == planned.plans
    assert copy.candidates == planned.candidates
    assert (copy.matrix == planned.matrix).all()


def test_apply_keeps_order_and_leaves_the_host_alone():
    planned = host()
    supercell = expand(primitive_atoms(), planned.matrix)
    before = supercell.atoms.copy()
    for plan in planned.plans:
        doped = apply(plan, supercell.atoms)
        assert (doped.positions == before.positions).all()
        changed = np.flatnonzero(doped.numbers != before.numbers)
        assert changed.tolist() == list(plan.sites)
        assert [doped.symbols[i] for i in changed] == list(plan.dopants)
    assert supercell.atoms == before
