"""Forces of a SevenNet potential on a CPU with e3nn's convolution and with ours, in turn.

    .venvs/sevennet/bin/python tests/bench/convolution.py [--rounds 5] [--model 7net-0]

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
from defectnet.potentials.convolution import Convolution


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="7net-0")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = Potential(model=options.model, device="cpu", python=sys.executable)
    models = {name: potentials.load(settings) for name in ("e3nn", "ours")}
    for module in models["e3nn"]._model.modules():
        if isinstance(module, Convolution):
            module.train()  # which is when it leaves the work to e3nn

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
