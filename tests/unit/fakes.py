"""Models that misbehave on purpose, and hosts small enough for seconds."""

from __future__ import annotations

import numpy as np

from defectnet.hosts.sheet import Host
from defectnet.potentials.base import Evaluation


class Wrapped:
    """A force model that counts passes and structures of another one; subclasses change what comes back."""

    def __init__(self, inner):
        self.inner = inner
        self.identity, self.package, self.device = inner.identity, inner.package, inner.device
        self.cutoff_A, self.elements = inner.cutoff_A, inner.elements
        self.calls = 0
        self.structures = []

    def evaluate(self, structures):
        self.calls += 1
        self.structures += [atoms.copy() for atoms in structures]
        return self.changed(self.inner.evaluate(structures))

    def forces_of_displaced(self, atoms, displacements):
        self.calls += 1
        for displacement in displacements:
            self.structures.append(atoms.copy())
            self.structures[-1].positions += displacement
        forces = list(self.inner.forces_of_displaced(atoms, displacements))
        result = Evaluation(np.full(len(forces), np.nan), forces, np.full((len(forces), 3, 3), np.nan))
        return np.array(self.changed(result).forces)

    def changed(self, result: Evaluation) -> Evaluation:
        """What comes back; of displaced copies, there are forces only."""
        return result


class Interrupted(Wrapped):
    """Is killed in call number ``after + 1``."""

    def __init__(self, inner, after):
        super().__init__(inner)
        self.after = after

    def changed(self, result):
        if self.calls > self.after:
            raise KeyboardInterrupt
        return result


class Broken(Wrapped):
    """Puts ``value`` into one force component from call number ``after + 1`` on."""

    def __init__(self, inner, value, after=0):
        super().__init__(inner)
        self.value, self.after = value, after

    def changed(self, result):
        forces = [force.copy() for force in result.forces]
        if self.calls > self.after:
            forces[-1][0, 1] = self.value
        return Evaluation(result.energies, forces, result.stresses)


def rock_salt(host_id: str, cation: str, anion: str, a: float) -> Host:
    """A host sheet's row of a rock salt."""
    return Host(
        id=host_id,
        formula=cation + anion,
        family="rock salt",
        spacegroup="Fm-3m",
        a=a,
        b=a,
        c=a,
        alpha=90.0,
        beta=90.0,
        gamma=90.0,
        sites=f"{cation} 4a 0 0 0; {anion} 4b 1/2 1/2 1/2",
        n_atoms=2,
        source="curated",
    )


def blocks(matrix: np.ndarray) -> np.ndarray:
    """[3N, 3N] as [N, N, 3, 3]."""
    n = len(matrix) // 3
    return matrix.reshape(n, 3, n, 3).transpose(0, 2, 1, 3)


def exact_hessian(model, atoms) -> np.ndarray:
    """[3N, 3N] in eV/Å² from Hessian-vector products with unit vectors."""
    n = 3 * len(atoms)
    return model.hessian_vector_products(atoms, np.eye(n).reshape(n, -1, 3)).reshape(n, n)
