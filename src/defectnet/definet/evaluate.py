"""Errors of predicted positions on what training has not seen, beside those of simpler answers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from ase import Atoms
from ase.geometry import get_distances
from scipy.stats import spearmanr

from defectnet.definet.baselines import RadiusScaling
from defectnet.definet.fit import Trained, coordinate_mae
from defectnet.definet.force_calls import STARTS
from defectnet.definet.graphs import green_of
from defectnet.definet.pairs import Pair
from defectnet.definet.parts import TESTS
from defectnet.definet.relax import relax_in_one_step
from defectnet.errors import InputError
from defectnet.files import write_json
from defectnet.progress import track

log = logging.getLogger(__name__)

LOCAL_A = (3.0, 5.0)
"""Distances from the nearest defect within which atoms count as its surroundings."""

DEFECTS = {"all": (1, np.inf), "1": (1, 1), "2-3": (2, 3), "4-6": (4, 6), "7 or more": (7, np.inf)}
"""Groups by the number of defects in a cell."""

ANSWERS = ("coordinate", "blind", "unrelaxed", "radii", "harmonic", "superposed")
"""The network, told what is known of the cell; the same, not told the forces on it; the sites of the host;
:class:`RadiusScaling`; where these forces would carry a harmonic host; the sum of single defects."""


def evaluate(
    trained: Trained,
    pairs: Sequence[Pair],
    output: Path,
    force_calls: Mapping[str, Mapping[str, int]] = MappingProxyType({}),
) -> list[dict[str, Any]]:
    """Score a network on every part that it has not seen, and write ``output`` (JSON); returns its rows.

    A row is one of the parts :data:`~defectnet.definet.parts.TESTS`, of all pairs, of those in which the atoms stay on
    their sites, those whose forces are known, or those that can be superposed, and one group of :data:`DEFECTS`.
    ``X_mae_A`` is the mean of the pairs' mean |component| in Å, and ``X_mae_within_3A``, ``X_mae_within_5A`` of the
    atoms near a defect, for every X of :data:`ANSWERS`; null where an answer is not known. ``error_ratio`` is the mean
    length of the errors over the mean expected one, ``error_rank`` Spearman's correlation of the two over atoms. Where
    ``force_calls`` of pairs were counted, by start, there is their median ``force_calls_X`` for every X of
    :data:`~defectnet.definet.force_calls.STARTS`, and the number ``relaxed`` of these pairs.

    Raises :class:`InputError` if the pairs are not those that the network was trained on.
    """
    by_id = {name: pair for pair in pairs for name in pair.names}
    missing = [name for names in trained.parts.values() for name in names if name not in by_id]
    if missing:
        raise InputError(
            f"{len(missing)} pairs that the network was trained or is to be tested on are not in the given data, "
            f"{missing[0]} for one; give the data that it was trained on"
        )
    radii = RadiusScaling.fit([by_id[name] for name in trained.parts["train"]])
    rows = []
    for part in TESTS:
        held_out = [by_id[name] for name in trained.parts.get(part, ())]
        scores = [
            _score(trained, radii, pair)
            | {"force_calls": next((force_calls[name] for name in pair.names if name in force_calls), None)}
            for pair in track(held_out, f"evaluating {part}")
        ]
        kinds = {
            "all": scores,
            "stay": [score for score in scores if score["stays"]],
            "told": [score for score in scores if score["harmonic_mae_A"] is not None],
            "superposed": [score for score in scores if score["superposed_mae_A"] is not None],
        }
        for kind, some in kinds.items():
            for group, (fewest, most) in DEFECTS.items():
                chosen = [score for score in some if fewest <= score["defects"] <= most]
                if chosen:
                    rows.append({"split": part, "pairs": kind, "defects": group, **_mean(chosen)})
    content = {"about": trained.about, "rows": rows}
    write_json(output, content)
    return rows


def _score(trained: Trained, radii: Callable[[Pair], np.ndarray], pair: Pair) -> dict[str, Any]:
    unrelaxed = Atoms(pair.numbers, pair.positions, cell=pair.cell, pbc=True)
    relaxed = relax_in_one_step(trained, unrelaxed, pair.host_numbers, pair.lattice, pair.forces)
    found = relaxed.positions - pair.positions
    blind = relax_in_one_step(trained, unrelaxed, pair.host_numbers, pair.lattice).positions - pair.positions
    harmonic = None
    if pair.lattice is not None and pair.forces is not None:
        harmonic = (green_of(pair.lattice).numpy() @ pair.forces.ravel()).reshape(-1, 3)
        harmonic -= harmonic[pair.atoms].mean(axis=0)
    answers = found, blind, np.zeros_like(found), radii(pair), harmonic, pair.superposed
    distances = get_distances(pair.positions, pair.positions[pair.defects], cell=pair.cell, pbc=True)[1].min(axis=1)
    score: dict[str, Any] = {"defects": int(pair.defects.sum()), "stays": pair.stays}
    for name, answer in zip(ANSWERS, answers, strict=True):
        score[f"{name}_mae_A"] = None if answer is None else coordinate_mae(answer, pair)
        for reach in LOCAL_A:
            near = pair.atoms & (distances <= reach)
            unknown = answer is None or not near.any()
            score[f"{name}_mae_within_{reach:g}A"] = None if unknown else coordinate_mae(answer, pair, near)
    score["lengths"] = np.linalg.norm(found - pair.displacements, axis=1)[pair.atoms]
    score["expected"] = relaxed.error_A[pair.atoms]
    return score


def _mean(scores: list[dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {"n": len(scores)}
    for name in scores[0]:
        if "_mae_" in name:
            values = [score[name] for score in scores]
            row[name] = None if None in values else float(np.mean(values))
    lengths, expected = (np.concatenate([score[name] for score in scores]) for name in ("lengths", "expected"))
    row["error_ratio"] = float(lengths.mean() / expected.mean())
    row["error_rank"] = float(spearmanr(lengths, expected).statistic)
    counted = [score["force_calls"] for score in scores if score["force_calls"]]
    if counted:
        row["relaxed"] = len(counted)
        for start in STARTS:
            known = [calls[start] for calls in counted if start in calls]
            row[f"force_calls_{start}"] = float(np.median(known)) if len(known) == len(counted) else None
    return row
