"""Vacancies: empty sites as candidates, in plans, single defects, superposition, records, labels and networks."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from ase import Atoms
from ase.build import bulk
from fakes import blocks as as_blocks
from fakes import exact_hessian, rock_salt
from hypothesis import given
from hypothesis import strategies as st
from synthetic import make_dataset, make_dataset_with_responses

from defectnet.batches import COMPARISON, library_batch, phonon_batch, relax_batch, structure_of, superpose_batch
from defectnet.check import check
from defectnet.config import Phonons, Relaxation, Supercells, Training, parse_config
from defectnet.costs import Size
from defectnet.dataset.aggregate import aggregate
from defectnet.dataset.samples import Axis, load_responses, load_samples
from defectnet.dataset.schema import Dataset
from defectnet.definet.pairs import pairs_of_runs
from defectnet.dopants import Candidate, recommend
from defectnet.elements import (
    MASSES,
    PUBLISHED_VOCABULARY,
    SYMBOLS,
    VACANCY,
    element_amounts,
    element_vector,
    index_of,
    width_of,
)
from defectnet.errors import InputError
from defectnet.expected import expected_items
from defectnet.experiments.known import look_up
from defectnet.experiments.predict import predict
from defectnet.experiments.spectrum import MeasuredSpectrum
from defectnet.hosts.sheet import write_sheet
from defectnet.layout import Layout
from defectnet.models.response import candidate_properties
from defectnet.phonons.blocks import cut_out, put_back
from defectnet.phonons.crystal import Folding
from defectnet.phonons.hessian import reference_phonons
from defectnet.phonons.library import single_defect
from defectnet.phonons.modes import diagonalise
from defectnet.phonons.probing import probe
from defectnet.phonons.superposition import Superposition
from defectnet.records import RecordStore, write_manifest
from defectnet.relaxation import relax_doped, relax_host
from defectnet.report.figures import figures
from defectnet.supercells import SUBLATTICE_FRACTION_MAX, Plan, apply, plan_host, plan_substitutions
from defectnet.training.evaluate import evaluate
from defectnet.training.fit import load_checkpoint, train

CANDIDATES = [("F", "O"), ("Cl", "O"), ("Cr", "Mg"), ("Na", "Mg"), ("Li", "Mg"), ("K", "Mg")]
PLANS = [((5, 6), ("Cr", "Li")), ((14,), ("F",))]
ONE = np.eye(3, dtype=int)
TIGHT, FINE = Relaxation(fmax_eV_per_A=1e-4), Phonons(displacement_A=1e-3)
MGO = rock_salt("MgO", "Mg", "O", 4.21)


def dopants(**values):
    return parse_config({"dopants": values}, "test").dopants


ALL = dopants(vacancies=["all"])


def recommended(**values):
    settings = parse_config({"dopants": values}, "test")
    return recommend(MGO.build(), "MgO", settings.dopants, settings.hosts.vocabulary)


# Candidates and plans.


def test_vacancies_come_beside_the_recommended_dopants():
    without = recommended(n_type=2, p_type=2)
    assert VACANCY not in {one.dopant for one in without}
    for named, empty in ((["O"], ["O"]), (["S", "Mg"], ["Mg"]), (["all"], ["Mg", "O"])):
        found = recommended(n_type=2, p_type=2, vacancies=named)
        assert found[: len(without)] == without
        assert [(one.dopant, one.replaces) for one in found[len(without) :]] == [(VACANCY, symbol) for symbol in empty]
    # A cation that is missing accepts electrons, an anion gives them.
    assert [one.kind for one in found[-2:]] == ["p", "n"]


def test_own_lists_may_name_vacancies_and_are_complete():
    found = recommended(overrides={"MgO": {"Mg": ["Al", "Vac"]}}, vacancies=["O"])
    assert [(one.dopant, one.replaces) for one in found] == [("Al", "Mg"), (VACANCY, "Mg")]
    with pytest.raises(InputError, match=r"dopants\.overrides\.MgO\.Zn: Zn is not in the host; it contains Mg, O"):
        recommended(overrides={"MgO": {"Zn": ["Vac"]}})


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"vacancies": ["Xx"]}, r"dopants\.vacancies\.0: .*'Xx' is not an element"),
        ({"vacancies": ["Vac"]}, r"dopants\.vacancies\.0: .*'Vac' is not an element"),
        ({"vacancies": True}, r"dopants\.vacancies: Input should be a valid tuple"),
        ({"overrides": {"MgO": {"Vac": ["Al"]}}}, "'Vac' is not an element"),
    ],
)
def test_what_cannot_be_empty_is_refused(values, told):
    with pytest.raises(InputError, match=told):
        dopants(**values)


def test_vocabulary_has_vacancies_where_they_are_asked_for():
    for values, has in (({}, False), ({"vacancies": ["O"]}, True), ({"overrides": {"MgO": {"O": ["Vac"]}}}, True)):
        settings = parse_config({"dopants": values}, "test")
        assert (VACANCY in settings.vocabulary) == has
        assert width_of(settings.vocabulary) == 56 + has
        assert settings.vocabulary[: len(settings.hosts.vocabulary)] == settings.hosts.vocabulary


def test_labels_have_a_place_for_vacancies_that_no_element_has():
    amounts = {"H": 0.1, "Ba": 0.2, VACANCY: 0.3}
    vector = element_vector(amounts, width_of(amounts))
    assert vector.shape == (57,)
    assert element_amounts(vector) == amounts
    assert [SYMBOLS[index_of(symbol)] for symbol in SYMBOLS] == list(SYMBOLS)
    assert MASSES[index_of(VACANCY)] == 0
    assert MASSES[index_of("Mg")] == pytest.approx(24.305)


@given(st.integers(0, 2**32 - 1), st.floats(0.02, 1.0))
def test_no_plan_empties_an_element(seed, highest):
    symbols = ["Mg"] * 8 + ["O"] * 8
    candidates = [Candidate(VACANCY, symbol, "n", "user", 1.0) for symbol in ("Mg", "O")]
    candidates.append(Candidate("Al", "Mg", "n", "user", 1.0))
    settings = Supercells(species_max=3, concentration_min=0.001, concentration_max=max(highest, 1 / 16))
    plan = plan_substitutions(symbols, candidates, settings, np.random.default_rng(seed))
    left = apply(plan, Atoms(symbols, np.arange(48).reshape(16, 3), cell=[50] * 3, pbc=True))
    assert len(left) == 16 - plan.dopants.count(VACANCY) == len(plan.occupied(16))
    for element in ("Mg", "O"):
        assert (left.symbols == element).sum() >= (1 - SUBLATTICE_FRACTION_MAX) * 8
    assert plan.concentrations(16).get(VACANCY, 0) == plan.dopants.count(VACANCY) / 16


def test_a_vacancy_that_would_empty_an_element_is_refused():
    candidates = [Candidate(VACANCY, "Mg", "p", "user", 1.0)]
    with pytest.raises(InputError, match="no dopant fits into 4 atoms"):
        plan_substitutions(["Mg", "O", "O", "O"], candidates, Supercells(concentration_max=1), np.random.default_rng(0))


def test_atoms_that_are_left_are_those_of_the_host():
    host = bulk("NaCl", "rocksalt", a=5.64, cubic=True)
    left = apply(Plan((1, 2, 6), (VACANCY, "K", VACANCY)), host)
    kept = [0, 2, 3, 4, 5, 7]
    np.testing.assert_array_equal(left.positions, host.positions[kept])
    assert list(left.symbols) == ["Na", "K", "Cl", "Na", "Cl", "Cl"]
    np.testing.assert_array_equal(left.cell, host.cell)


def test_plans_without_vacancies_stay_what_they_were():
    """Of a seed and a configuration of before there were any."""
    settings = parse_config({"supercells": {"atoms_min": 16, "atoms_max": 16, "doped_per_host": 2}}, "test")
    candidates = recommend(MGO.build(), "MgO", settings.dopants, settings.hosts.vocabulary)
    plan = plan_host("MgO", MGO.build(), candidates, settings.supercells, settings.run.seed)
    assert [(one.dopant, one.replaces) for one in plan.candidates] == CANDIDATES
    assert [(one.sites, one.dopants) for one in plan.plans] == PLANS


# Single defects and superposition.


class Salt:
    """A relaxed rock salt in a supercell of 16 atoms with single defects on both sites."""

    def __init__(self, model):
        self.model = model
        self.primitive = relax_host(bulk("NaCl", "rocksalt", a=6.03), model, TIGHT).atoms
        self.folding = Folding.of(self.primitive, 2 * ONE)
        self.host = reference_phonons(self.primitive, 2 * ONE, model, FINE, 256).hessian
        self.singles = [self.single(*one) for one in ((0, VACANCY), (1, VACANCY), (0, "K"), (1, "F"))]
        self.superposition = Superposition(
            self.primitive, 2 * ONE, self.host.compact, [one.defect for one in self.singles]
        )

    def single(self, site, dopant):
        return single_defect(self.folding, site, dopant, self.host.matrix, self.model, TIGHT, FINE, 0.0, 256)

    def direct(self, plan):
        """Relaxed atoms, their displacements and Hessian."""
        atoms = relax_doped(apply(plan, self.folding.atoms), self.model, TIGHT).atoms
        moved = atoms.positions - self.folding.atoms.positions[plan.occupied(16)]
        return atoms, moved - moved.mean(axis=0), exact_hessian(self.model, atoms)


@pytest.fixture(scope="module")
def salt(model):
    return Salt(model)


def test_a_vacancy_has_one_atom_fewer_and_the_symmetry_of_its_site(salt, model):
    single = salt.singles[0]
    assert len(single.start) == len(single.relaxed.atoms) == 15
    assert single.quality["converged"] == 1
    # Octahedral: a few displacements instead of 6 x 15, and those of the potential's own derivatives.
    assert single.quality["displacements"] < 15
    exact = exact_hessian(model, single.relaxed.atoms)
    origin = int(np.flatnonzero(salt.folding.parent == 0)[0])
    plan = Plan((origin,), (VACANCY,))
    found = salt.superposition(plan)
    np.testing.assert_allclose(found.hessian, exact, atol=1e-3)
    assert np.abs(exact - salt.superposition.unchanged(plan)).max() > 0.1
    # Displacements of atoms only, which vanish at the missing one.
    defect = single.defect
    assert len(defect.atoms) == 16
    np.testing.assert_array_equal(defect.displacements[origin], 0)
    np.testing.assert_allclose(defect.displacements.sum(axis=0), 0, atol=1e-12)
    assert np.linalg.norm(defect.displacements, axis=1).max() > 1e-2


@pytest.mark.parametrize("atom", [0, 5, 8, 15])
def test_one_vacancy_on_any_site_is_what_is_computed_directly(salt, atom):
    plan = Plan((atom,), (VACANCY,))
    found, (atoms, moved, exact) = salt.superposition(plan), salt.direct(plan)
    assert found.atoms.get_chemical_formula() == atoms.get_chemical_formula()
    assert len(found.atoms) == 15
    np.testing.assert_allclose(found.displacements, moved, atol=2e-4)
    np.testing.assert_allclose(found.hessian, exact, atol=2e-3)


def test_vacancies_and_dopants_together(salt):
    """Sizes, symmetry, sum rule; nearer to what is computed than cut bonds and other masses."""
    plan = Plan((1, 6, 12), ("K", VACANCY, VACANCY))
    found, (atoms, moved, exact) = salt.superposition(plan), salt.direct(plan)
    assert found.hessian.shape == (42, 42)
    np.testing.assert_allclose(found.hessian, found.hessian.T, atol=1e-12)
    np.testing.assert_allclose(as_blocks(found.hessian).sum(axis=1), 0, atol=1e-2)
    np.testing.assert_array_equal(found.atoms.numbers, atoms.numbers)
    np.testing.assert_allclose(found.displacements.sum(axis=0), 0, atol=1e-12)
    start = apply(plan, salt.folding.atoms).positions
    np.testing.assert_allclose(found.atoms.positions - found.displacements, start, atol=1e-12)
    off = [np.linalg.norm(hessian - exact) for hessian in (found.hessian, salt.superposition.unchanged(plan))]
    assert off[0] < 0.5 * off[1]
    assert np.abs(moved - found.displacements).mean() < np.abs(moved).mean()
    backwards = salt.superposition(Plan(plan.sites[::-1], plan.dopants[::-1]))
    np.testing.assert_allclose(backwards.hessian, found.hessian, atol=1e-12)


def test_probing_refines_what_vacancies_superpose_to(salt, model):
    plan = Plan((1, 6, 12), ("K", VACANCY, VACANCY))
    atoms, _, exact = salt.direct(plan)
    probed = probe(salt.superposition, plan, atoms, model, 0.02, 36, np.random.default_rng(0))
    off = [np.linalg.norm(hessian - exact) for hessian in (probed.hessian, salt.superposition(plan).hessian)]
    assert off[0] < 0.2 * off[1]
    assert probed.error < 0.2


def test_vacancies_beyond_each_others_reach_are_exact(model):
    """Where forces end at 6 Å and nothing moves: cut bonds are all there is, and they add up."""
    primitive = Atoms("Cu", cell=[4.1, 4.1, 4.1], pbc=True)
    cube = Folding.of(primitive, 3 * ONE)
    host = exact_hessian(model, cube.atoms)
    still = Relaxation(fmax_eV_per_A=1.0)  # of the forces around a vacancy, so that no atom moves
    single = single_defect(cube, 0, VACANCY, host, model, still, FINE, 0.0, 256)
    assert single.relaxed.quality["relax_steps"] == 0
    wide = Folding.of(primitive, np.diag([3, 3, 6]))
    superposition = Superposition(
        primitive, wide.matrix, as_blocks(exact_hessian(model, wide.atoms))[:1], [single.defect]
    )
    plan = Plan((0, int(wide.index(0, [0, 0, 3]))), (VACANCY, VACANCY))
    exact = exact_hessian(model, apply(plan, wide.atoms))
    assert len(exact) == 3 * 52
    found = superposition(plan).hessian
    np.testing.assert_allclose(found, exact, atol=1e-5 * np.abs(exact).max())
    # Pairs that do not move are what they were: some bonds are cut, and that is all.
    np.testing.assert_allclose(superposition.unchanged(plan), exact, atol=1e-9)


def test_a_cell_with_a_vacancy_repeated_is_the_same_crystal(salt, model):
    plan = Plan((3, 12), ("K", VACANCY))
    atoms, _, hessian = salt.direct(plan)
    matrix = np.diag([2, 4, 2])
    host = reference_phonons(salt.primitive, matrix, model, FINE, 256).hessian
    wide = salt.superposition.into(matrix, host.compact)
    larger = wide.repeated_plan(salt.superposition, plan)
    assert sorted(larger.dopants) == ["K", "K", VACANCY, VACANCY]
    repeated = apply(larger, wide.folding.atoms)
    repeated.positions = wide.repeated_positions(salt.superposition, plan, atoms.positions)
    assert len(repeated) == 30
    assert model.evaluate([repeated]).forces[0] == pytest.approx(0, abs=1e-3)
    found = wide.repeated_hessian(salt.superposition, plan, hessian)
    assert found.shape == (90, 90)
    np.testing.assert_allclose(as_blocks(found).sum(axis=1), 0, atol=1e-2)
    own, of_wide = (
        diagonalise(matrix, one.get_masses(), list(one.symbols)).energies_meV
        for matrix, one in ((hessian, atoms), (found, repeated))
    )
    assert np.abs(of_wide[:, None] - own).min(axis=0).max() < 0.05
    # And superposed in the larger one, it is no worse than the host with its bonds cut.
    exact = exact_hessian(model, repeated)
    off = [np.linalg.norm(one - exact) for one in (wide(larger).hessian, wide.unchanged(larger))]
    assert off[0] < off[1]


def test_cutting_out_keeps_the_sum_rule_and_nothing_else_changes(model):
    atoms = bulk("NaCl", "rocksalt", a=5.7, cubic=True)
    atoms.rattle(0.05, seed=1)
    hessian, kept = exact_hessian(model, atoms), np.array([0, 2, 3, 5, 6, 7])
    left = cut_out(hessian, kept)
    np.testing.assert_allclose(as_blocks(left).sum(axis=1), 0, atol=1e-9)
    before, after = as_blocks(hessian)[kept][:, kept], as_blocks(left)
    others = ~np.eye(6, dtype=bool)
    np.testing.assert_array_equal(after[others], before[others])
    # Which is the Hessian of pairs that are left, as pairs do not know of each other.
    np.testing.assert_allclose(left, exact_hessian(model, atoms[kept]), atol=1e-9)
    whole = put_back(left, kept, 8)
    np.testing.assert_array_equal(as_blocks(whole)[[1, 4]], 0)
    np.testing.assert_array_equal(as_blocks(whole)[kept][:, kept], after)
    assert cut_out(hessian, np.arange(8)) is hessian


# Through the stages.


def settings_of(results, **blocks):
    values = {
        "run": {"name": "test", "results": str(results)},
        "potential": {"name": "analytic"},
        "supercells": {"atoms_min": 8, "atoms_max": 8, "doped_per_host": 2, "concentration_max": 0.25},
        "dopants": {"overrides": {"NaCl": {"Na": ["K"], "Cl": ["F"]}}},
        "phonons": {"atoms_min": 16, "direct_per_host": 1},
        "superposition": {
            "superposed_per_host": 2, "mass_only_per_host": 2, "error_max": 100.0, "concentration_max": 0.25,
        },
    }  # fmt: skip
    for name, block in blocks.items():
        values[name] |= block
    return parse_config(values, "test")


class Run:
    """NaCl through all stages that make records."""

    def __init__(self, config, plans=None):
        host = rock_salt("NaCl", "Na", "Cl", 5.64)
        self.config, self.layout = config, Layout.of(config)
        self.store = RecordStore(self.layout.records)
        candidates = recommend(host.build(), host.id, config.dopants, config.hosts.vocabulary)
        plan = plan_host(host.id, host.build(), candidates, config.supercells, config.run.seed)
        if plans is not None:
            plan = replace(plan, plans=plans)
        self.hosts, self.plan = [host], plan
        common = {host.id: plan}, config, self.store
        self.entries = {"library": library_batch(self.hosts, *common)}
        self.entries["relax"] = relax_batch(self.hosts, *common, self.entries["library"])
        self.entries["phonons"] = phonon_batch(self.entries["relax"], *common, self.entries["library"])
        built_on = (self.entries[stage] for stage in ("relax", "phonons"))
        self.entries["superposed"] = superpose_batch(*built_on, *common, self.entries["library"])

    def record(self, stage, item):
        (entry,) = [entry for entry in self.entries[stage] if entry.item == item]
        return self.store.read(stage, entry.host, entry.key)

    def aggregated(self):
        """The dataset; batches are named after their host."""
        for stage, entries in self.entries.items():
            write_manifest(self.layout.batch(stage, "NaCl"), entries)
        plans = self.layout.batch("supercells", "NaCl")
        plans.parent.mkdir(parents=True)
        plans.write_text(json.dumps({"plans": {"NaCl": self.plan.to_dict()}, "failed": {}}))
        aggregate(self.hosts, self.config, self.layout)
        return self.layout.dataset


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Cells of 16 sites with vacancies on both elements, and spectra of 32 sites."""
    config = settings_of(
        tmp_path_factory.mktemp("vacancies") / "results",
        supercells={"atoms_min": 16, "atoms_max": 16, "species_max": 3},
        dopants={"overrides": {"NaCl": {"Na": ["K", "Vac"], "Cl": ["Vac"]}}},
        phonons={"atoms_min": 32, "direct_per_host": 2},
        superposition={"superposed_per_host": 6, "mass_only_per_host": 3},
    )
    return Run(config, (Plan((3,), (VACANCY,)), Plan((2, 5, 9), ("K", VACANCY, VACANCY))))


