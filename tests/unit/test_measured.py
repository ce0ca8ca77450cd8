"""Measured spectra: formats, units, clean-up, grids, resolution, axis; and what bad files are answered with."""

import gzip
import re
import struct
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from defectnet.config import Spectra
from defectnet.errors import InputError
from defectnet.experiments.axis import calibrate_axis
from defectnet.experiments.cleanup import Background, without_background
from defectnet.experiments.measured import TEXT_MAX_MB, on_common_range, read_spectrum
from defectnet.experiments.resolution import FWHM_PER_SIGMA, Resolution, broadened, parse_resolution
from defectnet.experiments.spectrum import MeasuredSpectrum, cells_around
from defectnet.phonons.pdos import bin_centers, energy_edges
from defectnet.units import INVERSE_CM_TO_MEV, THZ_TO_MEV

DOCS = Path(__file__).parents[2] / "docs" / "measured-spectra.md"
GRID = energy_edges(Spectra())
ENERGY = np.arange(0.5, 80)


def band(energy, optical=50.0):
    """A Debye-like acoustic part up to 30 meV and an optical peak: a density of states, of about unit area."""
    acoustic = 3 * energy**2 / 30**3 / (1 + np.exp((energy - 30) / 0.8))
    return 0.5 * acoustic + 0.5 * np.exp(-((energy - optical) ** 2) / 18) / np.sqrt(18 * np.pi)


VALUE = band(ENERGY)
ERROR = 0.01 * VALUE + 1e-5
ROWS = np.stack([ENERGY, VALUE, ERROR], axis=1)


def text(rows, separator=" ", header="# energy (meV)  intensity  error\n", comma=False):
    lines = [separator.join(f"{value:.8g}" for value in row) for row in np.atleast_2d(rows)]
    body = "\n".join(lines) + "\n"
    return header + (body.replace(".", ",") if comma else body)


