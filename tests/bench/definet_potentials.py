"""Relaxing by a cheaper potential, as a rival of one step by the network: positions and time.

    .venvs/chgnet/bin/python tests/bench/definet_potentials.py --name chgnet --model 0.3.0 [--cells 40]

Single defects of data/reference/relaxations.h5 that the networks in models/definet have not seen are relaxed by another
potential at the lattice of the file, and so are their hosts, whose own moves are taken off. Errors are from the
positions by the potential of the file, as the mean over cells of the mean |component|; wall times are of this run, on
one thread, in which the network has the force constants of the host and is told the forces on the unrelaxed cell.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from ase import Atoms

from defectnet.config import Potential, Relaxation
from defectnet.definet.archive import read_pairs
from defectnet.definet.fit import coordinate_mae, load_trained
from defectnet.definet.pairs import Pair, net_displacements
from defectnet.definet.relax import relax_in_one_step
from defectnet.errors import PhysicsError
from defectnet.potentials import LazyModel
from defectnet.potentials.base import ForceModel
from defectnet.progress import track
from defectnet.relaxation import relax_doped
from defectnet.seeds import generator


def main() -> None:
    """Print a line per part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="chgnet")
    parser.add_argument("--model", default="0.3.0")
    parser.add_argument("--cells", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = LazyModel(Potential(name=options.name, model=options.model, device="cpu")).model
    trained = load_trained(Path("models/definet/checkpoint.pt"))
    pairs = {pair.id: pair for pair in read_pairs(Path("data/reference/relaxations.h5"))}
    for part in ("dopant", "host"):
        known = sorted(name for name in trained.parts[part] if pairs[name].stays and pairs[name].defects.sum() == 1)
        order = generator(0, "cheaper potential", part).permutation(len(known))[: options.cells]
        rows = []
        for pair in track([pairs[known[k]] for k in order], part):
            began = time.perf_counter()
            try:
                found, calls = relaxed_by(model, pair)
            except PhysicsError as error:
                print(f"{pair.id}: {error}")
                continue
            between = time.perf_counter()
            unrelaxed = Atoms(pair.numbers, pair.positions, cell=pair.cell, pbc=True)
            step = relax_in_one_step(trained, unrelaxed, pair.host_numbers, pair.lattice, pair.forces)
            ended = time.perf_counter()
            answers = found, step.positions - pair.positions, np.zeros_like(found)
            rows.append([*(coordinate_mae(u, pair) for u in answers), calls, between - began, ended - between])
        cheap, network, unrelaxed, calls, slow, fast = np.mean(rows, axis=0)
        print(
            f"{part}, {len(rows)} cells: {options.name} {cheap:.4f} Å in {calls:.0f} calls, network {network:.4f} Å in "
            f"1/{slow / fast:.0f} of the time, unrelaxed {unrelaxed:.4f} Å"
        )


def relaxed_by(model: ForceModel, pair: Pair) -> tuple[np.ndarray, float]:
    """Displacements [N, 3] in Å of a pair by another potential, beyond those of its host, and the force calls."""
    ends, calls = [], 0.0
    for numbers in (pair.numbers, pair.host_numbers):
        found = relax_doped(Atoms(numbers, pair.positions, cell=pair.cell, pbc=True), model, Relaxation())
        ends.append(found.atoms.positions)
        calls = calls or found.quality["relax_evaluations"]
    return net_displacements(ends[1], ends[0], pair.cell, pair.atoms), calls


if __name__ == "__main__":
    main()
