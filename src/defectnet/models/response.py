"""One question per candidate dopant: how much of its own response is in what doping changed?

A doped spectrum is, at low concentration, the host's plus Σ concentration × response, and responses follow from the
host's Hessian. The network works in three steps, each of which stands in this file:

1. *Responses*: those of single defects stay as they are; those of masses alone are corrected by a small convolution
   that sees the host's spectrum, the response and the two elements; where nothing is known it makes them up.
2. *Unmixing*: non-negative least squares of the doped - pristine difference on the responses, in a metric that is
   learned, unrolled so that gradients pass through it. Where the scatter of the host's own superposed spectra is known
   (:mod:`defectnet.dataset.scatter`), directions in which arrangements scatter count less, and so does, where spectra
   were measured, what a measurement may add: noise, a background, a shift and a stretch of the energies.
3. *Judgement*: a transformer over the candidates, which are tokens without an order, sees each one's share in the fit
   and what the fit leaves, and corrects it; it knows saturation, look-alikes and noise.

The answer for a candidate does not depend on the order of the list, and a candidate is nothing but its properties:
elements that were never seen in training can be asked about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from defectnet.elements import MAX_Z, Properties
from defectnet.models.defectnet import TARGET_SCALE

LEVELS = ("library", "mass_only", "none")
"""What is known of a response: single defects and what superposing these shows; masses in the Hessian; nothing."""

STEPS = 40
"""Iterations of the unrolled least squares."""

RIDGES = (3e-4, 1.0, 1.0)
"""Ridge of the least squares by level of knowledge, relative to the diagonal; training goes on from there."""

SIZE_FLOOR = 1.0
"""Added to squared responses, which are of order 100 (10 outside of the scatter), so that a weak one cannot explain
everything by a lot of it."""

FAULTS = (0.01, 0.01, 0.3, 0.5)
"""Background and its slope over half the axis, in intensities; shift and stretch over half the axis, in bins."""

NOISE, NOISE_LEAST = 3e-3, 1e-4
"""Variance that no scatter explains, from which training goes on, and what single precision can bear."""

SIGNIFICANT = 1.1
"""Logarithm of 1 + concentration over standard error, here 2, at which presence is as likely as not before training."""

VACANCY_MASS = 0.5
"""Of nothing, in u, for the networks: less than that of any element, and with a logarithm."""

WINDOWS = 24
"""Energy windows in which the agreement of a response with the spectrum is told to the judge."""


@dataclass(frozen=True)
class Question:
    """n doped spectra of m hosts, and what is asked about them. B bins, K candidates of a host at most.

    host                   : [n] index of each spectrum's host among the m
    pristine, doped        : [n, B] intensities, of one supercell or instrument
    measured               : [n, B] bool, bins in which both are known; elsewhere they may be anything finite
    noise                  : [n] standard deviation of measured intensities; 0 of computed ones, which have no other
                             fault either
    mask                   : [n, K] candidates that are asked about
    host_pristine          : [m, B] intensities of the hosts (mean 1 over the axis)
    response               : [m, K, B] intensity per unit concentration; 0 where unknown
    scatter                : [m, R, B] principal directions of what arrangements add to responses; 0 where unknown
    level                  : [m, K] index in :data:`LEVELS`
    properties             : [m, K, D] of :func:`candidate_properties`
    """

    host: Tensor
    pristine: Tensor
    doped: Tensor
    measured: Tensor
    noise: Tensor
    mask: Tensor
    host_pristine: Tensor
    response: Tensor
    scatter: Tensor
    level: Tensor
    properties: Tensor


@dataclass(frozen=True)
class Answer:
    """What the network says about each candidate [n, K]; outside the mask everything is 0.

    concentration : fraction of sites, not negative
    presence      : logit that the concentration is not zero
    log_error     : logarithm of the expected error of the concentration in at.%
    unmixed       : concentration by the least squares alone
    unexplained   : [n] share of the squared doped - pristine difference that the least squares leaves
    """

    concentration: Tensor
    presence: Tensor
    log_error: Tensor
    unmixed: Tensor
    unexplained: Tensor


def _element_table() -> np.ndarray:
    """[57, 6] mass, covalent radius, electronegativity, period, group and valence electrons; vacancies are last."""
    rows = [astuple(Properties.of(z)) for z in range(1, MAX_Z + 1)]
    return np.array([*rows, (VACANCY_MASS, 0.0, 0.0, 0.0, 0.0, 0.0)])


ELEMENTS = _element_table()
PROPERTIES = 14


def candidate_properties(dopant: np.ndarray, replaced: np.ndarray, composition: np.ndarray) -> np.ndarray:
    """What distinguishes one candidate from another, [m, K, 14] float32, each of order one.

    ``dopant`` and ``replaced`` [m, K] are indices (-1: no candidate), ``composition`` [m, 56] atomic fractions.
    """
    new, old = ELEMENTS[dopant], ELEMENTS[replaced]
    share = np.take_along_axis(composition, np.maximum(replaced, 0), axis=1)
    mean_mass = np.broadcast_to((composition @ ELEMENTS[:MAX_Z, :1]), share.shape)
    ratio, radius, negativity = np.log(new[..., 0] / old[..., 0]), new[..., 1] - old[..., 1], new[..., 2] - old[..., 2]
    columns = [
        ratio, np.expm1(np.clip(-ratio, None, 2)), radius / 0.3, negativity, radius * negativity / 0.3,
        (new[..., 3] - old[..., 3]) / 2, (new[..., 5] - old[..., 5]) / 2,
        np.log(new[..., 0] / 40), np.log(old[..., 0] / 40), np.log(mean_mass / 40),
        new[..., 1] - 1.3, new[..., 2] - 2, (new[..., 4] - 9) / 6, 2 * share - 1,
    ]  # fmt: skip
    return np.where(dopant[..., None] >= 0, np.stack(columns, axis=-1), 0).astype(np.float32)


class Corrector(nn.Module):
    """Step 1: from what is known about a response to what the unmixing uses."""

    def __init__(self, channels: int = 24, dilations: Sequence[int] = (1, 2, 4, 8)) -> None:
        super().__init__()
        self.enter = nn.Conv1d(5 + len(LEVELS), channels, 5, padding="same")
        self.layers = nn.ModuleList(
            nn.Conv1d(channels, channels, 5, padding="same", dilation=dilation) for dilation in dilations
        )
        self.film = nn.Linear(PROPERTIES + len(LEVELS), 2 * channels * (1 + len(dilations)))
        self.leave = nn.Conv1d(channels, 1, 5, padding="same")
        self.gain = nn.Linear(PROPERTIES + len(LEVELS), 1)
        for last in (self.film, self.leave, self.gain):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, question: Question) -> Tensor:
        """[m, K, B]."""
        place, candidate = (question.level != LEVELS.index("library")).nonzero(as_tuple=True)
        bins = question.response.shape[-1]
        level = functional.one_hot(question.level[place, candidate], len(LEVELS)).float()
        about = torch.cat([question.properties[place, candidate], level], dim=-1)
        known = question.response[place, candidate]
        host = question.host_pristine[place]
        energy = torch.linspace(-1, 1, bins).to(known).expand_as(known)
        curves = [host, known / 5, known.cumsum(dim=1) / bins, host.cumsum(dim=1) / bins, energy]
        values = torch.cat([torch.stack(curves, dim=1), level[..., None].expand(-1, -1, bins)], dim=1)
        scales, shifts = self.film(about)[..., None].chunk(2, dim=1)
        scales, shifts = scales.chunk(1 + len(self.layers), dim=1), shifts.chunk(1 + len(self.layers), dim=1)
        values = functional.silu(self.enter(values) * (1 + scales[0]) + shifts[0])
        for layer, scale, shift in zip(self.layers, scales[1:], shifts[1:], strict=True):
            values = values + functional.silu(layer(values) * (1 + scale) + shift)
        # Where the host has no modes there is little to take away, but localised modes may come up anywhere.
        correction = 5 * self.leave(values).squeeze(1)
        correction = correction - correction.mean(dim=1, keepdim=True)
        return question.response.index_put((place, candidate), (1 + self.gain(about)) * known + correction)


def within(measured: Tensor, curves: Tensor, host: Tensor) -> Tensor:
    """Spectra [n, ..., B] where they are ``measured`` [n, B], with the area that ``host`` [n, B] has there.

    A spectrum that ends early has no other scale than the host's: what doping moves out of sight is lost.
    """
    area = (host * measured).sum(dim=-1, keepdim=True)
    if curves.dim() == 3:
        measured, area = measured[:, None], area[:, None]
    seen = curves * measured
    return seen * area / seen.sum(dim=-1, keepdim=True).clamp(min=1e-3)


def response_within(measured: Tensor, response: Tensor, host: Tensor) -> Tensor:
    """Responses [n, K, B] as spectra show them that are normalised by :func:`within`: its derivative."""
    seen, below = response * measured[:, None], (host * measured)[:, None]
    return seen - below * seen.sum(dim=-1, keepdim=True) / below.sum(dim=-1, keepdim=True).clamp(min=1e-3)


def with_sums(curves: Tensor, weight: float | Tensor = 1.0, sum_weight: float | Tensor = 1.0) -> Tensor:
    """Curves [..., B] beside their running sums, [..., 2B], such that sums of squares hardly depend on B."""
    root = curves.shape[-1] ** 0.5
    return torch.cat([weight * curves, sum_weight * curves.cumsum(dim=-1) / root], dim=-1) / root


class Unmixing(nn.Module):
    """Step 2: generalised non-negative least squares on spectra and on their running sums."""

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.log_weight = nn.Parameter(torch.zeros(bins))
        self.log_cumulative = nn.Parameter(torch.tensor(-1.0))
        self.log_ridge = nn.Parameter(torch.tensor(RIDGES).log())
        self.log_noise = nn.Parameter(torch.tensor(NOISE).log())
        self.log_faults = nn.Parameter(torch.tensor(FAULTS).log())

    def metric(self, curves: Tensor) -> Tensor:
        """Curves [..., B] with their running sums [..., 2B], such that plain sums of squares are the metric."""
        return with_sums(curves, self.log_weight.exp(), self.log_cumulative.exp())

    def faults(self, difference: Tensor, measured: Tensor) -> Tensor:
        """What a measurement may add [n, 4, B]: a background and its slope, a shift and a stretch of the energies."""
        place = torch.linspace(-1, 1, difference.shape[1]).to(difference)
        moved = torch.gradient(difference, dim=1)[0] * measured
        kinds = torch.stack([measured, place * measured, moved, place * moved], dim=1)
        return self.log_faults.exp()[:, None] * kinds

    def forward(
        self,
        difference: Tensor,
        measured: Tensor,
        noise: Tensor,
        response: Tensor,
        level: Tensor,
        scatter: Tensor,
        mask: Tensor,
    ) -> tuple[Tensor, ...]:
        """Concentrations [n, K] and standard errors [n, K]; Gram matrix [n, K, K], projections [n, K] and square [n].

        Of differences [n, B] where they are ``measured`` [n, B] with ``noise`` [n], responses [n, K, B] of ``level``
        [n, K], and scatter [n, R, B].
        """
        target, basis = self.metric(difference), self.metric(response)
        faults = self.faults(difference, measured) * (noise > 0)[:, None, None]
        spread = self.metric(torch.cat([scatter, faults], dim=1))
        # Of a difference of two spectra.
        variance = ((self.log_noise.exp() + NOISE_LEAST + 2 * noise**2) / difference.shape[-1])[:, None, None]
        identity = torch.eye(spread.shape[1]).to(spread)
        inner = torch.linalg.cholesky(spread @ spread.transpose(1, 2) + variance * identity)

        def weighted(curves: Tensor) -> Tensor:
            """Curves [n, ..., 2B] times the inverse covariance, times the variance (Woodbury)."""
            return curves - torch.cholesky_solve(spread @ curves.transpose(1, 2), inner).transpose(1, 2) @ spread

        weighed = weighted(basis)
        gram = (weighed @ basis.transpose(1, 2)) * (mask[:, :, None] & mask[:, None, :])
        aim = torch.einsum("nb,nkb->nk", target, weighed) * mask
        square = (weighted(target[:, None]).squeeze(1) * target).sum(dim=1)
        size = torch.diagonal(gram, dim1=1, dim2=2)
        scale = (size + SIZE_FLOOR).sqrt()
        unit = gram / (scale[:, :, None] * scale[:, None, :])
        unit = unit + torch.diag_embed(self.log_ridge.exp()[level] + (~mask).float())
        wanted = aim / scale
        # Nesterov's accelerated projected gradient; the largest row sum bounds the largest eigenvalue.
        step = 1 / unit.detach().abs().sum(dim=2).amax(dim=1, keepdim=True)
        found = previous = torch.linalg.solve(unit, wanted).clamp(min=0)
        for k in range(STEPS):
            ahead = found + k / (k + 3) * (found - previous)
            previous = found
            slope = (unit @ ahead[..., None]).squeeze(-1) - wanted
            found = (ahead - step * slope).clamp(min=0)
        error = (variance[..., 0] * torch.diagonal(torch.linalg.inv(unit), dim1=1, dim2=2)).sqrt()
        return found / scale, error / scale, gram, aim, square


class ResponseNet(nn.Module):
    """The three steps; 216,876 parameters with 240 bins. ``bins`` is the length of the spectra."""

    def __init__(self, bins: int, width: int = 96, blocks: int = 2) -> None:
        super().__init__()
        self.config = {"bins": bins, "width": width, "blocks": blocks}
        self.corrector = Corrector()
        self.unmixing = Unmixing(bins)
        self.spectrum = nn.Sequential(
            nn.Conv1d(4, 24, 7, stride=2), nn.SiLU(),
            nn.Conv1d(24, 32, 7, stride=2), nn.SiLU(),
            nn.AdaptiveAvgPool1d(8), nn.Flatten(), nn.Linear(256, width),
        )  # fmt: skip
        self.candidate = nn.Linear(PROPERTIES + len(LEVELS) + 11 + 2 * WINDOWS, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.judge = nn.TransformerEncoder(layer, blocks, enable_nested_tensor=False)
        self.head = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 4 * len(LEVELS))
        )
        nn.init.zeros_(self.head[-1].weight)
        nn.init.zeros_(self.head[-1].bias)

    def compared(self, question: Question) -> tuple[Tensor, Tensor, Tensor]:
        """Pristine spectra [n, B], doped less pristine [n, B], and what responses [n, K, B] look like among these."""
        measured, host = question.measured.float(), question.host_pristine[question.host]
        pristine, doped = (within(measured, curves, host) for curves in (question.pristine, question.doped))
        return pristine, doped - pristine, response_within(measured, self.corrector(question)[question.host], host)

    def forward(self, question: Question) -> Answer:
        """See :class:`Question` and :class:`Answer`."""
        host, mask, measured = question.host, question.mask, question.measured.float()
        pristine, difference, response = self.compared(question)
        scatter = response_within(measured, question.scatter[host], question.host_pristine[host])
        known = question.level[host]
        unmixed, error, gram, aim, square = self.unmixing(
            difference, measured, question.noise, response, known, scatter, mask
        )
        significance = torch.log1p(unmixed / error)
        residual = difference - torch.einsum("nk,nkb->nb", unmixed, response)
        size = torch.diagonal(gram, dim1=1, dim2=2) + 1e-8
        left = aim - (gram @ unmixed[..., None]).squeeze(-1)
        total = square[:, None] + 1e-8
        cosines = gram / (size[:, :, None] * size[:, None, :]).sqrt()
        alike = (cosines - torch.diag_embed(torch.diagonal(cosines, dim1=1, dim2=2))).abs().amax(dim=2)
        unexplained = (residual**2).sum(dim=1, keepdim=True) / ((difference**2).sum(dim=1, keepdim=True) + 1e-8)
        fit = [
            10 * unmixed,
            significance,
            10 * (aim / size).clamp(-1, 1),
            aim / (size * total).sqrt(),
            left / (size * total).sqrt(),
            alike,
            torch.log(size) / 4,
            (torch.log(total) / 4).expand_as(aim),
            (10 * unmixed.sum(dim=1, keepdim=True)).expand_as(aim),
            (torch.log(unexplained + 1e-4) / 4).expand_as(aim),
            (torch.log(question.noise[:, None] + 1e-3) / 4).expand_as(aim),
        ]  # fmt: skip
        products = response / size.sqrt()[..., None] / total.sqrt()[..., None]
        agreement = functional.adaptive_avg_pool1d(products * difference[:, None], WINDOWS)
        after = functional.adaptive_avg_pool1d(products * residual[:, None], WINDOWS)
        level = functional.one_hot(known, len(LEVELS)).float()
        told = [question.properties[host], level, torch.stack(fit, dim=-1), 20 * agreement, 20 * after]
        tokens = self.candidate(torch.cat(told, dim=-1))
        whole = self.spectrum(torch.stack([pristine, difference, residual, measured], dim=1))
        tokens = torch.cat([whole[:, None], tokens], dim=1)
        hidden = functional.pad(~mask, (1, 0))
        tokens = self.judge(tokens, src_key_padding_mask=hidden)
        # What is known decides how far the least squares can be trusted.
        heads = self.head(tokens[:, 1:]).unflatten(-1, (len(LEVELS), 4))
        of_level = known[..., None, None].expand(-1, -1, 1, 4)
        gate, amount, presence, log_error = heads.gather(2, of_level).squeeze(2).unbind(dim=-1)
        # Both start as the least squares; the second term can add what that misses.
        concentration = 2 * torch.sigmoid(gate) * unmixed + 0.02 * functional.softplus(amount - 6)
        return Answer(
            concentration=concentration * mask,
            presence=(presence + 2 * (significance - SIGNIFICANT)) * mask,
            log_error=log_error * mask,
            unmixed=unmixed * mask,
            unexplained=unexplained.squeeze(1),
        )


def loss(answer: Answer, concentration: Tensor, mask: Tensor) -> Tensor:
    """What training minimises, for true concentrations [n, K] (fractions).

    Squared errors of the answer and, less, of the least squares; errors of square roots, which count at low
    concentration, where detection matters; cross entropies of presence; and the likelihood of the errors.
    """
    count = mask.sum().clamp(min=1)
    off = TARGET_SCALE * (answer.concentration - concentration)
    unmixed = TARGET_SCALE * (answer.unmixed - concentration)
    roots = (answer.concentration + 1e-4).sqrt() - (concentration + 1e-4).sqrt()
    present = functional.binary_cross_entropy_with_logits(
        answer.presence, (concentration > 0).float(), reduction="none"
    )
    error = (100 / TARGET_SCALE * off.detach()).abs() + 0.02  # at.%
    likelihood = answer.log_error + error * torch.exp(-answer.log_error)  # Laplace
    terms = off**2 + 0.2 * functional.huber_loss(unmixed, torch.zeros_like(unmixed), reduction="none")
    terms = terms + roots**2 + 0.05 * present + 0.01 * likelihood
    return (terms * mask).sum() / count
