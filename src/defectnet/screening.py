"""Candidates that are no substitutional dopants: their single defects are unstable, or atoms leave their sites.

Recommenders know ions, not crystals. Where a single dopant drives itself or a neighbour off its site, a crystal that
holds several of them is not the one that was planned, and its spectrum is no sum of anything.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from defectnet.errors import InputError
from defectnet.files import write_atomically
from defectnet.records import Entry, RecordStore
from defectnet.supercells import HostPlan

STAYS_A = 0.3
"""Atoms that move no farther have kept their sites (docs/phonons.md)."""


@dataclass(frozen=True)
class Screened:
    """A candidate and the worst of its single defects.

    problem              : why it is dropped; empty if it is kept
    displacement_max_A   : farthest way of an atom; NaN where a defect was not computed
    energy_lowest_meV    : of the modes, negative if imaginary; NaN likewise
    """

    host: str
    replaces: str
    dopant: str
    problem: str
    displacement_max_A: float
    energy_lowest_meV: float


def screen(
    plans: Mapping[str, HostPlan], library: Iterable[Entry], store: RecordStore, displacement_max_A: float
) -> list[Screened]:
    """Judge every candidate of each host whose single defects are on record.

    Parameters: ``plans`` by host; ``library``, entries of that stage; the largest displacement of an atom that is
    accepted. A candidate is dropped if any of its defects failed, is unstable, or moves an atom farther.
    """
    entries = {(entry.host, entry.item): entry for entry in library}
    rows = []
    for host, plan in plans.items():
        for candidate in plan.candidates:
            items = [
                f"{candidate.dopant}@{symbol}{site}" for site, symbol in plan.orbits if symbol == candidate.replaces
            ]
            found = [entries[host, item] for item in items if (host, item) in entries]
            if len(found) < len(items):
                continue  # not computed yet: nothing is known
            problems, moved, lowest = [], [], []
            for entry in found:
                if entry.status != "done":
                    problems.append(f"failed: {entry.reason}")
                    continue
                quality = store.read("library", host, entry.key).header["quality"]
                moved.append(quality["displacement_max_A"])
                lowest.append(quality.get("energy_lowest_meV", float("nan")))  # none without force constants
                if not quality["converged"]:
                    problems.append("not converged")
                if quality.get("imaginary_modes"):
                    problems.append("unstable")
                if moved[-1] > displacement_max_A:
                    problems.append(f"moves an atom by more than {displacement_max_A:g} Å")
            nan = float("nan")
            worst = (max(moved), min(lowest)) if len(moved) == len(found) else (nan, nan)
            problem = "; ".join(dict.fromkeys(problems))
            rows.append(Screened(host, candidate.replaces, candidate.dopant, problem, *worst))
    return rows


COLUMNS = tuple(field.name for field in fields(Screened))


def write_screened(path: Path, rows: Sequence[Screened], comment: str) -> None:
    """Write a table, one candidate per line, tab-separated, below a line of comment."""
    lines = [f"# {comment}", "\t".join(COLUMNS)]
    for row in rows:
        values = asdict(row) | {name: f"{getattr(row, name):.4g}" for name in COLUMNS[-2:]}
        lines.append("\t".join(" ".join(str(values[name]).split()) for name in COLUMNS))
    write_atomically(path, ("\n".join(lines) + "\n").encode())


def read_dropped(path: Path) -> dict[str, set[tuple[str, str]]]:
    """By host, the candidates (dopant, replaced element) that a table drops.

    Raises :class:`InputError` for a file that is no such table.
    """
    try:
        lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    except OSError as error:
        raise InputError(f"dopants.screened: {path}: {error.strerror}; make it with `defectnet screen`") from None
    rows = list(csv.DictReader(lines, delimiter="\t"))
    if not lines or tuple(lines[0].split("\t")) != COLUMNS or any(None in row.values() for row in rows):
        raise InputError(f"dopants.screened: {path}: no table of {', '.join(COLUMNS)}; make it with `defectnet screen`")
    dropped: dict[str, set[tuple[str, str]]] = {}
    for row in rows:
        if row["problem"]:
            dropped.setdefault(row["host"], set()).add((row["dopant"], row["replaces"]))
    return dropped
