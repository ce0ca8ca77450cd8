"""What a network has to beat, without any deep learning.

All share one interface: built from the training samples and the responses of all hosts, ``predict(samples, responses,
level)`` gives an :class:`Estimate`, in which the score of presence is the concentration itself, but of generalised
least squares. ``levels`` are those of :data:`~defectnet.models.response.LEVELS` at which answers differ: mean, ridge
and trees know no responses, so they answer at level ``none`` only.

They learn from masked entries only, with all candidates of a host in the mask, and see spectra on the absolute axis.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from itertools import product
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.linear_model import RidgeCV

from defectnet.dataset.samples import Axis, Responses, Samples, asked_candidates
from defectnet.models.response import candidate_properties

BASELINE_AXIS = Axis("absolute")

MIN_ROWS = 5
"""Training rows in which an element must be a candidate before ridge regression is tried on it."""

PAIRS_MAX = 200_000
"""Most pairs of spectrum and candidate that trees learn from."""

HOST_QUANTILES = np.append(np.arange(1, 20) / 20, 0.995)
"""Shares of the pristine spectrum that divide its energies into windows, in which trees are told the changes."""

SUM_WEIGHTS = (0.0, 1.0, 3.0, 10.0, 30.0)
PENALTIES = (0.0, 3.0, 10.0, 30.0, 100.0, 300.0)
"""Weights of running sums and penalties of large concentrations that least squares chooses from."""

NOISES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
"""Variances of an intensity beside the scatter that generalised least squares chooses from."""

CHOICE_SAMPLES = 600
"""Training spectra on which least squares chooses."""

FACTOR_PRIOR = 1e-4
"""Weight of the factor 1 in scaled least squares: that of one spectrum with 1 at.% of the dopant."""

SEED = 0


class Estimate(NamedTuple):
    """What a model says about n spectra; zero outside ``samples.candidates``.

    concentrations : [n, 56] fractions
    presence       : [n, 56] scores, higher where a dopant is more likely there
    width          : [n, 56] half width of a 90 % interval, fractions; None of a model that gives no intervals
    unexplained    : [n] share of the squares of what doping changed that responses leave; None of a model without any
    """

    concentrations: np.ndarray
    presence: np.ndarray
    width: np.ndarray | None = None
    unexplained: np.ndarray | None = None


class Baseline(ABC):
    """Interface of all baselines, see the module's description."""

    levels: tuple[str, ...] = ("none",)
    axis = BASELINE_AXIS

    @abstractmethod
    def __init__(self, training: Samples, responses: Responses) -> None: ...

    @abstractmethod
    def concentrations(self, samples: Samples, responses: Responses, level: str) -> np.ndarray:
        """Concentrations [n, 56] as fractions."""

    def predict(self, samples: Samples, responses: Responses, level: str) -> Estimate:
        """Answers about all candidates of ``samples``."""
        values = self.concentrations(samples, responses, level)
        return Estimate(values, values)


class Mean(Baseline):
    """Answers every question with the mean concentration of the candidates in training, absent ones included."""

    def __init__(self, training: Samples, responses: Responses) -> None:
        self.mean = float(training.targets[training.candidates].mean())

    def concentrations(self, samples: Samples, responses: Responses, level: str) -> np.ndarray:
        """See :class:`Baseline`."""
        return np.where(samples.candidates, np.float32(self.mean), np.float32(0))


class Ridge(Baseline):
    """One ridge regression per element on (doped - pristine spectrum, host composition).

    The penalty is chosen by leave-one-out cross-validation. Elements with fewer than :data:`MIN_ROWS` training rows
    get the mean. Bins are not scaled to equal variance: those that are empty in training may not be so elsewhere.
    """

    def __init__(self, training: Samples, responses: Responses) -> None:
        self.mean = Mean(training, responses)
        features = self._features(training)
        self.models: dict[int, RidgeCV] = {}
        for element in np.flatnonzero(training.candidates.sum(axis=0) >= MIN_ROWS):
            asked = training.candidates[:, element]
            model = RidgeCV(alphas=np.logspace(-3, 4, 15))
            self.models[int(element)] = model.fit(features[asked], training.targets[asked, element])

    def concentrations(self, samples: Samples, responses: Responses, level: str) -> np.ndarray:
        """See :class:`Baseline`."""
        features = self._features(samples)
        values = self.mean.concentrations(samples, responses, level)
        for element, model in self.models.items():
            asked = samples.candidates[:, element]
            if asked.any():
                values[asked, element] = model.predict(features[asked])
        return values

    @staticmethod
    def _features(samples: Samples) -> np.ndarray:
        return np.hstack([samples.doped - samples.pristine, samples.composition]).astype(np.float64)


