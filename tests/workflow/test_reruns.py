"""What a change of the configuration, the sheet or the records makes run again, and what it leaves alone."""

from __future__ import annotations

import os
import shutil
import time

import pytest
from conftest import campaign

HOSTS = 3
AFTER_DATASET = {"train": 2, "evaluate": 1, "figures": 1, "all": 1}
AFTER_SUPERPOSE = {"dataset": 1, **AFTER_DATASET}
FROM_SUPERPOSE = {"superpose": HOSTS, **AFTER_SUPERPOSE}
FROM_PHONONS = {"phonons": HOSTS, **FROM_SUPERPOSE}
FROM_RELAX = {"relax": HOSTS, **FROM_PHONONS}
FROM_LIBRARY = {"library": HOSTS, **FROM_RELAX}
FROM_SUPERCELLS = {"supercells": HOSTS, **FROM_LIBRARY}
STAGES_OF_A_HOST = ("dopants", "supercells", "library", "relax", "phonons", "superpose")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("spectra={sigma_meV: 2.0}", FROM_SUPERPOSE),
        ("spectra={energy_max_meV: 200}", FROM_SUPERPOSE),
        ("superposition={superposed_per_host: 5}", FROM_SUPERPOSE),
        ("superposition={error_max: 0.9}", FROM_SUPERPOSE),
        ("superposition={tolerance_eV_per_A2: 0.002}", FROM_LIBRARY),
        ("phonons={direct_per_host: 2}", FROM_PHONONS),
        ("phonons={displacement_A: 0.02}", FROM_LIBRARY),
        ("relaxation={start: unrelaxed}", FROM_RELAX),
        ("relaxation={fmax_eV_per_A: 0.02}", FROM_LIBRARY),
        ("supercells={concentration_max: 0.2}", FROM_SUPERCELLS),
        ("dopants={n_type: 2}", {"dopants": HOSTS, **FROM_SUPERCELLS}),
        ("training={epochs: 3}", AFTER_DATASET),
        ("potential={atoms_per_pass: 32}", {}),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_change_of_configuration(finished, change, expected):
    assert finished.planned("--config", change) == expected


def test_touching_files_changes_nothing(finished):
    for name in ("config.yaml", "hosts.tsv"):
        os.utime(finished.folder / name)
    assert finished.planned() == {}


@pytest.fixture
def copy(finished, tmp_path):
    """A finished run of its own that a test may damage; Snakemake keeps its memory in the folder, too."""
    shutil.copytree(finished.folder, tmp_path / "run", copy_function=shutil.copy2)
    finished_copy = campaign(tmp_path / "elsewhere")
    finished_copy.folder = tmp_path / "run"
    return finished_copy


def test_appended_host_runs_alone(copy):
    before = copy.fingerprint()
    copy.hosts("LiF", "MgO", "NaCl", "CaO")
    assert copy.planned() == dict.fromkeys(STAGES_OF_A_HOST, 1) | AFTER_SUPERPOSE
    copy.snakemake("--until", "superpose")
    after = copy.fingerprint()
    assert {path: after[path] for path in before} == before
    assert {path.parent.name for path in after.keys() - before.keys()} == {"CaO"}


@pytest.mark.parametrize("stage", ["library", "phonons"])
def test_deleted_record_is_computed_alone(copy, stage):
    before = copy.fingerprint()
    lost = copy.records(stage, "MgO")[0]
    lost.unlink()
    behind = STAGES_OF_A_HOST[STAGES_OF_A_HOST.index(stage) :]
    assert copy.planned() == dict.fromkeys(behind, 1) | AFTER_SUPERPOSE
    copy.snakemake("--until", "superpose")
    after = copy.fingerprint()
    assert after.keys() == before.keys()
    assert [path for path in before if after[path] != before[path]] == [lost]


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
    copy.snakemake()
    after = copy.fingerprint()
    assert after.keys() == before.keys()
    assert [path for path in before if after[path] != before[path]] == [damaged]


def test_more_doped_cells_keep_the_earlier_ones(copy):
    before = copy.fingerprint()
    copy.values["supercells"]["doped_per_host"] = 3
    copy.write()
    time.sleep(0.01)
    copy.snakemake("--until", "superpose")
    after = copy.fingerprint()
    assert {path: after[path] for path in before} == before
    assert len(after) == len(before) + 2 * HOSTS
