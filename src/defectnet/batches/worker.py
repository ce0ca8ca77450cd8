"""What the stages share: find or compute one record, say what went wrong, rebuild structures from records."""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ase import Atoms

from defectnet.config import Config
from defectnet.errors import InputError, PhysicsError, RecordError
from defectnet.hosts.sheet import Host
from defectnet.interruption import uninterrupted
from defectnet.phonons.modes import Modes
from defectnet.potentials import LazyModel
from defectnet.records import PHYSICS_VERSION, Entry, Record, RecordStore
from defectnet.relaxation import Relaxed

log = logging.getLogger("defectnet.batches")

PRISTINE = "pristine"

_TROUBLE_OF_THE_MACHINE = (OSError, MemoryError, InputError, RecordError)
"""No fault of the structure: stops the job and is not remembered."""


@dataclass(frozen=True)
class Job:
    """What every item of a batch needs."""

    config: Config
    store: RecordStore
    potential: LazyModel

    @classmethod
    def of(cls, config: Config, store: RecordStore) -> Job:
        """The job of a configuration; the potential is identified, not loaded."""
        return cls(config, store, LazyModel(config.potential))

    def item(
        self,
        stage: str,
        host: str,
        item: str,
        key: str,
        compute: Callable[[Path], Record],
        still_good: Callable[[Record], bool] = lambda record: True,
        with_potential: bool = True,
    ) -> tuple[Entry, Record]:
        """The record of one item, found or computed, and its line in the manifest.

        ``compute`` gets the path of a checkpoint that it may keep; it is deleted once the record is safe.
        """
        record = self.store.find(stage, host, key)
        if record is None or not still_good(record):
            began = time.perf_counter()
            checkpoint = self.store.path(stage, host, key).with_suffix(".partial.npy")
            if with_potential:
                _ = self.potential.model  # loaded out here: if that fails, it is no structure's fault
            try:
                record = compute(checkpoint)
            except _TROUBLE_OF_THE_MACHINE:
                raise
            except Exception as error:
                if type(error).__name__ in ("OutOfMemoryError", "AcceleratorError"):  # torch's, without importing torch
                    raise InputError(
                        f"{host} {item}: the GPU gave up ({error}); where its memory is full, lower "
                        "potential.atoms_per_pass; run again: all records written so far are intact"
                    ) from error
                surprise = not isinstance(error, PhysicsError)  # then the log needs the traceback
                log.warning("%s %s: %s failed: %s", host, item, stage, error, exc_info=surprise)
                record = Record({"status": "failed", "reason": f"{type(error).__name__}: {error}", "cost": {}})
            record.header.update(stage=stage, host=host, item=item, physics=PHYSICS_VERSION)
            peak_mb = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)  # of the job so far
            record.header["cost"] |= {"wall_s": round(time.perf_counter() - began, 3), "peak_mb": peak_mb}
            with uninterrupted():
                self.store.save(stage, host, key, record)
                checkpoint.unlink(missing_ok=True)
            if record.done:
                log.info("%s %s: %s in %.1f s", host, item, stage, record.header["cost"]["wall_s"])
        entry = Entry(host, item, record.header["status"], key, record.header.get("reason", ""))
        return entry, record

    def provenance(self) -> dict[str, Any]:
        """What a header says about the potential and the machine."""
        model = self.potential.model
        return {"potential": model.identity.as_dict(), "cost": {"device": model.device, "package": model.package}}


def problem_of(relaxed: Record | None) -> str:
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


def relaxation_inputs(job: Job) -> dict[str, Any]:
    """What enters the key of every relaxation."""
    return {
        "stage": "relax",
        "physics": PHYSICS_VERSION,
        "potential": job.potential.identity.as_dict(),
        "fmax": job.config.relaxation.fmax_eV_per_A,
        "optimizer": job.config.relaxation.optimizer,
    }


def enough_steps(job: Job, record: Record) -> bool:
    """Whether to keep a relaxation: one that did not converge is tried again once more steps are allowed."""
    header, steps_max = record.header, job.config.relaxation.steps_max
    return not record.done or header["quality"]["converged"] == 1 or header["steps_max"] >= steps_max


def relaxation_record(job: Job, start: Atoms, relaxed: Relaxed) -> Record:
    """Header and arrays of a relaxation from ``start``."""
    steps_max = job.config.relaxation.steps_max
    header = {"status": "done", "steps_max": steps_max, "quality": relaxed.quality, **job.provenance()}
    arrays = {
        "numbers": relaxed.atoms.numbers,
        "start_positions": start.positions,
        "positions": relaxed.atoms.positions,
        "start_cell": start.cell.array,
        "cell": relaxed.atoms.cell.array,
        "forces": relaxed.forces,
    }
    if relaxed.start_forces is not None:
        arrays["start_forces"] = relaxed.start_forces
    return Record(header, arrays)


def atoms_of(host: Host) -> Atoms:
    """Primitive cell of a host as it stands in the sheet."""
    structure = host.build()
    return Atoms([site.specie.Z for site in structure], structure.cart_coords, cell=structure.lattice.matrix, pbc=True)


def structure_of(relaxation: Record) -> Atoms:
    """The relaxed structure of a relaxation record."""
    arrays = relaxation.arrays
    return Atoms(arrays["numbers"], arrays["positions"], cell=arrays["cell"], pbc=True)


def modes_of(record: Record) -> Modes:
    """The modes in a record of stage ``phonons``."""
    return Modes(record.arrays["energies_meV"], record.arrays["weights"], tuple(record.header["elements"]))