@pytest.fixture
def save(tmp_path):
    """Writes text or bytes to a file of a name."""

    def write(content, name="sample.txt"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def same(spectrum, errors=True):
    """The spectrum of ROWS, of unit area."""
    area = VALUE.sum()
    np.testing.assert_allclose(spectrum.energies_meV, ENERGY, rtol=1e-6)
    np.testing.assert_allclose(spectrum.intensity, VALUE / area, rtol=1e-6, atol=1e-12)
    if errors:
        np.testing.assert_allclose(spectrum.error, ERROR / area, rtol=1e-6)
    else:
        assert spectrum.error is None
    return True


@pytest.mark.parametrize(
    "content",
    [
        text(ROWS),
        text(ROWS, ","),
        text(ROWS, ", "),
        text(ROWS, "\t"),
        text(ROWS, ";"),
        text(ROWS, ";", comma=True),
        text(ROWS, "  ", comma=True),
        text(ROWS).replace("\n", "\r\n"),
        "\ufeff" + text(ROWS, ",", "Energy (meV),S,err\n"),
        text(ROWS, ",", '"Energy (meV)","GDOS","error"\n'),
        text(ROWS, ",", "# X , Y , E\n# axis: energy transfer in meV\n1\n"),  # Mantid, with the number of the spectrum
        text(ROWS, header="% made by hand\n! energies in meV, Ei = 120 meV, 4 detectors\n\n"),
        text(ROWS, ",", "E (meV),GPDoS (1/meV),sigma\n").replace("\n", ",\n"),
        text(ROWS).replace("e-0", "D-0"),
        text(ROWS[::-1]),
    ],
)
def test_text_formats(save, content):
    assert same(read_spectrum(save(content)))


def test_encodings_and_gzip(save):
    told = text(ROWS, header="# Energie/Énergie\n# energy (meV)  intensity  error\n")
    assert same(read_spectrum(save(told.encode("latin-1"))))
    assert same(read_spectrum(save(told.encode("utf-16"))))
    assert same(read_spectrum(save(gzip.compress(told.encode()), "sample.dat.gz")))


def test_cut_of_mslice(save):
    """Its header as Mantid's MSlice writes it; ends of the range hold no values."""
    header = (
        '# MSlice Cut of workspace "MAR0001_rings"\n# Cut axis: DeltaE,-3.0,80.0,1.0\n'
        "# Integration axis: |Q|,0.8,0.9, 0.0\n# (Energy Transfer (meV)) (Signal) (Error)\n"
    )
    rows = np.concatenate([[[-1.5, np.nan, np.nan], [-0.5, np.nan, np.nan]], ROWS])
    assert same(read_spectrum(save(text(rows, "          ", header))))


def inx(rows, unit_line="V, 300 K, energies in meV\n"):
    counts = f" {len(rows) + 3}    1    2    0    0    0    0  {len(rows)}\n"
    return f"{counts}{unit_line}0.098 81.8 6.28 0.0 1.0 0\n 0.0 4.3 0.0\n{text(rows, '  ', '')}"


def test_inx_of_lamp(save):
    rows = np.concatenate([ROWS, [[80.5, 0, -1], [81.5, 0, -1]]])
    found = read_spectrum(save(inx(rows), "sample.inx"))
    assert found.notes[0] == "energies are in meV, as the file states"
    assert found.range_meV == pytest.approx((0, 80))
    assert same(found.rows(found.measured))


def test_comments_and_empty_lines_between_rows(save):
    """A spectrum may be interrupted, but two over the same energies are two."""
    lines = text(ROWS).splitlines(keepends=True)
    assert same(read_spectrum(save("".join([*lines[:30], "# beam off\n\n", *lines[30:]]))))
    with pytest.raises(InputError, match=r"line 84: begins another spectrum over the same energies"):
        read_spectrum(save(text(ROWS) + "\n" + text(ROWS)))
    with pytest.raises(InputError, match=r"line 85: begins another spectrum"):
        read_spectrum(save(inx(ROWS) + inx(ROWS)))


def test_two_columns_have_no_errors(save):
    assert same(read_spectrum(save(text(ROWS[:, :2], header=""))), errors=False)


@pytest.mark.parametrize(
    "columns", [(1, 3, 4), ("1", "3", "4"), ("energy", "doped", "d_doped"), ("ENERGY (meV)", 3, 4)]
)
def test_columns_are_chosen(save, columns):
    rows = np.stack([ENERGY, VALUE[::-1], VALUE, ERROR], axis=1)
    path = save(text(rows, ",", "energy (meV), pristine, doped, d_doped\n"))
    assert same(read_spectrum(path, columns=columns))


def test_columns_are_found_by_their_names(save):
    rows = np.stack([np.arange(len(ENERGY)), ERROR, VALUE, ENERGY], axis=1)
    assert same(read_spectrum(save(text(rows, ",", "point,sigma,GPDoS,energy transfer (meV)\n"))))


@pytest.mark.parametrize("factor, stated", [(THZ_TO_MEV, "THz"), (INVERSE_CM_TO_MEV, "cm-1"), (1.0, "meV")])
def test_units_from_header_and_option(save, factor, stated):
    rows = ROWS / [factor, 1, 1]
    assert same(read_spectrum(save(text(rows, header=f"# frequency ({stated})  dos (1/x)  error\n"))))
    assert same(read_spectrum(save(text(rows, header="")), unit=stated))


def nexus(path, *, edges=False, shape=(), default=True, legacy=False, axis="energy", units="meV", errors="errors"):
    """A NeXus file as the manual describes it, or as Mantid writes it (``legacy``)."""
    with h5py.File(path, "w") as file:
        entry = file.create_group("entry")
        data = entry.create_group("data")
        entry.attrs["NX_class"], data.attrs["NX_class"] = "NXentry", "NXdata"
        if default:
            file.attrs["default"], entry.attrs["default"] = "entry", b"data"
        data[axis] = np.arange(81.0) if edges else ENERGY
        data[axis].attrs["units"] = units
        data["values"] = VALUE.reshape(*shape, -1)
        data[errors] = ERROR.reshape(*shape, -1)
        if legacy:
            data["values"].attrs["signal"] = 1
            data["values"].attrs["axes"] = f"axis2,{axis}" if shape else axis
        else:
            data.attrs["signal"], data.attrs["axes"] = "values", [*["."] * len(shape), axis]
    return path


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"edges": True},
        {"default": False},
        {"errors": "values_errors"},
        {"legacy": True, "default": False},
        {"legacy": True, "default": False, "edges": True, "shape": (1,), "axis": "axis1", "units": "DeltaE"},
    ],
)
def test_nexus(tmp_path, how):
    path = nexus(tmp_path / "sample.nxs", **how)
    assert same(read_spectrum(path))
    packed = tmp_path / "packed.nxs.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert same(read_spectrum(packed))


