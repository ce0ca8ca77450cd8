"""Displaced copies of one structure: a single neighbour list with a skin serves them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import numpy as np
from ase import Atoms

Graph = TypeVar("Graph")

SKIN_STEP_A = 0.01


class SkinnedGraph(Generic[Graph]):
    """The graph of a structure, with edges up to a skin beyond the cutoff.

    ``build(atoms, skin)`` makes it, for a skin in Å. The last one is kept: passes over the copies of one structure
    follow each other, and on a CPU a pass often holds a single copy.
    """

    def __init__(self, build: Callable[[Atoms, float], Graph]):
        self._build = build
        self._key: tuple[Atoms, float] | None = None

    def __call__(self, atoms: Atoms, displacements: np.ndarray) -> Graph:
        """A graph of ``atoms`` that has every edge of its copies, which ``displacements`` [K, N, 3] in Å make."""
        needed = 2 * float(np.linalg.norm(displacements, axis=-1).max())  # two atoms that approach each other
        # In steps, because equal displacements differ in their last digits; never a longer one that happens to be
        # there, because the order of the edges, and with it the last bit of the forces, would depend on the past.
        skin = SKIN_STEP_A * np.ceil(needed / SKIN_STEP_A + 0.1)
        if self._key != (atoms, skin):
            self._key = (atoms.copy(), skin)
            self._graph = self._build(*self._key)
        return self._graph


def displaced_vectors(vectors: Any, i: Any, j: Any, displacements: Any) -> Any:
    """Vectors [K, E, 3] of the edges from i [E] to j [E] in K copies; arrays of numpy or tensors of torch.

    ``vectors`` [E, 3] are those of the structure itself and ``displacements`` [K, N, 3] those of its atoms, in Å. All
    are float64, whatever the model computes in, so that a copy has the edges and distances of a structure of its own.
    """
    return vectors + displacements[:, j] - displacements[:, i]


def places(kept: Any) -> Any:
    """Where each entry of a mask [K, E], a tensor of torch, stands among those that are kept, copy after copy."""
    return (kept.flatten().cumsum(0) - 1).reshape(kept.shape)
