"""Batches of hosts: the unit that a job works through, one record at a time.

A host has the items ``pristine``, ``doped-0``, ``doped-1`` … . Each stage turns an item into a record whose key is
known before anything is computed: it digests the item's input and settings and the key of the stage before.
A job computes what has no record yet; an item that fails is recorded with its reason and stops no other.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from defectnet.config import Config, Relaxation
from defectnet.digests import digest
from defectnet.errors import InputError, PhysicsError, RecordError
from defectnet.hosts.sheet import Host
from defectnet.phonons.hessian import reference_phonons
from defectnet.potentials import LazyModel
from defectnet.records import PHYSICS_VERSION, Entry, Record, RecordStore
from defectnet.relaxation import Relaxed, relax_doped, relax_host
from defectnet.supercells import HostPlan, apply, expand

log = logging.getLogger(__name__)

PRISTINE = "pristine"


def assign(host_ids: Sequence[str], per_batch: int) -> dict[str, list[str]]:
    """Batches by name, in the order of the sheet, so that hosts appended to it never move earlier ones.

    One host per batch is named after it; larger batches are numbered.
    """
    if per_batch == 1:
        return {host_id: [host_id] for host_id in host_ids}
    chunks = [list(host_ids[first : first + per_batch]) for first in range(0, len(host_ids), per_batch)]
    return {f"batch-{number:05d}": chunk for number, chunk in enumerate(chunks)}


def select_batch(hosts: Sequence[Host], per_batch: int, name: str) -> list[Host]:
    """The hosts of one batch. Raises :class:`InputError` for a name that no batch has."""
    batches = assign([host.id for host in hosts], per_batch)
    if name not in batches:
        raise InputError(f"--batch: no batch {name!r}; there are {', '.join(list(batches)[:8])} …")
    wanted = set(batches[name])
    return [host for host in hosts if host.id in wanted]


_TROUBLE_OF_THE_MACHINE = (OSError, MemoryError, InputError, RecordError)
"""No fault of the structure: stops the job and is not remembered."""


@dataclass(frozen=True)
class _Worker:
    """What every item of a stage needs."""

    stage: str
    store: RecordStore
    potential: LazyModel

    def item(
        self,
        host: str,
        item: str,
        key: str,
        compute: Callable[[], Record],
        still_good: Callable[[Record], bool] = lambda record: True,
    ) -> tuple[Entry, Record]:
        """The record of one item, found or computed, and its line in the manifest."""
        record = self.store.find(self.stage, host, key)
        if record is None or not still_good(record):
            began = time.perf_counter()
            _ = self.potential.model  # loaded out here: if that fails, it is no structure's fault
            try:
                record = compute()
            except _TROUBLE_OF_THE_MACHINE:
                raise
            except Exception as error:
                if type(error).__name__ in ("OutOfMemoryError", "AcceleratorError"):  # torch's, without importing torch
                    raise InputError(
                        f"{host} {item}: the GPU gave up ({error}); where its memory is full, lower "
                        "potential.atoms_per_pass; run again: all records written so far are intact"
                    ) from error
                surprise = not isinstance(error, PhysicsError)  # then the log needs the traceback
                log.warning("%s %s: %s failed: %s", host, item, self.stage, error, exc_info=surprise)
                record = Record({"status": "failed", "reason": f"{type(error).__name__}: {error}", "cost": {}})
            record.header.update(stage=self.stage, host=host, item=item, physics=PHYSICS_VERSION)
            record.header["cost"]["wall_s"] = round(time.perf_counter() - began, 3)
            self.store.save(self.stage, host, key, record)
            if record.done:
                log.info("%s %s: %s in %.1f s", host, item, self.stage, record.header["cost"]["wall_s"])
        entry = Entry(host, item, record.header["status"], key, record.header.get("reason", ""))
        return entry, record


def relax_batch(
    hosts: Sequence[Host], plans: Mapping[str, HostPlan], config: Config, store: RecordStore
) -> list[Entry]:
    """Relax the pristine cell and every doped supercell of each host; what is on record is not computed again.

    Arrays of a record: ``numbers`` [N], ``start_positions`` and ``positions`` [N, 3] (Å), ``start_cell`` and ``cell``
    [3, 3] (Å, rows), ``forces`` [N, 3] (eV/Å); of a doped one also ``parent`` [N], the atom of the primitive cell.
    """
    worker = _Worker("relax", store, LazyModel(config.potential))
    settings = config.relaxation
    common = {
        "stage": "relax",
        "physics": PHYSICS_VERSION,
        "potential": worker.potential.identity.as_dict(),
        "fmax": settings.fmax_eV_per_A,
        "optimizer": settings.optimizer,
    }

    def enough_steps(record: Record) -> bool:
        """Whether to keep a record: one that did not converge is tried again once more steps are allowed."""
        header = record.header
        return not record.done or header["quality"]["converged"] == 1 or header["steps_max"] >= settings.steps_max

    entries = []
    for host in hosts:
        start, plan = atoms_of(host), plans[host.id]
        structure = {"numbers": start.numbers, "positions": start.positions, "lattice": start.cell.array}
        key = digest(**common, **structure, relax_cell=settings.host_cell)
        compute = partial(_relax_pristine, start, worker.potential, settings)
        entry, pristine = worker.item(host.id, PRISTINE, key, compute, enough_steps)
        entries.append(entry)
        problem = _problem(pristine)
        for number, substitutions in enumerate(plan.plans):
            item = f"doped-{number}"
            if problem:
                entries.append(Entry(host.id, item, "skipped", reason=f"pristine host: {problem}"))
                continue
            cell = {
                "host": key,
                "expansion": plan.matrix,
                "sites": substitutions.sites,
                "dopants": substitutions.dopants,
            }
            doped_key = digest(**common, **cell, relax_cell=settings.doped_cell)
            compute = partial(_relax_doped, pristine, plan, number, worker.potential, settings)
            entries.append(worker.item(host.id, item, doped_key, compute, enough_steps)[0])
    return entries


def _relax_pristine(start: Atoms, potential: LazyModel, settings: Relaxation) -> Record:
    return _relaxation_record(start, relax_host(start, potential.model, settings), potential, settings)


def _relax_doped(pristine: Record, plan: HostPlan, number: int, potential: LazyModel, settings: Relaxation) -> Record:
    supercell = expand(structure_of(pristine), plan.matrix)
    substitutions = plan.plans[number]
    start = apply(substitutions, supercell.atoms)
    record = _relaxation_record(start, relax_doped(start, potential.model, settings), potential, settings)
    record.header["concentrations"] = substitutions.concentrations(len(start))
    record.arrays["parent"] = supercell.parent
    return record


def _relaxation_record(start: Atoms, relaxed: Relaxed, potential: LazyModel, settings: Relaxation) -> Record:
    header = {"status": "done", "steps_max": settings.steps_max, "quality": relaxed.quality, **_provenance(potential)}
    arrays = {
        "numbers": relaxed.atoms.numbers,
        "start_positions": start.positions,
        "positions": relaxed.atoms.positions,
        "start_cell": start.cell.array,
        "cell": relaxed.atoms.cell.array,
        "forces": relaxed.forces,
    }
    return Record(header, arrays)


def phonon_batch(
    relaxations: Sequence[Entry], plans: Mapping[str, HostPlan], config: Config, store: RecordStore
) -> list[Entry]:
    """Phonon modes of every relaxed item of a batch, from the reference Hessian of its supercell.

    Arrays of a record: ``energies_meV`` [M] and ``weights`` [M, E] (see :class:`~defectnet.phonons.modes.Modes`); of a
    pristine one also ``force_constants`` [n, N, 3, 3] in eV/Å², rows of the primitive cell's atoms, in single
    precision. The header repeats the quality of the relaxation.
    """
    worker = _Worker("phonons", store, LazyModel(config.potential))
    entries = []
    for relaxation in relaxations:
        host, item = relaxation.host, relaxation.item
        relaxed = store.find("relax", host, relaxation.key) if relaxation.status == "done" else None
        problem = relaxation.reason or _problem(relaxed)
        if problem:
            entries.append(Entry(host, item, "skipped", reason=f"relaxation: {problem}"))
            continue
        expansion = plans[host].matrix if item == PRISTINE else np.eye(3, dtype=int)
        key = digest(
            stage="phonons",
            physics=PHYSICS_VERSION,
            relaxation=relaxation.key,
            expansion=expansion,
            settings=config.phonons.model_dump(),
        )
        partial_forces = store.path("phonons", host, key).with_suffix(".partial.npy")
        compute = partial(_phonons, relaxation, relaxed, expansion, worker.potential, config, partial_forces)
        entries.append(worker.item(host, item, key, compute)[0])
        partial_forces.unlink(missing_ok=True)
    return entries


def _phonons(
    relaxation: Entry, relaxed: Record, expansion: np.ndarray, potential: LazyModel, config: Config, checkpoint: Path
) -> Record:
    atoms = structure_of(relaxed)
    result = reference_phonons(
        atoms, expansion, potential.model, config.phonons, config.potential.atoms_per_pass, checkpoint
    )
    header = {
        "status": "done",
        "relax_key": relaxation.key,
        "elements": list(result.modes.elements),
        "n_atoms": len(result.hessian.matrix) // 3,
        "concentrations": relaxed.header.get("concentrations", {}),
        "quality": relaxed.header["quality"] | result.quality,
        **_provenance(potential),
    }
    arrays = {"energies_meV": result.modes.energies_meV, "weights": result.modes.weights.astype(np.float32)}
    if relaxation.item == PRISTINE:
        arrays["force_constants"] = result.hessian.compact.astype(np.float32)
    return Record(header, arrays)


def _provenance(potential: LazyModel) -> dict[str, Any]:
    model = potential.model
    return {"potential": model.identity.as_dict(), "cost": {"device": model.device, "package": model.package}}


def _problem(relaxed: Record | None) -> str:
    """Why nothing can be built on a relaxation; empty when something can."""
    if relaxed is None:
        return "its record is gone; run `defectnet relax` again"
    if not relaxed.done:
        return relaxed.header["reason"]
    quality = relaxed.header["quality"]
    if quality["converged"] == 0:
        return (
            f"not converged after {quality['relax_steps']} steps: {quality['residual_force_eV_per_A']:.3g} eV/Å left "
            "on an atom, or stress on a relaxing lattice; raise relaxation.steps_max"
        )
    return ""


def atoms_of(host: Host) -> Atoms:
    """Primitive cell of a host as it stands in the sheet."""
    structure = host.build()
    return Atoms([site.specie.Z for site in structure], structure.cart_coords, cell=structure.lattice.matrix, pbc=True)


def structure_of(relaxation: Record) -> Atoms:
    """The relaxed structure of a relaxation record."""
    arrays = relaxation.arrays
    return Atoms(arrays["numbers"], arrays["positions"], cell=arrays["cell"], pbc=True)