def test_every_stage_finishes_with_vacancies(run):
    wanted = expected_items(run.config, run.plan)
    assert wanted["library"] == ["Vac@Cl1", "K@Na0", "Vac@Na0"]
    for stage, items in wanted.items():
        assert [(entry.item, entry.status, entry.reason) for entry in run.entries[stage]] == [
            (item, "done", "") for item in items
        ]


def test_records_have_as_many_atoms_as_are_left(run):
    for item, plan in zip(("doped-0", "doped-1"), run.plan.plans, strict=True):
        relaxed, phonons = run.record("relax", item), run.record("phonons", item)
        vacant, left = plan.dopants.count(VACANCY), len(plan.occupied(16))
        assert len(structure_of(relaxed)) == len(relaxed.arrays["parent"]) == left
        assert relaxed.header["concentrations"] == {
            dopant: count / 16 for dopant, count in sorted(Counter(plan.dopants).items())
        }
        assert relaxed.header["quality"]["converged"] == 1
        # The spectrum is that of the cell twice, and stands beside the pristine one of 32 atoms.
        assert len(phonons.arrays["energies_meV"]) == 3 * (32 - 2 * vacant) - 3
        assert phonons.header["n_atoms"] == 32
        assert VACANCY not in phonons.header["elements"]
    comparison = run.record("superposed", COMPARISON).arrays
    # In its own cell a single vacancy is exact; what is left is cutting at the tolerance, and another cell.
    single, several = comparison["superposed_l1"]
    assert single < 0.1 < several < comparison["mass_only_l1"][1]
    assert comparison["total_doping"].tolist() == [1 / 16, 3 / 16]
    assert comparison["displacement_mae_A"][0] < 0.02 * comparison["displacement_mean_A"][0]


