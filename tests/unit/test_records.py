import errno
import json
import logging
import multiprocessing
import os
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from defectnet.digests import digest, file_digest
from defectnet.errors import RecordError
from defectnet.records import (
    Entry,
    Record,
    RecordStore,
    read_manifest,
    read_record,
    withdraw_stale_manifests,
    write_atomically,
    write_manifest,
    write_record,
)

KEY = digest(test="records")


def record(seed=0):
    rng = np.random.default_rng(seed)
    header = {"status": "done", "quality": {"converged": 1, "residual": 0.25}, "cost": {"wall_s": 1.5}}
    return Record(header, {"positions": rng.normal(size=(4, 3)), "numbers": np.array([11, 17, 11, 17])})


def assert_equal(one, other):
    assert one.header == other.header
    assert one.arrays.keys() == other.arrays.keys()
    for name in one.arrays:
        assert one.arrays[name].dtype == other.arrays[name].dtype
        np.testing.assert_array_equal(one.arrays[name], other.arrays[name])


def leftovers(folder):
    return [path.name for path in Path(folder).rglob("*.tmp")]


# --- keys ---------------------------------------------------------------------------------------------------------

PARTS = {
    "stage": "relax",
    "fmax": 0.01,
    "potential": {"name": "m", "weights": "abc"},
    "positions": np.array([[0.0, 0.1, 0.2], [1 / 3, 1.4, 2.1]]),
    "numbers": np.array([11, 17]),
    "relax_cell": True,
}


def test_key_does_not_depend_on_order():
    assert digest(**PARTS) == digest(**dict(reversed(PARTS.items())))
    swapped = PARTS | {"potential": dict(reversed(PARTS["potential"].items()))}
    assert digest(**PARTS) == digest(**swapped)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6))
def test_key_does_not_see_rounding_noise(seed):
    noise = np.random.default_rng(seed).uniform(-1e-9, 1e-9, (2, 3))
    assert digest(**PARTS | {"positions": PARTS["positions"] + noise}) == digest(**PARTS)


def test_key_does_not_see_the_sign_of_zero():
    positions = PARTS["positions"].copy()
    positions[0, 0] = -0.0
    assert digest(**PARTS | {"positions": positions}) == digest(**PARTS)
    positions[0, 0] = -1e-12
    assert digest(**PARTS | {"positions": positions}) == digest(**PARTS)


def test_key_does_not_see_noise_on_tabulated_lattice_constants():
    quarter = np.array([5.65325]) / 4
    assert digest(x=quarter - 1e-9) == digest(x=quarter + 1e-9)


@pytest.mark.parametrize(
    "change",
    [
        {"stage": "phonons"},
        {"fmax": 0.011},
        {"potential": {"name": "m", "weights": "abd"}},
        {"relax_cell": False},
        {"numbers": np.array([17, 11])},
        {"numbers": np.array([11, 17, 17])},
        {"positions": PARTS["positions"] + [[0, 0, 1e-5], [0, 0, 0]]},
        {"positions": PARTS["positions"][::-1]},
        {"positions": PARTS["positions"].T},
        {"positions": PARTS["positions"] * [1, 1, -1]},
        {"other": None},
    ],
)
def test_key_changes_with_any_input(change):
    assert digest(**PARTS | change) != digest(**PARTS)


def test_key_ignores_memory_layout():
    positions = np.asfortranarray(PARTS["positions"])
    assert digest(**PARTS | {"positions": positions}) == digest(**PARTS)
    assert digest(n=np.array([1, 2], dtype=np.int32)) == digest(n=np.array([1, 2], dtype=np.int64))


def test_what_has_no_digest_is_refused():
    with pytest.raises(TypeError, match="Path"):
        digest(path=Path("x"))


