"""How good the networks are: predictions on held-out spectra beside the baselines', and metrics with intervals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from ase.data import chemical_symbols
from sklearn.metrics import average_precision_score, r2_score, roc_auc_score

from defectnet.dataset.samples import Axis, Samples, load_samples
from defectnet.dataset.schema import Dataset
from defectnet.errors import RecordError
from defectnet.files import write_atomically
from defectnet.models.baselines import MeanBaseline, RidgeBaseline
from defectnet.models.defectnet import count_parameters
from defectnet.training.fit import load_checkpoint

MODELS = ("defectnet", "ridge", "mean")
PRESENCE_THRESHOLD = 0.002
"""Concentration (fraction) from which a prediction counts as a find: 0.2 at.%, the lowest published one."""
RECALL = 0.9
BOOTSTRAP_DRAWS = 2000
INTERVAL = (5, 95)
BOOTSTRAP_SEED = 20250602


def evaluate(dataset: Path, model_dirs: Sequence[Path], output_metrics: Path, output_predictions: Path) -> None:
    """Predict the test part of every run directory made by ``train`` and score the predictions.

    The mask of a test spectrum is the full candidate list of its host, always; the baselines learn from the training
    part of the same split and see the same axis. Predictions (CSV) have one line per spectrum, element of the mask
    and run: spectrum, host, formula, fidelity, split, repeat, element, true, and one column per model, fractions.
    Metrics (JSON): see :func:`score`, per kind of split, pooled over repeats; under ``fidelities`` the same for the
    spectra of each fidelity by themselves, because only direct and probed ones are of relaxed crystals.

    Raises :class:`RecordError` when a network was trained on another dataset or a file is damaged.
    """
    frames = []
    parameters = 0
    with Dataset(dataset) as data:
        rows = {name: row for row, name in enumerate(data.spectra.id)}
        cache: dict[Axis, Samples] = {}
        for directory in model_dirs:
            checkpoint = load_checkpoint(directory / "checkpoint.pt")
            if checkpoint.about["dataset_digest"] != data.digest:
                raise RecordError(f"{directory}: trained on another dataset than {dataset}; rerun `defectnet train`")
            if checkpoint.axis not in cache:
                cache[checkpoint.axis] = load_samples(data, checkpoint.axis)
            samples = cache[checkpoint.axis]
            parts = _read_split(directory / "split.json")
            of_row = {row: index for index, row in enumerate(samples.row)}
            training, test = (
                samples[np.array([of_row[rows[name]] for name in parts[part]["spectra"]])] for part in ("train", "test")
            )
            parameters = count_parameters(checkpoint.model)
            models = {
                "defectnet": checkpoint.model,
                "ridge": RidgeBaseline().fit(training),
                "mean": MeanBaseline().fit(training),
            }
            frames.append(_table(data, test, {name: models[name].predict(test) for name in MODELS}, checkpoint.about))
        digest = data.digest
    predictions = pd.concat(frames, ignore_index=True)
    metrics = {
        "dataset_digest": digest,
        "n_parameters": parameters,
        "splits": {
            str(kind): {model: score(part, model) for model in MODELS}
            for kind, part in predictions.groupby("split", sort=True)
        },
        "fidelities": {
            str(kind): {
                str(fidelity): {model: score(rows, model) for model in MODELS}
                for fidelity, rows in part.groupby("fidelity", sort=True)
            }
            for kind, part in predictions.groupby("split", sort=True)
        },
    }
    table = predictions.to_csv(index=False, float_format="%.7g", lineterminator="\n")
    write_atomically(output_predictions, table.encode())
    write_atomically(output_metrics, (json.dumps(metrics, indent=1) + "\n").encode())


def _read_split(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RecordError(f"{path}: not a readable split ({error}); rerun `defectnet train`") from None


def _table(data: Dataset, test: Samples, predicted: dict[str, np.ndarray], about: dict[str, Any]) -> pd.DataFrame:
    """One line per spectrum and candidate."""
    spectrum, element = np.nonzero(test.candidates)
    row, host = test.row[spectrum], test.host[spectrum]
    return pd.DataFrame(
        {
            "spectrum": [data.spectra.id[i] for i in row],
            "host": [data.hosts.id[i] for i in host],
            "formula": [data.hosts.formula[i] for i in host],
            "fidelity": [data.spectra.fidelity[i] for i in row],
            "split": about["split"],
            "repeat": about["repeat"],
            "element": [chemical_symbols[z + 1] for z in element],
            "true": test.targets[spectrum, element],
            **{name: values[spectrum, element] for name, values in predicted.items()},
        }
    )


def score(predictions: pd.DataFrame, model: str) -> dict[str, Any]:
    """Metrics of one model over a table of predictions.

    - ``rmse_at_percent``, ``mae_at_percent``, ``r2`` over all masked entries, absent candidates included;
      ``rmse_interval_at_percent`` is a 90 % bootstrap interval over hosts (None for fewer than three).
    - ``average_precision``, ``auroc``: does a higher prediction mean that the dopant is present?
    - ``false_positive_rate_at_threshold``: share of absent candidates predicted at or above 0.2 at.%
    - ``false_positive_rate_at_90_recall``: the same at the threshold that finds 90 % of the present dopants

    Quantities without a definition (one class only, equal truths) are None.
    """
    true, predicted = predictions["true"].to_numpy(float), predictions[model].to_numpy(float)
    error = predicted - true
    present = true > 0
    both = present.any() and not present.all()
    threshold = np.quantile(predicted[present], 1 - RECALL, method="lower") if present.any() else np.nan
    return {
        "rmse_at_percent": 100 * float(np.sqrt(np.mean(error**2))),
        "rmse_interval_at_percent": _bootstrap(error, predictions["host"].to_numpy()),
        "mae_at_percent": 100 * float(np.mean(np.abs(error))),
        "r2": float(r2_score(true, predicted)) if np.ptp(true) > 0 else None,
        "average_precision": float(average_precision_score(present, predicted)) if both else None,
        "auroc": float(roc_auc_score(present, predicted)) if both else None,
        "false_positive_rate_at_threshold": float(np.mean(predicted[~present] >= PRESENCE_THRESHOLD)) if both else None,
        "false_positive_rate_at_90_recall": float(np.mean(predicted[~present] >= threshold)) if both else None,
        "n_entries": len(predictions),
        "n_spectra": int(predictions["spectrum"].nunique()),
        "n_hosts": int(predictions["host"].nunique()),
    }


def _bootstrap(error: np.ndarray, hosts: np.ndarray) -> list[float] | None:
    """Bounds in at.% of the RMSE under resampling of whole hosts: spectra of one host are no independent evidence."""
    _, member = np.unique(hosts, return_inverse=True)
    squares, counts = np.bincount(member, error**2), np.bincount(member)
    n = len(counts)
    if n < 3:
        return None
    draws = np.random.default_rng(BOOTSTRAP_SEED).integers(n, size=(BOOTSTRAP_DRAWS, n))
    rmse = 100 * np.sqrt(squares[draws].sum(axis=1) / counts[draws].sum(axis=1))
    return [float(bound) for bound in np.percentile(rmse, INTERVAL)]
