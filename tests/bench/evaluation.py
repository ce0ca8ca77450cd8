"""Throughput of a potential on this machine: threads, processes side by side, structures per pass, memory allocator.

    .venvs/sevennet/bin/python tests/bench/evaluation.py [--seconds 10]

Prints atom-evaluations per second and, because absolute figures mean little elsewhere, the ratio to the first line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

VARIANTS = [
    # label, processes, threads each, structures per pass, keep freed memory
    ("1 process x 1 thread, 1 structure per pass", 1, 1, 1, True),
    ("  ... as glibc comes (freed memory returned)", 1, 1, 1, False),
    ("  ... 4 structures per pass", 1, 1, 4, True),
    ("1 process x 2 threads", 1, 2, 1, True),
    ("2 processes x 1 thread", 2, 1, 1, True),
]


def measure(threads: int, structures: int, keep: bool, seconds: float) -> float:
    """Atom-evaluations per second of 32-atom GaAs cells in this process."""
    if not keep:
        os.environ["MALLOC_TRIM_THRESHOLD_"] = "131072"  # any value keeps the potential from tuning the allocator
    import time

    import torch
    from ase.build import bulk

    from defectnet import potentials
    from defectnet.config import Potential

    torch.set_num_threads(threads)
    model = potentials.load(Potential())
    atoms = bulk("GaAs", "zincblende", 5.65) * (2, 2, 4)
    atoms.rattle(0.02, seed=1)
    batch = [atoms] * structures
    for _ in range(3):
        model.evaluate(batch)
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        model.evaluate(batch)
        done += structures * len(atoms)
    return done / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="measuring time of each line")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(measure(**json.loads(options.worker), seconds=options.seconds))
        return
    first = None
    print(f"{'':52s}{'atom-evaluations/s':>20s}{'ratio':>8s}")
    for label, processes, threads, structures, keep in VARIANTS:
        worker = json.dumps({"threads": threads, "structures": structures, "keep": keep})
        command = [sys.executable, __file__, "--seconds", str(options.seconds), "--worker", worker]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        running = [
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            for _ in range(processes)
        ]
        rate = sum(float(process.communicate()[0]) for process in running)
        first = first or rate
        print(f"{label:52s}{rate:20.0f}{rate / first:8.2f}")


if __name__ == "__main__":
    main()