@pytest.fixture(scope="module")
def dataset(run):
    return run.aggregated()


def test_dataset_labels_vacancies(run, dataset):
    with Dataset(dataset) as data:
        assert data.vocabulary[-1] == VACANCY
        assert data.hosts.composition.shape == (1, 56)
        assert data.hosts.candidates.shape == (1, 57)
        assert data.hosts.replaces == [{"K": "Na", VACANCY: "Cl, Na"}]
        assert data.spectra.concentrations.shape[1] == 57
        fidelities = Counter(np.array(data.spectra.fidelity)[data.doped].tolist())
        assert fidelities == {"direct": 2, "superposed": 6, "mass_only": 3}
        named = {data.spectra.id[row]: element_amounts(data.spectra.concentrations[row]) for row in data.doped}
        assert named["NaCl/doped-0"] == {VACANCY: 1 / 16}
        assert named["NaCl/doped-1"] == {"K": 1 / 16, VACANCY: 2 / 16}
        assert sum(VACANCY in amounts for amounts in named.values()) > 4
        for row in data.doped:
            modes, vacant = data.modes(row), data.spectra.concentrations[row, index_of(VACANCY)]
            assert data.spectra.n_atoms[row] == 32
            # A mode fewer in each direction per missing atom; what is there still integrates to 1.
            assert len(modes.energies_meV) == 3 * round(32 * (1 - vacant)) - 3
            assert np.isfinite(modes.energies_meV).all()
            np.testing.assert_allclose(modes.weights.sum(axis=1), 1)
            assert set(modes.elements) <= {"Na", "Cl", "K"}
        area = data.spectra.pdos @ np.diff(data.edges_meV)
        np.testing.assert_allclose(area, 1, atol=1e-3)