def test_hdf5_by_path_and_unit_attribute(tmp_path):
    path = tmp_path / "plain.h5"
    with h5py.File(path, "w") as file:
        file["a/e"], file["a/i"], file["a/s"] = ENERGY / INVERSE_CM_TO_MEV, VALUE, ERROR
        file["a/e"].attrs["units"] = "1/cm"
    assert same(read_spectrum(path, columns=("a/e", "a/i", "a/s")))


def test_counts_per_bin_become_densities(tmp_path):
    """Mantid marks counts by ``distribution``; in bins of unequal width they are no density."""
    edges = np.concatenate([np.arange(0, 40, 0.5), np.arange(40, 81, 2.0)])
    width, centers = np.diff(edges), bin_centers(edges)
    path = tmp_path / "counts.nxs"
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["NX_class"], data.attrs["signal"], data.attrs["axes"] = "NXdata", "values", "axis1"
        data["axis1"], data["values"] = edges, band(centers) * width
        data["axis1"].attrs["units"], data["axis1"].attrs["distribution"] = "DeltaE", "0"
    found = read_spectrum(path)
    expected = band(centers)
    np.testing.assert_allclose(found.intensity, expected / (expected * width).sum())
    np.testing.assert_allclose(found.cells_meV, np.stack([edges[:-1], edges[1:]], axis=1))


def test_sides(save):
    """Loss, gain and their mean, each told apart by its size and its noise."""
    gain = np.stack([-ENERGY, 3 * VALUE, 9 * ERROR], axis=1)
    path = save(text(np.concatenate([gain, ROWS])))
    with pytest.raises(InputError, match=r"energies from -79.5 to 79.5 meV; say --side"):
        read_spectrum(path)
    assert same(read_spectrum(path, side="loss"))
    mirrored = read_spectrum(path, side="gain")
    np.testing.assert_allclose(mirrored.error, 3 * ERROR / VALUE.sum(), rtol=1e-6)
    assert all(any("--side" in note for note in one.notes) for one in (mirrored, read_spectrum(path, side="fold")))

    equal = save(text(np.concatenate([gain / [1, 3, 9], ROWS])))
    folded = read_spectrum(equal, side="fold")
    np.testing.assert_allclose(folded.intensity, VALUE / VALUE.sum(), rtol=1e-6)
    np.testing.assert_allclose(folded.error, ERROR / VALUE.sum() / np.sqrt(2), rtol=1e-6)


def test_folding_keeps_what_only_one_side_has(save):
    """A cold source: the neutron can lose little energy and gain much."""
    gain = ROWS * [-1, 1, 1]
    path = save(text(np.concatenate([gain, ROWS[ENERGY < 20]])))
    folded = read_spectrum(path, side="fold")
    np.testing.assert_allclose(folded.intensity, VALUE / VALUE.sum(), rtol=1e-6)
    ratio = folded.error / (ERROR / VALUE.sum())
    np.testing.assert_allclose(ratio, np.where(ENERGY < 20, np.sqrt(0.5), 1.0), rtol=1e-6)


def test_rows_in_any_order_with_repetitions(save):
    shuffled = np.random.default_rng(0).permutation(np.concatenate([ROWS, ROWS[20:60]]))
    found = read_spectrum(save(text(shuffled)))
    np.testing.assert_allclose(found.intensity, VALUE / VALUE.sum(), rtol=1e-6)
    twice = (ENERGY > 20) & (ENERGY < 60)
    np.testing.assert_allclose(found.error, ERROR / VALUE.sum() * np.where(twice, np.sqrt(0.5), 1.0), rtol=1e-6)
    assert any("sorted" in note for note in found.notes) and any("averaged" in note for note in found.notes)


def test_missing_values_are_a_mask(save):
    rows = ROWS.copy()
    rows[40:45, 1] = np.nan
    grid = read_spectrum(save(text(rows))).on_grid(GRID)
    centers = bin_centers(GRID)
    known = (centers > 0) & (centers < 80) & ~((centers > 40) & (centers < 45))
    np.testing.assert_array_equal(grid.measured, known)
    assert np.isnan(grid.density[~known]).all() and np.isfinite(grid.density[known]).all()


