"""Pairs of unrelaxed and relaxed defective crystals, from the records of finished runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase.data import chemical_symbols
from ase.formula import Formula
from ase.geometry import find_mic

from defectnet.batches import PRISTINE, structure_of
from defectnet.batches.library import Library, read_library
from defectnet.config import load_config
from defectnet.errors import InputError
from defectnet.layout import Layout
from defectnet.models.definet import NOTHING
from defectnet.progress import track
from defectnet.records import Entry, Record, RecordStore, read_manifest
from defectnet.supercells import HostPlan, Plan, Supercell, expand, read_plans

log = logging.getLogger(__name__)

SAME_CELL_A = 1e-4
"""Rounding of a relaxation within symmetry."""


@dataclass(frozen=True)
class Pair:
    """One relaxation at fixed lattice, seen from the perfect host. N sites, vacancies included.

    id            : names the pair in tables
    host          : formula of the perfect host, reduced; hosts of equal composition count as one
    numbers       : [N] what each site holds, 0 where it is vacant
    host_numbers  : [N] what it holds in the perfect host
    positions     : [N, 3] unrelaxed sites in Å, those of the host
    cell          : [3, 3] in Å, one vector per row
    displacements : [N, 3] from there to the relaxed position in Å, the nearest image, mean over atoms 0; 0 at vacancies
    superposed    : the same as the host's single defects predict it, or None where they are not known
    part          : of a published division: train, validation or test; empty if there is none
    """

    id: str
    host: str
    numbers: np.ndarray
    host_numbers: np.ndarray
    positions: np.ndarray
    cell: np.ndarray
    displacements: np.ndarray
    superposed: np.ndarray | None = None
    part: str = ""

    @property
    def atoms(self) -> np.ndarray:
        """[N] whether a site holds an atom."""
        return self.numbers != NOTHING

    @property
    def defects(self) -> np.ndarray:
        """[N] whether a site holds something else than in the host."""
        return self.numbers != self.host_numbers

    @property
    def species(self) -> set[str]:
        """Symbols of the dopants, "X" for vacancies."""
        return {chemical_symbols[z] for z in self.numbers[self.defects]}


def reduced_formula(numbers: np.ndarray) -> str:
    """Of the elements of a host, alphabetically."""
    formula = Formula.from_list([chemical_symbols[z] for z in numbers])
    return formula.reduce()[0].format("abc")


def net_displacements(start: np.ndarray, end: np.ndarray, cell: np.ndarray, atoms: np.ndarray) -> np.ndarray:
    """[N, 3] from ``start`` to the nearest image of ``end`` (both [N, 3] in Å), less the mean over ``atoms`` [N]."""
    moved = find_mic(end - start, cell)[0]
    moved[atoms] -= moved[atoms].mean(axis=0)
    moved[~atoms] = 0
    return moved


def pairs_of_runs(configs: Sequence[Path], *, superpose: bool = True) -> list[Pair]:
    """Single defects and doped supercells of every batch that some runs have finished; unconverged ones are left out.

    Parameters: configuration files of the runs; whether to superpose the single defects of doped supercells, which
    takes longest. Raises :class:`InputError` where there is nothing to learn from.
    """
    pairs = []
    for config in configs:
        settings = load_config(config)
        layout = Layout.of(settings)
        batches = sorted(path.stem for path in (layout.results / "library").glob("*.json"))
        for name in track(batches, f"reading {layout.results}"):
            pairs += _pairs_of_batch(settings.run.name, layout, name, superpose)
    if not pairs:
        raise InputError(
            f"{', '.join(map(str, configs))}: no relaxed single defects or doped supercells; run the stages library "
            "and relax first"
        )
    log.info("%d relaxations of %d host compositions", len(pairs), len({pair.host for pair in pairs}))
    return pairs


def _pairs_of_batch(run: str, layout: Layout, batch: str, superpose: bool) -> Iterator[Pair]:
    store = RecordStore(layout.records)
    plans, _ = read_plans(layout.batch("supercells", batch))
    entries = {
        stage: read_manifest(layout.batch(stage, batch)) if layout.batch(stage, batch).exists() else []
        for stage in ("library", "relax", "phonons")
    }
    hosts = {entry.host: entry for entry in entries["relax"] if entry.item == PRISTINE and entry.status == "done"}
    for host, entry in hosts.items():
        pristine = store.read("relax", host, entry.key)
        sites = expand(structure_of(pristine), plans[host].matrix)
        own = {stage: [e for e in found if e.host == host and e.status == "done"] for stage, found in entries.items()}
        for defect in own["library"]:
            record = store.read("library", host, defect.key)
            if record.header["quality"]["converged"]:
                header, name = record.header, f"{run}/{host}/{defect.item}"
                yield _pair(name, record, sites, Plan.single(sites.parent, header["site"], header["dopant"]))
        library = _library(store, pristine, plans[host], own) if superpose else None
        for doped in own["relax"]:
            if doped.item == PRISTINE:
                continue
            record = store.read("relax", host, doped.key)
            if not record.header["quality"]["converged"]:
                continue
            plan = plans[host].plan_of(doped.item)
            known = library is not None and bool(library.digest(plan))
            superposed = library.superpose.displacements(plan) if known else None
            name = f"{run}/{host}/{doped.item}"
            yield _pair(name, record, sites, plan, superposed)


def _library(store: RecordStore, pristine: Record, plan: HostPlan, own: dict[str, list[Entry]]) -> Library | None:
    """The host's single defects, where its force constants are known, too."""
    phonons = [entry for entry in own["phonons"] if entry.item == PRISTINE]
    if not phonons or not own["library"]:
        return None
    return read_library(store, pristine, store.read("phonons", plan.host_id, phonons[0].key), plan, own["library"])


def _pair(name: str, record: Record, sites: Supercell, plan: Plan, superposed: np.ndarray | None = None) -> Pair:
    """A relaxation of the atoms that ``plan`` leaves on the ``sites`` of the host."""
    arrays, host = record.arrays, sites.atoms
    if np.abs(arrays["cell"] - arrays["start_cell"]).max() > SAME_CELL_A:
        raise InputError(f"{name}: relaxed with its lattice; only runs with relaxation.doped_cell: false can be used")
    kept = plan.occupied(len(host))
    numbers = np.full(len(host), NOTHING)
    numbers[kept] = arrays["numbers"]
    start, end = host.positions.copy(), host.positions.copy()
    start[kept], end[kept] = arrays["start_positions"], arrays["positions"]
    guess = None
    if superposed is not None:
        guess = np.zeros_like(start)
        guess[kept] = superposed - superposed.mean(axis=0)
    return Pair(
        id=name,
        host=reduced_formula(host.numbers),
        numbers=numbers,
        host_numbers=host.numbers.astype(int),
        positions=start,
        cell=arrays["cell"],
        displacements=net_displacements(start, end, arrays["cell"], numbers != NOTHING),
        superposed=guess,
    )
