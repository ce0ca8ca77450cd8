import json
import re
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from ase.data import atomic_masses, atomic_numbers, chemical_symbols
from fakes import exact_hessian, rock_salt
from hypothesis import given
from hypothesis import strategies as st

from defectnet.batches import (
    COMPARISON,
    PRISTINE,
    RESPONSES,
    assign,
    atoms_of,
    library_batch,
    modes_of,
    phonon_batch,
    relax_batch,
    select_batch,
    structure_of,
    superpose_batch,
)
from defectnet.batches.library import read_library
from defectnet.batches.superposed import concentration_limit
from defectnet.config import parse_config
from defectnet.dataset.aggregate import aggregate
from defectnet.dataset.schema import COMPARED, Dataset, content_digest
from defectnet.dopants import recommend
from defectnet.elements import element_amounts
from defectnet.errors import InputError, PhysicsError, RecordError
from defectnet.layout import Layout
from defectnet.phonons.modes import diagonalise
from defectnet.phonons.pdos import energy_edges, pdos
from defectnet.potentials.analytic import MorsePairs
from defectnet.potentials.base import Evaluation
from defectnet.records import Entry, Record, RecordStore, read_manifest, read_record, write_atomically, write_manifest
from defectnet.supercells import Plan, apply, expand, plan_host

ITEMS = [PRISTINE, "doped-0", "doped-1"]


def changed(config, **blocks):
    """The configuration with other values, as ``block={key: value}``."""
    values = config.model_dump(mode="json")
    for block, keys in blocks.items():
        values[block] |= keys
    return parse_config(values, "test")


def plan(host, config):
    candidates = recommend(host.build(), host.id, config.dopants, config.hosts.vocabulary)
    return plan_host(host.id, host.build(), candidates, config.supercells, config.run.seed)


@pytest.fixture(scope="module")
def plans(hosts, config):
    return {host.id: plan(host, config) for host in hosts}


@pytest.fixture(scope="module")
def two(hosts):
    return hosts[:2]


def short(plans, number):
    """The same plans with fewer doped cells."""
    return {host_id: replace(one, plans=one.plans[:number]) for host_id, one in plans.items()}


def copy_records(store, folder, pattern="*"):
    """A store of its own, free to be damaged."""
    for path in store.root.glob(f"*/{pattern}/*.h5"):
        write_atomically(folder / path.relative_to(store.root), path.read_bytes())
    return RecordStore(folder)


def both(hosts, plans, config, store):
    relaxations = relax_batch(hosts, plans, config, store)
    return relaxations, phonon_batch(relaxations, plans, config, store)


@pytest.fixture(scope="module")
def finished(two, plans, config, tmp_path_factory):
    """Two hosts through both stages: store, manifests."""
    store = RecordStore(tmp_path_factory.mktemp("run") / "records")
    return store, *both(two, plans, config, store)


@pytest.fixture
def copied(finished, tmp_path):
    """The same in a folder of its own."""
    store, relaxations, phonons = finished
    return copy_records(store, tmp_path / "records"), relaxations, phonons


@pytest.fixture
def broken(monkeypatch):
    """``broken(when, how)``: from here on, structures for which ``when(atoms)`` holds are evaluated by ``how``."""

    def install(when, how):
        original = MorsePairs.evaluate

        def evaluate(self, structures):
            results = [(how if when(atoms) else lambda one: original(self, [one]))(atoms) for atoms in structures]
            return Evaluation(
                np.concatenate([result.energies for result in results]),
                [force for result in results for force in result.forces],
                np.concatenate([result.stresses for result in results]),
            )

        def forces_of_displaced(self, atoms, displacements):
            copies = [atoms.copy() for _ in displacements]
            for copy, displacement in zip(copies, displacements, strict=True):
                copy.positions += displacement
            return np.array(self.evaluate(copies).forces)

        monkeypatch.setattr(MorsePairs, "evaluate", evaluate)
        monkeypatch.setattr(MorsePairs, "forces_of_displaced", forces_of_displaced)

    return install


def not_finite(atoms):
    return Evaluation(np.array([np.nan]), [np.full((len(atoms), 3), np.nan)], np.full((1, 3, 3), np.nan))


def refuse(error):
    def evaluate(atoms):
        raise error

    return evaluate


def is_host(*symbols):
    return lambda atoms: len(atoms) == 2 and set(atoms.symbols) == set(symbols)


# --- batches ------------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(0, 30), st.integers(1, 12))
def test_appended_hosts_never_move_earlier_ones(number, more, per_batch):
    hosts = [replace(rock_salt("x", "Na", "Cl", 5.64), id=f"host-{i}") for i in range(number + more)]
    settings = parse_config({"hosts": {"per_batch": per_batch}}, "test")
    before, after = assign(hosts[:number], settings), assign(hosts, settings)
    ids = [host.id for host in hosts]
    for name, members in before.items():
        assert after[name][: len(members)] == members
    # Every host is in one batch, in the order of the sheet, and batches are full but for the last.
    assert [host for members in after.values() for host in members] == ids
    assert all(len(members) == per_batch for members in list(after.values())[:-1])
    assert list(after)[: len(before)] == list(before)


def test_batch_of_one_is_named_after_its_host(hosts, config):
    assert assign(hosts[:2], config) == {host.id: [host.id] for host in hosts[:2]}
    assert assign([], changed(config, hosts={"per_batch": 3})) == {}


def test_hosts_of_a_batch(hosts, config):
    pairs = changed(config, hosts={"per_batch": 2})
    first, second = assign(hosts, pairs)
    assert select_batch(hosts, pairs, first) == hosts[:2]
    assert select_batch(hosts, pairs, second) == hosts[2:]
    with pytest.raises(InputError, match=rf"no batch 'x'.*{first}"):
        select_batch(hosts, pairs, "x")


# --- end to end ---------------------------------------------------------------------------------------------------


def test_every_item_is_finished(finished, two):
    _, relaxations, phonons = finished
    expected = [(host.id, item, "done", "") for host in two for item in ITEMS]
    for entries in (relaxations, phonons):
        assert [(e.host, e.item, e.status, e.reason) for e in entries] == expected
        assert len({entry.key for entry in entries}) == len(entries)


