"""From the dataset file to arrays a model can eat: energy axes, candidate masks, augmentation.

Two axes:

``host``
    The published one: ``bins`` equal bins between zero and the host's own highest mode energy, for the pristine *and*
    the doped spectrum. Kept as the faithful baseline, with its flaws: modes above the host's band edge (localised
    modes of light or stiff dopants) vanish, and absolute energy is lost. Negative (imaginary) energies become
    zero, which is what ``numpy.real`` of ASE's complex energies does in the published notebooks. The three rigid
    translations, which those notebooks keep and which :class:`~defectnet.phonons.modes.Modes` does not contain,
    lie at zero energy and are the reason why the axis starts there.
``absolute``
    The energy grid of the dataset, shared by all hosts, with headroom above the band edge and below zero.

Spectra are handed to models as intensity = share of the modes in a bin × number of bins: dimensionless, mean 1 over an
axis that covers every mode, less where modes lie outside.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from defectnet.config import Spectra
from defectnet.dataset.scatter import DIRECTIONS, FEWEST, FOLDS, folds_of, taught
from defectnet.dataset.schema import RELAXED, Dataset, SpectrumTable
from defectnet.elements import index_of
from defectnet.phonons.modes import Modes
from defectnet.phonons.pdos import spectrum, strengths


@dataclass(frozen=True)
class Axis:
    """The energy axis of a model's input.

    kind      : ``host`` or ``absolute``, see the module's description.
    bins      : number of bins of the ``host`` axis; the ``absolute`` axis has those of the dataset.
    sigma_meV : Gaussian broadening on the ``host`` axis; 0 is the published plain histogram.
    """

    kind: Literal["host", "absolute"]
    bins: int = 100
    sigma_meV: float = 0.0


PUBLISHED = Axis("host", bins=100, sigma_meV=0.0)
"""The axis of arXiv:2506.00725, the only ``host`` axis that compact datasets have."""


@dataclass(frozen=True)
class Samples:
    """n doped spectra beside their hosts' pristine ones, as arrays; of 57 for 56 columns where there may be vacancies.

    row, host        : [n] rows in the dataset's tables
    pristine, doped  : [n, B] float32 intensities, mean 1 over the axis
    composition      : [n, 56] float32 atomic fractions of the host
    candidates       : [n, 56] bool, the dopants that are asked about
    targets          : [n, 56] float32 concentrations, fractions of the sites
    relaxed          : [n] bool, whether the doped spectrum is of a relaxed crystal
    fold             : [n] which superposed spectra, of :func:`~defectnet.dataset.scatter.folds_of`, do not judge it
    noise            : [n] float32 standard deviation of a measured intensity; 0 of computed spectra
    """

    row: np.ndarray
    host: np.ndarray
    pristine: np.ndarray
    doped: np.ndarray
    composition: np.ndarray
    candidates: np.ndarray
    targets: np.ndarray
    relaxed: np.ndarray
    fold: np.ndarray
    noise: np.ndarray

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, index: np.ndarray) -> Samples:
        return Samples(**{name: value[index] for name, value in vars(self).items()})


def host_edges(modes: Modes, bins: int) -> np.ndarray:
    """Edges [bins + 1] in meV of the published axis: from zero to the highest mode of the pristine host."""
    return np.linspace(0.0, modes.energies_meV.max(), bins + 1)


def intensity(modes: Modes, edges_meV: np.ndarray, axis: Axis, settings: Spectra) -> np.ndarray:
    """Intensity [B] of one spectrum on a ``host`` axis, see :func:`intensities`."""
    return intensities([modes], edges_meV[None], axis, settings)[0]


def intensities(modes: Sequence[Modes], edges_meV: np.ndarray, axis: Axis, settings: Spectra) -> np.ndarray:
    """Intensities [S, B] on ``host`` axes with edges [S, B + 1]: share of modes per bin × B, imaginary ones at zero.

    ``settings.weighting: neutron`` counts each mode with its σ/m weight, as in the dataset's own spectra.
    """
    bins = edges_meV.shape[1] - 1
    if axis.sigma_meV > 0:
        settings = settings.model_copy(update={"sigma_meV": axis.sigma_meV})
        real = (replace(one, energies_meV=np.maximum(one.energies_meV, 0.0)) for one in modes)
        broadened = [spectrum(one, edges, settings) for one, edges in zip(real, edges_meV, strict=True)]
        return np.array(broadened) * np.diff(edges_meV) * bins
    row = np.repeat(np.arange(len(modes)), [len(one.energies_meV) for one in modes])
    place = np.concatenate([one.energies_meV for one in modes]).clip(0) / edges_meV[row, -1]  # 1 at the highest edge
    inside = place <= 1
    column = np.minimum((place * bins).astype(np.int64), bins - 1)
    strength = np.concatenate(strengths(modes, settings))
    shares = np.bincount((row * bins + column)[inside], strength[inside], len(modes) * bins)
    return shares.reshape(-1, bins) * bins


def load_samples(dataset: Dataset, axis: Axis) -> Samples:
    """All doped spectra of the dataset on the given axis, in the order of its table."""
    rows = dataset.doped
    hosts = dataset.spectra.host[rows]
    spectra = intensities_of(dataset, axis)
    return Samples(
        row=rows,
        host=hosts,
        pristine=spectra[dataset.spectra.reference[rows]],
        doped=spectra[rows],
        composition=dataset.hosts.composition[hosts].astype(np.float32),
        candidates=dataset.hosts.candidates[hosts],
        targets=dataset.spectra.concentrations[rows].astype(np.float32),
        relaxed=np.isin(dataset.spectra.fidelity, RELAXED)[rows],
        fold=folds_of(dataset.spectra)[rows],
        noise=np.zeros(len(rows), np.float32),
    )


@dataclass(frozen=True)
class Responses:
    """What the candidates of each host do to its spectrum, per unit of concentration: the limit of low doping.

    A doped spectrum is about ``pristine + Σ concentration × response``. K is the most candidates of any host.

    elements, replaced : [H, K] index of the candidates, ascending, and of the host element that each replaces
                         (one of them, where there are several); -1 where a host has fewer
    composition        : [H, 56] float32 atomic fractions of the hosts
    pristine           : [H, B] float32 intensities of the hosts in the supercell of the responses
    library, mass_only : [H, K, B] float32 intensities from the host's single defects, and from the dopants' masses in
                         the host's force constants; 0 where unknown
    knows_library, knows_mass : [H, K] bool
    finite, scatter    : [H, F, K, B], [H, F, R, B] float32 what superposed spectra teach without each of the folds, and
                         all of them, last (:mod:`~defectnet.dataset.scatter`); ``library`` and 0 where these are few
    """

    elements: np.ndarray
    replaced: np.ndarray
    composition: np.ndarray
    pristine: np.ndarray
    library: np.ndarray
    mass_only: np.ndarray
    knows_library: np.ndarray
    knows_mass: np.ndarray
    finite: np.ndarray
    scatter: np.ndarray


def asked_candidates(samples: Samples, responses: Responses) -> np.ndarray:
    """Which candidates of its host's list in ``responses`` each sample asks about, [n, K] bool."""
    elements = responses.elements[samples.host]
    return (elements >= 0) & np.take_along_axis(samples.candidates, np.maximum(elements, 0), axis=1)