def test_a_range_that_was_left_out_is_not_bridged(save):
    rows = ROWS[(ENERGY < 35) | (ENERGY > 41)]
    grid = read_spectrum(save(text(rows))).on_grid(GRID)
    missing = GRID[:-1][(bin_centers(GRID) > 0) & (bin_centers(GRID) < 80) & ~grid.measured]
    np.testing.assert_array_equal(missing, np.arange(35, 41))


def test_part_of_a_band_is_masked_not_zero(save):
    part = save(text(ROWS[ENERGY < 50]))
    with pytest.raises(InputError, match="the band goes on"):
        read_spectrum(part)
    grid = read_spectrum(part, partial=True).on_grid(GRID)
    assert not grid.measured[bin_centers(GRID) > 50].any()
    assert np.isnan(grid.density[bin_centers(GRID) > 50]).all()


def test_background(save):
    line = 3e-3 - 2e-5 * ENERGY
    rows = ROWS + np.stack([0 * line, line, 0 * line], axis=1)
    path = save(text(rows))
    given = read_spectrum(path, background=Background("linear", level=3e-3, slope=-2e-5))
    np.testing.assert_allclose(given.intensity, VALUE / VALUE.sum(), atol=1e-8)
    fitted = read_spectrum(path, background=Background("linear", above_meV=66))
    np.testing.assert_allclose(fitted.intensity, VALUE / VALUE.sum(), atol=1e-5)
    assert any("subtracted" in note for note in fitted.notes)


@pytest.mark.parametrize("kind, slope", [("constant", 0.0), ("linear", -0.05)])
def test_fitted_background_is_unbiased_at_low_counts(kind, slope):
    """Ten counts above the band, where weights of 1/counts would be off by one count."""
    truth = 400 * VALUE / VALUE.max()
    rng = np.random.default_rng(0)
    pulls = []
    for _ in range(200):
        counts = rng.poisson(truth + 12 + slope * (ENERGY - 40)).astype(float)
        error = np.sqrt(np.maximum(counts, 1))
        measured = MeasuredSpectrum(ENERGY, counts, error, cells_around(ENERGY), "none", "counted")
        left = without_background(measured, Background(kind, above_meV=62))
        assert (left.error > error).all()
        pulls.append((left.intensity - truth) / left.error)
    assert abs(np.mean(pulls)) < 0.15
    assert np.sqrt(np.mean(np.square(pulls))) == pytest.approx(1, abs=0.15)


def test_small_negative_intensities_stay(save):
    rows = ROWS.copy()
    rows[70:, 1] -= 2 * rows[70:, 2]
    found = read_spectrum(save(text(rows)))
    assert (found.intensity[70:] < 0).all()


def test_minimum_and_elastic_line(save):
    rows = ROWS + np.stack([0 * ENERGY, np.exp(-((ENERGY / 1.2) ** 2)), 0 * ENERGY], axis=1)
    path = save(text(rows))
    with pytest.raises(InputError, match="elastic line"):
        read_spectrum(path)
    found = read_spectrum(path, minimum_meV=6)
    assert found.range_meV == pytest.approx((6, 80))
    grid = found.on_grid(GRID)
    assert not grid.measured[bin_centers(GRID) < 6].any()


def test_weighting_is_recorded(save):
    assert read_spectrum(save(text(ROWS)), weighting="neutron").weighting == "neutron"


def test_unknown_options_are_refused(save):
    for options in ({"side": "left"}, {"weighting": "x-ray"}):
        with pytest.raises(InputError, match=r"must be"):
            read_spectrum(save(text(ROWS)), **options)
    with pytest.raises(InputError, match="must be constant or linear"):
        Background("cubic")


def random_spectrum(seed, count=120):
    """Points at uneven distances, with errors."""
    rng = np.random.default_rng(seed)
    energy = np.cumsum(rng.uniform(0.2, 1.2, count))
    values = band(energy) * rng.uniform(0.8, 1.2, count)
    return MeasuredSpectrum(energy, values, 0.05 * values, cells_around(energy), "none", f"random {seed}").normalised()