def test_relaxation_records_say_what_happened(finished, two, plans, config, model):
    store, relaxations, _ = finished
    for entry in relaxations:
        record = store.find("relax", entry.host, entry.key)
        host, plan = next(host for host in two if host.id == entry.host), plans[entry.host]
        atoms, arrays = structure_of(record), record.arrays
        forces = model.evaluate([atoms]).forces[0]
        np.testing.assert_allclose(arrays["forces"], forces, atol=1e-10)
        quality = record.header["quality"]
        assert quality["converged"] == 1
        assert quality["residual_force_eV_per_A"] == pytest.approx(np.linalg.norm(forces, axis=1).max(), abs=1e-9)
        assert record.header["potential"] == model.identity.as_dict()
        assert record.header["cost"]["wall_s"] > 0
        if entry.item == PRISTINE:
            np.testing.assert_array_equal(arrays["start_positions"], atoms_of(host).positions)
            continue
        pristine = structure_of(store.find("relax", entry.host, relaxations[relaxations.index(entry) // 3 * 3].key))
        substitutions = plan.plans[int(entry.item.split("-")[1])]
        start = apply(substitutions, expand(pristine, plan.matrix).atoms)
        np.testing.assert_allclose(arrays["start_positions"], start.positions, atol=1e-12)
        np.testing.assert_allclose(arrays["cell"], plan.matrix @ pristine.cell[:], atol=1e-12)
        np.testing.assert_array_equal(arrays["numbers"], start.numbers)
        # An atom is a lattice translation of its parent, and keeps its element unless it is replaced.
        offset = start.positions - pristine.positions[arrays["parent"]]
        cells = offset @ np.linalg.inv(pristine.cell[:])
        np.testing.assert_allclose(cells, cells.round(), atol=1e-9)
        kept = np.setdiff1d(np.arange(16), substitutions.sites)
        np.testing.assert_array_equal(start.numbers[kept], pristine.numbers[arrays["parent"]][kept])
        counts = {symbol: substitutions.dopants.count(symbol) / 16 for symbol in substitutions.dopants}
        assert record.header["concentrations"] == counts


def test_phonon_records_hold_the_modes_of_the_relaxed_cells(finished, plans, config, model):
    store, relaxations, phonons = finished
    for relaxation, entry in zip(relaxations, phonons, strict=True):
        record = store.find("phonons", entry.host, entry.key)
        atoms = structure_of(store.find("relax", relaxation.host, relaxation.key))
        if entry.item == PRISTINE:
            atoms = expand(atoms, plans[entry.host].matrix).atoms
            assert record.header["concentrations"] == {}
            assert record.arrays["force_constants"].shape == (2, 16, 3, 3)
        unit = np.eye(48).reshape(48, 16, 3)
        exact = model.hessian_vector_products(atoms, unit).reshape(48, 48)
        modes = diagonalise(exact, atomic_masses[atoms.numbers], list(atoms.symbols))
        # Finite displacements of 0.01 Å; near zero a small error of the square is a large one of the energy.
        squares = [np.sign(e) * e**2 for e in (record.arrays["energies_meV"], modes.energies_meV)]
        np.testing.assert_allclose(*squares, atol=1e-3 * np.abs(squares[1]).max())
        assert tuple(record.header["elements"]) == modes.elements
        assert record.arrays["weights"].shape == (45, len(modes.elements))
        np.testing.assert_allclose(record.arrays["weights"].sum(axis=1), 1, atol=1e-5)
        assert record.header["relax_key"] == relaxation.key
        assert record.header["n_atoms"] == 16


def test_second_call_computes_nothing(copied, two, plans, config, evaluated, monkeypatch):
    store, relaxations, phonons = copied
    before = {path: path.read_bytes() for path in store.root.rglob("*.h5")}
    # Not even the potential is loaded.
    monkeypatch.setattr("defectnet.potentials.load", lambda settings: pytest.fail("loaded"))
    assert both(two, plans, config, store) == (relaxations, phonons)
    assert evaluated == []
    assert {path: path.read_bytes() for path in store.root.rglob("*.h5")} == before


def test_results_do_not_depend_on_other_hosts(finished, two, plans, config, store):
    done, relaxations, phonons = finished
    assert both(two[1:], short(plans, 1), config, store) == (relaxations[3:5], phonons[3:5])
    for entry in phonons[3:5]:
        alone, together = (s.find("phonons", entry.host, entry.key).arrays for s in (store, done))
        np.testing.assert_array_equal(alone["energies_meV"], together["energies_meV"])


def test_changes_that_cannot_matter_change_no_key(copied, two, plans, config, evaluated):
    store, relaxations, phonons = copied
    other = changed(
        config,
        run={"name": "other", "seed": 1},
        potential={"atoms_per_pass": 16, "python": "python"},
        spectra={"sigma_meV": 3.0},
        training={"epochs": 1},
        relaxation={"steps_max": 400},
    )
    assert both(two, plans, other, store) == (relaxations, phonons)
    assert evaluated == []


@pytest.mark.parametrize(
    ("blocks", "relaxations_kept", "phonons_kept"),
    [
        ({"phonons": {"displacement_A": 0.02}}, [True, True], [False, False]),
        ({"phonons": {"symprec_A": 1e-4}}, [True, True], [False, False]),
        ({"relaxation": {"doped_cell": True}}, [True, False], [True, False]),
        ({"relaxation": {"fmax_eV_per_A": 0.02}}, [False, False], [False, False]),
        ({"relaxation": {"optimizer": "FIRE"}}, [False, False], [False, False]),
        ({"relaxation": {"host_cell": False}}, [False, False], [False, False]),
    ],
)
def test_changes_that_matter_make_new_records(
    copied, two, plans, config, blocks, relaxations_kept, phonons_kept, evaluated
):
    store, relaxations, phonons = copied
    new_relaxations, new_phonons = both(two[:1], short(plans, 1), changed(config, **blocks), store)
    assert [old.key == new.key for old, new in zip(relaxations, new_relaxations, strict=False)] == relaxations_kept
    assert [old.key == new.key for old, new in zip(phonons, new_phonons, strict=False)] == phonons_kept
    assert evaluated
    # Earlier work stays.
    assert all(store.path("phonons", e.host, e.key).exists() for e in phonons)


@pytest.mark.parametrize(
    "other", [Plan((1,), ("Li",)), Plan((0,), ("Mg",)), Plan((0, 1), ("Li", "Li"))], ids=["site", "dopant", "one more"]
)
def test_every_substitution_has_a_key_of_its_own(copied, two, plans, config, other):
    store, _, _ = copied
    both_plans = {"NaCl": replace(plans["NaCl"], plans=(Plan((0,), ("Li",)), other))}
    _, one, another = relax_batch(two[:1], both_plans, config, store)
    assert one.key != another.key
    numbers = [store.find("relax", "NaCl", entry.key).arrays["numbers"].tolist() for entry in (one, another)]
    assert numbers[0] != numbers[1]


@pytest.mark.parametrize("stage", ["relax", "phonons"])
@pytest.mark.parametrize("number", [0, 2])
def test_only_a_deleted_record_is_computed_again(copied, two, plans, config, stage, number, evaluated):
    store, relaxations, phonons = copied
    entry = (relaxations if stage == "relax" else phonons)[number]
    path = store.path(stage, entry.host, entry.key)
    original = read_record(path)
    others = {p: p.read_bytes() for p in store.root.rglob("*.h5") if p != path}
    path.unlink()
    assert both(two, plans, config, store) == (relaxations, phonons)
    again = read_record(path)
    assert original.header["quality"] == again.header["quality"]
    for name, array in original.arrays.items():
        np.testing.assert_array_equal(again.arrays[name], array)
    assert {p: p.read_bytes() for p in others} == others
    quality = original.header["quality"]
    assert len(evaluated) == (quality["relax_evaluations"] if stage == "relax" else quality["displacements"] + 1)


def test_a_damaged_record_is_computed_again(copied, two, plans, config):
    store, relaxations, phonons = copied
    path = store.path("relax", relaxations[1].host, relaxations[1].key)
    original = read_record(path)
    path.write_bytes(path.read_bytes()[:-200])
    assert both(two, plans, config, store) == (relaxations, phonons)
    np.testing.assert_array_equal(read_record(path).arrays["positions"], original.arrays["positions"])


def test_more_doped_cells_keep_the_earlier_ones(copied, two, config, evaluated):
    store, relaxations, phonons = copied
    more = changed(config, supercells={"doped_per_host": 3})
    plans = {host.id: plan(host, more) for host in two}
    new_relaxations, new_phonons = both(two, plans, more, store)
    for old, new, stage in ((relaxations, new_relaxations, "relax"), (phonons, new_phonons, "phonons")):
        assert [e for e in new if e.item != "doped-2"] == old
        assert [e.status for e in new if e.item == "doped-2"] == ["done", "done"]
        assert all(store.path(stage, e.host, e.key).exists() for e in new)
    assert {len(atoms) for atoms in evaluated} == {16}  # no host was touched


# --- trouble ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (not_finite, "PhysicsError: relaxation exploded at step 0: forces are not finite"),
        (refuse(PhysicsError("Na is beyond me")), "PhysicsError: Na is beyond me"),
        (refuse(np.linalg.LinAlgError("singular")), "LinAlgError: singular"),
        (refuse(ZeroDivisionError("by zero")), "ZeroDivisionError: by zero"),
    ],
)
def test_a_host_that_fails_stops_no_other(two, plans, config, tmp_path, broken, how, reason, finished):
    store = copy_records(finished[0], tmp_path / "records", "KF")
    broken(is_host("Na", "Cl"), how)
    relaxations, phonons = both(two, plans, config, store)
    assert [(e.item, e.status) for e in relaxations[:3]] == [
        (PRISTINE, "failed"),
        ("doped-0", "skipped"),
        ("doped-1", "skipped"),
    ]
    assert relaxations[0].reason == reason
    assert store.find("relax", "NaCl", relaxations[0].key).header["reason"] == reason
    for entry in relaxations[1:3]:
        assert entry.reason == f"pristine host: {reason}"
        assert entry.key == ""
    assert [entry.status for entry in phonons[:3]] == ["skipped"] * 3
    for entry in phonons[:3]:
        assert reason in entry.reason
    # The other host does not notice.
    assert (relaxations[3:], phonons[3:]) == (finished[1][3:], finished[2][3:])


def test_a_failure_is_remembered(two, plans, config, store, broken, evaluated, monkeypatch):
    broken(is_host("Na", "Cl"), not_finite)
    first = both(two[:1], plans, config, store)
    assert len(evaluated) == 0  # the broken host never reaches the potential
    assert first[0][0].status == "failed"
    monkeypatch.setattr(MorsePairs, "evaluate", lambda self, structures: pytest.fail("tried again"))
    assert both(two[:1], plans, config, store) == first


def test_a_doped_cell_that_fails_stops_no_other(two, plans, config, store, broken):
    dopants = set(plans["NaCl"].plans[0].dopants)
    other = set(plans["NaCl"].plans[1].dopants)
    unlucky = sorted(dopants - other)[0]
    broken(lambda atoms: unlucky in atoms.symbols and "Cl" in atoms.symbols, not_finite)
    relaxations, phonons = both(two[:1], plans, config, store)
    assert [e.status for e in relaxations] == ["done", "failed", "done"]
    assert [e.status for e in phonons] == ["done", "skipped", "done"]
    assert "not finite" in phonons[1].reason


def test_phonons_that_fail_stop_no_other(two, plans, config, copied, broken):
    store, relaxations, phonons = copied
    for path in store.root.glob("phonons/NaCl/*.h5"):
        path.unlink()
    unlucky = relaxations[1]
    numbers = store.find("relax", unlucky.host, unlucky.key).arrays["numbers"]
    broken(lambda atoms: np.array_equal(atoms.numbers, numbers), not_finite)
    again = phonon_batch(relaxations, plans, config, store)
    assert [e.status for e in again] == ["done", "failed", "done", "done", "done", "done"]
    assert "not finite" in again[1].reason
    assert [e.key for e in again] == [e.key for e in phonons]
    assert list(store.root.rglob("*.partial.npy")) == []


@pytest.mark.parametrize("error", [MemoryError("host memory"), OSError(28, "No space left"), KeyboardInterrupt()])
def test_trouble_of_the_machine_is_not_remembered(two, plans, config, store, broken, monkeypatch, error, finished):
    broken(is_host("Na", "Cl"), refuse(error))
    with pytest.raises(type(error)):
        relax_batch(two, plans, config, store)
    assert list(store.root.rglob("*.h5")) == []
    monkeypatch.undo()
    assert relax_batch(two[:1], short(plans, 0), config, store) == finished[1][:1]


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(torch.OutOfMemoryError("CUDA out of memory"), id="memory"),
        pytest.param(
            torch.AcceleratorError("CUDA error: device-side assert triggered"),
            id="device",
        ),
    ],
)
def test_trouble_of_the_gpu_is_not_remembered(two, plans, config, store, broken, error):
    broken(is_host("Na", "Cl"), refuse(error))
    with pytest.raises(Exception, match=r"GPU memory|CUDA"):
        relax_batch(two, short(plans, 0), config, store)
    assert list(store.root.glob("relax/NaCl/*.h5")) == []