def load_responses(dataset: Dataset, axis: Axis, taught_hosts: Sequence[int] | None = None) -> Responses:
    """Responses of all candidates: spectra of single substitutions less the host's, over their concentration.

    Where a candidate may sit on inequivalent sites, these are averaged as a random occupation would; if a single
    defect is missing for one of them, the candidate's library response counts as unknown. What superposed spectra
    teach takes longest, and can be limited to the hosts of which it is wanted.
    """
    table, spectra = dataset.spectra, intensities_of(dataset, axis)
    rows = np.flatnonzero(np.array(table.role) == "response")
    most = int(dataset.hosts.candidates.sum(axis=1).max(initial=0))
    shape = len(dataset.hosts.id), most
    elements, replaced = np.full(shape, -1), np.full(shape, -1)
    for host, replaces in enumerate(dataset.hosts.replaces):
        for place, (dopant, symbols) in enumerate(sorted(replaces.items(), key=lambda one: index_of(one[0]))):
            elements[host, place] = index_of(dopant)
            replaced[host, place] = index_of(symbols.split(", ")[0])
    pristine = spectra[np.maximum(dataset.hosts.pristine, 0)]
    pristine[table.host[rows]] = spectra[table.reference[rows]]
    fidelity, share = np.array(table.fidelity), table.quality.get("site_share")
    sums = {name: np.zeros((*shape, spectra.shape[1]), np.float32) for name in ("superposed", "mass_only")}
    shares = {name: np.zeros(shape) for name in sums}
    for row in rows:
        host, element = table.host[row], int(table.concentrations[row].argmax())
        place = host, int(np.flatnonzero(elements[host] == element)[0])
        change = (spectra[row] - spectra[table.reference[row]]) / table.concentrations[row, element]
        sums[fidelity[row]][place] += share[row] * change
        shares[fidelity[row]][place] += share[row]
    # Shares of several replaced elements sum to more than one; candidates stand for sites of all of them.
    for name, values in sums.items():
        values /= np.maximum(shares[name], 1e-9)[..., None].astype(np.float32)
    whole = {name: (total > 0) & np.isclose(total, np.rint(total)) for name, total in shares.items()}
    for name, values in sums.items():
        values[~whole[name]] = 0
    wanted = range(len(elements)) if taught_hosts is None else taught_hosts
    finite, scatter = _of_superposed(table, spectra, elements, sums["superposed"], wanted)
    return Responses(
        elements=elements,
        replaced=replaced,
        composition=dataset.hosts.composition.astype(np.float32),
        pristine=pristine,
        library=sums["superposed"],
        mass_only=sums["mass_only"],
        knows_library=whole["superposed"],
        knows_mass=whole["mass_only"],
        finite=finite,
        scatter=scatter,
    )


