"""What a change makes run again and what it leaves alone: the table of config/README.md, line by line."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from conftest import LATTICE_A, REPOSITORY, campaign, rock_salt
from ruamel.yaml import YAML

from defectnet.batches import assign
from defectnet.cli import app
from defectnet.config import Config, load_config, parse_config
from defectnet.hosts.sheet import read_sheet, write_sheet
from defectnet.records import read_header

HOSTS = ("LiF", "MgO", "NaCl")
PER_BATCH = ("dopants", "supercells", "library", "relax", "phonons", "superpose")
RULES = (*PER_BATCH, "dataset", "train", "evaluate", "figures")
EVERY = {
    "relax/pristine",
    "relax/doped",
    "phonons/pristine",
    "phonons/doped",
    "library/defect",
    "superposed/comparison",
    "superposed/responses",
    "superposed/superposed",
}


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    change: str
    example: str
    runs: str
    scope: str
    records: str

    def __str__(self) -> str:
        return self.example.strip("`").split(":")[0].replace("={", ".")

    @property
    def override(self) -> str:
        """The example as an argument of ``--config``."""
        return self.example.strip("`")

    def applied_to(self, values: dict[str, dict]) -> dict[str, dict]:
        """A configuration with the example's values."""
        ((block, changes),) = YAML(typ="safe").load(self.override.replace("=", ": ", 1)).items()
        return values | {block: values.get(block, {}) | changes}

    def planned(self, batches: int) -> dict[str, int]:
        """Jobs per rule, with that many batches in all."""
        if self.runs == "nothing":
            return {}
        first = RULES.index(re.match(r"`(\w+)`", self.runs)[1])
        count = batches if self.scope == "all hosts" else 1
        jobs = {rule: count if rule in PER_BATCH else 1 for rule in RULES[first:]}
        return jobs | {"train": 4, "all": 1}  # two networks, two kinds of split

    def kinds(self) -> set[str]:
        """Kinds of records that are computed."""
        named = set(re.findall(r"`(\w+/\w+)`", self.records))
        return EVERY - named if self.records.startswith("every") else named


def rows() -> list[Row]:
    text = (REPOSITORY / "config" / "README.md").read_text()
    section = text[text.index("## What runs again after a change") :]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [Row(*(cell.strip() for cell in line.strip("|").split("|"))) for line in lines]


OVERRIDES = [row for row in rows() if row.example.startswith("`")]
ACTIONS = {row.example: row for row in rows() if row.example and not row.example.startswith("`")}


def test_every_key_of_the_configuration_has_a_line():
    named = set()
    for row in rows():
        for block, keys in re.findall(r"`(\w+)\.\{?([\w,]+)\}?`", row.change):
            named |= {f"{block}.{key}" for key in keys.split(",")}
    keys = {f"{block}.{key}" for block, value in Config() for key in type(value).model_fields}
    assert named == keys


@pytest.mark.parametrize("row", OVERRIDES, ids=str)
def test_rules_that_run_again(finished, row):
    config = parse_config(row.applied_to(finished.values), row.override)
    batches = assign(read_sheet(finished.folder / "hosts.tsv"), config)
    assert finished.planned("--config", row.override) == row.planned(len(batches))


@pytest.fixture
def copy(finished, tmp_path, monkeypatch):
    """A finished run of its own that a test may damage; Snakemake keeps its memory in the folder, too."""
    shutil.copytree(finished.folder, tmp_path / "run", copy_function=shutil.copy2)
    copied = campaign(tmp_path / "elsewhere")
    copied.folder = tmp_path / "run"
    monkeypatch.chdir(copied.folder)
    return copied


def run_batch(run, host: str) -> None:
    """The commands that the rules of a host's batch call, in this process."""
    run.write()
    batches = assign(read_sheet("hosts.tsv"), load_config("config.yaml"))
    batch = next(name for name, members in batches.items() if host in members)
    for command in PER_BATCH:
        app([command, "--config", "config.yaml", "--batch", batch], standalone_mode=False)


