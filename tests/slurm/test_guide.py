"""The commands of docs/cluster.md, word for word: a small campaign through SLURM from its first job to its last."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter

import pytest
from conftest import REPOSITORY, campaign, site

GUIDE = (REPOSITORY / "docs" / "cluster.md").read_text()


@pytest.fixture
def clone(tmp_path):
    """A copy of the repository in which a small campaign goes by the name of the paper's."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for name in filter(lambda name: (REPOSITORY / name).is_file(), listed.split("\0")):
        target = tmp_path / "clone" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / name, target)
    (tmp_path / "clone" / ".venvs").symlink_to(REPOSITORY / ".venvs")
    blocks = {"hosts": {"per_batch": 3}, "run": {"results": "results/paper"}, "potential": {"atoms_per_second": 10000}}
    made = campaign(tmp_path / "clone", **blocks)
    (made.folder / "config.yaml").replace(made.folder / "config" / "paper.yaml")
    return made


def test_commands(cluster, clone, undisturbed):
    commands = "".join(re.findall(r"```sh\n(.*?)```", GUIDE, re.S))
    commands, installed = re.subn("make envs .*\n", "", commands)  # into .venvs, which runs this test
    commands, edited = re.subn(r"\$EDITOR", "true", commands)
    assert installed == edited == 1
    profile = clone.folder / "profiles" / "slurm" / "config.yaml"
    profile.write_text(site(profile.read_text()))
    earlier = cluster.finished().keys()
    done = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", commands],
        cwd=clone.folder, capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("metrics.json", "missing.tsv", "figures/spectra.png", "report.html"):
        assert (clone.results / name).exists()
    clone.must_equal(undisturbed)

    jobs = [job for number, job in cluster.finished().items() if number not in earlier]
    assert {job["JobState"] for job in jobs} == {"COMPLETED"}
    # dopants and supercells are one job; dataset, evaluate, figures; two networks on two kinds of split
    rules = ("library", "relax", "phonons", "superpose")
    assert Counter(job["Partition"] for job in jobs) == {"cpu": 1 + 3, "gpu": len(rules) + 4}
    for rule in rules:
        (note,) = clone.notes(rule)
        assert note["SLURMD_NODENAME"] in ("g1", "g2") and note["CUDA_VISIBLE_DEVICES"] in ("0", "1")


def test_graph_is_that_of_the_rules(tmp_path):
    def edges(text: str) -> set[tuple[str, str]]:
        pairs = re.findall(r"^\s*(\w[\w &]*) --> (\w[\w &]*)$", text, re.M)
        return {(a, b) for left, right in pairs for a in left.split(" & ") for b in right.split(" & ")}

    told = campaign(tmp_path).snakemake("--rulegraph", "mermaid-js")
    names = dict(re.findall(r"^\s*(id\d+)\[(\w+)\]$", told, re.M))
    drawn = re.search(r"```mermaid\n(.*?)```", GUIDE, re.S)[1]
    assert edges(drawn) == {(names[a], names[b]) for a, b in edges(told)}
