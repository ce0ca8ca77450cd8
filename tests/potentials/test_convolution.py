"""The convolution in compiled loops against e3nn's own."""

from __future__ import annotations

import functools

import pytest
import torch

pytest.importorskip("sevenn", reason="SevenNet alone makes use of it")
from e3nn import o3

from defectnet.potentials.convolution import Convolution


def _convolution(lmax: int, mode: str = "uvu") -> o3.TensorProduct:
    """The tensor product of a NequIP-like convolution: every path up to ``lmax``, outputs sorted."""
    features = o3.Irreps([(6 - degree, (degree, 1)) for degree in range(lmax + 1)])
    harmonics = o3.Irreps([(1, (degree, 1)) for degree in range(lmax + 1)])
    paths = [
        (i, j, out, mul)
        for i, (mul, ir) in enumerate(features)
        for j, (_, other) in enumerate(harmonics)
        for out in ir * other
        if out.l <= lmax
    ]
    out = o3.Irreps([(mul, ir) for _, _, ir, mul in paths]).sort()
    instructions = sorted((i, j, k, mode, True) for (i, j, _, _), k in zip(paths, out.p, strict=True))
    return o3.TensorProduct(
        features, harmonics, out.irreps, instructions, shared_weights=False, internal_weights=False
    ).to(torch.float64)


def _with_gradients(function, inputs, direction, second):
    """Value of a function of tensors and its gradients, with those of their squared norm if wanted."""
    value = function(*inputs)
    first = torch.autograd.grad((value * direction).sum(), inputs, create_graph=second)
    return (value, *first, *(torch.autograd.grad(sum((g**2).sum() for g in first), inputs) if second else ()))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("edges", [23, 0])
@pytest.mark.parametrize("lmax", [0, 2, 3])
def test_equals_e3nn_with_gradients(lmax, edges, training, threads, request):
    request.addfinalizer(functools.partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(threads)
    original, atoms = _convolution(lmax), 5
    ours = Convolution(original).to(torch.float64).train(training)
    torch.manual_seed(0)
    sizes = ((atoms, original.irreps_in1.dim), (edges, original.irreps_in2.dim), (edges, original.weight_numel))
    inputs = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
    # The last atom has no neighbours, and no edge leads to the first.
    sources, targets = torch.randint(0, atoms - 1, (edges,)), torch.randint(1, atoms - 1, (edges,))
    direction = torch.randn(atoms, original.irreps_out.dim, dtype=torch.float64)

    def by_e3nn(features, harmonics, weights):
        messages = original(features[sources], harmonics, weights)
        return torch.zeros_like(direction).index_add(0, targets, messages)

    def by_ours(features, harmonics, weights):
        return ours(features, harmonics, weights, sources, targets)

    results = [_with_gradients(function, inputs, direction, second=training) for function in (by_e3nn, by_ours)]
    for theirs, own in zip(*results, strict=True):
        assert own.shape == theirs.shape
        # e3nn rounds its constants to float32. An atom alone has no edges at all.
        torch.testing.assert_close(own, theirs, rtol=0, atol=1e-6 * float(theirs.detach().abs().max()) if edges else 0)


def test_refuses_other_products():
    with pytest.raises(ValueError, match="uvu"):
        Convolution(o3.FullyConnectedTensorProduct("2x0e", "1x0e", "2x0e"))
