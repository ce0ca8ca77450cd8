"""What a start by the network saves: relaxations of held-out cells from several starts, counted."""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from ase import Atoms

from defectnet.batches.starts import HarmonicStart, OneStepStart
from defectnet.batches.worker import Job
from defectnet.config import load_config
from defectnet.definet.fit import Trained, load_trained
from defectnet.definet.hosts import FinishedHost, finished_hosts
from defectnet.definet.pairs import Pair
from defectnet.definet.parts import TESTS
from defectnet.digests import file_digest
from defectnet.errors import PhysicsError
from defectnet.files import write_atomically
from defectnet.layout import Layout
from defectnet.potentials import LazyModel
from defectnet.records import RecordStore
from defectnet.relaxation import relax_doped
from defectnet.seeds import generator
from defectnet.supercells import apply

log = logging.getLogger(__name__)

STARTS = ("cold", "hessian", "warm", "superposed")
"""From the sites of the host; the same, with the host's force constants for the first steps; where the network says,
with these force constants, and one call for the forces that it is told; where the single defects say, with the force
constants that they add up to."""

COLUMNS = ("pair", "start", "force_calls", "converged")

Guess = tuple[np.ndarray, np.ndarray]


def count(checkpoint: Path, pairs: Sequence[Pair], configs: Sequence[Path], cells: int, output: Path) -> None:
    """Relax held-out cells from all :data:`STARTS` with the potential of their run.

    Parameters: the network and pairs of the runs ``configs``, all or some of those that it was trained on; how many
    ``cells`` of each held-out part, chosen at random, with one defect and as many with several. ``output`` (CSV,
    :data:`COLUMNS`) has a line per relaxation, without a number where it failed. A file beside it that is named after
    the network gets each line as soon as it is known; what is there is not relaxed again. A guess that leads astray
    costs its own steps and those of the relaxation that follows without it.
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
        for host in finished_hosts(config):
            for name in [one for one in wanted if one.rpartition("/")[0] == host.name]:
                unrelaxed, guesses = _cell(trained, host, job.potential, name.rpartition("/")[2])
                for start, guess in guesses.items():
                    if (name, start) in done:
                        continue
                    try:
                        found = relax_doped(unrelaxed, job.potential.model, settings.relaxation, *guess()).quality
                        spent = found["relax_evaluations"] + OneStepStart.evaluations * (start == "warm")
                        line = (name, start, spent, found["converged"])
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
    defects = {name: int(pair.defects.sum()) for pair in pairs for name in pair.names}
    chosen = []
    for part in TESTS:
        for several in (False, True):
            known = defects.keys() & set(trained.parts.get(part, ()))
            names = sorted(name for name in known if (defects[name] > 1) == several)
            order = generator(0, f"force calls of {part} {several}").permutation(len(names))
            chosen += [names[k] for k in order[:cells]]
    return chosen


def _cell(
    trained: Trained, host: FinishedHost, potential: LazyModel, item: str
) -> tuple[Atoms, dict[str, Callable[[], Guess | tuple[()]]]]:
    """The unrelaxed cell of a pair, and what guesses, by name of the start, where it goes."""
    plan = host.plan_of(item)
    guesses: dict[str, Callable[[], Guess | tuple[()]]] = {
        "cold": tuple,
        "hessian": lambda: HarmonicStart(host.lattice, "").guess(plan),
        "warm": lambda: OneStepStart(trained, host.lattice, potential, "").guess(plan),
    }
    if len(plan.sites) > 1 and host.library.digest(plan):  # of a single defect, it is the answer
        guesses["superposed"] = lambda: host.library.guess(plan)
    return apply(plan, host.lattice.folding.atoms), guesses
