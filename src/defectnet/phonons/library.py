"""Single-defect library: what one substitution does to the crystal around it.

For each host and each (inequivalent site, dopant): the relaxed displacements and the change of the Hessian, computed
with as few displacements as the site symmetry of the defect allows, cut off at a tolerance. A vacancy is one of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from ase import Atoms

from defectnet.config import Phonons, Relaxation
from defectnet.dopants import Candidate
from defectnet.phonons.blocks import Blocks, cut_out, fold, put_back, unfold
from defectnet.phonons.crystal import Folding, space_group
from defectnet.phonons.hessian import ONE_CELL, reference_phonons
from defectnet.phonons.superposition import Defect
from defectnet.potentials.base import ForceModel
from defectnet.relaxation import Relaxed, relax_defect
from defectnet.supercells import Plan, apply


@dataclass(frozen=True)
class SingleDefect:
    """A computed defect: what superposition needs, the relaxed supercell, and quality (see the two modules it is from).

    ``blocks_dropped`` in the quality is the share of ΔH (Frobenius norm) that the tolerance cut off.
    """

    defect: Defect
    start: Atoms
    relaxed: Relaxed
    quality: dict[str, float]


def inequivalent_sites(primitive: Atoms, candidates: Iterable[Candidate]) -> list[tuple[int, str]]:
    """Every (site, dopant) that the candidates can occupy; site is the first of its symmetry-equivalent atoms."""
    sites = sorted(set(space_group(primitive).sites.tolist()))
    return [(site, c.dopant) for c in candidates for site in sites if primitive.symbols[site] == c.replaces]


def single_defect(
    folding: Folding,
    site: int,
    dopant: str,
    host_hessian: np.ndarray,
    model: ForceModel,
    relaxation: Relaxation,
    phonons: Phonons,
    tolerance_eV_per_A2: float,
    atoms_per_pass: int | Literal["auto"],
    checkpoint: Path | None = None,
    displacement_max_A: float | None = None,
    force_constants: bool = True,
) -> SingleDefect:
    """Relax one substitution in the supercell ``folding`` and find its ΔH to ``host_hessian`` [3N, 3N] in eV/Å².

    ``checkpoint`` is that of :func:`~defectnet.phonons.hessian.evaluate_forces`. Without ``force_constants`` it is only
    relaxed, and ΔH has no blocks.
    Raises :class:`PhysicsError` as relaxation and Hessian do, and where an atom moves by more than
    ``displacement_max_A``.
    """
    plan, n_sites = Plan.single(folding.parent, site, dopant), len(folding)
    (origin,) = plan.sites
    start, kept = apply(plan, folding.atoms), plan.occupied(n_sites)
    relaxed = relax_defect(start, model, relaxation, cut_out(host_hessian, kept), displacement_max_A)
    blocks, quality = Blocks.none(), relaxed.quality
    if force_constants:
        result = reference_phonons(relaxed.atoms, ONE_CELL, model, phonons, atoms_per_pass, checkpoint)
        change = put_back(result.hessian.matrix, kept, n_sites) - host_hessian
        blocks = unfold(folding, origin, change, tolerance_eV_per_A2)
        recovered = np.zeros_like(change)
        fold(blocks, folding, recovered)
        dropped = float(np.linalg.norm(recovered - change) / np.linalg.norm(change))
        quality = quality | result.quality | {"blocks_dropped": dropped}
    moved = relaxed.atoms.positions - start.positions
    displacements = np.zeros((n_sites, 3))
    displacements[kept] = moved - moved.mean(axis=0)
    addresses = np.column_stack([folding.parent, folding.lattice - folding.lattice[origin]])
    defect = Defect(site, dopant, addresses, displacements, blocks)
    return SingleDefect(defect, start, relaxed, quality)
