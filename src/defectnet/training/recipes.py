"""How each network is fed and what it minimises; :mod:`defectnet.training.fit` runs the epochs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from scipy.stats import gmean
from torch import Tensor, nn
from torch.nn import functional

from defectnet.config import Training
from defectnet.dataset.samples import Responses, Samples, asked_candidates, sample_mask
from defectnet.models.defectnet import TARGET_SCALE, DefectNet, masked_mse
from defectnet.models.response import LEVELS, Question, ResponseNet, candidate_properties, loss, with_sums

HOSTS_PER_STEP = 8
"""Responses are corrected once per host and step, so a step takes many spectra of few hosts."""

HIDDEN_CHANCE = 0.05
"""How often a dopant that is there is not asked about, so that the network learns to notice."""

ERROR_FLOORS = (1e-4, 1e-3, 2e-3, 5e-3, 1e-2)
"""Fractions one of which is added to expected errors: a certain network must not be infinitely certain, and one that
knows superposed spectra best not too certain of relaxed crystals."""

COMPUTED_CHANCE = 0.3
"""How often training shows a spectrum without the faults of a measurement."""

NOISE_FLOOR = 1e-3
"""Least error of a measured intensity, of which the mean is 1: no measurement is better."""

NOISE_MISJUDGED = 0.2
"""Standard deviation of the logarithm by which the noise is misjudged in training."""

BAND_EDGE_SHARE = 0.999
"""Of a host's spectrum that lies below what counts as its highest modes."""

IMAGINED_WEIGHT = 0.1
"""What errors of the responses that networks make up weigh beside errors of concentrations."""

SHARE_MAX = 3.0
"""Of the squares of a response that its error can reach; weak responses would drown the others."""

LEVEL_CHANCES = (0.5, 0.25, 0.25)
"""How often training knows the responses from the library, from masses, or not at all."""

MIXED_CHANCE, WORSE_CHANCE = 0.1, 0.3
"""How often training knows some candidates of a host less well than others, and then how many: more often, and networks
learn to distrust what they know of all."""


class Recipe(Protocol):
    """A network with its training and validation data."""

    model: nn.Module
    gradient_max: float

    def optimizer(self) -> torch.optim.Optimizer:
        """Of the network's parameters."""

    def learning_rate(self, epoch: int) -> float:
        """Step size in an epoch, counted from 1."""

    def steps(self, stream: torch.Generator) -> Iterator[tuple[Tensor, float, int]]:
        """One pass over the training spectra: loss to descend, squared errors in at.%² and their number."""

    def validate(self) -> float:
        """Root mean squared error in at.% over all candidates of the validation spectra."""


def _rmse_at_percent(concentration: np.ndarray, samples: Samples) -> float:
    """Root mean squared error of concentrations [n, 56] in at.% over all candidates of all samples."""
    error = (concentration - samples.targets)[samples.candidates]
    return 100 * float(np.sqrt(np.mean(error.astype(np.float64) ** 2)))


class PublishedRecipe:
    """The published network: one spectrum after the other, random candidate masks."""

    gradient_max = float("inf")

    def __init__(self, model: DefectNet, training: Samples, validation: Samples, settings: Training, device: str):
        self.model, self.settings, self.validation = model, settings, validation
        self.device = device
        names = ("pristine", "doped", "composition", "candidates", "targets")
        self.tensors = [torch.from_numpy(getattr(training, name)).to(device) for name in names]

    def optimizer(self) -> torch.optim.Optimizer:
        """See :class:`Recipe`."""
        return torch.optim.Adam(self.model.parameters())

    def learning_rate(self, epoch: int) -> float:
        """See :class:`Recipe`."""
        return self.settings.learning_rate

    def steps(self, stream: torch.Generator) -> Iterator[tuple[Tensor, float, int]]:
        """See :class:`Recipe`."""
        pristine, doped, composition, candidates, targets = self.tensors
        for batch in torch.randperm(len(targets), generator=stream).split(self.settings.batch_size):
            index = batch.to(self.device)
            mask = sample_mask(candidates[index], targets[index], self.settings.distractor_probability, stream)
            answer = self.model(pristine[index], doped[index], composition[index], mask)
            value = masked_mse(answer, targets[index], mask)
            count = int(mask.sum())
            yield value, float(value.detach()) * count * (100 / TARGET_SCALE) ** 2, count

    def validate(self) -> float:
        """See :class:`Recipe`."""
        return _rmse_at_percent(self.model.predict(self.validation), self.validation)


