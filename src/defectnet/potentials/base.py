"""What every machine-learned potential offers to the rest of the package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes

from defectnet.errors import PhysicsError


@dataclass(frozen=True)
class Identity:
    """What determines the numbers of a potential; known without loading it and part of every record's key.

    ``weights`` is the SHA-256 of the checkpoint file (or of the parameters of an analytic potential).
    """

    name: str
    model: str
    weights: str
    dtype: str

    def as_dict(self) -> dict[str, str]:
        """Plain mapping for digests and headers."""
        return asdict(self)


@dataclass(frozen=True)
class Evaluation:
    """Results for B structures: energies [B] in eV, forces B x [N_i, 3] in eV/Å, stresses [B, 3, 3] in eV/Å³.

    Stress has ASE's sign: dE/dε / V, positive under tension.
    """

    energies: np.ndarray
    forces: list[np.ndarray]
    stresses: np.ndarray


class ForceModel(Protocol):
    """A potential ready to evaluate structures.

    Attributes: ``identity``; ``package`` and ``device`` for the cost part of records; ``cutoff_A``, the range of one
    interaction layer; ``elements``, the symbols it knows.
    """

    identity: Identity
    package: str
    device: str
    cutoff_A: float
    elements: frozenset[str]

    def evaluate(self, structures: Sequence[Atoms]) -> Evaluation:
        """Energies, forces and stresses of structures of any sizes, in one forward pass.

        Raises :class:`PhysicsError` for elements outside :attr:`elements`.
        """
        ...

    def forces_of_displaced(self, atoms: Atoms, displacements: np.ndarray) -> np.ndarray:
        """Forces [K, N, 3] in eV/Å of K copies of ``atoms``, in one forward pass: those of :meth:`evaluate`, faster.

        ``displacements`` [K, N, 3] in Å move the atoms of each copy, by about 0.1 Å at most: all copies share one
        neighbour list, with a skin of twice the largest displacement. Raises as :meth:`evaluate` does.
        """
        ...


@runtime_checkable
class HasHessianVectorProduct(Protocol):
    """Potentials that can apply their exact Hessian to vectors without building it."""

    def hessian_vector_products(self, atoms: Atoms, vectors: np.ndarray) -> np.ndarray:
        """H v for each of K vectors [K, N, 3] (Å): [K, N, 3] in eV/Å."""
        ...


def require_elements(model: ForceModel, structures: Sequence[Atoms]) -> None:
    """Raise :class:`PhysicsError` naming the elements that the potential does not know."""
    unknown = {symbol for atoms in structures for symbol in atoms.symbols} - model.elements
    if unknown:
        raise PhysicsError(f"{model.identity.name} {model.identity.model} does not know {', '.join(sorted(unknown))}")


class ForceModelCalculator(Calculator):
    """ASE calculator of a :class:`ForceModel`, for ASE's optimisers. Counts its evaluations."""

    implemented_properties = ("energy", "free_energy", "forces", "stress")

    def __init__(self, model: ForceModel):
        super().__init__()
        self.model = model
        self.evaluations = 0

    def calculate(self, atoms: Atoms | None = None, properties: Any = None, system_changes: Any = all_changes) -> None:
        """Evaluate one structure."""
        super().calculate(atoms, properties, system_changes)
        result = self.model.evaluate([self.atoms])
        self.evaluations += 1
        energy = float(result.energies[0])
        stress = result.stresses[0]
        voigt = stress[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
        self.results = {"energy": energy, "free_energy": energy, "forces": result.forces[0], "stress": voigt}