def test_file_digest(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert file_digest(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# --- round trip ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"empty": np.empty((0, 3))},
        {"single": np.arange(6, dtype=np.float32).reshape(2, 3), "flags": np.array([True, False])},
        {"strided": np.arange(24.0).reshape(4, 6)[::2, ::3], "fortran": np.asfortranarray(np.eye(3))},
        {"special": np.array([np.inf, -0.0, 5e-324])},
    ],
    ids=lambda arrays: "-".join(arrays) or "none",
)
def test_round_trip(tmp_path, arrays):
    original = Record({"status": "done", "text": "Å · 1", "nested": {"a": [1, 2.5, None]}}, arrays)
    write_record(tmp_path / "r.h5", original)
    assert_equal(read_record(tmp_path / "r.h5"), original)


def test_store_keeps_stages_hosts_and_keys_apart(store):
    places = [(stage, host, key) for stage in ("relax", "phonons") for host in ("a", "b") for key in (KEY, KEY[::-1])]
    for seed, place in enumerate(places):
        assert store.find(*place) is None
        store.save(*place, record(seed))
    for seed, place in enumerate(places):
        assert_equal(store.find(*place), record(seed))
    assert len({store.path(*place) for place in places}) == len(places)
    assert leftovers(store.root) == []


def test_same_record_same_bytes(tmp_path):
    write_record(tmp_path / "a.h5", record())
    write_record(tmp_path / "b.h5", record())
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_failed_record(store):
    store.save("relax", "a", KEY, Record({"status": "failed", "reason": "exploded at step 3", "cost": {}}))
    found = store.find("relax", "a", KEY)
    assert not found.done
    assert found.header["reason"] == "exploded at step 3"
    assert record().done


def test_a_new_record_replaces_the_old_one(store):
    store.save("relax", "a", KEY, record(1))
    store.save("relax", "a", KEY, record(2))
    assert_equal(store.find("relax", "a", KEY), record(2))


