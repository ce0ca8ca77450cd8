"""Which candidates are dopants at all, judged by their single defects."""

from dataclasses import replace

import pytest
from typer.testing import CliRunner

from defectnet.batches import library_batch
from defectnet.cli import app
from defectnet.config import parse_config
from defectnet.dopants import recommend
from defectnet.errors import InputError
from defectnet.hosts.sheet import write_sheet
from defectnet.layout import Layout
from defectnet.records import RecordStore
from defectnet.screening import COLUMNS, read_dropped, screen, write_screened
from defectnet.supercells import plan_host


@pytest.fixture(scope="module")
def library(hosts, config, tmp_path_factory):
    """Two hosts with the single defects of their candidates: plans, entries, store."""
    store = RecordStore(tmp_path_factory.mktemp("screening"))
    plans = {
        host.id: plan_host(
            host.id, host.build(), recommend(host.build(), host.id, config.dopants, config.hosts.vocabulary),
            config.supercells, 0,
        )
        for host in hosts[:2]
    }  # fmt: skip
    return plans, library_batch(hosts[:2], plans, config, store), store


def test_dopants_that_move_atoms_far_are_dropped(library, tmp_path):
    plans, entries, store = library
    rows = screen(plans, entries, store, 10.0)
    assert {(row.host, row.dopant, row.replaces) for row in rows} == {
        (host, candidate.dopant, candidate.replaces) for host, plan in plans.items() for candidate in plan.candidates
    }
    assert {row.problem for row in rows} == {"", "unstable"}  # of this potential and in so small cells, some are
    assert all(bool(row.problem) == (row.energy_lowest_meV < -0.1) for row in rows)
    moved = sorted(row.displacement_max_A for row in rows)
    limit = 0.5 * (moved[0] + moved[-1])
    strict = screen(plans, entries, store, limit)
    for row, before in zip(strict, rows, strict=True):
        assert ("moves an atom" in row.problem) == (row.displacement_max_A > limit)
        assert ("unstable" in row.problem) == bool(before.problem)
    write_screened(tmp_path / "table.tsv", strict, "made in a test")
    dropped = read_dropped(tmp_path / "table.tsv")
    assert {(host, *pair) for host, pairs in dropped.items() for pair in pairs} == {
        (row.host, row.dopant, row.replaces) for row in strict if row.problem
    }


def test_defects_that_failed_or_are_unstable_are_told(library):
    plans, entries, store = library
    judged = screen(plans, entries, store, 10.0)
    good = next(k for k, row in enumerate(judged) if not row.problem)
    at = next(
        k for k, entry in enumerate(entries)
        if entry.host == judged[good].host and entry.item.startswith(f"{judged[good].dopant}@")
    )  # fmt: skip

    def now(**changes):
        entry = replace(entries[at], **changes)
        return screen(plans, [*entries[:at], entry, *entries[at + 1 :]], store, 10.0)[good]

    assert now(status="failed", reason="exploded").problem == "failed: exploded"
    unstable = store.read("library", entries[at].host, entries[at].key)
    unstable.header["quality"] |= {"imaginary_modes": 2, "energy_lowest_meV": -3.0}
    store.save("library", entries[at].host, "f" * 64, unstable)
    assert (now(key="f" * 64).problem, now(key="f" * 64).energy_lowest_meV) == ("unstable", -3.0)
    # What is not computed yet is not judged.
    assert len(screen(plans, [*entries[:at], *entries[at + 1 :]], store, 10.0)) == len(judged) - 1


@pytest.mark.parametrize("content", ["", "host\tdopant\n", "\t".join(COLUMNS) + "\nNaCl\tNa\n"])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "table.tsv"
    path.write_text(content)
    with pytest.raises(InputError, match=r"table.tsv: no table of .*defectnet screen"):
        read_dropped(path)
    with pytest.raises(InputError, match=r"gone.tsv: No such file"):
        read_dropped(tmp_path / "gone.tsv")


def test_a_run_leaves_out_what_screening_drops(hosts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_sheet(tmp_path / "hosts.tsv", hosts[:2])
    values = {
        "hosts": {"sheet": "hosts.tsv", "per_batch": 2},
        "run": {"results": "results"},
        "dopants": {"overrides": {"NaCl": {"Na": ["Li", "Mg"], "Cl": ["S"]}, "KF": {"K": ["Na"], "F": ["O"]}}},
        "supercells": {"atoms_min": 16, "atoms_max": 16, "doped_per_host": 1},
        "potential": {"name": "analytic"},
    }

    def call(*arguments):
        result = CliRunner().invoke(app, [*arguments, "--config", "config.yaml"], catch_exceptions=False)
        assert result.exit_code == 0, result.output

    def write(**changes):
        from ruamel.yaml import YAML

        with (tmp_path / "config.yaml").open("w") as file:
            YAML(typ="safe").dump(values | changes, file)

    write()
    batch = "--batch", "batch-00000"
    call("dopants", *batch)
    call("supercells", *batch)
    with pytest.raises(InputError, match="no single defects"):
        CliRunner().invoke(app, ["screen", "--output", "t.tsv", "--config", "config.yaml"], catch_exceptions=False)
    call("library", *batch)
    call("screen", "--output", "table.tsv", "--displacement-max", "0.01")
    dropped = read_dropped(tmp_path / "table.tsv")
    assert dropped
    write(dopants=values["dopants"] | {"screened": "table.tsv"})
    call("dopants", *batch)
    layout = Layout.of(parse_config(values, "test"))
    kept = layout.batch("dopants", "batch-00000").read_text()
    for dopant, _ in dropped.get("NaCl", ()):
        assert f'"dopant": "{dopant}"' not in kept[kept.index('"NaCl"') : kept.index('"KF"')]
    call("check", "--no-potential")
