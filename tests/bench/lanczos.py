"""Stochastic Lanczos quadrature against full diagonalisation: products, seconds and error by steps and vectors.

    OMP_NUM_THREADS=1 .venvs/main/bin/python tests/bench/lanczos.py [--cells 4 5 6]
    .venvs/sevennet/bin/python tests/bench/lanczos.py --potential sevennet --model 7net-0 --structure FILE \
        --steps 40 80 --vectors 1 4

Without --structure: rock salts of 8 n³ atoms with a tenth each of Li and K for Na and of Br for Cl, whose Hessian is
also built from 3N products and diagonalised. Errors are L1 distances from the spectrum so obtained (1 meV broadening),
averaged over disjoint groups of start vectors. With --structure (any file that ASE reads, relaxed beforehand) the
reference is left out unless --full is given, and only the estimated errors are printed. "expected" is sqrt(2/π) of the
estimated standard error, integrated over energy; "last quarter" is the change by the last quarter of the steps.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.data import atomic_masses
from ase.io import read
from ase.optimize import FIRE

from defectnet import potentials
from defectnet.config import Potential, Spectra
from defectnet.phonons.lanczos import Recursions, estimate, lanczos_modes
from defectnet.phonons.modes import diagonalise
from defectnet.phonons.pdos import energy_edges, spectrum
from defectnet.potentials.base import ForceModel, ForceModelCalculator


def doped_rock_salt(cells: int, model: ForceModel) -> Atoms:
    """8 × ``cells``³ atoms with random dopants, relaxed as far as phonons need."""
    rng = np.random.default_rng(cells)
    atoms = bulk("NaCl", "rocksalt", a=5.64, cubic=True) * (cells, cells, cells)
    symbols = np.array(atoms.symbols)
    for host, dopant in (("Na", "Li"), ("Na", "K"), ("Cl", "Br")):
        sites = np.flatnonzero(symbols == host)
        symbols[rng.choice(sites, len(sites) // 10, replace=False)] = dopant
    atoms.symbols = symbols
    atoms.calc = ForceModelCalculator(model)
    FIRE(atoms, logfile=None).run(fmax=0.02, steps=200)
    atoms.calc = None
    return atoms


def groups(recursions: Recursions, size: int) -> list[Recursions]:
    """Disjoint groups of so many start vectors."""
    count = len(recursions.alpha)
    rows = [slice(first, first + size) for first in range(0, count - size + 1, size)]
    arrays = ("alpha", "beta", "overlaps")
    return [replace(recursions, **{name: getattr(recursions, name)[row] for name in arrays}) for row in rows]


def measure(atoms: Atoms, model: ForceModel, options: argparse.Namespace, full: bool) -> None:
    """Print one table."""
    n, masses, symbols = len(atoms), atomic_masses[atoms.numbers], list(atoms.symbols)
    settings = Spectra(energy_max_meV=options.energy_max_meV, weighting=options.weighting)
    edges = energy_edges(settings)
    product = partial(model.hessian_vector_products, atoms)
    print(f"\n{atoms.get_chemical_formula()}: {n} atoms, {3 * n - 3} modes")

    exact = None
    if full:
        began = time.perf_counter()
        unit = np.eye(3 * n)
        chunks = [unit[i : i + options.together].reshape(-1, n, 3) for i in range(0, 3 * n, options.together)]
        hessian = np.concatenate([product(chunk).reshape(-1, 3 * n) for chunk in chunks])
        built = time.perf_counter()
        modes = diagonalise(hessian, masses, symbols)
        exact = spectrum(modes, edges, settings)
        print(
            f"full: {3 * n} products {built - began:.1f} s, diagonalisation {time.perf_counter() - built:.1f} s; "
            f"energies {modes.energies_meV[0]:.1f} to {modes.energies_meV[-1]:.1f} meV"
        )
        del hessian, unit, chunks

    began = time.perf_counter()
    longest = lanczos_modes(
        product,
        masses,
        symbols,
        max(options.steps),
        max(options.vectors),
        np.random.default_rng(options.seed),
        options.together,
        options.checkpoint,
    )
    each = (time.perf_counter() - began) / longest.products
    print(f"Lanczos: {longest.products} products, {each:.3g} s each with orthogonalisation")
    print(
        f"{'steps':>6s}{'vectors':>9s}{'products':>10s}{'of 3N':>8s}{'seconds':>9s}{'L1 error':>10s}"
        f"{'expected':>10s}{'last quarter':>14s}"
    )
    for steps in options.steps:
        for vectors in options.vectors:
            found = [estimate(group, edges, settings) for group in groups(longest.shortened(steps), vectors)]
            true = [np.abs(one.density - exact) @ np.diff(edges) for one in found] if full else [np.nan]
            expected = np.sqrt(2 / np.pi) * np.mean([one.l1_error for one in found])
            products = found[0].products
            print(
                f"{steps:6d}{vectors:9d}{products:10d}{products / (3 * n):8.2f}{products * each:9.1f}"
                f"{np.mean(true):10.4f}{expected:10.4f}{np.mean([one.l1_steps for one in found]):14.4f}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--potential", default="analytic")
    parser.add_argument("--model", default="7net-0", help="pretrained model of the potential")
    parser.add_argument("--structure", help="file that ASE reads, instead of doped rock salts")
    parser.add_argument("--full", action="store_true", help="full diagonalisation of --structure as well")
    parser.add_argument("--cells", type=int, nargs="+", default=[4, 5, 6], help="n of the rock salts of 8 n³ atoms")
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 30, 40, 50, 60, 80])
    parser.add_argument("--vectors", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--together", type=int, default=8, help="vectors in one call of the potential")
    parser.add_argument("--energy-max-meV", type=float, default=100.0)
    parser.add_argument("--weighting", choices=["none", "neutron"], default="none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path)
    options = parser.parse_args()
    model = potentials.load(Potential(name=options.potential, model=options.model))
    if options.structure:
        measure(read(options.structure), model, options, options.full)
        return
    for cells in options.cells:
        measure(doped_rock_salt(cells, model), model, options, full=True)


if __name__ == "__main__":
    main()
