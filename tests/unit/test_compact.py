"""Compact datasets: the same samples and responses from a small file, which says so when asked for more."""

import h5py
import numpy as np
import pytest
from synthetic import make_dataset_with_responses
from typer.testing import CliRunner

from defectnet.cli import app
from defectnet.config import Config, write_config
from defectnet.dataset.compact import write_compact
from defectnet.dataset.samples import PUBLISHED, Axis, load_responses, load_samples
from defectnet.dataset.schema import Dataset
from defectnet.errors import InputError, RecordError

FORMULAS = ["Si", "GaAs", "MgO"]
HALF = 2.0**-11
"""Largest relative error of rounding to half precision."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("compact") / "dataset.h5"
    make_dataset_with_responses(path, FORMULAS, 4)
    return path


@pytest.fixture(scope="module")
def small(whole):
    path = whole.with_name("compact.h5")
    write_compact(whole, path)
    return path


@pytest.mark.parametrize("axis", [PUBLISHED, Axis("absolute")], ids=["host axis", "absolute axis"])
def test_same_samples_and_responses(whole, small, axis):
    with Dataset(whole) as one, Dataset(small) as other:
        samples, again = load_samples(one, axis), load_samples(other, axis)
        known, known_again = load_responses(one, axis), load_responses(other, axis)
    for name in ("row", "host", "pristine", "composition", "candidates", "targets"):
        np.testing.assert_allclose(getattr(again, name), getattr(samples, name), rtol=1e-6)
    # It is what doping changed that is rounded, not the spectra.
    change = samples.doped - samples.pristine
    np.testing.assert_allclose(again.doped - again.pristine, change, rtol=1.1 * HALF, atol=3e-6)
    assert np.abs(change).max() > 1
    for name, values in vars(known).items():
        np.testing.assert_allclose(vars(known_again)[name], values, rtol=1.1 * HALF, atol=1e-4)


def test_everything_but_modes_is_kept(whole, small):
    with Dataset(whole) as one, Dataset(small) as other:
        assert (one.compact, other.compact) == (False, True)
        np.testing.assert_allclose(other.spectra.pdos, one.spectra.pdos, atol=HALF * one.spectra.pdos.max())
        for table in ("hosts", "spectra"):
            for name, values in vars(getattr(one, table)).items():
                if name != "pdos":
                    np.testing.assert_equal(vars(getattr(other, table))[name], values)
        np.testing.assert_equal(other.comparison, one.comparison)
        for name in ("missing", "provenance", "settings", "vocabulary"):
            assert getattr(other, name) == getattr(one, name)
        np.testing.assert_array_equal(other.edges_meV, one.edges_meV)
        assert other.recomputed_digest() == other.digest != one.digest
    with h5py.File(small) as file:
        assert "modes" not in file
        assert file.attrs["made_from"] == one.digest


def test_same_source_same_bytes(whole, small, tmp_path):
    write_compact(whole, tmp_path / "again.h5")
    assert (tmp_path / "again.h5").read_bytes() == small.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again.h5"]


def test_what_needs_modes_is_refused(small, tmp_path):
    with Dataset(small) as data:
        for reading in (
            lambda: data.modes(0),
            lambda: next(data.blocks()),
            lambda: load_samples(data, Axis("host", bins=50)),
            lambda: load_samples(data, Axis("host", sigma_meV=1.0)),
        ):
            with pytest.raises(InputError, match=r"compact\.h5: /modes: .* `defectnet dataset`"):
                reading()
    with pytest.raises(InputError, match=r"compact\.h5: is compact already"):
        write_compact(small, tmp_path / "again.h5")
    with pytest.raises(InputError, match="no such dataset"):
        write_compact(tmp_path / "absent.h5", tmp_path / "again.h5")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["absolute_axis/change", "host_axis/change", "host_axis/pristine"])
def test_flipped_bit_is_noticed(small, tmp_path, name):
    broken = tmp_path / "broken.h5"
    with h5py.File(small) as file:
        place = file[name].id.get_chunk_info(0).byte_offset
    content = bytearray(small.read_bytes())
    content[place + 20] ^= 1
    broken.write_bytes(content)
    with pytest.raises(RecordError, match=r"broken\.h5: not a complete dataset"), Dataset(broken) as data:
        load_samples(data, PUBLISHED)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_truncated_file_is_refused(small, tmp_path, share):
    broken = tmp_path / "broken.h5"
    content = small.read_bytes()
    broken.write_bytes(content[: int(share * len(content))])
    with pytest.raises(RecordError, match=r"broken\.h5"):
        Dataset(broken)


def test_command(whole, tmp_path):
    config = Config().model_copy(update={"run": Config().run.model_copy(update={"results": str(whole.parent)})})
    path = write_config(config, tmp_path)
    answer = CliRunner().invoke(app, ["compact", "--config", str(path), "--output", str(tmp_path / "small.h5")])
    assert answer.exit_code == 0, answer.output
    with Dataset(tmp_path / "small.h5") as data:
        assert data.compact
