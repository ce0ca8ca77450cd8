"""Pairs from runs and from the published layout, their division, training, evaluation, and use in one step."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, mx2
from ase.data import covalent_radii
from ase.io import read, write
from typer.testing import CliRunner

from defectnet.batches import library_batch, phonon_batch, relax_batch
from defectnet.batches.starts import OneStepStart
from defectnet.check import check_definet
from defectnet.cli import app
from defectnet.config import load_config, parse_config
from defectnet.definet import fit
from defectnet.definet.archive import read_pairs, write_pairs
from defectnet.definet.baselines import RadiusScaling
from defectnet.definet.evaluate import evaluate
from defectnet.definet.fit import Settings, coordinate_mae, load_trained, train
from defectnet.definet.force_calls import STARTS, read_counts
from defectnet.definet.graphs import graph_of
from defectnet.definet.pairs import Pair, net_displacements, pairs_of_runs
from defectnet.definet.parts import deal
from defectnet.definet.published import published_pairs
from defectnet.definet.relax import on_host_sites, relax_in_one_step
from defectnet.dopants import recommend
from defectnet.errors import InputError, RecordError
from defectnet.layout import Layout
from defectnet.phonons.superposition import Superposition
from defectnet.potentials import LazyModel
from defectnet.records import RecordStore, write_manifest
from defectnet.supercells import Plan, plan_host, read_plans

HOSTS = {"NaCl": 5.64, "KF": 5.34, "LiF": 4.03, "KBr": 6.6, "MgO": 4.21, "CaS": 5.69}
DOPANTS = ("Li", "Na", "K", "Rb", "Mg", "Ca", "Zn", "In")
SMALL = Settings(
    scalars=16, vectors=8, layers=1, radial=6, cutoff_A=4.0, members=2, epochs=16, batch_size=3, learning_rate=1e-2,
    averaging=0.9,
)  # fmt: skip


def springs(host: str, a: float, dopant: str, sites: tuple[int, ...] = (0,)) -> Pair:
    """Neighbours of dopants on cation sites move away by a tenth of the difference of covalent radii."""
    atoms = bulk(host, "rocksalt", a=a, cubic=True) * (2, 1, 1)
    doped = atoms.copy()
    moved = np.zeros((len(atoms), 3))
    for site in sites:
        doped.symbols[site] = dopant
        vectors = atoms.get_distances(site, range(len(atoms)), mic=True, vector=True)
        near = np.isclose(np.linalg.norm(vectors, axis=1), a / 2, atol=1e-3)
        misfit = covalent_radii[doped.numbers[site]] - covalent_radii[atoms.numbers[site]]
        moved[near] += 0.1 * misfit * vectors[near] / (a / 2)
    moved = net_displacements(np.zeros_like(moved), moved, atoms.cell.array, np.ones(len(atoms), bool))
    name = f"{host}/{dopant}{len(sites)}"
    return Pair(name, host, doped.numbers, atoms.numbers, atoms.positions, atoms.cell.array, moved, moved)


@pytest.fixture(scope="module")
def pairs():
    return [
        springs(host, a, dopant, sites)
        for host, a in HOSTS.items()
        for dopant in DOPANTS
        if dopant not in host
        for sites in ((0,), (0, 4))
    ]


@pytest.fixture(scope="module")
def trained(pairs, tmp_path_factory):
    return load_trained(train(pairs, replace(SMALL, patience=SMALL.epochs), tmp_path_factory.mktemp("definet")))


@pytest.fixture(scope="module")
def run(hosts, config, tmp_path_factory):
    """Two hosts through library, relaxation and phonons; the path of the run's configuration."""
    folder = tmp_path_factory.mktemp("run")
    results = folder / "results"
    values = config.model_dump(mode="json")
    values["run"] |= {"name": "small", "results": str(results)}
    values["relaxation"] |= {"start": "superposed"}
    settings = parse_config(values, "test")
    plans = {}
    for host in hosts[:2]:
        candidates = recommend(host.build(), host.id, config.dopants, config.hosts.vocabulary)
        plans[host.id] = plan_host(host.id, host.build(), candidates, settings.supercells, 1)
    store = RecordStore(results / "records")
    library = library_batch(hosts[:2], plans, settings, store)
    relaxations = relax_batch(hosts[:2], plans, settings, store, library)
    phonons = phonon_batch(relaxations, plans, settings, store, library)
    for stage, entries in (("library", library), ("relax", relaxations), ("phonons", phonons)):
        write_manifest(results / stage / "batch-00000.json", entries)
    (results / "supercells").mkdir()
    made = {"plans": {name: plan.to_dict() for name, plan in plans.items()}, "failed": {}}
    (results / "supercells" / "batch-00000.json").write_text(json.dumps(made))
    path = folder / "config.yaml"
    path.write_text(json.dumps(values))  # JSON is YAML
    return path


