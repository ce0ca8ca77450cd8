"""Merging a run into its dataset, and reading it for training: seconds, memory, sizes.

    OMP_NUM_THREADS=1 .venvs/main/bin/python tests/bench/merge.py [--hosts 20] [--superposed 100] [--atoms 430]

Makes the manifests, plans and records of a finished run with random modes, eight direct spectra and ``--superposed``
others per host, and merges them with the code that `defectnet dataset` runs. Every measurement has a process of its
own, whose peak memory is printed. Files have been written just before, so that reading is from the page cache, as far
as it holds them. At full scale (--hosts 2000) the folder grows to 13 GB; it is deleted in the end.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from defectnet.batches import COMPARISON, PRISTINE, assign
from defectnet.config import Config
from defectnet.dataset.aggregate import aggregate
from defectnet.dataset.samples import load_samples
from defectnet.dataset.schema import COMPARED, Dataset
from defectnet.dopants import Candidate
from defectnet.elements import PUBLISHED_VOCABULARY
from defectnet.files import write_atomically
from defectnet.hosts.sheet import Host, read_sheet
from defectnet.layout import Layout
from defectnet.records import CHECKSUM_BYTES, Entry, Record, RecordStore, write_manifest, write_record
from defectnet.supercells import HostPlan
from defectnet.training.presets import PRESETS

SHEET = Path(__file__).parents[2] / "config" / "hosts" / "paper.tsv"
DIRECT = 8
DOPANTS = 6
SPECIES = 3
SPECTRA_PER_RECORD = 100
HEADER_LENGTH = 2000
POTENTIAL = {"name": "springs", "model": "random", "dtype": "float64", "weights": "0" * 64}


class Forge:
    """Records that differ from a template in nothing but their header, for want of time to compress each."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng = folder, np.random.default_rng(seed)
        self.templates: dict[str, tuple[bytes, bytes]] = {}

    def save(self, store: RecordStore, stage: str, entry: Entry, header: dict, arrays: Callable[[], dict]) -> Entry:
        """Write a record; ``arrays`` makes those of its kind, the item without its number."""
        kind = f"{entry.item.partition('-')[0]} {len(header.get('elements', ()))}"
        if kind not in self.templates:
            mark = "x" * (HEADER_LENGTH - len('{"mark": ""}'))
            write_record(self.folder / "template.h5", Record({"mark": mark}, arrays()))
            content = (self.folder / "template.h5").read_bytes()[:-CHECKSUM_BYTES]
            before, after = content.split(json.dumps({"mark": mark}).encode())
            self.templates[kind] = before, after
        before, after = self.templates[kind]
        text = json.dumps(header | {"status": "done", "cost": {}}).encode()
        assert len(text) <= HEADER_LENGTH
        content = before + text.ljust(HEADER_LENGTH) + after
        path = store.path(stage, entry.host, entry.key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content + hashlib.sha256(content).digest())
        return entry

    def modes(self, spectra: int, atoms: int, present: np.ndarray) -> dict[str, np.ndarray]:
        """Random modes of ``spectra`` cells; ``present`` [S, E] says which elements each cell holds."""
        modes = 3 * atoms - 3
        energies = np.sort(self.rng.choice([15.0, 40.0], (spectra, modes)) * self.rng.gamma(6, 1 / 6, (spectra, modes)))
        weights = self.rng.exponential(size=(spectra, modes, present.shape[1])) ** 2 * present[:, None]
        weights /= weights.sum(axis=2, keepdims=True)
        return {"energies_meV": energies.astype(np.float32), "weights": weights.astype(np.float32)}


def make_run(hosts: Sequence[Host], config: Config, layout: Layout, superposed: int, atoms: int) -> None:
    """A finished run on disk."""
    store, forge = RecordStore(layout.records), Forge(layout.results, seed=0)
    of = {host.id: host for host in hosts}
    for batch, members in assign(hosts, config).items():
        plans: dict[str, dict] = {}
        phonons, others = [], []
        for host in (of[member] for member in members):
            plan, direct, many = make_host(host, forge, store, superposed, atoms)
            plans[host.id] = plan.to_dict()
            phonons += direct
            others += many
        content = json.dumps({"plans": plans, "failed": {}})
        write_atomically(layout.batch("supercells", batch), content.encode())
        for stage, entries in (("library", []), ("phonons", phonons), ("superposed", others)):
            write_manifest(layout.batch(stage, batch), entries)


