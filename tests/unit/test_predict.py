"""An answer about a measured sample: what must not matter, what must, and what is refused."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from synthetic import make_dataset_with_responses, supercell_modes
from typer.testing import CliRunner

from defectnet.cli import app
from defectnet.config import Training
from defectnet.errors import InputError
from defectnet.experiments.known import look_up
from defectnet.experiments.predict import predict
from defectnet.experiments.resolution import Resolution
from defectnet.experiments.spectrum import MeasuredSpectrum, cells_around
from defectnet.phonons.pdos import bin_centers, pdos
from defectnet.report.identification import identification_figure
from defectnet.training import fit

DOCS = Path(__file__).parents[2] / "docs" / "measured-spectra.md"
FORMULAS = ["Si", "Ge", "GaAs", "MgO"]
ASKED = ["In", "P", "Zn"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("predict") / "dataset.h5"
    make_dataset_with_responses(path, FORMULAS, 8)
    return path


@pytest.fixture(scope="module")
def model(dataset):
    return fit.train(dataset, Training(epochs=2), "response", "row", 0, 7, dataset.parent / "model")


def measured(formula, dopants=None, error=None, seed=0):
    """A spectrum of a spring crystal, with noise of that size relative to its mean."""
    edges = np.arange(0.0, 120.01, 0.5)
    density = pdos(supercell_modes(formula, 1, dopants), edges, 1.0)
    centers = bin_centers(edges)
    sigma = None
    if error is not None:
        sigma = np.full(len(centers), error * density.mean())
        density = density + sigma * np.random.default_rng(seed).normal(size=len(density))
    return MeasuredSpectrum(centers, density, sigma, cells_around(centers), "none", formula).normalised()


def amounts(found):
    return {one.element: one.concentration for one in found.dopants}


def test_the_order_of_the_candidates_does_not_matter(model):
    pristine, doped = measured("GaAs"), measured("GaAs", {0: "In"})
    found = predict(model, pristine, doped, "GaAs", ASKED)
    assert [one.element for one in found.dopants] == ASKED
    assert [one.replaces for one in found.dopants] == ["Ga", "As", "Ga"]
    turned = predict(fit.load_checkpoint(model), pristine, doped, "Ga2As2", ASKED[::-1])
    assert amounts(turned) == pytest.approx(amounts(found), rel=1e-3, abs=1e-5)
    for one in found.dopants:
        assert 0 <= one.low <= one.concentration <= one.high and 0 <= one.presence <= 1
    json.dumps(found.as_dict())


def test_what_is_known_of_the_host_is_used(model, dataset):
    pristine, doped = measured("GaAs"), measured("GaAs", {0: "In"})
    known = look_up(dataset, "AsGa")
    assert known.name == "host-GaAs" and (known.density * np.diff(known.edges_meV)).sum() == pytest.approx(1, abs=1e-3)
    found = predict(model, pristine, doped, "GaAs", known=known)
    assert {one.element for one in found.dopants} == {"Al", "In", "Si", "Zn", "P", "Sb", "Se", "N"}
    assert {one.knowledge for one in found.dopants} == {"library"}
    mixed = predict(model, pristine, doped, "GaAs", ["In", "B"], known)
    assert [one.knowledge for one in mixed.dopants] == ["library", "none"]
    # The response of the very crystal that was measured explains all but what the network's corrections spoil.
    alone = predict(model, pristine, doped, "GaAs", ["In"], known)
    assert alone.unexplained < 0.5 * predict(model, pristine, doped, "GaAs", ["Sb"], known).unexplained


def test_the_computed_host_stands_in_for_a_measured_one(model, dataset):
    known = look_up(dataset, "host-GaAs")
    doped = measured("GaAs", {0: "In"})
    one = predict(model, known.spectrum(), doped, "GaAs", ASKED, known)
    other = predict(model, measured("GaAs"), doped, "GaAs", ASKED, known)
    assert amounts(one) == pytest.approx(amounts(other), abs=5e-3)


def test_an_instrument_broadens_what_is_known(dataset):
    known = look_up(dataset, "GaAs")
    wide = known.broadened(Resolution(constant_meV=8.0))
    for name in ("pristine", "library", "mass_only"):
        before, after = (getattr(one.responses, name) for one in (known, wide))
        np.testing.assert_allclose(after.sum(axis=-1), before.sum(axis=-1), atol=1e-2)
        assert np.abs(np.diff(after)).max() < 0.6 * np.abs(np.diff(before)).max()


def test_noise_widens_intervals_and_raises_limits(model, dataset):
    known = look_up(dataset, "GaAs")
    quiet, loud = (
        predict(model, measured("GaAs", None, e, 1), measured("GaAs", {0: "In"}, e, 2), "GaAs", ASKED, known)
        for e in (0.01, 0.3)
    )
    for one, other in zip(quiet.dopants, loud.dopants, strict=True):
        assert other.detection_limit == pytest.approx(30 * one.detection_limit, rel=0.2)
    assert np.mean([d.high - d.concentration for d in loud.dopants]) > np.mean(
        [d.high - d.concentration for d in quiet.dopants]
    )
    assert quiet.warnings == ()
    guessed = predict(model, measured("GaAs"), measured("GaAs", {0: "In"}), "GaAs", ASKED, known)
    assert "no errors in the files" in guessed.warnings[0]


def test_a_range_that_was_not_measured_is_left_out(model, dataset):
    known = look_up(dataset, "GaAs")
    pristine, doped = (measured("GaAs", dopants, 0.01) for dopants in (None, {0: "In"}))
    part = predict(model, pristine.within(5.0, 30.0), doped.within(5.0, 30.0), "GaAs", ASKED, known)
    centers = bin_centers(part.edges_meV)
    assert (part.measured == ((centers > 5) & (centers < 30))).all()
    assert (part.difference[~part.measured] == 0).all() and (part.contributions[:, ~part.measured] == 0).all()
    whole = predict(model, pristine, doped, "GaAs", ASKED, known)
    limits = np.array([[d.detection_limit for d in one.dopants] for one in (part, whole)])
    assert (limits[0] >= limits[1] * (1 - 1e-6)).all()  # less is seen with less


def test_warnings(model, dataset):
    known = look_up(dataset, "GaAs")
    wrong = predict(model, measured("GaAs", None, 1e-3), measured("Ge", None, 1e-3, 1), "GaAs", ["P"], known)
    assert any("unexplained" in warning for warning in wrong.warnings)
    another = predict(model, measured("Ge", None, 0.01), measured("Ge", {0: "Si"}, 0.01, 1), "GaAs", ["P"], known)
    assert any("differ in" in warning for warning in another.warnings)
    neutron = measured("GaAs", {0: "In"}, 0.01)
    weighted = MeasuredSpectrum(**vars(neutron) | {"weighting": "neutron"})
    pristine = MeasuredSpectrum(**vars(measured("GaAs", None, 0.01)) | {"weighting": "neutron"})
    assert "weighted neutron" in predict(model, pristine, weighted, "GaAs", ["P"]).warnings[0]


@pytest.mark.parametrize(
    ("formula", "candidates", "message"),
    [
        ("GaSb(", ["Ge"], "--formula 'GaSb(': cannot be read; write the host's like GaAs or MgB2"),
        ("", ["Ge"], "--formula '': cannot be read; write the host's like GaAs or MgB2"),
        ("GASB", None, "--formula GASB: the network knows no G, A; it knows H, Li, …"),
        ("Xe", ["Ge"], "--formula Xe: the network knows no Xe; it knows H, Li, …"),
        ("GaSb", ["Ge", "Xe"], "--candidates: the network knows no Xe; it knows H, Li, …"),
        ("GaSb", ["Ge", "Ga"], "--candidates: Ga is in GaSb undoped; name what may replace its elements"),
        ("GaSb", [], "--candidates: names no dopant; list some, separated by commas"),
    ],
)
def test_nonsense_is_answered_as_documented(model, formula, candidates, message):
    with pytest.raises(InputError, match=re.escape(message.rstrip("…"))):
        predict(model, measured("Si"), measured("Si", {0: "Ge"}), formula, candidates)
    assert f"`{message}`" in DOCS.read_text()


def test_published_networks_and_unknown_hosts_are_refused(dataset, tmp_path):
    published = fit.train(dataset, Training(epochs=1), "published", "row", 0, 7, tmp_path)
    with pytest.raises(InputError, match="preset response"):
        predict(published, measured("Si"), measured("Si", {0: "Ge"}), "Si", ["Ge"])
    with pytest.raises(InputError, match="no host NaCl"):
        look_up(dataset, "NaCl")


def write(path, spectrum):
    columns = (spectrum.energies_meV, spectrum.intensity, spectrum.error)
    np.savetxt(path, np.column_stack(columns), header="energy (meV) intensity error")
    return str(path)


def test_command(model, dataset, tmp_path):
    doped = write(tmp_path / "doped.txt", measured("GaAs", {0: "In"}, 0.01, 1).moved(1.04))
    stretched = write(tmp_path / "stretched.txt", measured("GaAs", None, 0.01).moved(1.04))
    base = ["predict", str(model), "--doped", doped, "--formula", "GaAs", "--dataset", str(dataset)]
    output = tmp_path / "answer"
    result = CliRunner().invoke(
        app, [*base, "--pristine", stretched, "--calibrate", "--candidates", "In, P", "--output", str(output)]
    )
    assert result.exit_code == 0, result.output
    answer = json.loads((output / "answer.json").read_text())
    assert [one["element"] for one in answer["dopants"]] == ["In", "P"]
    assert (output / "answer.png").stat().st_size > 10_000
    for arguments, message in (
        (["--calibrate"], "--calibrate: needs --pristine"),
        (["--weighting", "neutron"], "--weighting neutron"),
        (["--resolution", "wide"], "--resolution"),
        (["--host", "nobody"], "no host nobody"),
        (["--background", "linear"], "--background: needs --background-above"),
        (["--columns", "1,7"], "--columns 7: no such column"),
    ):
        with pytest.raises(InputError, match=message):
            CliRunner().invoke(app, [*base, *arguments], catch_exceptions=False)
    with pytest.raises(InputError, match="--pristine: give"):
        CliRunner().invoke(app, base[:-2], catch_exceptions=False)
    # A flat background, more pixels than needed, columns in another order: the answer stays what it was.
    table = np.loadtxt(doped)
    table[:, 1] += 0.5 * table[:, 1].mean()
    other = tmp_path / "other.csv"
    np.savetxt(
        other, np.column_stack([table[:, 2], table[:, 1], table[:, 0]]), delimiter=",", header="e,i,energy (meV)"
    )
    arguments = ["predict", str(model), "--doped", str(other), "--formula", "GaAs", "--dataset", str(dataset)]
    arguments += ["--candidates", "In,P", "--columns", "3,2,1", "--background-above", "60", "--output"]
    assert CliRunner().invoke(app, [*arguments, str(tmp_path / "two")], catch_exceptions=False).exit_code == 0
    assert CliRunner().invoke(app, [*base, "--candidates", "In,P", "--output", str(tmp_path / "one")]).exit_code == 0
    one, two = (json.loads((tmp_path / name / "answer.json").read_text())["dopants"] for name in ("one", "two"))
    for before, after in zip(one, two, strict=True):
        assert after["concentration"] == pytest.approx(before["concentration"], abs=5e-3)


def test_the_picture_is_reproducible(model, tmp_path):
    found = predict(model, measured("GaAs", None, 0.01), measured("GaAs", {0: "In"}, 0.01), "GaAs", ASKED)
    one, other = (identification_figure(found, tmp_path / name) for name in "ab")
    assert one[0].read_bytes() == other[0].read_bytes() and one[1].read_bytes() == other[1].read_bytes()
