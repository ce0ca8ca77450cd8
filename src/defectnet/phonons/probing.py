"""Refine an approximate Hessian with a few Hessian-vector products at the relaxed structure.

The unknown correction X = D - D_approximate is symmetric and known on M random vectors, X V = R. Of all symmetric X
that agree, the most probable one is taken, for independent Gaussian entries whose variance P falls with the distance
of the pair. Its Lagrangian gives X = P ∘ (Λ Vᵀ + V Λᵀ) / 2, with Λ from a linear system that conjugate gradients
solve. Vectors held out tell how large the remaining error is.

All in mass-weighted coordinates, D = M^-1/2 H M^-1/2, because that is what a spectrum sees.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from ase import Atoms

from defectnet.phonons.superposition import Superposition
from defectnet.potentials.base import HasHessianVectorProduct
from defectnet.progress import track
from defectnet.supercells import Plan

PAIR_DECAY_A = 1.4
"""Length over which the amplitude of a correction falls by e with the distance of the pair."""

TAIL = 1e-3
"""Amplitude at long distances of the pair, relative to that at none."""

HELD_OUT = 4
"""Products that only test the estimate."""

BATCH = 4
"""Products between two estimates of the error."""

PRODUCTS_MIN = HELD_OUT + BATCH
"""Products before the first estimate."""

ESTIMATES_MIN = 3
"""Estimates before probing is given up."""

CG_STEPS = 300
CG_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Probed:
    """A refined Hessian.

    hessian  : [3N, 3N] in eV/Å²
    products : Hessian-vector products that were spent, those held out included
    error    : |D - D_probed| / |D - D_host| (Frobenius), estimated from the vectors held out: the share of what doping
               changed that is still unexplained. The held-out vectors enter the final Hessian, which is better.
    """

    hessian: np.ndarray
    products: int
    error: float


def probe(
    superpose: Superposition,
    plan: Plan,
    atoms: Atoms,
    model: HasHessianVectorProduct,
    tolerance: float,
    products_max: int,
    rng: np.random.Generator,
) -> Probed:
    """Refine the superposed Hessian of ``plan`` for its relaxed structure ``atoms``.

    Products are spent until the estimated error is below ``tolerance``, but at most ``products_max``, which is at least
    :data:`PRODUCTS_MIN`, and no more once the error falls too slowly to get there.
    """
    n = len(atoms)
    root_mass = np.repeat(np.sqrt(atoms.get_masses()), 3)
    weight = 1 / np.outer(root_mass, root_mass)
    variance = np.kron(_variance(atoms), np.ones((3, 3))) * weight**2
    start = superpose(plan).hessian * weight
    host_mass = superpose.folding.atoms.get_masses()[plan.occupied(len(superpose.folding))]
    host_root = np.repeat(np.sqrt(host_mass), 3)
    pristine = superpose.unchanged(plan) / np.outer(host_root, host_root)
    translations = (np.eye(3)[None] * np.sqrt(atoms.get_masses())[:, None, None]).reshape(3 * n, 3)

    vectors, images = np.empty((3 * n, 0)), np.empty((3 * n, 0))
    errors: list[float] = []

    def refined(used: slice) -> np.ndarray:
        """D that agrees with the products ``used``, and with translations costing nothing."""
        known = np.hstack([vectors[:, used], translations])
        targets = np.hstack([images[:, used], np.zeros_like(translations)]) - start @ known
        return start + _most_probable(variance, known, targets)

    counts = [PRODUCTS_MIN] + [BATCH] * ((products_max - PRODUCTS_MIN) // BATCH)
    for count in track(counts, f"probing {atoms.get_chemical_formula()}"):
        fresh = rng.choice((-1.0, 1.0), size=(3 * n, count))
        displacements = (fresh / root_mass[:, None]).T.reshape(count, n, 3)
        answers = model.hessian_vector_products(atoms, displacements)
        answers = answers.reshape(count, 3 * n).T / root_mass[:, None]
        vectors, images = np.hstack([vectors, fresh]), np.hstack([images, answers])
        held, held_images = vectors[:, :HELD_OUT], images[:, :HELD_OUT]
        dynamical = refined(slice(HELD_OUT, None))
        left = np.linalg.norm(held_images - dynamical @ held) / np.linalg.norm(held_images - pristine @ held)
        errors.append(float(left))
        if left < tolerance or _hopeless(errors, tolerance, len(counts)):
            break
    return Probed(refined(slice(None)) / weight, vectors.shape[1], errors[-1])


def _hopeless(errors: list[float], tolerance: float, estimates_max: int) -> bool:
    """Whether errors that go on falling at their mean rate are still above the tolerance at the end."""
    if len(errors) < ESTIMATES_MIN:
        return False
    rate = np.log(errors[-1] / errors[0]) / (len(errors) - 1)
    return bool(np.log(errors[-1]) + rate * (estimates_max - len(errors)) > np.log(tolerance))


def _variance(atoms: Atoms) -> np.ndarray:
    """[N, N] prior variance of the corrections between atoms, up to a factor."""
    return np.exp(-2 * atoms.get_all_distances(mic=True) / PAIR_DECAY_A) + TAIL**2


def _most_probable(variance: np.ndarray, vectors: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The most probable symmetric X [n, n] with X @ vectors = targets [n, M], by conjugate gradients for Λ."""

    def correction(multipliers: np.ndarray) -> np.ndarray:
        outer = multipliers @ vectors.T
        return 0.5 * variance * (outer + outer.T)

    multipliers = np.zeros_like(targets)
    residual = targets.copy()
    direction = residual.copy()
    norm = start = (residual**2).sum()
    for _ in range(CG_STEPS):
        if norm <= CG_TOLERANCE**2 * start:
            break
        image = correction(direction) @ vectors
        step = norm / (direction * image).sum()
        multipliers += step * direction
        residual -= step * image
        norm, before = (residual**2).sum(), norm
        direction = residual + norm / before * direction
    return correction(multipliers)