@pytest.mark.parametrize("seed", range(5))
def test_rebinning_conserves_area(seed):
    spectrum = random_spectrum(seed)
    low, high = spectrum.range_meV
    edges = np.sort(np.random.default_rng(seed + 100).uniform(low, high, 37))
    edges[[0, -1]] = low, high
    grid = spectrum.on_grid(edges)
    assert grid.measured.all()
    assert (grid.density * np.diff(edges)).sum() == pytest.approx(1, rel=1e-12)
    assert (grid.density >= 0).all()


def test_own_bins_are_a_fixed_point():
    spectrum = random_spectrum(1)
    edges = np.append(spectrum.cells_meV[:, 0], spectrum.cells_meV[-1, 1])
    grid = spectrum.on_grid(edges)
    np.testing.assert_allclose(grid.density, spectrum.intensity, rtol=1e-9)
    np.testing.assert_allclose(grid.error, spectrum.error, rtol=1e-9)


def test_errors_of_bins_are_those_of_repeated_measurements():
    spectrum = random_spectrum(2)
    edges = np.arange(5.0, 60.0, 2.3)
    rng = np.random.default_rng(0)
    repeated = [
        replace(spectrum, intensity=spectrum.intensity + rng.normal(size=120) * spectrum.error).on_grid(edges).density
        for _ in range(4000)
    ]
    np.testing.assert_allclose(np.std(repeated, axis=0), spectrum.on_grid(edges).error, rtol=0.06)


def test_common_range(save):
    pristine = read_spectrum(save(text(ROWS), "pristine.txt"))
    doped = read_spectrum(save(text(np.stack([ENERGY, band(ENERGY, 52), ERROR], axis=1)[8:70]), "doped.txt"))
    both = on_common_range(pristine, doped)
    assert both[0].range_meV == pytest.approx((8, 70)) == both[1].range_meV
    assert [one.areas.sum() for one in both] == pytest.approx([1, 1])


@pytest.mark.parametrize(
    "resolution", [Resolution(constant_meV=2), Resolution(fraction=0.05), Resolution(table=((0, 3.0), (60, 1.0)))]
)
def test_resolution_conserves_area_and_adds_variance(resolution):
    edges = np.arange(-10, 90, 0.1)
    centers = bin_centers(edges)
    line = np.zeros(len(centers))
    line[400] = 10.0  # 30.05 meV
    shown = broadened(line, edges, resolution)
    assert (shown * 0.1).sum() == pytest.approx(1, rel=1e-12)
    mean = (shown * centers).sum() * 0.1
    sigma = np.sqrt((shown * (centers - mean) ** 2).sum() * 0.1)
    assert mean == pytest.approx(centers[400], abs=1e-6)
    assert sigma * FWHM_PER_SIGMA == pytest.approx(float(resolution.fwhm_meV(np.array(centers[400]))), rel=2e-3)
    whole = band(np.maximum(centers, 0))
    assert broadened(whole, edges, resolution).sum() == pytest.approx(whole.sum(), rel=1e-12)
    assert broadened(whole, edges, Resolution()) == pytest.approx(whole)


def test_resolution_as_it_is_told(tmp_path):
    assert parse_resolution("1.2") == Resolution(constant_meV=1.2)
    assert parse_resolution("2 %") == Resolution(fraction=0.02)
    table = tmp_path / "resolution.dat"
    table.write_text("# meV meV\n0 3\n100 1\n")
    assert parse_resolution(str(table)).fwhm_meV(np.array([50.0])) == pytest.approx([2.0])
    table.write_text("100 1\n0 3\n")
    for wrong in ("-1", "200%", str(tmp_path / "absent"), str(table)):
        with pytest.raises(InputError, match="--resolution"):
            parse_resolution(wrong)


def measured_at(stretch, shift, seed, resolution=None, counts=100_000):
    """The band counted on an axis E_measured = (E - shift) / stretch, so that the calibration finds these numbers."""
    fine = np.linspace(0, 100, 1001)
    centers = bin_centers(fine)
    density = band(stretch * centers + shift)
    if resolution:
        density = broadened(density, fine, resolution)
    expected = density.reshape(-1, 5).mean(axis=1)
    expected *= counts / expected.sum()
    counted = np.random.default_rng(seed).poisson(expected)
    energy = bin_centers(fine[::5])
    error = np.sqrt(np.maximum(counted, 1))
    return MeasuredSpectrum(energy, counted.astype(float), error, cells_around(energy), "none", "counted").normalised()


