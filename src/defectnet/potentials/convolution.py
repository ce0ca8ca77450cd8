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
        self._paths = np.array(paths)
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


@_compiled
def _unrolled(target, rows, c):
    """``target`` [U]: sum of ``rows`` [n, U] times the n numbers of a tuple, whose length the compiler knows."""
    for u in range(len(target)):
        total = c[0] * rows[0, u]
        for m in range(1, len(c)):
            total += c[m] * rows[m, u]
        target[u] = total


@_compiled
def _combine(target, rows, c):
    """``target`` [U]: sum of ``rows`` [n, U] times ``c`` [n]."""
    if len(c) == 1:
        _unrolled(target, rows, (c[0],))
    elif len(c) == 3:
        _unrolled(target, rows, (c[0], c[1], c[2]))
    elif len(c) == 5:
        _unrolled(target, rows, (c[0], c[1], c[2], c[3], c[4]))
    else:
        target[:] = 0
        for m in range(len(c)):
            for u in range(len(target)):
                target[u] += c[m] * rows[m, u]


@_compiled
def _sum(begin, end, out, features, couplings, weights, sources, order, starts, paths):
    """``out`` of every atom: sum over the edges that lead to it."""
    buffer = np.empty(features.shape[1], dtype=features.dtype)
    for i in range(begin, end):
        for edge in order[starts[i] : starts[i + 1]]:
            j = sources[edge]
            for first, into, start, column, channels, d1, d3 in paths:
                mixed = buffer[:channels]
                weight = weights[edge, start : start + channels]
                of_source = features[j, first : first + d1 * channels].reshape((d1, channels))
                of_atom = out[i, into : into + d3 * channels].reshape((d3, channels))
                coupling = couplings[edge, column : column + d1 * d3].reshape((d3, d1))
                for m3 in range(d3):
                    _combine(mixed, of_source, coupling[m3])
                    for u in range(channels):
                        of_atom[m3, u] += weight[u] * mixed[u]


@_compiled
def _gradients(
    begin,
    end,
    to_features,
    to_couplings,
    to_weights,
    gradient,
    features,
    couplings,
    weights,
    targets,
    order,
    starts,
    paths,
):
    """Gradients by features, couplings and weights, out of that by ``out``: sums over the edges that leave an atom."""
    buffer = np.empty(features.shape[1], dtype=features.dtype)
    for j in range(begin, end):
        for edge in order[starts[j] : starts[j + 1]]:
            i = targets[edge]
            for first, into, start, column, channels, d1, d3 in paths:
                mixed = buffer[:channels]
                weight, to_weight = weights[edge, start : start + channels], to_weights[edge, start : start + channels]
                of_source = features[j, first : first + d1 * channels].reshape((d1, channels))
                to_source = to_features[j, first : first + d1 * channels].reshape((d1, channels))
                of_atom = gradient[i, into : into + d3 * channels].reshape((d3, channels))
                coupling = couplings[edge, column : column + d1 * d3].reshape((d3, d1))
                to_coupling = to_couplings[edge, column : column + d1 * d3].reshape((d3, d1))
                for m1 in range(d1):
                    _combine(mixed, of_atom, coupling[:, m1])
                    for u in range(channels):
                        to_weight[u] += of_source[m1, u] * mixed[u]
                        to_source[m1, u] += weight[u] * mixed[u]
                        mixed[u] = weight[u] * of_source[m1, u]
                    for m3 in range(d3):
                        total = mixed[0] * of_atom[m3, 0]
                        for u in range(1, channels):
                            total += mixed[u] * of_atom[m3, u]
                        to_coupling[m3, m1] = total