def computed(run, before: dict[Path, int]) -> list[Path]:
    """Records written since."""
    return [path for path, time in run.fingerprint().items() if before.get(path) != time]


def kind(path: Path) -> str:
    """Stage and kind of item of a record."""
    item = read_header(path)["item"]
    return f"{path.parents[1].name}/{'defect' if '@' in item else item.split('-')[0]}"


@pytest.mark.parametrize("row", OVERRIDES, ids=str)
def test_records_that_are_computed(copy, row, monkeypatch):
    before = copy.fingerprint()
    copy.values = row.applied_to(copy.values)
    if str(row) == "potential.model":
        monkeypatch.setattr("defectnet.potentials.analytic.DEPTH_eV", 0.4)  # its parameters are its weights
    run_batch(copy, "LiF")
    fresh = computed(copy, before)
    assert {path.parent.name for path in fresh} <= {"LiF"}
    assert {kind(path) for path in fresh} == row.kinds()
    assert before.keys() <= copy.fingerprint().keys()


@pytest.mark.parametrize("example", [one for one in ACTIONS if one.startswith("delete")])
def test_deleted_record(copy, example):
    before = copy.fingerprint()
    lost = copy.records(example.split()[-1], "MgO")[0]
    lost.unlink()
    assert copy.planned() == ACTIONS[example].planned(len(HOSTS))
    run_batch(copy, "MgO")
    assert computed(copy, before) == [lost]


def test_damaged_record_is_named_and_computed_alone(copy):
    before = copy.fingerprint()
    damaged = copy.records("phonons", "NaCl")[1]
    content = damaged.read_bytes()
    half = len(content) // 2
    damaged.write_bytes(content[:half] + bytes(255 - byte for byte in content[half:]))
    assert damaged.name in copy.defectnet("records", "verify", "--config", "config.yaml", succeeds=False)
    (copy.results / "dataset.h5").unlink()
    told = copy.snakemake(succeeds=False)
    assert damaged.name in told and "run the workflow again" in told
    assert copy.planned() == ACTIONS["damage a record of phonons"].planned(len(HOSTS))
    copy.snakemake("--until", "dataset")
    assert computed(copy, before) == [damaged]
    assert copy.fingerprint().keys() == before.keys()


def test_appended_host_runs_alone(copy):
    before = copy.fingerprint()
    copy.hosts(*HOSTS, "CaO")
    assert copy.planned() == ACTIONS["append a host"].planned(len(HOSTS))
    copy.snakemake("--until", "superpose")
    fresh = computed(copy, before)
    assert {path.parent.name for path in fresh} == {"CaO"}
    assert {kind(path) for path in fresh} == EVERY


def test_removed_host_leaves_the_others_alone(copy):
    copy.hosts("LiF", "NaCl")
    assert copy.planned() == ACTIONS["remove a host"].planned(len(HOSTS))


@pytest.mark.parametrize(
    ("example", "columns", "kinds"),
    [
        ("change a crystal", dict.fromkeys("abc", LATTICE_A["LiF"] + 0.1), EVERY),
        ("change a reference", {"reference": "another"}, set()),
    ],
)
def test_changed_row(copy, example, columns, kinds):
    before = copy.fingerprint()
    write_sheet(copy.folder / "hosts.tsv", [replace(rock_salt("LiF"), **columns), *map(rock_salt, HOSTS[1:])])
    assert copy.planned() == ACTIONS[example].planned(len(HOSTS))
    run_batch(copy, "LiF")
    fresh = computed(copy, before)
    assert {path.parent.name for path in fresh} <= {"LiF"}
    assert {kind(path) for path in fresh} == kinds


def test_touching_files_changes_nothing(copy):
    for path in (*copy.folder.glob("*.*"), *copy.results.glob("*.*"), *copy.results.glob("*/*.json")):
        os.utime(path)
    assert copy.planned() == ACTIONS["touch files"].planned(len(HOSTS))