@pytest.mark.parametrize("stretch, shift, fwhm", [(0.85, 0.0, None), (0.8, 0.6, None), (1.1, 0.0, 1.5)])
def test_calibration_finds_the_axis_within_its_uncertainty(stretch, shift, fwhm):
    resolution = Resolution(constant_meV=fwhm) if fwhm else None
    computed = band(np.maximum(bin_centers(GRID), 0))
    pulls = []
    for seed in range(16):
        measured = measured_at(stretch, shift, seed, resolution)
        found = calibrate_axis(measured, computed, GRID, resolution, fit_shift=shift != 0)
        pulls.append((found.stretch - stretch) / found.stretch_error)
        assert found.explained > 0.95
    assert found.stretch_error < 0.01
    assert 0.5 < np.sqrt(np.mean(np.square(pulls))) < 1.6
    moved = found.apply(measured)
    assert moved.areas.sum() == pytest.approx(1)
    assert moved.energies_meV[50] == pytest.approx(found.stretch * measured.energies_meV[50] + found.shift_meV)


def test_calibration_to_another_crystal_is_refused():
    computed = np.exp(-((bin_centers(GRID) - 110) ** 2) / 2)
    with pytest.raises(InputError, match=r"explains .* check that it is the pristine sample of this host"):
        calibrate_axis(measured_at(1.0, 0.0, 0), computed, GRID)


def png():
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + bytes(50)


def several_columns():
    return text(np.stack([ENERGY, VALUE, VALUE[::-1], ERROR], axis=1), ",", "energy (meV),dos 10 K,dos 300 K,other\n")


def with_rows(**changes):
    """ROWS with one value of some rows replaced: ``row_column=value``."""
    rows = ROWS.copy()
    for place, value in changes.items():
        row, column = map(int, place.strip("r").split("_"))
        rows[row, column] = value
    return text(rows)


BAD = {
    "wavenumbers without a unit": (lambda: text(ROWS / [INVERSE_CM_TO_MEV, 1, 1], header=""), {}),
    "THz without a unit": (lambda: text(ROWS / [THZ_TO_MEV, 1, 1], header=""), {}),
    "a unit that cannot be": (lambda: text(ROWS / [INVERSE_CM_TO_MEV, 1, 1] * [10, 1, 1]), {}),
    "an unknown unit": (lambda: text(ROWS), {"unit": "eV"}),
    "a header that contradicts itself": (lambda: text(ROWS, header="# energies in meV\n# frequency in THz\n"), {}),
    "swapped columns": (lambda: text(ROWS[:, [1, 0]], header=""), {}),
    "negative intensities, with errors": (lambda: with_rows(r40_1=-0.01), {}),
    "negative intensities, without": (lambda: text((ROWS - [0, 0.004, 0])[:, :2], header="# energy (meV)\n"), {}),
    "negative errors": (lambda: with_rows(r12_2=-1e-4), {}),
    "half the band": (lambda: text(ROWS[ENERGY < 50]), {}),
    "NaN throughout": (lambda: text(ROWS * [1, np.nan, 1]), {}),
    "an empty file": (lambda: "", {}),
    "no numbers": (lambda: "sample 7 was measured\non Tuesday\n", {}),
    "one column": (lambda: text(VALUE[:, None], header=""), {}),
    "a row of text": (lambda: text(ROWS).replace("\n40.5 ", "\nbeam off 40.5 "), {}),
    "a short row": (lambda: re.sub(r"(\n40.5 \S+) \S+", r"\1", text(ROWS)), {}),
    "several columns": (several_columns, {}),
    "a column that is not there": (several_columns, {"columns": ("energy", "dos 5 K")}),
    "commas for everything": (lambda: text(np.round(ROWS, 3), ",", "", comma=True), {}),
    "both sides": (lambda: text(np.concatenate([ROWS * [-1, 1, 1], ROWS])), {}),
    "the elastic line": (lambda: with_rows(r0_1=1.0), {}),
    "too few points": (lambda: text(ROWS[:6]), {}),
    "a background without a fit range": (lambda: text(ROWS), {"background": Background("linear", above_meV=78)}),
    "an image": (png, {}),
    "a binary file": (lambda: bytes(range(256)) * 10, {}),
    "a spreadsheet": (lambda: b"PK\x03\x04" + bytes(100), {}),
    "damaged gzip": (lambda: gzip.compress(text(ROWS).encode())[:200], {}),
    "a huge file": (lambda: text(ROWS).encode() + b"# " + b"x" * (TEXT_MAX_MB * 2**20), {}),
    "huge when unpacked": (lambda: gzip.compress(b"0.1 0.2\n" * (TEXT_MAX_MB * 2**17 + 1)), {}),
    "several spectra in one file": (lambda: text(ROWS) + text(ROWS, header="# Q = 2\n"), {}),
    "several spectra of Mantid": (lambda: text(ROWS, ",", "# X , Y , E\n1\n") + text(ROWS, ",", "2\n"), {}),
    "damaged HDF5": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(40), {}),
}


