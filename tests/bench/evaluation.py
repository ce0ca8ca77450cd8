"""Throughput of a potential on this machine: threads, processes side by side, structures per pass, memory allocator;
and displaced copies of one structure, one by one and together.

    .venvs/sevennet/bin/python tests/bench/evaluation.py [--seconds 10]
    .venvs/chgnet/bin/python tests/bench/evaluation.py --only copies --potential '{"name": "chgnet", "model": "0.3.0"}'

Prints absolute figures and, because these mean little elsewhere, how many times faster than the first line each is.
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


def throughput(seconds: float) -> None:
    """Print the rates of the variants, each measured in processes of its own."""
    first = None
    print(f"{'':52s}{'atom-evaluations/s':>20s}{'ratio':>8s}")
    for label, processes, threads, structures, keep in VARIANTS:
        worker = json.dumps({"threads": threads, "structures": structures, "keep": keep})
        command = [sys.executable, __file__, "--seconds", str(seconds), "--worker", worker]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        running = [
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            for _ in range(processes)
        ]
        rate = sum(float(process.communicate()[0]) for process in running)
        first = first or rate
        print(f"{label:52s}{rate:20.0f}{rate / first:8.2f}")


def compare(cells: int, copies: int, rounds: int, settings: str) -> None:
    """Print the processor time of displaced copies of 8 x ``cells`` atoms of distorted SiC, one way beside another."""
    import time
    import warnings

    import numpy as np
    import torch

    from defectnet import potentials
    from defectnet.config import Potential
    from defectnet.potentials import conformance
    from defectnet.potentials.passes import Passes

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    settings = Potential.model_validate_json(settings)
    model = potentials.load(settings)
    atoms = conformance.specimen(model.elements, np.random.default_rng(0)) * (1, 1, cells)
    displacements = np.zeros((copies, len(atoms), 3))
    displacements[range(copies), np.arange(copies) % len(atoms), 0] = 0.01
    structures = [atoms.copy() for _ in displacements]
    for structure, displacement in zip(structures, displacements, strict=True):
        structure.positions += displacement

    def in_passes(size):
        return lambda: [
            model.forces_of_displaced(atoms, displacements[first : first + size]) for first in range(0, copies, size)
        ]

    auto = Passes(model, atoms, "auto").copies
    ways = {"evaluate, one by one": lambda: [model.evaluate([structure]) for structure in structures]}
    if settings.name == "sevennet":
        from sevenn.calculator import SevenNetCalculator

        calculator = SevenNetCalculator(settings.model, device="cpu", modal=settings.modality)
        ways["SevenNetCalculator, one by one"] = lambda: [calculator.get_forces(structure) for structure in structures]
    for size in sorted({1, auto, copies}):
        note = " (auto)" if size == auto else ""
        ways[f"forces_of_displaced, {size} per pass{note}"] = in_passes(size)
    best = dict.fromkeys(ways, np.inf)
    for _ in range(rounds + 1):  # the first warms up
        for label, way in ways.items():
            model.forces_of_displaced(atoms, 3 * displacements[:1])  # another skin: each way pays for its own list
            began = time.process_time()
            way()
            best[label] = min(best[label], time.process_time() - began)
    print(f"\n{copies} displaced copies of {len(atoms)} atoms, {settings.name} {settings.dtype}")
    print(f"{'':52s}{'ms per copy':>20s}{'ratio':>8s}")
    for label, seconds in best.items():
        print(f"{label:52s}{1000 * seconds / copies:20.1f}{best['evaluate, one by one'] / seconds:8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="measuring time of each line")
    parser.add_argument("--only", choices=("throughput", "copies"), help="one of the two sections")
    parser.add_argument("--potential", default="{}", help="potential of the copies: a block of the configuration, JSON")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(measure(**json.loads(options.worker), seconds=options.seconds))
        return
    if options.only != "copies":
        throughput(options.seconds)
    if options.only != "throughput":
        for cells in (1, 4):
            compare(cells, copies=8, rounds=2, settings=options.potential)


if __name__ == "__main__":
    main()
