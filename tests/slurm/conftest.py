"""A campaign on a real SLURM: the repository's own profile, jobs slow enough to be disturbed, and what must hold."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import psutil
import pytest
from cluster import PROGRAMS, Cluster, wait_until

from defectnet.dataset.schema import content_digest

REPOSITORY = Path(__file__).parents[2]
HOSTS = ("LiF", "MgO", "NaCl")
CONTROLLERS: list[subprocess.Popen] = []
"""Every Snakemake that was started, so that none outlives its test."""

# Both folders have a conftest.py, so that this one cannot be imported by its name.
SPEC = importlib.util.spec_from_file_location("workflow_conftest", REPOSITORY / "tests" / "workflow" / "conftest.py")
workflow_conftest = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = workflow_conftest
SPEC.loader.exec_module(workflow_conftest)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.fail(f"needs root and SLURM (missing: {', '.join(missing) or 'nothing'}); see `make test-slurm`")
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        Path(folder).chmod(0o755)  # munge wants everybody to reach its socket
        with Cluster(Path(folder)) as running:
            yield running


@pytest.fixture(autouse=True)
def nothing_left_behind(cluster) -> Iterator[None]:
    """A test that fails leaves neither controllers nor jobs to the next one."""
    yield
    while CONTROLLERS:
        controller = CONTROLLERS.pop()
        if controller.poll() is None:
            kill(controller)
    cluster.ask("scancel", "--me")
    wait_until(lambda: not cluster.running("pending,running,completing"), "no job is left")


class Campaign(workflow_conftest.Campaign):
    """A campaign whose jobs go to SLURM, with a controller that can be killed and jobs that wait when they are told.

    ``remembered`` are records that were finished when something happened.
    """

    @classmethod
    def of(cls, folder: Path, values: dict) -> Campaign:
        """Write the configuration, the slow interpreter and the profile: the repository's, for the test cluster."""
        made = cls(folder, deepcopy(values))
        python = folder / "slow-python"
        made.values["potential"]["python"] = str(python)
        made.write()
        python.write_text(
            f'#!/bin/sh\nCAMPAIGN={folder} exec {sys.executable} {Path(__file__).parent}/slow_python.py "$@"\n'
        )
        python.chmod(0o755)
        made.pause(0)
        made.remembered = {}
        profile = site((REPOSITORY / "profiles" / "slurm" / "config.yaml").read_text())
        (folder / "slurm").mkdir(exist_ok=True)
        (folder / "slurm" / "config.yaml").write_text(profile)
        return made

    @property
    def results(self) -> Path:
        return self.folder / self.values["run"]["results"]

    def edit_profile(self, old: str, new: str) -> None:
        """Replace all matches of a pattern in the profile."""
        path = self.folder / "slurm" / "config.yaml"
        text, edits = re.subn(old, new, path.read_text())
        assert edits
        path.write_text(text)

    def pause(self, seconds: float) -> None:
        """How long every evaluation of the potential waits from now on."""
        partial = self.folder / "pause.new"
        partial.write_text(str(seconds))
        partial.replace(self.folder / "pause")

    def start(self, *arguments: str) -> subprocess.Popen:
        """Start Snakemake with the SLURM profile; its output goes to snakemake.log."""
        with (self.folder / "snakemake.log").open("a") as log:
            controller = subprocess.Popen(
                self.command("--workflow-profile", "slurm", *arguments),
                stdout=log, stderr=subprocess.STDOUT, cwd=self.folder, start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in what shells run behind &
            )  # fmt: skip
        CONTROLLERS.append(controller)
        return controller

    def end(self, controller: subprocess.Popen, succeeds: bool = True) -> str:
        """Wait for Snakemake to end; returns what it has said."""
        code = controller.wait(900)
        told = (self.folder / "snakemake.log").read_text()
        assert (code == 0) == succeeds, told
        return told

    def notes(self, command: str) -> list[dict]:
        """What the processes of a command have noted about where they run."""
        path = self.folder / "notes.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [note for note in map(json.loads, lines) if note["command"] == command]

    def wait_for_records(self, count: int) -> None:
        """Until ``count`` records more than now are finished, and remember all there are."""
        before = len(self.fingerprint())
        wait_until(lambda: len(self.fingerprint()) >= before + count, f"{count} new records", 180)
        self.remembered = self.fingerprint()

    def must_equal(self, undisturbed: Campaign) -> None:
        """The same records, those remembered never written again, nothing else, and the same dataset."""
        after = self.fingerprint()
        assert {path: after.get(path) for path in self.remembered} == self.remembered

        def files(results: Path) -> list[str]:  # not the temporary ones of killed jobs, which are swept after a day
            paths = (results / "records").glob("*/*/[!.]*")
            return sorted(str(path.relative_to(results)) for path in paths)

        assert files(self.results) == files(undisturbed.results)
        assert content_digest(self.results / "dataset.h5") == content_digest(undisturbed.results / "dataset.h5")


def site(profile: str) -> str:
    """The repository's profile for the test cluster: no accounts, no accounting database, and in a hurry."""
    for old, new in ((r"\n *slurm_account: .*", ""), ("# (slurm-status-command: squeue)", r"\1")):
        profile, edits = re.subn(old, new, profile)
        assert edits == 1, f"{old} stands once in the profile"
    return profile + "\nslurm-init-seconds-before-status-checks: 5\nslurm-keep-successful-logs: true\n"


def campaign(folder: Path, **blocks: dict) -> Campaign:
    """A small campaign; training needs three hosts."""
    made = workflow_conftest.campaign(folder, *HOSTS, **blocks)
    return Campaign.of(made.folder, made.values)


@pytest.fixture(scope="session")
def relaxed(tmp_path_factory) -> Campaign:
    """A run up to its relaxations, on this machine, without SLURM; scenarios copy it and go on."""
    made = campaign(tmp_path_factory.mktemp("relaxed"), hosts={"per_batch": 3})
    made.snakemake("--cores", "1", "--until", "relax")
    return made


def copy_of(relaxed: Campaign, folder: Path) -> Campaign:
    shutil.copytree(relaxed.folder, folder, copy_function=shutil.copy2)
    (folder / "notes.jsonl").unlink()
    return Campaign.of(folder, relaxed.values)


@pytest.fixture(scope="session")
def undisturbed(relaxed, tmp_path_factory) -> Campaign:
    """The same run up to its dataset."""
    made = copy_of(relaxed, tmp_path_factory.mktemp("undisturbed") / "run")
    made.snakemake("--cores", "1", "--until", "dataset")
    return made


@pytest.fixture
def copy(cluster, relaxed, undisturbed, tmp_path) -> Iterator[Callable[[str], Campaign]]:
    """Copies of the relaxed run, whose phonons a test computes; with the rest each has to equal the undisturbed run."""
    copies = []

    def make_copy(name: str) -> Campaign:
        copies.append(copy_of(relaxed, tmp_path / name))
        return copies[-1]

    yield make_copy
    for made in copies:
        made.pause(0)
        made.defectnet("superpose", "--config", "config.yaml", "--batch", "batch-00000")
        made.defectnet("dataset", "--config", "config.yaml")
        made.must_equal(undisturbed)


@pytest.fixture
def run(copy) -> Campaign:
    return copy("run")


def kill(controller: subprocess.Popen) -> None:
    """SIGKILL to Snakemake and what it has started here, as when a login node goes down; SLURM's jobs go on."""
    children = psutil.Process(controller.pid).children(recursive=True)
    os.killpg(controller.pid, signal.SIGKILL)
    for child in children:
        if child.is_running():
            child.kill()
    controller.wait()
