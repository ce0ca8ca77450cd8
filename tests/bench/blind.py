"""Measured-like spectra of one potential, read by a network that learned from another: from simulation to experiment.

    .venvs/main/bin/python tests/bench/blind.py MODELS KNOWN OTHER [--preset response] [--counts N] [--resolution 2%]

MODELS is a folder of networks of the host split, trained on the dataset KNOWN. Each is asked about the hosts of its
test part: every direct spectrum that the dataset OTHER has of them is written as an instrument would show it, with its
pristine one, and asked about with nothing known of the host, with what KNOWN has of it, and with that and the axis
calibrated on the pristine spectrum. OTHER may be KNOWN: then it is the test without a change of potential. Prints root
mean squared and mean errors and the bias in at.%, that by true concentration, the share of 90 % intervals that hold the
truth, how many answers came with a warning, how many were refused, and the seconds that one takes; first for all, then
for crystals whose atoms moved less than 0.5 Å.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from defectnet.dataset.schema import RELAXED, Dataset
from defectnet.elements import element_amounts
from defectnet.errors import InputError
from defectnet.experiments.answer import ask
from defectnet.experiments.resolution import parse_resolution
from defectnet.experiments.simulate import Instrument, simulate_measurement
from defectnet.progress import track
from defectnet.training.fit import PARTS, load_checkpoint
from defectnet.training.metrics import LEFT_SITE_A

RANGES_at = (0, 5, 10, 15, 100)
CASES = ("nothing known", "host known", "axis calibrated")


@dataclass(frozen=True)
class Blind:
    """A spectrum that a network is asked about, and how far relaxation moved an atom in it."""

    checkpoint: Path
    spectrum: str
    host: str
    formula: str
    truth: dict[str, float]
    candidates: list[str]
    moved_A: float


def questions(models: Path, preset: str, known: Path, other: Path) -> list[Blind]:
    """Direct and probed spectra of ``other``, each with the network that has not seen its host."""
    found = []
    with Dataset(known) as mine, Dataset(other) as theirs:
        table, hosts = theirs.spectra, theirs.hosts
        relaxed = [row for row in theirs.doped if table.fidelity[row] in RELAXED]
        moved = table.quality["displacement_max_A"]
        for checkpoint in sorted(models.glob(f"{preset}-host-*/checkpoint.pt")):
            test = mine.doped[load_checkpoint(checkpoint).parts == PARTS.index("test")]
            unseen = {mine.hosts.id[host] for host in mine.spectra.host[test]}
            for row in relaxed:
                host = table.host[row]
                if hosts.id[host] in unseen:
                    truth = element_amounts(table.concentrations[row])
                    asked = sorted(element_amounts(hosts.candidates[host]))
                    names = table.id[row], hosts.id[host], hosts.formula[host]
                    found.append(Blind(checkpoint, *names, truth, asked, float(moved[row])))
    return found


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("models", "known", "other"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--preset", default="response")
    parser.add_argument("--counts", type=float, default=50_000)
    parser.add_argument("--resolution", default="2%")
    options = parser.parse_args()
    instrument = Instrument(resolution=parse_resolution(options.resolution), counts=options.counts)
    asked = questions(options.models, options.preset, options.known, options.other)
    with Dataset(options.other) as other:
        weighting = other.settings.weighting
    told, refused, seconds = defaultdict(list), defaultdict(int), defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        for blind in track(asked, "spectra"):
            files = simulate_measurement(options.other, blind.spectrum, Path(folder), instrument)
            known = {"dataset": options.known, "host": blind.host, "resolution": options.resolution}
            for case, knowledge in zip(CASES, ({}, known, known | {"calibrate": True}), strict=True):
                began = time.perf_counter()
                try:
                    found = ask(
                        blind.checkpoint, files.doped, blind.formula, pristine=files.pristine,
                        candidates=blind.candidates, weighting=weighting, **knowledge,
                    )  # fmt: skip
                except InputError as error:
                    refused[case] += 1
                    print(f"{blind.spectrum}, {case}: {error}", file=sys.stderr)
                    continue
                seconds[case].append(time.perf_counter() - began)
                for one in found.dopants:
                    true = blind.truth.get(one.element, 0.0)
                    inside = one.low <= true <= one.high
                    told[case].append((true, one.concentration, inside, bool(found.warnings), blind.moved_A))
    for limit in (np.inf, LEFT_SITE_A):
        print(f"\n{sum(blind.moved_A < limit for blind in asked)} spectra, atoms moved by less than {limit} Å")
        for case, rows in told.items():
            true, amount, inside, warned, _ = np.array([row for row in rows if row[4] < limit]).T
            off = 100 * (amount - true)
            print(
                f"{case:16s} RMSE {np.sqrt(np.mean(off**2)):.2f} (mean alone {100 * true.std():.2f}), "
                f"MAE {np.abs(off).mean():.2f}, bias {off.mean():+.2f}, {inside.mean():.0%} covered, "
                f"{warned.mean():.0%} warned of, {refused[case]} refused in all, {np.median(seconds[case]):.1f} s"
            )
            for low, high in pairwise(RANGES_at):
                if (part := (100 * true > low) & (100 * true <= high)).any():
                    rmse = np.sqrt(np.mean(off[part] ** 2))
                    means = f"{100 * true[part].mean():.1f} at.% is read as {100 * amount[part].mean():.1f}"
                    print(f"    {part.sum()} of {low} to {high} at.%: {means}, RMSE {rmse:.2f}")


if __name__ == "__main__":
    main()
