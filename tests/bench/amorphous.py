"""Disordered silicon by level of disorder: network, energy, and what disorder does to the vibrations.

    .venvs/main/bin/python tests/bench/amorphous.py [--folder results/bench/amorphous] [--number 40] [--atoms 64]

Makes what is not in the folder yet, as `defectnet hosts amorphous` does. Energies and force constants are those of the
same potential, in the cells as they are made; modes are those of the zone centre, broadened by 1.5 meV.
The optical peak is the maximum of the density of states between 45 and 75 meV; the crystal's is that of 512 atoms.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.io import read

from defectnet.hosts.amorphous import LATTICE_A, MASS_AMU, Simulation, generate, recipes
from defectnet.hosts.disorder import measure
from defectnet.phonons.modes import diagonalise
from defectnet.phonons.pdos import bin_centers, pdos
from defectnet.progress import track

EDGES_meV = np.arange(0, 90.25, 0.5)
SIGMA_meV = 1.5


def main() -> None:
    """Print one line per level."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("results/bench/amorphous"))
    parser.add_argument("--number", type=int, default=40)
    parser.add_argument("--atoms", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    wanted = recipes(options.number, (options.atoms,), seed=options.seed)
    generate(wanted, options.folder, lambda todo: track(todo, "structures"))
    crystal = bulk("Si", a=LATTICE_A, cubic=True).repeat(4)
    simulation = Simulation(crystal)
    simulation.minimise(crystal)
    crystal_eV = simulation.energy_eV / len(crystal)
    print("structures; bonds, share of fourfold atoms, angle spread / °; rings of 5, 6, 7 per atom; "
          "excess energy / eV per atom; optical peak: meV, height / 1/meV; share of imaginary modes")  # fmt: skip
    report("crystal", [crystal], crystal_eV)
    for family in dict.fromkeys(recipe.family for recipe in wanted):
        files = [options.folder / f"{recipe.id}.extxyz" for recipe in wanted if recipe.family == family]
        report(family, [read(file) for file in files], crystal_eV)


def report(label: str, structures: Sequence[Atoms], crystal_eV: float) -> None:
    """Print the line of one level."""
    found = measure(structures)
    energies_eV, modes = [], []
    for atoms in structures:
        simulation = Simulation(atoms)
        minimum = simulation.minimise(atoms)
        energies_eV.append(simulation.energy_eV / len(atoms))
        modes.append(diagonalise(hessian(simulation, minimum), atoms.get_masses(), atoms.get_chemical_symbols()))
    excess = np.mean(energies_eV) - crystal_eV
    density = np.mean([pdos(each, EDGES_meV, SIGMA_meV) for each in modes], axis=0)
    energies = bin_centers(EDGES_meV)
    optical = np.where((energies > 45) & (energies < 75), density, 0)
    unstable = np.mean(np.concatenate([each.energies_meV for each in modes]) < -0.1)
    rings = " ".join(f"{found.rings[size]:.2f}" for size in (5, 6, 7))
    network = f"{found.coordination:.3f} {found.fourfold:.3f} {found.angle_spread_deg:5.2f}  {rings}"
    vibrations = f"{energies[optical.argmax()]:.1f} {optical.max():.4f}  {unstable:.4f}"
    print(f"{label:40} {len(structures):3d}  {network}  {excess:.3f}  {vibrations}", flush=True)


def hessian(simulation: Simulation, atoms: Atoms) -> np.ndarray:
    """Force constants [3N, 3N] in eV/Å²."""
    with tempfile.NamedTemporaryFile() as file:
        simulation.lammps.command(f"dynamical_matrix all regular 1e-4 file {file.name}")  # divided by the masses
        return np.loadtxt(file.name).reshape(3 * len(atoms), -1) * MASS_AMU


if __name__ == "__main__":
    main()
