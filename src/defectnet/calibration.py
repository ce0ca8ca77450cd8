"""Learning what things cost from the records and benchmarks of finished runs."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import brentq

from defectnet.batches import COMPARISON, PRISTINE, WIDE
from defectnet.config import Config
from defectnet.costs import (
    GUESSED_ERROR,
    GUESSED_ERROR_PROBED,
    GUESSED_SPEED,
    GUESSES,
    KINDS,
    RULE_UNITS,
    START_S,
    Costs,
    Fit,
    Size,
    Speed,
    needed_displacements,
    other_dopants,
    speed_key,
    terms,
    units,
)
from defectnet.errors import RecordError
from defectnet.hosts.sheet import Host
from defectnet.layout import RECORD_STAGES, Layout
from defectnet.records import Entry, Record, RecordStore, read_header, read_manifest, read_record
from defectnet.supercells import HostPlan, read_plans

RATES = (("forces", "products"), ("products", "forces"))
"""Kinds of evaluations, and which one tells about it where it did not occur."""


class Calibration:
    """Observations of several runs, and the costs that follow from them."""

    def __init__(self) -> None:
        self.work: dict[str, list] = defaultdict(list)
        self.speed: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
        self.start: dict[str, list[float]] = defaultdict(list)
        self.error: list[tuple[str, tuple[float], float]] = []
        self.probed: list[tuple[float, bool]] = []
        self.rules: dict[str, list[float]] = defaultdict(list)
        self.memory: dict[str, list[tuple[float, float]]] = defaultdict(list)
        self.bytes: dict[str, list[float]] = defaultdict(list)

    def observe(self, config: Config, hosts: Sequence[Host], batches: Mapping[str, Sequence[str]]) -> None:
        """Take in a run, as far as it has come."""
        layout, rows = Layout.of(config), {host.id: host for host in hosts}
        for batch in batches:
            try:
                plans, _ = read_plans(layout.batch("supercells", batch))
            except RecordError:
                continue
            sizes = {name: Size.of(rows[name], plan, config) for name, plan in plans.items() if name in rows}
            for stage in RECORD_STAGES:
                self._stage(config, layout, stage, batch, plans, sizes)
        for rule in RULE_UNITS:
            for path in sorted((layout.results / "benchmarks" / rule).glob("*.tsv")):
                self.rules[rule].append(_benchmark(path) / units(rule, config, hosts, len(batches)))

    def _stage(
        self,
        config: Config,
        layout: Layout,
        stage: str,
        batch: str,
        plans: Mapping[str, HostPlan],
        sizes: Mapping[str, Size],
    ) -> None:
        try:
            entries = [entry for entry in read_manifest(layout.batch(stage, batch)) if entry.host in sizes]
        except RecordError:
            return
        store, spent, key = RecordStore(layout.records), 0.0, ""
        for entry in entries:
            path = store.path(stage, entry.host, entry.key)
            if entry.status != "done" or not path.exists():
                continue
            header = read_header(path)
            spent += header["cost"]["wall_s"]
            if "device" in header["cost"]:
                key = speed_key(config, header["cost"]["device"])
            if entry.item == COMPARISON:
                self._comparison(entry.host, read_record(path), plans[entry.host])
            elif entry.item != WIDE:  # costs what the smaller supercell does, per atom
                self._record(config, entry, header, path.stat().st_size, plans[entry.host], sizes[entry.host])
        benchmark = layout.results / "benchmarks" / stage / f"{batch}.tsv"
        if key and stage != "superposed" and benchmark.exists():
            # More was spent than the last job took if an earlier attempt had made part of the records.
            self.start[key].append(max(_benchmark(benchmark) - spent, 0.0))

    def _comparison(self, host: str, record: Record, plan: HostPlan) -> None:
        for number, error in zip(record.arrays.get("number", ()), record.arrays["superposed_l1"], strict=True):
            if others := other_dopants(plan.plans[number], plan.n_sites):
                self.error.append((host, (others,), float(error)))

    def _record(
        self, config: Config, entry: Entry, header: Mapping[str, Any], size_bytes: int, plan: HostPlan, size: Size
    ) -> None:
        kind, evaluations = _kind(header)
        stage, wall = header["stage"], header["cost"]["wall_s"]
        others, needed, spectra, atoms = 0.0, 0.0, 1, size.n_sites
        if kind == "spectra":
            spectra = header["spectra"]
            self.work[kind].append((entry.host, terms(kind, size, config), wall / spectra))
        else:
            if kind == "defect":
                needed = size.orbits[[atom for atom, _ in plan.orbits].index(header["site"])][1]
            if kind == "relax_host":
                atoms = size.n_primitive
            if kind in ("direct", "probed"):
                others = other_dopants(plan.plan_of(entry.item), plan.n_sites)
                needed = float(needed_displacements(size, np.array(others)))
                if kind == "probed" and others:
                    self.probed.append((others, header["fidelity"] == "direct"))
            # Left out: cells of a single dopant, which are too symmetric to tell what others take.
            if kind != "direct" or others:
                self.work[kind].append((entry.host, terms(kind, size, config, needed), atoms * evaluations))
            # Left out: few evaluations, of which the first one of a job, or what is computed once besides, takes most.
            if kind in ("direct", "probed") or (kind == "defect" and "displacements" in header["quality"]):
                spent = evaluations if kind == "defect" else header["quality"]["force_evaluations"]
                key, rate = speed_key(config, header["cost"]["device"]), "products" if kind == "probed" else "forces"
                self.speed[key][rate].append((entry.host, (spent, atoms * spent), wall))
        per_spectrum = size.n_wide if kind == "spectra" else size.n_sites
        self.bytes[stage].append(size_bytes / per_spectrum / spectra)
        self.memory[stage].append((per_spectrum, header["cost"]["peak_mb"]))

    def costs(self) -> Costs:
        """What was observed; guesses stand in for kinds of work that never occurred."""
        speeds = {}
        for key, seen in self.speed.items():
            forces, products = (Fit.of(seen[rate] or seen[other], GUESSED_SPEED) for rate, other in RATES)
            start_s = float(np.median(self.start[key] or [START_S]))
            speeds[key] = Speed(forces=forces, products=products, start_s=start_s)
        error = Fit.of(self.error) if self.error else GUESSED_ERROR
        return Costs(
            work={
                kind: Fit.of(self.work[kind], GUESSES[kind].coefficients) if self.work[kind] else GUESSES[kind]
                for kind in KINDS
            },
            error=error,
            error_probed=_limit(error, self.probed) if self.probed else GUESSED_ERROR_PROBED,
            speeds=speeds,
            rules_s={rule: float(np.mean(values)) for rule, values in self.rules.items()},
            memory_mb={stage: _line_above(points) for stage, points in self.memory.items()},
            bytes={stage: float(np.mean(values)) for stage, values in self.bytes.items()},
        )


def _kind(header: Mapping[str, Any]) -> tuple[str, int]:
    """Kind of a record and its force evaluations, of which those after a probing that missed are not counted."""
    stage, item, quality = header["stage"], header["item"], header.get("quality", {})
    if "spectra" in header:
        return "spectra", 0
    if stage == "library":
        of_hessian = quality["displacements"] + 1 if "displacements" in quality else 0
        return "defect", quality["relax_evaluations"] + of_hessian
    if "fidelity" not in header:
        return "relax_host" if item == PRISTINE else "relax", quality["relax_evaluations"]
    if item == PRISTINE:
        return "phonons_host", quality["displacements"] + 1
    if "probes" in quality:
        return "probed", 2 * quality["probes"]
    return "direct", quality["force_evaluations"]


def _limit(error: Fit, probed: Sequence[tuple[float, bool]]) -> float:
    """The error of superposition that is exceeded as often as probing missed, from (concentration, missed)."""
    # Half a supercell that missed and half a one that did not are added: a few of one kind do not mean all.
    missed = (sum(miss for _, miss in probed) + 0.5) / (len(probed) + 1)
    others = np.array([other for other, _ in probed])

    def surplus(log_limit: float) -> float:
        return float(np.mean(error.above(np.exp(log_limit), others))) - missed

    return float(np.exp(brentq(surplus, -50, 50)))


def _benchmark(path: Path) -> float:
    """Wall time in s of a rule's last job, from Snakemake's benchmark file."""
    with path.open() as file:
        return float(next(csv.DictReader(file, delimiter="\t"))["s"])


def _line_above(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Base and slope of a line that no point is above."""
    x, y = np.array(points).T
    slope = max(float(np.polyfit(x, y, 1)[0]), 0.0) if np.ptp(x) > 0 else 0.0
    return float((y - slope * x).max()), slope
