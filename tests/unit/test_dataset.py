"""The dataset file: nothing lost on the way in and out, damage noticed; splits without leaks; physics of the inputs."""

import os
import resource
import signal
import time
from dataclasses import replace
from itertools import pairwise

import h5py
import numpy as np
import pytest
import torch
from synthetic import comparisons, host_entry, make_dataset, spectra, supercell_modes

from defectnet.config import Config, Spectra
from defectnet.dataset.samples import Axis, host_edges, intensity, load_samples, sample_mask
from defectnet.dataset.schema import (
    COMPARED,
    SCHEMA_VERSION,
    Dataset,
    HostEntry,
    MissingEntry,
    SpectrumEntry,
    content_digest,
    write_dataset,
)
from defectnet.dataset.splits import host_groups, split, thinned, without_unseen
from defectnet.elements import PUBLISHED_VOCABULARY, element_amounts
from defectnet.errors import InputError, RecordError
from defectnet.phonons.pdos import neutron_weights, pdos, spectrum

FORMULAS = ["Si", "GaAs", "MgO", "NaCl"]
PER_HOST = 3


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("dataset") / "dataset.h5"
    make_dataset(path, FORMULAS, PER_HOST)
    return path


def test_round_trip(path):
    entries = list(spectra(FORMULAS, PER_HOST, 1))
    with Dataset(path) as data:
        assert data.hosts.id == [f"host-{formula}" for formula in FORMULAS]
        assert data.hosts.formula == FORMULAS
        assert data.hosts.replaces == [dict(host_entry(formula).candidates) for formula in FORMULAS]
        assert element_amounts(data.hosts.composition[1]) == {"Ga": 0.5, "As": 0.5}
        assert set(element_amounts(data.hosts.candidates[1])) == set(host_entry("GaAs").candidates)
        assert data.missing == [MissingEntry("host-Si", "doped-7", "relax", "failed", "exploded")]
        assert data.provenance == {"config": Config().model_dump(mode="json")}
        assert data.settings == Spectra(energy_max_meV=120.0)
        assert len(data.doped) == len(FORMULAS) * PER_HOST
        for row, entry in enumerate(entries):
            modes = data.modes(row)
            assert modes.elements == entry.modes.elements
            np.testing.assert_allclose(modes.energies_meV, entry.modes.energies_meV, rtol=1e-6)
            np.testing.assert_allclose(modes.weights, entry.modes.weights, rtol=1e-3, atol=1e-6)  # half precision
            np.testing.assert_allclose(modes.weights.sum(axis=1), 1, atol=1e-12)
            assert data.spectra.id[row] == entry.id
            assert data.spectra.fidelity[row] == entry.fidelity
            assert data.spectra.record_digest[row] == entry.record_digest
            assert data.hosts.id[data.spectra.host[row]] == entry.host_id
            assert element_amounts(data.spectra.concentrations[row]) == pytest.approx(dict(entry.concentrations))
            expected = spectrum(entry.modes, data.edges_meV, data.settings)
            assert np.abs(data.spectra.pdos[row] - expected) @ np.diff(data.edges_meV) < 4e-4
            assert data.spectra.quality["relax_steps"][row] == entry.quality["relax_steps"]
        for host, row in enumerate(data.hosts.pristine):
            assert data.spectra.role[row] == "pristine"
            assert data.spectra.host[row] == host
        # Pristine entries report no wall time.
        assert np.isnan(data.spectra.quality["wall_s"][data.hosts.pristine]).all()
        assert np.isfinite(data.spectra.quality["wall_s"][data.doped]).all()


def test_half_precision_of_weights_is_far_below_what_spectra_are_good_for(path):
    neutron = Spectra(weighting="neutron", energy_max_meV=120.0)
    with Dataset(path) as data:
        for row, entry in enumerate(spectra(FORMULAS, PER_HOST, 1)):
            rounded, exact = (spectrum(modes, data.edges_meV, neutron) for modes in (data.modes(row), entry.modes))
            assert np.abs(rounded - exact) @ np.diff(data.edges_meV) < 2e-4