def told(call, folder):
    """The message of an InputError, with names of files in place of paths, and without the words of a library."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value).replace(f"{folder}/", "")
    return re.sub(r"(damaged \w+ file) \(.*\)", r"\1 (…)", message)


def documented(message):
    """Whether the page shows this very message."""
    return f"`{message}`" in DOCS.read_text()


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_answered_as_documented(save, case):
    content, options = BAD[case]
    path = save(content())
    message = told(lambda: read_spectrum(path, **options), path.parent)
    assert message.startswith(("sample.txt: ", "--unit ", "--columns"))
    assert documented(message), message


BAD_HDF5 = {
    "two spectra in one array": (lambda path: nexus(path, shape=(2,), errors="e"), {}),
    "HDF5 without a plot": (
        lambda path: h5py.File(path, "w").create_dataset("run/energy", data=ENERGY).file.close(),
        {},
    ),
    "an axis that is no energy": (lambda path: nexus(path, units="Angstrom"), {}),
    "a dataset that is not there": (nexus, {"columns": ("entry/data/energy", "entry/data/gdos")}),
}


@pytest.fixture
def two_rows(monkeypatch):
    monkeypatch.setitem(globals(), "VALUE", np.concatenate([VALUE, VALUE]))
    monkeypatch.setitem(globals(), "ERROR", np.concatenate([ERROR, ERROR]))


@pytest.mark.parametrize("case", BAD_HDF5)
def test_bad_hdf5_files_are_answered_as_documented(tmp_path, request, case):
    if case == "two spectra in one array":
        request.getfixturevalue("two_rows")
    write, options = BAD_HDF5[case]
    path = tmp_path / "sample.nxs"
    write(path)
    message = told(lambda: read_spectrum(path, **options), path.parent)
    assert documented(message), message


BAD_PAIRS = {
    "pristine = doped": lambda pristine: pristine,
    "other weights": lambda pristine: replace(pristine, weighting="neutron"),
    "one file in THz": lambda pristine: pristine.moved(1 / THZ_TO_MEV),
    "one file of half the band": lambda pristine: pristine.scaled(1.01).within(0, 50),
}


@pytest.mark.parametrize("case", BAD_PAIRS)
def test_bad_pairs_are_answered_as_documented(save, case):
    pristine = read_spectrum(save(text(ROWS), "pristine.txt"))
    doped = replace(BAD_PAIRS[case](pristine), source="doped.txt")
    message = told(lambda: on_common_range(pristine, doped), Path(pristine.source).parent)
    assert documented(message), message


def test_absent_file(tmp_path):
    message = told(lambda: read_spectrum(tmp_path / "absent.txt"), tmp_path)
    assert documented(message), message


def test_resolution_on_a_stretched_axis():
    """Broadening and stretching may change places."""
    edges = np.arange(0.0, 100.01, 0.25)
    density = np.exp(-0.5 * ((0.5 * (edges[:-1] + edges[1:]) - 40) / 1.5) ** 2)
    resolution = Resolution(constant_meV=2.0, fraction=0.03, table=((0.0, 1.0), (80.0, 3.0)))
    one = broadened(density, edges, resolution)
    other = broadened(density / 1.1, 1.1 * edges, resolution.stretched(1.1))
    np.testing.assert_allclose(other, one / 1.1, rtol=1e-6, atol=1e-12)
