"""How good the models are: predictions on held-out spectra, of networks and baselines alike, and their scores."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd

from defectnet.dataset.samples import Axis, Responses, Samples, load_responses, load_samples
from defectnet.dataset.schema import Dataset, HostTable, SpectrumTable
from defectnet.dataset.splits import host_groups, without_unseen
from defectnet.elements import SYMBOLS
from defectnet.errors import InputError, RecordError
from defectnet.files import write_atomically, write_json
from defectnet.models.baselines import BASELINE_AXIS, BASELINES, Estimate
from defectnet.models.defectnet import count_parameters
from defectnet.models.response import LEVELS
from defectnet.training.fit import PARTS, Checkpoint, load_checkpoint
from defectnet.training.metrics import metrics, open_set, wrong_host_auroc

POTENTIAL = "potential"
"""Split that asks about unseen hosts by another potential than training knows."""


class Predictor(Protocol):
    """A trained network or a baseline: what it sees, at which levels of knowledge its answers differ, its answers."""

    axis: Axis
    levels: tuple[str, ...]

    def predict(self, samples: Samples, responses: Responses, level: str) -> Estimate:
        """Answers about all candidates of ``samples``."""


class Network:
    """The networks of a checkpoint as a :class:`Predictor`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.axis, self.levels = checkpoint, checkpoint.axis, checkpoint.levels

    def predict(self, samples: Samples, responses: Responses, level: str) -> Estimate:
        """See :class:`Predictor`."""
        told = self.checkpoint.predict(samples, responses, level)
        if level not in self.checkpoint.intervals:
            return Estimate(told.concentration, told.concentration)
        width = self.checkpoint.intervals[level].width(told.error)
        return Estimate(told.concentration, told.presence, width, told.unexplained)


