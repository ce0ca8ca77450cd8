"""Densities of states of large cells from Hessian-vector products alone: stochastic Lanczos quadrature.

No Hessian is built and nothing is diagonalised. A random start vector z is spread over all modes alike, so the
spectrum of D as seen from z, zᵀδ(E - √D)z, is the density of states up to noise that falls with the number of modes in
a broadened bin and with the number of start vectors. m steps of the Lanczos recursion turn it into m nodes and weights
(Ubaru, Chen & Saad, SIAM J. Matrix Anal. Appl. 38, 1075 (2017); Lin, Saad & Yang, SIAM Rev. 58, 34 (2016)).

Partial densities come from the same recursion. With f the Gaussian at E, tr(P_X f(D)) = tr(f^½ P_X f^½), and
zᵀ f^½ P_X f^½ z is an unbiased, positive estimate of it that needs only the overlaps of the Lanczos vectors on the
atoms of element X. By the Cauchy-Schwarz inequality it is never noisier, product for product, than a recursion for each
element, but for a term that vanishes when many modes share a bin. Then each element is scaled to its exact share of the
modes.

How many steps: a Gaussian of width σ is resolved by about E_max/σ steps, whatever the size of the cell. Imaginary
modes ask for more, because the root is singular between them and the others: :class:`Estimate` tells by ``l1_steps``.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from defectnet.config import Spectra
from defectnet.errors import PhysicsError
from defectnet.files import write_atomically
from defectnet.phonons.modes import Modes
from defectnet.phonons.pdos import spectrum
from defectnet.progress import track
from defectnet.units import SQRT_EIGENVALUE_TO_MEV

Product = Callable[[np.ndarray], np.ndarray]
"""Displacements [K, N, 3] in Å to H v [K, N, 3] in eV/Å: ``partial(model.hessian_vector_products, atoms)``."""

EXHAUSTED = 1e-10
"""A new Lanczos vector shorter than this, relative to D v, is rounding: the recursion has seen all there is."""

VECTORS_MIN = 4
"""Fewest start vectors whose spread is taken for an error."""


@dataclass(frozen=True)
class Recursions:
    """R finished Lanczos recursions of the mass-weighted Hessian D, without its three rigid translations.

    alpha    : [R, m] diagonal of the tridiagonal matrix, eV/(Å² amu).
    beta     : [R, m] beta[:, k] couples steps k - 1 and k; beta[:, 0] is the length of the start vector. Steps after
               an early end hold zeros.
    overlaps : [R, E, m, m] products v_kᵀ P_X v_l of the Lanczos vectors on the atoms of each element.
    shares   : [E] exact share of each element in all modes, tr(P_X) / (3N - 3).
    elements : E symbols, sorted.
    """

    alpha: np.ndarray
    beta: np.ndarray
    overlaps: np.ndarray
    shares: np.ndarray
    elements: tuple[str, ...]

    @property
    def products(self) -> int:
        """Hessian-vector products that were used."""
        return int(np.count_nonzero(self.beta))

    def shortened(self, steps: int) -> Recursions:
        """The same recursions had they been stopped after so many steps."""
        return Recursions(
            self.alpha[:, :steps],
            self.beta[:, :steps],
            self.overlaps[:, :, :steps, :steps],
            self.shares,
            self.elements,
        )

    def modes(self, sigma_meV: float) -> list[Modes]:
        """For each start vector, stand-ins for the modes that give its spectra under a broadening of ``sigma_meV``.

        The root of the product of two Gaussians around E_k and E_l is exp(-(E_k - E_l)²/8σ²) times the Gaussian around
        their midpoint, so zᵀ f^½ P_X f^½ z is a sum over pairs k <= l of Ritz values: one row each. Unlike those of a
        diagonalisation, rows of ``weights`` sum to 1 only on average, and those of pairs k < l to 0.
        """
        result = []
        first, second = np.triu_indices(self.alpha.shape[1])
        twice = np.where(first == second, 1, 2)
        for alpha, beta, overlaps in zip(self.alpha, self.beta, self.overlaps, strict=True):
            eigenvalues, vectors = np.linalg.eigh(np.diag(alpha) + np.diag(beta[1:], 1) + np.diag(beta[1:], -1))
            energies = np.sign(eigenvalues) * np.sqrt(np.abs(eigenvalues)) * SQRT_EIGENVALUE_TO_MEV
            seen = vectors * vectors[0]  # columns: Ritz vectors times their component along the start vector
            pairs = (seen.T @ overlaps @ seen)[:, first, second]
            pairs *= twice * np.exp(-(((energies[first] - energies[second]) / sigma_meV) ** 2) / 8)
            pairs *= (self.shares / pairs.sum(axis=1))[:, None]
            result.append(Modes((energies[first] + energies[second]) / 2, pairs.T * len(first), self.elements))
        return result


def lanczos_modes(
    product: Product,
    masses: np.ndarray,
    symbols: list[str],
    steps: int,
    vectors: int,
    rng: np.random.Generator,
    together: int = 1,
    checkpoint: Path | None = None,
) -> Recursions:
    """Recursions from ``vectors`` random start vectors, for ``vectors`` × ``steps`` products at most.

    Parameters: ``masses`` [N] in amu and ``symbols`` of the N >= 2 atoms. ``together`` recursions advance side by side,
    with that many vectors in each call of ``product``: many potentials do the better part of the work once per call.

    With ``checkpoint``, finished recursions are kept in that file and taken from it if start vectors, masses, symbols
    and steps are the same, so that a killed job loses ``together`` recursions at most. The file does not know the
    Hessian: each structure and potential needs its own, and the caller deletes it once the result is safe.
    Raises :class:`PhysicsError` when products are not finite.
    """
    *_, result = _grow(product, masses, symbols, steps, vectors, rng, together, checkpoint)
    return result


def lanczos_until(
    product: Product,
    masses: np.ndarray,
    symbols: list[str],
    steps: int,
    tolerance: float,
    edges_meV: np.ndarray,
    settings: Spectra,
    rng: np.random.Generator,
    vectors_max: int = 64,
    together: int = 1,
    checkpoint: Path | None = None,
) -> tuple[Recursions, Estimate]:
    """As many start vectors as the configured spectrum needs for ``l1_error`` <= ``tolerance``, or ``vectors_max``.

    Other parameters as of :func:`lanczos_modes`. Whether the tolerance was reached is for the caller to read off.
    """
    for result in _grow(product, masses, symbols, steps, vectors_max, rng, together, checkpoint):
        if len(result.alpha) >= min(VECTORS_MIN, vectors_max):
            found = estimate(result, edges_meV, settings)
            if found.l1_error <= tolerance:
                break
    return result, found


@dataclass(frozen=True)
class Estimate:
    """A spectrum and what is known about its errors.

    density        : [B] in 1/meV, mean over the start vectors, normalised as :func:`~defectnet.phonons.pdos.spectrum`.
    standard_error : [B] in 1/meV, of that mean, from the spread of the start vectors; nan for a single one.
    l1_error       : integral of ``standard_error`` over energy; a true L1 error is sqrt(2/π) of it on average.
    l1_steps       : L1 change of the spectrum when the last quarter of the steps is left out, which bounds what more
                     steps would still change. Choose more steps if it is not well below ``l1_error``.
    products       : Hessian-vector products that were used.
    """

    density: np.ndarray
    standard_error: np.ndarray
    l1_error: float
    l1_steps: float
    products: int


def estimate(recursions: Recursions, edges_meV: np.ndarray, settings: Spectra) -> Estimate:
    """The configured kind of spectrum with its errors."""

    def spectra(of: Recursions) -> np.ndarray:  # [R, B]
        return np.array([spectrum(modes, edges_meV, settings) for modes in of.modes(settings.sigma_meV)])

    each = spectra(recursions)
    fewer = spectra(recursions.shortened(max(1, recursions.alpha.shape[1] * 3 // 4)))
    vectors, widths = len(each), np.diff(edges_meV)
    error = each.std(axis=0, ddof=1) / np.sqrt(vectors) if vectors > 1 else np.full(len(widths), np.nan)
    l1_steps = float(np.abs((each - fewer).mean(axis=0)) @ widths)
    return Estimate(each.mean(axis=0), error, float(error @ widths), l1_steps, recursions.products)


def _grow(
    product: Product,
    masses: np.ndarray,
    symbols: list[str],
    steps: int,
    vectors: int,
    rng: np.random.Generator,
    together: int,
    checkpoint: Path | None,
) -> Iterator[Recursions]:
    """Everything finished so far, each time that recursions were added, up to ``vectors`` of them."""
    n = len(masses)
    steps = min(steps, 3 * n - 3)
    names = np.array(symbols)
    elements = tuple(sorted(set(symbols)))
    # A third of tr(P_X) is the number of its atoms less their share of the mass, which is what translations take.
    shares = np.array([(1 - masses / masses.sum())[names == element].sum() for element in elements]) / (n - 1)
    # ±1 rather than Gaussian: atoms then contribute no noise by the length of their own entries.
    starts = rng.choice([-1.0, 1.0], size=(vectors, n, 3))
    inputs = {"masses": masses, "symbols": names, "steps": np.array(steps)}
    found = _resume(checkpoint, starts, inputs)
    while True:
        done = len(found["alpha"]) if found else 0
        if done:
            yield Recursions(found["alpha"], found["beta"], found["overlaps"], shares, elements)
        if done >= vectors:
            return
        batch = starts[done : done + together]
        new = _recursions(product, masses, batch, steps, [names == element for element in elements], done)
        found = {key: np.concatenate([found[key], rows]) if done else rows for key, rows in new.items()}
        if checkpoint is not None:
            file = io.BytesIO()
            np.savez(file, starts=starts[: done + len(batch)], **inputs, **found)
            write_atomically(checkpoint, file.getvalue())


def _resume(path: Path | None, starts: np.ndarray, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Recursions of an earlier attempt that began with these start vectors; empty without one."""
    if path is None:
        return {}
    try:
        with np.load(path) as file:
            known = min(len(file["starts"]), len(starts))
            same = np.array_equal(file["starts"][:known], starts[:known])
            if same and all(np.array_equal(file[key], value) for key, value in inputs.items()):
                return {key: file[key][:known] for key in ("alpha", "beta", "overlaps")}
    except (FileNotFoundError, BadZipFile, EOFError, KeyError, ValueError):
        pass
    return {}