# Pairs.


def test_pairs_of_a_run_start_at_the_sites_of_the_host(run):
    pairs = pairs_of_runs([run])
    singles = [pair for pair in pairs if not pair.id.partition("doped-")[1]]
    assert {pair.host for pair in pairs} == {"ClNa", "FK"}
    assert len(pairs) == len(singles) + 4
    assert {"small/NaCl/Li@Na0", "small/NaCl/doped-0"} <= {pair.id for pair in pairs}
    for pair in pairs:
        assert (pair.forces is None) == (pair not in singles)  # superposed starts are elsewhere
        host = Atoms(pair.host_numbers, pair.positions, cell=pair.cell, pbc=True)
        nearest = np.sort(host.get_all_distances(mic=True), axis=1)[:, 1:7]
        assert np.allclose(nearest, nearest[0, 0], atol=1e-6)  # a rock salt
        assert np.abs(pair.displacements.mean(axis=0)).max() < 1e-12
        assert 1e-4 < np.abs(pair.displacements).max() < 1
        assert pair.defects.sum() >= 1


def test_single_defects_alone_are_enough(run, tmp_path):
    """A batch whose later stages have not run yet; its pristine records are found without their manifests."""
    values = json.loads(run.read_text())
    results, old = tmp_path / "results", Path(values["run"]["results"])
    shutil.copytree(old, results, ignore=shutil.ignore_patterns("relax", "phonons", "records"))
    (results / "records").symlink_to(old / "records")
    values["run"] |= {"name": "begun", "results": str(results)}
    begun = tmp_path / "config.yaml"
    begun.write_text(json.dumps(values))
    singles = [pair for pair in pairs_of_runs([run]) if "doped-" not in pair.id]
    found = pairs_of_runs([begun])
    assert [pair.id.replace("begun", "small") for pair in found] == [pair.id for pair in singles]
    for one, other in zip(found, singles, strict=True):
        assert np.array_equal(one.displacements, other.displacements)
        assert np.array_equal(one.lattice.hessian, other.lattice.hessian)
    assert [pair.id for pair in pairs_of_runs([begun, run])[: len(found)]] == [pair.id for pair in found]
    both = pairs_of_runs([begun, run])
    assert len(both) == len(pairs_of_runs([run]))  # what they share counts once, and goes by both names
    assert {name for pair in both for name in pair.names} >= {pair.id for pair in singles}


def test_two_runs_of_one_name_are_refused(run, tmp_path):
    values = json.loads(run.read_text())
    results = tmp_path / "results"
    shutil.copytree(values["run"]["results"], results)
    for path in results.glob("library/*.json"):
        entries = json.loads(path.read_text())
        for entry in entries:
            (results / "records" / "library" / entry["host"] / f"{entry['key'][:32]}.h5").rename(
                results / "records" / "library" / entry["host"] / f"{'0' * 24}{entry['key'][:8]}.h5"
            )
            entry["key"] = f"{'0' * 24}{entry['key'][:8]}"
        path.write_text(json.dumps(entries))
    values["run"]["results"] = str(results)
    (tmp_path / "config.yaml").write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"run\.name"):
        pairs_of_runs([run, tmp_path / "config.yaml"])


