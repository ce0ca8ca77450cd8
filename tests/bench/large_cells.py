"""What networks make of relaxed crystals in cells of 200 atoms and more, of hosts that they have not seen.

    .venvs/sevennet/bin/python tests/bench/large_cells.py [--config CONFIG] [--minutes M]

With ``--config``, a finished run that has hosts which the networks of the host split were not trained on: draws dilute
arrangements in the large cell, relaxes them from where superposition puts the atoms, computes all force constants, and
appends concentrations and modes to results/bench/large_cells.jsonl; what is there is not computed again.
Then, and without ``--config`` in any environment, the networks of data/reference and the baselines read these spectra.
Prints root mean squared errors in at.% over all candidates, and average precision.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from arrangements import grounds, on_grid
from sklearn.metrics import average_precision_score

from defectnet.batches.phonons import Ground
from defectnet.batches.worker import Job
from defectnet.config import load_config
from defectnet.dataset.samples import Axis, Samples, intensity, load_responses, load_samples
from defectnet.dataset.scatter import FOLDS
from defectnet.dataset.schema import Dataset
from defectnet.elements import index_of
from defectnet.layout import Layout
from defectnet.models.baselines import BASELINE_AXIS, BASELINES
from defectnet.phonons.doped import doped_phonons
from defectnet.phonons.modes import Modes, diagonalise
from defectnet.records import RecordStore
from defectnet.relaxation import relax_doped
from defectnet.seeds import generator
from defectnet.supercells import HostPlan, apply, plan_substitutions
from defectnet.training.evaluate import Network
from defectnet.training.fit import PARTS, Checkpoint, load_checkpoint
from defectnet.training.metrics import LEFT_SITE_A

FILE = Path("results/bench/large_cells.jsonl")
REFERENCE = Path("data/reference")
CONCENTRATION_MAX = 0.05


def compute(job: Job, plan: HostPlan, ground: Ground) -> dict[str, Any] | None:
    """An arrangement of a host, relaxed, with its modes; None where the relaxation does not converge."""
    config, wide = job.config, ground.wide
    symbols = list(wide.folding.atoms.symbols)
    settings = config.supercells.model_copy(update={"concentration_max": CONCENTRATION_MAX})
    rng = generator(config.run.seed, plan.host_id, "large cells", "0")  # of any number, the first
    drawn = plan_substitutions(symbols, ground.library.candidates(plan), settings, rng)
    guess = wide(drawn)
    model = job.potential.model
    relaxed = relax_doped(
        apply(drawn, wide.folding.atoms), model, config.relaxation, guess.displacements, guess.hessian
    )
    if not relaxed.quality["converged"]:
        return None
    per_pass = config.potential.atoms_per_pass
    found = doped_phonons(relaxed.atoms, model, config.relaxation, config.phonons, per_pass, None, 0, rng)
    return {
        "atoms": len(symbols),
        "fidelity": found.fidelity,
        "displacement_max_A": round(relaxed.quality["displacement_max_A"], 4),
        "concentrations": drawn.concentrations(len(symbols)),
        "energies_meV": np.round(found.modes.energies_meV.astype(float), 3).tolist(),
    }


def extend(path: Path, config_path: Path, hosts: set[str], minutes: float) -> None:
    """Append what the file lacks of ``hosts``, for so many minutes."""
    config = load_config(config_path)
    job = Job.of(config, RecordStore(Layout.of(config).records))
    began = time.monotonic()
    path.parent.mkdir(parents=True, exist_ok=True)
    for plan, ground in grounds(config, hosts - {row["host"] for row in read(path)}):
        if time.monotonic() - began > 60 * minutes:
            break
        started = time.monotonic()
        small = ground.library.superpose
        atoms = small.folding.atoms
        host = diagonalise(small.hessian, atoms.get_masses(), list(atoms.symbols))
        row = {"host": plan.host_id, "highest_meV": float(host.energies_meV.max())}
        found = compute(job, plan, ground)
        with path.open("a") as file:
            file.write(json.dumps(row | (found or {"fidelity": "failed"})) + "\n")
        print(f"{plan.host_id}: {time.monotonic() - started:.0f} s", flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    """The file's rows."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def samples_of(rows: Sequence[dict[str, Any]], data: Dataset, axis: Axis) -> Samples:
    """The rows as samples of the dataset's hosts."""
    known = load_samples(data, axis)
    ids = list(data.hosts.id)
    # Of each host any sample, whose doped spectrum is exchanged.
    first = [int(np.flatnonzero(known.host == ids.index(row["host"]))[0]) for row in rows]
    template = known[np.array(first)]
    doped, targets = np.zeros_like(template.doped), np.zeros_like(template.targets)
    for number, row in enumerate(rows):
        energies = np.array(row["energies_meV"])
        modes = Modes(energies, np.ones((len(energies), 1)), ("X",))
        if axis.kind == "host":
            edges = np.linspace(0, row["highest_meV"], axis.bins + 1)
            doped[number] = intensity(modes, edges, axis, data.settings)
        else:
            doped[number] = on_grid(modes, data)
        for element, amount in row["concentrations"].items():
            targets[number, index_of(element)] = amount
    everything = np.ones(len(rows), bool)
    return replace(template, doped=doped, targets=targets, relaxed=everything, fold=np.full(len(rows), FOLDS))


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--minutes", type=float, default=60)
    options = parser.parse_args()
    networks: dict[str, Checkpoint] = {
        preset: load_checkpoint(REFERENCE / "models" / f"{preset}-host-0" / "checkpoint.pt")
        for preset in ("response", "published")
    }
    with Dataset(REFERENCE / "dataset.h5") as data:
        samples, responses = load_samples(data, BASELINE_AXIS), load_responses(data, BASELINE_AXIS)
        parts = networks["response"].parts
        unseen = {data.hosts.id[host] for host in samples.host[parts == PARTS.index("test")]}
        if options.config:
            extend(FILE, options.config, unseen, options.minutes)
        rows = [row for row in read(FILE) if row["host"] in unseen and row["fidelity"] != "failed"]
        training = samples[np.flatnonzero(parts == PARTS.index("train"))]
        models = {name: Network(one) for name, one in networks.items()}
        models |= {name: BASELINES[name](training, responses) for name in ("gls", "nnls", "mean")}
        stayed = sum(row["displacement_max_A"] < LEFT_SITE_A for row in rows)
        hosts = len({row["host"] for row in rows})
        print(f"{len(rows)} spectra of {hosts} hosts; in {stayed} all atoms stayed at their sites")
        on_axis = {axis: samples_of(rows, data, axis) for axis in {model.axis for model in models.values()}}
        for name, model in models.items():
            asked = on_axis[model.axis]
            for level in model.levels:
                told = model.predict(asked, responses, level)
                off = 100 * (told.concentrations - asked.targets)[asked.candidates]
                there, scores = (asked.targets > 0)[asked.candidates], told.presence[asked.candidates]
                precision = average_precision_score(there, scores)
                print(f"{name:10s} {level:10s} {np.sqrt(np.mean(off**2)):.2f} {precision:.2f}")


if __name__ == "__main__":
    main()