@pytest.mark.parametrize("chunk", [1, 64, 1000])
def test_chunks_and_blocks_cut_nothing(path, tmp_path, monkeypatch, chunk):
    """Spectra that begin and end anywhere in a chunk, and blocks that end anywhere, hold the same modes."""
    monkeypatch.setattr("defectnet.dataset.schema.RAGGED_CHUNK", chunk)
    monkeypatch.setattr("defectnet.dataset.schema.SPECTRA_AT_ONCE", 3)
    make_dataset(tmp_path / "d.h5", FORMULAS, PER_HOST)
    with Dataset(path) as expected, Dataset(tmp_path / "d.h5") as data:
        assert data.spectra.id == expected.spectra.id
        np.testing.assert_allclose(data.spectra.pdos, expected.spectra.pdos, rtol=1e-6, atol=1e-12)
        found = [(row, one) for rows, some in data.blocks() for row, one in zip(range(100)[rows], some, strict=True)]
        assert [row for row, _ in found] == list(range(len(expected.spectra.id)))
        for row, one in found:
            whole = expected.modes(row)
            assert one.elements == whole.elements
            np.testing.assert_array_equal(one.energies_meV, whole.energies_meV)
            np.testing.assert_allclose(one.weights, whole.weights, rtol=2e-3)
            np.testing.assert_array_equal(data.modes(row).weights, whole.weights)


@pytest.mark.parametrize("name", ["energy_meV", "weights", "elements"])
def test_flipped_bit_in_modes_is_noticed(path, tmp_path, name):
    broken = tmp_path / "broken.h5"
    with h5py.File(path) as file:
        place = file["modes"][name].id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[place + 1] ^= 1
    broken.write_bytes(content)
    with Dataset(broken) as data:
        for reading in (lambda: data.modes(0), lambda: next(data.blocks()), data.recomputed_digest):
            with pytest.raises(RecordError, match=r"broken\.h5.*rerun `defectnet dataset`"):
                reading()


def test_spectra_are_normalised(path):
    with Dataset(path) as data:
        area = data.spectra.pdos @ np.diff(data.edges_meV)
        np.testing.assert_allclose(area[data.hosts.pristine], 1, atol=1e-5)
        assert (area <= 1 + 1e-5).all()


def test_same_content_same_bytes(path, tmp_path):
    again = tmp_path / "again.h5"
    time.sleep(max(0.0, 1.1 - (time.time() - path.stat().st_mtime)))  # a time stamp in the file would have changed
    digest = make_dataset(again, FORMULAS, PER_HOST)
    assert again.read_bytes() == path.read_bytes()
    assert content_digest(path) == digest
    assert [entry.name for entry in tmp_path.iterdir()] == ["again.h5"]


def test_digest_follows_content_but_not_provenance(path, tmp_path):
    other = tmp_path / "other.h5"
    assert make_dataset(other, FORMULAS, PER_HOST, provenance={"config": "another"}) == content_digest(path)
    changed = (replace(entry, n_atoms=entry.n_atoms + 1) for entry in spectra(FORMULAS, PER_HOST, 1))
    assert make_dataset(other, FORMULAS, PER_HOST, spectra=changed) != content_digest(path)


def test_comparisons_are_part_of_the_content(path, tmp_path):
    written = comparisons(FORMULAS, 2)
    with Dataset(path) as data:
        np.testing.assert_array_equal(data.comparison["host"], np.repeat(np.arange(len(FORMULAS)), 2))
        for name in COMPARED:
            expected = np.concatenate([written[host][name] for host in data.hosts.id])
            np.testing.assert_array_equal(data.comparison[name], expected)
    other = tmp_path / "other.h5"
    assert make_dataset(other, FORMULAS, PER_HOST, comparisons=comparisons(FORMULAS, 1)) != content_digest(path)
    fewer = {"host-NaCl": written["host-NaCl"]}  # hosts without a comparison have no row
    make_dataset(other, FORMULAS, PER_HOST, comparisons=fewer)
    with Dataset(other) as data:
        assert data.comparison["host"].tolist() == [3, 3]
    with pytest.raises(InputError, match="host-X is not among the hosts"):
        make_dataset(other, FORMULAS, PER_HOST, comparisons={"host-X": written["host-Si"]})