def make_host(
    host: Host, forge: Forge, store: RecordStore, superposed: int, atoms: int
) -> tuple[HostPlan, list[Entry], list[Entry]]:
    """Plan and entries of stages ``phonons`` and ``superposed`` of one host, whose records it writes."""
    rng = forge.rng
    own = sorted({site.specie.symbol for site in host.build()})
    dopants = sorted(rng.choice(sorted(set(PUBLISHED_VOCABULARY) - set(own)), DOPANTS, replace=False).tolist())
    candidates = tuple(Candidate(dopant, own[0], "n", "user", 1.0) for dopant in dopants)
    plan = HostPlan(host.id, np.eye(3, dtype=int), atoms, (), candidates, ())

    def entry(item: str) -> Entry:
        return Entry(host.id, item, "done", hashlib.sha256(f"{host.id} {item}".encode()).hexdigest())

    def one(elements: int) -> dict[str, np.ndarray]:
        arrays = forge.modes(1, atoms, np.ones((1, elements)))
        return {name: array[0] for name, array in arrays.items()}

    def many() -> dict[str, np.ndarray]:
        concentrations = np.zeros((SPECTRA_PER_RECORD, len(own) + DOPANTS))
        for row in concentrations:
            row[len(own) + rng.choice(DOPANTS, SPECIES, replace=False)] = rng.integers(1, 12, SPECIES) / atoms
        arrays = forge.modes(
            SPECTRA_PER_RECORD, atoms, (concentrations > 0) | (np.arange(len(own) + DOPANTS) < len(own))
        )
        lowest = arrays["energies_meV"][:, 0].astype(float)
        return arrays | {
            "concentrations": concentrations,
            "sites": rng.integers(0, atoms, (SPECTRA_PER_RECORD, 36)).astype(np.int16),
            "dopants": rng.integers(1, 56, (SPECTRA_PER_RECORD, 36)).astype(np.uint8),
            "imaginary_modes": np.zeros(SPECTRA_PER_RECORD, dtype=int),
            "energy_lowest_meV": lowest,
        }

    phonons, others = [], []
    for item in (PRISTINE, *(f"doped-{number}" for number in range(DIRECT))):
        chosen = [] if item == PRISTINE else sorted(rng.choice(dopants, SPECIES, replace=False).tolist())
        elements = own + chosen
        header = {
            "fidelity": "direct",
            "concentrations": {dopant: int(rng.integers(1, 12)) / atoms for dopant in chosen},
            "elements": elements,
            "n_atoms": atoms,
            "potential": POTENTIAL,
            "quality": {f"quantity_{number}": float(value) for number, value in enumerate(rng.random(16))},
        }
        phonons.append(forge.save(store, "phonons", entry(item), header, partial(one, len(elements))))
    compared = {name: np.arange(2) if name == "number" else rng.random(2) for name in COMPARED}
    others.append(forge.save(store, "superposed", entry(COMPARISON), {}, lambda: compared))
    header = {"fidelity": "superposed", "elements": own + dopants, "n_atoms": atoms}
    for number in range(superposed // SPECTRA_PER_RECORD):
        others.append(forge.save(store, "superposed", entry(f"superposed-{number}"), header, many))
    return plan, phonons, others


def merge(options: argparse.Namespace) -> str:
    doped, _ = aggregate(*run_of(options))
    return ", ".join(f"{count} {fidelity}" for fidelity, count in doped.items())


def load(preset: str) -> Callable[[argparse.Namespace], str]:
    def measure(options: argparse.Namespace) -> str:
        with Dataset(run_of(options)[2].dataset) as data:
            samples = load_samples(data, PRESETS[preset].axis)
        return f"{samples.doped.shape[0]} x {samples.doped.shape[1]}, mean {samples.doped.mean():.4f}"

    return measure


def random_access(options: argparse.Namespace) -> str:
    with Dataset(run_of(options)[2].dataset) as data:
        rows = np.random.default_rng(0).integers(len(data.spectra.id), size=1000)
        began = time.perf_counter()
        for row in rows:
            data.modes(row)
        return f"{1000 * (time.perf_counter() - began) / len(rows):.2f} ms per spectrum"


def verify(options: argparse.Namespace) -> str:
    with Dataset(run_of(options)[2].dataset) as data:
        return "digest agrees" if data.recomputed_digest() == data.digest else "DIGEST DIFFERS"


MEASURED: dict[str, Callable[[argparse.Namespace], str]] = {
    "merge": merge,
    "load_samples, published": load("published"),
    "load_samples, absolute": load("absolute"),
    "modes of 1000 random spectra": random_access,
    "content digest": verify,
}


def run_of(options: argparse.Namespace) -> tuple[list[Host], Config, Layout]:
    config = Config.model_validate({"hosts": {"per_batch": 8}, "spectra": {"weighting": options.weighting}})
    return read_sheet(SHEET)[: options.hosts], config, Layout(options.work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=20, help="hosts, 2000 at most")
    parser.add_argument("--superposed", type=int, default=100, help="superposed spectra per host, in hundreds")
    parser.add_argument("--atoms", type=int, default=430, help="atoms of a supercell")
    parser.add_argument("--weighting", choices=("none", "neutron"), default="none")
    parser.add_argument("--work", type=Path, help="folder of the run, on the disk to be measured")
    parser.add_argument("--only", choices=MEASURED, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        told = MEASURED[options.only](options)
        used = resource.getrusage(resource.RUSAGE_SELF)
        print(json.dumps([told, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024]))
        return
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        options.work = Path(folder)
        hosts, config, layout = run_of(options)
        began = time.perf_counter()
        make_run(hosts, config, layout, options.superposed, options.atoms)
        files = [path.stat().st_size for path in layout.records.rglob("*.h5")]
        print(
            f"{len(hosts)} hosts, {DIRECT} direct and {options.superposed} superposed spectra each, {options.atoms} "
            f"atoms: {len(files)} records of {sum(files) / 1e6:.0f} MB, made in {time.perf_counter() - began:.0f} s"
        )
        print(f"{'':32s}{'wall s':>9s}{'CPU s':>9s}{'peak MB':>9s}")
        arguments = [f"--{name}={getattr(options, name)}" for name in ("hosts", "atoms", "weighting", "work")]
        for name in MEASURED:
            began = time.perf_counter()
            done = subprocess.run(
                [sys.executable, __file__, *arguments, "--only", name], stdout=subprocess.PIPE, text=True, check=True
            )
            wall = time.perf_counter() - began
            told, seconds, peak = json.loads(done.stdout.splitlines()[-1])
            print(f"{name:32s}{wall:9.1f}{seconds:9.1f}{peak:9.0f}  {told}", flush=True)
        print(f"dataset: {layout.dataset.stat().st_size / 1e6:.0f} MB in one file")


if __name__ == "__main__":
    main()
