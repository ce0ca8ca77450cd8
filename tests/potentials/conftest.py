"""Tests of the potentials that the current interpreter can run; each environment runs the same files.

7net-0 and CHGNet come with their weights. MACE and MatterSim do not, so small random models of their real classes
are saved in the format of their checkpoints and loaded from there.
"""

from __future__ import annotations

import pytest
import torch
from installed import INSTALLED

from defectnet import potentials
from defectnet.config import Potential

DTYPES = ("float32", "float64")
MODELS = {
    "sevennet": [{"model": "7net-0"}, {"model": "7net-mf-0", "modality": "R2SCAN"}],
    "chgnet": [{"model": "0.3.0"}, {"model": "0.2.0"}],
    "mace": [{}, {"modality": "second"}],
    "mattersim": [{}],
}


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Checkpoint of a potential whose package brings no weights, or None."""
    folder = tmp_path_factory.mktemp("checkpoints")
    made = {}

    def checkpoint(name: str, modality: str | None = None) -> str | None:
        if name not in RANDOM:
            return None
        heads = ["first", "second"] if modality else None
        key = f"{name}-{modality}"
        if key not in made:
            made[key] = folder / f"{key}{'.model' if name == 'mace' else '.pth'}"
            torch.manual_seed(7)
            RANDOM[name](str(made[key]), heads)
        return str(made[key])

    return checkpoint


def random_mace(path: str, heads: list[str] | None) -> None:
    from defectnet.potentials.mace import _importing

    with _importing():
        from e3nn import o3
        from mace import modules

    numbers = [6, 8, 14, 32]
    block = modules.interaction_classes["RealAgnosticResidualInteractionBlock"]
    energies = torch.arange(1.0, 1 + len(numbers)).numpy() * -1.5
    model = modules.ScaleShiftMACE(
        r_max=5.0,
        num_bessel=6,
        num_polynomial_cutoff=5,
        max_ell=2,
        interaction_cls=block,
        interaction_cls_first=block,
        num_interactions=2,
        num_elements=len(numbers),
        hidden_irreps=o3.Irreps("8x0e + 8x1o"),
        MLP_irreps=o3.Irreps("8x0e"),
        atomic_energies=energies if heads is None else [energies, 2 * energies],
        avg_num_neighbors=20.0,
        atomic_numbers=numbers,
        correlation=2,
        gate=torch.nn.functional.silu,
        atomic_inter_scale=100.0 if heads is None else [100.0, 80.0],  # forces of about 1 eV/Å
        atomic_inter_shift=0.0 if heads is None else [0.0, 0.1],
        heads=heads,
    )
    torch.save(model, path)


def random_mattersim(path: str, heads: list[str] | None) -> None:
    from mattersim.forcefield.m3gnet.m3gnet import M3Gnet
    from mattersim.forcefield.potential import Potential as MatterSimPotential

    model = M3Gnet(num_blocks=2, units=32, max_l=4, max_n=4, cutoff=5.0, threebody_cutoff=4.0, device="cpu")
    model.normalizer.scale.fill_(1000.0)  # forces of about 1 eV/Å
    MatterSimPotential(model, device="cpu").save(path)


RANDOM = {"mace": random_mace, "mattersim": random_mattersim}


def cases() -> list:
    """Settings of every model that can be tested here, in both types; ``analytic`` always."""
    found = [{"name": "analytic", "dtype": "float64"}]
    found += [{"name": n} | values | {"dtype": d} for n in INSTALLED for values in MODELS[n] for d in DTYPES]
    return [pytest.param(values, id="-".join(values.values())) for values in found]


@pytest.fixture(scope="session", params=cases())
def settings(request, checkpoints) -> Potential:
    values = request.param
    return Potential(checkpoint=checkpoints(values["name"], values.get("modality")), device="cpu", **values)


@pytest.fixture(scope="session")
def model(settings):
    return potentials.load(settings)


@pytest.fixture(scope="session", params=INSTALLED)
def installed(request, checkpoints) -> Potential:
    """Settings of an installed potential that brings its own package."""
    name = request.param
    return Potential(name=name, checkpoint=checkpoints(name), device="cpu", dtype="float64", **MODELS[name][0])