def test_edited_value_changes_recomputed_digest(path, tmp_path):
    edited = tmp_path / "edited.h5"
    edited.write_bytes(path.read_bytes())
    with h5py.File(edited, "r+") as file:
        file["modes/energy_meV"][0] += 1
    with Dataset(edited) as data:
        assert data.recomputed_digest() != data.digest


def test_empty_pieces(tmp_path):
    """A pristine spectrum alone, nothing missing: written and read like any other."""
    make_dataset(tmp_path / "d.h5", ["Si"], 0, missing=[], comparisons=None)
    with Dataset(tmp_path / "d.h5") as data:
        assert len(data.doped) == 0
        assert data.missing == []
        assert data.comparison.keys() == {"host", *COMPARED}
        assert all(len(column) == 0 for column in data.comparison.values())
        assert len(load_samples(data, Axis("host"))) == 0


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_truncated_file_is_refused(path, tmp_path, share):
    broken = tmp_path / "broken.h5"
    content = path.read_bytes()
    broken.write_bytes(content[: int(share * len(content))])
    with pytest.raises(RecordError, match=r"broken\.h5.*rerun `defectnet dataset`, records are intact"):
        Dataset(broken)


def test_other_files_are_refused(path, tmp_path):
    text = tmp_path / "text.h5"
    text.write_text("energy,dos\n1,2\n")
    with pytest.raises(RecordError, match=r"text\.h5"):
        Dataset(text)
    foreign = tmp_path / "foreign.h5"
    with h5py.File(foreign, "w") as file:
        file["data"] = 1
    with pytest.raises(RecordError, match=r"foreign\.h5"):
        Dataset(foreign)
    newer = tmp_path / "newer.h5"
    newer.write_bytes(path.read_bytes())
    with h5py.File(newer, "r+") as file:
        file.attrs["schema_version"] = SCHEMA_VERSION + 1
    with pytest.raises(RecordError, match=f"version {SCHEMA_VERSION + 1}, this package reads {SCHEMA_VERSION}"):
        Dataset(newer)
    with pytest.raises(InputError, match="no such dataset"):
        Dataset(tmp_path / "absent.h5")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"host_id": "host-X"}, "not among the hosts"),
        ({"fidelity": "guessed"}, "fidelity"),
        ({"concentrations": {"Xe": 0.1}}, "vocabulary"),
        ({"concentrations": {"As": 0.1}}, "no candidate"),
        ({"concentrations": {}}, "at least one"),
        ({"role": "pristine"}, "no dopant"),
        ({"id": "Si-pristine"}, "second one"),
    ],
)
def test_inconsistent_spectra_are_refused(tmp_path, change, message):
    entries = list(spectra(["Si"], 1, 1))
    with pytest.raises(InputError, match=message):
        make_dataset(tmp_path / "d.h5", ["Si"], 1, spectra=[entries[0], replace(entries[1], **change)])
    assert list(tmp_path.iterdir()) == []


def test_inconsistent_hosts_are_refused(tmp_path):
    doped_only = list(spectra(["Si"], 1, 1))[1:]
    with pytest.raises(InputError, match="no pristine spectrum"):
        make_dataset(tmp_path / "d.h5", ["Si"], 1, spectra=doped_only)
    with pytest.raises(InputError, match=r"sum to 0\.5"):
        make_dataset(tmp_path / "d.h5", [], 0, hosts=[HostEntry("a", "Si", {"Si": 0.5}, {})])
    with pytest.raises(InputError, match="unique"):
        make_dataset(tmp_path / "d.h5", [], 0, hosts=[host_entry("Si"), host_entry("Si")])


@pytest.mark.parametrize("room", [20_000, 100_000, 300_000])
def test_full_disk_leaves_the_old_file(path, tmp_path, room):
    """A limit on file size stands in for a full disk."""
    target = tmp_path / "dataset.h5"
    target.write_bytes(path.read_bytes())
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        try:
            make_dataset(target, FORMULAS, PER_HOST)
        except RecordError as error:
            os._exit(0 if "free space" in str(error) else 2)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert target.read_bytes() == path.read_bytes()
    assert list(tmp_path.iterdir()) == [target]


