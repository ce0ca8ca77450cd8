"""Messages of what goes wrong before anything is computed, identities, and agreement with the packages."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from installed import ABSENT, INSTALLED
from typer.testing import CliRunner

from defectnet import potentials
from defectnet.config import Potential
from defectnet.digests import file_digest
from defectnet.errors import InputError, PhysicsError
from defectnet.potentials import conformance
from defectnet.potentials.commands import app


def changed(settings: Potential, **values) -> Potential:
    return settings.model_copy(update=values)


@pytest.mark.parametrize("name", ABSENT)
def test_wrong_environment(name):
    with pytest.raises(InputError, match=rf"potential\.name: {name} needs the package .* found none in ") as error:
        potentials.identify(Potential(name=name))
    assert f".venvs/{name}/bin/python" in str(error.value)


def test_missing_checkpoint(installed, tmp_path):
    with pytest.raises(InputError, match=r"potential\.checkpoint: .*absent\.bin: no such file; put the .* there"):
        potentials.identify(changed(installed, checkpoint=str(tmp_path / "absent.bin")))


def test_wrong_file(installed, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("not weights")
    with pytest.raises(InputError, match=r"potential\.checkpoint: .*notes\.txt: not a .* (checkpoint|model) \("):
        potentials.load(changed(installed, checkpoint=str(path)))


def test_other_tensors(installed, tmp_path):
    """A file that torch reads and that is no model of this kind."""
    import torch

    path = tmp_path / "other.pth"
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(InputError, match=r"potential\.checkpoint: .*other\.pth: not a"):
        potentials.load(changed(installed, checkpoint=str(path)))


def test_unknown_model(installed):
    with pytest.raises(InputError, match=r"potential\.model: \w+ knows no model 'no-such-model'; it knows "):
        potentials.identify(changed(installed, checkpoint=None, model="no-such-model", modality=None))


def test_no_gpu(installed):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(InputError, match=r"potential\.device: cuda was asked for"):
        potentials.load(changed(installed, device="cuda"))


def test_unwanted_modality(installed):
    with pytest.raises(InputError, match=r"potential\.modality: .* has no modalities"):
        potentials.load(changed(installed, modality="PBE"))


@pytest.mark.skipif("sevennet" not in INSTALLED, reason="needs sevenn")
def test_modalities_of_sevennet():
    with pytest.raises(InputError, match=r"potential\.modality: 7net-mf-0 needs one of PBE, R2SCAN, not None"):
        potentials.identify(Potential(name="sevennet", model="7net-mf-0"))
    with pytest.raises(InputError, match="not LDA"):
        potentials.identify(Potential(name="sevennet", model="7net-mf-0", modality="LDA"))
    identities = {potentials.identify(Potential(model="7net-mf-0", modality=m)) for m in ("PBE", "R2SCAN")}
    assert {identity.model for identity in identities} == {"7net-mf-0:PBE", "7net-mf-0:R2SCAN"}


@pytest.mark.skipif("mace" not in INSTALLED, reason="needs mace-torch")
def test_heads_of_mace(checkpoints):
    settings = Potential(name="mace", checkpoint=checkpoints("mace", "second"), device="cpu")
    with pytest.raises(InputError, match=r"potential\.modality: mace-second\.model needs one of first, second"):
        potentials.load(settings)


@pytest.mark.skipif("mace" not in INSTALLED, reason="needs mace-torch")
def test_mace_leaves_the_environment_alone(installed):
    potentials.load(installed)
    assert "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.parametrize(
    ("name", "model", "module", "function"),
    [
        ("mace", "small", "mace.calculators.foundations_models", "_urlretrieve_with_timeout"),
        ("mattersim", "MatterSim-v1.0.0-1M", "mattersim.utils.download_utils", "download_file"),
    ],
)
def test_failed_download_says_where_the_file_goes(name, model, module, function, monkeypatch, tmp_path):
    if name not in INSTALLED:
        pytest.skip(f"needs {name}")
    from importlib import import_module

    def fail(*_, **__):
        raise OSError("no network")

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
    monkeypatch.setattr(import_module(module), function, fail)
    with pytest.raises(
        InputError, match=rf"potential\.model: {model} is not in .*no network.*potential\.checkpoint"
    ) as error:
        potentials.identify(Potential(name=name, model=model))
    assert str(tmp_path) in str(error.value)


def test_identity(installed):
    identity = potentials.identify(installed)
    assert identity == potentials.load(installed).identity
    assert (identity.name, identity.dtype) == (installed.name, "float64")
    if installed.checkpoint is not None:
        assert identity.model == Path(installed.checkpoint).name
        assert identity.weights == file_digest(Path(installed.checkpoint))


def test_pickles_are_announced(installed, caplog):
    with caplog.at_level(logging.WARNING, logger="defectnet"):
        potentials.load(installed)
    announced = "is a Python pickle" in caplog.text
    assert announced == (installed.name == "mace")  # the others are read as tensors or came with the package


@pytest.mark.parametrize(
    ("name", "model", "module"), [("sevennet", "7net-0", "sevennet"), ("chgnet", "0.2.0", "chgnet")]
)
def test_file_instead_of_a_name(name, model, module, caplog):
    """The package's own file, named as a checkpoint: the same numbers under the file's name."""
    if name not in INSTALLED:
        pytest.skip(f"needs {name}")
    from importlib import import_module

    named = Potential(name=name, model=model, device="cpu")
    path = import_module(f"defectnet.potentials.{module}")._checkpoint(named)
    filed = changed(named, checkpoint=str(path))
    with caplog.at_level(logging.WARNING, logger="defectnet"):
        first, second = potentials.load(named), potentials.load(filed)
    assert second.identity.model == path.name
    assert second.identity.weights == first.identity.weights
    assert ("is a Python pickle" in caplog.text) == (name == "sevennet")
    atoms = conformance.specimen(first.elements, np.random.default_rng(3))
    assert first.evaluate([atoms]).energies == second.evaluate([atoms]).energies


def test_isolated_atom_is_named(installed):
    model = potentials.load(installed)
    atoms = Atoms("Si", cell=np.eye(3) * 30, pbc=True)
    for forces in (
        lambda: model.evaluate([atoms]).forces[0],
        lambda: model.forces_of_displaced(atoms, np.full((2, 1, 3), 0.01)),
    ):
        try:
            np.testing.assert_allclose(forces(), 0, atol=1e-9)
        except PhysicsError as error:
            assert "isolated" in str(error)


def test_displaced_copies_with_and_without_bond_angles(installed):
    """Bonds of 3 Å, where CHGNet's angles end: some copies have angles and some have none."""
    model = potentials.load(installed)
    atoms = Atoms("Si2C2", positions=[[0, 0, 0], [3, 0, 0], [0, 3, 0], [0, 0, 3]], cell=np.eye(3) * 9, pbc=True)
    displacements = np.zeros((3, 4, 3))
    displacements[1, 1:] = -0.05 * np.eye(3)
    displacements[2, 1:] = 0.05 * np.eye(3)
    forces = model.forces_of_displaced(atoms, displacements)
    for displacement, together in zip(displacements, forces, strict=True):
        alone = atoms.copy()
        alone.positions += displacement
        expected = model.evaluate([alone]).forces[0]
        np.testing.assert_allclose(together, expected, atol=1e-8 * max(1, np.abs(expected).max()))