class Trees(Baseline):
    """One ensemble of gradient-boosted trees over pairs of spectrum and candidate, for any host and element.

    Features of a pair: share of the modes gained in windows of equal share of the pristine spectrum, their running
    sum, where the windows lie, and the properties of host, replaced element and dopant. Learns from
    :data:`PAIRS_MAX` random pairs at most.
    """

    def __init__(self, training: Samples, responses: Responses) -> None:
        pairs = _pairs(training, responses)
        if len(pairs[0]) > PAIRS_MAX:
            chosen = np.random.default_rng(SEED).choice(len(pairs[0]), PAIRS_MAX, replace=False)
            pairs = pairs[0][chosen], pairs[1][chosen]
        self.model = HistGradientBoostingRegressor(max_iter=100, early_stopping=False, random_state=SEED)
        elements = responses.elements[training.host[pairs[0]], pairs[1]]
        self.model.fit(self._features(training, responses, *pairs), training.targets[pairs[0], elements])

    def concentrations(self, samples: Samples, responses: Responses, level: str) -> np.ndarray:
        """See :class:`Baseline`."""
        values = np.zeros(samples.targets.shape, np.float32)
        spectrum, place = _pairs(samples, responses)
        if len(spectrum):
            elements = responses.elements[samples.host[spectrum], place]
            values[spectrum, elements] = self.model.predict(self._features(samples, responses, spectrum, place))
        return values

    @staticmethod
    def _features(samples: Samples, responses: Responses, spectrum: np.ndarray, place: np.ndarray) -> np.ndarray:
        properties = candidate_properties(responses.elements, responses.replaced, responses.composition)
        below = samples.pristine.cumsum(axis=1)
        windows = np.array([np.searchsorted(row, HOST_QUANTILES * row[-1]) for row in below])
        change = (samples.doped - samples.pristine).cumsum(axis=1) / samples.doped.shape[1]
        gained = np.take_along_axis(change, windows, axis=1)
        of_spectrum = np.hstack([gained, np.diff(gained, prepend=0, axis=1), change[:, -1:], windows[:, 3::4]])
        return np.hstack([of_spectrum[spectrum], properties[samples.host[spectrum], place]])


def _pairs(samples: Samples, responses: Responses) -> tuple[np.ndarray, np.ndarray]:
    """Index of the spectrum and place in its host's list of candidates, of everything that is asked."""
    return np.nonzero(asked_candidates(samples, responses))


class LeastSquares(Baseline):
    """Non-negative least squares of what doping changed on the responses of the candidates; nothing is trained.

    Running sums of the spectra are fitted beside the spectra, which forgives small shifts of peaks, and concentrations
    are penalised by their squares, or candidates with weak or similar responses would get any; the weights of both
    are chosen on the training samples. At level ``library`` responses that the library lacks are those of the masses;
    candidates without any response get zero.
    """

    levels = ("library", "mass_only")

    def __init__(self, training: Samples, responses: Responses) -> None:
        some = _some(training)

        def squares(level: str, weights: tuple[float, float]) -> float:
            error = _unmixed(some, responses, level, *weights)[0] - some.targets
            return float((error[some.candidates] ** 2).sum())

        choices = list(product(SUM_WEIGHTS, PENALTIES))
        self.weights = {level: min(choices, key=partial(squares, level)) for level in self.levels}

    def concentrations(self, samples: Samples, responses: Responses, level: str) -> np.ndarray:
        """See :class:`Baseline`."""
        return _unmixed(samples, responses, level, *self.weights[level])[0]

    def predict(self, samples: Samples, responses: Responses, level: str) -> Estimate:
        """See :class:`Baseline`; what is not asked about is suspected where much remains unexplained."""
        values, unexplained = _unmixed(samples, responses, level, *self.weights[level])
        return Estimate(values, values, unexplained=unexplained)


class ScaledLeastSquares(LeastSquares):
    """The same times one factor per dopant that fits the training spectra of relaxed crystals best.

    Around a dopant bonds change too, in ways that responses of masses do not know; as far as they add to what the
    masses do in the same way everywhere, a factor makes up for it. Learned from all training spectra where none is of
    a relaxed crystal; 1 where training holds nothing of a dopant, near 1 where least squares hardly find any.
    """

    def __init__(self, training: Samples, responses: Responses) -> None:
        super().__init__(training, responses)
        known = training[np.flatnonzero(training.relaxed)] if training.relaxed.any() else training
        self.factors: dict[str, np.ndarray] = {}
        for level in self.levels:
            found = super().concentrations(known, responses, level)
            products, squares = (found * known.targets).sum(axis=0), (found**2).sum(axis=0)
            fitted = (products + FACTOR_PRIOR) / (squares + FACTOR_PRIOR)
            self.factors[level] = np.where(products > 0, fitted, 1).astype(np.float32)

    def concentrations(self, samples: Samples, responses: Responses, level: str) -> np.ndarray:
        """See :class:`Baseline`."""
        return self.factors[level] * super().concentrations(samples, responses, level)

    def predict(self, samples: Samples, responses: Responses, level: str) -> Estimate:
        """See :class:`Baseline`; what is unexplained is as without factors."""
        values = self.concentrations(samples, responses, level)
        return Estimate(values, values)


