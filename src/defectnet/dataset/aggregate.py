"""Collect the finished records of a run into one dataset, and say what is missing and why."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from defectnet.batches import COMPARISON, PRISTINE, RESPONSES, WIDE, assign, modes_of
from defectnet.config import Config
from defectnet.dataset.schema import COMPARED, Dataset, HostEntry, MissingEntry, SpectrumEntry, write_dataset
from defectnet.digests import digest
from defectnet.errors import RecordError
from defectnet.files import write_atomically
from defectnet.hosts.sheet import Host
from defectnet.layout import Layout
from defectnet.phonons.modes import Modes
from defectnet.progress import track
from defectnet.records import Entry, Record, RecordStore, read_manifest
from defectnet.supercells import HostPlan, read_plans


def aggregate(hosts: Sequence[Host], config: Config, layout: Layout) -> tuple[Counter[str], list[MissingEntry]]:
    """Write the dataset and the table of missing work; returns the doped spectra by fidelity and what is missing.

    Hosts without a usable pristine spectrum are left out with all their spectra.
    Raises :class:`RecordError` for a manifest or record that is gone or damaged, for records of more than one
    potential, and when nothing at all is finished.
    """
    store = RecordStore(layout.records)
    plans: dict[str, HostPlan] = {}
    entries: list[tuple[str, Entry]] = []
    for batch in assign(hosts, config):
        plans |= read_plans(layout.batch("supercells", batch))[0]
        for stage in ("library", "phonons", "superposed"):
            entries += [(stage, entry) for entry in read_manifest(layout.batch(stage, batch))]
    usable = {entry.host for _, entry in entries if entry.item == PRISTINE and entry.status == "done"}
    finished, missing = [], []
    for stage, entry in entries:
        if entry.status == "done" and stage == "library":
            continue  # no spectrum
        if entry.status == "done" and entry.host in usable:
            finished.append((stage, entry))
        else:
            reason = entry.reason or "its host has no pristine spectrum"
            missing.append(MissingEntry(entry.host, entry.item, stage, entry.status, reason))
    write_atomically(layout.missing, _as_table(missing).encode())
    if not any(entry.item not in (PRISTINE, WIDE, COMPARISON, RESPONSES) for _, entry in finished):
        reasons = "; ".join(
            f"{count} x {reason}" for reason, count in Counter(m.reason for m in missing).most_common(3)
        )
        raise RecordError(f"{layout.dataset}: not one doped spectrum is finished: {reasons}; see {layout.missing}")
    host_entries = [_host_entry(host, plans[host.id]) for host in hosts if host.id in usable]
    spectra = _spectra(track(finished, "collecting spectra"), store)
    provenance = {"config": config.model_dump(mode="json")}
    write_dataset(
        layout.dataset,
        host_entries,
        spectra,
        config.spectra,
        config.vocabulary,
        missing,
        provenance,
        _comparisons(finished, store),
    )
    with Dataset(layout.dataset) as written:
        return Counter(np.array(written.spectra.fidelity)[written.doped].tolist()), missing


def _host_entry(host: Host, plan: HostPlan) -> HostEntry:
    structure = host.build()
    composition = structure.composition.element_composition.fractional_composition
    candidates: dict[str, str] = {}
    for candidate in plan.candidates:  # own lists may put a dopant on several sublattices
        before = candidates.get(candidate.dopant)
        candidates[candidate.dopant] = f"{before}, {candidate.replaces}" if before else candidate.replaces
    return HostEntry(host.id, host.formula, {el.symbol: float(x) for el, x in composition.items()}, candidates)


def _spectra(entries: Iterator[tuple[str, Entry]], store: RecordStore) -> Iterator[SpectrumEntry]:
    potential: dict[str, str] = {}
    potential_digest = ""
    for stage, entry in entries:
        if entry.item == COMPARISON:
            continue
        record = _record(store, stage, entry)
        # Superposed spectra come after those of their host, whose potential they have.
        if not potential:
            potential = record.header["potential"]
            potential_digest = digest(**potential)
        other = record.header.get("potential", potential)
        if other != potential:
            raise RecordError(
                f"{entry.host} {entry.item}: computed with {other}, others with {potential}; "
                "one dataset holds one potential: run the workflow again"
            )
        for row, (suffix, concentrations, modes, quality) in enumerate(_contents(record)):
            if entry.item == RESPONSES:
                fidelity, role = record.header["fidelities"][row], "response"
            else:
                fidelity, role = record.header["fidelity"], "doped" if concentrations else "pristine"
            yield SpectrumEntry(
                id=f"{entry.host}/{entry.item}{suffix}",
                host_id=entry.host,
                fidelity=fidelity,
                concentrations=concentrations,
                modes=modes,
                n_atoms=record.header["n_atoms"],
                potential=f"{potential['name']} {potential['model']}",
                potential_digest=potential_digest,
                record_digest=entry.key,
                quality=quality,
                role=role,
            )


def _comparisons(entries: Sequence[tuple[str, Entry]], store: RecordStore) -> dict[str, dict[str, np.ndarray]]:
    """The columns of every comparison of superposed with direct spectra, by host."""
    records = {entry.host: _record(store, stage, entry) for stage, entry in entries if entry.item == COMPARISON}
    return {
        host: {name: record.arrays[name] for name in COMPARED}
        for host, record in records.items()
        if len(record.arrays["superposed_l1"])
    }


def _record(store: RecordStore, stage: str, entry: Entry) -> Record:
    record = store.find(stage, entry.host, entry.key)
    if record is None:
        raise RecordError(
            f"{store.path(stage, entry.host, entry.key)}: record gone or damaged since the {stage} of "
            f"{entry.host} ran; run the workflow again, it computes this one only"
        )
    return record


def _contents(record: Record) -> Iterator[tuple[str, dict[str, float], Modes, dict[str, float]]]:
    """Suffix of the name, concentrations, modes and quality of every spectrum in a record."""
    header, arrays = record.header, record.arrays
    elements = tuple(header["elements"])
    if arrays["energies_meV"].ndim == 1:
        yield "", header["concentrations"], modes_of(record), header["quality"]
        return
    energies_meV, weights = arrays["energies_meV"], arrays["weights"]
    total = np.ones(weights.shape[1], weights.dtype) @ weights  # [S, E]; faster than any()
    counts = np.isfinite(energies_meV).sum(axis=1)  # vacancies leave fewer modes
    for row, count in enumerate(counts):
        present = np.flatnonzero(total[row])
        energies = energies_meV[row, :count]
        modes = Modes(energies, weights[row, :count][:, present], tuple(elements[column] for column in present))
        fractions = arrays["concentrations"][row]
        concentrations = {elements[column]: float(fractions[column]) for column in np.flatnonzero(fractions)}
        told = ("imaginary_modes", "energy_lowest_meV", "site_share")
        quality = {name: float(arrays[name][row]) for name in told if name in arrays}
        quality["imaginary_weight"] = quality["imaginary_modes"] / len(energies)
        yield f"-{row}", concentrations, modes, quality


def _as_table(missing: Sequence[MissingEntry]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter="\t", lineterminator="\n")
    writer.writerow(("host", "item", "stage", "status", "reason"))
    writer.writerows((m.host, m.item, m.stage, m.status, m.reason) for m in missing)
    return buffer.getvalue()
