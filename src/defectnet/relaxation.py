"""Relax pristine hosts (lattice and positions, symmetry kept) and doped supercells (positions) with a potential."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, replace

import numpy as np
from ase import Atoms
from ase.constraints import FixSymmetry
from ase.data import covalent_radii
from ase.filters import FrechetCellFilter
from ase.neighborlist import neighbor_list
from ase.optimize import BFGS, FIRE, LBFGS
from ase.optimize.optimize import Optimizer

from defectnet.config import Relaxation
from defectnet.errors import PhysicsError
from defectnet.potentials.base import ForceModel, ForceModelCalculator

log = logging.getLogger(__name__)

OPTIMIZERS = {"LBFGS": LBFGS, "FIRE": FIRE}
CURVATURE_MIN_eV_PER_A2 = 1.0
"""Force constants of soft modes and of rigid translations count as this: a little force must not carry them far."""
LBFGS_STEPS_MAX = 150
"""Then FIRE takes over: LBFGS, without a line search, may wander about a saddle point for ever. Two disordered networks
of silicon did for 1,000 steps, and FIRE left within 90."""
FORCE_LIMIT_eV_PER_A = 1e3
VOLUME_FACTOR_MAX = 2.0
"""A crystal that doubles or halves its volume has come apart or collapsed."""
ENERGY_RISE_eV_PER_ATOM = 1e-3
"""What the noise of single precision may add to the energy of a structure that hardly moved."""
CONTACT_SHARE = 0.4
"""Atoms nearer than this share of the sum of their covalent radii have collapsed onto each other."""


@dataclass(frozen=True)
class Relaxed:
    """A relaxed structure, the forces [N, 3] left on it in eV/Å, and how it got there.

    ``start_forces`` [N, 3] are those before, or None where the relaxation began elsewhere. ``quality`` names: converged
    (0 or 1), relax_steps, relax_evaluations, residual_force_eV_per_A, energy_eV_per_atom, volume_change (fraction), at
    fixed lattice displacement_max_A, and warm (whether a guess of the displacements was of use) where there was one.
    """

    atoms: Atoms
    forces: np.ndarray
    start_forces: np.ndarray | None
    quality: dict[str, float]


def relax_host(atoms: Atoms, model: ForceModel, settings: Relaxation) -> Relaxed:
    """Relax a primitive host cell within its space group; see :func:`_relax`."""
    return _relax(atoms, model, settings, relax_cell=settings.host_cell, keep_symmetry=True)


def relax_doped(
    atoms: Atoms,
    model: ForceModel,
    settings: Relaxation,
    displacements: np.ndarray | None = None,
    hessian: np.ndarray | None = None,
) -> Relaxed:
    """Relax a doped supercell, by default at the fixed lattice of its host; see :func:`_relax`.

    ``displacements`` [N, 3] in Å are a guess of where the atoms go, ``hessian`` one of the force constants there. A
    guess that leads astray costs its steps: the relaxation then starts again without it, and ``warm`` in the quality
    is 0.
    """
    options = {"relax_cell": settings.doped_cell, "keep_symmetry": False}
    if displacements is None:
        return _relax(atoms, model, settings, **options)
    spent = 0
    try:
        warm = _relax(atoms, model, settings, displacements=displacements, hessian=hessian, **options)
        if warm.quality["converged"]:
            return replace(warm, quality=warm.quality | {"warm": 1})
        spent = warm.quality["relax_evaluations"]
    except PhysicsError as error:
        log.info("relaxation from a guess failed (%s); starting without it", error)
    cold = _relax(atoms, model, settings, **options)
    return replace(
        cold, quality=cold.quality | {"warm": 0, "relax_evaluations": cold.quality["relax_evaluations"] + spent}
    )


def relax_defect(
    atoms: Atoms,
    model: ForceModel,
    settings: Relaxation,
    hessian: np.ndarray | None = None,
    displacement_max_A: float | None = None,
) -> Relaxed:
    """Relax a supercell with one substitution at fixed lattice within the site symmetry of the defect.

    ``hessian`` are the force constants of the host. Raises :class:`PhysicsError` as soon as an atom is farther than
    ``displacement_max_A`` from where it started.
    """
    options = {"hessian": hessian, "displacement_max_A": displacement_max_A}
    return _relax(atoms, model, settings, relax_cell=False, keep_symmetry=True, **options)


def _relax(
    start: Atoms,
    model: ForceModel,
    settings: Relaxation,
    *,
    relax_cell: bool,
    keep_symmetry: bool,
    displacements: np.ndarray | None = None,
    hessian: np.ndarray | None = None,
    displacement_max_A: float | None = None,
) -> Relaxed:
    """Minimise the energy until every force is below ``fmax_eV_per_A``.

    Quasi-Newton steps begin with the force constants ``hessian`` [3N, 3N] in eV/Å², where these are known and the
    lattice is fixed.

    A structure that has not converged after ``steps_max`` is returned with ``converged`` 0.
    Raises :class:`PhysicsError` for a structure that explodes or that the potential cannot evaluate.
    """
    atoms = Atoms(start.numbers, start.positions, cell=start.cell, pbc=True)
    if displacements is not None:
        atoms.positions += displacements
    atoms.calc = calculator = ForceModelCalculator(model)
    if keep_symmetry:
        atoms.set_constraint(FixSymmetry(atoms))
    degrees = FrechetCellFilter(atoms) if relax_cell else atoms
    steps = 0
    with warnings.catch_warnings(action="ignore"):  # the cell filter takes a matrix logarithm on every step
        converged = False
        energy_of_start = atoms.get_potential_energy()
        start_forces = atoms.get_forces(apply_constraint=False) if _at_rest(displacements) else None
        for name, most in _schedule(settings):
            optimizer = _optimizer(name, degrees, None if relax_cell else hessian)
            for converged in optimizer.irun(fmax=settings.fmax_eV_per_A, steps=most):  # noqa: B007
                _require_intact(atoms, start, steps + optimizer.nsteps)
                if displacement_max_A is not None:
                    _require_on_sites(atoms, start, displacement_max_A)
            steps += optimizer.nsteps
            if converged:
                break
    energy = atoms.get_potential_energy()
    rise = (energy - energy_of_start) / len(atoms)
    if rise > ENERGY_RISE_eV_PER_ATOM:
        if settings.optimizer == "FIRE":
            raise PhysicsError(f"relaxation went uphill by {rise:.3g} eV per atom")
        # LBFGS also finds saddle points; FIRE follows the forces.
        downhill = settings.model_copy(update={"optimizer": "FIRE"})
        return _relax(
            start,
            model,
            downhill,
            relax_cell=relax_cell,
            keep_symmetry=keep_symmetry,
            displacements=displacements,
            displacement_max_A=displacement_max_A,
        )
    forces = atoms.get_forces(apply_constraint=False)
    quality = {
        "converged": int(converged),
        "relax_steps": int(steps),
        "residual_force_eV_per_A": float(np.linalg.norm(forces, axis=1).max()),
        "energy_eV_per_atom": float(energy / len(atoms)),
        "volume_change": float(atoms.get_volume() / start.get_volume() - 1),
        "relax_evaluations": calculator.evaluations,
    }
    if not relax_cell:  # with a moving lattice a displacement in Å has no meaning of its own
        quality["displacement_max_A"] = _displacement_max(atoms, start)
    relaxed = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=True)
    return Relaxed(relaxed, forces, start_forces, quality)


def _at_rest(displacements: np.ndarray | None) -> bool:
    return displacements is None or not np.any(displacements)


def _displacement_max(atoms: Atoms, start: Atoms) -> float:
    """Farthest way of an atom in Å, without what the whole crystal moves."""
    moved = atoms.positions - start.positions
    return float(np.linalg.norm(moved - moved.mean(axis=0), axis=1).max())


def _schedule(settings: Relaxation) -> list[tuple[str, int]]:
    """Optimisers and how many steps each may take, the next from where the last one stopped."""
    if settings.optimizer == "FIRE" or settings.steps_max <= LBFGS_STEPS_MAX:
        return [(settings.optimizer, settings.steps_max)]
    return [("LBFGS", LBFGS_STEPS_MAX), ("FIRE", settings.steps_max - LBFGS_STEPS_MAX)]


def _optimizer(name: str, degrees: Atoms | FrechetCellFilter, hessian: np.ndarray | None) -> Optimizer:
    """That optimiser; BFGS in place of LBFGS where there are force constants, which LBFGS has no room for."""
    if hessian is None or name != "LBFGS":
        return OPTIMIZERS[name](degrees, logfile=None)
    optimizer = BFGS(degrees, logfile=None)
    curvatures, modes = np.linalg.eigh(hessian)
    optimizer.H0 = (modes * np.maximum(np.abs(curvatures), CURVATURE_MIN_eV_PER_A2)) @ modes.T
    return optimizer


def _require_on_sites(atoms: Atoms, start: Atoms, allowed_A: float) -> None:
    """Raise :class:`PhysicsError` when an atom is farther than allowed from where it started."""
    if (moved := _displacement_max(atoms, start)) > allowed_A:
        raise PhysicsError(f"an atom leaves its site: {moved:.2f} Å away, {allowed_A:g} Å are allowed")


def _require_intact(atoms: Atoms, start: Atoms, step: int) -> None:
    """Raise :class:`PhysicsError` when the structure has left what a potential can describe."""
    growth = atoms.get_volume() / start.get_volume()
    if not 1 / VOLUME_FACTOR_MAX < growth < VOLUME_FACTOR_MAX:
        raise PhysicsError(f"relaxation exploded at step {step}: {growth:.3g} times the volume of the start")
    forces = atoms.get_forces(apply_constraint=False)
    if not np.all(np.isfinite(forces)):
        raise PhysicsError(f"relaxation exploded at step {step}: forces are not finite")
    largest = float(np.abs(forces).max())
    if largest > FORCE_LIMIT_eV_PER_A:
        raise PhysicsError(f"relaxation exploded at step {step}: a force component of {largest:.3g} eV/Å")
    contact = {
        (a, b): CONTACT_SHARE * (covalent_radii[a] + covalent_radii[b])
        for a in set(atoms.numbers)
        for b in set(atoms.numbers)
    }
    i, j, d = neighbor_list("ijd", atoms, contact)
    if len(d):
        pair = f"{atoms.symbols[i[0]]}-{atoms.symbols[j[0]]}"
        raise PhysicsError(f"relaxation exploded at step {step}: {pair} atoms {d[0]:.2f} Å apart")
