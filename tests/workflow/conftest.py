"""A small real run of the workflow: rock-salt hosts, the analytic potential, seconds instead of hours."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from defectnet.hosts.sheet import Host, write_sheet

REPOSITORY = Path(__file__).parents[2]
LATTICE_A = {"LiF": 4.03, "MgO": 4.21, "NaCl": 5.64, "CaO": 4.81}


def rock_salt(formula: str) -> Host:
    cation, anion = re.findall("[A-Z][a-z]?", formula)
    a = LATTICE_A[formula]
    sites = f"{cation} 4a 0 0 0; {anion} 4b 1/2 1/2 1/2"
    cell = {"spacegroup": "Fm-3m", "a": a, "b": a, "c": a, "alpha": 90, "beta": 90, "gamma": 90, "sites": sites}
    return Host(formula, formula, "rock salt", **cell, n_atoms=2, source="curated", reference="test")


@dataclass
class Campaign:
    """A folder with a configuration and a host sheet, and Snakemake to run them."""

    folder: Path
    values: dict

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "config.yaml").open("w") as file:
            YAML(typ="safe").dump(self.values, file)

    def hosts(self, *formulas: str) -> None:
        write_sheet(self.folder / "hosts.tsv", [rock_salt(formula) for formula in formulas])

    @property
    def results(self) -> Path:
        return self.folder / "results"

    def command(self, *arguments: str) -> list[str]:
        snakefile = ["--snakefile", str(REPOSITORY / "Snakefile"), "--configfile", "config.yaml"]
        return [sys.executable, "-m", "snakemake", *snakefile, *arguments]

    def snakemake(self, *arguments: str, succeeds: bool = True) -> str:
        done = subprocess.run(
            self.command(*arguments), capture_output=True, text=True, cwd=self.folder, timeout=1800, check=False
        )
        assert (done.returncode == 0) == succeeds, done.stdout + done.stderr
        return done.stdout + done.stderr

    def forked(self, *arguments: str) -> tuple[int, str]:
        """Exit code and output of Snakemake in a fork of this process, which has imported it already."""
        from snakemake.cli import main

        with tempfile.TemporaryFile("w+") as output:
            child = os.fork()
            if child == 0:
                code = 70
                try:
                    os.chdir(self.folder)
                    sys.stdout = sys.stderr = output
                    main(arguments)
                except SystemExit as ending:
                    code = ending.code
                finally:
                    output.flush()
                    os._exit(code)
            _, status = os.waitpid(child, 0)
            output.seek(0)
            return os.waitstatus_to_exitcode(status), output.read()

    def planned(self, *arguments: str) -> dict[str, int]:
        """Jobs per rule that would run now."""
        code, text = self.forked(*self.command("--dry-run", "--quiet", "rules", *arguments)[3:])
        assert code == 0, text
        return {rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", text, re.M) if rule != "total"}

    def defectnet(self, *arguments: str, succeeds: bool = True) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "defectnet", *arguments],
            capture_output=True, text=True, cwd=self.folder, timeout=300, check=False,
        )  # fmt: skip
        assert (done.returncode == 0) == succeeds, done.stdout + done.stderr
        return done.stdout + done.stderr

    def records(self, stage: str, host: str) -> list[Path]:
        return sorted((self.results / "records" / stage / host).glob("*.h5"))

    def fingerprint(self) -> dict[Path, int]:
        """Modification times of all records: an unchanged one was not computed again."""
        return {path: path.stat().st_mtime_ns for path in sorted((self.results / "records").glob("*/*/*.h5"))}


def campaign(folder: Path, *formulas: str, **blocks: dict) -> Campaign:
    values = {
        "run": {"name": "test", "results": "results"},
        "hosts": {"sheet": "hosts.tsv"},
        "supercells": {"atoms_min": 8, "atoms_max": 16, "doped_per_host": 2, "species_max": 2},
        "potential": {"name": "analytic", "python": sys.executable},
        "phonons": {"direct_per_host": 1},
        "superposition": {"superposed_per_host": 1, "error_max": 100.0},
        "training": {"epochs": 2, "repeats": 1},
    }
    for name, block in blocks.items():
        values.setdefault(name, {}).update(block)
    made = Campaign(folder, values)
    made.write()
    made.hosts(*(formulas or ("LiF", "MgO", "NaCl")))
    return made


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Campaign:
    """A complete run that tests read but do not change."""
    made = campaign(tmp_path_factory.mktemp("finished"))
    made.snakemake()
    return made
