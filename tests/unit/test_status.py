"""Expected items are those that the stages make; a status is right, changes nothing and survives what it meets."""

from __future__ import annotations

import io
import json
import os
import re
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from defectnet.batches import atoms_of, library_batch, phonon_batch, relax_batch, superpose_batch
from defectnet.config import write_config
from defectnet.dopants import recommend
from defectnet.expected import expected_items
from defectnet.files import write_atomically
from defectnet.hosts.sheet import read_sheet
from defectnet.layout import FIGURES, RECORD_STAGES, Layout
from defectnet.phonons.library import inequivalent_sites
from defectnet.records import Entry, Record, RecordStore, read_manifest, write_manifest
from defectnet.status import Stage, Status, Trouble, Unfinished, show, survey
from defectnet.supercells import plan_host, read_plans

ROOT = Path(__file__).parents[2]
NOW = 1.8e9
STARTED = NOW - 7200


def changed(config, **blocks):
    update = {name: getattr(config, name).model_copy(update=values) for name, values in blocks.items()}
    return config.model_copy(update=update)


@pytest.fixture(scope="module")
def small(config):
    """One direct and one probed cell per host, 150 spectra in records of 100."""
    superposition = {"superposed_per_host": 150, "mass_only_per_host": 2, "error_max": 100.0}
    return changed(config, phonons={"direct_per_host": 1}, superposition=superposition, training={"repeats": 1})


@pytest.fixture(scope="module")
def plans(hosts, small):
    made = {}
    for host in hosts:
        candidates = recommend(host.build(), host.id, small.dopants, small.hosts.vocabulary)
        made[host.id] = plan_host(host.id, host.build(), candidates, small.supercells, small.run.seed)
    return made


@pytest.mark.parametrize("number", [0, 60, 120, 180, 240, 300])
def test_orbits_are_the_inequivalent_sites(number, small):
    host = read_sheet(ROOT / "config" / "hosts" / "curated.tsv")[number]
    candidates = recommend(host.build(), host.id, small.dopants, small.hosts.vocabulary)
    settings = small.supercells.model_copy(update={"atoms_min": host.n_atoms, "atoms_max": 100})
    plan = plan_host(host.id, host.build(), candidates, settings, 0)
    primitive = atoms_of(host)
    sites = inequivalent_sites(primitive, candidates)
    expected = [f"{dopant}@{primitive.symbols[site]}{site}" for site, dopant in sites]
    assert expected_items(small, plan)["library"] == expected


@pytest.mark.parametrize("error_max", [100.0, 1e-6])
def test_expected_items_are_those_of_a_finished_run(hosts, plans, small, store, error_max):
    config = changed(small, superposition={"superposed_per_host": 105, "error_max": error_max})
    host = hosts[:1]
    library = library_batch(host, plans, config, store)
    relaxations = relax_batch(host, plans, config, store, library)
    phonons = phonon_batch(relaxations, plans, config, store, library)
    superposed = superpose_batch(relaxations, phonons, plans, config, store, library)
    made = dict(zip(RECORD_STAGES, (library, relaxations, phonons, superposed), strict=True))
    assert {stage: [entry.item for entry in entries] for stage, entries in made.items()} == expected_items(
        config, plans[host[0].id]
    )
    assert {entry.status for entry in superposed if "superposed" in entry.item} == (
        {"done"} if error_max > 1 else {"skipped"}
    )


def test_no_single_defects_where_none_are_needed(plans, small):
    config = changed(
        small,
        superposition={"superposed_per_host": 0},
        phonons={"direct_per_host": 2},
        relaxation={"start": "unrelaxed"},
    )
    assert expected_items(config, plans["NaCl"])["library"] == []


