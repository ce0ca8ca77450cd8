"""Joined datasets hold what their parts hold, and only parts that fit can be joined."""

import json

import h5py
import numpy as np
import pytest
from synthetic import host_entry, make_dataset, make_dataset_with_responses
from typer.testing import CliRunner

from defectnet.cli import app
from defectnet.config import Spectra
from defectnet.dataset.compact import write_compact
from defectnet.dataset.join import join
from defectnet.dataset.samples import PUBLISHED, Axis, load_responses, load_samples
from defectnet.dataset.schema import Dataset, MissingEntry
from defectnet.errors import InputError

FORMULAS = ["Si", "GaAs", "MgO"]


def compact(folder, name, formulas, **changes):
    make_dataset_with_responses(folder / "whole.h5", formulas, 4, **changes)
    write_compact(folder / "whole.h5", folder / name)
    (folder / "whole.h5").unlink()
    return folder / name


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Two parts; the second lists a host of the first as one that it has nothing of, and one that nobody computed."""
    folder = tmp_path_factory.mktemp("join")
    lacking = [
        MissingEntry("host-Si", "pristine", "relax", "missing", ""),
        MissingEntry("host-Ge", "pristine", "relax", "missing", ""),
    ]
    rest = [host_entry(formula) for formula in ("Si", "Ge", *FORMULAS[1:])]
    return [
        compact(folder, "one.h5", FORMULAS[:1]),
        compact(folder, "two.h5", FORMULAS[1:], hosts=rest, missing=lacking),
    ]


@pytest.fixture(scope="module")
def joined(parts):
    path = parts[0].with_name("joined.h5")
    assert join(parts, path) == Dataset(path).digest
    return path


def test_joined_is_what_one_run_would_have_made(joined, tmp_path):
    together = compact(
        tmp_path, "together.h5", FORMULAS, hosts=[host_entry(formula) for formula in ("Si", "Ge", *FORMULAS[1:])]
    )
    with Dataset(joined) as one, Dataset(together) as other:
        for table in ("hosts", "spectra"):
            mine, whole = (vars(getattr(data, table)) for data in (one, other))
            # Responses come last in a single run; by id, everything is the same.
            in_order = np.argsort(mine["id"]), np.argsort(whole["id"])
            mine_first, whole_first = in_order if table == "spectra" else (slice(None), slice(None))
            for name in mine.keys() - {"reference", "pristine", "quality"}:
                np.testing.assert_array_equal(np.array(mine[name])[mine_first], np.array(whole[name])[whole_first])
        ids, reference = np.array(one.spectra.id), one.spectra.reference
        assert all(ids[row].startswith(ids[k].split("-")[0]) for k, row in enumerate(reference))
        assert {ids[row] for row in reference} == {f"{formula}-pristine" for formula in FORMULAS}
        assert [ids[row] if row >= 0 else "" for row in one.hosts.pristine] == [
            "Si-pristine", "", "GaAs-pristine", "MgO-pristine"
        ]  # fmt: skip
        np.testing.assert_equal(one.comparison, other.comparison)
        assert one.recomputed_digest() == one.digest
        assert [(entry.host, entry.item) for entry in one.missing] == [("host-Si", "doped-7"), ("host-Ge", "pristine")]


@pytest.mark.parametrize("axis", [PUBLISHED, Axis("absolute")], ids=["host axis", "absolute axis"])
def test_samples_and_responses_are_those_of_the_parts(parts, joined, axis):
    with Dataset(joined) as data:
        samples, known = load_samples(data, axis), load_responses(data, axis)
        names = np.array(data.hosts.id)
    for part in parts:
        with Dataset(part) as data:
            own, own_known = load_samples(data, axis), load_responses(data, axis)
            ids = np.array(data.hosts.id)
        rows = np.isin(names[samples.host], np.unique(ids[own.host]))
        for name in ("doped", "pristine", "targets", "composition", "candidates"):
            np.testing.assert_array_equal(getattr(samples, name)[rows], getattr(own, name))
        here = [names.tolist().index(ids[host]) for host in np.unique(own.host)]
        width = own_known.library.shape[1]  # the most candidates of any host of the part
        for name in ("library", "mass_only", "knows_library"):
            mine = getattr(own_known, name)[np.unique(own.host)]
            np.testing.assert_array_equal(getattr(known, name)[here][:, :width], mine)
            assert mine.any()


def test_commands_and_provenance(parts, tmp_path):
    output = tmp_path / "all.h5"
    answer = CliRunner().invoke(app, ["join", *map(str, parts), "--output", str(output)])
    assert answer.exit_code == 0, answer.output
    with h5py.File(output) as file, Dataset(parts[0]) as one, Dataset(parts[1]) as two:
        assert json.loads(file.attrs["made_from"]) == [one.digest, two.digest]


def test_parts_that_do_not_fit_are_refused(parts, tmp_path):
    output = tmp_path / "all.h5"
    other = compact(tmp_path, "other.h5", ["NaCl"], settings=Spectra(energy_max_meV=110.0))
    make_dataset(tmp_path / "whole.h5", ["NaCl"], 2)
    for sources, message in (
        (parts[:1], "nothing to join"),
        ([parts[0], parts[0]], r"one\.h5: host host-Si has spectra in .*one\.h5 as well"),
        ([parts[0], other], r"other\.h5: the block `spectra`"),
        ([parts[0], tmp_path / "whole.h5"], r"whole\.h5: is not compact; .*defectnet compact"),
        ([parts[0], tmp_path / "absent.h5"], "no such dataset"),
    ):
        with pytest.raises(InputError, match=message):
            join(sources, output)
    assert not output.exists()