@pytest.mark.parametrize("error", [TypeError("no symmetry found"), IndexError("empty"), KeyError("Cl")])
def test_unforeseen_trouble_of_one_host_stops_no_other(two, plans, config, store, broken, error):
    broken(is_host("Na", "Cl"), refuse(error))
    relaxations = relax_batch(two, short(plans, 0), config, store)
    assert [e.status for e in relaxations] == ["failed", "done"]


def test_phonons_go_on_where_they_were_killed(copied, two, plans, config, monkeypatch, evaluated):
    store, relaxations, phonons = copied
    entry = phonons[1]
    path = store.path("phonons", entry.host, entry.key)
    original = read_record(path)
    path.unlink()
    counting = MorsePairs.forces_of_displaced
    calls = []

    def killed(self, atoms, displacements):
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return counting(self, atoms, displacements)

    slow = changed(config, potential={"atoms_per_pass": 16})
    with monkeypatch.context() as patch:
        patch.setattr(MorsePairs, "forces_of_displaced", killed)
        with pytest.raises(KeyboardInterrupt):
            phonon_batch(relaxations, plans, slow, store)
    assert len(evaluated) == 1
    assert len(list(store.root.rglob("*.partial.npy"))) == 1
    assert phonon_batch(relaxations, plans, slow, store) == phonons
    assert len(evaluated) == original.header["quality"]["displacements"] + 1
    np.testing.assert_array_equal(read_record(path).arrays["energies_meV"], original.arrays["energies_meV"])
    assert list(store.root.rglob("*.partial.npy")) == []


def test_unconverged_host_is_skipped_and_tried_again(two, plans, config, store, evaluated, finished):
    hurried = changed(config, relaxation={"steps_max": 1})
    two, plans = two[:1], short(plans, 1)
    relaxations, phonons = both(two, plans, hurried, store)
    assert [e.status for e in relaxations] == ["done", "skipped"]
    for entry in (*relaxations[1:], *phonons):
        assert entry.status == "skipped"
        assert "not converged after 1 steps: " in entry.reason and entry.reason.endswith("raise relaxation.steps_max")
    # With the same patience there is nothing to do; with less, neither.
    count = len(evaluated)
    assert both(two, plans, hurried, store) == (relaxations, phonons)
    assert len(evaluated) == count
    # With more, the same keys get their results.
    assert both(two, plans, config, store) == (finished[1][:2], finished[2][:2])


def test_converged_work_is_kept_when_more_steps_are_allowed(two, plans, config, store, evaluated):
    """NaCl needs fewer steps than KF, so there is a number that is enough for one of them."""
    needed = {}
    for host in two:
        entry, *_ = relax_batch([host], {host.id: replace(plans[host.id], plans=())}, config, store)
        needed[host.id] = store.find("relax", host.id, entry.key).header["quality"]["relax_steps"]
    quick, slow = sorted(needed, key=needed.get)
    assert needed[quick] < needed[slow]
    fresh = RecordStore(store.root.parent / "fresh")
    bare = {host.id: replace(plans[host.id], plans=()) for host in two}
    hurried = changed(config, relaxation={"steps_max": needed[quick]})
    entries = {e.host: e for e in relax_batch(two, bare, hurried, fresh)}
    before = {h: fresh.path("relax", h, e.key).read_bytes() for h, e in entries.items()}
    evaluated.clear()
    relax_batch(two, bare, config, fresh)
    after = {h: fresh.path("relax", h, e.key).read_bytes() for h, e in entries.items()}
    assert before[quick] == after[quick]
    assert fresh.find("relax", slow, entries[slow].key).header["quality"]["converged"] == 1
    assert len(evaluated) == needed[slow] + 1


