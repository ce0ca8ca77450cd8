"""Simulated measurements: exact without noise, honest about their noise, and the same for the same seed."""

import json

import numpy as np
import pytest
from synthetic import make_dataset
from typer.testing import CliRunner

from defectnet.cli import app
from defectnet.dataset.compact import write_compact
from defectnet.dataset.schema import Dataset
from defectnet.errors import InputError
from defectnet.experiments.axis import calibrate_axis
from defectnet.experiments.cleanup import Background
from defectnet.experiments.measured import on_common_range, read_spectrum
from defectnet.experiments.resolution import FWHM_PER_SIGMA, Resolution
from defectnet.experiments.simulate import Instrument, simulate_measurement
from defectnet.phonons.pdos import bin_centers, neutron_pdos, pdos

ID = "MgO-1"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("dataset") / "dataset.h5"
    make_dataset(path, ["MgO", "GaAs"], 3)
    return path


@pytest.fixture(scope="module")
def dataset(path):
    with Dataset(path) as dataset:
        yield dataset


def rows(dataset, spectrum_id=ID):
    row = dataset.spectra.id.index(spectrum_id)
    return int(dataset.spectra.reference[row]), row


def columns(path):
    return np.loadtxt(path).T


@pytest.mark.parametrize("step", [1.0, 0.5, 0.3])
def test_without_noise_the_computed_spectrum_comes_back(path, dataset, tmp_path, step):
    """In bins that divide those of the grid to the precision of the file; in others up to the width of a bin."""
    made = simulate_measurement(path, ID, tmp_path, Instrument(step_meV=step, counts=None, maximum_meV=108))
    for file, row in zip((made.pristine, made.doped), rows(dataset), strict=True):
        grid = read_spectrum(file).on_grid(dataset.edges_meV)
        expected = pdos(dataset.modes(row), dataset.edges_meV, dataset.settings.sigma_meV)
        assert grid.measured.sum() == 108
        tolerance = 2e-2 * expected.max() if step == 0.3 else 1e-7
        np.testing.assert_allclose(grid.density[grid.measured], expected[grid.measured], atol=tolerance)


def test_both_spectra_have_one_axis_that_covers_the_bands(path, dataset, tmp_path):
    made = simulate_measurement(path, ID, tmp_path, Instrument(counts=None, stretch=1.1))
    energies = [columns(file)[0] for file in (made.pristine, made.doped)]
    np.testing.assert_array_equal(*energies)
    assert energies[0][-1] > 1.1 * max(dataset.modes(row).energies_meV.max() for row in rows(dataset))


def test_resolution_conserves_area_and_adds_variance(path, tmp_path):
    moments = []
    for resolution in (Resolution(), Resolution(constant_meV=3.0), Resolution(fraction=0.06)):
        made = simulate_measurement(
            path, ID, tmp_path, Instrument(resolution, step_meV=0.25, counts=None, maximum_meV=118)
        )
        energy, density, _ = columns(made.pristine)
        share = json.loads(made.truth.read_text())["share_in_range"]["pristine"]
        assert share == pytest.approx(1, abs=1e-4)
        assert density.sum() * 0.25 == pytest.approx(1, rel=1e-7)
        moments.append([(density * energy**power).sum() * 0.25 for power in (1, 2)])
    (mean, square), constant, fraction = moments
    assert [constant[0], fraction[0]] == pytest.approx([mean, mean], rel=1e-4)
    assert constant[1] - square == pytest.approx((3 / FWHM_PER_SIGMA) ** 2, rel=0.01)
    assert fraction[1] - square == pytest.approx((0.06 / FWHM_PER_SIGMA) ** 2 * square, rel=0.01)


@pytest.mark.parametrize("counts", [1e3, 1e6])
def test_noise_is_that_of_the_stated_counts(path, tmp_path, counts):
    how = {"step_meV": 1.0, "background": 0.5}
    exact = columns(simulate_measurement(path, ID, tmp_path, Instrument(counts=None, **how)).doped)[1]
    noisy = [
        columns(simulate_measurement(path, ID, tmp_path, Instrument(counts=counts, **how), seed).doped)
        for seed in range(20)
    ]
    sigma = np.sqrt(exact / counts)
    deviations = np.array([(one[1] - exact) / sigma for one in noisy])
    assert np.mean(deviations**2) == pytest.approx(1, abs=0.1)
    assert abs(deviations.mean()) < 0.1
    totals = np.array([one[1].sum() for one in noisy]) * counts
    assert totals.std() == pytest.approx(np.sqrt(1.5 * counts), rel=0.5)
    np.testing.assert_allclose(np.mean([one[2] ** 2 for one in noisy], axis=0)[exact > 20 / counts].mean(),
                               (sigma**2)[exact > 20 / counts].mean(), rtol=0.05)  # fmt: skip


def test_background_and_its_slope(path, tmp_path):
    how = Instrument(counts=None, background=0.2, background_slope=0.5, minimum_meV=5)
    made = simulate_measurement(path, ID, tmp_path, how)
    energy, density, _ = columns(made.doped)
    plain = simulate_measurement(path, ID, tmp_path / "plain", Instrument(counts=None, minimum_meV=5))
    _, bare, _ = columns(plain.doped)
    background = density - bare
    assert background.sum() * 0.5 == pytest.approx(0.2, rel=1e-5)
    truth = json.loads(made.truth.read_text())
    assert truth["background_per_meV"]["last_bin"] == pytest.approx(background[-1], abs=1e-8)
    assert background[-1] / background[0] == pytest.approx(3, rel=0.05)
    top = energy[bare > 1e-6].max()
    found = read_spectrum(made.doped, background=Background("linear", above_meV=top))
    np.testing.assert_allclose(found.intensity, bare, atol=1e-5)