def test_superposition_of_one_defect_is_its_relaxation(run):
    known = [pair for pair in pairs_of_runs([run]) if pair.superposed is not None]
    assert known
    for pair in known:
        left = coordinate_mae(pair.superposed, pair)
        assert left < 0.5 * coordinate_mae(np.zeros_like(pair.superposed), pair)
        if pair.defects.sum() == 1:
            assert left < 2e-3


def test_collected_pairs_are_those_of_the_run(run, tmp_path):
    """What is read back, with the force constants of the hosts, is what the records say, but for single precision."""
    pairs = pairs_of_runs([run])
    pairs[0].also.extend(["the same/NaCl/Li@Na0", "once more/NaCl/Li@Na0"])
    write_pairs(tmp_path / "pairs.h5", pairs)
    again = read_pairs(tmp_path / "pairs.h5")
    assert [(pair.id, pair.host, pair.stays) for pair in again] == [(pair.id, pair.host, pair.stays) for pair in pairs]
    assert [pair.names for pair in again] == [pair.names for pair in pairs]
    assert any(pair.superposed is not None for pair in again)
    assert any(pair.forces is not None for pair in again)
    for pair, other in zip(pairs, again, strict=True):
        for name in ("numbers", "host_numbers"):
            np.testing.assert_array_equal(getattr(other, name), getattr(pair, name))
        for name in ("positions", "cell", "displacements"):
            np.testing.assert_allclose(getattr(other, name), getattr(pair, name), atol=1e-5)
        for name in ("superposed", "forces"):
            assert (getattr(pair, name) is None) == (getattr(other, name) is None)
        np.testing.assert_allclose(other.lattice.hessian, pair.lattice.hessian, atol=1e-5)
    assert len({id(pair.lattice) for pair in again}) == len({id(pair.lattice) for pair in pairs})


def test_forces_of_pairs_are_those_on_the_unrelaxed_cell(run, config):
    model = LazyModel(config.potential).model
    for pair in pairs_of_runs([run]):
        if pair.forces is not None:
            found = model.evaluate([Atoms(pair.numbers, pair.positions, cell=pair.cell, pbc=True)]).forces[0]
            np.testing.assert_allclose(pair.forces, found, atol=1e-6)


def test_other_files_are_no_collected_pairs(pairs, tmp_path):
    with pytest.raises(InputError, match="definet collect"):
        read_pairs(tmp_path / "none.h5")
    (tmp_path / "bad.h5").write_bytes(b"no relaxations")
    with pytest.raises(RecordError, match="definet collect"):
        read_pairs(tmp_path / "bad.h5")
    with pytest.raises(InputError, match="force constants"):
        write_pairs(tmp_path / "springs.h5", pairs)


def test_a_run_without_relaxations_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text(f"run: {{name: none, results: {tmp_path}}}")
    with pytest.raises(InputError, match="library and relax"):
        pairs_of_runs([tmp_path / "config.yaml"])


def test_displacements_take_the_nearest_image():
    cell = np.diag([4.0, 5.0, 6.0])
    start = np.array([[0.1, 0.1, 0.1], [2.0, 2.0, 2.0]])
    end = start + np.array([[-0.3, 0.0, 0.0], [0.1, 0.0, 0.0]]) + np.array([[4.0, -5.0, 12.0], [0.0, 0.0, 6.0]])
    moved = net_displacements(start, end, cell, np.array([True, True]))
    assert np.allclose(moved, [[-0.2, 0, 0], [0.2, 0, 0]])


# The published layout.


def layer(formula="MoS2", height=15.0):
    atoms = mx2(formula, a=3.18, thickness=3.13, vacuum=None)
    atoms.cell[2] = [0, 0, height]
    atoms.positions[:, 2] += 5
    atoms.pbc = True
    return atoms


