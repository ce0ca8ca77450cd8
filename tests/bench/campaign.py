"""The whole workflow at the size of the publication, with the analytic potential: what Snakemake and starting jobs add.

    .venvs/main/bin/python tests/bench/campaign.py --hosts 2000 --per-batch 1000 [--cores 2] [--folder /tmp/campaign]

Runs the stages of every host to the merged dataset through Snakemake, then the same batches back to back in as many
processes as there are cores, without Snakemake, in a fresh folder. Prints wall times, the overhead (the first over
the second, less one), the time and memory of a check that nothing is left to do, and what lies on disk. Either part can
be interrupted and goes on where it was, but then its time is that of the rest.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from ruamel.yaml import YAML

from defectnet.batches import assign
from defectnet.config import load_config
from defectnet.hosts.sheet import Host, read_sheet, write_sheet

REPOSITORY = Path(__file__).resolve().parents[2]
STAGES = ("dopants", "supercells", "library", "relax", "phonons", "superpose")
LATTICE_A = {
    "LiF": 4.03, "NaF": 4.62, "KF": 5.34, "LiCl": 5.14, "NaCl": 5.64, "KCl": 6.29, "LiBr": 5.50, "NaBr": 5.97,
    "KBr": 6.60, "MgO": 4.21, "CaO": 4.81, "SrO": 5.16, "BaO": 5.54, "MgS": 5.20, "CaS": 5.69, "SrS": 6.02,
}  # fmt: skip


def rock_salts(number: int) -> list[Host]:
    """Rock salts whose lattices differ by up to 1 %, so that no two hosts share a record."""
    rng = np.random.default_rng(0)
    hosts = []
    for i in range(number):
        formula, a = list(LATTICE_A.items())[i % len(LATTICE_A)]
        cation, anion = re.findall("[A-Z][a-z]?", formula)
        a = round(a * float(rng.uniform(0.99, 1.01)), 5)
        cell = {"spacegroup": "Fm-3m", "a": a, "b": a, "c": a, "alpha": 90, "beta": 90, "gamma": 90}
        sites = f"{cation} 4a 0 0 0; {anion} 4b 1/2 1/2 1/2"
        hosts.append(Host(f"host-{i:05d}", formula, "rock salt", **cell, sites=sites, n_atoms=2, source="curated"))
    return hosts


def write_run(folder: Path, hosts: int, per_batch: int) -> Path:
    """Configuration and sheet of a run in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_sheet(folder / "hosts.tsv", rock_salts(hosts))
    values = {
        "run": {"name": "campaign", "results": "results"},
        "hosts": {"sheet": "hosts.tsv", "per_batch": per_batch},
        "dopants": {"n_type": 1, "p_type": 0},
        "supercells": {"atoms_min": 8, "atoms_max": 8, "doped_per_host": 1, "species_max": 1},
        "potential": {"name": "analytic", "python": sys.executable},
        "phonons": {"direct_per_host": 1},
        "superposition": {"superposed_per_host": 100, "error_max": 10},
    }
    with (folder / "config.yaml").open("w") as file:
        YAML(typ="safe").dump(values, file)
    return folder / "config.yaml"


def work(folder: Path, batches: list[str]) -> None:
    """Stage after stage of some batches in this process."""
    from defectnet.cli import app

    os.chdir(folder)
    for batch in batches:
        for stage in STAGES:
            app([stage, "--config", "config.yaml", "--batch", batch], standalone_mode=False)


def back_to_back(folder: Path, cores: int) -> float:
    """Seconds that the batches take in ``cores`` processes that share nothing."""
    config = load_config(folder / "config.yaml")
    names = list(assign(read_sheet(folder / "hosts.tsv"), config))
    began = time.perf_counter()
    context = get_context("spawn")
    processes = [context.Process(target=work, args=(folder, names[number::cores])) for number in range(cores)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            sys.exit(f"a worker failed with {process.exitcode}")
    return time.perf_counter() - began


def snakemake(folder: Path, *arguments: str) -> float:
    """Seconds of a run of Snakemake; output goes to a log beside it."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(REPOSITORY / "Snakefile")]
    command += ["--configfile", "config.yaml", "--nolock", "--quiet", "progress", *arguments]
    began = time.perf_counter()
    with (folder / "snakemake.log").open("a") as log:
        subprocess.run(command, cwd=folder, stdout=log, stderr=log, check=True)
    return time.perf_counter() - began


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=2000)
    parser.add_argument("--per-batch", type=int, default=1000)
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, default=Path("/tmp/campaign"))
    parser.add_argument("--only", choices=["snakemake", "back-to-back"])
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    workflow, plain = options.folder.resolve() / "workflow", options.folder.resolve() / "plain"
    for folder in (workflow, plain):
        write_run(folder, options.hosts, options.per_batch)
    with_snakemake = without = None
    if options.only != "back-to-back":
        with_snakemake = snakemake(workflow, "--cores", str(options.cores), "--until", "superpose")
        print(f"workflow, {options.hosts} hosts, {options.per_batch} per batch: {with_snakemake:.0f} s", flush=True)
        merge = snakemake(workflow, "--cores", str(options.cores), "--until", "dataset")
        print(f"merge, start of Snakemake included: {merge:.0f} s", flush=True)
        nothing = snakemake(workflow, "--dry-run", "--until", "dataset")
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        print(f"nothing to be done, found in {nothing:.1f} s; largest process so far {peak:.0f} MB", flush=True)
        files = [path for path in (workflow / "results").rglob("*") if path.is_file()]
        print(f"{len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:.0f} MB in results; "
              f"{sum(1 for _ in (workflow / '.snakemake').rglob('*'))} files in .snakemake", flush=True)  # fmt: skip
    if options.only != "snakemake":
        without = back_to_back(plain, options.cores)
        print(f"back to back in {options.cores} processes: {without:.0f} s", flush=True)
    if with_snakemake and without:
        print(f"overhead of workflow and start-up: {100 * (with_snakemake / without - 1):.1f} %")


if __name__ == "__main__":
    main()
