"""Stage ``superposed``: how good superposition is for each host, and the spectra it yields.

Superposed spectra may be of larger supercells than the one the single defects were computed in
(``phonons.atoms_min``), for low concentrations and less scatter between arrangements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import atomic_numbers

from defectnet.batches.phonons import Ground
from defectnet.batches.pristine import WIDE, instability
from defectnet.batches.worker import PRISTINE, Job, modes_of, problem_of
from defectnet.config import Config
from defectnet.digests import digest
from defectnet.dopants import Candidate
from defectnet.errors import InputError, PhysicsError
from defectnet.phonons.comparison import compare
from defectnet.phonons.library import inequivalent_sites
from defectnet.phonons.modes import Modes, diagonalise, stability
from defectnet.phonons.superposition import Superposition
from defectnet.progress import track
from defectnet.records import PHYSICS_VERSION, Entry, Record, RecordStore
from defectnet.seeds import generator
from defectnet.supercells import HostPlan, Plan, apply, plan_substitutions

COMPARISON = "comparison"
RESPONSES = "responses"
SPECTRA_PER_RECORD = 100


def superpose_batch(
    relaxations: Sequence[Entry],
    phonons: Sequence[Entry],
    plans: Mapping[str, HostPlan],
    config: Config,
    store: RecordStore,
    library: Sequence[Entry],
) -> list[Entry]:
    """Compare superposed with direct spectra of every host, and make the spectra that superposition is good for.

    Items of a host: ``comparison``; ``responses``, the spectra of all single substitutions, of the dopant's mass only
    and, where the library has it, of the whole defect; ``mass_only-K`` and ``superposed-K``, each up to
    :data:`SPECTRA_PER_RECORD` spectra, the superposed ones of dopings up to :func:`concentration_limit`.

    Arrays of ``comparison``, one entry per direct spectrum: the fields of
    :class:`~defectnet.phonons.comparison.Comparison`, ``total_doping`` and ``number`` of the doped cell. Arrays of
    ``superposed-K``, ``mass_only-K`` and ``responses``: ``energies_meV`` [S, M], ``weights`` [S, M, E], padded with NaN
    and 0 where vacancies leave fewer modes, ``concentrations`` [S, E], ``imaginary_modes`` and ``energy_lowest_meV``
    [S], ``sites`` and ``dopants`` (atomic numbers, 0 of a vacancy) [S, D], padded with -1 and 0. ``responses`` have
    also ``site_share`` [S], the share of the replaced element's sites that are equivalent to the substituted one.
    """
    job = Job.of(config, store)
    settings = config.superposition
    computed = {(entry.host, entry.item): entry for entry in phonons if entry.status == "done"}
    entries = []
    for relaxation in relaxations:
        host = relaxation.host
        needed = [PRISTINE] if config.phonons.atoms_min is None else [PRISTINE, WIDE]
        if relaxation.item != PRISTINE or not all((host, item) in computed for item in needed):
            continue
        relaxed, plan = store.find("relax", host, relaxation.key), plans[host]
        modes = [store.find("phonons", host, computed[host, item].key) for item in needed]
        if relaxed is None or None in modes:
            entries.append(Entry(host, COMPARISON, "skipped", reason=problem_of(None)))
            continue
        problem = next(filter(None, (instability(job, record) for record in modes)), "")
        if problem:
            entries.append(Entry(host, COMPARISON, "skipped", reason=f"pristine host: {problem}"))
            continue
        ground = Ground.of(job, relaxed, plan, library, computed[host, needed[-1]].key, *modes)
        entry, comparison = _comparison(job, plan, ground, computed)
        entries += [entry, _responses(job, plan, ground)]
        spectra = partial(_spectra, job, plan, ground)
        entries += spectra("mass_only", settings.mass_only_per_host, settings.concentration_max)
        if comparison.done:
            others = comparison.arrays["total_doping"] - 1 / plan.n_sites
            errors = comparison.arrays["superposed_l1"]
            limit = concentration_limit(errors, others, settings.concentration_max, settings.error_max)
            if limit < min(settings.concentration_max, 2 / len(ground.wide.folding)):
                entries += _too_far_off(host, settings.superposed_per_host, errors)
            else:
                entries += spectra("superposed", settings.superposed_per_host, limit)
    return entries


def _too_far_off(host: str, count: int, errors: np.ndarray) -> list[Entry]:
    """In place of spectra where not even two dopants can be superposed; of single ones there are the responses."""
    reason = f"superposition is off by {np.median(errors):.0%} of what doping changes (superposition.error_max)"
    items = range(-(-count // SPECTRA_PER_RECORD))
    return [Entry(host, f"superposed-{number}", "skipped", reason=reason) for number in items]


def concentration_limit(errors: np.ndarray, others: np.ndarray, concentration_max: float, error_max: float) -> float:
    """Highest total concentration, as a fraction, at which a host's superposed spectra are good enough.

    Parameters: ``errors`` of superposed spectra of doped cells, as shares of what doping changed, and the concentration
    of the ``others`` in each cell, besides any one dopant: a single dopant is exact, and errors grow as the square root
    of that (docs/phonons.md, *How errors grow*). Starting from ``concentration_max`` it is halved until the median
    error is expected below ``error_max``; in such steps, so that what changes errors a little changes no arrangement.
    """
    several = others > 1e-9
    growth = float(np.median(errors[several] / np.sqrt(others[several]))) if several.any() else 0.0
    limit = concentration_max
    while growth * np.sqrt(limit) > error_max:
        limit /= 2
    return limit


def _comparison(
    job: Job, plan: HostPlan, ground: Ground, computed: Mapping[tuple[str, str], Entry]
) -> tuple[Entry, Record]:
    """Superposed against direct spectra of the same doped supercells, repeated if these are."""
    library = ground.library
    numbers = [
        number
        for number in range(min(len(plan.plans), job.config.phonons.direct_per_host))
        if (plan.host_id, f"doped-{number}") in computed and library.digest(plan.plans[number])
    ]
    direct = [computed[plan.host_id, f"doped-{number}"].key for number in numbers]
    known = [library.digest(plan.plans[number]) for number in numbers]
    spectra = job.config.spectra
    settings = spectra.model_dump(exclude={"weighting"})
    key = digest(physics=PHYSICS_VERSION, direct=direct, library=known, spectra=settings)

    def compute(_checkpoint: Path) -> Record:
        rows = []
        for number, phonon_key in zip(numbers, direct, strict=True):
            record = job.store.read("phonons", plan.host_id, phonon_key)
            relaxed = job.store.read("relax", plan.host_id, record.header["relax_key"])
            positions = record.arrays.get("positions", relaxed.arrays["positions"])
            doped = ground.wide.repeated_plan(library.superpose, plan.plans[number])
            positions = ground.wide.repeated_positions(library.superpose, plan.plans[number], positions)
            row = compare(ground.wide, doped, modes_of(record), positions, spectra)
            rows.append({"number": number, "total_doping": len(plan.plans[number].sites) / plan.n_sites, **vars(row)})
        names = rows[0] if rows else ("superposed_l1", "total_doping")
        return Record({"status": "done", "cost": {}}, {name: np.array([row[name] for row in rows]) for name in names})

    return job.item("superposed", plan.host_id, COMPARISON, key, compute, with_potential=False)


def _draw(
    job: Job, plan: HostPlan, symbols: Sequence[str], candidates: Sequence[Candidate], limit: float, number: int
) -> Plan:
    """Arrangement ``number`` of a host with a total concentration up to ``limit``.

    The same for every fidelity. Raises :class:`PhysicsError` where none fits.
    """
    settings = job.config.supercells.model_copy(update={"concentration_max": limit})
    rng = generator(job.config.run.seed, plan.host_id, "superposed", str(number))
    try:
        return plan_substitutions(symbols, candidates, settings, rng)
    except InputError as error:  # this host's trouble only
        raise PhysicsError(str(error)) from None


def _inputs(ground: Ground, superposed: bool) -> dict[str, Any]:
    """What the key of every record of spectra depends on."""
    return {
        "physics": PHYSICS_VERSION,
        "host": ground.key,
        "library": sorted(ground.library.keys.values()) if superposed else [],
    }


def _modes(plan: Plan, fidelity: str, wide: Superposition) -> Modes:
    """Modes of one arrangement, superposed or of changed masses only."""
    hessian = wide(plan).hessian if fidelity == "superposed" else wide.unchanged(plan)
    doped = apply(plan, wide.folding.atoms)
    return diagonalise(hessian, doped.get_masses(), list(doped.symbols))


def _responses(job: Job, plan: HostPlan, ground: Ground) -> Entry:
    """Spectra of one substitution each, from which follows what a dopant does to the host's spectrum."""
    library, wide = ground.library, ground.wide
    sites, parents = wide.group.sites, wide.folding.parent
    singles = inequivalent_sites(wide.primitive, plan.candidates)
    rows = [("mass_only", *single) for single in singles]
    rows += [("superposed", *single) for single in singles if single in library.keys]
    key = digest(fidelity=RESPONSES, singles=[[site, dopant] for site, dopant in singles], **_inputs(ground, True))

    def compute(_checkpoint: Path) -> Record:
        plans, fidelities, shares = [], [], []
        for fidelity, site, dopant in rows:
            plans.append(Plan.single(parents, site, dopant))
            fidelities.append(fidelity)
            same_element = wide.primitive.numbers == wide.primitive.numbers[site]
            shares.append(float(np.mean(sites[same_element] == site)))
        told = track(list(zip(plans, fidelities, strict=True)), f"responses of {plan.host_id}")
        modes = [_modes(one, fidelity, wide) for one, fidelity in told]
        record = _many(modes, plans, len(parents), "mass_only")
        record.header["fidelities"] = fidelities
        record.arrays["site_share"] = np.array(shares)
        return record

    return job.item("superposed", plan.host_id, RESPONSES, key, compute, with_potential=False)[0]


