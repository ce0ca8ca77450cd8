"""Reference Hessians by finite differences, with as few displacements as symmetry allows.

phonopy (Togo & Tanaka, Scr. Mater. 108, 1 (2015)) finds the symmetry-inequivalent displacements and distributes the
force constants; the forces come from a potential in batches. Every other way to a Hessian is judged by this one.
"""

from __future__ import annotations

import errno
import io
import os
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from ase import Atoms
from ase.data import atomic_masses
from phonopy import Phonopy
from phonopy.harmonic.force_constants import compact_fc_to_full_fc
from phonopy.structure.atoms import PhonopyAtoms

from defectnet.config import Phonons
from defectnet.errors import PhysicsError
from defectnet.files import write_atomically
from defectnet.phonons.modes import Modes, diagonalise, stability
from defectnet.potentials.base import ForceModel
from defectnet.potentials.passes import Passes
from defectnet.progress import track

ONE_CELL = np.eye(3, dtype=int)
"""Expansion of a cell that is the supercell itself."""


@dataclass(frozen=True)
class Hessian:
    """Second derivatives of the energy of a supercell.

    matrix       : [3N, 3N] in eV/Å², symmetric, acoustic sum rule imposed.
    compact      : [n, N, 3, 3] rows of the n symmetry-independent (primitive-cell) atoms, as phonopy stores them.
    displacements: number of displaced structures that were evaluated, besides the undisplaced one.
    acoustic_residual_eV_per_A2: largest violation |Σ_j H_ij| before the sum rule was imposed.
    """

    matrix: np.ndarray
    compact: np.ndarray
    displacements: int
    acoustic_residual_eV_per_A2: float


def displaced(phonon: Phonopy) -> np.ndarray:
    """Displacements [D, N, 3] in Å of the atoms in phonopy's displaced supercells; one atom moves in each."""
    displacements = np.zeros((len(phonon.displacements), len(phonon.supercell), 3))
    for row, (atom, *displacement) in enumerate(phonon.displacements):
        displacements[row, atom] = displacement
    return displacements


def setup(primitive: Atoms, expansion: np.ndarray, settings: Phonons) -> Phonopy:
    """phonopy object with displacements for a supercell whose lattice is ``expansion @ primitive.cell`` (rows).

    For a doped supercell, ``primitive`` is that supercell and ``expansion`` the identity: phonopy then uses what
    symmetry the arrangement of dopants has left.
    """
    cell = PhonopyAtoms(numbers=primitive.numbers, positions=primitive.positions, cell=primitive.cell.array)
    # phonopy multiplies column vectors, hence the transpose.
    phonon = Phonopy(cell, np.asarray(expansion).T, primitive_matrix=np.eye(3), symprec=settings.symprec_A, log_level=0)
    back = "auto" if settings.displacements == "central" else False
    phonon.generate_displacements(distance=settings.displacement_A, is_plusminus=back)
    return phonon


def evaluate_forces(
    phonon: Phonopy,
    model: ForceModel,
    atoms_per_pass: int | Literal["auto"],
    checkpoint: Path | None = None,
) -> np.ndarray:
    """Forces [D, N, 3] in eV/Å of all displaced supercells, several per forward pass.

    ``atoms_per_pass`` is explained in :class:`~defectnet.potentials.passes.Passes`. With ``checkpoint``, rows are kept
    in that file as they come, and rows already in it are not computed again, so that a killed job loses one pass at
    most. The caller deletes the file once the result is safe.
    """
    displacements = displaced(phonon)
    cell = phonon.supercell
    atoms = Atoms(cell.numbers, cell.positions, cell=cell.cell, pbc=True)
    with ExitStack() as stack:
        if checkpoint is None:
            forces, file = np.full(displacements.shape, np.nan), None
        else:
            forces = _resume(checkpoint, displacements.shape)
            file = stack.enter_context(checkpoint.open("r+b"))
        missing = np.flatnonzero(np.isnan(forces).any(axis=(1, 2)))
        passes = Passes(model, atoms, atoms_per_pass)
        left = track(missing, f"forces of {atoms.get_chemical_formula()}")
        while rows := list(islice(left, passes.copies)):
            forces[rows] = passes.forces(displacements[rows])
            if file is not None:
                _keep(file, forces, rows)
    if not np.all(np.isfinite(forces)):
        raise PhysicsError("forces of displaced structures are not finite")
    return forces