def own_calculator(settings: Potential):
    """ASE calculator of the potential's own package, on the same weights."""
    if settings.name == "sevennet":
        from sevenn.calculator import SevenNetCalculator

        return SevenNetCalculator(settings.model, device="cpu", modal=settings.modality)
    if settings.name == "mace":
        from mace.calculators import MACECalculator

        return MACECalculator(
            model_paths=settings.checkpoint, device="cpu", default_dtype=settings.dtype, head=settings.modality
        )
    if settings.name == "mattersim":
        from mattersim.forcefield.potential import MatterSimCalculator
        from mattersim.forcefield.potential import Potential as MatterSimPotential

        return MatterSimCalculator(
            MatterSimPotential.from_checkpoint(settings.checkpoint, device="cpu", load_training_state=False),
            device="cpu",
        )
    from chgnet.model.dynamics import CHGNetCalculator
    from chgnet.model.model import CHGNet

    return CHGNetCalculator(CHGNet.load(model_name=settings.model, use_device="cpu", verbose=False), use_device="cpu")


def test_agrees_with_the_package(settings, model, monkeypatch):
    """The packages' calculators are float32, but for MACE's; that is all the deviation there may be."""
    if settings.name == "analytic":
        pytest.skip("is its own package")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # for mace's own calculator
    atoms = conformance.specimen(model.elements, np.random.default_rng(3))
    result = model.evaluate([atoms])
    with warnings.catch_warnings(action="ignore"):
        atoms.calc = own_calculator(settings)
        energy, forces, stress = atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress(voigt=False)
    exact = settings.name == "mace" and settings.dtype == "float64"
    tolerance = 1e-10 if exact else 2e-5
    assert result.energies[0] / len(atoms) == pytest.approx(energy / len(atoms), abs=tolerance)
    np.testing.assert_allclose(result.forces[0], forces, atol=tolerance * 20 * max(1, np.abs(forces).max()))
    np.testing.assert_allclose(result.stresses[0], stress, atol=tolerance * 2)


def test_check_command(installed):
    answer = CliRunner().invoke(app, ["check", "--json", installed.model_dump_json()], env={"COLUMNS": "200"})
    assert answer.exit_code == 0, answer.output
    assert "15 passed, 0 failed" in answer.output
    assert "energy conservation" in answer.output


def test_check_command_fails(monkeypatch):
    failure = conformance.Result("rotation", False, 2.0, 1.0, "tolerances", "turned")
    monkeypatch.setattr(conformance, "run", lambda _: [failure])
    answer = CliRunner().invoke(app, ["check", "--name", "analytic"])
    assert answer.exit_code == 1
    assert "0 passed, 1 failed" in answer.output


def test_identify_command():
    answer = CliRunner().invoke(app, ["identify", "--json", Potential(name="analytic").model_dump_json()])
    assert answer.output.startswith("analytic morse float64, weights sha256 ")


def test_bad_option_is_explained():
    answer = CliRunner().invoke(app, ["check", "--name", "analytic", "--dtype", "float16"])
    assert isinstance(answer.exception, InputError)
    assert "potential.dtype: " in str(answer.exception)