# Splits


def test_host_split_never_leaks():
    groups = np.repeat(np.arange(23), 7)
    for repeat in range(12):
        parts = split(groups, "host", 0.15, 0.2, seed=3, repeat=repeat)
        kinds = [set(groups[part]) for part in vars(parts).values()]
        assert not (kinds[0] & kinds[1] or kinds[0] & kinds[2] or kinds[1] & kinds[2])
        assert sorted(np.concatenate(list(vars(parts).values()))) == list(range(len(groups)))
        assert [len(kind) for kind in kinds] == [15, 3, 5]


@pytest.mark.parametrize("n", [3, 4, 5])
def test_few_hosts_fill_every_part(n):
    groups = np.repeat(np.arange(n), 2)
    for fraction in (0.01, 0.2, 0.49):
        parts = split(groups, "host", fraction, fraction, seed=0)
        assert min(len(part) for part in vars(parts).values()) >= 2


def test_repeats_cover_all_hosts_once():
    groups = np.repeat(np.arange(4), 6)
    tested = [split(groups, "host", 0.15, 0.2, seed=1, repeat=repeat).test for repeat in range(4)]
    assert sorted(np.concatenate(tested)) == list(range(24))


def test_split_is_deterministic_and_seeded():
    groups = np.repeat(np.arange(30), 2)
    first = split(groups, "row", 0.15, 0.2, seed=1)
    np.testing.assert_array_equal(first.test, split(groups, "row", 0.15, 0.2, seed=1).test)
    assert set(first.test) != set(split(groups, "row", 0.15, 0.2, seed=2).test)
    assert len(first.test) == 12


def test_impossible_splits():
    with pytest.raises(InputError, match=r"at least 3 host compositions.*row split"):
        split(np.array([0, 0, 1, 1]), "host", 0.2, 0.2, seed=0)
    with pytest.raises(InputError, match="has 0"):
        split(np.array([], dtype=int), "row", 0.2, 0.2, seed=0)
    with pytest.raises(InputError, match="none of host, row, configuration, element"):
        split(np.arange(9), "time", 0.2, 0.2, seed=0)
    for fidelity in (["direct"] * 4, ["superposed"] * 4, ["direct", "direct", "superposed", "superposed"]):
        with pytest.raises(InputError, match="configuration split needs"):
            split(np.array([0, 0, 1, 1]), "configuration", 0.2, 0.2, seed=0, fidelity=np.array(fidelity))
    with pytest.raises(InputError, match="with 2 different dopants"):
        split(np.arange(4), "element", 0.2, 0.2, seed=0, targets=np.eye(4, 56)[[0, 1, 0, 1]])
    with pytest.raises(InputError, match="a part is empty"):  # every spectrum holds every dopant
        split(np.arange(4), "element", 0.2, 0.2, seed=0, targets=np.ones((4, 56)))


def test_configuration_split_tests_relaxed_spectra_of_known_hosts():
    groups = np.repeat(np.arange(5), 20)
    fidelity = np.tile(["direct", "probed", *["superposed"] * 12, *["mass_only"] * 6], 5)
    fidelity[80:] = "probed"  # no spectrum of the last host is made from its library
    kept = []
    for repeat in range(3):
        parts = split(groups, "configuration", 0.15, 0.2, seed=1, repeat=repeat, fidelity=fidelity)
        assert set(fidelity[np.concatenate([parts.train, parts.validation])]) == {"superposed", "mass_only"}
        assert parts.test.tolist() == [0, 1, 20, 21, 40, 41, 60, 61]
        assert set(groups[parts.test]) <= set(groups[parts.train])
        assert (len(parts.train), len(parts.validation)) == (61, 11)
        assert not set(parts.train) & set(parts.validation)
        kept.append(tuple(parts.validation))
    assert len(set(kept)) == 3