def test_record_that_vanished_between_the_stages(copied, two, plans, config):
    store, relaxations, phonons = copied
    store.path("relax", relaxations[1].host, relaxations[1].key).unlink()
    again = phonon_batch(relaxations, plans, config, store)
    assert again[1].status == "skipped"
    assert "defectnet relax" in again[1].reason
    assert again[:1] + again[2:] == phonons[:1] + phonons[2:]


# --- single defects and superposition -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What the stages made of some hosts."""

    store: RecordStore
    library: list[Entry]
    relaxations: list[Entry]
    phonons: list[Entry]
    superposed: list[Entry]

    def manifests(self):
        return self.library, self.relaxations, self.phonons, self.superposed

    def of(self, stage, host, item):
        """The record of one item."""
        entries = {"library": self.library, "relax": self.relaxations, "phonons": self.phonons}
        entry = next(e for e in entries.get(stage, self.superposed) if (e.host, e.item) == (host, item))
        return self.store.find(stage, host, entry.key)

    def known(self, plan):
        """The single defects of a host, read back."""
        host = plan.host_id
        relaxed, pristine = self.of("relax", host, PRISTINE), self.of("phonons", host, PRISTINE)
        return read_library(self.store, relaxed, pristine, plan, self.library)


def all_stages(hosts, plans, config, store):
    library = library_batch(hosts, plans, config, store)
    relaxations = relax_batch(hosts, plans, config, store, library)
    phonons = phonon_batch(relaxations, plans, config, store, library)
    return Run(
        store, library, relaxations, phonons, superpose_batch(relaxations, phonons, plans, config, store, library)
    )


@pytest.fixture(scope="module")
def cheap(config):
    """One doped cell by finite differences, the other probed; few superposed spectra."""
    superposition = {"superposed_per_host": 3, "mass_only_per_host": 2}
    return changed(config, phonons={"direct_per_host": 1, "probing_tolerance": 0.3}, superposition=superposition)


@pytest.fixture(scope="module")
def arranged(plans):
    """Two doped cells of NaCl, where superposition works; KF is unstable and it does not.

    The second has little symmetry left, so that probing it pays.
    """
    nacl = (Plan((6, 11), ("Mg", "S")), Plan((0, 2, 9), ("Li", "Mg", "S")))
    return {"NaCl": replace(plans["NaCl"], plans=nacl), "KF": plans["KF"]}


@pytest.fixture(scope="module")
def complete(two, arranged, cheap, tmp_path_factory):
    """Two hosts through all stages."""
    return all_stages(two, arranged, cheap, RecordStore(tmp_path_factory.mktemp("complete") / "records"))


@pytest.fixture
def copied_run(complete, tmp_path):
    """The same in a folder of its own."""
    return replace(complete, store=copy_records(complete.store, tmp_path / "copy"))


def superpose_again(run, plans, config):
    return superpose_batch(run.relaxations, run.phonons, plans, config, run.store, run.library)


def test_library_holds_every_single_defect(complete, arranged, model):
    assert [(e.host, e.item, e.status) for e in complete.library] == [
        ("NaCl", "S@Cl1", "done"),
        ("NaCl", "Li@Na0", "done"),
        ("NaCl", "Mg@Na0", "done"),
        ("KF", "O@F1", "done"),
        ("KF", "Na@K0", "done"),
        ("KF", "Ca@K0", "done"),
    ]
    known = complete.known(arranged["NaCl"])
    pristine = structure_of(complete.of("relax", "NaCl", PRISTINE))
    cell = expand(pristine, arranged["NaCl"].matrix)
    for entry in complete.library[:3]:
        record = complete.of("library", "NaCl", entry.item)
        relaxed = structure_of(record)
        dopant, site = record.header["dopant"], record.header["site"]
        changed_atoms = np.flatnonzero(relaxed.numbers != cell.atoms.numbers)
        assert [relaxed.symbols[atom] for atom in changed_atoms] == [dopant]
        assert cell.parent[changed_atoms] == [site]
        assert record.header["quality"]["converged"] == 1
        # In the supercell that it comes from, a single defect is what was computed there.
        superposed = known.superpose(Plan(tuple(changed_atoms.tolist()), (dopant,)))
        moved = relaxed.positions - cell.atoms.positions
        np.testing.assert_allclose(superposed.displacements, moved - moved.mean(axis=0), atol=1e-6)
        exact = exact_hessian(model, relaxed)
        assert np.linalg.norm(superposed.hessian - exact) < 0.01 * np.linalg.norm(exact)


def test_library_without_force_constants(complete, two, arranged, cheap, tmp_path):
    """Single defects go where those of the whole library go, relaxations may start there, spectra need no library."""
    bare = changed(cheap, superposition={"force_constants": False, "superposed_per_host": 0})
    run = all_stages(two, arranged, bare, RecordStore(tmp_path / "records"))
    for whole, entry in zip(complete.library, run.library, strict=True):
        assert (entry.item, entry.status) == (whole.item, "done")
        assert entry.key != whole.key
        record = run.of("library", entry.host, entry.item)
        np.testing.assert_array_equal(
            record.arrays["displacements"], complete.of("library", entry.host, entry.item).arrays["displacements"]
        )
        assert len(record.arrays["blocks"]) == 0
        assert "imaginary_modes" not in record.header["quality"]
    for item in ITEMS[1:]:
        assert "warm" in run.of("relax", "NaCl", item).header["quality"]
        assert run.of("phonons", "NaCl", item).header["fidelity"] == "direct"
    responses = run.of("superposed", "NaCl", RESPONSES)
    assert set(responses.header["fidelities"]) == {"mass_only"}
    with pytest.raises(InputError, match="superposed_per_host to 0"):
        changed(cheap, superposition={"force_constants": False})


def test_second_call_of_all_stages_computes_nothing(copied_run, two, arranged, cheap, evaluated, monkeypatch):
    before = {path: path.read_bytes() for path in copied_run.store.root.rglob("*.h5")}
    monkeypatch.setattr("defectnet.potentials.load", lambda settings: pytest.fail("loaded"))
    again = all_stages(two, arranged, cheap, copied_run.store)
    assert again.manifests() == copied_run.manifests()
    assert evaluated == []
    assert {path: path.read_bytes() for path in copied_run.store.root.rglob("*.h5")} == before


@pytest.mark.parametrize(
    ("blocks", "kept"),
    [
        (
            {
                "run": {"seed": 1},
                "superposition": {"superposed_per_host": 7, "error_max": 0.9, "concentration_max": 0.1},
                "spectra": {"sigma_meV": 2.0},
                "relaxation": {"start": "unrelaxed", "doped_cell": True, "steps_max": 400},
                "phonons": {"direct_per_host": 2, "probes_max": 20, "probing_tolerance": 0.3, "follow_imaginary": 0},
            },
            True,
        ),
        ({"superposition": {"tolerance_eV_per_A2": 0.01}}, False),
        ({"superposition": {"displacement_max_A": 3.0}}, False),
        ({"phonons": {"displacement_A": 0.02}}, False),
        ({"relaxation": {"fmax_eV_per_A": 0.02}}, False),
    ],
    ids=["what cannot matter", "tolerance", "farthest", "displacement", "fmax"],
)
def test_keys_of_single_defects(copied_run, two, arranged, cheap, blocks, kept, evaluated):
    one = {"NaCl": replace(arranged["NaCl"], candidates=arranged["NaCl"].candidates[:1])}
    (entry,) = library_batch(two[:1], one, changed(cheap, **blocks), copied_run.store)
    assert (entry == copied_run.library[0]) == (not evaluated) == kept
    assert entry.item == "S@Cl1" and entry.status == "done"


