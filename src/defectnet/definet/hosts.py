"""Hosts of finished batches: the perfect crystal with its force constants, and what was relaxed in it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from defectnet.batches import PRISTINE, structure_of
from defectnet.batches.library import Library, read_library
from defectnet.batches.pristine import force_constants_of
from defectnet.config import load_config
from defectnet.layout import Layout
from defectnet.phonons.superposition import Superposition
from defectnet.progress import track
from defectnet.records import Entry, Record, RecordStore, read_manifest, read_record
from defectnet.supercells import HostPlan, Plan, read_plans

SAME_CELL_A = 1e-4
"""Rounding of a relaxation within symmetry."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinishedHost:
    """One host of a run.

    name     : run and host, which the names of its pairs begin with
    relaxed, phonons : records of the pristine host
    entries  : its finished single defects and doped supercells, by the names of their items
    """

    name: str
    store: RecordStore
    plan: HostPlan
    relaxed: Record
    phonons: Record
    entries: dict[str, tuple[str, Entry]]

    @cached_property
    def lattice(self) -> Superposition:
        """The undoped supercell and its force constants."""
        return Superposition(structure_of(self.relaxed), self.plan.matrix, force_constants_of(self.phonons), [])

    @cached_property
    def library(self) -> Library:
        """The same with its single defects."""
        single = [entry for stage, entry in self.entries.values() if stage == "library"]
        return read_library(self.store, self.relaxed, self.phonons, self.plan, single)

    def record(self, item: str) -> Record:
        """The relaxation of a single defect or doped supercell."""
        stage, entry = self.entries[item]
        return self.store.read(stage, entry.host, entry.key)

    def plan_of(self, item: str) -> Plan:
        """Where a single defect or doped supercell is doped with what."""
        if self.entries[item][0] == "relax":
            return self.plan.plan_of(item)
        header = self.record(item).header
        return Plan.single(self.lattice.folding.parent, header["site"], header["dopant"])


def finished_hosts(config: Path) -> Iterator[FinishedHost]:
    """The hosts of all batches of a run that have single defects, doped supercells or both."""
    settings = load_config(config)
    layout = Layout.of(settings)
    store = RecordStore(layout.records)
    stages = ("library", "relax")
    batches = sorted({path.stem for stage in stages for path in (layout.results / stage).glob("*.json")})
    for batch in track(batches, f"reading {layout.results}"):
        found: dict[str, dict[str, tuple[str, Entry]]] = {}
        for stage in stages:
            path = layout.batch(stage, batch)
            for entry in read_manifest(path) if path.exists() else []:
                if entry.status == "done" and entry.item != PRISTINE:
                    found.setdefault(entry.host, {})[entry.item] = stage, entry
        plans, _ = read_plans(layout.batch("supercells", batch))
        for host, entries in found.items():
            stage, entry = next(iter(entries.values()))
            pristine = _pristine(store, host, store.read(stage, host, entry.key), plans[host])
            if pristine is None:
                log.warning("%s: left out, its pristine records are gone", host)
            else:
                yield FinishedHost(f"{settings.run.name}/{host}", store, plans[host], *pristine, entries)


def _pristine(store: RecordStore, host: str, defect: Record, plan: HostPlan) -> tuple[Record, Record] | None:
    """Relaxation and phonons of the perfect crystal that a relaxation started from.

    Both are there before any defect is relaxed, but only the manifests of later stages name them; of several, which
    other potentials or settings made, the cell says which one it is.
    """
    for path in sorted((store.root / "phonons" / host).glob("*.h5")):
        phonons = read_record(path)
        if not phonons.done or phonons.header["item"] != PRISTINE or phonons.header["n_atoms"] != plan.n_sites:
            continue
        relaxed = store.find("relax", host, phonons.header["relax_key"])
        if relaxed is None:
            continue
        if np.abs(defect.arrays["start_cell"] - plan.matrix @ relaxed.arrays["cell"]).max() < SAME_CELL_A:
            return relaxed, phonons
    return None
