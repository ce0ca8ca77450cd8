"""Using a trained network: where the atoms of a doped cell go, in one step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from ase import Atoms
from ase.geometry import get_distances

from defectnet.definet.fit import Trained, predict_moves
from defectnet.definet.graphs import crystal_graph, green_of
from defectnet.errors import InputError
from defectnet.models.definet import NOTHING
from defectnet.phonons.superposition import Superposition

SAME_SITE_A = 0.5
"""An atom that is no farther from a site of the host than this sits on it."""

SAME_CELL_A = 0.05


@dataclass(frozen=True)
class OneStep:
    """Predicted relaxed ``positions`` [N, 3] and expected lengths of their errors ``error_A`` [N], both in Å."""

    positions: np.ndarray
    error_A: np.ndarray


def relax_in_one_step(
    trained: Trained,
    atoms: Atoms,
    host_numbers: np.ndarray,
    lattice: Superposition | None = None,
    forces: np.ndarray | None = None,
    dtype: torch.dtype = torch.float32,
) -> OneStep:
    """Relaxed positions of ``atoms``, which stand on the sites of their perfect, relaxed host.

    ``host_numbers`` [N] are the atomic numbers there; with those of the atoms they say which sites are perfect,
    substituted, or vacant: a vacancy is an atom "X" (number 0), its position is returned as it is. ``lattice`` is the
    host's supercell with its force constants, its sites in the same order; with it, answers are much better, and
    better still with the potential's ``forces`` [N, 3] in eV/Å on the atoms where they stand, 0 at vacancies. The
    lattice stays, and so does the centre of the atoms (not of mass).

    Raises :class:`InputError` as :func:`~defectnet.definet.graphs.crystal_graph` does, and for cells that are not
    periodic.
    """
    if not atoms.pbc.all():
        raise InputError(f"{atoms.symbols}: not periodic in all directions; set its cell and pbc=True")
    cutoff_A = trained.models[0].config["cutoff_A"]
    green = None if lattice is None else green_of(lattice, dtype)
    structure = atoms.numbers, host_numbers, atoms.positions, atoms.cell.array
    graph = crystal_graph(*structure, cutoff_A, green, forces)
    displacements, error = predict_moves([model.to(dtype) for model in trained.models], graph.to(dtype))
    if lattice is not None:
        displacements += trained.corrections[forces is not None](lattice, atoms.numbers)
    error = np.where(atoms.numbers == NOTHING, 0, trained.calibration * error)
    return OneStep(atoms.positions + displacements, error)


def on_host_sites(doped: Atoms, host: Atoms) -> tuple[Atoms, np.ndarray]:
    """A doped cell with ghosts "X" after its atoms where sites of the host are vacant, and host numbers [N].

    Raises :class:`InputError` where the cells differ or an atom is on no site.
    """
    off = np.abs(doped.cell.array - host.cell.array).max()
    if off > SAME_CELL_A:
        raise InputError(
            f"{doped.symbols}: its lattice vectors differ from the host's by up to {off:.2g} Å; give the host in the "
            "same cell"
        )
    distances = get_distances(doped.positions, host.positions, cell=host.cell, pbc=True)[1]
    site = distances.argmin(axis=1)
    far = distances[np.arange(len(doped)), site]
    if far.max() > SAME_SITE_A or len(set(site.tolist())) < len(site):
        worst = int(far.argmax())
        raise InputError(
            f"{doped.symbols}: atom {worst} ({doped.symbols[worst]}) is {far[worst]:.2f} Å from the nearest site of "
            "the host, or two atoms share one; give the unrelaxed cell; interstitials are not supported"
        )
    vacant = np.setdiff1d(np.arange(len(host)), site)
    ghosts = Atoms(np.full(len(vacant), NOTHING), host.positions[vacant])
    whole = Atoms(doped.numbers, doped.positions, cell=host.cell, pbc=True) + ghosts
    return whole, np.concatenate([host.numbers[site], host.numbers[vacant]])
