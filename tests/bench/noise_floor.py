"""How well anyone could know concentrations who can simulate the very host: the floor that arrangements set.

    .venvs/main/bin/python tests/bench/noise_floor.py DATASET [--folds 5]

Ridge regression per host on the host's own superposed spectra, tested on others of them (cross-validation): it knows
the host's forward model from examples, so what it misses is due to arrangements, look-alikes and what is not linear.
Direct spectra of the host are predicted by what all superposed ones taught. Beside it generalised least squares, which
learns from the same spectra, least squares on responses of single defects, which knows the limit of low doping only,
and the mean, which knows nothing. Prints root mean squared errors in at.% over all candidates, for all spectra and for
those of a total of 5 at.% and less, and average precision.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from sklearn.linear_model import RidgeCV
from sklearn.metrics import average_precision_score
from sklearn.model_selection import KFold

from defectnet.dataset.samples import Samples, load_responses, load_samples
from defectnet.dataset.schema import Dataset
from defectnet.models.baselines import BASELINE_AXIS, GeneralisedLeastSquares, LeastSquares
from defectnet.progress import track

FEWEST = 50
"""Superposed spectra that a host must have."""


def ridge(training: Samples, test: Samples, elements: np.ndarray) -> np.ndarray:
    """Concentrations [n, E] of the ``elements``, not negative."""
    change = [some.doped - some.pristine for some in (training, test)]
    model = RidgeCV(alphas=np.logspace(-1, 4, 16)).fit(change[0], training.targets[:, elements])
    return np.maximum(model.predict(change[1]), 0)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--folds", type=int, default=5)
    options = parser.parse_args()
    with Dataset(options.dataset) as data:
        samples, responses = load_samples(data, BASELINE_AXIS), load_responses(data, BASELINE_AXIS)
        fidelity = np.array(data.spectra.fidelity)[samples.row]
    made = fidelity == "superposed"
    known = samples[np.flatnonzero(made)]
    untrained = {
        "least squares": LeastSquares(known, responses),
        "generalised least squares": GeneralisedLeastSquares(known, responses),
    }
    answers: dict[str, list[tuple[np.ndarray, ...]]] = {}

    def note(kind: str, name: str, told: np.ndarray, truth: np.ndarray) -> None:
        total = np.broadcast_to(truth.sum(axis=1, keepdims=True), truth.shape)
        answers.setdefault(f"{kind:10s} {name}", []).append((told.ravel(), truth.ravel(), total.ravel()))

    hosts = [host for host in np.unique(samples.host) if (made & (samples.host == host)).sum() >= FEWEST]
    for host in track(hosts, "hosts"):
        own = samples[np.flatnonzero(made & (samples.host == host))]
        elements = np.flatnonzero(own.candidates[0])
        for fit, test in KFold(options.folds, shuffle=True, random_state=0).split(own.row):
            note(
                "superposed", "ridge of the host", ridge(own[fit], own[test], elements), own.targets[test][:, elements]
            )
        direct = samples[np.flatnonzero(np.isin(fidelity, ("direct", "probed")) & (samples.host == host))]
        for kind, some in (("superposed", own), ("direct", direct)):
            truth = some.targets[:, elements]
            for name, model in untrained.items():
                note(kind, name, model.concentrations(some, responses, "library")[:, elements], truth)
            note(kind, "mean", np.full(truth.shape, samples.targets[samples.candidates].mean()), truth)
        if len(direct):
            note("direct", "ridge of the host", ridge(own, direct, elements), direct.targets[:, elements])
    print(f"{len(hosts)} hosts; RMSE in at.% over all spectra, with a total of 5 at.% and less; average precision")
    for name, parts in sorted(answers.items()):
        told, truth, total = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        off = 100 * (told - truth)
        low = total <= 0.05 + 1e-6
        precision = average_precision_score(truth > 0, told)
        print(f"{name:37s} {np.sqrt(np.mean(off**2)):.2f} {np.sqrt(np.mean(off[low] ** 2)):.2f} {precision:.2f}")


if __name__ == "__main__":
    main()
