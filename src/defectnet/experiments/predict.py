"""Which dopants a measured sample holds: two spectra and the host in, concentrations with intervals out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pymatgen.core import Composition
from scipy.stats import norm

from defectnet.config import Dopants
from defectnet.dataset.samples import Responses, Samples
from defectnet.elements import SYMBOLS, element_vector, index_of, width_of
from defectnet.errors import InputError
from defectnet.experiments.known import KnownHost
from defectnet.experiments.measured import on_common_range
from defectnet.experiments.spectrum import MeasuredSpectrum
from defectnet.models.response import ELEMENTS, LEVELS
from defectnet.training.detection import detection_limits
from defectnet.training.fit import COVERAGE, Checkpoint, load_checkpoint
from defectnet.training.recipes import NOISE_FLOOR, Hosts, compared

UNLIKE = np.array([0.0, 2.0, 1.0, 0.0, 0.0, 0.5])
"""Weights of differences in the columns of :data:`~defectnet.models.response.ELEMENTS`: radius in Å,
electronegativity, valence electrons. A dopant takes the place of what it resembles."""

PROPOSED = Dopants(n_type=5, p_type=5)
"""Dopants that are asked about when none are named: as many as hosts of the reference dataset have."""

DRAWS = 64
"""Spectra that are drawn from the measured errors, to see what these do to the answer."""

UNLIKE_HOST = 0.3
"""Share of the area in which measured and computed spectra of the undoped host may differ."""

POOR_FIT = 2.0
"""Mean squared residual in units of the measured variance above which noise does not explain it."""

SEEN_MAX = 0.25
"""Highest total concentration in training."""


@dataclass(frozen=True)
class Dopant:
    """One line of an answer; concentrations are fractions of the sites.

    low, high       : interval that holds the truth with the coverage that the answer states
    presence        : probability that it is there
    detection_limit : concentration that these spectra could show with 95 % chance, whatever else is there
    knowledge       : what its response is known from
    """

    element: str
    replaces: str
    concentration: float
    low: float
    high: float
    presence: float
    detection_limit: float
    knowledge: str


@dataclass(frozen=True, eq=False)
class Identification:
    """What a network says about a sample.

    dopants     : in the order of the candidates
    coverage    : of the intervals
    unexplained : share of the squared doped - pristine difference that the candidates' responses leave
    warnings    : why not to trust it
    edges_meV, measured, pristine, difference, contributions : the network's axis [B + 1], which bins were measured [B],
                  the pristine spectrum, doped less pristine [B], and what each dopant adds to it [K, B], in 1/meV;
                  contributions are scaled down alike where their sum is too large, because responses saturate
    """

    dopants: tuple[Dopant, ...]
    coverage: float
    unexplained: float
    warnings: tuple[str, ...]
    edges_meV: np.ndarray
    measured: np.ndarray
    pristine: np.ndarray
    difference: np.ndarray
    contributions: np.ndarray

    def as_dict(self) -> dict[str, Any]:
        """Plain values, without the curves."""
        told = ("coverage", "unexplained", "warnings")
        return {"dopants": [asdict(one) for one in self.dopants]} | {name: getattr(self, name) for name in told}


def predict(
    checkpoint: Path | Checkpoint,
    pristine: MeasuredSpectrum,
    doped: MeasuredSpectrum,
    formula: str,
    candidates: Sequence[str] | None = None,
    known: KnownHost | None = None,
    *,
    partial: bool = False,
) -> Identification:
    """Concentrations of the candidate dopants of a measured sample.

    Parameters: spectra of the undoped host and of the sample; ``formula`` of the host; ``candidates`` to ask about, by
    default those of the known host, or those that :func:`~defectnet.dopants.propose` finds likely; ``known``, what was
    computed of the host; ``partial``, whether to accept spectra that cover different ranges. Measured errors are drawn
    from :data:`DRAWS` times, and what that does to an answer widens its interval. Raises :class:`InputError` for
    spectra, formulas and candidates that cannot be used.
    """
    trained = checkpoint if isinstance(checkpoint, Checkpoint) else load_checkpoint(checkpoint)
    composition, asked = _asked(trained, formula, candidates, known)
    if trained.network != "response":
        raise InputError("the network is a published one, which is there for comparison; take one of preset response")
    if known is not None and not np.array_equal(known.edges_meV, trained.edges_meV):
        raise InputError(f"--dataset: {known.name} has other energies than the network; use the dataset it came with")
    pristine, doped = on_common_range(pristine, doped, partial)
    seen = [_on_axis(spectrum, trained.edges_meV) for spectrum in (pristine, doped)]
    measured = np.isfinite(seen[0][0]) & np.isfinite(seen[1][0])
    if not measured.any():
        raise InputError(f"{doped.source}: nothing was measured between {trained.edges_meV[[0, -1]]} meV")
    noise = _noise(seen, measured)
    rng = np.random.default_rng(0)
    draws = [np.vstack([mean, mean + error * rng.normal(size=(DRAWS, len(mean)))]) for mean, error in noise.drawn]
    error = float(np.sqrt(np.mean(noise.level[measured] ** 2)))
    samples = _samples(composition, asked, width_of(trained.vocabulary), error, *draws)
    responses = _responses(samples, known)
    hosts = Hosts(responses)
    told = trained.predict(samples, responses, LEVELS[0])
    difference, response = compared(trained.models, samples[:1], hosts, LEVELS[0])
    levels = hosts.level[0, :, 0].tolist()

    places = [int(np.flatnonzero(responses.elements[0] == index_of(symbol))[0]) for symbol in asked]
    limits = detection_limits(response[0, places][:, measured] / noise.level[measured], 1.0)
    spread = norm.ppf(0.5 + COVERAGE / 2) * told.concentration[1:].std(axis=0)
    replaces = {} if known is None else known.replaces
    dopants = []
    for symbol, place, limit in zip(asked, places, limits, strict=True):
        column, level = index_of(symbol), LEVELS[levels[place]]
        amount = float(told.concentration[0, column])
        width = float(np.hypot(trained.intervals[level].width(told.error[0, column]), spread[column]))
        dopants.append(
            Dopant(
                element=symbol,
                replaces=replaces.get(symbol, SYMBOLS[responses.replaced[0, place]]),
                concentration=amount,
                low=max(amount - width, 0.0),
                high=amount + width,
                presence=float(told.presence[0, column]),
                detection_limit=float(limit),
                knowledge=level,
            )
        )
    amounts = np.array([one.concentration for one in dopants])
    contributions = amounts[:, None] * response[0, places]
    # Responses are those of low doping and saturate, which the network knows: of the sum, only the shape is to fit.
    fitted = contributions.sum(axis=0)
    contributions *= np.clip((difference[0] @ fitted) / max(fitted @ fitted, 1e-12), 0.0, 1.0)
    residual = (difference[0] - contributions.sum(axis=0))[measured]
    chi2 = float(np.mean((residual / noise.level[measured]) ** 2) / 2)
    unexplained = float(told.unexplained[0])
    worst = LEVELS[max(levels[place] for place in places)]
    warnings = [*noise.notes]
    if doped.weighting != trained.spectra.weighting:
        warnings.append(f"weighted {doped.weighting}, but the network learned from {trained.spectra.weighting}")
    if known is not None:
        computed, there = known.responses.pristine[0][measured], seen[0][0][measured]
        apart = 0.5 * np.abs(there / there.sum() - computed / computed.sum()).sum()
        if apart > UNLIKE_HOST:
            warnings.append(
                f"the undoped spectrum and the computed one of {known.name} differ in {apart:.0%} of their area: "
                "another host, another unit, or an axis to calibrate (--calibrate)"
            )
    if chi2 > POOR_FIT and unexplained > trained.unexplained[worst]:
        warnings.append(
            f"the candidates leave {unexplained:.0%} of the change unexplained, more than usual "
            f"({trained.unexplained[worst]:.0%}): another host, another axis, or dopants that are not asked about"
        )
    if sum(amounts) > SEEN_MAX:
        warnings.append(f"{sum(amounts):.0%} of the sites doped in all: more than the network was trained on")
    per_meV = 1 / (len(measured) * np.diff(trained.edges_meV))
    return Identification(
        dopants=tuple(dopants),
        coverage=COVERAGE,
        unexplained=unexplained,
        warnings=tuple(warnings),
        edges_meV=trained.edges_meV,
        measured=measured,
        pristine=np.where(measured, seen[0][0], np.nan) * per_meV,
        difference=difference[0] * per_meV,
        contributions=contributions * per_meV,
    )


def _asked(
    trained: Checkpoint, formula: str, candidates: Sequence[str] | None, known: KnownHost | None
) -> tuple[dict[str, float], list[str]]:
    """Composition of the host, and the dopants that are asked about."""
    try:
        composition = Composition(formula).fractional_composition.get_el_amt_dict()
    except ValueError:
        raise InputError(f"--formula '{formula}': cannot be read; write the host's like GaAs or MgB2") from None
    _check_known(f"--formula {formula}", composition, trained)
    computed = [] if known is None else [SYMBOLS[index] for index in known.responses.elements[0] if index >= 0]
    if candidates is not None:
        asked = list(dict.fromkeys(candidates))
    elif known is not None:
        asked = computed
    else:
        from defectnet.dopants import propose  # a second to import, and needed without a list only

        asked = [one.dopant for one in propose(formula, PROPOSED, trained.vocabulary)]
    if not asked:
        raise InputError("--candidates: names no dopant; list some, separated by commas")
    _check_known("--candidates", asked, trained)
    # An element of the host on the site of another is a dopant only where a dataset says which site that is.
    if own := [symbol for symbol in asked if symbol in composition and symbol not in computed]:
        raise InputError(f"--candidates: {', '.join(own)} is in {formula} undoped; name what may replace its elements")
    return composition, asked


def _check_known(where: str, symbols: Collection[str], trained: Checkpoint) -> None:
    """Raises :class:`InputError` for elements that the network does not know."""
    if unknown := [symbol for symbol in symbols if symbol not in trained.vocabulary]:
        raise InputError(
            f"{where}: the network knows no {', '.join(unknown)}; it knows {', '.join(trained.vocabulary)}"
        )


def _on_axis(spectrum: MeasuredSpectrum, edges_meV: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Intensities [B] as networks know them, NaN where nothing was measured, and their errors."""
    gridded = spectrum.on_grid(edges_meV)
    scale = np.diff(edges_meV) * (len(edges_meV) - 1)
    return gridded.density * scale, None if gridded.error is None else gridded.error * scale


