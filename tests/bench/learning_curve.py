"""How the error on unseen hosts falls with the number of hosts in training.

    .venvs/main/bin/python tests/bench/learning_curve.py DATASET OUTPUT [--preset response] [--epochs 20] [--repeats 2]

Trains the same network on growing shares of the training hosts of the same splits and scores it on the same test hosts;
what is in OUTPUT already is not trained again. Prints, by share and level of knowledge, root mean squared errors in
at.%: all test spectra, direct ones, and those of a total of 5 at.% and less; and average precision.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from defectnet.config import Training
from defectnet.training.evaluate import evaluate
from defectnet.training.fit import train

SHARES = (0.125, 0.25, 0.5, 1.0)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--preset", default="response")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--seed", type=int, default=20250602)
    options = parser.parse_args()
    print("share level      all  direct  <=5  AP")
    for share in SHARES:
        settings = Training(epochs=options.epochs, batch_size=128, train_fraction=share)
        checkpoints = []
        for repeat in range(options.repeats):
            folder = options.output / f"{options.preset}-{share:g}-{repeat}"
            path = folder / "checkpoint.pt"
            if not path.exists():
                train(options.dataset, settings, options.preset, "host", repeat, options.seed, folder)
            checkpoints.append(path)
        scores = options.output / f"{options.preset}-{share:g}.json"
        evaluate(options.dataset, checkpoints, scores, scores.with_suffix(".csv.gz"))
        for level, found in json.loads(scores.read_text())["splits"]["host"][options.preset].items():
            parts = found["subsets"]
            direct, low = parts["fidelity"].get("direct"), parts["total_doping_at"].get("<=5")
            shown = [f"{one['rmse_at']:.2f}" if one else "-" for one in (found, direct, low)]
            print(f"{share:5g} {level:9s}", *shown, f"{found['average_precision']:.2f}", flush=True)


if __name__ == "__main__":
    main()