@pytest.fixture
def archive(tmp_path):
    """Two defective layers of one material in the published layout; the second one's height is not the unit cell's."""
    root = tmp_path / "high_density_defects"
    folder = root / "MoS2_500"
    (folder / "CIF").mkdir(parents=True)
    write(root / "MoS2.cif", layer(height=12.0))
    for number, part in enumerate(("train", "val", "test")):
        atoms = layer(height=20.0) * (3, 3, 1)
        atoms.symbols[4] = "Se"
        del atoms[[0, 9]]
        write(folder / "CIF" / f"id{number}_unrelaxed.cif", atoms)
        atoms.positions += np.random.default_rng(number).normal(size=atoms.positions.shape, scale=0.05)
        atoms.wrap()
        write(folder / "CIF" / f"id{number}_relaxed.cif", atoms)
        (folder / f"{part}.csv").write_text(f",atoms_id,energy\n0,id{number},-1\n")
    return tmp_path


def test_published_pairs_have_ghosts_where_atoms_are_missing(archive):
    pairs = published_pairs(archive)
    assert [pair.part for pair in pairs] == ["train", "validation", "test"]
    perfect = layer(height=20.0) * (3, 3, 1)
    for number, pair in enumerate(pairs):
        assert pair.host == "MoS2"
        assert (pair.numbers == 0).sum() == 2
        assert pair.species == {"Se", "X"}
        ghosts = pair.positions[pair.numbers == 0]
        assert np.allclose(np.sort(ghosts, axis=0), np.sort(perfect.positions[[0, 9]], axis=0), atol=1e-3)
        assert sorted(pair.host_numbers) == sorted(perfect.numbers)
        true = np.random.default_rng(number).normal(size=(25, 3), scale=0.05)
        assert np.abs(pair.displacements[pair.atoms] - (true - true.mean(axis=0))).max() < 1e-4
        assert not pair.displacements[~pair.atoms].any()


def test_the_published_division_counts(archive):
    parts = deal(published_pairs(archive), 0.1, 0.1, seed=5)
    assert {name: index.tolist() for name, index in parts.items()} == {"train": [0], "validation": [1], "test": [2]}


def test_an_incomplete_archive_is_refused(archive, tmp_path):
    with pytest.raises(InputError, match="unpack"):
        published_pairs(tmp_path / "elsewhere")
    material = archive / "high_density_defects" / "MoS2_500"
    (material / "CIF" / "id2_relaxed.cif").unlink()
    with pytest.raises(InputError, match="id2_relaxed"):
        published_pairs(archive)
    (material / "val.csv").write_text("name\nid1\n")
    with pytest.raises(InputError, match="atoms_id"):
        published_pairs(archive)


def test_other_relaxed_atoms_are_refused(archive):
    path = archive / "high_density_defects" / "MoS2_500" / "CIF" / "id0_relaxed.cif"
    atoms = read(path)
    write(path, atoms[::-1])
    with pytest.raises(InputError, match="id0"):
        published_pairs(archive)


# Sites.


def test_ghosts_come_after_the_atoms():
    host = bulk("NaCl", "rocksalt", a=5.64, cubic=True) * (2, 1, 1)
    doped = host.copy()
    doped.symbols[3] = "Br"
    del doped[[0]]
    whole, numbers = on_host_sites(doped, host)
    assert whole.numbers.tolist() == [*doped.numbers, 0]
    assert numbers.tolist() == [*host.numbers[1:], host.numbers[0]]
    assert np.allclose(whole.positions[-1], host.positions[0])


def test_other_cells_and_interstitials_are_refused():
    host = bulk("NaCl", "rocksalt", a=5.64, cubic=True)
    with pytest.raises(InputError, match="lattice vectors"):
        on_host_sites(host * (2, 1, 1), host)
    with pytest.raises(InputError, match="interstitials"):
        on_host_sites(host + Atoms("Li", [[1.41, 1.41, 1.41]]), host)


# Division.