@dataclass(frozen=True)
class _Noise:
    """Means and errors [B] to draw spectra from; the error of either one as one level [B]; what was assumed."""

    drawn: list[tuple[np.ndarray, np.ndarray]]
    level: np.ndarray
    notes: list[str]


def _noise(seen: list[tuple[np.ndarray, np.ndarray | None]], measured: np.ndarray) -> _Noise:
    """Measured errors; where a file has none, the scatter of neighbouring bins, which takes sharp peaks for noise."""
    notes = []
    errors = [error for _, error in seen]
    if any(error is None for error in errors):
        change = (seen[1][0] - seen[0][0])[measured]
        # The second difference of independent noise has six times its variance; the median does not see peaks.
        scatter = 1.4826 * np.median(np.abs(np.diff(change, 2))) / np.sqrt(6) if len(change) > 4 else 0.0
        guess = np.full(len(measured), max(scatter / np.sqrt(2), NOISE_FLOOR))
        errors = [guess if error is None else error for error in errors]
        notes.append("no errors in the files: taken from the scatter of the spectra")
    errors = [np.nan_to_num(error) for error in errors]
    level = np.sqrt(np.mean(np.square(errors), axis=0)).clip(NOISE_FLOOR)
    return _Noise([(mean, error) for (mean, _), error in zip(seen, errors, strict=True)], level, notes)


