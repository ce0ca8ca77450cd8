"""The faster tensor product against e3nn's own."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sevenn", reason="of these tensor products SevenNet alone makes use")
from e3nn import o3

from defectnet.potentials.tensor_product import TensorProduct


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


@pytest.mark.parametrize("edges", [7, 0])
@pytest.mark.parametrize("lmax", [0, 2, 3])
def test_equals_e3nn_with_gradients_of_both_orders(lmax, edges):
    original = _convolution(lmax)
    ours = TensorProduct(original).to(torch.float64)
    torch.manual_seed(0)
    sizes = (original.irreps_in1.dim, original.irreps_in2.dim, original.weight_numel)
    inputs = [torch.randn(edges, size, dtype=torch.float64, requires_grad=True) for size in sizes]
    direction = torch.randn(edges, original.irreps_out.dim, dtype=torch.float64)
    results = []
    for product in (original, ours):
        value = product(*inputs)
        first = torch.autograd.grad((value * direction).sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum((part**2).sum() for part in first), inputs)
        results.append((value, *first, *second))
    for theirs, own in zip(*results, strict=True):
        assert own.shape == theirs.shape
        # e3nn rounds its constants to float32. An atom alone has no edges at all.
        torch.testing.assert_close(own, theirs, rtol=0, atol=1e-6 * float(theirs.detach().abs().max()) if edges else 0)


def test_refuses_other_products():
    with pytest.raises(ValueError, match="uvu"):
        TensorProduct(o3.FullyConnectedTensorProduct("2x0e", "1x0e", "2x0e"))