def test_axis_error_is_found_again(path, dataset, tmp_path):
    """Stretch and shift of the simulation, as the calibration sees them from the other side."""
    how = Instrument(Resolution(constant_meV=1.0), stretch=1.12, shift_meV=0.5, counts=3e5)
    made = simulate_measurement(path, ID, tmp_path, how)
    pristine, doped = on_common_range(read_spectrum(made.pristine), read_spectrum(made.doped))
    reference, row = rows(dataset)
    computed = dataset.spectra.pdos[reference]
    found = calibrate_axis(pristine, computed, dataset.edges_meV, how.resolution, fit_shift=True)
    assert found.stretch == pytest.approx(1 / 1.12, abs=4 * found.stretch_error)
    assert found.shift_meV == pytest.approx(-0.5 / 1.12, abs=4 * found.shift_error_meV)
    assert found.stretch_error < 2e-3
    expected = dataset.spectra.pdos[row]
    grids = [one.on_grid(dataset.edges_meV) for one in (doped, found.apply(doped))]
    off = [np.abs(grid.density - expected)[grid.measured].sum() for grid in grids]
    assert off[1] < 0.25 * off[0]


def test_neutron_weighting_and_compact_datasets(path, dataset, tmp_path):
    how = Instrument(step_meV=1.0, counts=None, weighting="neutron", maximum_meV=108)
    made = simulate_measurement(path, ID, tmp_path, how)
    _, row = rows(dataset)
    expected = neutron_pdos(dataset.modes(row), np.arange(109.0), dataset.settings.sigma_meV)
    np.testing.assert_allclose(columns(made.doped)[1], expected / expected.sum(), atol=1e-7)
    assert "# weighting: neutron\n" in made.doped.read_text()

    compact = tmp_path / "compact.h5"
    write_compact(path, compact)
    with pytest.raises(InputError, match=r"--weighting neutron: .*compact.h5 is a compact dataset"):
        simulate_measurement(compact, ID, tmp_path, how)
    plain = [
        columns(simulate_measurement(one, ID, tmp_path, Instrument(counts=None, step_meV=0.5)).doped)[1]
        for one in (path, compact)
    ]
    assert np.abs(plain[0] - plain[1]).sum() * 0.5 < 0.05  # the compact one knows bins of 1 meV only


def test_files_say_what_they_are(path, dataset, tmp_path):
    made = simulate_measurement(path, ID, tmp_path, Instrument(counts=5e4))
    for role, file in (("pristine", made.pristine), ("doped", made.doped)):
        header = file.read_text().split("\n")[:12]
        assert header[0] == "# SIMULATED, not measured"
        assert any(f"{role} spectrum of the pair {ID}" in line for line in header)
        assert read_spectrum(file).notes[0] == "energies are in meV, as the file states"
    truth = json.loads(made.truth.read_text())
    _, row = rows(dataset)
    assert truth["simulated"] is True
    assert truth["formula"] == "MgO"
    assert sum(truth["concentrations"].values()) == pytest.approx(dataset.spectra.concentrations[row].sum())
    assert truth["settings"]["counts"] == 5e4
    assert set(truth["concentrations"]) <= set(truth["candidates"])


def test_same_seed_same_bytes(path, tmp_path):
    made = [simulate_measurement(path, ID, tmp_path / str(n), seed=seed) for n, seed in enumerate((3, 3, 4))]
    contents = [[one.pristine.read_bytes(), one.doped.read_bytes(), one.truth.read_bytes()] for one in made]
    assert contents[0] == contents[1]
    assert contents[0][0] != contents[2][0]


@pytest.mark.parametrize(
    "spectrum_id, how, message",
    [
        ("MgO-17", {}, "no spectrum 'MgO-17'; there are for example MgO-1"),
        ("MgO-pristine", {}, "is pristine; name a doped spectrum"),
        (ID, {"counts": 0.1}, "--counts"),
        (ID, {"step_meV": 0}, "--step"),
        (ID, {"step_meV": 1e-3}, "--step: .* too many"),
        (ID, {"minimum_meV": 300}, "--minimum"),
        (ID, {"minimum_meV": 200, "maximum_meV": 250}, "no phonons from 200 to 250 meV"),
        (ID, {"background_slope": 2}, "--background-slope"),
    ],
)
def test_refusals(path, tmp_path, spectrum_id, how, message):
    with pytest.raises(InputError, match=message):
        simulate_measurement(path, spectrum_id, tmp_path, Instrument(**how))
    assert not list(tmp_path.iterdir())


def test_command(path, tmp_path):
    arguments = [
        "simulate-measurement",
        str(path),
        ID,
        "--output",
        str(tmp_path),
        "--resolution",
        "2%",
        "--counts",
        "0",
    ]
    result = CliRunner().invoke(app, [*arguments, "--weighting", "neutron", "--stretch", "1.1"])
    assert result.exit_code == 0, result.output
    truth = json.loads((tmp_path / f"{ID}_truth.json").read_text())
    assert truth["settings"]["resolution"]["fraction"] == 0.02
    assert truth["settings"]["stretch"] == 1.1
    found = read_spectrum(tmp_path / truth["files"]["doped"], weighting="neutron")
    assert found.error is None
    assert bin_centers(found.cells_meV.T[:, 0])[0] == pytest.approx(0.25)
