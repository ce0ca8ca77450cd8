"""What a network has to be better than: forces that grow with the misfit of radii, spread by one law for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ase.data import covalent_radii

from defectnet.definet.graphs import crystal_graph
from defectnet.definet.pairs import Pair

REACH_A = 7.0
FUNCTIONS = 10
RIDGE = 1e-2


@dataclass(frozen=True)
class RadiusScaling:
    """Every defect pushes its surroundings away, in proportion to how much larger it is than what it replaces.

    u_i = Σ_d (R_d - R_host) f(r_id) n_id, with covalent radii R (0 of a vacancy) and unit vectors n_id away from the
    defect. f is a sum of Gaussians: ``common`` [K] by least squares over all training pairs, plus what improves it in a
    known host, ``own`` [K] by host.
    """

    common: np.ndarray
    own: dict[str, np.ndarray]

    @classmethod
    def fit(cls, pairs: Sequence[Pair]) -> RadiusScaling:
        """By ridge regression, first over all pairs, then over what is left within each host."""
        designs = {pair.id: _design(pair) for pair in pairs}
        common = _ridge([designs[pair.id] for pair in pairs], [pair.displacements for pair in pairs])
        own = {}
        for host in {pair.host for pair in pairs}:
            some = [pair for pair in pairs if pair.host == host]
            left = [pair.displacements - designs[pair.id] @ common for pair in some]
            own[host] = _ridge([designs[pair.id] for pair in some], left)
        return cls(common, own)

    def __call__(self, pair: Pair) -> np.ndarray:
        """Displacements [N, 3] in Å."""
        return _design(pair) @ (self.common + self.own.get(pair.host, 0))


def _design(pair: Pair) -> np.ndarray:
    """[N, 3, K] displacements by each Gaussian alone, without rigid translation."""
    graph = crystal_graph(pair.numbers, pair.host_numbers, pair.positions, pair.cell, REACH_A)
    source, target, vectors = (array.numpy() for array in (graph.source, graph.target, graph.vectors))
    radii = np.where(np.arange(len(covalent_radii)) == 0, 0, covalent_radii)
    misfit = radii[pair.numbers] - radii[pair.host_numbers]
    chosen = (misfit[source] != 0) & pair.atoms[target]
    source, target, vectors = source[chosen], target[chosen], vectors[chosen]
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    centres = np.linspace(1, REACH_A, FUNCTIONS)
    laws = np.exp(-0.5 * ((length - centres) / (centres[1] - centres[0])) ** 2)
    design = np.zeros((len(pair.numbers), 3, FUNCTIONS))
    np.add.at(design, target, -(vectors / length)[:, :, None] * (misfit[source, None] * laws)[:, None])
    design[pair.atoms] -= design[pair.atoms].mean(axis=0)
    return design


def _ridge(designs: list[np.ndarray], targets: list[np.ndarray]) -> np.ndarray:
    gram = sum(np.einsum("nik,nil->kl", design, design) for design in designs)
    aim = sum(np.einsum("nik,ni->k", design, target) for design, target in zip(designs, targets, strict=True))
    return np.linalg.solve(gram + RIDGE * np.eye(len(gram)), aim)