def test_no_held_out_host_or_dopant_is_trained_on(pairs):
    parts = deal(pairs, 0.1, 0.2, seed=0)
    assert np.array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(len(pairs)))
    of = {name: [pairs[k] for k in index] for name, index in parts.items()}
    others = {pair.host for name in ("train", "validation", "dopant") for pair in of[name]}
    assert not others & {pair.host for pair in of["host"]}
    trained_on = {(pair.host, symbol) for pair in of["train"] for symbol in pair.species}
    assert of["dopant"]
    for pair in of["dopant"]:
        assert pair.host in {one.host for one in of["train"]}
        assert any((pair.host, symbol) not in trained_on for symbol in pair.species)


def test_the_division_is_reproducible_and_seeded(pairs):
    def told(seed, given):
        return {name: {given[k].id for k in index} for name, index in deal(given, 0.1, 0.2, seed).items()}

    assert told(0, pairs) == told(0, pairs[::-1])
    assert told(0, pairs) != told(1, pairs)


def test_too_few_pairs_are_refused(pairs):
    with pytest.raises(InputError, match="too few"):
        deal(pairs[:1], 0.1, 0.2, seed=0)


# Training.


def test_training_learns_and_transfers(trained, pairs):
    """What was learned from some dopants and hosts holds for others."""
    by_id = {pair.id: pair for pair in pairs}
    for part in ("train", "dopant", "host"):
        some = [by_id[name] for name in trained.parts[part]]
        found = [
            relax_in_one_step(
                trained, Atoms(pair.numbers, pair.positions, cell=pair.cell, pbc=True), pair.host_numbers
            ).positions
            - pair.positions
            for pair in some
        ]
        error = np.mean([coordinate_mae(u, pair) for u, pair in zip(found, some, strict=True)])
        unrelaxed = np.mean([coordinate_mae(np.zeros_like(u), pair) for u, pair in zip(found, some, strict=True)])
        assert error < 0.9 * unrelaxed


def test_training_is_reproducible_and_goes_on_after_a_kill(pairs, trained, tmp_path, monkeypatch):
    saved = []

    def save(path, content):
        original(path, content)
        saved.append(path.name)
        if len(saved) == SMALL.epochs + 3:
            raise KeyboardInterrupt

    original = fit.save
    monkeypatch.setattr(fit, "save", save)
    settings = replace(SMALL, patience=SMALL.epochs)
    with pytest.raises(KeyboardInterrupt):
        train(pairs, settings, tmp_path)
    assert (tmp_path / "last-1.pt").exists()
    again = load_trained(train(pairs, settings, tmp_path))
    assert saved.count("last-0.pt") == saved.count("last-1.pt") == SMALL.epochs
    for model, other in zip(trained.models, again.models, strict=True):
        weights = model.state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in other.state_dict().items())
    assert again.calibration == trained.calibration
    assert not list(tmp_path.glob("last*"))
    with (tmp_path / "history.csv").open() as file:
        assert [int(row["epoch"]) for row in csv.DictReader(file)] == 2 * list(range(1, SMALL.epochs + 1))


def test_answers_of_several_networks_are_averaged(pairs, trained):
    graph = graph_of(pairs[0], trained.models[0].config["cutoff_A"], torch.float32)
    (first, error), (second, other) = (fit.predict_moves([model], graph) for model in trained.models)
    mean, expected = fit.predict_moves(trained.models, graph)
    assert np.abs(first - second).max() > 1e-4
    assert mean == pytest.approx((first + second) / 2, abs=1e-9)
    assert expected == pytest.approx((error + other) / 2)