class GeneralisedLeastSquares(Baseline):
    """Least squares on what the host's own superposed spectra teach (:mod:`defectnet.dataset.scatter`).

    Responses are those of finite concentration, and directions in which arrangements scatter count less; the noise
    beside the scatter is chosen on the training samples. Where superposed spectra are few, these are plain non-negative
    least squares on the library. Candidates that the library does not know get zero.
    """

    levels = ("library",)

    def __init__(self, training: Samples, responses: Responses) -> None:
        some = _some(training)

        def squares(noise: float) -> float:
            error = _generally_unmixed(some, responses, noise)[0] - some.targets
            return float((error[some.candidates] ** 2).sum())

        self.noise = min(NOISES, key=squares)

    def concentrations(self, samples: Samples, responses: Responses, level: str) -> np.ndarray:
        """See :class:`Baseline`."""
        return _generally_unmixed(samples, responses, self.noise)[0]

    def predict(self, samples: Samples, responses: Responses, level: str) -> Estimate:
        """See :class:`Baseline`; presence is scored by concentrations over their standard errors."""
        return Estimate(*_generally_unmixed(samples, responses, self.noise))


def _some(training: Samples) -> Samples:
    """Training samples on which least squares chooses."""
    count = min(CHOICE_SAMPLES, len(training))
    return training[np.random.default_rng(SEED).choice(len(training), count, replace=False)]


def _generally_unmixed(samples: Samples, responses: Responses, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Concentrations [n, 56], and these over their standard errors, at a variance of ``noise`` beside the scatter."""
    values, significance = np.zeros((2, *samples.targets.shape), np.float32)
    change = (samples.doped - samples.pristine).astype(float)
    for host, fold in {*zip(samples.host.tolist(), samples.fold.tolist(), strict=True)}:
        usable = np.flatnonzero(responses.knows_library[host])
        if not len(usable):
            continue
        elements, scatter = responses.elements[host, usable], responses.scatter[host, fold].astype(float)
        covariance = scatter.T @ scatter + noise * np.eye(scatter.shape[1])
        white = np.linalg.cholesky(np.linalg.inv(covariance))
        basis = responses.finite[host, fold, usable].astype(float) @ white
        q, r = np.linalg.qr(basis.T)
        for row in np.flatnonzero((samples.host == host) & (samples.fold == fold)):
            asked = samples.candidates[row, elements]
            if asked.any():
                found = nnls(r[:, asked], q.T @ (change[row] @ white))[0]
                error = np.sqrt(np.diag(np.linalg.pinv(r[:, asked].T @ r[:, asked])))
                values[row, elements[asked]] = found
                significance[row, elements[asked]] = found / np.maximum(error, 1e-12)
    return values, significance


def _unmixed(
    samples: Samples, responses: Responses, level: str, sums: float, penalty: float
) -> tuple[np.ndarray, np.ndarray]:
    """Concentrations [n, 56] by least squares with the given weight of running sums and penalty.

    Also [n] the share of the squares of what doping changed that they leave unexplained.
    """
    response, known = responses.mass_only, responses.knows_mass
    if level == "library":
        response = np.where(responses.knows_library[..., None], responses.library, response)
        known = responses.knows_library | known
    targets = _with_sums(samples.doped - samples.pristine, sums)
    values, unexplained = np.zeros(samples.targets.shape, np.float32), np.ones(len(samples))
    for host in np.unique(samples.host):
        elements = responses.elements[host]
        usable = np.flatnonzero((elements >= 0) & known[host])
        elements = elements[usable]
        # Least squares in the space that the responses span: a few numbers instead of hundreds.
        q, r = np.linalg.qr(_with_sums(response[host, usable], sums).T)
        basis = np.vstack([r, penalty * np.eye(len(usable))])
        for row in np.flatnonzero(samples.host == host):
            asked = samples.candidates[row, elements]
            if asked.any():
                target = np.concatenate([q.T @ targets[row], np.zeros(len(usable))])
                found = nnls(basis[:, asked], target)[0]
                values[row, elements[asked]] = found
                left = targets[row] - q @ (r[:, asked] @ found)
                unexplained[row] = (left @ left) / max(targets[row] @ targets[row], 1e-12)
    return values, unexplained


def _with_sums(curves: np.ndarray, weight: float) -> np.ndarray:
    """Curves [..., B] with their weighted running sums, [..., 2B]."""
    sums = curves.cumsum(axis=-1) * weight / curves.shape[-1] ** 0.5
    return np.concatenate([curves, sums], axis=-1).astype(np.float64)


BASELINES: dict[str, type[Baseline]] = {
    "gls": GeneralisedLeastSquares,
    "nnls": LeastSquares,
    "nnls_scaled": ScaledLeastSquares,
    "trees": Trees,
    "ridge": Ridge,
    "mean": Mean,
}
