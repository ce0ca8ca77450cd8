"""GPU-hours of the published dataset (2,000 hosts, 16,000 supercells of 433-500 atoms), extrapolated from timings.

    .venvs/mace/bin/python tests/bench/gpu.py --potential '{"name": "mace", "model": "medium", "dtype": "float64"}'
    .venvs/sevennet/bin/python tests/bench/gpu.py --device cpu --atoms 24 32 --calls 3     # to try it without a GPU

For a silicon, a gallium nitride and a perovskite supercell it measures, in one run: a force call through the package's
own ASE calculator one structure at a time, as published; displaced copies, as many per pass as memory holds; and a
Hessian-vector product. It counts the calls that the workflow makes for one host with config/paper.yaml (single defects
of ten candidates by their true site symmetry, relaxations of `--steps` steps) and prints hours per way. The errors that
go with each way are measured by `tests/bench/phonons.py --device cuda`.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
from ase import Atoms
from phonons import ase_calculator, seconds_per_call

from defectnet import potentials
from defectnet.batches import atoms_of
from defectnet.config import Phonons, Potential, load_config
from defectnet.hosts.sheet import read_sheet
from defectnet.phonons.crystal import Folding, space_group
from defectnet.phonons.hessian import setup
from defectnet.potentials.passes import Passes
from defectnet.supercells import expansion_matrix

HOSTS = ("Si-diamond", "GaN-wurtzite", "CaTiO3-perovskite")
PAPER_HOSTS = 2_000
CANDIDATES = 10


def displaced_atoms(atoms: Atoms, settings: Phonons) -> int:
    """Displacements that phonopy asks for in a supercell."""
    return len(setup(atoms, np.eye(3, dtype=int), settings).displacements)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--potential", type=json.loads, default={}, help="potential block of a configuration, as JSON")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--atoms", type=int, nargs=2, default=(433, 500), metavar=("MIN", "MAX"))
    parser.add_argument("--calls", type=int, default=64, help="timed force calls of each kind")
    parser.add_argument("--steps", type=int, default=25, help="force calls of a relaxation")
    options = parser.parse_args()
    settings = Potential(**options.potential, device=options.device)
    model = potentials.load(settings)
    paper = load_config("config/paper.yaml")
    rows = {row.id: row for row in read_sheet("config/hosts/curated.tsv")}
    doped, direct = paper.supercells.doped_per_host, paper.phonons.direct_per_host
    hours: dict[str, list[float]] = {}
    for name in HOSTS:
        primitive = atoms_of(rows[name])
        group = space_group(primitive)
        matrix = expansion_matrix(primitive.cell.array, len(primitive), *options.atoms, group.rotations)
        folding = Folding.of(primitive, matrix)
        atoms, n = folding.atoms, len(folding)

        displacements = np.zeros((options.calls, n, 3))
        displacements[np.arange(options.calls), np.arange(options.calls) % n, 0] = 0.01
        ase_s = seconds_per_call(atoms, ase_calculator(settings, model), displacements[: max(3, options.calls // 8)])
        passes = Passes(model, atoms, settings.atoms_per_pass)
        for few in (1, 2):  # finds how many fit
            passes.forces(displacements[:few])
        began = time.perf_counter()
        for first in range(0, options.calls, passes.copies):
            passes.forces(displacements[first : first + passes.copies])
        batched_s = (time.perf_counter() - began) / options.calls
        vectors = np.random.default_rng(0).standard_normal((4, n, 3))
        model.hessian_vector_products(atoms, vectors[:1])
        began = time.perf_counter()
        model.hessian_vector_products(atoms, vectors)
        product_s = (time.perf_counter() - began) / len(vectors)

        sites = sorted(set(group.sites.tolist()))
        per_site = []
        for site in sites:
            one = atoms.copy()
            one.symbols[int(np.flatnonzero(folding.parent == site)[0])] = "Kr"  # any stranger: the symmetry counts
            per_site.append(displaced_atoms(one, paper.phonons))
        library = CANDIDATES * (options.steps * ase_s + float(np.mean(per_site)) * batched_s)
        relaxations = doped * options.steps * ase_s
        hessian = 6 * n * batched_s
        probing = min(paper.phonons.probes_max, 6 * n // 20) * product_s
        hours.setdefault("published: 6N + 1 calls", []).append(relaxations + doped * (6 * n + 1) * ase_s)
        hours.setdefault("direct, batched", []).append(relaxations + doped * hessian)
        hours.setdefault("library, direct and probed", []).append(
            library + relaxations + direct * hessian + (doped - direct) * probing
        )
        hours.setdefault("library alone (superposed spectra)", []).append(library)
        print(
            f"{name}: {n} atoms, ASE {n / ase_s:,.0f} atoms/s, {passes.copies} copies per pass "
            f"{n / batched_s:,.0f} atoms/s, Hessian-vector product {product_s / ase_s:.2f} ASE calls, "
            f"a defect {np.mean(per_site):.0f} displacements"
        )
    print(f"\n{settings.name} {model.identity.model} {settings.dtype} on {model.device}, {PAPER_HOSTS} hosts:")
    for way, seconds in hours.items():
        print(f"  {way:36s}{np.mean(seconds) * PAPER_HOSTS / 3600:10,.1f} hours")


if __name__ == "__main__":
    main()