def _recursions(
    product: Product, masses: np.ndarray, starts: np.ndarray, steps: int, members: list[np.ndarray], done: int
) -> dict[str, np.ndarray]:
    """Lanczos recursions from start vectors [K, N, 3] side by side; see :class:`Recursions`.

    ``members`` holds one mask [N] per element.
    """
    count, n, _ = starts.shape
    root_mass = np.sqrt(masses)[:, None]
    # The translations, e_i ∝ sqrt(m_i), come first: keeping each vector orthogonal to all before it removes them.
    basis = np.zeros((count, 3 + steps, 3 * n))
    basis[:, :3] = (root_mass[:, :, None] * np.eye(3) / np.sqrt(masses.sum())).reshape(3 * n, 3).T
    alpha, beta = np.zeros((2, count, steps))
    following = starts.reshape(count, 3 * n)
    scale = np.linalg.norm(following, axis=1)
    for k in track(range(steps), f"Lanczos recursions {done + 1} to {done + count}"):
        known = basis[:, : 3 + k]
        for _ in range(2):  # once leaves rounding that grows with the steps (Parlett, The Symmetric Eigenvalue Problem)
            following = following - (following[:, None] @ known.transpose(0, 2, 1) @ known)[:, 0]
        length = np.linalg.norm(following, axis=1)
        alive = length > EXHAUSTED * scale
        if not alive.any():
            break
        beta[alive, k] = length[alive]
        basis[alive, 3 + k] = following[alive] / length[alive, None]
        vectors = basis[:, 3 + k].reshape(starts.shape)
        following = (product(vectors / root_mass) / root_mass).reshape(count, 3 * n)
        if not np.isfinite(following).all():
            raise PhysicsError("Hessian-vector products are not finite")
        alpha[:, k] = np.einsum("kx,kx->k", basis[:, 3 + k], following)
        sizes = np.linalg.norm(following, axis=1)
        scale = sizes if k == 0 else np.maximum(scale, sizes)
    atoms = basis[:, 3:].reshape(count, steps, n, 3)
    parts = [atoms[:, :, member].reshape(count, steps, -1) for member in members]
    overlaps = np.stack([part @ part.transpose(0, 2, 1) for part in parts], axis=1)
    return {"alpha": alpha, "beta": beta, "overlaps": overlaps}
