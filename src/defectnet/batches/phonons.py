"""Stage ``phonons``: modes of everything that is relaxed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from defectnet.batches.library import Library, read_library
from defectnet.batches.pristine import phonon_inputs, phonon_record, pristine_phonons
from defectnet.batches.worker import PRISTINE, Job, problem_of, structure_of
from defectnet.config import Config
from defectnet.digests import digest
from defectnet.phonons.doped import doped_phonons
from defectnet.phonons.hessian import ONE_CELL
from defectnet.records import Entry, Record, RecordStore
from defectnet.seeds import generator
from defectnet.supercells import HostPlan, Plan


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
    (``probed``), if all their defects are there; where probing misses its tolerance they are ``direct`` as well.

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
            entry, pristine = pristine_phonons(job, relaxation, relaxed, plans[host].matrix)
            grounds[host] = Ground.of(store, relaxed, pristine, plans[host], library)
            entries.append(entry)
        else:
            number = int(item.removeprefix("doped-"))
            probed = number >= config.phonons.direct_per_host
            plan, ground = plans[host].plans[number], grounds.get(host, Ground())
            entries.append(phonons_of_doped(job, "phonons", relaxation, relaxed, plan, ground, probed)[0])
    return entries


@dataclass(frozen=True)
class Ground:
    """What the doped supercells of a host build on: whether it is stable, and its single defects."""

    stable: bool = False
    library: Library | None = None

    @classmethod
    def of(
        cls, store: RecordStore, relaxed: Record, pristine: Record, plan: HostPlan, library: Sequence[Entry]
    ) -> Ground:
        """From the records of a host; of one whose phonons failed nothing is known."""
        if not pristine.done:
            return cls()
        stable = pristine.header["quality"]["imaginary_modes"] == 0
        return cls(stable, read_library(store, relaxed, pristine, plan, library))


def phonons_of_doped(
    job: Job, stage: str, relaxation: Entry, relaxed: Record, plan: Plan, ground: Ground, probed: bool
) -> tuple[Entry, Record]:
    """Modes of one relaxed doped supercell, ``probed`` if that is wanted and possible, as an item of a stage."""
    config, settings = job.config, job.config.phonons
    library = ground.library.digest(plan) if probed and ground.library is not None else ""
    probing = {"library": library, "most": settings.probes_max, "tolerance": settings.probing_tolerance}
    # Unstable modes of a host that is unstable itself lead out of the host's structure: they stay as they are.
    follow = settings.follow_imaginary if ground.stable else 0
    inputs = {"expansion": ONE_CELL, "follow": follow, "probing": probing if library else {}}
    key = digest(**phonon_inputs(job), relaxation=relaxation.key, **inputs)

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
        )
        record = phonon_record(job, result.modes, relaxation.key, relaxed, result.fidelity, result.quality)
        if result.quality["followed"]:
            record.arrays["positions"] = result.atoms.positions
        return record

    return job.item(stage, relaxation.host, relaxation.item, key, compute)