def test_each_of_several_networks_leaves_dopants_out(pairs, monkeypatch, tmp_path):
    """Every dopant of every host is unknown to one network, whose answer tells what is missed of it."""
    host = Superposition(bulk("NaCl", "rocksalt", a=5.64), 2 * np.eye(3, dtype=int), np.zeros((2, 16, 3, 3)), [])
    pairs = [replace(pair, lattice=host, forces=pair.displacements) for pair in pairs]
    seen, told = [], {}

    def optimise(model, training, *_):
        seen.append({pair.id for pair in training.pairs})
        return {"weights": model.state_dict(), "epoch": 1, "history": []}

    def answer(models, graph):
        return np.full((len(graph.numbers), 3), float(len(models))), np.ones(len(graph.numbers))

    def remember(cls, some, predicted):
        told.update({pair.id: len(found) and found[0, 0] for pair, found in zip(some, predicted, strict=True)})
        return cls()

    monkeypatch.setattr(fit, "_optimise", optimise)
    monkeypatch.setattr(fit, "predict_moves", answer)
    monkeypatch.setattr(fit.Corrections, "fit", classmethod(remember))
    with pytest.raises(InputError, match="lower --members"):
        train([pair for pair in pairs if pair.species <= {"Li", "Rb", "In"}], replace(SMALL, members=5), tmp_path)
    trained = load_trained(train(pairs, replace(SMALL, members=3), tmp_path))
    training = set(trained.parts["train"])
    for name in training:
        assert [name in some for some in seen].count(False) == 1
        assert told[name] == 1
    for host in {name.partition("/")[0] for name in training}:
        assert all(any(name.startswith(host) for name in some) for some in seen)
    train(pairs, replace(SMALL, members=2), tmp_path / "two")
    assert seen[3] == seen[4] == training
    assert set(told.values()) == {2}


def test_training_stops_when_nothing_gets_better(pairs, tmp_path):
    settings = replace(SMALL, scalars=4, vectors=4, members=1, learning_rate=0.0, averaging=0.0, patience=2, epochs=9)
    train(pairs[:12], settings, tmp_path)
    assert len((tmp_path / "history.csv").read_text().splitlines()) == 1 + 3  # the first epoch and two more


def test_damaged_and_missing_checkpoints_are_named(tmp_path):
    with pytest.raises(InputError, match="definet train"):
        load_trained(tmp_path / "none.pt")
    (tmp_path / "bad.pt").write_bytes(b"no checkpoint")
    with pytest.raises(RecordError, match="definet train"):
        load_trained(tmp_path / "bad.pt")
    torch.save({"format": 0}, tmp_path / "old.pt")
    with pytest.raises(RecordError, match="version"):
        load_trained(tmp_path / "old.pt")


# Baselines and evaluation.


def test_radius_scaling_recovers_its_own_law(pairs):
    """Displacements in proportion to the misfit of radii, by a law of distance, are found exactly."""
    first = RadiusScaling(np.linspace(0.1, 0.02, 10), {})
    made = [replace(pair, displacements=first(pair)) for pair in pairs]
    fitted = RadiusScaling.fit(made)
    for pair in made:
        assert coordinate_mae(fitted(pair), pair) < 0.05 * coordinate_mae(np.zeros((len(pair.numbers), 3)), pair)


def test_metrics_are_those_of_the_answers(trained, pairs, tmp_path):
    rows = evaluate(trained, pairs, tmp_path / "metrics.json")
    assert json.loads((tmp_path / "metrics.json").read_text())["rows"] == rows
    by_id = {pair.id: pair for pair in pairs}
    row = next(row for row in rows if (row["split"], row["pairs"], row["defects"]) == ("host", "all", "all"))
    some = [by_id[name] for name in trained.parts["host"]]
    assert row["n"] == len(some)
    unrelaxed = np.mean([np.abs(pair.displacements[pair.atoms]).mean() for pair in some])
    assert row["unrelaxed_mae_A"] == pytest.approx(unrelaxed)
    assert row["superposed_mae_A"] == 0  # of these made-up pairs
    assert row["coordinate_mae_A"] < row["unrelaxed_mae_A"] < row["unrelaxed_mae_within_3A"]
    assert {row["defects"] for row in rows} == {"all", "1", "2-3"}
    assert 0.2 < row["error_ratio"] < 5


def test_what_is_not_known_is_null(trained, pairs, tmp_path):
    unknown = [replace(pair, superposed=None) for pair in pairs]
    rows = evaluate(trained, unknown, tmp_path / "metrics.json")
    assert "superposed" not in {row["pairs"] for row in rows}
    assert {row["superposed_mae_A"] for row in rows} == {None}