def test_responses_of_vacancies_are_known(dataset):
    with Dataset(dataset) as data:
        responses, samples = (load(data, Axis("absolute")) for load in (load_responses, load_samples))
        assert responses.elements.tolist() == [[index_of("K"), index_of(VACANCY)]]
        assert responses.knows_library.all() and responses.knows_mass.all()
        # Cutting bonds alone is another response, and both conserve the area of a spectrum.
        assert np.abs(responses.library - responses.mass_only)[0, 1].max() > 0.1
        np.testing.assert_allclose(responses.library.mean(axis=2), 0, atol=0.05)
        assert samples.candidates.shape == samples.targets.shape == (11, 57)


def test_pairs_for_one_step_relaxation_hold_ghosts(run, dataset, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(run.config.model_dump(mode="json")))
    pairs = {pair.id.removeprefix("test/NaCl/"): pair for pair in pairs_of_runs([path])}
    assert set(pairs) == {"K@Na0", "Vac@Na0", "Vac@Cl1", "doped-0", "doped-1"}
    pair, record = pairs["doped-1"], run.record("relax", "doped-1")
    np.testing.assert_array_equal(np.flatnonzero(~pair.atoms), [5, 9])
    np.testing.assert_array_equal(np.flatnonzero(pair.defects), [2, 5, 9])
    assert pair.species == {"K", "X"}
    np.testing.assert_array_equal(pair.numbers[pair.atoms], record.arrays["numbers"])
    np.testing.assert_array_equal(pair.displacements[~pair.atoms], 0)
    np.testing.assert_allclose(pair.displacements[pair.atoms].sum(axis=0), 0, atol=1e-9)
    np.testing.assert_array_equal(pair.superposed[~pair.atoms], 0)
    left = np.abs(pair.superposed - pair.displacements)[pair.atoms].mean()
    assert left < np.abs(pair.displacements[pair.atoms]).mean()
    single = pairs["Vac@Na0"]
    assert (~single.atoms).sum() == 1 and single.superposed is None


