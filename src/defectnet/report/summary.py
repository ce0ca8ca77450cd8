"""The scores of a run as one page: what its networks can do and what not, in words, and a table of all models."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from defectnet.files import write_atomically
from defectnet.report.style import LEVEL_NAMES, MODEL_NAMES, SPLIT_NAMES, name_of

COLUMNS = {
    "rmse_at": "RMSE (at.%)",
    "mae_at": "MAE (at.%)",
    "r2": "R²",
    "auroc": "AUROC",
    "average_precision": "Average precision",
    "fpr_at_90_recall": "False alarms when 90 % are found",
    "coverage_90": "Truth in 90 % intervals",
    "n": "Entries",
}

LOOK = "body{font:14px sans-serif;max-width:70em} td,th{padding:.2em .6em;text-align:right} td{white-space:nowrap}"


def write_summary(scores: dict[str, Any], path: Path) -> None:
    """Write the page. ``scores`` are those under ``splits`` in metrics.json."""
    parts = ["<!doctype html><meta charset='utf-8'><title>Summary</title>", f"<style>{LOOK}</style>"]
    parts += ["<h1>What the network can do, and what not</h1><ul>"]
    parts += [f"<li>{escape(sentence)}</li>" for sentence in limits(scores)]
    parts += ["</ul><p>In brackets 90 % intervals under resampling of whole hosts.</p>"]
    for kind in (kind for kind in SPLIT_NAMES if kind in scores):
        parts += [f"<h2>{SPLIT_NAMES[kind].capitalize()}</h2><table><tr><th></th>"]
        parts += [f"<th>{escape(name)}</th>" for name in COLUMNS.values()]
        parts += ["</tr>"]
        for model in (model for model in MODEL_NAMES if model in scores[kind]):
            for level in (level for level in LEVEL_NAMES if level in scores[kind][model]):
                cells = [_number(scores[kind][model][level][name]) for name in COLUMNS]
                parts += [f"<tr><td>{escape(name_of(model, level))}</td>", *(f"<td>{cell}</td>" for cell in cells)]
        parts += ["</table>"]
    write_atomically(path, "\n".join(parts).encode() + b"\n")


def _number(value: float | int | None) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.2f}"


def limits(scores: dict[str, Any]) -> Iterator[str]:
    """Sentences about the first network on the first kind of split, as far as there is something to say."""
    kind = next(kind for kind in SPLIT_NAMES if kind in scores)
    model = next(model for model in MODEL_NAMES if model in scores[kind])
    told, mean = scores[kind][model], scores[kind]["mean"]["none"]
    level = next(level for level in LEVEL_NAMES if level in told)
    best = told[level]
    who = f"the {MODEL_NAMES[model].lower()}"
    yield (
        f"Concentrations by {who}, {SPLIT_NAMES[kind]}: off by "
        + "; ".join(f"{_with(told[one], 'rmse_at')} at.%{_knowing(one)}" for one in LEVEL_NAMES if one in told)
        + f". Who answers the mean of training is off by {mean['rmse_at']:.2f} at.%."
    )
    parts = (
        ("total_doping_at", "<=5", "spectra with 5 at.% of dopants in all and less"),
        ("total_doping_at", ">5", "spectra with more"),
        ("fidelity", "direct", "relaxed crystals, for which all force constants were computed"),
        ("fidelity", "superposed", "spectra superposed from single defects, which most are"),
        ("displacement_max_A", ">=0.5", "relaxed crystals in which an atom has left its site"),
    )
    for division, one, name in parts:
        part, known = (score["subsets"].get(division, {}).get(one) for score in (best, mean))
        if part:
            yield f"Of {name}: {_with(part, 'rmse_at')} at.%, where the mean is off by {known['rmse_at']:.2f} at.%."
    traces = best["subsets"].get("traces_by_mass_ratio", {})
    found = {ratio: part for ratio, part in traces.items() if part["auroc"] is not None}
    if found:
        yield (
            "Dopants of 0.2 to 0.5 at.% are ranked above absent ones with a chance of "
            + "; ".join(f"{_with(part, 'auroc')} where the mass ratio is {ratio}" for ratio, part in found.items())
            + " (0.5: cannot be told from nothing)."
        )
    if best["coverage_90"] is not None:
        yield f"Of intervals that should hold the truth in 90 % of the cases, {100 * best['coverage_90']:.0f} % do."
    for other in (other for other in SPLIT_NAMES if other != kind and other in scores):
        if level in scores[other].get(model, {}):
            score = scores[other][model][level]
            reference = scores[other]["mean"]["none"]["rmse_at"]
            yield (
                f"Asked about {SPLIT_NAMES[other]}: off by {_with(score, 'rmse_at')} at.%, the mean by {reference:.2f}."
            )
    yield (
        "All spectra are computed, by a machine-learned potential, of crystals with dopants on random sites and "
        "nothing else: no charges, clusters, interstitials, surfaces or temperatures. What is said here is about such "
        "spectra; a measured one differs further from them than these from each other."
    )


def _with(score: dict[str, Any], quantity: str) -> str:
    """A score and its interval."""
    if not score["intervals"] or quantity not in score["intervals"]:
        return f"{score[quantity]:.2f}"
    low, high = score["intervals"][quantity]
    return f"{score[quantity]:.2f} ({low:.2f} to {high:.2f})"


def _knowing(level: str) -> str:
    return f" if it {LEVEL_NAMES[level]}" if LEVEL_NAMES[level] else " if it is told nothing"
