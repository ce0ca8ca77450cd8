"""What a start by the network saves: relaxations of held-out cells from several starts, counted."""

from __future__ import annotations

import csv
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ase import Atoms

from defectnet.batches import PRISTINE
from defectnet.batches.library import read_library
from defectnet.batches.starts import OneStepStart
from defectnet.batches.worker import Job
from defectnet.config import load_config
from defectnet.definet.fit import Trained, load_trained
from defectnet.definet.pairs import Pair
from defectnet.definet.parts import TESTS
from defectnet.digests import file_digest
from defectnet.errors import PhysicsError
from defectnet.files import write_atomically
from defectnet.layout import Layout
from defectnet.progress import track
from defectnet.records import RecordStore, read_manifest
from defectnet.relaxation import relax_doped
from defectnet.seeds import generator
from defectnet.supercells import Plan, apply, read_plans

log = logging.getLogger(__name__)

STARTS = ("cold", "hessian", "warm", "superposed")
"""From the sites of the host; the same, with the host's force constants for the first steps; where the network says,
with these force constants; where the single defects say, with the force constants that they add up to."""

COLUMNS = ("pair", "start", "force_calls", "converged")

Guess = tuple[np.ndarray, np.ndarray]


def count(checkpoint: Path, pairs: Sequence[Pair], configs: Sequence[Path], cells: int, output: Path) -> None:
    """Relax held-out cells from all :data:`STARTS` with the potential of their run.

    Parameters: the network and the pairs that it was trained on, from the runs ``configs``; how many ``cells`` of each
    held-out part, chosen at random, with one defect and as many with several. ``output`` (CSV, :data:`COLUMNS`) has a
    line per relaxation, without a number where it failed. A file beside it that is named after the network gets each
    line as soon as it is known; what is there is not relaxed again. A guess that leads astray costs its own steps and
    those of the relaxation that follows without it.
    """
    trained = load_trained(checkpoint)
    known = output.with_name(f"{output.stem}-{file_digest(checkpoint)[:12]}.csv")
    if not known.exists():
        write_atomically(known, (",".join(COLUMNS) + "\n").encode())
    done = {(row["pair"], row["start"]) for row in _rows(known)}
    wanted = _sample(trained, pairs, cells)
    for config in configs:
        settings = load_config(config)
        job = Job.of(settings, RecordStore(Layout.of(settings).records))
        batches = _batches(Layout.of(settings))
        for name in track([one for one in wanted if one.split("/")[0] == settings.run.name], "relaxing"):
            unrelaxed, guesses = _cell(trained, job, batches[name.split("/")[1]], name)
            for start, guess in guesses.items():
                if (name, start) in done:
                    continue
                try:
                    found = relax_doped(unrelaxed, job.potential.model, settings.relaxation, *guess).quality
                    line = (name, start, found["relax_evaluations"], found["converged"])
                except PhysicsError as error:
                    log.warning("%s, %s: %s", name, start, error)
                    line = (name, start, "", 0)
                with known.open("a", newline="") as file:
                    csv.writer(file).writerow(line)
    write_atomically(output, known.read_bytes())


def read_counts(path: Path) -> dict[str, dict[str, int]]:
    """Force calls by pair and start, of pairs whose relaxations converged from every start that was tried."""
    counts: dict[str, dict[str, int]] = {}
    for row in _rows(path):
        converged = row["converged"] == "1"
        counts.setdefault(row["pair"], {})[row["start"]] = int(row["force_calls"]) if converged else 0
    return {pair: found for pair, found in counts.items() if all(found.values())}


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _sample(trained: Trained, pairs: Sequence[Pair], cells: int) -> list[str]:
    defects = {pair.id: int(pair.defects.sum()) for pair in pairs}
    chosen = []
    for part in TESTS:
        for several in (False, True):
            names = sorted(name for name in trained.parts.get(part, ()) if (defects[name] > 1) == several)
            order = generator(0, f"force calls of {part} {several}").permutation(len(names))
            chosen += [names[k] for k in order[:cells]]
    return chosen


def _batches(layout: Layout) -> dict[str, str]:
    """Name of the batch of each host that is relaxed."""
    return {
        entry.host: path.stem
        for path in sorted((layout.results / "relax").glob("*.json"))
        for entry in read_manifest(path)
    }


def _cell(trained: Trained, job: Job, batch: str, name: str) -> tuple[Atoms, dict[str, Guess | tuple[()]]]:
    """The unrelaxed cell of a pair, and what is guessed of it by name of the start."""
    layout = Layout.of(job.config)
    _, host, item = name.split("/")
    entries = {
        stage: {e.item: e for e in read_manifest(layout.batch(stage, batch)) if e.host == host}
        for stage in ("library", "relax", "phonons")
    }
    plan = read_plans(layout.batch("supercells", batch))[0][host]
    relaxed = job.store.read("relax", host, entries["relax"][PRISTINE].key)
    phonons = entries["phonons"][PRISTINE]
    library = read_library(
        job.store, relaxed, job.store.read("phonons", host, phonons.key), plan, list(entries["library"].values())
    )
    folding = library.superpose.folding
    single = entries["library"].get(item)
    if single:
        header = job.store.read("library", host, single.key).header
        arrangement = Plan.single(folding.parent, header["site"], header["dopant"])
    else:
        arrangement = plan.plan_of(item)
    unrelaxed = apply(arrangement, folding.atoms)
    guesses = {
        "cold": (),
        "hessian": (np.zeros_like(unrelaxed.positions), library.superpose.unchanged(arrangement)),
        "warm": OneStepStart(trained, library.superpose, phonons.key).guess(arrangement),
    }
    if not single and library.digest(arrangement):  # of a single defect, it is the answer
        guesses["superposed"] = library.guess(arrangement)
    return unrelaxed, guesses