def test_vacancies_cost_what_other_single_defects_do(config):
    """Two elements with a site each; recommended dopants spread over them."""
    sizes = [Size.of(MGO, None, changed) for changed in (config, config.model_copy(update={"dopants": ALL}))]
    assert [number for _, number in sizes[0].defects] == [3, 3]
    assert [number for _, number in sizes[1].defects] == [4, 4]


def test_vacancies_of_an_element_that_no_host_has_are_refused(tmp_path):
    sheet = tmp_path / "hosts.tsv"
    write_sheet(sheet, [MGO])
    config = parse_config({"hosts": {"sheet": str(sheet)}, "dopants": {"vacancies": ["Mg", "S"]}}, "test")
    with pytest.raises(InputError, match=r"dopants\.vacancies: no host of .*hosts\.tsv contains S;"):
        list(check(config, with_potential=False))


# Networks, evaluation, figures and answers, on spring crystals of which one has vacancies.

FORMULAS = ["GaAs", "MgO", "NaCl", "KBr"]


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """Dataset, and checkpoints of both networks, of 24 spectra."""
    folder = tmp_path_factory.mktemp("learned")
    vocabulary = (*PUBLISHED_VOCABULARY, VACANCY)
    make_dataset_with_responses(folder / "dataset.h5", FORMULAS, 6, vocabulary=vocabulary)
    given = folder / "dataset.h5", Training(epochs=2)
    return given[0], {
        preset: train(*given, preset, "row", 0, 0, folder / preset) for preset in ("published", "response")
    }


