"""Measured-like spectra of one potential, read by a network that learned from another: from simulation to experiment.

    .venvs/main/bin/python tests/bench/blind.py CHECKPOINT KNOWN OTHER [--counts 50000] [--resolution 2%]

Every direct spectrum of the dataset OTHER whose host is also in KNOWN, the dataset of the network's own potential, is
written as an instrument would show it, with its pristine one, and asked about: with nothing known of the host, with
what KNOWN has of it, and with that and the axis calibrated on the pristine spectrum. OTHER may be KNOWN: then it is the
test without a change of potential. Prints root mean squared and mean errors in at.%, the share of 90 % intervals that
hold the truth, how many were refused, and the seconds that an answer takes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

from defectnet.dataset.schema import Dataset
from defectnet.elements import element_amounts
from defectnet.errors import InputError
from defectnet.experiments.answer import ask
from defectnet.experiments.resolution import parse_resolution
from defectnet.experiments.simulate import Instrument, simulate_measurement
from defectnet.progress import track


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("checkpoint", "known", "other"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--counts", type=float, default=50_000)
    parser.add_argument("--resolution", default="2%")
    parser.add_argument("--spectra", type=int, default=200)
    options = parser.parse_args()
    instrument = Instrument(resolution=parse_resolution(options.resolution), counts=options.counts)
    with Dataset(options.known) as known, Dataset(options.other) as other:
        rows = [
            row
            for row in other.doped
            if other.spectra.fidelity[row] in ("direct", "probed")
            and other.hosts.id[other.spectra.host[row]] in known.hosts.id
        ]
        chosen = np.random.default_rng(0).permutation(rows)[: options.spectra]
        questions = [
            (
                other.spectra.id[row],
                other.hosts.id[other.spectra.host[row]],
                other.hosts.formula[other.spectra.host[row]],
                element_amounts(other.spectra.concentrations[row]),
                sorted(element_amounts(other.hosts.candidates[other.spectra.host[row]])),
            )
            for row in chosen
        ]
    cases = {
        "nothing known": {},
        "host known": {"dataset": options.known, "resolution": options.resolution},
        "axis calibrated": {"dataset": options.known, "resolution": options.resolution, "calibrate": True},
    }
    told, refused, seconds = defaultdict(list), defaultdict(int), defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        for spectrum, host, formula, truth, candidates in track(questions, "spectra"):
            files = simulate_measurement(options.other, spectrum, Path(folder), instrument)
            for case, knowledge in cases.items():
                named = {"host": host} if "dataset" in knowledge else {}
                began = time.perf_counter()
                try:
                    found = ask(
                        options.checkpoint, files.doped, formula, pristine=files.pristine, candidates=candidates,
                        **named, **knowledge,
                    )  # fmt: skip
                except InputError:
                    refused[case] += 1
                    continue
                seconds[case].append(time.perf_counter() - began)
                for one in found.dopants:
                    true = truth.get(one.element, 0.0)
                    told[case].append((true, one.concentration, one.low <= true <= one.high))
    print(f"{len(questions)} spectra")
    for case, rows in told.items():
        true, amount, inside = np.array(rows).T
        off = 100 * (amount - true)
        print(
            f"{case:16s} RMSE {np.sqrt(np.mean(off**2)):.2f} (mean alone {100 * true.std():.2f}), "
            f"MAE {np.abs(off).mean():.2f}, {inside.mean():.0%} covered, {refused[case]} refused, "
            f"{np.median(seconds[case]):.1f} s"
        )


if __name__ == "__main__":
    main()
