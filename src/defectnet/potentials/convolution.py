"""The convolution of NequIP-like networks (SevenNet) on a CPU, one edge after the other.

Every atom sums, over its neighbours, the tensor product of their features with the spherical harmonics of the bond,
every path (l1, l2) -> l3 weighed by its own function of the distance: "uvu" in e3nn (Geiger & Smidt, arXiv:2207.09453).
Written with array operations, the time goes into reading and writing arrays of edges x channels x components. Here the
sum over edges and its gradient are loops that numba compiles, and what belongs to an edge stays in the cache; this is
what FlashTP (Lee et al., ICML 2025) and OpenEquivariance (Bharadwaj et al., arXiv:2501.13986) do on GPUs.
``tests/bench/convolution.py`` compares it with e3nn.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch
from e3nn import o3

# Sums may be reordered, or they would not use vector instructions.
_compiled = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz"})

_1, _2, _3, _4 = (np.uint64(n) for n in (1, 2, 3, 4))


class Convolution(torch.nn.Module):
    """Sum over edges of an :class:`e3nn.o3.TensorProduct` whose instructions are all "uvu" with external weights.

    Called with features [N, irreps_in1], spherical harmonics [E, irreps_in2], weights [E, weight_numel] and the atoms
    [E] from which and to which edges lead; returns [N, irreps_out]. In training mode e3nn computes, because only its
    gradients can be differentiated again. Raises ValueError for other instructions.
    """

    def __init__(self, original: o3.TensorProduct):
        super().__init__()
        features, harmonics, out = original.irreps_in1, original.irreps_in2, original.irreps_out
        plain = all(i.connection_mode == "uvu" and i.has_weight for i in original.instructions)
        single = all(multiplicity == 1 for multiplicity, _ in harmonics)
        if not (plain and single and sorted(i.i_out for i in original.instructions) == list(range(len(out)))):
            raise ValueError(f"not a uvu tensor product with one output per path: {original}")
        self.original = original
        sizes = [out[i.i_out].ir.dim * features[i.i_in1].ir.dim for i in original.instructions]
        coupling = torch.zeros(harmonics.dim, sum(sizes), dtype=torch.float64)
        paths, column, weight = [], 0, 0
        for i, part in zip(original.instructions, coupling.split(sizes, dim=1), strict=True):
            l1, l2, l3 = features[i.i_in1].ir.l, harmonics[i.i_in2].ir.l, out[i.i_out].ir.l
            # [2 l2 + 1, 2 l3 + 1, 2 l1 + 1]
            tensor = o3.wigner_3j(l1, l2, l3, dtype=torch.float64).permute(1, 2, 0) * i.path_weight
            part[harmonics.slices()[i.i_in2]] = tensor.flatten(1)
            starts = (features.slices()[i.i_in1].start, out.slices()[i.i_out].start, weight, column)
            paths.append((*starts, features[i.i_in1].mul, 2 * l1 + 1, 2 * l3 + 1))
            column += part.shape[1]
            weight += features[i.i_in1].mul
        self.register_buffer("_coupling", coupling)
        self._paths = np.array(paths, dtype=np.uint64)
        self._irreps = features, out

    def forward(
        self,
        features: torch.Tensor,
        harmonics: torch.Tensor,
        weights: torch.Tensor,
        sources: torch.Tensor,
        targets: torch.Tensor,
    ) -> torch.Tensor:
        """See the class."""
        if self.training:
            messages = self.original(features[sources], harmonics, weights)
            return messages.new_zeros(len(features), messages.shape[1]).index_add(0, targets, messages)
        into, out = self._irreps
        couplings = harmonics @ self._coupling  # [E, of path: (2 l3 + 1) x (2 l1 + 1)]
        summed = _Sum.apply(_channels_last(features, into), couplings, weights, sources, targets, self._paths, out.dim)
        return _channels_first(summed, out)


def _channels_last(features: torch.Tensor, irreps: o3.Irreps) -> torch.Tensor:
    """Every part [mul, 2 l + 1] of e3nn's layout transposed, so that the channels lie side by side."""
    parts = features.split([mul * ir.dim for mul, ir in irreps], dim=1)
    return torch.cat(
        [p.unflatten(1, (mul, ir.dim)).mT.flatten(1) for p, (mul, ir) in zip(parts, irreps, strict=True)], dim=1
    )