def _samples(
    composition: dict[str, float],
    asked: Sequence[str],
    width: int,
    noise: float,
    pristine: np.ndarray,
    doped: np.ndarray,
) -> Samples:
    """Pairs of spectra [n, B] of one host, all asked about the same dopants, in arrays over dopants of that width."""
    n = len(doped)
    mask = np.tile(element_vector(dict.fromkeys(asked, 1.0), width).astype(bool), (n, 1))
    return Samples(
        row=np.arange(n),
        host=np.zeros(n, dtype=int),
        pristine=pristine.astype(np.float32),
        doped=doped.astype(np.float32),
        composition=np.tile(element_vector(composition).astype(np.float32), (n, 1)),
        candidates=mask,
        targets=np.zeros(mask.shape, dtype=np.float32),
        relaxed=np.ones(n, dtype=bool),
        fold=np.zeros(n, dtype=int),
        noise=np.full(n, noise, dtype=np.float32),
    )


def _responses(samples: Samples, known: KnownHost | None) -> Responses:
    """Of the candidates of one host: what is known, or else what they are; then each replaces what is most like it."""
    elements = np.flatnonzero(samples.candidates[0])
    host = np.flatnonzero(samples.composition[0])
    pairs = np.broadcast_to(elements[:, None], (elements.size, host.size))
    replaced = host[(np.abs(ELEMENTS[pairs] - ELEMENTS[host]) @ UNLIKE).argmin(axis=1)]
    curves = {name: np.zeros((elements.size, samples.doped.shape[1]), np.float32) for name in ("library", "mass_only")}
    knows = {name: np.zeros(elements.size, dtype=bool) for name in ("knows_library", "knows_mass")}
    finite, scatter = np.zeros_like(curves["library"]), np.zeros((1, samples.doped.shape[1]), np.float32)
    pristine = np.nan_to_num(samples.pristine[0])
    if known is not None:
        pristine, scatter = known.responses.pristine[0], known.responses.scatter[0, 0]
        place = {int(element): k for k, element in enumerate(known.responses.elements[0]) if element >= 0}
        for k, element in enumerate(elements.tolist()):
            if element in place:
                replaced[k] = known.responses.replaced[0, place[element]]
                finite[k] = known.responses.finite[0, 0, place[element]]
                for kept in (curves, knows):
                    for name, values in kept.items():
                        values[k] = getattr(known.responses, name)[0, place[element]]
    return Responses(
        elements=elements[None],
        replaced=replaced[None],
        composition=samples.composition[:1],
        pristine=pristine[None],
        finite=finite[None, None],
        scatter=scatter[None, None],
        **{name: values[None] for name, values in (curves | knows).items()},
    )