def _resume(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Rows that an earlier attempt left in the file, the others NaN; a file that cannot be used is replaced."""
    forces = np.full(shape, np.nan)
    fresh = io.BytesIO()
    np.save(fresh, forces)
    try:
        # Same size and header as a fresh one: neither cut short nor of another structure.
        if path.stat().st_size == len(fresh.getvalue()):
            left = np.load(path)
            if left.shape == shape and left.dtype == float:
                # Blocks that a crash kept from the disk read as zeros; no displaced atom leaves all forces at zero.
                left[~left.any(axis=(1, 2))] = np.nan
                return left
    except (FileNotFoundError, ValueError):
        pass
    write_atomically(path, fresh.getvalue())
    return forces


def _keep(file: BinaryIO, forces: np.ndarray, rows: Sequence[int]) -> None:
    """Write rows to the file, and never look at it: another copy of this job may write to it from another node."""
    start = os.fstat(file.fileno()).st_size - forces.nbytes
    try:
        for row in rows:
            file.seek(start + row * forces[row].nbytes)
            file.write(forces[row].tobytes())
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno != errno.ESTALE:  # the other copy has finished and removed the file
            raise


def forces_at_rest(phonon: Phonopy, model: ForceModel) -> np.ndarray:
    """Forces [N, 3] in eV/Å of the undisplaced supercell."""
    cell = phonon.supercell
    return model.evaluate([Atoms(cell.numbers, cell.positions, cell=cell.cell, pbc=True)]).forces[0]


def force_constants(phonon: Phonopy, forces: np.ndarray, at_rest: np.ndarray | float = 0.0) -> Hessian:
    """Hessian from the forces [D, N, 3] on the displaced supercells and those on the undisplaced one.

    Forces ``at_rest`` would be divided by the displacement where symmetry saves the opposite one. A relaxed structure
    has few, but a potential that is not invariant under inversion leaves some even at a centre of inversion.
    Permutation symmetry and the acoustic sum rule are imposed together (phonopy's symmetrisation), because finite
    differences leave them violated by the noise of the forces; the violation is reported.
    """
    phonon.forces = forces - at_rest
    with warnings.catch_warnings(action="ignore"):
        phonon.produce_force_constants(calculate_full_force_constants=False)
        residual = float(np.abs(phonon.force_constants.sum(axis=1)).max())
        phonon.symmetrize_force_constants()
    compact = phonon.force_constants
    full = compact_fc_to_full_fc(phonon.primitive, compact)
    n = len(full)
    matrix = full.transpose(0, 2, 1, 3).reshape(3 * n, 3 * n)
    return Hessian(0.5 * (matrix + matrix.T), compact, len(forces), residual)


def finite_differences(
    phonon: Phonopy, model: ForceModel, atoms_per_pass: int | Literal["auto"], checkpoint: Path | None = None
) -> Hessian:
    """Hessian of the supercell that :func:`setup` made; see :func:`evaluate_forces` and :func:`force_constants`."""
    forces = evaluate_forces(phonon, model, atoms_per_pass, checkpoint)
    return force_constants(phonon, forces, forces_at_rest(phonon, model))


@dataclass(frozen=True)
class ReferencePhonons:
    """Γ modes of a supercell from its reference Hessian.

    ``quality`` names: displacements, acoustic_residual_eV_per_A2 and those of
    :func:`~defectnet.phonons.modes.stability`.
    """

    modes: Modes
    hessian: Hessian
    quality: dict[str, float]


def reference_phonons(
    atoms: Atoms,
    expansion: np.ndarray,
    model: ForceModel,
    settings: Phonons,
    atoms_per_pass: int | Literal["auto"],
    checkpoint: Path | None = None,
) -> ReferencePhonons:
    """Modes at Γ of the supercell ``expansion @ atoms.cell``; see :func:`setup` and :func:`evaluate_forces`.

    For a pristine host these are the modes at all wave vectors commensurate with the supercell.
    Raises :class:`PhysicsError` when forces are not finite.
    """
    phonon = setup(atoms, expansion, settings)
    hessian = finite_differences(phonon, model, atoms_per_pass, checkpoint)
    symbols = list(phonon.supercell.symbols)
    modes = diagonalise(hessian.matrix, atomic_masses[phonon.supercell.numbers], symbols)
    quality = {
        "displacements": hessian.displacements,
        "acoustic_residual_eV_per_A2": hessian.acoustic_residual_eV_per_A2,
    }
    return ReferencePhonons(modes, hessian, quality | stability(modes))
