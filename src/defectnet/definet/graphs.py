"""From periodic cells to what the network sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from ase.neighborlist import primitive_neighbor_list

from defectnet.errors import InputError
from defectnet.models.definet import HEAVIEST, Crystals
from defectnet.phonons.superposition import Superposition

if TYPE_CHECKING:
    from defectnet.definet.pairs import Pair


SOFTEST_eV_PER_A2 = 0.5
"""Softer and unstable modes count as this: no harmonic crystal says how far they go."""


def green_function(hessian: np.ndarray) -> np.ndarray:
    """Static Green's function [3N, 3N] in Å²/eV of a supercell at Γ, the inverse of its Hessian [3N, 3N] in eV/Å².

    Without rigid translations, and with curvatures of at least :data:`SOFTEST_eV_PER_A2`.
    """
    curvatures, modes = np.linalg.eigh(hessian)
    green = (modes / np.maximum(np.abs(curvatures), SOFTEST_eV_PER_A2)) @ modes.T
    blocks = green.reshape(len(green) // 3, 3, len(green) // 3, 3)
    blocks = blocks - blocks.mean(axis=0, keepdims=True)
    return (blocks - blocks.mean(axis=2, keepdims=True)).reshape(green.shape)


@lru_cache(maxsize=1024)
def green_of(lattice: Superposition, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """:func:`green_function` of a host's supercell, remembered."""
    return torch.tensor(green_function(lattice.hessian), dtype=dtype)


def graph_of(pair: Pair, cutoff_A: float, dtype: torch.dtype = torch.float64) -> Crystals:
    """The unrelaxed cell of a pair, with the host's Green's function and the forces on it where these are known."""
    green = None if pair.lattice is None else green_of(pair.lattice, dtype)
    structure = pair.numbers, pair.host_numbers, pair.positions, pair.cell
    return crystal_graph(*structure, cutoff_A, green, pair.forces).to(dtype)


def without_forces(graph: Crystals) -> Crystals:
    """The same, not told the forces on its cells."""
    return replace(graph, forces=tuple(one[:0] for one in graph.forces))


def crystal_graph(
    numbers: np.ndarray,
    host_numbers: np.ndarray,
    positions: np.ndarray,
    cell: np.ndarray,
    cutoff_A: float,
    green: torch.Tensor | None = None,
    forces: np.ndarray | None = None,
) -> Crystals:
    """One cell as a radius graph, all images within ``cutoff_A`` included; the three directions are periodic.

    Parameters: ``numbers`` and ``host_numbers`` [N], see :class:`Crystals`; ``positions`` [N, 3] and ``cell`` [3, 3] in
    Å, one vector per row; if known, :func:`green_function` of the host and ``forces`` [N, 3] in eV/Å on the sites.

    Raises :class:`InputError` for shapes that do not fit, elements that have no properties, a flat cell, or two sites
    in one place.
    """
    numbers, host_numbers = np.asarray(numbers), np.asarray(host_numbers)
    n = len(numbers)
    if host_numbers.shape != (n,) or np.shape(positions) != (n, 3) or n == 0:
        raise InputError(
            f"a cell of {n} sites needs as many elements of the perfect host and positions, but there are "
            f"{len(host_numbers)} and {len(positions)}; give one of each per site, ghosts of vacancies included"
        )
    if numbers.min() < 0 or host_numbers.min() < 1 or max(numbers.max(), host_numbers.max()) > HEAVIEST:
        raise InputError(
            f"atomic numbers must be 1 to {HEAVIEST}, 0 only at vacancies; got {sorted({*numbers, *host_numbers})}"
        )
    if forces is not None and (np.shape(forces) != (n, 3) or not np.isfinite(forces).all()):
        raise InputError(f"forces must be {n} finite vectors, one per site, 0 at vacancies")
    if abs(np.linalg.det(cell)) < 1e-6:
        raise InputError("the cell has no volume; give three lattice vectors that span space")
    target, source, vectors, lengths = primitive_neighbor_list(
        "ijDd", (True, True, True), np.asarray(cell, float), np.asarray(positions, float), cutoff_A
    )
    if len(lengths) and lengths.min() < 1e-2:
        worst = lengths.argmin()
        raise InputError(f"sites {target[worst]} and {source[worst]} are in one place; leave one of them out")
    return Crystals(
        numbers=torch.from_numpy(numbers.astype(np.int64)),
        host_numbers=torch.from_numpy(host_numbers.astype(np.int64)),
        target=torch.from_numpy(target.astype(np.int64)),
        source=torch.from_numpy(source.astype(np.int64)),
        vectors=torch.from_numpy(vectors.astype(np.float64)),
        crystal=torch.zeros(n, dtype=torch.int64),
        green=(torch.zeros(0, 0, dtype=torch.float64) if green is None else green,),
        forces=(torch.zeros(0, 3, dtype=torch.float64) if forces is None else torch.tensor(forces),),
    )


def batch(graphs: Sequence[Crystals]) -> Crystals:
    """Several batches as one."""
    sites = np.cumsum([0, *(len(graph.numbers) for graph in graphs)]).tolist()
    cells = np.cumsum([0, *(int(graph.crystal.max()) + 1 for graph in graphs)]).tolist()

    def joined(name: str, offsets: Sequence[int] | None = None) -> torch.Tensor:
        parts = [getattr(graph, name) for graph in graphs]
        if offsets is not None:
            parts = [part + offset for part, offset in zip(parts, offsets, strict=False)]
        return torch.cat(parts)

    return Crystals(
        numbers=joined("numbers"),
        host_numbers=joined("host_numbers"),
        target=joined("target", sites),
        source=joined("source", sites),
        vectors=joined("vectors"),
        crystal=joined("crystal", cells),
        green=tuple(one for graph in graphs for one in graph.green),
        forces=tuple(one for graph in graphs for one in graph.forces),
    )
