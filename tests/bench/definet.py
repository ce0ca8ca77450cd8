"""Time of one step of relaxation by the networks that come with the package, neighbour search included.

    OMP_NUM_THREADS=1 .venvs/main/bin/python tests/bench/definet.py [--cells 2 4]

Rock salts of 8 n³ atoms with a tenth of the cations replaced, no force constants. Wall and processor time of the
fastest of three.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from ase.build import bulk

from defectnet.definet.fit import load_trained
from defectnet.definet.relax import relax_in_one_step


def main() -> None:
    """Print a line per size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="+", default=[2, 4])
    trained = load_trained(Path("models/definet/checkpoint.pt"))
    size = sum(parameter.numel() for parameter in trained.models[0].parameters())
    print(f"{len(trained.models)} networks of {size} parameters")
    for n in parser.parse_args().cells:
        host = bulk("NaCl", "rocksalt", a=5.64, cubic=True) * (n, n, n)
        doped = host.copy()
        doped.symbols[np.random.default_rng(0).choice(range(0, len(host), 2), len(host) // 20, replace=False)] = "K"
        times = []
        for _ in range(3):
            began = time.perf_counter(), time.process_time()
            relax_in_one_step(trained, doped, host.numbers)
            times.append((time.perf_counter() - began[0], time.process_time() - began[1]))
        wall, processor = min(times)
        print(f"{len(host)} atoms: {wall:.2f} s wall, {processor:.2f} s processor")


if __name__ == "__main__":
    main()