def evaluate(
    dataset: Path,
    checkpoints: Sequence[Path],
    output_metrics: Path,
    output_predictions: Path,
    other_potential: Path | None = None,
) -> None:
    """Predict the test part of every checkpoint of ``train`` and score the predictions.

    The mask of a test spectrum is the full candidate list of its host, always; the baselines learn from the training
    part of the same split. Predictions (CSV, compressed by gzip) have one line per spectrum, element of the mask, run
    and level of knowledge: spectrum, host, formula, fidelity, displacement_max_A (farthest way of an atom in the
    relaxation, empty of spectra that are not of a relaxed crystal), element, replaces, seen (whether a training
    spectrum holds the element), true, split, repeat, level, and by model concentrations as fractions, scores of
    presence (``<model>_presence``) where these are not the same, and half widths of 90 % intervals (``<model>_width``)
    where it gives any; empty where a model does not answer at a level. Metrics (JSON): ``splits`` as
    :func:`~defectnet.training.metrics.metrics` describes, ``open_set`` as
    :func:`~defectnet.training.metrics.open_set` does, ``wrong_host_auroc`` as
    :func:`~defectnet.training.metrics.wrong_host_auroc` does, ``dataset_digest``, and the number of ``parameters`` of
    each network. For ``open_set`` every test spectrum is asked about a second time without one of its dopants, for
    ``wrong_host_auroc`` as one of another host.

    Split ``potential`` asks networks of the host split, and baselines of its training part, about the spectra that the
    dataset ``other_potential`` has of their test hosts, with what ``dataset`` knows of these.

    Raises :class:`RecordError` when a network was trained on another dataset or a file is damaged, and
    :class:`InputError` when ``other_potential`` does not fit.
    """
    frames: list[pd.DataFrame] = []
    suspicions: list[pd.DataFrame] = []
    fits: list[pd.DataFrame] = []
    parameters: dict[str, int] = {}
    with ExitStack() as files:
        data = files.enter_context(Dataset(dataset))
        other = None if other_potential is None else files.enter_context(Dataset(other_potential))
        seen = cache(partial(load_samples, data))
        elsewhere = cache(partial(_by_other_potential, data, other))
        # Networks that are told responses see the axis of the baselines.
        samples, responses = seen(BASELINE_AXIS), load_responses(data, BASELINE_AXIS)
        groups = host_groups(data)[samples.host]
        # Without any single defect, level library is that of the masses.
        levels = LEVELS if responses.knows_library.any() else LEVELS[1:]
        runs: dict[tuple[str, int], dict[str, Checkpoint]] = {}
        for path in checkpoints:
            about = (checkpoint := load_checkpoint(path)).about
            if about["dataset_digest"] != data.digest:
                raise RecordError(f"{path}: trained on another dataset than {dataset}; rerun `defectnet train`")
            runs.setdefault((about["split"], about["repeat"]), {})[about["preset"]] = checkpoint
            parameters[about["preset"]] = sum(map(count_parameters, checkpoint.models))
        for (kind, repeat), networks in runs.items():
            # The division is the same for all networks.
            parts = next(iter(networks.values())).parts
            training, test = (np.flatnonzero(parts == PARTS.index(part)) for part in ("train", "test"))
            known = without_unseen(samples[training]) if kind == "element" else samples[training]
            predictors: dict[str, Predictor] = {preset: Network(one) for preset, one in networks.items()}
            predictors |= {name: baseline(known, responses) for name, baseline in BASELINES.items()}
            hidden, without = _hide_one(samples[test], seed=repeat)
            strange = _of_another_host(groups, test, seed=repeat)
            for level in levels:
                able = {name: one for name, one in predictors.items() if level in one.levels}
                answers = {name: one.predict(seen(one.axis)[test], responses, level) for name, one in able.items()}
                table = _table(data.spectra, data.hosts, samples[test], known, answers)
                frames.append(table.assign(split=kind, repeat=repeat, level=level))
                for name, predictor in able.items():
                    if (before := answers[name].unexplained) is None:
                        continue
                    asked = seen(predictor.axis)[test]
                    of = {"split": kind, "model": name, "level": level, "host": samples.host[test]}
                    after = predictor.predict(replace(asked, candidates=without), responses, level).unexplained
                    score = {"hidden": 0.0, "unexplained": before}, {"hidden": hidden, "unexplained": after}
                    suspicions += [pd.DataFrame(of | one) for one in score]
                    if strange is not None:
                        told = _told_of(asked, seen(predictor.axis)[strange])
                        after = predictor.predict(told, responses, level).unexplained
                        score = {"wrong": False, "unexplained": before}, {"wrong": True, "unexplained": after}
                        fits += [pd.DataFrame(of | {"relaxed": asked.relaxed} | one) for one in score]
                if kind == "host" and other is not None:
                    unseen = np.isin(elsewhere(BASELINE_AXIS).host, samples.host[test])
                    told = {name: elsewhere(one.axis)[unseen] for name, one in able.items()}
                    answers = {name: able[name].predict(asked, responses, level) for name, asked in told.items()}
                    table = _table(other.spectra, data.hosts, elsewhere(BASELINE_AXIS)[unseen], known, answers)
                    frames.append(table.assign(split=POTENTIAL, repeat=repeat, level=level))
        digest = data.digest
    predictions = pd.concat(frames, ignore_index=True)
    if other_potential and POTENTIAL not in set(predictions["split"]):
        raise InputError(f"run.other_potential: {other_potential} has no host that a host split left to its test")
    found = {
        "dataset_digest": digest,
        "parameters": parameters,
        "splits": metrics(predictions, [name for name in (*parameters, *BASELINES) if name in predictions]),
        "open_set": open_set(pd.concat(suspicions, ignore_index=True)) if suspicions else {},
        "wrong_host_auroc": wrong_host_auroc(pd.concat(fits, ignore_index=True)) if fits else {},
    }
    table = io.BytesIO()
    packed = {"method": "gzip", "compresslevel": 6, "mtime": 0}
    predictions.to_csv(table, index=False, float_format="%.6g", lineterminator="\n", compression=packed)
    write_atomically(output_predictions, table.getvalue())
    write_json(output_metrics, found)


