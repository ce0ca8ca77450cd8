"""Stage ``relax``: pristine primitive cells and doped supercells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from defectnet.batches.library import Library, read_library
from defectnet.batches.pristine import pristine_phonons, pristine_relaxation, problem_of_host
from defectnet.batches.worker import Job, enough_steps, relaxation_inputs, relaxation_record, structure_of
from defectnet.config import Config
from defectnet.digests import digest
from defectnet.hosts.sheet import Host
from defectnet.records import Entry, Record, RecordStore
from defectnet.relaxation import relax_doped
from defectnet.supercells import HostPlan, Plan, apply, expand


def relax_batch(
    hosts: Sequence[Host],
    plans: Mapping[str, HostPlan],
    config: Config,
    store: RecordStore,
    library: Sequence[Entry] = (),
) -> list[Entry]:
    """Relax the pristine cell and every doped supercell of each host; what is on record is not computed again.

    Doped supercells start displaced as the single defects of ``library`` predict, where all that they need are there.
    Arrays of a record: ``numbers`` [N], ``start_positions`` and ``positions`` [N, 3] (Å), ``start_cell`` and ``cell``
    [3, 3] (Å, rows), ``forces`` [N, 3] (eV/Å); of a doped one also ``parent`` [N], the atom of the primitive cell.
    """
    job = Job.of(config, store)
    entries = []
    for host in hosts:
        plan = plans[host.id]
        entry, pristine = pristine_relaxation(job, host)
        entries.append(entry)
        problem = problem_of_host(job, entry, pristine, plan.matrix)
        if problem:
            reason = f"pristine host: {problem}"
            entries += [Entry(host.id, f"doped-{k}", "skipped", reason=reason) for k in range(len(plan.plans))]
            continue
        known = _library_for_guesses(job, entry, pristine, plan, library)
        for number, substitutions in enumerate(plan.plans):
            entries.append(relax_one(job, "relax", f"doped-{number}", entry, pristine, plan, substitutions, known)[0])
    return entries


def _library_for_guesses(
    job: Job, relaxation: Entry, relaxed: Record, plan: HostPlan, library: Sequence[Entry]
) -> Library | None:
    """The host's single defects, if relaxations are to start from them."""
    if job.config.relaxation.start != "superposed" or not library:
        return None
    _, pristine = pristine_phonons(job, relaxation, relaxed, plan.matrix)
    return read_library(job.store, relaxed, pristine, plan, library) if pristine.done else None


def relax_one(
    job: Job,
    stage: str,
    item: str,
    relaxation: Entry,
    pristine: Record,
    plan: HostPlan,
    substitutions: Plan,
    library: Library | None,
) -> tuple[Entry, Record]:
    """One doped supercell of the host whose relaxation is ``pristine``, as an item of a stage."""
    guess_key = library.digest(substitutions) if library else ""
    key = digest(
        **relaxation_inputs(job),
        host=relaxation.key,
        expansion=plan.matrix,
        sites=substitutions.sites,
        dopants=substitutions.dopants,
        relax_cell=job.config.relaxation.doped_cell,
        guess=guess_key,
    )

    def compute(_checkpoint: Path) -> Record:
        supercell = expand(structure_of(pristine), plan.matrix)
        start = apply(substitutions, supercell.atoms)
        guess = library.superpose(substitutions) if guess_key else None
        known = (guess.displacements, guess.hessian) if guess else ()
        record = relaxation_record(job, start, relax_doped(start, job.potential.model, job.config.relaxation, *known))
        record.header["concentrations"] = substitutions.concentrations(len(start))
        record.arrays["parent"] = supercell.parent
        return record

    return job.item(stage, relaxation.host, item, key, compute, partial(enough_steps, job))