def test_only_a_deleted_single_defect_is_computed_again(copied_run, two, arranged, cheap, evaluated):
    lost = copied_run.library[1]
    path = copied_run.store.path("library", lost.host, lost.key)
    original = read_record(path)
    path.unlink()
    assert library_batch(two, arranged, cheap, copied_run.store) == copied_run.library
    quality = original.header["quality"]
    assert len(evaluated) == quality["relax_evaluations"] + quality["displacements"] + 1
    for name, array in original.arrays.items():
        np.testing.assert_array_equal(read_record(path).arrays[name], array)


def test_no_single_defects_without_a_pristine_host(complete, two, arranged, cheap, tmp_path, broken):
    store = copy_records(complete.store, tmp_path / "records", "KF")
    broken(is_host("Na", "Cl"), not_finite)
    run = all_stages(two, arranged, cheap, store)
    assert [(e.host, e.item, e.status) for e in run.library[:1]] == [("NaCl", "defects", "skipped")]
    assert run.library[0].reason.startswith("pristine host: PhysicsError: relaxation exploded")
    assert [e.status for e in run.relaxations[:3]] == ["failed", "skipped", "skipped"]
    assert {e.host for e in run.superposed} == {"KF"}
    # The other host does not notice.
    kept = [[e for e in entries if e.host == "KF"] for entries in complete.manifests()]
    assert [[e for e in entries if e.host == "KF"] for entries in run.manifests()] == kept


def test_a_single_defect_that_fails_stops_no_other(copied_run, two, arranged, cheap, broken):
    store = copied_run.store
    store.path("library", "NaCl", copied_run.library[1].key).unlink()  # that of Li
    for path in store.root.glob("superposed/NaCl/*.h5"):
        path.unlink()
    broken(lambda atoms: atoms.symbols.count("Li") == 1 and "S" not in atoms.symbols, not_finite)
    run = all_stages(two[:1], arranged, cheap, store)
    assert [e.status for e in run.library] == ["done", "failed", "done"]
    assert "not finite" in run.library[1].reason
    # A cell that needs it starts at the host's sites, gets all force constants, and is superposed no more.
    relaxed = run.of("relax", "NaCl", "doped-1").header["quality"]
    assert "warm" not in relaxed and relaxed["converged"] == 1
    assert run.of("phonons", "NaCl", "doped-1").header["fidelity"] == "direct"
    assert run.relaxations[:2] == copied_run.relaxations[:2]
    superposed = run.of("superposed", "NaCl", "superposed-0")
    assert "Li" not in superposed.header["elements"]
    assert len(superposed.arrays["energies_meV"]) == cheap.superposition.superposed_per_host


def test_relaxations_start_where_single_defects_predict(complete, finished, arranged):
    warm = complete.of("relax", "NaCl", "doped-0").header["quality"]
    assert warm["warm"] == 1
    entry = finished[1][1]
    assert (entry.host, entry.item) == ("NaCl", "doped-0")
    cold = finished[0].find("relax", "NaCl", entry.key)
    assert complete.relaxations[1].key != entry.key
    assert "warm" not in cold.header["quality"]
    # The same minimum, reached in fewer evaluations; both start, on record, from the host's sites.
    assert warm["energy_eV_per_atom"] == pytest.approx(cold.header["quality"]["energy_eV_per_atom"], abs=1e-4)
    assert warm["relax_evaluations"] < cold.header["quality"]["relax_evaluations"]
    start = complete.of("relax", "NaCl", "doped-0").arrays["start_positions"]
    np.testing.assert_array_equal(start, cold.arrays["start_positions"])


def test_keys_of_relaxations_depend_on_the_single_defects_they_use(copied_run, two, arranged, cheap):
    """In NaCl, doped-0 is made of Mg and S, doped-1 of Li, Mg and S."""
    without_li = [e for e in copied_run.library if not e.item.startswith("Li")]
    again = relax_batch(two[:1], arranged, cheap, copied_run.store, without_li)
    assert [new == old for new, old in zip(again, copied_run.relaxations, strict=False)] == [True, True, False]
    assert again[2].status == "done"


def test_unrelaxed_start_ignores_the_library(finished, copied_run, two, plans, config, tmp_path, evaluated):
    store = copy_records(finished[0], tmp_path / "records")
    unrelaxed = changed(config, relaxation={"start": "unrelaxed"})
    assert relax_batch(two, plans, unrelaxed, store, copied_run.library) == finished[1]
    assert evaluated == []


def test_force_constants_of_the_host_save_evaluations(finished, two, plans, config, tmp_path):
    """To the same minimum, from the same sites, without any single defects."""
    store = copy_records(finished[0], tmp_path / "records")

    def qualities(start):
        entries = relax_batch(two[:1], plans, changed(config, relaxation={"start": start}), store)
        doped = [entry for entry in entries if entry.item != PRISTINE]
        assert doped
        return {entry.key for entry in doped}, [store.read("relax", e.host, e.key).header["quality"] for e in doped]

    (cold_keys, cold), (keys, harmonic) = qualities("unrelaxed"), qualities("harmonic")
    assert cold_keys.isdisjoint(keys)
    for before, after in zip(cold, harmonic, strict=True):
        assert after["converged"] == 1
        assert after["energy_eV_per_atom"] == pytest.approx(before["energy_eV_per_atom"], abs=1e-5)
    assert sum(q["relax_evaluations"] for q in harmonic) < sum(q["relax_evaluations"] for q in cold)


def broadened(record, config):
    return pdos(modes_of(record), energy_edges(config.spectra), config.spectra.sigma_meV)


def test_probed_phonons_are_close_to_direct_ones(copied_run, arranged, cheap):
    fidelities = [copied_run.of("phonons", "NaCl", item).header["fidelity"] for item in ITEMS]
    assert fidelities == ["direct", "direct", "probed"]
    probed = copied_run.of("phonons", "NaCl", "doped-1")
    assert probed.header["quality"]["probing_error"] <= cheap.phonons.probing_tolerance
    assert probed.header["quality"]["warm"] == 1  # the quality of the relaxation is repeated
    all_direct = changed(cheap, phonons={"direct_per_host": 2})
    again = phonon_batch(copied_run.relaxations[:3], arranged, all_direct, copied_run.store, copied_run.library)
    assert [new == old for new, old in zip(again, copied_run.phonons, strict=False)] == [True, True, False]
    direct = copied_run.store.find("phonons", "NaCl", again[2].key)
    assert direct.header["fidelity"] == "direct"
    spectra = [broadened(r, cheap) for r in (probed, direct, copied_run.of("phonons", "NaCl", PRISTINE))]
    share = np.abs(spectra[0] - spectra[1]).sum() / np.abs(spectra[1] - spectra[2]).sum()
    assert share < cheap.phonons.probing_tolerance


def test_direct_where_probing_misses_its_tolerance(copied_run, arranged, cheap):
    strict = changed(cheap, phonons={"probing_tolerance": 1e-9, "probes_max": 12})
    again = phonon_batch(copied_run.relaxations[:3], arranged, strict, copied_run.store, copied_run.library)
    assert again[:2] == copied_run.phonons[:2]  # they are direct anyway
    record = copied_run.store.find("phonons", "NaCl", again[2].key)
    assert record.header["fidelity"] == "direct"
    quality = record.header["quality"]
    assert quality["probing_error"] > 1e-9
    assert quality["force_evaluations"] == 2 * quality["probes"] + quality["displacements"] + 1


