"""Collect the finished records of a run into one dataset, and say what is missing and why."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence

from defectnet.batches import PRISTINE, assign
from defectnet.config import Config
from defectnet.dataset.schema import HostEntry, MissingEntry, SpectrumEntry, write_dataset
from defectnet.digests import digest
from defectnet.errors import RecordError
from defectnet.files import write_atomically
from defectnet.hosts.sheet import Host
from defectnet.layout import Layout
from defectnet.phonons.modes import Modes
from defectnet.progress import track
from defectnet.records import Entry, RecordStore, read_manifest
from defectnet.supercells import HostPlan


def aggregate(hosts: Sequence[Host], config: Config, layout: Layout) -> tuple[int, list[MissingEntry]]:
    """Write the dataset and the table of missing work; returns the number of doped spectra and what is missing.

    Hosts without a usable pristine spectrum are left out with all their spectra.
    Raises :class:`RecordError` for a manifest or record that is gone or damaged, for records of more than one
    potential, and when nothing at all is finished.
    """
    store = RecordStore(layout.records)
    plans: dict[str, HostPlan] = {}
    entries: list[Entry] = []
    for batch in assign([host.id for host in hosts], config.hosts.per_batch):
        path = layout.batch("supercells", batch)
        try:
            texts = json.loads(path.read_text())
        except FileNotFoundError:
            raise RecordError(f"{path}: no such file; run `defectnet supercells`, or the workflow") from None
        plans |= {host_id: HostPlan.from_dict(plan) for host_id, plan in texts["plans"].items()}
        entries += read_manifest(layout.batch("phonons", batch))
    usable = {entry.host for entry in entries if entry.item == PRISTINE and entry.status == "done"}
    finished = [entry for entry in entries if entry.status == "done" and entry.host in usable]
    kept = set(finished)
    missing = [
        MissingEntry(
            entry.host, entry.item, "phonons", entry.status, entry.reason or "its host has no pristine spectrum"
        )
        for entry in entries
        if entry not in kept
    ]
    write_atomically(layout.missing, _as_table(missing).encode())
    if not any(entry.item != PRISTINE for entry in finished):
        reasons = "; ".join(
            f"{count} x {reason}" for reason, count in Counter(m.reason for m in missing).most_common(3)
        )
        raise RecordError(f"{layout.dataset}: not one doped spectrum is finished: {reasons}; see {layout.missing}")
    host_entries = [_host_entry(host, plans[host.id]) for host in hosts if host.id in usable]
    spectra = _spectra(track(finished, "collecting spectra"), store)
    provenance = {"config": config.model_dump(mode="json")}
    write_dataset(layout.dataset, host_entries, spectra, config.spectra, config.hosts.vocabulary, missing, provenance)
    return sum(entry.item != PRISTINE for entry in finished), missing


def _host_entry(host: Host, plan: HostPlan) -> HostEntry:
    structure = host.build()
    composition = structure.composition.element_composition.fractional_composition
    candidates: dict[str, str] = {}
    for candidate in plan.candidates:  # own lists may put a dopant on several sublattices
        before = candidates.get(candidate.dopant)
        candidates[candidate.dopant] = f"{before}, {candidate.replaces}" if before else candidate.replaces
    return HostEntry(host.id, host.formula, {el.symbol: float(x) for el, x in composition.items()}, candidates)


def _spectra(entries: Iterator[Entry], store: RecordStore) -> Iterator[SpectrumEntry]:
    potential: dict[str, str] | None = None
    for entry in entries:
        record = store.find("phonons", entry.host, entry.key)
        if record is None:
            raise RecordError(
                f"{store.path('phonons', entry.host, entry.key)}: record gone or damaged since the phonons of "
                f"{entry.host} ran; run the workflow again, it computes this one only"
            )
        header = record.header
        potential = potential or header["potential"]
        if header["potential"] != potential:
            raise RecordError(
                f"{entry.host} {entry.item}: computed with {header['potential']}, others with {potential}; "
                "one dataset holds one potential: run the workflow again"
            )
        yield SpectrumEntry(
            id=f"{entry.host}/{entry.item}",
            host_id=entry.host,
            fidelity="direct",
            concentrations=header["concentrations"],
            modes=Modes(record.arrays["energies_meV"], record.arrays["weights"], tuple(header["elements"])),
            n_atoms=header["n_atoms"],
            potential=f"{potential['name']} {potential['model']}",
            potential_digest=digest(**potential),
            record_digest=entry.key,
            quality=header["quality"],
            pristine=entry.item == PRISTINE,
        )


def _as_table(missing: Sequence[MissingEntry]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter="\t", lineterminator="\n")
    writer.writerow(("host", "item", "stage", "status", "reason"))
    writer.writerows((m.host, m.item, m.stage, m.status, m.reason) for m in missing)
    return buffer.getvalue()
