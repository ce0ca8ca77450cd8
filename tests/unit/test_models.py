"""The published network: shapes, masks, and that it can learn at all."""

import numpy as np
import pytest
import torch
from synthetic import make_dataset

from defectnet.dataset.samples import Axis, load_samples
from defectnet.dataset.schema import Dataset
from defectnet.models.defectnet import TARGET_SCALE, DefectNet, count_parameters, masked_mse


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "dataset.h5"
    make_dataset(path, ["Si", "GaAs", "ZnSe", "MgO"], 8)
    with Dataset(path) as data:
        return load_samples(data, Axis("host"))


def tensors(samples):
    names = ("pristine", "doped", "composition", "candidates", "targets")
    return [torch.from_numpy(getattr(samples, name)) for name in names]


def test_published_shapes():
    """Layer by layer what arXiv:2506.00725 and its notebooks describe."""
    shapes = {name: tuple(value.shape) for name, value in DefectNet().state_dict().items()}
    assert shapes == {
        "encoder.0.weight": (32, 3, 5), "encoder.0.bias": (32,),
        "encoder.2.weight": (64, 32, 5), "encoder.2.bias": (64,),
        "encoder.4.weight": (128, 64, 5), "encoder.4.bias": (128,),
        "query.weight": (128, 56), "query.bias": (128,),
        "attention.in_proj_weight": (384, 128), "attention.in_proj_bias": (384,),
        "attention.out_proj.weight": (128, 128), "attention.out_proj.bias": (128,),
        "head.0.weight": (256, 128), "head.0.bias": (256,),
        "head.2.weight": (256, 256), "head.2.bias": (256,),
        "head.4.weight": (56, 256), "head.4.bias": (56,),
    }  # fmt: skip
    assert DefectNet().attention.num_heads == 8
    assert count_parameters(DefectNet()) == 238_456


def test_output_is_zero_outside_the_mask(samples):
    torch.manual_seed(0)
    pristine, doped, composition, mask, _ = tensors(samples)
    output = DefectNet()(pristine, doped, composition, mask)
    assert output.shape == (len(samples), 56)
    assert (output[~mask] == 0).all()
    assert (output[mask] != 0).all()
    np.testing.assert_allclose(DefectNet().predict(samples)[~samples.candidates], 0)


def test_masked_entries_influence_neither_loss_nor_gradient(samples):
    torch.manual_seed(0)
    model = DefectNet()
    pristine, doped, composition, mask, targets = tensors(samples)

    def loss_and_gradient(targets):
        model.zero_grad()
        loss = masked_mse(model(pristine, doped, composition, mask), targets, mask)
        loss.backward()
        return loss.item(), torch.cat([parameter.grad.ravel() for parameter in model.parameters()])

    loss, gradient = loss_and_gradient(targets)
    disturbed = targets + torch.where(mask, 0.0, 7.0)
    loss_disturbed, gradient_disturbed = loss_and_gradient(disturbed)
    assert loss == loss_disturbed
    assert torch.equal(gradient, gradient_disturbed)
    assert loss_and_gradient(targets + mask * 0.01)[0] != loss


def test_loss_by_hand():
    output = torch.tensor([[1.0, 2.0, 3.0]])
    targets = torch.tensor([[0.1, 0.1, 0.9]])
    mask = torch.tensor([[True, True, False]])
    assert masked_mse(output, targets, mask).item() == pytest.approx((0 + (2 - TARGET_SCALE * 0.1) ** 2) / 2)
    assert masked_mse(output, targets, torch.zeros_like(mask)).item() == 0


def test_network_can_overfit_sixteen_spectra(samples):
    torch.manual_seed(0)
    model = DefectNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    part = samples[np.arange(16)]
    pristine, doped, composition, mask, targets = tensors(part)
    for _ in range(180):
        optimizer.zero_grad()
        loss = masked_mse(model(pristine, doped, composition, mask), targets, mask)
        loss.backward()
        optimizer.step()
    error = (model.predict(part) - part.targets)[part.candidates]
    spread = part.targets[part.candidates].std()
    assert np.sqrt(np.mean(error**2)) < 0.2 * spread


def test_prediction_does_not_depend_on_the_batch(samples):
    torch.manual_seed(0)
    model = DefectNet()
    np.testing.assert_allclose(model.predict(samples, batch_size=5), model.predict(samples), atol=1e-6)
    assert model.predict(samples[np.arange(0)]).shape == (0, 56)


def test_tokens_carry_no_position():
    """The published flaw: away from the ends of the axis, shifting both spectra in energy changes nothing."""
    torch.manual_seed(0)
    model = DefectNet().eval()
    spectrum = torch.zeros(1, 100)
    spectrum[0, 40:50] = torch.rand(10)
    shifted = torch.roll(spectrum, 17, dims=1)
    composition, mask = torch.zeros(1, 56), torch.ones(1, 56, dtype=torch.bool)
    with torch.no_grad():
        torch.testing.assert_close(
            model(spectrum, spectrum, composition, mask), model(shifted, shifted, composition, mask)
        )


def test_axis_must_hold_the_composition():
    with pytest.raises(ValueError, match="at least 56"):
        DefectNet(bins=40)