def _by_other_potential(data: Dataset, other: Dataset, axis: Axis) -> Samples:
    """All doped spectra of ``other`` whose host is in ``data``, too, with the host numbers that ``data`` has.

    Raises :class:`InputError` where the two cannot be compared.
    """
    if not np.array_equal(data.edges_meV, other.edges_meV):
        raise InputError(f"run.other_potential: {other.path} has another energy grid than {data.path}")
    if shared := sorted(set(data.spectra.potential) & set(other.spectra.potential)):
        raise InputError(f"run.other_potential: {other.path} is by {', '.join(shared)}, as is {data.path}")
    samples = load_samples(other, axis)
    number = {name: row for row, name in enumerate(data.hosts.id)}
    host = np.array([number.get(name, -1) for name in other.hosts.id])[samples.host]
    samples = replace(samples, host=host)[host >= 0]
    strange = (samples.candidates != data.hosts.candidates[samples.host]).any(axis=1)
    if strange.any():
        names = sorted({data.hosts.id[row] for row in samples.host[strange]})
        raise InputError(f"run.other_potential: {other.path} has other candidates for {', '.join(names)}")
    return samples


def _hide_one(samples: Samples, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each sample any one dopant: its concentration [n], and the candidates [n, 56] without it."""
    lots = np.random.default_rng(seed).random(samples.targets.shape) * (samples.targets > 0)
    row, chosen = np.arange(len(samples)), lots.argmax(axis=1)
    candidates = samples.candidates.copy()
    candidates[row, chosen] = False
    return samples.targets[row, chosen], candidates


def _of_another_host(groups: np.ndarray, test: np.ndarray, seed: int) -> np.ndarray | None:
    """For each ``test`` sample any one of another group, of all samples [n]; None where all are of one group."""
    if len(np.unique(groups)) < 2:
        return None
    rng, strange = np.random.default_rng(seed), np.empty_like(test)
    for group in np.unique(groups[test]):
        own = groups[test] == group
        strange[own] = rng.choice(np.flatnonzero(groups != group), own.sum())
    return strange


def _told_of(samples: Samples, others: Samples) -> Samples:
    """The doped spectra of ``samples``, said to be of the hosts of ``others`` and given with their pristine spectra."""
    names = ("host", "pristine", "composition", "candidates")
    return replace(samples, **{name: getattr(others, name) for name in names})


def _table(
    spectra: SpectrumTable, hosts: HostTable, test: Samples, training: Samples, answers: dict[str, Estimate]
) -> pd.DataFrame:
    """One line per spectrum and candidate."""
    spectrum, element = np.nonzero(test.candidates)
    row, host = test.row[spectrum], test.host[spectrum]
    symbols = SYMBOLS[: test.candidates.shape[1]]
    replaces = [replaced.get(symbol, "") for replaced in hosts.replaces for symbol in symbols]
    moved = spectra.quality.get("displacement_max_A", np.full(len(spectra.id), np.nan))
    columns = {
        "spectrum": _text(spectra.id, row),
        "host": _text(hosts.id, host),
        "formula": _text(hosts.formula, host),
        "fidelity": _text(spectra.fidelity, row),
        "displacement_max_A": moved[row],
        "element": _text(symbols, element),
        "replaces": _text(replaces, host * len(symbols) + element),
        "seen": (training.targets > 0).any(axis=0)[element],
        "true": test.targets[spectrum, element],
    }
    for name, answer in answers.items():
        columns[name] = answer.concentrations[spectrum, element]
        if answer.presence is not answer.concentrations:
            columns[f"{name}_presence"] = answer.presence[spectrum, element]
        if answer.width is not None:
            columns[f"{name}_width"] = answer.width[spectrum, element]
    return pd.DataFrame(columns)


def _text(names: Sequence[str], index: np.ndarray) -> pd.Categorical:
    """``names[index]``, each name stored once: predictions repeat them millions of times."""
    codes, categories = pd.factorize(np.array(names, dtype=object))
    return pd.Categorical.from_codes(codes[index], categories)
