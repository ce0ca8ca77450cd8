"""Scores of predictions, in at.%, with intervals that take whole hosts as the independent evidence."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from defectnet.elements import MASSES, index_of

RECALL = 0.9
DRAWS = 1000
INTERVAL = (5, 95)
SEED = 20250602
LEFT_SITE_A = 0.5
"""An atom that relaxation moves farther than this has left its site."""
TRACES_AT = (0.2, 0.5)
RANKS = 200
"""Classes of presence scores that intervals are computed from; the scores themselves are exact."""


def metrics(predictions: pd.DataFrame, models: list[str]) -> dict[str, Any]:
    """Scores by kind of split, model and level of knowledge, pooled over repeats: see :func:`score`.

    ``predictions`` is the table of :func:`~defectnet.training.evaluate.evaluate`; a model without scores of presence
    is judged by its concentrations. Under ``subsets`` of each object are the same scores of a part of the entries:

    - ``fidelity``: direct and probed spectra together as ``direct``, superposed, mass_only
    - ``displacement_max_A``: relaxed crystals by the farthest way of any atom; beyond half an Å, dopants or their
      neighbours have left their sites, and the crystal is no longer the one whose concentrations are asked about
    - ``total_doping_at``: spectra with 5 at.% of dopants in all and less, and with more
    - ``species``: spectra by their number of dopants
    - ``element``: candidates that training spectra held at all, and those that none of them held
    - ``mass_ratio``: candidates by their mass, 0 of vacancies, over that of the element they replace
    - ``traces_by_mass_ratio``: candidates of one range of mass ratios that are absent or there with 0.2 to 0.5 at.%
    - ``present_at``: candidates that are there, by their concentration
    - ``concentration_at``: absent candidates together with the present ones of one range, which asks how small an
      amount can be detected; ``>=0.5`` leaves out what is present but below 0.5 at.%.

    Where all is about one dopant, direct and probed spectra are also listed by concentration, see :func:`nominal`.
    """
    found: dict[str, Any] = {}
    for (split, level), part in predictions.groupby(["split", "level"], observed=True):
        masks = [(name, kind, mask) for name, kind, mask in subsets(part) if mask.any()]
        for model in models:
            answered = part[model].notna().to_numpy()
            if not answered.any():
                continue
            presence = f"{model}_presence"
            columns = (
                part["true"].to_numpy(float),
                part[model].to_numpy(float),
                part[presence if presence in part else model].to_numpy(float),
                pd.factorize(part["host"])[0],
            )
            if (width := f"{model}_width") in part:
                columns += (part[width].to_numpy(float),)
            scores = score(*(column[answered] for column in columns))
            scores["subsets"] = {}
            for name, kind, mask in masks:
                if (mask & answered).any():
                    some = score(*(column[mask & answered] for column in columns))
                    scores["subsets"].setdefault(name, {})[kind] = some
            if part["element"].nunique() == 1:
                direct = answered & part["fidelity"].astype(str).isin(["direct", "probed"]).to_numpy()
                true, told, _, host, *width = (column[direct] for column in columns)
                scores["nominal"] = nominal(true, told, host, *width)
            found.setdefault(str(split), {}).setdefault(model, {})[str(level)] = scores
    return found


def nominal(
    true: np.ndarray, predicted: np.ndarray, host: np.ndarray, width: np.ndarray | None = None
) -> list[dict[str, Any]]:
    """Per true concentration to 0.1 at.%, of n entries as fractions: how many, and what is said of them.

    - ``true_at``, ``n``
    - ``mean_at``: mean prediction; ``mean_interval_at``, its 90 % interval under resampling of whole hosts, None for
      fewer than three
    - ``deviation_at``: standard deviation of the predictions; ``rmse_at``, of their errors
    - ``low_at``, ``high_at``: mean ends of the 90 % intervals that the model gives, no end below zero;
      ``coverage_90``, share of true concentrations in them. All None of a model that gives none
    """
    at = np.round(100 * true, 1)
    rows = []
    for value in np.unique(at):
        told = 100 * predicted[at == value]
        off = told - 100 * true[at == value]
        row = {
            "true_at": float(value),
            "n": len(told),
            "mean_at": float(told.mean()),
            "mean_interval_at": _mean_interval(told, host[at == value]),
            "deviation_at": float(told.std()),
            "rmse_at": float(np.sqrt(np.mean(off**2))),
            "low_at": None,
            "high_at": None,
            "coverage_90": None,
        }
        if width is not None:
            half = 100 * width[at == value]
            ends = {"low_at": np.maximum(told - half, 0), "high_at": told + half, "coverage_90": np.abs(off) <= half}
            row |= {name: float(values.mean()) for name, values in ends.items()}
        rows.append(row)
    return rows


def _mean_interval(values: np.ndarray, host: np.ndarray) -> list[float] | None:
    """90 % interval of the mean of n values when whole hosts are drawn anew."""
    _, member = np.unique(host, return_inverse=True)
    counts = np.bincount(member)
    if len(counts) < 3:
        return None
    weights = _draws(len(counts))
    means = weights @ np.bincount(member, values) / (weights @ counts)
    return [float(x) for x in np.percentile(means, INTERVAL)]


def subsets(part: pd.DataFrame) -> Iterator[tuple[str, str, np.ndarray]]:
    """Name of the division, class, and mask of the entries [n]; ``part`` has one level of one split."""
    fidelity = part["fidelity"].astype(str).replace("probed", "direct").to_numpy()
    for kind in ("direct", "superposed", "mass_only"):
        yield "fidelity", kind, fidelity == kind
    moved = part["displacement_max_A"].to_numpy(float)
    for kind, mask in ((f"<{LEFT_SITE_A:g}", moved < LEFT_SITE_A), (f">={LEFT_SITE_A:g}", moved >= LEFT_SITE_A)):
        yield "displacement_max_A", kind, mask
    true = 100 * part["true"].to_numpy(float)
    spectra = part.assign(at=true, present=true > 0).groupby(["repeat", "spectrum"], observed=True)
    total, species = (spectra[column].transform("sum").to_numpy() for column in ("at", "present"))
    for kind, mask in (("<=5", total <= 5 + 1e-4), (">5", total > 5 + 1e-4)):
        yield "total_doping_at", kind, mask
    for count in np.unique(species):
        yield "species", str(int(count)), species == count
    seen = part["seen"].to_numpy(bool)
    for kind, mask in (("seen", seen), ("unseen", ~seen)):
        yield "element", kind, mask
    ratio = _mass_ratios(part)

    def within(low: float, high: float) -> np.ndarray:
        # Shares of sites are rounded in single precision.
        return (true > 0) & (true >= low - 1e-4) & (true < high - 1e-4)

    for low, high in pairwise((0, 0.5, 0.8, 1.25, 2, np.inf)):
        chosen = (ratio >= low) & (ratio < high)
        yield "mass_ratio", _range(low, high), chosen
        if (traces := chosen & within(*TRACES_AT)).any():
            yield "traces_by_mass_ratio", _range(low, high), chosen & (true == 0) | traces
    for low, high in [*pairwise((0.2, 0.5, 2, 5, np.inf)), (0.5, np.inf)]:
        present = within(low, high)
        if present.any():
            yield "concentration_at", _range(low, high), (true == 0) | present
            yield "present_at", _range(low, high), present


def _range(low: float, high: float) -> str:
    if low == 0:
        return f"<{high:g}"
    return f">={low:g}" if np.isinf(high) else f"{low:g}-{high:g}"


def _mass_ratios(part: pd.DataFrame) -> np.ndarray:
    """Mass of each candidate over that of the element it replaces, the mean where there are several."""

    @cache
    def mass(symbols: str) -> float:
        return float(np.mean([MASSES[index_of(symbol)] for symbol in symbols.split(", ")]))

    new, old = (part[column].astype(str).map(mass).to_numpy() for column in ("element", "replaces"))
    return new / old


def score(
    true: np.ndarray, predicted: np.ndarray, presence: np.ndarray, host: np.ndarray, width: np.ndarray | None = None
) -> dict[str, Any]:
    """Scores of n entries: concentrations as fractions, scores of presence, whose host each entry is, half widths.

    - ``rmse_at``, ``mae_at``, ``bias_at`` (mean of predicted less true) in at.%, ``r2``: of the concentrations, absent
      candidates included
    - ``auroc``, ``average_precision``: does a higher score of presence mean that the dopant is there?
    - ``fpr_at_90_recall``: share of absent candidates at or above the score that finds 90 % of the present ones
    - ``coverage_90``: share of true concentrations within ``width`` of the predicted ones, which should be 0.9; None
      of a model that gives no intervals
    - ``intervals``: of each of the others, the 90 % interval under resampling of whole hosts (None for fewer than
      three): spectra of one host are no independent evidence

    Quantities without a definition (one class only, equal truths) are None.
    """
    _, member = np.unique(host, return_inverse=True)
    n_hosts = int(member.max()) + 1
    everything = np.zeros_like(member), np.ones((1, 1))
    found = {name: _number(values[0]) for name, values in _estimates(true, predicted, presence, *everything).items()}
    ranks = np.unique(np.quantile(presence, np.linspace(0, 1, RANKS + 1), method="lower"))
    coarse = np.searchsorted(ranks, presence, side="right")
    intervals = None
    if n_hosts >= 3:
        drawn = _estimates(true, predicted, coarse, member, _draws(n_hosts))
        defined = {name: values[np.isfinite(values)] for name, values in drawn.items() if found[name] is not None}
        intervals = {name: [float(x) for x in np.percentile(values, INTERVAL)] for name, values in defined.items()}
    return {
        **found,
        "coverage_90": None if width is None else float(np.mean(np.abs(predicted - true) <= width)),
        "intervals": intervals,
        "n": len(true),
        "n_present": int((true > 0).sum()),
        "n_hosts": n_hosts,
    }


def open_set(suspicions: pd.DataFrame) -> dict[str, Any]:
    """Does a model notice that a spectrum holds something that it is not asked about?

    ``suspicions`` has one row per question: split, model, level, host, the share ``unexplained`` of the squares of the
    doped - pristine difference, and concentration (fraction) of the dopant that was ``hidden`` from the list, 0 where
    none was. By split, model and level: ``auroc`` between questions without and with a hidden dopant, the same for
    ranges of its concentration ``at`` (at.%), ``n`` questions and ``n_hosts``.
    """
    found: dict[str, Any] = {}
    edges = (0, 0.5, 2, 5, np.inf)
    for (split, model, level), part in suspicions.groupby(["split", "model", "level"]):
        hidden, score = 100 * part["hidden"].to_numpy(), part["unexplained"].to_numpy()

        def auroc(asked: np.ndarray, hidden: np.ndarray = hidden, score: np.ndarray = score) -> float:
            return float(roc_auc_score(hidden[asked] > 0, score[asked]))

        ranges = {_range(low, high): (hidden == 0) | (hidden >= low) & (hidden < high) for low, high in pairwise(edges)}
        ranges = {name: auroc(asked) for name, asked in ranges.items() if (hidden[asked] > 0).any()}
        scores = {"auroc": auroc(hidden >= 0), "at": ranges, "n": len(part), "n_hosts": part["host"].nunique()}
        found.setdefault(split, {}).setdefault(model, {})[level] = scores
    return found


def wrong_host_auroc(fits: pd.DataFrame) -> dict[str, Any]:
    """Does a model notice that a spectrum is of another host than it is told?

    ``fits`` has one row per question: split, model, level, the share ``unexplained`` of the squares of the doped -
    pristine difference, which is what ``defectnet predict`` warns by, whether the spectrum is of a ``relaxed`` crystal,
    and whether it was asked about with pristine spectrum and responses of a ``wrong`` host. By split, model and level:
    the AUROC between right and wrong hosts, of ``all`` spectra and of the ``direct`` and probed ones, or None.
    """
    found: dict[str, Any] = {}
    for (split, model, level), part in fits.groupby(["split", "model", "level"]):
        relaxed = part[part["relaxed"]]
        told = {
            name: float(roc_auc_score(some["wrong"], some["unexplained"])) if len(some) else None
            for name, some in (("all", part), ("direct", relaxed))
        }
        found.setdefault(split, {}).setdefault(model, {})[level] = told
    return found


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


@cache
def _draws(n_hosts: int) -> np.ndarray:
    """How often each host counts [D, H] in each draw."""
    shares = np.full(n_hosts, 1 / n_hosts)
    return np.random.default_rng(SEED).multinomial(n_hosts, shares, size=DRAWS).astype(float)


def _estimates(
    true: np.ndarray, predicted: np.ndarray, presence: np.ndarray, member: np.ndarray, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Every quantity [D] for D weightings of the groups [D, H] that entries are ``member`` [n] of."""
    groups = weights.shape[1]
    t, error = 100 * true, 100 * (predicted - true)
    moments = np.ones(len(t)), error**2, np.abs(error), error, t, t**2
    sums = [np.bincount(member, values, groups) for values in moments]
    n, squares, absolutes, errors, first, second = np.array(sums) @ weights.T
    spread = second - first**2 / n
    # Present and absent entries at or above each score of presence, from the highest down.
    scores, rank = np.unique(presence, return_inverse=True)
    cell = member * len(scores) + rank
    hits, alarms = (
        (weights @ np.bincount(cell[which], minlength=groups * len(scores)).reshape(groups, -1))[:, ::-1].cumsum(axis=1)
        for which in (true > 0, true == 0)
    )
    positives, negatives = hits[:, -1], alarms[:, -1]
    gained, raised = np.diff(hits, prepend=0), np.diff(alarms, prepend=0)
    enough = (hits >= RECALL * positives[:, None] - 1e-9).argmax(axis=1)
    both = (positives > 0) & (negatives > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        ranked = {
            "auroc": (raised * (hits - gained / 2)).sum(axis=1) / (positives * negatives),
            "average_precision": (gained * hits / np.maximum(hits + alarms, 1)).sum(axis=1) / positives,
            "fpr_at_90_recall": np.take_along_axis(alarms, enough[:, None], axis=1)[:, 0] / negatives,
        }
        return {
            "rmse_at": np.sqrt(squares / n),
            "mae_at": absolutes / n,
            "bias_at": errors / n,
            "r2": np.where(spread > 1e-9 * second, 1 - squares / spread, np.nan),
            **{name: np.where(both, values, np.nan) for name, values in ranked.items()},
        }