def _channels_first(features: torch.Tensor, irreps: o3.Irreps) -> torch.Tensor:
    """Inverse of :func:`_channels_last`."""
    parts = features.split([mul * ir.dim for mul, ir in irreps], dim=1)
    return torch.cat(
        [p.unflatten(1, (ir.dim, mul)).mT.flatten(1) for p, (mul, ir) in zip(parts, irreps, strict=True)], dim=1
    )


class _Sum(torch.autograd.Function):
    """The loops over edges, and their gradient."""

    @staticmethod
    def forward(context, features, couplings, weights, sources, targets, paths, dimension):
        context.save_for_backward(features, couplings, weights, sources, targets)
        context.paths = paths
        order, starts = _grouped(targets, len(features))
        out = np.zeros((len(features), dimension), dtype=features.numpy().dtype)
        arrays = (tensor.detach().contiguous().numpy() for tensor in (features, couplings, weights, sources))
        _share(_sum, len(out), out, *arrays, order, starts, paths)
        return torch.from_numpy(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, gradient):
        features, couplings, weights, sources, targets = (t.contiguous() for t in context.saved_tensors)
        order, starts = _grouped(sources, len(features))
        results = tuple(torch.zeros_like(tensor) for tensor in (features, couplings, weights))
        inputs = (gradient.contiguous(), features, couplings, weights, targets)
        arrays = (tensor.detach().numpy() for tensor in (*results, *inputs))
        _share(_gradients, len(features), *arrays, order, starts, context.paths)
        return *results, None, None, None, None