def test_other_data_than_training_had_are_refused(trained, pairs, tmp_path):
    with pytest.raises(InputError, match="trained on"):
        evaluate(trained, pairs[1:], tmp_path / "metrics.json")


# Use.


def test_one_step_keeps_the_lattice_the_centre_and_vacancies(trained):
    host = bulk("NaCl", "rocksalt", a=5.64, cubic=True) * (2, 1, 1)
    doped = host.copy()
    doped.numbers[[0, 5]] = 3, 0
    found = relax_in_one_step(trained, doped, host.numbers)
    moved = found.positions - doped.positions
    assert np.array_equal(moved[5], [0, 0, 0])
    assert np.abs(np.delete(moved, 5, axis=0).mean(axis=0)).max() < 1e-8
    assert found.error_A[5] == 0
    assert (np.delete(found.error_A, 5) > 0).all()
    exact = relax_in_one_step(trained, doped, host.numbers, dtype=torch.float64)
    assert np.abs(exact.positions - found.positions).max() < 1e-5


def test_the_network_that_comes_with_the_package_knows_large_from_small():
    """Neighbours leave a larger dopant and approach a smaller one."""
    shipped = load_trained(Path(__file__).parents[2] / "models" / "definet" / "checkpoint.pt")
    host = bulk("MgO", "rocksalt", a=4.21, cubic=True) * (2, 2, 2)
    vectors = host.get_distances(0, range(len(host)), mic=True, vector=True)
    near = np.isclose(np.linalg.norm(vectors, axis=1), 2.105)
    outwards = {}
    for dopant in ("Sr", "Ca", "Be"):
        doped = host.copy()
        doped.symbols[0] = dopant
        found = relax_in_one_step(shipped, doped, host.numbers)
        moved = found.positions - doped.positions
        outwards[dopant] = (moved[near] * vectors[near]).sum(axis=1).mean() / 2.105
        assert 0 < found.error_A.mean() < 0.1
    assert outwards["Sr"] > outwards["Ca"] > 0.02 > -0.02 > outwards["Be"]


def test_molecules_are_refused(trained):
    with pytest.raises(InputError, match="periodic"):
        relax_in_one_step(trained, Atoms("NaCl", [[0, 0, 0], [2, 0, 0]]), np.array([11, 17]))


def test_relaxations_start_where_the_network_says(run, hosts, tmp_path):
    """Without any single defects, to the same minimum as from the host's sites, on record as started from there."""
    settings = load_config(run)
    plans, _ = read_plans(Layout.of(settings).batch("supercells", "batch-00000"))
    store = RecordStore(tmp_path / "records")
    checkpoint = train(pairs_of_runs([run]), replace(SMALL, epochs=2), tmp_path / "network")

    def relaxed(**start):
        values = settings.model_copy(update={"relaxation": settings.relaxation.model_copy(update=start)})
        return relax_batch(hosts[:1], plans, values, store)

    def quality(entry):
        return store.read("relax", entry.host, entry.key).header["quality"]

    cold, warm = relaxed(start="unrelaxed"), relaxed(start="definet", definet=str(checkpoint))
    assert cold[0] == warm[0]
    assert len(cold) > 1
    for before, after in zip(cold[1:], warm[1:], strict=True):
        assert before.key != after.key
        assert "warm" in quality(after)
        assert quality(after)["energy_eV_per_atom"] == pytest.approx(quality(before)["energy_eV_per_atom"], abs=1e-4)
        starts = [store.read("relax", e.host, e.key).arrays["start_positions"] for e in (before, after)]
        np.testing.assert_array_equal(*starts)
    other = train(pairs_of_runs([run]), replace(SMALL, epochs=2, seed=1), tmp_path / "other")
    again = relaxed(start="definet", definet=str(other))
    assert {e.key for e in again[1:]}.isdisjoint({e.key for e in warm[1:]})
    assert relaxed(start="definet", definet=str(checkpoint)) == warm


