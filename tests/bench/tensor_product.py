"""Forces of a SevenNet potential on a CPU with e3nn's tensor product and with ours, in turn.

    .venvs/sevennet/bin/python tests/bench/tensor_product.py [--rounds 5] [--model 7net-0]

Prints atom-evaluations per CPU second of one thread, their ratio, and the largest difference of the forces.
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np
import torch
from ase.build import bulk

from defectnet import potentials
from defectnet.config import Potential
from defectnet.potentials import tensor_product


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="7net-0")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = Potential(model=options.model, device="cpu", python=sys.executable)
    ours = tensor_product.TensorProduct
    models = {"ours": potentials.load(settings)}
    tensor_product.TensorProduct = lambda original: original
    models = {"e3nn": potentials.load(settings)} | models
    tensor_product.TensorProduct = ours

    atoms = bulk("GaAs", "zincblende", 5.65, cubic=True) * (1, 2, 3)
    atoms.rattle(0.02, seed=1)
    displacements = np.zeros((1, len(atoms), 3))
    forces, spent = {}, dict.fromkeys(models, 0.0)
    for turn in range(options.rounds + 2):  # two to warm up
        for name, model in models.items():
            began = time.process_time()
            forces[name] = model.forces_of_displaced(atoms, displacements)
            spent[name] += (time.process_time() - began) * (turn >= 2)
    for name, seconds in spent.items():
        print(f"{name}: {options.rounds * len(atoms) / seconds:.0f} atom-evaluations per CPU second")
    off = np.abs(forces["ours"] - forces["e3nn"]).max()
    print(f"ratio {spent['e3nn'] / spent['ours']:.2f}; forces differ by at most {off:.1e} eV/Å")


if __name__ == "__main__":
    main()