def _grouped(atoms: torch.Tensor, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Edges ordered by one of their atoms, and where those of each atom start [number + 1]."""
    order = torch.argsort(atoms, stable=True)
    starts = np.concatenate([[0], torch.bincount(atoms, minlength=number).cumsum(0).numpy()])
    return order.numpy(), starts


def _share(loop: Callable[..., None], atoms: int, *arguments: object) -> None:
    """Call ``loop(begin, end, ...)`` for all atoms, in as many threads as torch computes in."""
    threads = torch.get_num_threads()
    if threads == 1:
        loop(0, atoms, *arguments)
        return
    ends = [atoms * n // threads for n in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda begin, end: loop(begin, end, *arguments), ends[:-1], ends[1:]))


# Below, parts of rows are told by where they start, as making a slice takes longer than what is done with it. These
# starts are unsigned: negative ones would count from the end, and asking for that keeps the compiler from vectors.


@_compiled
def _add(out, weights, features, couplings, into, start, first, column, channels, d1):
    """``out`` += ``weights`` times the sum of ``d1`` parts of ``features``, times one of ``couplings`` each.

    For s, p and d features, that sum stays in registers.
    """
    if d1 == 1:
        c0 = couplings[column]
        for u in range(channels):
            out[into + u] += weights[start + u] * (c0 * features[first + u])
    elif d1 == 3:
        c0, c1, c2 = couplings[column], couplings[column + _1], couplings[column + _2]
        second, third = first + channels, first + _2 * channels
        for u in range(channels):
            total = c0 * features[first + u] + c1 * features[second + u] + c2 * features[third + u]
            out[into + u] += weights[start + u] * total
    elif d1 == 5:
        c0, c1, c2 = couplings[column], couplings[column + _1], couplings[column + _2]
        c3, c4 = couplings[column + _3], couplings[column + _4]
        second, third = first + channels, first + _2 * channels
        fourth, fifth = first + _3 * channels, first + _4 * channels
        for u in range(channels):
            total = c0 * features[first + u] + c1 * features[second + u] + c2 * features[third + u]
            total += c3 * features[fourth + u] + c4 * features[fifth + u]
            out[into + u] += weights[start + u] * total
    else:
        for m in range(d1):
            for u in range(channels):
                out[into + u] += weights[start + u] * (couplings[column + m] * features[first + m * channels + u])


@_compiled
def _sum(begin, end, out, features, couplings, weights, sources, order, starts, paths):
    """``out`` of every atom: sum over the edges that lead to it."""
    for i in range(begin, end):
        to_atom = out[i]
        for edge in order[starts[i] : starts[i + 1]]:
            of_source, coupling, weight = features[sources[edge]], couplings[edge], weights[edge]
            for first, into, start, column, channels, d1, d3 in paths:
                for m3 in range(d3):
                    _add(
                        to_atom, weight, of_source, coupling,
                        into + m3 * channels, start, first, column + m3 * d1, channels, d1,
                    )  # fmt: skip


@_compiled
def _add_gradients(
    to_features, to_weights, to_couplings, gradient, features, weights, couplings,
    first, start, into, column, channels, d1, d3,
):  # fmt: skip
    """What follows for a part of ``features`` from the ``gradient`` of ``d3`` parts of ``out``, in one sweep."""
    if d3 == 1:
        c0 = couplings[column]
        t0 = c0 * 0
        for u in range(channels):
            feature, weight, g0 = features[first + u], weights[start + u], gradient[into + u]
            total, product = c0 * g0, feature * weight
            to_weights[start + u] += feature * total
            to_features[first + u] += weight * total
            t0 += product * g0
        to_couplings[column] += t0
    elif d3 == 3:
        column1, column2 = column + d1, column + _2 * d1
        c0, c1, c2 = couplings[column], couplings[column1], couplings[column2]
        into1, into2 = into + channels, into + _2 * channels
        t0 = t1 = t2 = c0 * 0
        for u in range(channels):
            feature, weight = features[first + u], weights[start + u]
            g0, g1, g2 = gradient[into + u], gradient[into1 + u], gradient[into2 + u]
            total, product = c0 * g0 + c1 * g1 + c2 * g2, feature * weight
            to_weights[start + u] += feature * total
            to_features[first + u] += weight * total
            t0 += product * g0
            t1 += product * g1
            t2 += product * g2
        to_couplings[column] += t0
        to_couplings[column1] += t1
        to_couplings[column2] += t2
    elif d3 == 5:
        column1, column2, column3, column4 = column + d1, column + _2 * d1, column + _3 * d1, column + _4 * d1
        c0, c1, c2 = couplings[column], couplings[column1], couplings[column2]
        c3, c4 = couplings[column3], couplings[column4]
        into1, into2, into3, into4 = into + channels, into + _2 * channels, into + _3 * channels, into + _4 * channels
        t0 = t1 = t2 = t3 = t4 = c0 * 0
        for u in range(channels):
            feature, weight = features[first + u], weights[start + u]
            g0, g1, g2 = gradient[into + u], gradient[into1 + u], gradient[into2 + u]
            g3, g4 = gradient[into3 + u], gradient[into4 + u]
            total, product = c0 * g0 + c1 * g1 + c2 * g2 + c3 * g3 + c4 * g4, feature * weight
            to_weights[start + u] += feature * total
            to_features[first + u] += weight * total
            t0 += product * g0
            t1 += product * g1
            t2 += product * g2
            t3 += product * g3
            t4 += product * g4
        to_couplings[column] += t0
        to_couplings[column1] += t1
        to_couplings[column2] += t2
        to_couplings[column3] += t3
        to_couplings[column4] += t4
    else:
        for m in range(d3):
            c = couplings[column + m * d1]
            t = c * 0
            for u in range(channels):
                feature, weight, g = features[first + u], weights[start + u], gradient[into + m * channels + u]
                to_weights[start + u] += feature * (c * g)
                to_features[first + u] += weight * (c * g)
                t += feature * weight * g
            to_couplings[column + m * d1] += t


@_compiled
def _gradients(
    begin, end, to_features, to_couplings, to_weights, gradient, features, couplings, weights, targets, order, starts,
    paths,
):  # fmt: skip
    """Gradients by features, couplings and weights, out of that by ``out``: sums over the edges that leave an atom."""
    for j in range(begin, end):
        of_source, to_source = features[j], to_features[j]
        for edge in order[starts[j] : starts[j + 1]]:
            of_atom, weight, coupling = gradient[targets[edge]], weights[edge], couplings[edge]
            to_weight, to_coupling = to_weights[edge], to_couplings[edge]
            for first, into, start, column, channels, d1, d3 in paths:
                for m1 in range(d1):
                    _add_gradients(
                        to_source, to_weight, to_coupling, of_atom, of_source, weight, coupling,
                        first + m1 * channels, start, into, column + m1, channels, d1, d3,
                    )  # fmt: skip