def test_a_start_by_the_network_leaves_vacancies_out(trained, config):
    host = Superposition(bulk("NaCl", "rocksalt", a=5.64), 2 * np.eye(3, dtype=int), np.zeros((2, 16, 3, 3)), [])
    start = OneStepStart(trained, host, LazyModel(config.potential), "")
    with_vacancy, hessian = start.guess(Plan((0, 4), ("Vac", "K")))
    assert with_vacancy.shape == (15, 3)
    assert hessian.shape == (45, 45)
    without, hessian = start.guess(Plan((0, 4), ("Li", "K")))
    assert without.shape == (16, 3)
    assert hessian.shape == (48, 48)
    # Neighbours of the empty site move otherwise than those of lithium.
    assert np.abs(with_vacancy - without[1:]).max() > 1e-4


def test_a_start_by_a_network_needs_one(run, tmp_path):
    values = json.loads(run.read_text())
    values["relaxation"] |= {"start": "definet"}
    with pytest.raises(InputError, match=r"relaxation: .*relaxation\.definet"):
        parse_config(values, "test")
    values["relaxation"] |= {"definet": str(tmp_path / "lost.pt")}
    with pytest.raises(InputError, match=r"lost\.pt"):
        check_definet(Path(parse_config(values, "test").relaxation.definet))


def test_the_commands_work_together(run, tmp_path):
    def command(*arguments):
        result = CliRunner().invoke(app, ["definet", *map(str, arguments)])
        assert result.exit_code == 0, result.output + str(result.exception)

    with pytest.raises(AssertionError, match="one of --config"):
        command("train", "--output", tmp_path)
    data, checkpoint = ("--config", run), tmp_path / "checkpoint.pt"
    command("collect", *data, "--output", tmp_path / "pairs.h5")
    command("train", *data, "--output", tmp_path, "--scalars", 8, "--vectors", 4, "--layers", 1, "--epochs", 2)
    command("evaluate", checkpoint, "--relaxations", tmp_path / "pairs.h5", "--output", tmp_path / "metrics.json")
    row = json.loads((tmp_path / "metrics.json").read_text())["rows"][0]
    assert (row["split"], row["defects"]) == ("dopant", "all")
    table = tmp_path / "force_calls.csv"
    command("count-forces", checkpoint, *data, "--output", table, "--cells", 1)
    (known,) = tmp_path.glob("force_calls-*.csv")
    name, start, _, converged = known.read_text().splitlines()[1].split(",")
    told = ",".join((name, start, "12345", converged))
    known.write_text("\n".join((known.read_text().splitlines()[0], told, *known.read_text().splitlines()[2:], "")))
    table.unlink()
    command("count-forces", checkpoint, *data, "--output", table, "--cells", 1)
    assert table.read_text().splitlines()[1] == told  # what is known is not computed again
    starts = read_counts(table)
    assert {frozenset(starts[pair]) for pair in starts} >= {frozenset(STARTS[:3])}
    command("evaluate", checkpoint, *data, "--output", tmp_path / "metrics.json", "--force-calls", table)
    rows = json.loads((tmp_path / "metrics.json").read_text())["rows"]
    assert all(row["force_calls_cold"] > 1 for row in rows if "relaxed" in row)
    assert any("relaxed" in row for row in rows)
    pair = pairs_of_runs([run])[0]
    cell = {"positions": pair.positions, "cell": pair.cell, "pbc": True}
    write(tmp_path / "host.xyz", Atoms(pair.host_numbers, **cell))
    doped = Atoms(pair.numbers, **cell)
    write(tmp_path / "doped.xyz", doped)
    command("relax", checkpoint, *(tmp_path / "doped.xyz", "--host", tmp_path / "host.xyz"),
            "--output", tmp_path / "relaxed.xyz")  # fmt: skip
    relaxed = read(tmp_path / "relaxed.xyz")
    assert relaxed.numbers.tolist() == pair.numbers.tolist()
    expected = relax_in_one_step(load_trained(checkpoint), doped, pair.host_numbers)
    assert np.abs(relaxed.positions - expected.positions).max() < 1e-5
