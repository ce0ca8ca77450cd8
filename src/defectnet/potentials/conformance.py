"""What every potential must satisfy, whatever its weights: symmetries, derivatives, batching, failure modes.

``run(model)`` takes under a minute on one core and needs nothing but the model. The test system is a small, distorted
zinc-blende cell of two elements that the model knows; its cell is shorter than usual cutoffs, so that periodic images
are tested as well. All checks compare the model with itself: they say nothing about its accuracy.

Derivatives are checked against the five-point central difference: its error, h⁴ f⁽⁵⁾/30, allows a step long enough
for the rounding of float32 energies.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from ase import Atoms, units
from ase.build import make_supercell
from ase.data import atomic_numbers, chemical_symbols, covalent_radii
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.md.verlet import VelocityVerlet
from scipy.spatial.transform import Rotation

from defectnet.errors import PhysicsError
from defectnet.potentials.base import Evaluation, ForceModel, ForceModelCalculator, HasHessianVectorProduct

SEED = 20250602
PAIRS = (("Si", "C"), ("Ga", "N"), ("Mg", "O"), ("Na", "Cl"))
"""Preferred elements of the test system; otherwise the first two that the model knows."""

# Five-point first derivative: Σ weight f(x + offset h) / h.
OFFSETS = np.array([-2.0, -1.0, 1.0, 2.0])
WEIGHTS = np.array([1.0, -8.0, 8.0, -1.0]) / 12


@dataclass(frozen=True)
class Tolerances:
    """Largest deviations that count as rounding, for one floating-point type.

    Energies in eV/atom, forces in eV/Å, stresses in eV/Å³, each for quantities of order one; forces and stresses are
    scaled with the largest component where that exceeds one. ``energy_step`` and ``force_step`` are the lengths in Å of
    finite differences of energies (for strains: a tenth of it) and forces, ``*_difference`` what they allow.

    float32 carries 7 digits: total energies of 60 eV are known to 4e-6 eV (differences of energies are allowed that on
    top), forces are sums of thousands of terms, and positions are rounded to 2e-7 Å. Its steps balance that against
    the roughness of the potential: CHGNet varies on a scale of 0.01 Å. In float64 neither matters.
    """

    energy: float
    force: float
    stress: float
    energy_step: float
    force_step: float
    force_difference: float
    stress_difference: float
    hessian_difference: float


TOLERANCES = {
    "float32": Tolerances(1e-5, 2e-4, 2e-5, 1e-2, 5e-3, 5e-3, 5e-4, 2e-2),
    "float64": Tolerances(1e-9, 1e-8, 1e-9, 2e-4, 2e-4, 1e-6, 1e-7, 1e-5),
}


@dataclass(frozen=True)
class Result:
    """Outcome of one check: ``passed`` is None where it was skipped, and ``explanation`` then says why.

    ``value`` is what was measured and ``tolerance`` the largest value that passes, both in ``unit``.
    """

    name: str
    passed: bool | None
    value: float
    tolerance: float
    unit: str
    explanation: str


class _Skipped(Exception):  # noqa: N818  not an error
    """Raised by a check that does not apply, with the reason."""


Measured = tuple[float, float, str, str]  # value, tolerance, unit, explanation


def run(model: ForceModel, atoms: Atoms | None = None) -> list[Result]:
    """Run every check on ``model``, optionally on a structure of one's own (periodic, about ten atoms).

    Nothing is raised for a failing model: a check that raises an exception has failed, and its text is the explanation.
    """
    suite = _Suite(model, atoms)
    return [_result(name, check) for name, check in suite.checks().items()]


def _result(name: str, check: Callable[[], Measured]) -> Result:
    try:
        value, tolerance, unit, explanation = check()
    except _Skipped as reason:
        return Result(name, None, float("nan"), float("nan"), "", str(reason))
    except Exception as error:
        return Result(name, False, float("nan"), float("nan"), "", f"{type(error).__name__}: {error}")
    # Written so that a NaN fails.
    return Result(name, bool(value <= tolerance), float(value), float(tolerance), unit, explanation)


def specimen(elements: frozenset[str], rng: np.random.Generator) -> Atoms:
    """Eight atoms of a zinc-blende cell of two of ``elements``, rattled by 0.05 Å and deformed by 2 %.

    Bonds are 6 % longer than the sum of covalent radii, which keeps the shells of SiC away from the inner cutoffs of
    common potentials (3 Å for the angles of CHGNet, 4 Å for those of MatterSim): third derivatives jump there.
    """
    known = sorted(elements, key=lambda symbol: atomic_numbers[symbol])
    pair = next((pair for pair in PAIRS if elements.issuperset(pair)), (known[0], known[min(1, len(known) - 1)]))
    bond = 1.06 * sum(covalent_radii[atomic_numbers[symbol]] for symbol in pair)
    faces = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
    cell = np.eye(3) * bond * 4 / np.sqrt(3)
    atoms = Atoms(
        [pair[0]] * 4 + [pair[1]] * 4, scaled_positions=np.concatenate([faces, faces + 0.25]), cell=cell, pbc=True
    )
    atoms.set_cell(cell @ (np.eye(3) + rng.uniform(-0.02, 0.02, (3, 3))), scale_atoms=True)
    atoms.positions += rng.normal(0, 0.05, atoms.positions.shape)
    return atoms


class _Suite:
    """The model, the test system and its evaluation, shared by the checks."""

    def __init__(self, model: ForceModel, atoms: Atoms | None):
        self.model = model
        self.tolerances = TOLERANCES[model.identity.dtype]
        self.rng = np.random.default_rng(SEED)
        self.atoms = specimen(model.elements, self.rng) if atoms is None else atoms.copy()
        self.n = len(self.atoms)
        self._base: Evaluation | None = None

    @property
    def base(self) -> Evaluation:
        if self._base is None:
            self._base = self.model.evaluate([self.atoms])
        return self._base

    def checks(self) -> dict[str, Callable[[], Measured]]:
        return {
            "translation": self.translation,
            "rotation": self.rotation,
            "permutation": self.permutation,
            "extensivity": self.extensivity,
            "momentum": self.momentum,
            "forces": self.forces,
            "stress": self.stress,
            "hessian-vector product": self.hessian_vector_product,
            "batch": self.batch,
            "displaced copies": self.displaced_copies,
            "determinism": self.determinism,
            "dtype": self.dtype,
            "energy conservation": self.energy_conservation,
            "isolated atom": self.isolated_atom,
            "unknown element": self.unknown_element,
        }

    def _deviation(self, got: Evaluation, energy: float, forces: np.ndarray, stress: np.ndarray) -> float:
        """Largest deviation from what is expected, in units of its tolerance."""
        t = self.tolerances
        return max(
            abs(float(got.energies[0]) - energy) / len(forces) / t.energy,
            float(np.abs(got.forces[0] - forces).max()) / (t.force * _scale(forces)),
            float(np.abs(got.stresses[0] - stress).max()) / (t.stress * _scale(stress)),
        )

    def _expectation(self) -> tuple[float, np.ndarray, np.ndarray]:
        return float(self.base.energies[0]), self.base.forces[0], self.base.stresses[0]

    def _energies(self, structures: Sequence[Atoms]) -> np.ndarray:
        return self.model.evaluate(structures).energies

    def translation(self) -> Measured:
        moved = self.atoms.copy()
        moved.positions += [1.234, -0.567, 7.89]  # out of the cell as well
        energy, forces, stress = self._expectation()
        value = self._deviation(self.model.evaluate([moved]), energy, forces, stress)
        return value, 1, "tolerances", "a shift of all atoms, beyond the cell, changes nothing"

    def rotation(self) -> Measured:
        turn = Rotation.random(rng=self.rng).as_matrix()
        turned = self.atoms.copy()
        turned.set_cell(self.atoms.cell @ turn.T)
        turned.positions = self.atoms.positions @ turn.T
        energy, forces, stress = self._expectation()
        value = self._deviation(self.model.evaluate([turned]), energy, forces @ turn.T, turn @ stress @ turn.T)
        return value, 1, "tolerances", "energy invariant, forces turn as vectors, stress as a tensor"

    def permutation(self) -> Measured:
        order = self.rng.permutation(self.n)
        energy, forces, stress = self._expectation()
        value = self._deviation(self.model.evaluate([self.atoms[order]]), energy, forces[order], stress)
        return value, 1, "tolerances", "another order of the atoms permutes the forces and changes nothing else"

    def extensivity(self) -> Measured:
        matrix = np.array([[1, 1, 0], [-1, 1, 0], [0, 0, 1]])  # two cells, sheared
        large = make_supercell(self.atoms, matrix, order="cell-major")
        energy, forces, stress = self._expectation()
        value = self._deviation(self.model.evaluate([large]), 2 * energy, np.tile(forces, (2, 1)), stress)
        return value, 1, "tolerances", "two cells: twice the energy, the same forces and stress"

    def momentum(self) -> Measured:
        forces = self.base.forces[0]
        value = float(np.abs(forces.sum(axis=0)).max()) / self.n
        return value, self.tolerances.force * _scale(forces), "eV/Å", "the forces sum to zero (per atom)"

    def forces(self) -> Measured:
        t, worst, largest = self.tolerances, 0.0, 0.0
        for direction in self._directions(3):
            structures = []
            for offset in OFFSETS:
                atoms = self.atoms.copy()
                atoms.positions += offset * t.energy_step * direction
                structures.append(atoms)
            numerical = -(WEIGHTS @ self._energies(structures)) / t.energy_step
            analytical = float((self.base.forces[0] * direction).sum())
            worst, largest = max(worst, abs(numerical - analytical)), max(largest, abs(analytical))
        explanation = f"forces along three random directions are the slope of the energy; largest {largest:.2g} eV/Å"
        tolerance = t.force_difference * _scale(self.base.forces[0]) + self._energy_rounding() / t.energy_step
        return worst, tolerance, "eV/Å", explanation

    def stress(self) -> Measured:
        t, volume, stress = self.tolerances, self.atoms.get_volume(), self.base.stresses[0]
        step = t.energy_step / 10
        worst = float(np.abs(stress - stress.T).max())
        for _ in range(3):
            strain = self.rng.normal(size=(3, 3))
            strain = (strain + strain.T) / np.linalg.norm(strain + strain.T)
            structures = []
            for offset in OFFSETS:
                atoms = self.atoms.copy()
                atoms.set_cell(atoms.cell @ (np.eye(3) + offset * step * strain), scale_atoms=True)
                structures.append(atoms)
            numerical = (WEIGHTS @ self._energies(structures)) / step / volume
            worst = max(worst, abs(numerical - float((stress * strain).sum())))
        explanation = f"stress is symmetric and dE/dε / V for three random strains; largest {np.abs(stress).max():.2g}"
        tolerance = t.stress_difference * _scale(stress) + self._energy_rounding() / step / volume
        return worst, tolerance, "eV/Å³", explanation

    def hessian_vector_product(self) -> Measured:
        if not isinstance(self.model, HasHessianVectorProduct):
            raise _Skipped("the potential does not offer hessian_vector_products")
        t, vectors = self.tolerances, self._directions(2)
        products = self.model.hessian_vector_products(self.atoms, vectors)
        if products.shape != vectors.shape:
            raise ValueError(f"shape {products.shape} for vectors of shape {vectors.shape}")
        differences = np.array([self._force_slope(vector, t.force_step) for vector in vectors])
        value, scale = float(np.abs(products - differences).max()), _scale(differences)
        return (
            value,
            t.hessian_difference * scale,
            "eV/Å²",
            f"H v is minus the slope of the forces; largest {scale:.2g}",
        )

    def batch(self) -> Measured:
        large = make_supercell(self.atoms, np.diag([1, 2, 1]))
        large.positions += self.rng.normal(0, 0.03, large.positions.shape)
        small = self.atoms[[0, self.n // 2]]
        structures = [large, small, self.atoms]
        together = self.model.evaluate(structures)
        worst = 0.0
        for index, atoms in enumerate(structures):
            alone = self.model.evaluate([atoms])
            here = Evaluation(together.energies[[index]], [together.forces[index]], together.stresses[[index]])
            worst = max(worst, self._deviation(here, float(alone.energies[0]), alone.forces[0], alone.stresses[0]))
        return worst, 1, "tolerances", "16, 2 and 8 atoms in one pass give what each gives alone"

    def displaced_copies(self) -> Measured:
        displacements = self.rng.normal(size=(4, self.n, 3))
        displacements *= 0.1 / np.linalg.norm(displacements, axis=-1, keepdims=True)
        displacements[0] = 0
        displacements[1, 1:] = 0  # one atom alone, as in finite differences
        worst = 0.0
        for some in (displacements, displacements[1:2] / 10):
            together = self.model.forces_of_displaced(self.atoms, some)
            if together.shape != some.shape:
                raise ValueError(f"shape {together.shape} for displacements of shape {some.shape}")
            for displacement, forces in zip(some, together, strict=True):
                atoms = self.atoms.copy()
                atoms.positions += displacement
                alone = self.model.evaluate([atoms]).forces[0]
                worst = max(worst, float(np.abs(forces - alone).max()) / (self.tolerances.force * _scale(alone)))
        return worst, 1, "tolerances", "displaced copies in one pass have the forces that each has alone"

    def determinism(self) -> Measured:
        again = self.model.evaluate([self.atoms])
        energy, forces, stress = self._expectation()
        changed = (
            (again.energies[0] != energy) + (again.forces[0] != forces).sum() + (again.stresses[0] != stress).sum()
        )
        return float(changed), 0, "numbers", "a second evaluation agrees to the last bit"

    def dtype(self) -> Measured:
        forces = self.base.forces[0]
        if self.model.identity.dtype == "float32":
            value = float(np.abs(forces - forces.astype(np.float32)).max())
            return value, 0, "eV/Å", "forces are float32 numbers"
        direction = self._directions(1)[0]
        slope, fine = self._force_slope(direction, self.tolerances.force_step), self._force_slope(direction, 1e-7)
        largest = float(np.abs(slope).max())
        if largest < 1e-6:
            raise _Skipped("the forces are too flat to tell")
        value = float(np.abs(fine - slope).max()) / largest
        return value, 1e-3, "relative", "forces resolve displacements of 1e-7 Å, which float32 cannot"

    def energy_conservation(self, steps: int = 30) -> Measured:
        atoms = self.atoms.copy()
        atoms.calc = ForceModelCalculator(self.model)
        MaxwellBoltzmannDistribution(atoms, temperature_K=300, rng=np.random.default_rng(SEED))
        dynamics = VelocityVerlet(atoms, timestep=0.5 * units.fs)
        total, kinetic = [], []
        for _ in dynamics.irun(steps):
            total.append(atoms.get_total_energy() / self.n)
            kinetic.append(atoms.get_kinetic_energy() / self.n)
        exchanged = max(float(np.ptp(kinetic)), 1e-3)
        explanation = (
            f"drift of the total energy over {steps} steps of 0.5 fs at 300 K: at most 2 % of what is exchanged"
        )
        return float(np.ptp(total)), 0.02 * exchanged + self.tolerances.energy, "eV/atom", explanation

    def isolated_atom(self) -> Measured:
        box = Atoms(
            self.atoms.symbols[:1], positions=[[1, 2, 3]], cell=np.eye(3) * (3 * self.model.cutoff_A + 10), pbc=True
        )
        try:
            alone = self.model.evaluate([box])
        except PhysicsError as error:
            return 0.0, self.tolerances.force, "eV/Å", f"refused: {error}"
        mixed = self.model.evaluate([box, self.atoms])
        if not np.isfinite(alone.energies).all():
            raise ValueError("the energy is not finite")
        value = max(float(np.abs(alone.forces[0]).max()), float(np.abs(mixed.forces[0]).max()))
        self._require_shapes(mixed, [1, self.n])
        return value, self.tolerances.force, "eV/Å", "an atom without neighbours feels no force, alone or in a batch"

    def unknown_element(self) -> Measured:
        unknown = [symbol for symbol in chemical_symbols[1:] if symbol not in self.model.elements]
        if not unknown:
            raise _Skipped("the potential knows all elements")
        atoms = self.atoms.copy()
        atoms.symbols[0] = unknown[0]
        try:
            self.model.evaluate([self.atoms, atoms])
        except PhysicsError as error:
            return 0.0, 0, "", f"refused: {error}"
        raise ValueError(f"{unknown[0]} is not among the elements of the potential, and was evaluated all the same")

    @staticmethod
    def _require_shapes(result: Evaluation, sizes: Sequence[int]) -> None:
        got = (result.energies.shape, [forces.shape for forces in result.forces], result.stresses.shape)
        expected = ((len(sizes),), [(size, 3) for size in sizes], (len(sizes), 3, 3))
        if got != expected:
            raise ValueError(f"energies, forces and stresses of shape {got}, expected {expected}")

    def _energy_rounding(self) -> float:
        """What the sum of a total energy may be off by, in eV: a few times its last digit."""
        return 4 * float(np.finfo(self.model.identity.dtype).eps * abs(self.base.energies[0]))

    def _directions(self, count: int) -> np.ndarray:
        """Random unit vectors [count, N, 3]."""
        vectors = self.rng.normal(size=(count, self.n, 3))
        return vectors / np.linalg.norm(vectors, axis=(1, 2), keepdims=True)

    def _force_slope(self, direction: np.ndarray, step: float) -> np.ndarray:
        """Minus the derivative [N, 3] of the forces along ``direction``: the Hessian applied to it."""
        structures = []
        for offset in OFFSETS:
            atoms = self.atoms.copy()
            atoms.positions += offset * step * direction
            structures.append(atoms)
        forces = np.array(self.model.evaluate(structures).forces)
        return -np.tensordot(WEIGHTS, forces, axes=1) / step


def _scale(quantity: np.ndarray) -> float:
    """Largest component, at least one: what relative tolerances refer to."""
    return max(1.0, float(np.abs(quantity).max()))


def speed(model: ForceModel, repeat: int = 3, copies: int = 4) -> float:
    """Atoms evaluated per second, forces and stress, for ``copies``³ cells of the test system; best of ``repeat``."""
    atoms = specimen(model.elements, np.random.default_rng(SEED)) * (copies, copies, copies)
    model.evaluate([atoms])
    best = np.inf
    for _ in range(repeat):
        began = time.perf_counter()
        model.evaluate([atoms])
        best = min(best, time.perf_counter() - began)
    return len(atoms) / best
