"""What keeps concentrations from being read off direct spectra: their small cells, superposition, or neither.

    .venvs/sevennet/bin/python tests/bench/arrangements.py CONFIG [--hosts 20]

For every direct spectrum of a finished run, in which a small relaxed cell repeats itself, two more are superposed: of
the very same arrangement, and of the same dopants at random sites of the large cell. Generalised least squares, which
the host's superposed spectra have taught, reads all three. Prints root mean squared errors in at.% over all candidates
by total doping, of all cells and of those whose atoms stayed within half an Å. Run it in the potential's environment.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from defectnet.batches import PRISTINE, WIDE, assign
from defectnet.batches.phonons import Ground
from defectnet.batches.worker import Job
from defectnet.config import Config, load_config
from defectnet.dataset.samples import load_responses, load_samples
from defectnet.dataset.schema import Dataset
from defectnet.hosts.sheet import read_sheet
from defectnet.layout import Layout
from defectnet.models.baselines import BASELINE_AXIS, GeneralisedLeastSquares
from defectnet.phonons.modes import Modes, diagonalise
from defectnet.phonons.pdos import spectrum
from defectnet.phonons.superposition import Superposition
from defectnet.progress import track
from defectnet.records import RecordStore, read_manifest
from defectnet.seeds import generator
from defectnet.supercells import HostPlan, Plan, read_plans
from defectnet.training.metrics import LEFT_SITE_A

TOTALS_AT = (0, 5, 12, 100)


def grounds(config: Config, hosts: set[str]) -> Iterator[tuple[HostPlan, Ground]]:
    """Plan, library and force constants of every host among ``hosts`` that was finished."""
    layout = Layout.of(config)
    store = RecordStore(layout.records)
    job = Job.of(config, store)
    for batch in assign(read_sheet(config.hosts.sheet), config):
        plans, library = read_plans(layout.batch("supercells", batch))[0], read_manifest(layout.batch("library", batch))
        phonons = {(entry.host, entry.item): entry.key for entry in read_manifest(layout.batch("phonons", batch))}
        for entry in read_manifest(layout.batch("relax", batch)):
            if entry.item == PRISTINE and entry.host in hosts:
                plan, relaxed = plans[entry.host], store.read("relax", entry.host, entry.key)
                keys = [phonons[entry.host, item] for item in (PRISTINE, WIDE)]
                records = [store.read("phonons", entry.host, key) for key in keys]
                yield plan, Ground.of(job, relaxed, plan, library, keys[1], *records)


def elsewhere(plan: Plan, symbols: Sequence[str], rng: np.random.Generator) -> Plan:
    """The same dopants on other sites of the same elements."""
    site_of: dict[int, str] = {}
    replaced = np.array(symbols)[list(plan.sites)]
    for symbol in np.unique(replaced):
        dopants = [dopant for dopant, old in zip(plan.dopants, replaced, strict=True) if old == symbol]
        free = np.flatnonzero(np.array(symbols) == symbol)
        site_of |= zip(rng.choice(free, len(dopants), replace=False).tolist(), dopants, strict=True)
    return Plan(tuple(sorted(site_of)), tuple(site_of[site] for site in sorted(site_of)))


def on_grid(modes: Modes, data: Dataset) -> np.ndarray:
    """Intensity [B] of modes on the dataset's own grid, as :func:`load_samples` gives it."""
    return spectrum(modes, data.edges_meV, data.settings) * np.diff(data.edges_meV) * (len(data.edges_meV) - 1)


def superposed(wide: Superposition, plan: Plan, data: Dataset) -> np.ndarray:
    """Intensity [B] of a superposed arrangement."""
    found = wide(plan)
    return on_grid(diagonalise(found.hessian, found.atoms.get_masses(), list(found.atoms.symbols)), data)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--hosts", type=int, default=20)
    options = parser.parse_args()
    config = load_config(options.config)
    with Dataset(Layout.of(config).dataset) as data:
        samples, responses = load_samples(data, BASELINE_AXIS), load_responses(data, BASELINE_AXIS)
        fidelity = np.array(data.spectra.fidelity)[samples.row]
        row_of: Mapping[str, int] = {data.spectra.id[row]: number for number, row in enumerate(samples.row)}
        moved = data.spectra.quality["displacement_max_A"][samples.row]
        drawn = generator(config.run.seed, "arrangements").permutation(np.unique(samples.host[fidelity == "direct"]))
        wanted = {data.hosts.id[host] for host in drawn[: options.hosts]}
        rows, same, other = [], [], []
        for plan, ground in track(list(grounds(config, wanted)), "hosts"):
            symbols = list(ground.wide.folding.atoms.symbols)
            for number, small in enumerate(plan.plans):
                row = row_of.get(f"{plan.host_id}/doped-{number}")
                if row is None or not ground.library.digest(small):
                    continue
                doped = ground.wide.repeated_plan(ground.library.superpose, small)
                rng = generator(config.run.seed, plan.host_id, "arrangements", str(number))
                rows.append(row)
                same.append(superposed(ground.wide, doped, data))
                other.append(superposed(ground.wide, elsewhere(doped, symbols, rng), data))
    model = GeneralisedLeastSquares(samples[np.flatnonzero(fidelity == "superposed")], responses)
    direct = samples[np.array(rows)]
    kinds = {
        "direct": direct,
        "superposed, same arrangement": replace(direct, doped=np.array(same, np.float32)),
        "superposed, large cell": replace(direct, doped=np.array(other, np.float32)),
    }
    total, stayed = 100 * direct.targets.sum(axis=1), moved[rows] < LEFT_SITE_A
    classes = [
        (f"{low} to {high} at.%" if high < 100 else f"over {low} at.%", (total > low + 1e-4) & (total <= high + 1e-4))
        for low, high in pairwise(TOTALS_AT)
    ]
    print(f"{len(wanted)} hosts, {len(rows)} direct spectra; RMSE in at.% (spectra)")
    everything = np.ones(len(rows), bool)
    for kind, some in kinds.items():
        off = 100 * (model.concentrations(some, responses, "library") - some.targets)
        for cells, kept in (("all cells", everything), ("atoms stayed", stayed)):
            print(f"{cells:13s} {kind:29s}", end="")
            for name, inside in (("all", everything), *classes):
                chosen = kept & inside
                error = np.sqrt(np.mean(off[chosen][some.candidates[chosen]] ** 2)) if chosen.any() else np.nan
                print(f" {name}: {error:.2f} ({chosen.sum()})", end="")
            print()


if __name__ == "__main__":
    main()
