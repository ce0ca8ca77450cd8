"""The noise floor of direct spectra: one composition in different arrangements, relaxed, with all force constants.

    .venvs/sevennet/bin/python tests/bench/direct_floor.py [--hosts 8] [--arrangements 5] [--minutes 20]

For hosts that the shipped networks have not seen, drawn at random, the composition of its dilute direct cell with most
dopants is arranged anew in the same small cell. Appends to results/bench/direct_floor.jsonl what is lacking there, in
the potential's environment, with the settings of config/reference.yaml. Prints, of those whose atoms stay within half
an Å, root mean squared errors in at.% of generalised least squares and of networks, and of the same answers averaged
over the arrangements of a composition: the rest is scatter of arrangements, which is the floor for whoever has one
spectrum of such a cell, however well all else is known.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from arrangements import elsewhere
from large_cells import REFERENCE, read, samples_of

from defectnet.batches.pristine import force_constants_of, pristine_phonons, pristine_relaxation, wide_matrix
from defectnet.batches.worker import Job, structure_of
from defectnet.config import load_config
from defectnet.dataset.samples import load_responses, load_samples
from defectnet.dataset.schema import Dataset
from defectnet.dopants import recommend
from defectnet.elements import element_amounts
from defectnet.errors import PhysicsError
from defectnet.hosts.sheet import read_sheet
from defectnet.models.baselines import BASELINE_AXIS, BASELINES
from defectnet.phonons.doped import doped_phonons
from defectnet.phonons.modes import diagonalise
from defectnet.phonons.superposition import Superposition
from defectnet.records import RecordStore
from defectnet.relaxation import relax_doped
from defectnet.seeds import generator
from defectnet.supercells import Plan, apply, plan_host
from defectnet.training.evaluate import Network
from defectnet.training.fit import PARTS, load_checkpoint
from defectnet.training.metrics import LEFT_SITE_A

FILE = Path("results/bench/direct_floor.jsonl")
CONFIG = Path("config/reference.yaml")
DILUTE = 0.0626
"""Total concentration of dilute cells, at most."""


def extend(wanted: dict[str, dict[str, float]], arrangements: int, minutes: float) -> None:
    """Append what the file lacks of the ``wanted`` compositions, by host, for so many minutes."""
    config = load_config(CONFIG)
    job = Job.of(config, RecordStore(Path("results/bench/work/direct_floor")))
    sheet = {host.id: host for host in read_sheet(config.hosts.sheet)}
    done = {(row["host"], row["arrangement"]) for row in read(FILE)}
    began = time.monotonic()
    for name, concentrations in wanted.items():
        if all((name, number) in done for number in range(arrangements)):
            continue
        host = sheet[name]
        candidates = recommend(host.build(), name, config.dopants, config.hosts.vocabulary)
        plan = plan_host(name, host.build(), candidates, config.supercells, config.run.seed)
        entry, relaxed = pristine_relaxation(job, host)
        primitive = structure_of(relaxed)
        matrices = plan.matrix, wide_matrix(config, plan.matrix, primitive)
        small, wide = (
            Superposition(primitive, matrix, force_constants_of(pristine_phonons(job, entry, relaxed, matrix)[1]), [])
            for matrix in matrices
        )
        replaces = {candidate.dopant: candidate.replaces for candidate in candidates}
        first = composed(list(small.folding.atoms.symbols), concentrations, replaces)
        for number in range(arrangements):
            if (name, number) in done:
                continue
            if time.monotonic() - began > 60 * minutes:
                return
            rng = generator(config.run.seed, name, "direct floor", str(number))
            row = {"host": name, "arrangement": number, "concentrations": concentrations}
            row |= arranged(job, small, wide, elsewhere(first, list(small.folding.atoms.symbols), rng), rng)
            with FILE.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{name} {number}: {row['fidelity']}, {time.monotonic() - began:.0f} s", flush=True)


def composed(symbols: Sequence[str], concentrations: dict[str, float], replaces: dict[str, str]) -> Plan:
    """Any arrangement of a composition on the sites that its dopants take."""
    free = {symbol: [k for k, one in enumerate(symbols) if one == symbol] for symbol in set(symbols)}
    sites = {
        free[replaces[dopant]].pop(): dopant
        for dopant, share in concentrations.items()
        for _ in range(round(share * len(symbols)))
    }
    return Plan(tuple(sorted(sites)), tuple(sites[site] for site in sorted(sites)))


def arranged(
    job: Job, small: Superposition, wide: Superposition, plan: Plan, rng: np.random.Generator
) -> dict[str, Any]:
    """Modes of one arrangement, repeated over the supercell of all spectra, and how far its atoms went."""
    config, model = job.config, job.potential.model
    unrelaxed = apply(plan, small.folding.atoms)
    try:
        relaxed = relax_doped(
            unrelaxed, model, config.relaxation, np.zeros_like(unrelaxed.positions), small.unchanged(plan)
        )
        if not relaxed.quality["converged"]:
            raise PhysicsError("not converged")
        atoms = apply(wide.repeated_plan(small, plan), wide.folding.atoms)
        found = doped_phonons(
            relaxed.atoms, model, config.relaxation, config.phonons, config.potential.atoms_per_pass, None, 0, rng,
            repeat=lambda hessian: diagonalise(
                wide.repeated_hessian(small, plan, hessian), atoms.get_masses(), list(atoms.symbols)
            ),
        )  # fmt: skip
    except PhysicsError as error:
        return {"fidelity": "failed", "reason": str(error)}
    own = small.folding.atoms
    host = diagonalise(small.hessian, own.get_masses(), list(own.symbols))
    return {
        "highest_meV": float(host.energies_meV.max()),
        "fidelity": found.fidelity,
        "displacement_max_A": round(relaxed.quality["displacement_max_A"], 4),
        "energies_meV": np.round(found.modes.energies_meV.astype(float), 3).tolist(),
    }


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=8)
    parser.add_argument("--arrangements", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=20)
    options = parser.parse_args()
    networks = {
        preset: load_checkpoint(REFERENCE / "models" / f"{preset}-host-0" / "checkpoint.pt")
        for preset in ("response", "published")
    }
    with Dataset(REFERENCE / "dataset.h5") as data:
        samples, responses = load_samples(data, BASELINE_AXIS), load_responses(data, BASELINE_AXIS)
        parts = networks["response"].parts
        dilute = (samples.targets.sum(axis=1) < DILUTE) & (np.array(data.spectra.fidelity)[samples.row] == "direct")
        known = np.flatnonzero(dilute & (parts == PARTS.index("test")))
        drawn = generator(0, "direct floor").permutation(np.unique(samples.host[known]))[: options.hosts]
        wanted = {}
        for host in drawn.tolist():
            rows = known[samples.host[known] == host]
            most = rows[samples.targets[rows].sum(axis=1).argmax()]
            amounts = element_amounts(samples.targets[most])
            wanted[data.hosts.id[host]] = {symbol: float(amount) for symbol, amount in amounts.items()}
        extend(wanted, options.arrangements, options.minutes)
        rows = [row for row in read(FILE) if row["fidelity"] != "failed" and row["displacement_max_A"] < LEFT_SITE_A]
        hosts = np.array([row["host"] for row in rows])
        print(
            f"{len(rows)} of {len(read(FILE))} spectra, {len(set(hosts))} compositions; RMSE in at.%, and of the means"
        )
        training = samples[np.flatnonzero(parts == PARTS.index("train"))]
        models = {name: Network(one) for name, one in networks.items()}
        models |= {name: BASELINES[name](training, responses) for name in ("gls", "nnls", "mean")}
        for name, model in models.items():
            asked = samples_of(rows, data, model.axis)
            for level in model.levels:
                told = model.predict(asked, responses, level).concentrations
                mean = np.array([told[hosts == host].mean(axis=0) for host in hosts])
                off, off_mean = (
                    np.sqrt(np.mean((100 * (one - asked.targets)[asked.candidates]) ** 2)) for one in (told, mean)
                )
                print(f"{name:10s} {level:10s} {off:.2f} {off_mean:.2f}")


if __name__ == "__main__":
    main()