def test_element_split_holds_out_elements():
    rng = np.random.default_rng(0)
    targets = np.where(rng.random((400, 56)) < 0.05, 0.02, 0.0) * (np.arange(56) < 30)
    targets = targets[targets.any(axis=1)]
    tested = []
    for repeat in range(5):
        parts = split(np.arange(len(targets)), "element", 0.1, 0.2, seed=1, repeat=repeat, targets=targets)
        held, kept, training = (
            set(np.flatnonzero((targets[rows] > 0).any(axis=0))) for rows in (parts.test, parts.validation, parts.train)
        )
        unseen = held - training - kept
        assert len(unseen) == 6
        assert len(kept - training) == 3
        assert all(unseen & set(np.flatnonzero(row)) for row in targets[parts.test])
        assert sorted(np.concatenate(list(vars(parts).values()))) == list(range(len(targets)))
        tested += unseen
    assert sorted(tested) == list(range(30))  # five folds of six, each element once


def test_training_does_not_ask_about_unseen_elements(path):
    with Dataset(path) as data:
        samples = load_samples(data, Axis("absolute"))
    training = without_unseen(samples[np.arange(2)])
    present = set(np.flatnonzero(training.targets.any(axis=0)))
    assert {int(z) for row in training.candidates for z in np.flatnonzero(row)} == present
    assert (training.candidates <= samples.candidates[:2]).all()
    assert not (training.candidates == samples.candidates[:2]).all()


def test_polymorphs_share_a_group(tmp_path):
    twin = replace(host_entry("Si"), id="host-Si-hexagonal")
    make_dataset(tmp_path / "d.h5", ["Si", "Ge"], 1, hosts=[host_entry("Si"), host_entry("Ge"), twin])
    with Dataset(tmp_path / "d.h5") as data:
        groups = host_groups(data)
    assert groups[0] == groups[2] != groups[1]


def test_structures_of_one_composition_are_apart_unless_they_became_the_same_crystal(tmp_path):
    names = ("crystal", "softer", "crystal-again", "softest")
    modes = supercell_modes("Si", 1)
    hosts = [replace(host_entry("Si"), id=name) for name in names]
    pristine = [
        SpectrumEntry(
            name, host_id=name, fidelity="direct", concentrations={}, n_atoms=8, record_digest="r", quality={},
            modes=replace(modes, energies_meV=scale * modes.energies_meV), role="pristine",
            potential="springs", potential_digest="0",
        )
        for name, scale in zip(names, (1, 0.9, 1.0002, 0.8), strict=True)
    ]  # fmt: skip
    settings = Spectra(energy_max_meV=120.0)
    write_dataset(tmp_path / "d.h5", hosts, pristine, settings, PUBLISHED_VOCABULARY)
    with Dataset(tmp_path / "d.h5") as data:
        groups = host_groups(data)
    assert groups[0] == groups[2] and len(set(groups)) == 3


# Inputs of models


@pytest.mark.parametrize("axis", [Axis("host"), Axis("host", sigma_meV=1.0), Axis("absolute")])
def test_samples(path, axis):
    with Dataset(path) as data:
        samples = load_samples(data, axis)
        bins = 140 if axis.kind == "absolute" else 100
    assert samples.doped.shape == samples.pristine.shape == (len(FORMULAS) * PER_HOST, bins)
    # Mean 1 over an axis that covers all modes; broadening carries half of the topmost ones over the published end.
    assert samples.pristine.mean(axis=1) == pytest.approx(1, abs=0.15 if axis.sigma_meV else 1e-5)
    assert (samples.doped.mean(axis=1) <= 1 + 1e-5).all()
    assert samples.candidates[samples.targets > 0].all()
    assert samples.composition.sum(axis=1) == pytest.approx(1)
    part = samples[np.array([2, 0])]
    np.testing.assert_array_equal(part.doped, samples.doped[[2, 0]])


