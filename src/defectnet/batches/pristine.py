"""Pristine hosts, which several stages need: whichever comes first computes them, the others find the records."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from defectnet.batches.worker import (
    PRISTINE,
    Job,
    atoms_of,
    enough_steps,
    problem_of,
    relaxation_inputs,
    relaxation_record,
    structure_of,
)
from defectnet.config import Config
from defectnet.digests import digest
from defectnet.elements import VACANCY
from defectnet.hosts.sheet import Host
from defectnet.phonons.hessian import reference_phonons
from defectnet.phonons.modes import Modes
from defectnet.records import PHYSICS_VERSION, Entry, Record
from defectnet.relaxation import relax_host
from defectnet.supercells import repetition

WIDE = "pristine-wide"
"""The host in the supercell of all spectra, where that is not the one that the potential computes."""


def pristine_relaxation(job: Job, host: Host) -> tuple[Entry, Record]:
    """The relaxed primitive cell of a host, a record of stage ``relax``."""
    start, settings = atoms_of(host), job.config.relaxation
    structure = {"numbers": start.numbers, "positions": start.positions, "lattice": start.cell.array}
    key = digest(**relaxation_inputs(job), **structure, relax_cell=settings.host_cell)

    def compute(_checkpoint: Path) -> Record:
        return relaxation_record(job, start, relax_host(start, job.potential.model, settings))

    return job.item("relax", host.id, PRISTINE, key, compute, partial(enough_steps, job))


def wide_matrix(config: Config, matrix: np.ndarray, primitive: Atoms) -> np.ndarray:
    """Expansion matrix of the supercell of all spectra: the supercell ``matrix`` repeated to ``phonons.atoms_min``."""
    n_atoms = round(abs(np.linalg.det(matrix))) * len(primitive)
    return np.diag(repetition(matrix @ primitive.cell.array, n_atoms, config.phonons.atoms_min)) @ matrix


def pristine_phonons(
    job: Job, relaxation: Entry, relaxed: Record, matrix: np.ndarray, item: str = PRISTINE
) -> tuple[Entry, Record]:
    """Modes and force constants of a host's undoped supercell ``matrix``, a record of stage ``phonons``."""
    key = digest(**phonon_inputs(job), relaxation=relaxation.key, expansion=matrix)

    def compute(checkpoint: Path) -> Record:
        settings, passes = job.config.phonons, job.config.potential.atoms_per_pass
        atoms, model = structure_of(relaxed), job.potential.model
        result = reference_phonons(atoms, matrix, model, settings, passes, checkpoint)
        record = phonon_record(job, result.modes, relaxation.key, relaxed, "direct", result.quality)
        record.arrays["force_constants"] = result.hessian.compact.astype(np.float32)
        return record

    return job.item("phonons", relaxation.host, item, key, compute)


def force_constants_of(phonons: Record) -> np.ndarray:
    """Force constants [n, N, 3, 3] in eV/Å² of an undoped supercell, in double precision."""
    return phonons.arrays["force_constants"].astype(float)


def supercells_of(job: Job, relaxed: Record, matrix: np.ndarray) -> dict[str, np.ndarray]:
    """Expansion matrices of a host's undoped supercells by item: of doping, and of all spectra if that is another."""
    matrices = {PRISTINE: matrix}
    if job.config.phonons.atoms_min is not None:
        matrices[WIDE] = wide_matrix(job.config, matrix, structure_of(relaxed))
    return matrices


def problem_of_host(job: Job, relaxation: Entry, relaxed: Record, matrix: np.ndarray) -> str:
    """Why nothing can, or by ``phonons.unstable_hosts`` shall, be built on a host; empty when something can."""
    problem = problem_of(relaxed)
    if problem or job.config.phonons.unstable_hosts == "keep":
        return problem
    for item, supercell in supercells_of(job, relaxed, matrix).items():
        entry, record = pristine_phonons(job, relaxation, relaxed, supercell, item)
        if not record.done:
            return entry.reason
        if problem := instability(job, record):
            return problem
    return ""


def instability(job: Job, phonons: Record) -> str:
    """Why ``phonons.unstable_hosts`` lets nothing be built on a host with these modes; empty when something may."""
    quality = phonons.header["quality"]
    if job.config.phonons.unstable_hosts == "keep" or not quality["imaginary_modes"]:
        return ""
    lowest = quality["energy_lowest_meV"]
    return f"{quality['imaginary_modes']} imaginary modes down to {lowest:.1f} meV (phonons.unstable_hosts: skip)"


def phonon_inputs(job: Job) -> dict[str, Any]:
    """What enters the key of every phonon record."""
    return {
        "stage": "phonons",
        "physics": PHYSICS_VERSION,
        "displacement": job.config.phonons.displacement_A,
        "displacements": job.config.phonons.displacements,
        "symprec": job.config.phonons.symprec_A,
    }


def phonon_record(
    job: Job, modes: Modes, relaxation_key: str, relaxed: Record, fidelity: str, quality: dict[str, float]
) -> Record:
    """Header and arrays of a supercell's modes; the quality of its relaxation is repeated.

    ``n_atoms`` are those of the undoped supercell, which vacancies make more than there are.
    """
    concentrations = relaxed.header.get("concentrations", {})
    n_atoms = (len(modes.energies_meV) + 3) // 3
    header = {
        "status": "done",
        "relax_key": relaxation_key,
        "elements": list(modes.elements),
        "n_atoms": round(n_atoms / (1 - concentrations.get(VACANCY, 0.0))),
        "concentrations": concentrations,
        "fidelity": fidelity,
        "quality": relaxed.header["quality"] | quality,
        **job.provenance(),
    }
    return Record(header, {"energies_meV": modes.energies_meV, "weights": modes.weights.astype(np.float32)})
