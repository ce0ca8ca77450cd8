"""Stage ``phonons``: modes of everything that is relaxed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from defectnet.batches.library import Library, read_library
from defectnet.batches.pristine import (
    force_constants_of,
    phonon_inputs,
    phonon_record,
    pristine_phonons,
    supercells_of,
    wide_matrix,
)
from defectnet.batches.worker import PRISTINE, Job, problem_of, structure_of
from defectnet.config import Config
from defectnet.digests import digest
from defectnet.phonons.doped import doped_phonons
from defectnet.phonons.hessian import ONE_CELL
from defectnet.phonons.modes import Modes, diagonalise
from defectnet.phonons.superposition import Superposition
from defectnet.records import Entry, Record, RecordStore
from defectnet.seeds import generator
from defectnet.supercells import HostPlan, Plan, apply


def phonon_batch(
    relaxations: Sequence[Entry],
    plans: Mapping[str, HostPlan],
    config: Config,
    store: RecordStore,
    library: Sequence[Entry] = (),
) -> list[Entry]:
    """Phonon modes of every relaxed item of a batch.

    The pristine supercell and the first ``phonons.direct_per_host`` doped ones get Hessians by finite differences
    (fidelity ``direct``). The others are superposed from the defects of ``library`` and refined by probing
    (``probed``), if all their defects are there; where probing misses its tolerance they are ``direct`` as well. With
    ``phonons.atoms_min`` there is an item ``pristine-wide``, the host in the supercell that all spectra are of, and
    doped supercells are repeated to its size.

    Arrays of a record: ``energies_meV`` [M] and ``weights`` [M, E] (see :class:`~defectnet.phonons.modes.Modes`); of a
    pristine one also ``force_constants`` [n, N, 3, 3] in eV/Å², rows of the primitive cell's atoms, in single
    precision; ``positions`` [N, 3] in Å where an unstable mode was followed to another minimum. The header repeats
    the quality of the relaxation.
    """
    job = Job.of(config, store)
    entries = []
    grounds: dict[str, Ground] = {}
    for relaxation in relaxations:
        host, item = relaxation.host, relaxation.item
        relaxed = store.find("relax", host, relaxation.key) if relaxation.status == "done" else None
        problem = relaxation.reason or problem_of(relaxed)
        if problem:
            entries.append(Entry(host, item, "skipped", reason=f"relaxation: {problem}"))
        elif item == PRISTINE:
            matrices = supercells_of(job, relaxed, plans[host].matrix)
            found = [pristine_phonons(job, relaxation, relaxed, matrix, name) for name, matrix in matrices.items()]
            entries += [entry for entry, _ in found]
            key, modes = found[-1][0].key, [record for _, record in found]
            grounds[host] = Ground.of(job, relaxed, plans[host], library, key, *modes)
        else:
            number = int(item.removeprefix("doped-"))
            probed = number >= config.phonons.direct_per_host
            plan, ground = plans[host].plans[number], grounds.get(host, Ground())
            if config.phonons.atoms_min is not None and ground.wide is None:
                entries.append(Entry(host, item, "skipped", reason="pristine host: its phonons failed"))
            else:
                entries.append(_phonons_of_doped(job, relaxation, relaxed, plan, ground, probed))
    return entries


@dataclass(frozen=True)
class Ground:
    """What the doped supercells of a host build on.

    stable  : whether the host is
    library : its single defects, in the supercells that the potential computes
    wide    : the same in the supercell of all spectra, which is often the same; ``key`` is that of its phonons
    """

    stable: bool = False
    library: Library | None = None
    wide: Superposition | None = None
    key: str = ""

    @classmethod
    def of(
        cls,
        job: Job,
        relaxed: Record,
        plan: HostPlan,
        library: Sequence[Entry],
        key: str,
        pristine: Record,
        wide: Record | None = None,
    ) -> Ground:
        """From the records of a host, those of its wide supercell if there is one; if any failed, nothing is known."""
        if not pristine.done or (wide is not None and not wide.done):
            return cls()
        stable = pristine.header["quality"]["imaginary_modes"] == 0
        if not job.config.superposition.force_constants:
            library = ()  # good for relaxations, not for spectra
        read = read_library(job.store, relaxed, pristine, plan, library)
        if wide is None:
            return cls(stable, read, read.superpose, key)
        matrix = wide_matrix(job.config, plan.matrix, structure_of(relaxed))
        return cls(stable, read, read.superpose.into(matrix, force_constants_of(wide)), key)


def _phonons_of_doped(job: Job, relaxation: Entry, relaxed: Record, plan: Plan, ground: Ground, probed: bool) -> Entry:
    """Modes of one relaxed doped supercell, ``probed`` if that is wanted and possible."""
    config, settings = job.config, job.config.phonons
    library = ground.library.digest(plan) if probed and ground.library is not None else ""
    probing = {"library": library, "most": settings.probes_max, "tolerance": settings.probing_tolerance}
    # Unstable modes of a host that is unstable itself lead out of the host's structure: they stay as they are.
    follow = settings.follow_imaginary if ground.stable else 0
    inputs = {"expansion": ONE_CELL, "follow": follow, "probing": probing if library else {}}
    repeats = config.phonons.atoms_min is not None
    if repeats:
        inputs["wide"] = ground.key
    key = digest(**phonon_inputs(job), relaxation=relaxation.key, **inputs)

    def repeated(hessian: np.ndarray) -> Modes:
        smaller = ground.library.superpose
        atoms = apply(ground.wide.repeated_plan(smaller, plan), ground.wide.folding.atoms)
        total = ground.wide.repeated_hessian(smaller, plan, hessian)
        return diagonalise(total, atoms.get_masses(), list(atoms.symbols))

    def compute(checkpoint: Path) -> Record:
        result = doped_phonons(
            structure_of(relaxed),
            job.potential.model,
            config.relaxation,
            settings,
            config.potential.atoms_per_pass,
            (ground.library.superpose, plan) if library else None,
            follow,
            generator(0, key, "probes"),
            checkpoint,
            repeated if repeats else None,
        )
        record = phonon_record(job, result.modes, relaxation.key, relaxed, result.fidelity, result.quality)
        if result.quality["followed"]:
            record.arrays["positions"] = result.atoms.positions
        return record

    return job.item("phonons", relaxation.host, relaxation.item, key, compute)[0]