def present_candidates(samples: Samples, responses: Responses) -> np.ndarray:
    """Concentrations [n, K] of the candidates of each sample's host; 0 where a candidate is not asked about."""
    columns = np.maximum(responses.elements[samples.host], 0)
    concentrations = np.take_along_axis(samples.targets, columns, axis=1)
    return np.where(asked_candidates(samples, responses), concentrations, 0)


class ResponseRecipe:
    """The response network: many spectra of few hosts per step, knowledge and measurement disturbed at random.

    ``zero`` is the place of zero energy on the axis, in bins.
    """

    gradient_max = 5.0

    def __init__(
        self,
        model: ResponseNet,
        training: Samples,
        validation: Samples,
        responses: Responses,
        zero: float,
        settings: Training,
        device: str,
    ):
        self.model, self.settings, self.device = model, settings, device
        self.zero = zero
        self.validation = validation
        self.hosts = Hosts(responses, device)
        self.view = self.hosts.views(training)
        self.rows = [np.flatnonzero(self.view == view) for view in np.unique(self.view)]
        self.arrays = {
            name: torch.from_numpy(np.ascontiguousarray(array)).to(device)
            for name, array in (
                ("pristine", training.pristine),
                ("doped", training.doped),
                ("noise", training.noise),
                ("present", present_candidates(training, responses)),
                ("asked", asked_candidates(training, responses)),
            )
        }

    def optimizer(self) -> torch.optim.Optimizer:
        """See :class:`Recipe`."""
        return torch.optim.AdamW(self.model.parameters(), weight_decay=0.01)

    def learning_rate(self, epoch: int) -> float:
        """Up in the first tenth of the epochs, then down as half a cosine."""
        done = (epoch - 0.5) / self.settings.epochs
        return self.settings.learning_rate * min(done / 0.1, 0.5 * (1 + math.cos(math.pi * max(done - 0.1, 0) / 0.9)))

    def steps(self, stream: torch.Generator) -> Iterator[tuple[Tensor, float, int]]:
        """See :class:`Recipe`."""
        share = max(1, self.settings.batch_size // HOSTS_PER_STEP)
        order = torch.randperm(len(self.rows), generator=stream).tolist()
        rows = {host: torch.from_numpy(self.rows[host])[torch.randperm(len(self.rows[host]), generator=stream)]
                for host in order}  # fmt: skip
        groups = [order[first : first + HOSTS_PER_STEP] for first in range(0, len(order), HOSTS_PER_STEP)]
        steps = [
            (group, first)
            for group in groups
            for first in range(0, max(len(rows[host]) for host in group), share)
        ]  # fmt: skip
        for step in torch.randperm(len(steps), generator=stream).tolist():
            group, first = steps[step]
            index = torch.cat([rows[host][first : first + share] for host in group])
            yield self._step(index.to(self.device), stream)

    def _step(self, index: Tensor, stream: torch.Generator) -> tuple[Tensor, float, int]:
        present, asked = self.arrays["present"][index], self.arrays["asked"][index]
        kept = torch.rand(asked.shape, generator=stream).to(self.device) < self.settings.distractor_probability
        mask = (present > 0) | (asked & kept)
        # Of some samples one dopant, any that is there, is hidden.
        lots = torch.rand(asked.shape, generator=stream).to(self.device) * (present > 0)
        hidden = functional.one_hot(lots.argmax(dim=1), asked.shape[1]).bool() & (present > 0)
        hidden &= (torch.rand((len(asked), 1), generator=stream) < HIDDEN_CHANCE).to(self.device)
        mask &= ~hidden
        views, host = np.unique(self.view[index.cpu().numpy()], return_inverse=True)
        wanted = torch.multinomial(torch.tensor(LEVEL_CHANCES), len(views), replacement=True, generator=stream)
        worse = torch.rand((len(views), asked.shape[1]), generator=stream) < WORSE_CHANCE
        worse &= torch.rand((len(views), 1), generator=stream) < MIXED_CHANCE
        wanted = (wanted[:, None] + worse).clamp(max=len(LEVELS) - 1)
        question = self.hosts.question(
            views, torch.from_numpy(host).to(self.device), wanted, self.arrays["pristine"][index],
            self.arrays["doped"][index], self.arrays["noise"][index], mask,
        )  # fmt: skip
        answer = self.model(disturbed(question, self.settings, self.zero, stream))
        off = (100 * (answer.concentration.detach() - present))[mask]
        value = loss(answer, present, mask) + IMAGINED_WEIGHT * self._imagined(question, views)
        return value, float((off**2).sum()), len(off)

    def _imagined(self, question: Question, views: np.ndarray) -> Tensor:
        """Mean squared error of the responses that are corrected or made up though single defects tell them.

        As a share of these responses' squares, on spectra and their running sums.
        """
        host, fold = (torch.from_numpy(part).to(self.device) for part in divmod(views, self.hosts.folds))
        library = LEVELS.index("library")
        judged = (question.level != library) & (self.hosts.level[host, :, library] == library)
        if not judged.any():
            return torch.zeros((), device=self.device)
        truth = self.hosts.finite[host, fold][judged]
        off = self.model.corrector(question)[judged] - truth
        squares = [(with_sums(curves) ** 2).sum(dim=1) for curves in (off, truth)]
        return (squares[0] / (squares[1] + 1)).clamp(max=SHARE_MAX).mean()

    def validate(self) -> float:
        """See :class:`Recipe`; the geometric mean over the levels of knowledge, or the worst one would decide alone."""
        told = (predict([self.model], self.validation, self.hosts, level) for level in LEVELS)
        return float(gmean([_rmse_at_percent(one.concentration, self.validation) for one in told]))


class Hosts:
    """What is known of every host, as tensors."""

    def __init__(self, responses: Responses, device: torch.device | str = "cpu"):
        self.responses = responses
        properties = candidate_properties(responses.elements, responses.replaced, responses.composition)
        self.properties = torch.from_numpy(properties).to(device)
        self.pristine = torch.from_numpy(responses.pristine).to(device)
        self.folds = responses.finite.shape[1]
        self.finite, self.mass_only, self.scatter = (
            torch.from_numpy(array).to(device) for array in (responses.finite, responses.mass_only, responses.scatter)
        )
        knows = np.stack([responses.knows_library, responses.knows_mass], axis=2)
        # The best level that is no better than the wanted one.
        best = np.full((*knows.shape[:2], len(LEVELS)), 2)
        best[..., 1] = np.where(knows[..., 1], 1, 2)
        best[..., 0] = np.where(knows[..., 0], 0, best[..., 1])
        self.level = torch.from_numpy(best).to(device)

    def views(self, samples: Samples) -> np.ndarray:
        """Number [n] of the host of each sample and of what its superposed spectra teach about this sample."""
        return samples.host * self.folds + samples.fold

    def question(
        self,
        views: np.ndarray,
        host: Tensor,
        wanted: Tensor,
        pristine: Tensor,
        doped: Tensor,
        noise: Tensor,
        mask: Tensor,
    ) -> Question:
        """A question about spectra [n, B] of ``views`` [m], at levels ``wanted`` [m, K] or below.

        Spectra are NaN where they were not measured.
        """
        chosen, fold = (torch.from_numpy(part).to(self.pristine.device) for part in divmod(views, self.folds))
        wanted = wanted.to(chosen.device)
        level = self.level[chosen].gather(2, wanted[..., None]).squeeze(2)
        finite, mass_only = self.finite[chosen, fold], self.mass_only[chosen]
        known = torch.stack([finite, mass_only, torch.zeros_like(finite)], dim=2)
        response = known.gather(2, level[..., None, None].expand(-1, -1, 1, known.shape[-1])).squeeze(2)
        told = (level == LEVELS.index("library")).any(dim=1)
        return Question(
            host=host,
            pristine=pristine.nan_to_num(),
            doped=doped.nan_to_num(),
            measured=(pristine + doped).isfinite(),
            noise=noise,
            mask=mask,
            host_pristine=self.pristine[chosen],
            response=response,
            scatter=self.scatter[chosen, fold] * told[:, None, None],
            level=level,
            properties=self.properties[chosen],
        )


def disturbed(question: Question, settings: Training, zero: float, stream: torch.Generator) -> Question:
    """The same as a measurement might show it: on another energy scale, coarser, cut off, on a background, with noise.

    ``zero`` is the place of zero energy on the axis, in bins. Amounts are uniform from 0 to those of the settings.
    What is computed of a host is as coarse as the spectra, but has no other fault, and so are some of the spectra.
    """
    device = question.doped.device
    n, bins = question.doped.shape

    def upto(largest: float, *shape: int) -> Tensor:
        return (largest * torch.rand(shape, generator=stream)).to(device)

    curves = {name: getattr(question, name) for name in ("pristine", "doped", "host_pristine", "response", "scatter")}
    width = float(upto(settings.resolution_bins, 1))
    if width > 0.3:
        curves = {name: blurred(curve, width) for name, curve in curves.items()}
    faulty = upto(1, n, 1) >= COMPUTED_CHANCE
    scale = 1 + faulty * (upto(2 * settings.axis_scale, n, 1) - settings.axis_scale)
    noise = faulty * upto(settings.noise, n, 1)
    tilt = torch.linspace(-1, 1, bins, device=device)
    for name in ("pristine", "doped"):
        level, slope = (settings.background * torch.randn((2, n, 1), generator=stream)).to(device)
        random = torch.randn((n, bins), generator=stream).to(device)
        curves[name] = stretched(curves[name], scale, zero) + faulty * (level + slope * tilt) + noise * random
    # Some begin above the elastic line, and end before the host's highest modes or beyond.
    below = curves["host_pristine"].cumsum(dim=1)
    top = (below < BAND_EDGE_SHARE * below[:, -1:]).sum(dim=1)[question.host, None] - zero
    place = torch.arange(bins, device=device) - zero
    inside = (place >= upto(0.15, n, 1) * top) & (place <= (0.6 + upto(0.6, n, 1)) * top)
    whole = upto(1, n, 1) >= settings.cut_chance
    misjudged = torch.exp(NOISE_MISJUDGED * torch.randn((n, 1), generator=stream)).to(device)
    told = torch.hypot(question.noise[:, None], faulty * (noise * misjudged).clamp(min=NOISE_FLOOR))[:, 0]
    return replace(question, measured=question.measured & (inside | whole), noise=told, **curves)


def stretched(curves: Tensor, scale: Tensor, zero: float) -> Tensor:
    """Curves [n, B] whose energies are multiplied by ``scale`` [n, 1], areas conserved; ``zero`` as a place in bins."""
    bins = curves.shape[1]
    below = functional.pad(curves.cumsum(dim=1), (1, 0))
    place = (zero + (torch.arange(bins + 1).to(curves) - zero) / scale).clamp(0, bins)
    first = place.long().clamp(max=bins - 1)
    return torch.lerp(below.gather(1, first), below.gather(1, first + 1), place - first).diff(dim=1)


def blurred(curves: Tensor, width: float) -> Tensor:
    """Curves [..., B] after a Gaussian of ``width`` bins; what leaves the axis is lost."""
    reach = int(4 * width) + 1
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1).to(curves) / width) ** 2)
    flat = curves.reshape(-1, 1, curves.shape[-1])
    return nn.functional.conv1d(flat, (kernel / kernel.sum())[None, None], padding=reach).view(curves.shape)