def test_comparison_of_superposed_with_direct_spectra(complete, arranged, cheap):
    plan = arranged["NaCl"].plans[0]
    compared = complete.of("superposed", "NaCl", COMPARISON).arrays
    assert compared.keys() == set(COMPARED)
    assert compared["number"].tolist() == [0]
    assert compared["total_doping"].tolist() == [2 / 16]
    known = complete.known(arranged["NaCl"]).superpose
    superposed = known(plan)
    masses, symbols = superposed.atoms.get_masses(), list(superposed.atoms.symbols)
    edges, sigma = energy_edges(cheap.spectra), cheap.spectra.sigma_meV
    direct, pristine = (broadened(complete.of("phonons", "NaCl", item), cheap) for item in ("doped-0", PRISTINE))
    for name, hessian in (("superposed_l1", superposed.hessian), ("mass_only_l1", known.hessian)):
        density = pdos(diagonalise(hessian, masses, symbols), edges, sigma)
        share = np.abs(density - direct).sum() / np.abs(direct - pristine).sum()
        assert compared[name][0] == pytest.approx(share, rel=1e-3)
    relaxed = complete.of("relax", "NaCl", "doped-0").arrays
    moved = relaxed["positions"] - relaxed["start_positions"]
    moved -= moved.mean(axis=0)
    assert compared["displacement_mean_A"][0] == pytest.approx(np.abs(moved).mean(), rel=1e-6)
    assert compared["displacement_mae_A"][0] == pytest.approx(np.abs(moved - superposed.displacements).mean(), rel=1e-6)
    assert compared["superposed_l1"][0] < 0.1 < compared["mass_only_l1"][0]


@pytest.mark.parametrize("fidelity", ["superposed", "mass_only"])
def test_spectra_of_single_defects(complete, arranged, cheap, fidelity):
    record = complete.of("superposed", "NaCl", f"{fidelity}-0")
    arrays, elements = record.arrays, record.header["elements"]
    assert record.header["fidelity"] == fidelity
    assert len(arrays["energies_meV"]) == getattr(cheap.superposition, f"{fidelity}_per_host")
    np.testing.assert_allclose(arrays["weights"].sum(axis=2), 1, atol=1e-5)
    superpose = complete.known(arranged["NaCl"]).superpose
    for row, (sites, numbers) in enumerate(zip(arrays["sites"], arrays["dopants"], strict=True)):
        drawn = Plan(tuple(sites[sites >= 0].tolist()), tuple(chemical_symbols[n] for n in numbers[sites >= 0]))
        hessian = superpose(drawn).hessian if fidelity == "superposed" else superpose.hessian
        doped = apply(drawn, superpose.folding.atoms)
        modes = diagonalise(hessian, doped.get_masses(), list(doped.symbols))
        np.testing.assert_allclose(arrays["energies_meV"][row], modes.energies_meV, rtol=1e-4, atol=1e-3)
        given = {e: float(c) for e, c in zip(elements, arrays["concentrations"][row], strict=True) if c > 0}
        assert given == pytest.approx(drawn.concentrations(16))
        assert sum(given.values()) <= cheap.superposition.concentration_max
    assert len(np.unique(arrays["energies_meV"], axis=0)) == len(arrays["energies_meV"])


def test_fidelities_see_the_same_arrangements(complete):
    """So that what masses alone explain can be told from the rest."""
    superposed, mass_only = (
        complete.of("superposed", "NaCl", f"{kind}-0").arrays for kind in ("superposed", "mass_only")
    )
    count = len(mass_only["sites"])
    for name in ("sites", "dopants"):
        np.testing.assert_array_equal(superposed[name][:count], mass_only[name])


