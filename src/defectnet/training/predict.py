"""Use of a trained network: two spectra in, concentrations out."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from pymatgen.core import Composition
from scipy.integrate import cumulative_trapezoid

from defectnet.config import Dopants
from defectnet.dataset.samples import Responses, Samples
from defectnet.dopants import propose
from defectnet.elements import element_vector
from defectnet.errors import InputError
from defectnet.models.response import ELEMENTS
from defectnet.training.fit import Checkpoint, load_checkpoint

UNLIKE = np.array([0.0, 2.0, 1.0, 0.0, 0.0, 0.5])
"""Weights of differences in the columns of :data:`~defectnet.models.response.ELEMENTS`: radius in Å,
electronegativity, valence electrons. A dopant takes the place of what it resembles."""

PROPOSED = Dopants(n_type=5, p_type=5)
"""Dopants that are asked about when none are named: as many as hosts of the reference dataset have."""

BAND_EDGE_QUANTILE = 0.999
"""On the published axis, the band edge of a host known by its spectrum alone: below it lies this share of the area."""


def read_spectrum(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Energies [P] in meV and intensities [P] from a text file of two columns, separated by blanks or commas.

    Text after ``#`` and further columns (error bars) are ignored. Raises :class:`InputError` naming file and remedy.
    """
    try:
        text = path.read_text().replace(",", " ")
        table = np.loadtxt(text.splitlines(), ndmin=2)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a table of numbers ({error}); give energy in meV and intensity") from None
    if table.shape[1] < 2:
        raise InputError(f"{path}: needs two columns, energy in meV and intensity")
    return table[:, 0], table[:, 1]


def predict(
    checkpoint: Path | Checkpoint,
    pristine: tuple[np.ndarray, np.ndarray],
    doped: tuple[np.ndarray, np.ndarray],
    formula: str,
    candidates: Iterable[str] | None = None,
) -> dict[str, float]:
    """Concentration (fraction of sites) of each candidate dopant, in the order given.

    Parameters: ``pristine`` and ``doped`` (energy in meV ascending, intensity in any unit), each [P] with its own
    points, both normalised here to unit area; ``formula`` of the host; ``candidates`` the dopants to ask about, by
    default those that :func:`~defectnet.dopants.propose` finds likely. A published network's answer is an unconstrained
    regression: read small negative values as zero. A response network is asked without knowledge of responses.

    Raises :class:`InputError` for unusable spectra, formula or candidates.
    """
    trained = checkpoint if isinstance(checkpoint, Checkpoint) else load_checkpoint(checkpoint)
    try:
        composition = Composition(formula).fractional_composition.get_el_amt_dict()
    except ValueError as error:
        raise InputError(f"formula {formula!r}: {error}") from None
    if candidates is None:
        candidates = [one.dopant for one in propose(formula, PROPOSED, trained.vocabulary)]
    asked = list(candidates)
    if unknown := sorted({*composition, *asked} - set(trained.vocabulary)):
        raise InputError(f"{', '.join(unknown)}: the network was trained without this element")
    if not asked:
        raise InputError("no candidate dopants given")
    edges = _axis_edges(trained, pristine)
    bins = len(edges) - 1
    inputs = [(resample(*spectrum, edges) * bins).astype(np.float32)[None] for spectrum in (pristine, doped)]
    mask = element_vector(dict.fromkeys(asked, 1.0))[None].astype(bool)
    samples = Samples(
        row=np.zeros(1, dtype=int),
        host=np.zeros(1, dtype=int),
        pristine=inputs[0],
        doped=inputs[1],
        composition=element_vector(composition)[None].astype(np.float32),
        candidates=mask,
        targets=np.zeros(mask.shape, dtype=np.float32),
    )
    responses = _unknown_responses(samples) if trained.network == "response" else None
    fractions = trained.predict(samples, responses, "none").concentration[0][mask[0]]
    by_number = dict(zip(np.flatnonzero(mask[0]), fractions, strict=True))
    return {symbol: float(by_number[int(element_vector({symbol: 1.0}).argmax())]) for symbol in asked}


def _unknown_responses(samples: Samples) -> Responses:
    """Of the candidates of one sample nothing is known but what they are; each replaces the element most like it."""
    elements = np.flatnonzero(samples.candidates[0])[None]
    host = np.flatnonzero(samples.composition[0])
    pairs = np.broadcast_to(elements[0][:, None], (elements.size, host.size))
    unlike = np.abs(ELEMENTS[pairs] - ELEMENTS[host]) @ UNLIKE
    known = np.zeros(elements.shape, dtype=bool)
    curves = np.zeros((*elements.shape, samples.pristine.shape[1]), dtype=np.float32)
    return Responses(
        elements=elements,
        replaced=host[unlike.argmin(axis=1)][None],
        composition=samples.composition,
        pristine=samples.pristine,
        library=curves,
        mass_only=curves,
        knows_library=known,
        knows_mass=known,
    )


def resample(energy_meV: np.ndarray, intensity: np.ndarray, edges_meV: np.ndarray) -> np.ndarray:
    """Share of a spectrum's area in each bin [B]: the sum is 1 over edges that cover the spectrum.

    ``energy_meV`` [P] ascending and ``intensity`` [P] are points of a curve; its area is accumulated by the trapezoid
    rule and read off at the edges, so that no area is lost or made whatever the two spacings are.
    Raises :class:`InputError` for points that are no spectrum.
    """
    energy, below = _cumulative(energy_meV, intensity)
    return np.diff(np.interp(edges_meV, energy, below))


def _cumulative(energy_meV: np.ndarray, intensity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    energy, values = np.asarray(energy_meV, dtype=float), np.asarray(intensity, dtype=float)
    if energy.ndim != 1 or energy.shape != values.shape or len(energy) < 2:
        raise InputError(
            "a spectrum is two columns of equal length, energy in meV and intensity, with two or more rows"
        )
    if not (np.isfinite(energy).all() and np.isfinite(values).all()):
        raise InputError("a spectrum must not contain NaN or infinite values")
    if (np.diff(energy) <= 0).any():
        raise InputError("the energies of a spectrum must ascend")
    below = cumulative_trapezoid(values, energy, initial=0.0)
    if below[-1] <= 0:
        raise InputError("the area under a spectrum must be positive")
    return energy, below / below[-1]


def _axis_edges(trained: Checkpoint, pristine: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """The network's axis for this host, as :mod:`defectnet.dataset.samples` defines it for modes."""
    if trained.axis.kind == "absolute":
        return trained.edges_meV
    energy, below = _cumulative(*pristine)
    top = np.interp(BAND_EDGE_QUANTILE, np.maximum.accumulate(below), energy)
    if top <= 0:
        raise InputError("the pristine spectrum has no weight at positive energies; energies are in meV")
    edges = np.linspace(0.0, top, trained.axis.bins + 1)
    edges[0] = -np.inf  # imaginary modes count at zero energy on the published axis
    return edges