@dataclass(frozen=True)
class Prediction:
    """What one or several networks say about n spectra.

    concentration, presence, error : [n, 56] fractions, probabilities, expected absolute errors as fractions
    unexplained                    : [n] share of the squared doped - pristine difference that the responses leave
    """

    concentration: np.ndarray
    presence: np.ndarray
    error: np.ndarray
    unexplained: np.ndarray


@torch.no_grad()
def predict(
    models: Sequence[ResponseNet], samples: Samples, hosts: Hosts, level: str, batch_size: int = 512
) -> Prediction:
    """Mean answer of networks that were trained alike; what they disagree about adds to the error.

    So does what they leave unexplained of the doped - pristine difference: its share in the norm, times the total
    concentration that explains the rest. Networks expect errors like those of the spectra that they have seen most of,
    superposed ones, and this grows where a crystal is not a superposition of its dopants.
    The candidates of ``samples`` are asked about; ``level`` is the best knowledge of responses that is used.
    """
    n, elements_max = samples.targets.shape
    result = Prediction(*(np.zeros((n, elements_max), np.float32) for _ in range(3)), np.zeros(n, np.float32))
    order = np.argsort(hosts.views(samples), kind="stable")
    for first in range(0, n, batch_size):
        index = order[first : first + batch_size]
        question = _all_asked(samples[index], hosts, level)
        answers = [model(question) for model in models]
        amounts = torch.stack([answer.concentration for answer in answers])
        errors = torch.stack([torch.exp(answer.log_error) / 100 for answer in answers])
        unexplained = torch.stack([answer.unexplained for answer in answers]).mean(dim=0)
        amount = amounts.mean(dim=0)
        doubt = unexplained.sqrt() * amount.sum(dim=1)
        told = {
            "concentration": amount,
            "presence": torch.stack([torch.sigmoid(answer.presence) for answer in answers]).mean(dim=0),
            "error": (errors.mean(dim=0) ** 2 + amounts.var(dim=0, correction=0)).sqrt() + doubt[:, None],
        }
        row, column = np.nonzero(question.mask.cpu().numpy())
        elements = hosts.responses.elements[samples.host[index[row]], column]
        for name, values in told.items():
            getattr(result, name)[index[row], elements] = values.cpu().numpy()[row, column]
        result.unexplained[index] = unexplained.cpu().numpy()
    return result