def test_networks_answer_about_vacancies(learned):
    dataset, checkpoints = learned
    with Dataset(dataset) as data:
        present = data.spectra.concentrations[data.doped, index_of(VACANCY)] > 0
        assert 0 < present.sum() < len(present)
        for preset, path in checkpoints.items():
            trained = load_checkpoint(path)
            assert trained.vocabulary[-1] == VACANCY
            samples = load_samples(data, trained.axis)
            answer = trained.predict(samples, load_responses(data, trained.axis), trained.levels[0]).concentration
            assert answer.shape == (len(samples), 57)
            assert (answer[~samples.candidates] == 0).all()
            if preset == "published":
                assert trained.models[0].config["elements"] == 57
            else:  # which knows what a vacancy does to the spectrum
                asked = samples.candidates[:, index_of(VACANCY)]
                assert answer[asked & present, index_of(VACANCY)].min() > 0


def test_a_published_network_of_elements_is_not_tuned_to_vacancies(learned, tmp_path):
    dataset, _ = learned
    make_dataset(tmp_path / "dataset.h5", FORMULAS[:3], 6)
    base = train(tmp_path / "dataset.h5", Training(epochs=1), "published", "row", 0, 0, tmp_path / "base")
    assert load_checkpoint(base).models[0].config["elements"] == 56
    settings = Training(epochs=1, presets=["finetuned"], pretrained=str(base))
    with pytest.raises(InputError, match="knows vacancies"):
        train(dataset, settings, "finetuned", "row", 0, 0, tmp_path / "tuned")


