import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from ase.data import atomic_masses, chemical_symbols
from hypothesis import given
from hypothesis import strategies as st

from defectnet.batches import PRISTINE, assign, atoms_of, phonon_batch, relax_batch, select_batch, structure_of
from defectnet.config import parse_config
from defectnet.dataset.aggregate import aggregate
from defectnet.dataset.schema import Dataset, content_digest
from defectnet.dopants import recommend
from defectnet.errors import InputError, PhysicsError, RecordError
from defectnet.layout import Layout
from defectnet.phonons.modes import diagonalise
from defectnet.potentials.analytic import MorsePairs
from defectnet.potentials.base import Evaluation
from defectnet.records import Record, RecordStore, read_manifest, read_record, write_atomically, write_manifest
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

        monkeypatch.setattr(MorsePairs, "evaluate", evaluate)

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
    ids = [f"host-{i}" for i in range(number + more)]
    before, after = assign(ids[:number], per_batch), assign(ids, per_batch)
    for name, members in before.items():
        assert after[name][: len(members)] == members
    # Every host is in one batch, in the order of the sheet, and batches are full but for the last.
    assert [host for members in after.values() for host in members] == ids
    assert all(len(members) == per_batch for members in list(after.values())[:-1])
    assert list(after)[: len(before)] == list(before)


def test_batch_of_one_is_named_after_its_host():
    assert assign(["b", "a"], 1) == {"b": ["b"], "a": ["a"]}
    assert assign([], 3) == {}


def test_hosts_of_a_batch(hosts):
    first, second = assign([host.id for host in hosts], 2)
    assert select_batch(hosts, 2, first) == hosts[:2]
    assert select_batch(hosts, 2, second) == hosts[2:]
    with pytest.raises(InputError, match=rf"no batch 'x'.*{first}"):
        select_batch(hosts, 2, "x")


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
    assert len(evaluated) == quality["relax_evaluations" if stage == "relax" else "displacements"]


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
    counting = MorsePairs.evaluate
    calls = []

    def killed(self, structures):
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return counting(self, structures)

    slow = changed(config, potential={"atoms_per_pass": 16})
    with monkeypatch.context() as patch:
        patch.setattr(MorsePairs, "evaluate", killed)
        with pytest.raises(KeyboardInterrupt):
            phonon_batch(relaxations, plans, slow, store)
    assert len(evaluated) == 1
    assert len(list(store.root.rglob("*.partial.npy"))) == 1
    assert phonon_batch(relaxations, plans, slow, store) == phonons
    assert len(evaluated) == original.header["quality"]["displacements"]
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


# --- dataset ------------------------------------------------------------------------------------------------------


def run(hosts, config, folder):
    """All stages of a run behind the dopants, as the commands do them."""
    layout = Layout(folder)
    store = RecordStore(layout.records)
    for batch, members in assign([host.id for host in hosts], config.hosts.per_batch).items():
        chosen = [host for host in hosts if host.id in members]
        plans = {host.id: plan(host, config) for host in chosen}
        content = {"plans": {host_id: one.to_dict() for host_id, one in plans.items()}, "failed": {}}
        write_atomically(layout.batch("supercells", batch), json.dumps(content).encode())
        relaxations, phonons = both(chosen, plans, config, store)
        write_manifest(layout.batch("relax", batch), relaxations)
        write_manifest(layout.batch("phonons", batch), phonons)
    return layout


@pytest.mark.parametrize("per_batch", [1, 2])
def test_dataset_holds_what_is_finished_and_names_the_rest(hosts, finished, config, tmp_path, broken, per_batch):
    broken(is_host("Ca", "S"), not_finite)
    copy_records(finished[0], tmp_path / "records")
    config = changed(config, hosts={"per_batch": per_batch})
    hosts = [hosts[0], hosts[2], hosts[1]]
    layout = run(hosts, config, tmp_path)
    number, missing = aggregate(hosts, config, layout)
    assert number == 4
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
    assert number == 2
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


def test_two_potentials_are_not_mixed(two, plans, config, copied, tmp_path):
    store, _, phonons = copied
    layout = Layout(tmp_path)
    for host in two:
        mine = [e for e in phonons if e.host == host.id]
        content = {"plans": {host.id: plans[host.id].to_dict()}, "failed": {}}
        write_atomically(layout.batch("supercells", host.id), json.dumps(content).encode())
        write_manifest(layout.batch("phonons", host.id), mine)
    aggregate(two, config, layout)
    foreign = phonons[4]
    record = store.find("phonons", foreign.host, foreign.key)
    header = json.loads(json.dumps(record.header))
    header["potential"]["weights"] = "0" * 64
    store.save("phonons", foreign.host, foreign.key, Record(header, record.arrays))
    with pytest.raises(RecordError, match=r"KF doped-0: .*one potential"):
        aggregate(two, config, layout)


@pytest.mark.parametrize("how", ["gone", "damaged"])
def test_record_that_vanished_before_the_dataset(two, plans, config, copied, tmp_path, how):
    store, _, phonons = copied
    layout = Layout(tmp_path)
    for host in two:
        content = {"plans": {host.id: plans[host.id].to_dict()}, "failed": {}}
        write_atomically(layout.batch("supercells", host.id), json.dumps(content).encode())
        write_manifest(layout.batch("phonons", host.id), [e for e in phonons if e.host == host.id])
    path = store.path("phonons", phonons[2].host, phonons[2].key)
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(b"x")
    with pytest.raises(RecordError, match=rf"{path.name}: record gone or damaged"):
        aggregate(two, config, layout)
    assert not layout.dataset.exists()


@pytest.mark.parametrize("stage", ["supercells", "phonons"])
def test_missing_manifest_is_named(hosts, finished, config, tmp_path, stage):
    copy_records(finished[0], tmp_path / "records")
    layout = run(hosts[:1], config, tmp_path)
    layout.batch(stage, "NaCl").unlink()
    with pytest.raises(RecordError, match=r"NaCl\.json"):
        aggregate(hosts[:1], config, layout)