@torch.no_grad()
def compared(
    models: Sequence[ResponseNet], samples: Samples, hosts: Hosts, level: str
) -> tuple[np.ndarray, np.ndarray]:
    """What networks compare: doped less pristine intensities [n, B], and the responses [n, K, B] they look for there.

    Zero where nothing was measured; responses are the mean of the networks' corrected ones.
    """
    question = _all_asked(samples, hosts, level)
    seen = [model.compared(question) for model in models]
    response = torch.stack([responses for _, _, responses in seen]).mean(dim=0)
    return seen[0][1].cpu().numpy(), response.cpu().numpy()  # all see the same difference


def _all_asked(samples: Samples, hosts: Hosts, level: str) -> Question:
    """Samples with all their candidates, at a level of knowledge or below, as networks take them."""
    device = hosts.pristine.device
    some, host = np.unique(hosts.views(samples), return_inverse=True)
    wanted = torch.full((len(some), hosts.responses.elements.shape[1]), LEVELS.index(level))
    given = (host, samples.pristine, samples.doped, samples.noise, asked_candidates(samples, hosts.responses))
    place, pristine, doped, noise, mask = (torch.from_numpy(array).to(device) for array in given)
    return hosts.question(some, place, wanted, pristine, doped, noise, mask)


@dataclass(frozen=True)
class Interval:
    """Half an interval is ``factor`` times the sum of the expected error and ``floor``, both fractions."""

    factor: float
    floor: float

    def width(self, error: np.ndarray) -> np.ndarray:
        """Of either side, for expected errors of any shape."""
        return self.factor * (error + self.floor)