def test_properties_of_a_vacancy_are_no_elements_and_of_order_one():
    composition = element_vector({"K": 0.5, "Br": 0.5})[None]
    dopant = np.array([[index_of(symbol) for symbol in ("Na", "Rb", VACANCY)]])
    replaced = np.full((1, 3), index_of("K"))
    found = candidate_properties(dopant, replaced, composition)[0]
    assert np.isfinite(found).all() and np.abs(found).max() < 10
    assert (np.linalg.norm(found[2] - found[:2], axis=1) > 1).all()


def test_evaluation_and_figures_show_vacancies(learned, tmp_path):
    dataset, checkpoints = learned
    files = tmp_path / "metrics.json", tmp_path / "predictions.csv.gz"
    evaluate(dataset, list(checkpoints.values()), *files)
    predictions = pd.read_csv(files[1])
    about = predictions[predictions["element"] == VACANCY]
    assert set(about["host"]) == {"host-KBr"} and set(about["replaces"]) == {"Br"}
    ratios = json.loads(files[0].read_text())["splits"]["row"]["response"]["library"]["subsets"]["mass_ratio"]
    assert ratios["<0.5"]["n"] >= len(about[about["level"] == "library"])
    histories = [path.with_name("history.csv") for path in checkpoints.values()]
    drawn = figures(dataset, *files, histories, tmp_path / "figures")
    assert all(path.stat().st_size > 1000 for path in drawn)


