"""Stage ``library``: the single defects that the candidates of a host can make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np

from defectnet.batches.pristine import force_constants_of, pristine_phonons, pristine_relaxation, problem_of_host
from defectnet.batches.worker import Job, enough_steps, relaxation_record, structure_of
from defectnet.config import Config
from defectnet.digests import digest
from defectnet.dopants import Candidate
from defectnet.hosts.sheet import Host
from defectnet.phonons.blocks import Blocks
from defectnet.phonons.library import inequivalent_sites, single_defect
from defectnet.phonons.superposition import Defect, Superposition
from defectnet.records import PHYSICS_VERSION, Entry, Record, RecordStore
from defectnet.supercells import HostPlan, Plan


def library_batch(
    hosts: Sequence[Host], plans: Mapping[str, HostPlan], config: Config, store: RecordStore
) -> list[Entry]:
    """Every single defect that the candidates of each host can make, in the supercell of its plan.

    The pristine hosts that they are compared with are computed first, as records of stages ``relax`` and ``phonons``.
    Arrays of a record: those of a relaxation, and the fields of :class:`~defectnet.phonons.superposition.Defect` with
    ``first``, ``second`` and ``blocks`` for ΔH, none with ``superposition.force_constants: false``; addresses in 16,
    the rest in 32 bits.
    """
    job = Job.of(config, store)
    entries = []
    for host in hosts:
        plan = plans[host.id]
        relaxation, relaxed = pristine_relaxation(job, host)
        problem = problem_of_host(job, relaxation, relaxed, plan.matrix)
        if not problem:
            entry, pristine = pristine_phonons(job, relaxation, relaxed, plan.matrix)
            problem = entry.reason
        if problem:
            entries.append(Entry(host.id, "defects", "skipped", reason=f"pristine host: {problem}"))
            continue
        superposition = Superposition(structure_of(relaxed), plan.matrix, force_constants_of(pristine), [])
        for site, dopant in inequivalent_sites(superposition.primitive, plan.candidates):
            entries.append(_defect(job, entry, superposition, site, dopant))
    return entries


def _defect(job: Job, pristine: Entry, host: Superposition, site: int, dopant: str) -> Entry:
    config = job.config
    tolerance, farthest = config.superposition.tolerance_eV_per_A2, config.superposition.displacement_max_A
    limit = {} if farthest is None else {"displacement_max": farthest}
    if not config.superposition.force_constants:
        limit["force_constants"] = False
    key = digest(
        stage="library",
        physics=PHYSICS_VERSION,
        host=pristine.key,
        site=site,
        dopant=dopant,
        fmax=config.relaxation.fmax_eV_per_A,
        optimizer=config.relaxation.optimizer,
        tolerance=tolerance,
        **limit,
    )

    def compute(checkpoint: Path) -> Record:
        found = single_defect(
            host.folding,
            site,
            dopant,
            host.hessian,
            job.potential.model,
            config.relaxation,
            config.phonons,
            tolerance,
            config.potential.atoms_per_pass,
            checkpoint,
            farthest,
            config.superposition.force_constants,
        )
        record = relaxation_record(job, found.start, found.relaxed)
        defect = found.defect
        record.header.update(quality=found.quality, dopant=dopant, site=site, n_atoms=len(found.start))
        record.arrays.update(
            atoms=defect.atoms.astype(np.int16),
            displacements=defect.displacements.astype(np.float32),
            first=defect.blocks.first.astype(np.int16),
            second=defect.blocks.second.astype(np.int16),
            blocks=defect.blocks.values.astype(np.float32),
        )
        return record

    item = f"{dopant}@{host.primitive.symbols[site]}{site}"
    return job.item("library", pristine.host, item, key, compute, partial(enough_steps, job))[0]


@dataclass(frozen=True)
class Library:
    """A host with its finished single defects, and the key of each record by (site, dopant)."""

    evaluations: ClassVar[int] = 0
    superpose: Superposition
    keys: Mapping[tuple[int, str], str]

    def digest(self, plan: Plan) -> str:
        """What a superposed arrangement depends on besides the host; empty if a single defect is missing."""
        needed = self.superpose.needs(plan)
        return digest(library=sorted(self.keys[part] for part in needed)) if needed <= set(self.keys) else ""

    def guess(self, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
        """Displacements [N, 3] in Å from the sites of the host, and Hessian [3N, 3N] in eV/Å², of an arrangement."""
        superposed = self.superpose(plan)
        return superposed.displacements, superposed.hessian

    def candidates(self, plan: HostPlan) -> list[Candidate]:
        """The candidates of a host whose single defects are known on every site that they may take."""
        primitive = self.superpose.primitive
        return [c for c in plan.candidates if set(inequivalent_sites(primitive, [c])) <= set(self.keys)]


def read_library(
    store: RecordStore, relaxed: Record, pristine: Record, plan: HostPlan, library: Sequence[Entry]
) -> Library:
    """The defects of a host that are finished and converged. Raises :class:`RecordError` if a record is gone."""
    defects, keys = [], {}
    for entry in library:
        if entry.host != plan.host_id or entry.status != "done":
            continue
        record = store.read("library", entry.host, entry.key)
        if not record.header["quality"]["converged"]:
            continue
        values = {
            name: array.astype(float if array.dtype.kind == "f" else int) for name, array in record.arrays.items()
        }
        blocks = Blocks(values["first"], values["second"], values["blocks"])
        site, dopant = record.header["site"], record.header["dopant"]
        defects.append(Defect(site, dopant, values["atoms"], values["displacements"], blocks))
        keys[site, dopant] = entry.key
    return Library(Superposition(structure_of(relaxed), plan.matrix, force_constants_of(pristine), defects), keys)