def _spectra(job: Job, plan: HostPlan, ground: Ground, fidelity: str, count: int, limit: float) -> list[Entry]:
    """``count`` spectra of random arrangements, superposed or of changed masses only, in records of many.

    Total concentrations go up to ``limit``.
    """
    wide = ground.wide
    candidates = ground.library.candidates(plan) if fidelity == "superposed" else list(plan.candidates)
    if not candidates:
        return []
    config, symbols = job.config, list(wide.folding.atoms.symbols)
    inputs = {
        "fidelity": fidelity,
        "candidates": [[candidate.dopant, candidate.replaces] for candidate in candidates],
        "supercells": config.supercells.model_dump(include={"species_min", "species_max", "concentration_min"}),
        "concentration_max": limit,
        "seed": config.run.seed,
        **_inputs(ground, fidelity == "superposed"),
    }
    entries = []
    for first in range(0, count, SPECTRA_PER_RECORD):
        numbers = range(first, min(first + SPECTRA_PER_RECORD, count))

        def compute(_checkpoint: Path, numbers: range = numbers) -> Record:
            plans = [_draw(job, plan, symbols, candidates, limit, number) for number in numbers]
            modes = [_modes(one, fidelity, wide) for one in track(plans, f"{fidelity} spectra of {plan.host_id}")]
            return _many(modes, plans, len(symbols), fidelity)

        key = digest(**inputs, first=numbers.start, last=numbers.stop)
        item = f"{fidelity}-{first // SPECTRA_PER_RECORD}"
        entries.append(job.item("superposed", plan.host_id, item, key, compute, with_potential=False)[0])
    return entries


