"""Phonons of a relaxed doped supercell: a Hessian by probing or finite differences, followed where it is unstable."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from ase import Atoms

from defectnet.config import Phonons, Relaxation
from defectnet.phonons.hessian import ONE_CELL, finite_differences, setup
from defectnet.phonons.modes import Modes, diagonalise, lowest_mode, stability
from defectnet.phonons.probing import PRODUCTS_MIN, probe
from defectnet.phonons.superposition import Superposition
from defectnet.potentials.base import ForceModel, HasHessianVectorProduct
from defectnet.relaxation import relax_doped
from defectnet.supercells import Plan

log = logging.getLogger(__name__)

FOLLOW_BELOW_meV = -1.0
"""Modes below are followed; those between this and zero are too soft to lead anywhere that force noise does not."""

FOLLOW_STEP_A = 0.1
"""Largest displacement of an atom along a mode that is followed."""

ENERGY_GAIN_eV = 1e-4
"""Energy of the supercell that following a mode must gain at least."""

PROBING_SHARE = 0.5
"""What probing may cost at most, as a share of all finite differences, which take over where it fails."""


@dataclass(frozen=True)
class DopedPhonons:
    """Modes of a doped supercell.

    atoms    : the structure they belong to; another minimum than the one given where an unstable mode was followed
    fidelity : ``direct`` or ``probed``
    quality  : that of :func:`~defectnet.phonons.modes.stability`; force_evaluations (a Hessian-vector product counts
               as two); followed, the number of modes that led to a lower minimum; of finite differences
               displacements and acoustic_residual_eV_per_A2; of probing probing_error and probes
    """

    modes: Modes
    atoms: Atoms
    fidelity: str
    quality: dict[str, float]


def doped_phonons(
    atoms: Atoms,
    model: ForceModel,
    relaxation: Relaxation,
    phonons: Phonons,
    atoms_per_pass: int | Literal["auto"],
    superposition: tuple[Superposition, Plan] | None,
    follow: int,
    rng: np.random.Generator,
    checkpoint: Path | None = None,
    repeat: Callable[[np.ndarray], Modes] | None = None,
) -> DopedPhonons:
    """Γ modes of a relaxed doped supercell, or those that ``repeat`` makes of its Hessian.

    With a ``superposition`` and the plan of the cell, the superposed Hessian is refined by probing; without, or when
    probing would miss ``phonons.probing_tolerance`` at half their price, finite differences give it all. An unstable
    mode is followed downhill and the structure relaxed again, at most ``follow`` times; what is unstable after that
    stays so, with negative energies. Raises :class:`PhysicsError` as relaxation and Hessian do.
    """
    followed, evaluations = 0, 0
    while True:
        hessian, fidelity, quality = _hessian(atoms, model, phonons, atoms_per_pass, superposition, rng, checkpoint)
        evaluations += quality.pop("force_evaluations")
        modes = diagonalise(hessian, atoms.get_masses(), list(atoms.symbols))
        if followed == follow or modes.energies_meV[0] > FOLLOW_BELOW_meV:
            break
        lower, cost = _downhill(atoms, hessian, model, relaxation)
        evaluations += cost
        if lower is None:
            break
        atoms, followed = lower, followed + 1
        checkpoint = None  # a job that is killed and starts again would take these forces for the first structure's
    if repeat is not None:
        modes = repeat(hessian)
    quality |= stability(modes) | {"force_evaluations": evaluations, "followed": followed}
    return DopedPhonons(modes, atoms, fidelity, quality)


def _hessian(
    atoms: Atoms,
    model: ForceModel,
    phonons: Phonons,
    atoms_per_pass: int | Literal["auto"],
    superposition: tuple[Superposition, Plan] | None,
    rng: np.random.Generator,
    checkpoint: Path | None,
) -> tuple[np.ndarray, str, dict[str, float]]:
    quality: dict[str, float] = {"force_evaluations": 0}
    phonon = setup(atoms, ONE_CELL, phonons)
    products = min(phonons.probes_max, int(PROBING_SHARE * len(phonon.displacements)) // 2)
    if superposition is not None and isinstance(model, HasHessianVectorProduct) and products >= PRODUCTS_MIN:
        superpose, plan = superposition
        probed = probe(superpose, plan, atoms, model, phonons.probing_tolerance, products, rng)
        quality = {"probes": probed.products, "probing_error": probed.error, "force_evaluations": 2 * probed.products}
        if probed.error <= phonons.probing_tolerance:
            return probed.hessian, "probed", quality
        log.info("probing left an error of %.3f; computing all force constants", probed.error)
    direct = finite_differences(phonon, model, atoms_per_pass, checkpoint)
    quality["force_evaluations"] += direct.displacements + 1
    quality["displacements"] = direct.displacements
    quality["acoustic_residual_eV_per_A2"] = direct.acoustic_residual_eV_per_A2
    return direct.matrix, "direct", quality


def _downhill(atoms: Atoms, hessian: np.ndarray, model: ForceModel, relaxation: Relaxation) -> tuple[Atoms | None, int]:
    """A lower minimum along the most unstable mode, or None, and the force evaluations that it took."""
    direction = lowest_mode(hessian, atoms.get_masses())
    direction *= FOLLOW_STEP_A / np.linalg.norm(direction, axis=1).max()
    before = float(model.evaluate([atoms]).energies[0])
    pushed = atoms.copy()
    pushed.positions += direction
    # LBFGS would slide back to the saddle point; FIRE follows the forces.
    relaxed = relax_doped(pushed, model, relaxation.model_copy(update={"optimizer": "FIRE"}))
    cost = 1 + int(relaxed.quality["relax_evaluations"])
    gain = before - relaxed.quality["energy_eV_per_atom"] * len(atoms)
    found = relaxed.quality["converged"] and gain > ENERGY_GAIN_eV
    log.info("followed an unstable mode: %.4f eV %s", abs(gain), "lower" if found else "and no lower minimum")
    return (relaxed.atoms if found else None), cost
