"""What a user sees when something is wrong: file, field and remedy, early, with nothing that was finished lost."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import REPOSITORY, campaign, rock_salt

from defectnet.hosts.sheet import Host, write_sheet
from defectnet.records import read_manifest

SEVENNET = REPOSITORY / ".venvs" / "sevennet" / "bin" / "python"


def assert_told(text: str, *parts: str) -> None:
    error = next(line for line in text.splitlines() if "error" in line.lower())
    shown = text[text.index(error) :]
    missing = [part for part in parts if part not in shown]
    assert not missing, f"{missing} not in:\n{shown}"
    assert "Traceback" not in text


def test_configuration_errors_come_all_together_before_any_job(tmp_path):
    bad = campaign(tmp_path, supercells={"concentration_max": 30, "atom_min": 8}, relaxation={"fmax_eV_per_A": "tight"})
    told = bad.snakemake(succeeds=False)
    assert_told(told, "config.yaml: supercells.concentration_max", "write 0.3 for 30 at.%")
    assert_told(told, "supercells.atom_min: unknown key; did you mean atoms_min?", "relaxation.fmax_eV_per_A")
    assert not bad.results.exists()


@pytest.mark.skipif(not SEVENNET.exists(), reason="the sevennet environment is not installed (make envs)")
@pytest.mark.parametrize(
    ("potential", "parts"),
    [
        (
            {"checkpoint": "no/such.pth"},
            ["potential.checkpoint: no/such.pth: no such file", "put the SevenNet checkpoint"],
        ),
        ({"model": "7net-9"}, ["potential.model: sevenn knows no model '7net-9'", "7net-0"]),
    ],
    ids=["checkpoint", "model"],
)
def test_missing_weights_stop_the_workflow_before_its_first_job(tmp_path, potential, parts):
    bad = campaign(tmp_path, potential={"name": "sevennet", "python": str(SEVENNET), **potential})
    assert_told(bad.defectnet("check", "--config", "config.yaml", succeeds=False), *parts)
    assert not (bad.results / "dopants").exists()


@pytest.mark.parametrize(
    ("training", "part"),
    [
        ({"presets": ["finetuned"]}, "presets: finetuned needs pretrained"),
        ({"presets": ["finetuned"], "pretrained": "no.pt"}, "no.pt: no such checkpoint"),
    ],
    ids=["unnamed", "missing"],
)
def test_finetuning_needs_a_network_to_start_from(tmp_path, training, part):
    bad = campaign(tmp_path, training=training)
    assert_told(bad.defectnet("check", "--config", "config.yaml", succeeds=False), part)


def test_wrong_environment_is_refused(tmp_path):
    bad = campaign(tmp_path, potential={"name": "sevennet"})  # with the interpreter of the main environment
    told = bad.defectnet("check", "--config", "config.yaml", succeeds=False)
    assert_told(told, "potential.name: sevennet needs the package sevenn", "make envs")


def test_unreadable_structure_and_foreign_element_are_named_with_line_and_field(tmp_path):
    bad = campaign(tmp_path)
    (tmp_path / "broken.cif").write_text("data_x\n_cell_length_a oops\n")
    lead = rock_salt("MgO")
    lead = Host(**{**vars(lead), "id": "PbO", "formula": "PbO", "sites": lead.sites.replace("Mg", "Pb")})
    broken = Host("broken", "NaCl", structure=tmp_path / "broken.cif", n_atoms=2, source="directory")
    write_sheet(tmp_path / "hosts.tsv", [rock_salt("LiF"), lead, broken])
    told = bad.defectnet("check", "--config", "config.yaml", succeeds=False)
    assert_told(told, "hosts.tsv:3: PbO:", "Pb", "hosts.tsv:4: broken:", "broken.cif")


def test_unreadable_file_of_a_directory_source_is_listed_not_fatal(tmp_path):
    (tmp_path / "cifs").mkdir()
    (tmp_path / "cifs" / "broken.cif").write_text("data_x\n_cell_length_a oops\n")
    rock_salt("MgO").build().to(str(tmp_path / "cifs" / "MgO.cif"))
    run = campaign(tmp_path)
    run.defectnet(
        "hosts",
        "select",
        "--source",
        "directory",
        "--path",
        "cifs",
        "--rejected",
        "rejected.tsv",
        "--output",
        "new.tsv",
    )
    assert "MgO" in (tmp_path / "new.tsv").read_text()
    assert "broken.cif" in (tmp_path / "rejected.tsv").read_text()


def test_cells_that_do_not_converge_are_left_out_and_tried_again_with_more_steps(tmp_path):
    # Positions of rock salt are fixed by symmetry: hosts converge at once, most doped cells not in one step.
    relaxation = {"steps_max": 1, "host_cell": False, "start": "unrelaxed"}
    run = campaign(tmp_path, "LiF", "MgO", relaxation=relaxation)
    run.snakemake("--until", "phonons")
    entries = [entry for host in ("LiF", "MgO") for entry in read_manifest(run.results / "phonons" / f"{host}.json")]
    skipped = [entry for entry in entries if entry.status == "skipped"]
    assert skipped
    assert all("not converged" in entry.reason and "relaxation.steps_max" in entry.reason for entry in skipped)
    assert {entry.item for entry in entries if entry.status == "done"} >= {"pristine"}
    kept = run.fingerprint()
    run.values["relaxation"]["steps_max"] = 500
    run.write()
    run.snakemake("--until", "phonons")
    after = run.fingerprint()
    assert all(after[path] == kept[path] for path in kept if path.parents[1].name == "phonons")
    assert len(run.records("phonons", "LiF") + run.records("phonons", "MgO")) == len(entries)


def test_truncated_dataset_is_named_with_the_remedy(finished, tmp_path):
    shutil.copytree(finished.results, tmp_path / "results")
    run = campaign(tmp_path)
    dataset = tmp_path / "results" / "dataset.h5"
    dataset.write_bytes(dataset.read_bytes()[: dataset.stat().st_size // 2])
    told = run.defectnet("evaluate", "--config", "config.yaml", succeeds=False)
    assert_told(told, "dataset.h5", "delete it and rerun `defectnet dataset`")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_full_disk_loses_nothing(small_disk):
    run = campaign(small_disk)
    for command in ("dopants", "supercells"):
        run.defectnet(command, "--config", "config.yaml", "--batch", "LiF")
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(1024))
    told = run.defectnet("library", "--config", "config.yaml", "--batch", "LiF", succeeds=False)
    assert_told(told, "records/relax/LiF", "No space left on device", "free space", "intact")
    assert not list(Path(small_disk).rglob("*.tmp"))
    filler.unlink()
    for command in ("library", "relax"):
        run.defectnet(command, "--config", "config.yaml", "--batch", "LiF")
    assert len(run.records("relax", "LiF")) == 3
    assert "0 damaged" in run.defectnet("records", "verify", "--config", "config.yaml")