# --- damage -------------------------------------------------------------------------------------------------------


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def truncate_by_one(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def text(path):
    path.write_text("<html>quota exceeded</html>")


def foreign(path):
    with h5py.File(path, "w") as file:
        file["energies"] = np.arange(3.0)
        file.create_group("group")


def without_checksum(path):
    with h5py.File(path, "a") as file:
        file.attrs.pop("checksum", None)
        file.attrs["header"] = file.attrs["header"]


def without_header(path):
    with h5py.File(path, "a") as file:
        del file.attrs["header"]


def changed_number(path):
    with h5py.File(path, "a") as file:
        file["positions"][0, 0] += 1e-12


def changed_header(path):
    with h5py.File(path, "a") as file:
        values = json.loads(file.attrs["header"])
        values["quality"]["converged"] = 0
        file.attrs["header"] = json.dumps(values)


def lost_array(path):
    with h5py.File(path, "a") as file:
        del file["numbers"]


def extra_array(path):
    with h5py.File(path, "a") as file:
        file["more"] = np.zeros(2)


def swapped_arrays(path):
    with h5py.File(path, "a") as file:
        file.move("numbers", "x")
        file.move("positions", "numbers")
        file.move("x", "positions")


def reshaped_array(path):
    with h5py.File(path, "a") as file:
        values = file["positions"][()].reshape(3, 4)
        del file["positions"]
        file["positions"] = values


DAMAGES = [
    truncate,
    truncate_by_one,
    empty,
    text,
    foreign,
    without_checksum,
    without_header,
    changed_number,
    changed_header,
    lost_array,
    extra_array,
    swapped_arrays,
    reshaped_array,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_set_aside_and_counts_as_missing(store, damage, caplog):
    store.save("relax", "a", KEY, record())
    store.save("relax", "b", KEY, record(1))
    path = store.path("relax", "a", KEY)
    damage(path)
    damaged = path.read_bytes()
    with pytest.raises(RecordError, match=path.name):
        read_record(path)
    with caplog.at_level(logging.WARNING, "defectnet"):
        assert store.find("relax", "a", KEY) is None
    assert path.name in caplog.text
    assert not path.exists()
    assert path.with_suffix(".damaged").read_bytes() == damaged
    assert store.find("relax", "a", KEY) is None
    store.save("relax", "a", KEY, record())
    assert_equal(store.find("relax", "a", KEY), record())
    assert_equal(store.find("relax", "b", KEY), record(1))


def _read_with_each_byte_changed(path, first, outcomes):
    """Report for every position what reading makes of the file; runs in a process that may die."""
    data = path.read_bytes()
    copy = path.with_name("copy.h5")
    original = read_record(path).checksum()
    for position in range(first, len(data), 3):
        changed = bytearray(data)
        changed[position] ^= 0xFF
        copy.write_bytes(bytes(changed))
        try:
            outcome = "intact" if read_record(copy).checksum() == original else "wrong"
        except RecordError:
            outcome = "damaged"
        except Exception as error:
            outcome = f"{type(error).__name__} at byte {position}"
        outcomes.put(outcome)
    outcomes.put("end")


@pytest.mark.parametrize("first", [0, 1, 2])
def test_any_changed_byte_is_harmless_or_found(tmp_path, first):
    write_record(tmp_path / "r.h5", Record({"status": "done"}, {"x": np.arange(6.0)}))
    context = multiprocessing.get_context("fork")
    outcomes = context.SimpleQueue()
    reader = context.Process(target=_read_with_each_byte_changed, args=(tmp_path / "r.h5", first, outcomes))
    reader.start()
    seen = []
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline and (reader.is_alive() or not outcomes.empty()):
        if outcomes.empty():
            time.sleep(0.01)
            continue
        seen.append(outcomes.get())
        if seen[-1] not in ("intact", "damaged"):
            break
    reader.kill()
    reader.join()
    assert seen[-1] == "end", f"reading stopped with {seen[-1]} after {len(seen)} positions"


# --- writing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["fsync", "replace", "write"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_full_disk_leaves_nothing_behind_and_says_what_to_do(store, monkeypatch, step, code):
    store.save("relax", "a", KEY, record(1))
    before = store.path("relax", "a", KEY).read_bytes()

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        if step == "fsync":
            patch.setattr(os, "fsync", refuse)
        elif step == "replace":
            patch.setattr(Path, "replace", refuse)
        else:
            patch.setattr(Path, "open", refuse)
        for host in ("a", "new"):
            with pytest.raises(RecordError) as caught:
                store.save("relax", host, KEY, record(2))
            message = str(caught.value)
            assert str(store.path("relax", host, KEY)) in message
            assert os.strerror(code) in message
            assert "free space or fix the permissions" in message
            assert "intact" in message
    assert leftovers(store.root) == []
    assert store.path("relax", "a", KEY).read_bytes() == before
    assert store.find("relax", "new", KEY) is None
    store.save("relax", "new", KEY, record(2))
    assert_equal(store.find("relax", "new", KEY), record(2))


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "results").write_text("a file where a folder should be")
    with pytest.raises(RecordError, match="results"):
        write_atomically(tmp_path / "results" / "records" / "r.h5", b"data")


def test_killed_writer_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "r.h5"
    write_record(path, record(1))

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", die)
    with pytest.raises(KeyboardInterrupt):
        write_record(path, record(2))
    assert_equal(read_record(path), record(1))


def test_remains_of_killed_writers_are_removed_in_time(store):
    path = store.path("relax", "a", KEY)
    path.parent.mkdir(parents=True)
    old, young = path.with_name(".x.h5.node.1.tmp"), path.with_name(".y.h5.node.2.tmp")
    for stale in (old, young):
        stale.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    store.save("relax", "a", KEY, record())
    assert not old.exists()
    assert young.exists()  # may be another job's, right now


def test_another_writer_may_finish_while_remains_are_looked_for(store, monkeypatch):
    """Its temporary file is there when the folder is listed and gone a moment later."""
    path = store.path("relax", "a", KEY)
    path.parent.mkdir(parents=True)
    gone = path.with_name(".other.h5.node.7.tmp")
    original = Path.glob
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [*original(self, pattern), gone])
    store.save("relax", "a", KEY, record())
    assert_equal(store.find("relax", "a", KEY), record())