class Tree:
    """A results directory that a test fills: every record took 100 s."""

    def __init__(self, folder, config, hosts, plans):
        self.layout, self.config, self.hosts, self.plans = Layout(folder), config, hosts, plans
        self.store = RecordStore(self.layout.records)
        os.utime(write_config(config, self.layout.configs), (STARTED, STARTED))

    def plan(self, *host_ids, failed=None):
        for host in host_ids:
            write_atomically(self.layout.batch("dopants", host), b"{}")
            content = {"plans": {host: self.plans[host].to_dict()}, "failed": {}}
            if failed:
                content = {"plans": {}, "failed": {host: failed}}
            write_atomically(self.layout.batch("supercells", host), json.dumps(content).encode())

    def expected(self, stage, host):
        return expected_items(self.config, self.plans[host])[stage]

    def record(self, stage, host, item, age=60.0, **header):
        path = self.store.path(stage, host, f"{item}-{age}")
        values = {"status": "done", "item": item, "cost": {"wall_s": 100.0}, **header}
        self.store.save(stage, host, f"{item}-{age}", Record(values, {"x": np.zeros(3)}))
        os.utime(path, (NOW - age, NOW - age))
        return path

    def finish(self, stage, host, age=60.0):
        for item in self.expected(stage, host):
            self.record(stage, host, item, age)
        self.manifest(stage, host, [Entry(host, item, "done", f"{item}-{age}") for item in self.expected(stage, host)])

    def manifest(self, stage, host, entries):
        write_manifest(self.layout.batch(stage, host), entries)
        os.utime(self.layout.batch(stage, host), (NOW - 60, NOW - 60))

    def untouched(self):
        stats = {path: path.stat() for path in self.layout.results.rglob("*")}
        return {path: (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for path, stat in stats.items()}

    def status(self) -> Status:
        return survey(self.config, self.hosts, self.layout, NOW)

    def stage(self, name) -> Stage:
        return next(stage for stage in self.status().stages if stage.stage == name)

    def counts(self, name):
        stage = self.stage(name)
        return stage.done, stage.failed, stage.skipped, stage.missing


@pytest.fixture
def tree(tmp_path, small, hosts, plans):
    return Tree(tmp_path / "results", small, hosts, plans)


def test_empty_folder(tmp_path, small, hosts):
    status = survey(small, hosts, Layout(tmp_path / "nothing"), NOW)
    assert status.hosts == 3 and status.hosts_planned == 0 and status.last_record is None and status.eta_s is None
    assert all(stage.done == 0 for stage in status.stages)


def test_finished_run_lacks_nothing(tree):
    for host in tree.hosts:
        tree.plan(host.id)
        for stage in RECORD_STAGES:
            tree.finish(stage, host.id)
    status = tree.status()
    for stage in status.stages[:6]:
        assert stage.missing == stage.failed == stage.skipped == 0
        assert stage.batches_finished == stage.batches == 3
    counted = {stage.stage: stage.done for stage in status.stages if stage.unit == "records"}
    assert counted == {stage: sum(len(tree.expected(stage, host.id)) for host in tree.hosts) for stage in RECORD_STAGES}
    assert status.eta_s == 0
    assert [stage.missing for stage in status.stages if stage.unit == "files"] == [1, 4, 2, len(FIGURES)]


def test_running_batch_is_counted_by_its_records(tree):
    tree.plan("NaCl")
    tree.finish("library", "NaCl")
    tree.record("relax", "NaCl", "pristine", 120)
    tree.record("relax", "NaCl", "doped-0", 60, status="failed", reason="PhysicsError: exploded")
    status = tree.status()
    assert status.hosts_planned == 1
    relax = next(stage for stage in status.stages if stage.stage == "relax")
    # Two of three hosts have no plan yet: they are taken for what the first one needs.
    assert (relax.done, relax.failed, relax.missing) == (1, 1, 1 + 2 * 3)
    assert relax.batches_finished == 0
    assert [(trouble.host, trouble.item, trouble.count) for trouble in status.troubles] == [("NaCl", "doped-0", 1)]
    assert any("2 hosts have no plan" in note for note in status.notes)


def test_records_from_before_this_configuration_are_not_counted(tree):
    tree.plan("NaCl", "KF", "CaS")
    tree.record("relax", "NaCl", "pristine", age=NOW - STARTED + 1)
    assert tree.counts("relax") == (0, 0, 0, 9)
    assert tree.status().earlier == 1


def test_manifest_says_what_a_batch_gave_up(tree):
    tree.plan("NaCl", "KF")
    tree.plan("CaS", failed="CaS: no dopant candidates")
    tree.manifest("library", "KF", [Entry("KF", "defects", "skipped", reason="pristine host: not finite")])
    pristine = Entry("KF", "pristine", "failed", "k", "not finite")
    left = [Entry("KF", f"doped-{k}", "skipped", reason="pristine host: not finite") for k in range(2)]
    tree.manifest("relax", "KF", [pristine, *left])
    tree.manifest("superposed", "KF", [])
    tree.finish("library", "NaCl")
    assert tree.counts("library") == (3, 0, 1, 0)
    assert tree.counts("relax") == (0, 1, 2, 3)
    assert tree.counts("superposed") == (0, 0, 0, len(tree.expected("superposed", "NaCl")))
    assert tree.counts("supercells") == (2, 1, 0, 0)
    troubles = tree.status().troubles
    assert [(one.count, one.stages) for one in troubles] == [(4, {"library": 1, "relax": 3}), (1, {"supercells": 1})]


def test_manifest_of_a_smaller_plan_is_not_complete(tree):
    tree.plan("NaCl", "KF", "CaS")
    for host in tree.plans:
        tree.manifest("relax", host, [Entry(host, item, "done", item) for item in ("pristine", "doped-0")])
    assert tree.counts("relax") == (6, 0, 0, 3)


def test_reasons_that_differ_in_numbers_are_one(tree):
    tree.plan("NaCl", "KF", "CaS")
    told = "relaxation: not converged after {} steps: {} eV/Å left"
    for host, steps, force in (("NaCl", 500, 0.26), ("KF", 500, "1.3e-02")):
        tree.manifest("phonons", host, [Entry(host, "doped-0", "skipped", reason=told.format(steps, force))])
    tree.manifest("phonons", "CaS", [Entry("CaS", "pristine", "failed", "k", "PhysicsError: exploded")])
    first, second = tree.status().troubles
    assert (first.count, first.host, first.reason) == (2, "NaCl", told.format(500, 0.26))
    assert (second.count, second.reason) == (1, "PhysicsError: exploded")


def test_forces_under_way(tree):
    tree.plan("NaCl")
    tree.finish("library", "NaCl")
    tree.finish("relax", "NaCl")
    tree.record("phonons", "NaCl", "pristine")
    forces = np.full((40, 16, 3), np.nan)
    forces[:12] = 0.1
    path = tree.store.path("phonons", "NaCl", "doped").with_suffix(".partial.npy")
    np.save(path, forces)
    os.utime(path, (NOW - 30, NOW - 30))
    assert tree.status().unfinished == [Unfinished("phonons", "NaCl", "doped-0", 12, 40, 30.0)]
    path.write_bytes(path.read_bytes()[:100])
    (one,) = tree.status().unfinished
    assert one.structures is None and one.item == "doped-0"


def test_time_left(tree):
    """Two hours ago all but relaxations; in the last hour three of these, 100 s each; six are left."""
    tree.plan("NaCl", "KF", "CaS")
    for host in tree.plans:
        for stage in ("library", "phonons", "superposed"):
            tree.finish(stage, host, age=NOW - STARTED)
    tree.finish("relax", "NaCl", age=1800)
    status = tree.status()
    relax = next(stage for stage in status.stages if stage.stage == "relax")
    assert relax.per_hour_now == pytest.approx(3)
    assert relax.per_hour_overall == pytest.approx(3 / 1.5)  # the last record came after an hour and a half
    assert status.eta_s == pytest.approx(2 * 3600)
    assert status.eta_excludes == []


def test_time_left_leaves_out_what_nobody_has_timed(tree):
    tree.plan("NaCl", "KF", "CaS")
    tree.finish("library", "NaCl", age=1800)
    status = tree.status()
    assert status.eta_excludes == ["relax", "phonons", "superposed"]
    assert status.eta_s == pytest.approx(3600 * 2 * len(tree.expected("library", "KF")) / 3, rel=0.5)


def test_time_left_of_a_run_that_stands_still(tree):
    tree.plan("NaCl", "KF", "CaS")
    tree.finish("library", "NaCl", age=3700)
    status = tree.status()
    assert next(stage for stage in status.stages if stage.stage == "library").per_hour_now == 0
    assert status.eta_s > 0
    assert any("pauses included" in note for note in status.notes)


def test_damage_is_counted_and_nothing_is_changed(tree):
    tree.plan("NaCl", "KF", "CaS")
    tree.record("relax", "NaCl", "pristine")
    broken = tree.record("relax", "NaCl", "doped-0")
    broken.write_bytes(broken.read_bytes()[:-40])
    os.utime(broken, (NOW - 60, NOW - 60))
    (broken.parent / "aside.damaged").write_bytes(b"x")
    (broken.parent / ".key.h5.node.17.tmp").write_bytes(b"x")
    tree.layout.batch("relax", "KF").parent.mkdir()
    tree.layout.batch("relax", "KF").write_text("[{")
    tree.layout.batch("supercells", "CaS").write_text('{"plans": {"CaS": {}}, "failed": {}}')
    before = tree.untouched()
    status = tree.status()
    relax = next(stage for stage in status.stages if stage.stage == "relax")
    assert (relax.done, relax.failed, relax.batches_finished) == (1, 0, 0)
    assert status.damaged == 2
    assert status.hosts_planned == 2
    assert tree.untouched() == before


def test_files_that_vanish_meanwhile(tree, monkeypatch):
    tree.plan("NaCl", "KF", "CaS")
    tree.manifest("library", "NaCl", [Entry("NaCl", "S@Cl1", "done", "k")])
    gone = tree.record("relax", "NaCl", "pristine")

    def vanishing(read):
        def read_after_deletion(path):
            path.unlink()
            return read(path)

        return read_after_deletion

    for name, read in (("read_manifest", read_manifest), ("read_plans", read_plans)):
        monkeypatch.setattr(f"defectnet.status.{name}", vanishing(read))
    assert tree.counts("library") == (0, 0, 0, 0)
    tree.plan("NaCl", "KF", "CaS")
    monkeypatch.setattr("defectnet.status.read_plans", read_plans)
    monkeypatch.setattr("defectnet.status.read_header", lambda path: gone.with_name("gone").read_bytes())
    assert tree.counts("relax") == (0, 0, 0, 9)


def test_configuration_that_has_not_run(tree):
    tree.plan("NaCl", "KF", "CaS")
    tree.record("relax", "NaCl", "pristine", age=NOW - STARTED + 1)
    tree.config = changed(tree.config, run={"seed": 1})
    status = tree.status()
    assert status.began is None
    assert tree.counts("relax") == (1, 0, 0, 8)
    assert "No workflow with exactly this configuration" in " ".join(status.notes)


def test_keys_of_the_json_are_documented(tree):
    tree.plan("NaCl", "KF", "CaS")
    tree.record("relax", "NaCl", "pristine", status="failed", reason="exploded")
    np.save(tree.store.path("relax", "NaCl", "k").with_suffix(".partial.npy"), np.zeros((1, 1, 3)))
    status = json.loads(json.dumps(asdict(tree.status())))
    text = (ROOT / "docs" / "status.md").read_text()
    named = set(re.findall(r"`(\w+)`", text))
    for cls, values in ((Status, status), (Stage, status["stages"][0]), (Trouble, status["troubles"][0]),
                        (Unfinished, status["unfinished"][0])):  # fmt: skip
        assert set(values) == {one.name for one in fields(cls)} <= named


@pytest.mark.parametrize("terminal", [True, False])
def test_shown_without_frames_in_a_log(tree, terminal):
    tree.plan("NaCl", "KF", "CaS")
    tree.record("relax", "NaCl", "pristine", status="failed", reason="PhysicsError: exploded")
    buffer = io.StringIO()
    show(tree.status(), Console(file=buffer, width=160, force_terminal=terminal))
    text = buffer.getvalue()
    assert "PhysicsError: exploded" in text and "Time left" in text and "superposed" in text
    assert ("─" in text or "━" in text or "\x1b" in text) == terminal