def test_more_superposed_spectra_keep_full_records(copied_run, arranged, cheap, monkeypatch):
    monkeypatch.setattr("defectnet.batches.superposed.SPECTRA_PER_RECORD", 2)
    run = replace(copied_run, relaxations=copied_run.relaxations[:3])
    superposed = {}
    for count in (3, 5):
        more = changed(cheap, superposition={"superposed_per_host": count})
        entries = [e for e in superpose_again(run, arranged, more) if e.item.startswith("superposed")]
        superposed[count] = entries
        assert [e.item for e in entries] == [f"superposed-{k}" for k in range(len(entries))]
        lengths = [len(run.store.find("superposed", "NaCl", e.key).arrays["energies_meV"]) for e in entries]
        assert lengths == [2] * (count // 2) + [1]
    assert superposed[5][0] == superposed[3][0]
    # An arrangement depends on its number alone, not on which record it is in.
    whole = copied_run.of("superposed", "NaCl", "superposed-0").arrays["sites"]
    parts = [run.store.find("superposed", "NaCl", e.key).arrays["sites"] for e in superposed[5]]
    rows = [row[row >= 0].tolist() for part in parts for row in part]
    assert rows[:3] == [row[row >= 0].tolist() for row in whole]


def test_superposed_arrangements_follow_seed_and_highest_concentration(copied_run, arranged, cheap, evaluated):
    run = replace(copied_run, relaxations=copied_run.relaxations[:3])
    original = copied_run.of("superposed", "NaCl", "superposed-0").arrays
    for blocks in ({"run": {"seed": 1}}, {"superposition": {"concentration_max": 0.07}}):
        entries = superpose_again(run, arranged, changed(cheap, **blocks))
        again = run.store.find("superposed", "NaCl", entries[-1].key).arrays
        assert not np.array_equal(again["sites"], original["sites"])
        assert entries[0] == copied_run.superposed[0]  # the comparison
    np.testing.assert_allclose(again["concentrations"].sum(axis=1), 1 / 16)  # all that 7 % leave room for
    assert evaluated == []


def test_where_no_arrangement_fits_the_others_go_on(copied_run, arranged, cheap):
    entries = superpose_again(copied_run, arranged, changed(cheap, superposition={"concentration_max": 0.05}))
    assert [(e.host, e.item, e.status) for e in entries] == [
        ("NaCl", COMPARISON, "done"),
        ("NaCl", RESPONSES, "done"),
        ("NaCl", "mass_only-0", "failed"),
        ("NaCl", "superposed-0", "failed"),
        ("KF", COMPARISON, "done"),
        ("KF", RESPONSES, "done"),
        ("KF", "mass_only-0", "failed"),
        ("KF", "superposed-0", "skipped"),
    ]
    assert all("no dopant fits into 16 atoms" in e.reason for e in entries if e.status == "failed")


def test_hosts_that_superposition_fails_are_not_superposed(copied_run, arranged, cheap):
    of_kf = [e for e in copied_run.superposed if e.host == "KF"]
    assert [e.item for e in of_kf] == [COMPARISON, RESPONSES, "mass_only-0", "superposed-0"]
    error = copied_run.of("superposed", "KF", COMPARISON).arrays["superposed_l1"]
    assert np.median(error) > cheap.superposition.error_max
    assert of_kf[-1].status == "skipped" and f"off by {np.median(error):.0%}" in of_kf[-1].reason
    patient = changed(cheap, superposition={"error_max": 10.0})
    again = superpose_again(replace(copied_run, relaxations=copied_run.relaxations[3:]), arranged, patient)
    assert [(e.item, e.status) for e in again] == [(e.item, "done") for e in of_kf]
    assert again[:3] == of_kf[:3]


def test_concentrations_are_limited_by_what_is_known_of_errors():
    def limit(error_max, errors=(0.4, 0.2, 0.9), others=(0.2, 0.1, 0.05)):
        return concentration_limit(np.array(errors), np.array(others), 0.2, error_max)

    assert limit(0.4) == 0.2  # the median error where 20 % are doped
    assert limit(0.39) == limit(0.29) == 0.1
    assert limit(0.28) == 0.05
    # Errors that scatter a little change no arrangement.
    assert limit(0.3, (0.41, 0.19, 0.9)) == limit(0.3)
    # A single dopant tells nothing, nor does no comparison at all.
    assert limit(1e-9, (0.0, 0.01), (0.0, 1e-12)) == limit(1e-9, (), ()) == 0.2


def test_nothing_is_superposed_without_a_library(copied_run, arranged, cheap, evaluated):
    run = replace(copied_run, library=[])
    entries = superpose_again(run, arranged, cheap)
    items = (COMPARISON, RESPONSES, "mass_only-0")
    assert [(e.host, e.item) for e in entries] == [(host, item) for host in ("NaCl", "KF") for item in items]
    assert len(run.store.find("superposed", "NaCl", entries[0].key).arrays["superposed_l1"]) == 0
    assert evaluated == []


def test_comparison_without_its_direct_record_is_not_remembered(copied_run, arranged, cheap):
    store = copied_run.store
    store.path("superposed", "NaCl", copied_run.superposed[0].key).unlink()
    lost = store.path("phonons", "NaCl", copied_run.phonons[1].key)
    lost.unlink()
    with pytest.raises(RecordError, match=rf"{lost.name}: gone; run `defectnet phonons` again"):
        superpose_again(copied_run, arranged, cheap)
    assert not store.path("superposed", "NaCl", copied_run.superposed[0].key).exists()


def test_responses_are_spectra_of_single_substitutions(copied_run, two, arranged, cheap, tmp_path, evaluated):
    """In a supercell four times the size of the one that is computed, which doped cells are repeated to."""
    larger = changed(cheap, hosts={"per_batch": 2}, phonons={"atoms_min": 64})
    library = library_batch(two, arranged, larger, copied_run.store)
    assert evaluated == [] and library == copied_run.library
    phonons = phonon_batch(copied_run.relaxations, arranged, larger, copied_run.store, library)
    entries = superpose_again(replace(copied_run, phonons=phonons), arranged, larger)
    copy_records(copied_run.store, tmp_path / "records")
    layout = Layout(tmp_path)
    write_plans(layout, "batch-00000", arranged)
    stages = ("library", library), ("phonons", phonons), ("superposed", entries)
    for stage, made in stages:
        write_manifest(layout.batch(stage, "batch-00000"), made)
    aggregate(two, larger, layout)
    with Dataset(layout.dataset) as dataset:
        spectra = dataset.spectra
        role = np.array(spectra.role)
        rows = np.flatnonzero((role == "response") & (spectra.host == 0))
        elements = [next(iter(element_amounts(concentrations))) for concentrations in spectra.concentrations[rows]]
        fidelities = [spectra.fidelity[row] for row in rows]
        assert sorted(zip(elements, fidelities, strict=True)) == sorted(
            (candidate.dopant, fidelity)
            for candidate in arranged["NaCl"].candidates
            for fidelity in ("mass_only", "superposed")
        )
        np.testing.assert_allclose(spectra.concentrations[rows].sum(axis=1), 1 / 64)
        np.testing.assert_allclose(spectra.quality["site_share"][rows], 1)
        # Every spectrum is compared with the host in its own supercell, and responses move modes but make none.
        np.testing.assert_array_equal(spectra.n_atoms[spectra.reference], spectra.n_atoms)
        assert {spectra.n_atoms[row] for row in np.flatnonzero(role == "pristine")} == {16, 64}
        change = spectra.pdos[rows] - spectra.pdos[spectra.reference[rows]]
        np.testing.assert_allclose(change @ np.diff(dataset.edges_meV), 0, atol=1e-4)
        assert np.abs(change).max() > 1e-4
        assert dataset.hosts.pristine[0] == spectra.id.index("NaCl/pristine")


def test_nothing_is_built_on_unstable_hosts_where_these_are_skipped(two, config, tmp_path):
    """A rock salt whose lattice is held 15 % too wide, beside one at rest."""
    wide = replace(two[0], **{length: 1.15 * getattr(two[0], length) for length in "abc"})
    skipping = changed(config, relaxation={"host_cell": False}, phonons={"unstable_hosts": "skip"})
    both = {"skip": skipping, "keep": changed(skipping, phonons={"unstable_hosts": "keep"})}
    for choice, settings in both.items():
        store = RecordStore(tmp_path / choice)
        hosts = [wide, two[1]]
        plans = {host.id: plan(host, settings) for host in hosts}
        library = library_batch(hosts, plans, settings, store)
        relaxations = relax_batch(hosts, plans, settings, store, library)
        phonons = phonon_batch(relaxations, plans, settings, store, library)
        superposed = superpose_batch(relaxations, phonons, plans, settings, store, library)
        of_wide = [entry for entry in [*library, *relaxations, *phonons, *superposed] if entry.host == wide.id]
        done = {entry.item for entry in of_wide if entry.status == "done"}
        assert done > {PRISTINE, "doped-0"} if choice == "keep" else done == {PRISTINE}
        reasons = [entry.reason for entry in of_wide if entry.status == "skipped"]
        assert all(re.search(r"imaginary modes down to -\d+\.\d meV", reason) for reason in reasons)
        assert bool(reasons) == (choice == "skip")
        assert {entry.status for entry in relaxations + phonons if entry.host == two[1].id} == {"done"}


# --- dataset ------------------------------------------------------------------------------------------------------


def test_dataset_holds_every_fidelity(complete, two, arranged, cheap, tmp_path):
    copy_records(complete.store, tmp_path / "records")
    layout = Layout(tmp_path)
    write_plans(layout, "batch-00000", arranged)
    stages = ("library", complete.library), ("phonons", complete.phonons), ("superposed", complete.superposed)
    for stage, entries in stages:
        write_manifest(layout.batch(stage, "batch-00000"), entries)
    number, missing = aggregate(two, changed(cheap, hosts={"per_batch": 2}), layout)
    assert [(entry.host, entry.item) for entry in missing] == [("KF", "superposed-0")]
    with Dataset(layout.dataset) as dataset:
        spectra = dataset.spectra
        assert Counter(np.array(spectra.fidelity)[dataset.doped].tolist()) == number
        assert number["superposed"] == 3 and number["mass_only"] == 4
        assert number["direct"] + number["probed"] == 4
        assert [name for name in spectra.id if "superposed" in name] == [f"NaCl/superposed-0-{row}" for row in range(3)]
        assert len(set(spectra.potential)) == len(set(spectra.potential_digest)) == 1
        # The grid covers all modes, so every spectrum integrates to 1.
        np.testing.assert_allclose(spectra.pdos @ np.diff(dataset.edges_meV), 1, atol=1e-4)
        record = complete.of("superposed", "NaCl", "superposed-0")
        key = next(e.key for e in complete.superposed if e.item == "superposed-0")
        for row in range(3):
            place = spectra.id.index(f"NaCl/superposed-0-{row}")
            assert spectra.record_digest[place] == key
            assert spectra.n_atoms[place] == 16
            assert spectra.quality["imaginary_modes"][place] == record.arrays["imaginary_modes"][row]
            columns = [atomic_numbers[element] - 1 for element in record.header["elements"]]
            np.testing.assert_allclose(
                spectra.concentrations[place][columns], record.arrays["concentrations"][row], atol=1e-9
            )
            modes = dataset.modes(place)
            np.testing.assert_allclose(modes.energies_meV, record.arrays["energies_meV"][row], rtol=1e-6)
            np.testing.assert_allclose(modes.weights.sum(axis=1), 1, atol=1e-5)  # no element that is present is lost
        assert dataset.comparison["host"].tolist() == [0, 1]
        for place, host in enumerate(("NaCl", "KF")):
            arrays = complete.of("superposed", host, COMPARISON).arrays
            assert {name: dataset.comparison[name][place] for name in COMPARED} == {
                name: arrays[name][0] for name in COMPARED
            }


def test_missing_single_defects_are_named(complete, two, arranged, cheap, tmp_path):
    copy_records(complete.store, tmp_path / "records")
    layout = Layout(tmp_path)
    write_plans(layout, "batch-00000", arranged)
    library = [replace(complete.library[0], status="failed", reason="exploded"), *complete.library[1:]]
    for stage, entries in (("library", library), ("phonons", complete.phonons), ("superposed", complete.superposed)):
        write_manifest(layout.batch(stage, "batch-00000"), entries)
    _, missing = aggregate(two, changed(cheap, hosts={"per_batch": 2}), layout)
    assert [(m.host, m.item, m.stage, m.status, m.reason) for m in missing] == [
        ("NaCl", "S@Cl1", "library", "failed", "exploded"),
        ("KF", "superposed-0", "superposed", "skipped", complete.superposed[-1].reason),
    ]


def write_plans(layout, batch, plans):
    content = {"plans": {host_id: one.to_dict() for host_id, one in plans.items()}, "failed": {}}
    write_atomically(layout.batch("supercells", batch), json.dumps(content).encode())


def run(hosts, config, folder):
    """All stages of a run behind the dopants, as the commands do them, without single defects."""
    layout = Layout(folder)
    store = RecordStore(layout.records)
    for batch, members in assign(hosts, config).items():
        chosen = [host for host in hosts if host.id in members]
        plans = {host.id: plan(host, config) for host in chosen}
        write_plans(layout, batch, plans)
        relaxations, phonons = both(chosen, plans, config, store)
        write_manifest(layout.batch("relax", batch), relaxations)
        write_manifest(layout.batch("phonons", batch), phonons)
        for stage in ("library", "superposed"):
            write_manifest(layout.batch(stage, batch), [])
    return layout


@pytest.mark.parametrize("per_batch", [1, 2])
def test_dataset_holds_what_is_finished_and_names_the_rest(hosts, finished, config, tmp_path, broken, per_batch):
    broken(is_host("Ca", "S"), not_finite)
    copy_records(finished[0], tmp_path / "records")
    config = changed(config, hosts={"per_batch": per_batch})
    hosts = [hosts[0], hosts[2], hosts[1]]
    layout = run(hosts, config, tmp_path)
    number, missing = aggregate(hosts, config, layout)
    assert number == {"direct": 4}
    assert [(m.host, m.item, m.status) for m in missing] == [("CaS", item, "skipped") for item in ITEMS]
    assert all("not finite" in m.reason for m in missing)
    table = [line.split("\t") for line in layout.missing.read_text().splitlines()]
    assert table[0] == ["host", "item", "stage", "status", "reason"]
    assert [row[:2] for row in table[1:]] == [["CaS", item] for item in ITEMS]
    with Dataset(layout.dataset) as dataset:
        assert dataset.hosts.id == ["NaCl", "KF"]
        assert dataset.spectra.id == [f"{host}/{item}" for host in ("NaCl", "KF") for item in ITEMS]
        assert dataset.missing == missing
        edges = dataset.edges_meV
        store = RecordStore(layout.records)
        for row, key in enumerate(dataset.spectra.record_digest):
            host, item = dataset.spectra.id[row].split("/")
            record = store.find("phonons", host, key)
            np.testing.assert_allclose(dataset.modes(row).energies_meV, record.arrays["energies_meV"], rtol=1e-6)
            # The grid covers all modes, so every spectrum integrates to 1.
            assert dataset.spectra.pdos[row] @ np.diff(edges) == pytest.approx(1, abs=1e-4)
            given = {
                s: c for s, c in zip(chemical_symbols[1:57], dataset.spectra.concentrations[row], strict=True) if c > 0
            }
            assert given == pytest.approx(record.header["concentrations"])
            assert bool(given) == (item != PRISTINE)


def test_host_without_a_pristine_spectrum_is_left_out(two, finished, config, tmp_path):
    """Its doped spectra have nothing to be compared with."""
    copy_records(finished[0], tmp_path / "records")
    layout = run(two, config, tmp_path)
    entries = read_manifest(layout.batch("phonons", "KF"))
    write_manifest(
        layout.batch("phonons", "KF"), [replace(entries[0], status="failed", reason="unlucky"), *entries[1:]]
    )
    number, missing = aggregate(two, config, layout)
    assert number == {"direct": 2}
    no_host = "its host has no pristine spectrum"
    assert [(m.item, m.reason) for m in missing] == list(zip(ITEMS, ["unlucky", no_host, no_host], strict=True))
    with Dataset(layout.dataset) as dataset:
        assert dataset.hosts.id == ["NaCl"]


def test_same_configuration_same_dataset(hosts, finished, config, tmp_path):
    """Neither the folder nor the machine's times nor how work is shared out changes what the dataset says."""
    copy_records(finished[0], tmp_path / "one" / "records")
    digests = []
    for name, per_batch in (("one", 1), ("two", 3)):  # the second one computes everything anew
        config = changed(config, hosts={"per_batch": per_batch})
        layout = run(hosts[:2], config, tmp_path / name)
        aggregate(hosts[:2], config, layout)
        digests.append(content_digest(layout.dataset))
    assert digests[0] == digests[1]


def test_nothing_finished(hosts, config, tmp_path, broken):
    broken(lambda atoms: True, not_finite)
    layout = run(hosts[:1], config, tmp_path)
    with pytest.raises(RecordError, match=r"not one doped spectrum is finished: .*not finite") as caught:
        aggregate(hosts[:1], config, layout)
    assert str(layout.missing) in str(caught.value)
    assert layout.missing.exists()
    assert not layout.dataset.exists()


@pytest.mark.parametrize("number", [1, 4], ids=["first host", "other host"])
def test_two_potentials_are_not_mixed(two, plans, config, copied, tmp_path, number):
    store, _, phonons = copied
    layout = Layout(tmp_path)
    for host in two:
        write_plans(layout, host.id, {host.id: plans[host.id]})
        write_manifest(layout.batch("phonons", host.id), [e for e in phonons if e.host == host.id])
        for stage in ("library", "superposed"):
            write_manifest(layout.batch(stage, host.id), [])
    aggregate(two, config, layout)
    foreign = phonons[number]
    record = store.find("phonons", foreign.host, foreign.key)
    header = json.loads(json.dumps(record.header))
    header["potential"]["weights"] = "0" * 64
    store.save("phonons", foreign.host, foreign.key, Record(header, record.arrays))
    with pytest.raises(RecordError, match=rf"{foreign.host} doped-0: .*one potential"):
        aggregate(two, config, layout)


@pytest.mark.parametrize("how", ["gone", "damaged"])
def test_record_that_vanished_before_the_dataset(two, plans, config, copied, tmp_path, how):
    store, _, phonons = copied
    layout = Layout(tmp_path)
    for host in two:
        write_plans(layout, host.id, {host.id: plans[host.id]})
        write_manifest(layout.batch("phonons", host.id), [e for e in phonons if e.host == host.id])
        for stage in ("library", "superposed"):
            write_manifest(layout.batch(stage, host.id), [])
    path = store.path("phonons", phonons[2].host, phonons[2].key)
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(b"x")
    with pytest.raises(RecordError, match=rf"{path.name}: record gone or damaged"):
        aggregate(two, config, layout)
    assert not layout.dataset.exists()


@pytest.mark.parametrize("stage", ["supercells", "library", "phonons", "superposed"])
def test_missing_manifest_is_named(hosts, finished, config, tmp_path, stage):
    copy_records(finished[0], tmp_path / "records")
    layout = run(hosts[:1], config, tmp_path)
    layout.batch(stage, "NaCl").unlink()
    with pytest.raises(RecordError, match=r"NaCl\.json"):
        aggregate(hosts[:1], config, layout)