@pytest.mark.parametrize("weighting", ["none", "neutron"])
def test_published_axis_is_a_histogram_of_the_modes(path, tmp_path, weighting):
    settings = Spectra(weighting=weighting, energy_max_meV=120.0)
    make_dataset(tmp_path / "d.h5", FORMULAS, PER_HOST, settings=settings)
    with Dataset(tmp_path / "d.h5") as data:
        samples = load_samples(data, Axis("host", bins=30))
        for index, row in enumerate(samples.row):
            modes, reference = data.modes(row), data.modes(data.hosts.pristine[samples.host[index]])
            strength = modes.weights @ (
                neutron_weights(modes.elements) if weighting == "neutron" else np.ones(len(modes.elements))
            )
            edges = np.linspace(0, reference.energies_meV.max(), 31)
            edges[0] = -np.inf
            expected = np.histogram(modes.energies_meV, edges, weights=strength / strength.sum())[0] * 30
            np.testing.assert_allclose(samples.doped[index], expected, rtol=2e-3, atol=1e-3)


def test_published_axis_loses_localised_modes_and_the_absolute_one_keeps_them():
    """Carbon in silicon vibrates far above the band; this is the flaw that the faithful baseline keeps."""
    host, doped = supercell_modes("Si", 1), supercell_modes("Si", 1, {0: "C"})
    localised = np.mean(doped.energies_meV > host.energies_meV.max())
    assert localised > 0
    edges = host_edges(host, 100)
    assert intensity(doped, edges, Axis("host"), Spectra()).mean() == pytest.approx(1 - localised)
    grid = np.arange(-20.0, 141.0)
    assert pdos(doped, grid, 1.0).sum() == pytest.approx(1, abs=1e-6)


def test_imaginary_modes_count_at_zero_on_the_published_axis():
    host = supercell_modes("Si", 1)
    unstable = replace(host, energies_meV=np.concatenate([[-30.0, -5.0], host.energies_meV[2:]]))
    values = intensity(unstable, host_edges(host, 100), Axis("host"), Spectra())
    assert values[0] == pytest.approx(100 * 2 / len(host.energies_meV))
    assert values.mean() == pytest.approx(1)


def test_neutron_weighting_changes_compounds_only():
    neutron = Spectra(weighting="neutron")
    for formula, same in (("Si", True), ("GaAs", False)):
        modes = supercell_modes(formula, 1)
        edges = host_edges(modes, 100)
        plain = intensity(modes, edges, Axis("host"), Spectra())
        weighted = intensity(modes, edges, Axis("host"), neutron)
        assert weighted.mean() == pytest.approx(1)
        assert np.allclose(plain, weighted) == same


def test_mask_keeps_present_dopants_and_draws_distractors():
    candidates = torch.zeros(2000, 56, dtype=torch.bool)
    candidates[:, :20] = True
    targets = torch.zeros(2000, 56)
    targets[:, 3] = 0.05
    mask = sample_mask(candidates, targets, 0.3, torch.Generator().manual_seed(0))
    assert mask[:, 3].all()
    assert not mask[:, 20:].any()
    absent = mask[:, [i for i in range(20) if i != 3]].float().mean()
    assert absent == pytest.approx(0.3, abs=0.01)
    for probability, expected in ((0.0, targets > 0), (1.0, candidates)):
        drawn = sample_mask(candidates, targets, probability, torch.Generator().manual_seed(1))
        assert torch.equal(drawn, expected)


def test_learning_curves_leave_out_whole_groups():
    groups = np.repeat(np.arange(40), 5)
    parts = split(groups, "host", 0.15, 0.2, seed=3)
    kept = [thinned(parts, groups, fraction, seed=3) for fraction in (0.01, 0.25, 0.5, 1.0)]
    for fewer, more in pairwise(kept):
        assert set(fewer.train) < set(more.train)
    np.testing.assert_array_equal(kept[-1].train, parts.train)
    n_groups = len(np.unique(groups[parts.train]))
    for fraction, one in zip((0.25, 0.5), kept[1:3], strict=True):
        assert len(np.unique(groups[one.train])) == round(fraction * n_groups)
        assert len(one.train) == 5 * round(fraction * n_groups)
        np.testing.assert_array_equal(one.test, parts.test)
    assert len(kept[0].train) == 5
