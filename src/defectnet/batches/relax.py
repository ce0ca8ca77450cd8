"""Stage ``relax``: pristine primitive cells and doped supercells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from defectnet.batches.pristine import pristine_relaxation, problem_of_host
from defectnet.batches.starts import Start, start_of
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

    Doped supercells start where ``relaxation.start`` says: displaced as the single defects of ``library`` predict,
    where all that they need are there, as a network does, or at their sites, with or without the host's force
    constants.
    Arrays of a record: ``numbers`` [N], ``start_positions`` and ``positions`` [N, 3] (Å), ``start_cell`` and ``cell``
    [3, 3] (Å, rows), ``forces`` [N, 3] (eV/Å) that are left, and ``start_forces`` [N, 3] at the start positions if the
    relaxation began there; of a doped one also ``parent`` [N], the atom of the primitive cell.
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
        start = start_of(job, entry, pristine, plan, library)
        for number, substitutions in enumerate(plan.plans):
            entries.append(_doped(job, f"doped-{number}", entry, pristine, plan, substitutions, start))
    return entries


def _doped(
    job: Job,
    item: str,
    relaxation: Entry,
    pristine: Record,
    plan: HostPlan,
    substitutions: Plan,
    start: Start | None,
) -> Entry:
    """One doped supercell of the host whose relaxation is ``pristine``."""
    guess_key = start.digest(substitutions) if start else ""
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
        unrelaxed = apply(substitutions, supercell.atoms)
        guess = start.guess(substitutions) if guess_key else ()
        relaxed = relax_doped(unrelaxed, job.potential.model, job.config.relaxation, *guess)
        record = relaxation_record(job, unrelaxed, relaxed)
        if guess_key:
            record.header["quality"]["relax_evaluations"] += start.evaluations
        n_sites = len(supercell.atoms)
        record.header["concentrations"] = substitutions.concentrations(n_sites)
        record.arrays["parent"] = supercell.parent[substitutions.occupied(n_sites)]
        return record

    return job.item("relax", relaxation.host, item, key, compute, partial(enough_steps, job))[0]