def _save_often(root, seed, start, done):
    start.wait()
    store = RecordStore(root)
    for number in range(40):
        store.save("relax", "a", KEY, record(seed))
        found = store.find("relax", "a", KEY)
        if found is None or found.checksum() not in {record(1).checksum(), record(2).checksum()}:
            done.put(f"writer {seed} read something else in round {number}")
            return
    done.put("")


def test_two_writers_of_one_key_end_with_one_valid_record(store):
    context = multiprocessing.get_context("fork")
    start, done = context.Event(), context.SimpleQueue()
    writers = [context.Process(target=_save_often, args=(store.root, seed, start, done)) for seed in (1, 2)]
    for writer in writers:
        writer.start()
    start.set()
    for writer in writers:
        writer.join(30)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert [done.get(), done.get()] == ["", ""]
    assert store.find("relax", "a", KEY).checksum() in {record(1).checksum(), record(2).checksum()}
    assert [path.name for path in store.path("relax", "a", KEY).parent.iterdir()] == [f"{KEY[:32]}.h5"]


# --- manifests ----------------------------------------------------------------------------------------------------

ENTRIES = [
    Entry("a", "pristine", "done", KEY),
    Entry("a", "doped-0", "failed", KEY[::-1], "exploded"),
    Entry("b", "pristine", "skipped", "", "no supercell fits"),
]


def test_manifest_round_trip(tmp_path):
    write_manifest(tmp_path / "relax" / "a.json", ENTRIES)
    assert read_manifest(tmp_path / "relax" / "a.json") == ENTRIES
    write_manifest(tmp_path / "relax" / "a.json", [])
    assert read_manifest(tmp_path / "relax" / "a.json") == []


@pytest.mark.parametrize("content", ["", "[{", "[1]", '[{"host": "a"}]', '[{"hots": "a"}]', "3"])
def test_torn_manifest_is_named_with_a_remedy(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(RecordError, match=r"a\.json: not a manifest.*delete it and run again"):
        read_manifest(tmp_path / "a.json")


@pytest.fixture
def run_folder(tmp_path):
    """Two batches of which every record is there."""
    store = RecordStore(tmp_path / "records")
    for entry in ENTRIES:
        if entry.key:
            store.save("relax", entry.host, entry.key, record())
    store.save("phonons", "a", KEY, record())
    write_manifest(tmp_path / "relax" / "one.json", ENTRIES)
    write_manifest(tmp_path / "relax" / "two.json", [Entry("b", "pristine", "skipped", "", "no supercell fits")])
    write_manifest(tmp_path / "phonons" / "one.json", [Entry("a", "pristine", "done", KEY)])
    return tmp_path


STAGES = ("relax", "phonons")


def test_manifests_with_all_records_stay(run_folder):
    assert withdraw_stale_manifests(run_folder, STAGES) == []
    assert len(list(run_folder.glob("*/*.json"))) == 3


@pytest.mark.parametrize(
    ("stage", "host", "key", "manifest"),
    [
        ("relax", "a", KEY, "relax/one.json"),
        ("relax", "a", KEY[::-1], "relax/one.json"),
        ("phonons", "a", KEY, "phonons/one.json"),
    ],
)
def test_manifest_of_a_lost_record_is_withdrawn(run_folder, stage, host, key, manifest):
    RecordStore(run_folder / "records").path(stage, host, key).unlink()
    assert withdraw_stale_manifests(run_folder, STAGES) == [run_folder / manifest]
    assert not (run_folder / manifest).exists()
    assert len(list(run_folder.glob("*/*.json"))) == 2
    assert withdraw_stale_manifests(run_folder, STAGES) == []


def test_nothing_to_withdraw_before_the_first_run(tmp_path):
    assert withdraw_stale_manifests(tmp_path / "results", STAGES) == []