def interval_of(prediction: Prediction, samples: Samples, coverage: float) -> Interval:
    """The narrowest intervals that hold the truth with ``coverage``.

    Split conformal prediction with normalised scores, every host counting alike, because spectra of one host are
    wrong together (Lei et al., J. Am. Stat. Assoc. 113, 1094 (2018)). The samples must be of hosts that training has
    not seen; with h hosts the quantile is taken at ``coverage`` (h + 1) / h. Where some are of relaxed crystals, only
    these count: they are what is measured, and networks know spectra made of responses better. Of
    :data:`ERROR_FLOORS` the one is taken with which intervals are narrowest in the geometric mean, in which those that
    could be narrow count as much as those that cannot.
    """
    judged = samples.relaxed if samples.relaxed.any() else np.ones(len(samples), bool)
    row, element = np.nonzero(samples.candidates & judged[:, None])
    off = np.abs(prediction.concentration[row, element] - samples.targets[row, element])
    error = prediction.error[row, element]
    host = samples.host[row]
    weights = 1 / np.bincount(host)[host]
    hosts = len(np.unique(host))
    wanted = min(coverage * (hosts + 1) / hosts, 1.0) * hosts

    def with_floor(floor: float) -> Interval:
        scores = off / (error + floor)
        order = np.argsort(scores)
        reached = np.searchsorted(np.cumsum(weights[order]), wanted - 1e-9)
        return Interval(float(scores[order][min(reached, len(scores) - 1)]), floor)

    return min(map(with_floor, ERROR_FLOORS), key=lambda one: float(weights @ np.log(one.width(error))))