def test_a_sample_is_asked_about_vacancies(learned):
    dataset, checkpoints = learned
    known = look_up(dataset, "KBr")
    with Dataset(dataset) as data:
        host = data.hosts.id.index("host-KBr")
        row = data.doped[data.spectra.host[data.doped] == host][0]
        edges = data.edges_meV

        def measured(of):
            return MeasuredSpectrum(
                0.5 * (edges[1:] + edges[:-1]), data.spectra.pdos[of], None,
                np.stack([edges[:-1], edges[1:]], axis=1), "none", "test",
            )  # fmt: skip

        pair = measured(data.spectra.reference[row]), measured(row)
    found = predict(checkpoints["response"], *pair, "KBr", ["Na", VACANCY], known)
    assert [(one.element, one.replaces, one.knowledge) for one in found.dopants] == [
        ("Na", "K", "library"), (VACANCY, "Br", "library"),
    ]  # fmt: skip
    assert {one.element for one in predict(checkpoints["response"], *pair, "KBr", None, known).dopants} == {
        "Na", "Rb", "Cl", VACANCY,
    }  # fmt: skip
    both = replace(known, replaces={VACANCY: "K, Br"})
    assert predict(checkpoints["response"], *pair, "KBr", [VACANCY], both).dopants[0].replaces == "K, Br"
    unknown = predict(checkpoints["response"], *pair, "KBr", [VACANCY])
    assert unknown.dopants[0].replaces in ("K", "Br") and unknown.dopants[0].knowledge == "none"
