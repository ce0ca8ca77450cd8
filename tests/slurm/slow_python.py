"""Stands in for a potential's interpreter: notes where it runs, and lets every evaluation wait as long as it is told.

``CAMPAIGN`` names the folder that it takes orders from and takes notes in.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from defectnet.cli import main
from defectnet.potentials.analytic import MorsePairs

FOLDER = Path(os.environ["CAMPAIGN"])
NOTED = ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID", "SLURMD_NODENAME")


def wait():
    began = time.monotonic()
    while time.monotonic() - began < float((FOLDER / "pause").read_text()):
        if (FOLDER / "deaf").exists():  # as in a call that never returns to Python
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM):
                signal.signal(number, signal.SIG_IGN)
        time.sleep(0.02)


def slowly(compute):
    def wrapped(*arguments):
        wait()
        return compute(*arguments)

    return wrapped


dash_m, package, command = sys.argv[1:4]
assert (dash_m, package) == ("-m", "defectnet")
with (FOLDER / "notes.jsonl").open("a") as file:
    file.write(json.dumps({"command": command} | {name: os.environ.get(name, "") for name in NOTED}) + "\n")
for name in ("evaluate", "forces_of_displaced", "hessian_vector_products"):
    setattr(MorsePairs, name, slowly(getattr(MorsePairs, name)))
sys.argv[:3] = ["defectnet"]
main()