def _many(modes: Sequence[Modes], plans: Sequence[Plan], n_atoms: int, fidelity: str) -> Record:
    """One record of several spectra of a host; the columns of ``weights`` are all elements and dopants of any."""
    elements = sorted({element for one in modes for element in one.elements} | {d for p in plans for d in p.dopants})
    longest = max(len(one.energies_meV) for one in modes)
    energies = np.full((len(modes), longest), np.nan, np.float32)
    weights = np.zeros((len(modes), longest, len(elements)), np.float32)
    concentrations = np.zeros((len(modes), len(elements)))
    most = max(len(plan.sites) for plan in plans)
    sites, dopants = np.full((len(plans), most), -1, np.int16), np.zeros((len(plans), most), np.uint8)
    for row, (one, plan) in enumerate(zip(modes, plans, strict=True)):
        energies[row, : len(one.energies_meV)] = one.energies_meV
        columns = [elements.index(element) for element in one.elements]
        weights[row, : len(one.energies_meV)][:, columns] = one.weights
        for dopant, fraction in plan.concentrations(n_atoms).items():
            concentrations[row, elements.index(dopant)] = fraction
        sites[row, : len(plan.sites)] = plan.sites
        dopants[row, : len(plan.sites)] = [atomic_numbers.get(dopant, 0) for dopant in plan.dopants]
    quality = [stability(one) for one in modes]
    arrays = {
        "energies_meV": energies,
        "weights": weights,
        "concentrations": concentrations,
        "sites": sites,
        "dopants": dopants,
        **{name: np.array([row[name] for row in quality]) for name in ("imaginary_modes", "energy_lowest_meV")},
    }
    header = {"status": "done", "fidelity": fidelity, "spectra": len(plans), "elements": elements, "n_atoms": n_atoms}
    return Record(header | {"cost": {}}, arrays)