def _of_superposed(
    table: SpectrumTable, spectra: np.ndarray, elements: np.ndarray, dilute: np.ndarray, hosts: Iterable[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Fields ``finite`` and ``scatter`` of :class:`Responses`, as of too few superposed spectra but for some hosts."""
    fold = folds_of(table)
    finite = np.repeat(dilute[:, None], FOLDS + 1, axis=1)
    scatter = np.zeros((len(elements), FOLDS + 1, DIRECTIONS, spectra.shape[1]), np.float32)
    for host in hosts:
        candidates = elements[host]
        known = np.flatnonzero(candidates >= 0)
        own = np.flatnonzero((table.host == host) & (fold < FOLDS))
        if len(own) < FEWEST:
            continue
        for left_out in range(FOLDS + 1):
            rows = own[fold[own] != left_out]
            change = (spectra[rows] - spectra[table.reference[rows]]).astype(float)
            concentrations = table.concentrations[rows][:, candidates[known]]
            response, scatter[host, left_out] = taught(change, concentrations, dilute[host, known])
            finite[host, left_out, known] = response
    return finite, scatter


def intensities_of(dataset: Dataset, axis: Axis) -> np.ndarray:
    """Intensities [S, B] float32 of all spectra of the dataset.

    Raises :class:`InputError` for a compact dataset and a ``host`` axis other than :data:`PUBLISHED`.
    """
    if axis.kind == "host":
        return _on_host_axes(dataset, axis)
    bin_shares = np.diff(dataset.edges_meV) * (len(dataset.edges_meV) - 1)
    return dataset.spectra.pdos * bin_shares.astype(np.float32)


def _on_host_axes(dataset: Dataset, axis: Axis) -> np.ndarray:
    """Intensities [S, bins] float32 of all spectra of the dataset, each on the axis of its host."""
    if dataset.compact and axis == PUBLISHED:
        return dataset.compact_intensity(axis.kind)
    used = np.unique(dataset.spectra.host)
    edges = np.zeros((len(dataset.hosts.id), axis.bins + 1))
    for host in used:
        edges[host] = host_edges(dataset.modes(dataset.hosts.pristine[host]), axis.bins)
    spectra = np.empty((len(dataset.spectra.id), axis.bins), dtype=np.float32)
    for rows, modes in dataset.blocks():
        spectra[rows] = intensities(modes, edges[dataset.spectra.host[rows]], axis, dataset.settings)
    return spectra


def sample_mask(
    candidates: torch.Tensor, targets: torch.Tensor, distractor_probability: float, generator: torch.Generator
) -> torch.Tensor:
    """A fresh candidate mask [n, 56] bool for one training step.

    Present dopants are always in; absent candidates stay with ``distractor_probability``, each on its own, so that
    the network cannot learn from the list which of its entries are present.
    """
    kept = torch.rand(candidates.shape, generator=generator) < distractor_probability
    return (targets > 0) | (candidates & kept.to(candidates.device))
