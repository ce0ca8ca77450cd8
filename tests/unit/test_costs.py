import json
from dataclasses import replace

import numpy as np
import pytest
from fakes import rock_salt
from ruamel.yaml import YAML

from defectnet.batches import assign, atoms_of
from defectnet.calibration import Calibration
from defectnet.cli import app
from defectnet.config import load_config, parse_config
from defectnet.costs import (
    KINDS,
    Costs,
    Fit,
    Size,
    Speed,
    loads,
    needed_displacements,
    other_dopants,
    seconds,
    speed_of,
    terms,
)
from defectnet.dopants import Candidate
from defectnet.errors import InputError
from defectnet.hosts.sheet import read_sheet, write_sheet
from defectnet.layout import RECORD_STAGES, Layout
from defectnet.phonons.hessian import ONE_CELL, setup
from defectnet.plan import limits_exceeded, plan
from defectnet.records import read_header
from defectnet.supercells import HostPlan, Plan, apply, expand, expansion_matrix

CURATED = {host.id: host for host in read_sheet("config/hosts/curated.tsv")}


@pytest.fixture(scope="module")
def run(hosts, tmp_path_factory):
    """Two hosts through all stages with the analytic potential: configuration, its file, hosts."""
    folder = tmp_path_factory.mktemp("run")
    write_sheet(folder / "hosts.tsv", hosts[:2])
    values = {
        "run": {"results": str(folder / "results")},
        "hosts": {"sheet": str(folder / "hosts.tsv")},
        "potential": {"name": "analytic"},
        "dopants": {"overrides": {"NaCl": {"Na": ["Li", "K"]}, "KF": {"K": ["Na", "Rb"]}}},
        "supercells": {"atoms_min": 32, "atoms_max": 32, "doped_per_host": 4, "species_max": 2},
        "phonons": {"direct_per_host": 1, "probing_tolerance": 0.99},
        "superposition": {"superposed_per_host": 20, "error_max": 10.0},
    }
    path = folder / "config.yaml"
    with path.open("w") as file:
        YAML(typ="safe").dump(values, file)
    for command in ("dopants", "supercells", "library", "relax", "phonons", "superpose"):
        for host in hosts[:2]:
            app([command, "--config", str(path), "--batch", host.id], standalone_mode=False)
    return load_config(path), path, hosts[:2]


@pytest.fixture(scope="module")
def learned(run):
    config, _, hosts = run
    calibration = Calibration()
    calibration.observe(config, hosts, assign(hosts, config))
    return calibration.costs()


def elsewhere(config, folder):
    """The same run with nothing done."""
    return config.model_copy(update={"run": config.run.model_copy(update={"results": str(folder)})})


# Site symmetries from the International Tables: Td, C3v, Oh, Oh, m and 1.
@pytest.mark.parametrize(
    ("host", "element", "order"),
    [("Si-diamond", "Si", 24), ("GaN-wurtzite", "Ga", 6), ("MgO-rocksalt", "Mg", 48), ("CaSnO3-perovskite", "Ca", 2)],
)
def test_displacements_of_a_defect_follow_its_site_symmetry(host, element, order):
    """6N/|S|, which phonopy's count may undercut by half where opposite displacements are equivalent."""
    row = CURATED[host]
    size = Size.of(row, None, parse_config({}, "test"))
    needed = next(value for symbol, value in size.orbits if symbol == element)
    assert needed == pytest.approx(6 / order)
    primitive = atoms_of(row)
    cell = expand(primitive, expansion_matrix(primitive.cell.array, len(primitive), 40, 64)).atoms
    cell.symbols[list(cell.symbols).index(element)] = "Bi"
    # A cell that breaks the symmetry of the crystal needs more; one with all of it about as many.
    found = len(setup(cell, ONE_CELL, parse_config({}, "test").phonons).displacements)
    assert found > 0.4 * needed * len(cell)


@pytest.mark.parametrize("dopants", [2, 3, 5])
def test_displacements_of_random_arrangements_follow_the_number_of_dopants(dopants):
    settings = parse_config({"dopants": {"n_type": 1, "p_type": 0}}, "test")
    rng, told, found = np.random.default_rng(0), [], []
    for host in ("Si-diamond", "SiC-3C", "MgO-rocksalt", "GaN-wurtzite"):
        primitive = atoms_of(CURATED[host])
        cell = expand(primitive, expansion_matrix(primitive.cell.array, len(primitive), 60, 64)).atoms
        size = replace(Size.of(CURATED[host], None, settings), n_sites=len(cell))
        for _ in range(10):
            sites = np.sort(rng.choice(len(cell) // 2, dopants, replace=False))
            plan = Plan(tuple(sites.tolist()), tuple(rng.choice(["Bi", "Pb", "Tl"], dopants).tolist()))
            found.append(len(setup(apply(plan, cell), ONE_CELL, settings.phonons).displacements) / len(cell))
            told.append(needed_displacements(size, np.array(other_dopants(plan, len(cell)))))
    assert np.mean(told) == pytest.approx(np.mean(found), rel={2: 0.5, 3: 0.25, 5: 0.1}[dopants])


def test_half_of_the_hosts_exceed_the_typical_one():
    fit = Fit(coefficients=(3.0,), spread=0.5, hosts=9)
    np.testing.assert_allclose(fit.above(0.3, np.array([0.0, 0.1, 0.1 * np.exp(0.5)])), [0.0, 0.5, 0.8413], atol=1e-4)


def test_probing_misses_as_often_as_it_did():
    seen = Calibration()
    seen.error = [("a", (0.1,), 0.1), ("b", (0.1,), 0.3), ("c", (0.1,), 0.9)]
    seen.probed = [(0.1, True)] * 3 + [(0.1, False)] * 6
    costs = seen.costs()
    assert costs.error.above(costs.error_probed, np.array(0.1)) == pytest.approx(3.5 / 10)
    seen.probed = [(0.1, False)] * 9
    costs = seen.costs()
    assert costs.error.above(costs.error_probed, np.array(0.1)) == pytest.approx(0.05)


def _cells(host, dopants):
    """A plan of eight supercells of 64 atoms with so many dopants each."""
    candidates = (Candidate("P", "Si", "n", "user", 1.0), Candidate("B", "Si", "p", "user", 1.0))
    plan = Plan(tuple(range(dopants)), ("P", "B", "P", "B", "P", "B")[:dopants])
    return HostPlan(host, np.eye(3, dtype=int), 64, ((0, "Si"),), candidates, (plan,) * 8)


def test_fewer_dopants_take_less_to_correct(learned):
    """Probing fails where dopants are close to each other, and never for a single one."""
    row, told = CURATED["Si-diamond"], {}
    error = Fit(coefficients=(3.0,), spread=1.0, hosts=5)
    learned = learned.model_copy(update={"error": error, "error_probed": 0.3})
    settings = parse_config({"phonons": {"direct_per_host": 2}}, "test")
    for dopants in (1, 2, 6):
        plan = _cells(row.id, dopants)
        told[dopants] = {load.stage: load for load in loads(Size.of(row, plan, settings), plan, settings, learned)}

    def amount(dopants, stage, kind):
        return sum(amount for name, amount in told[dopants][stage].parts if name == kind)

    assert amount(1, "phonons", "direct") < amount(2, "phonons", "direct") < amount(6, "phonons", "direct")


def test_a_fit_of_one_term_is_the_mean_ratio():
    fit = Fit.of([("a", (2.0,), 2.0), ("a", (1.0,), 3.0), ("b", (4.0,), 8.0)])
    assert fit((1.0,)) == pytest.approx((1 + 3 + 2) / 3)
    assert fit.hosts == 2 and fit.spread > 0


def test_a_fit_of_two_terms_finds_both():
    rng = np.random.default_rng(0)
    x = rng.uniform(1, 10, (300, 2))
    fit = Fit.of([(str(i), row, row @ (3.0, 0.5)) for i, row in enumerate(x)], guess=(1.0, 1.0))
    np.testing.assert_allclose(fit.coefficients, (3.0, 0.5), rtol=0.1)
    assert fit.spread < 0.02


def test_what_one_size_cannot_tell_apart_is_shared_as_guessed():
    fit = Fit.of([("a", (10.0, 100.0), 60.0), ("b", (10.0, 100.0), 60.0)], guess=(1.0, 0.2))
    np.testing.assert_allclose(fit.coefficients, (2.0, 0.4))


def test_plan_of_a_run_is_what_it_took(run, learned, tmp_path):
    """Learned from a run and applied to it before anything is done: each stage's time, to what hosts differ by."""
    config, _, hosts = run
    layout = Layout(tmp_path / "nothing")
    planned = {rule.rule: rule for rule in plan(elsewhere(config, layout.results), hosts, layout, learned).rules}
    speed = speed_of(config, learned)
    for stage, rule in zip(RECORD_STAGES, ("library", "relax", "phonons", "superpose"), strict=True):
        records = Layout(run[1].parent / "results").records.glob(f"{stage}/*/*.h5")
        spent = sum(read_header(path)["cost"]["wall_s"] for path in records)
        told = 3600 * planned[rule].hours - 2 * speed.start_s
        assert planned[rule].jobs == 2
        if stage in ("relax", "phonons"):  # the library stage has made some of theirs
            assert 0.3 * spent < told < 3 * spent


def test_finished_run_has_nothing_left(run, learned):
    config, _, hosts = run
    planned = plan(config, hosts, Layout(run[1].parent / "results"), learned)
    assert planned.hosts_done == planned.hosts == 2
    assert {rule.rule: rule.jobs for rule in planned.rules if rule.rule in RECORD_STAGES} == {
        stage: 0 for stage in RECORD_STAGES if stage != "superposed"
    }


def test_costs_survive_their_file(learned, tmp_path):
    learned.write(tmp_path / "costs.json")
    assert Costs.read(tmp_path / "costs.json") == learned


def test_unusable_files_of_costs_are_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.json: no such file; make it with `defectnet costs`"):
        Costs.read(tmp_path / "nowhere.json")
    (tmp_path / "costs.json").write_text('{"work": 1}')
    with pytest.raises(InputError, match="not a file of costs"):
        Costs.read(tmp_path / "costs.json")


def test_unknown_speed_has_to_be_given(learned, run):
    config = run[0]
    mace = parse_config({"potential": {"name": "mace", "model": "medium", "device": "cuda"}}, "test")
    with pytest.raises(InputError, match=r"potential\.atoms_per_second: not known for 'mace medium cuda'"):
        speed_of(mace, learned)
    given = parse_config({"potential": {"name": "mace", "model": "medium", "atoms_per_second": 500}}, "test")
    size = Size.of(run[2][0], None, config)
    fast, slow = (
        seconds(loads(size, None, config, learned)[2], learned, speed_of(given, learned)).mean
        for given in (given, given)
    )
    assert fast == slow > 0


def test_twice_the_speed_halves_the_time_of_all_force_evaluations(learned, run):
    config, _, hosts = run
    size = Size.of(hosts[0], None, config)
    of = [
        sum(
            seconds(load, learned, speed_of(parse_config({"potential": {"atoms_per_second": rate}}, "x"), learned)).mean
            for load in loads(size, None, config, learned)[:3]
        )
        for rate in (1000, 2000)
    ]
    assert of[0] == pytest.approx(2 * of[1])


def test_spectra_of_larger_supercells_take_longer(learned):
    narrow = parse_config({}, "test")
    wide = parse_config({"phonons": {"atoms_min": 320}}, "test")
    amounts = []
    for settings in (narrow, wide):
        size = Size.of(CURATED["Si-diamond"], None, settings)
        loaded = loads(size, None, settings, learned)
        amounts.append([sum(amount for _, amount in load.parts) for load in loaded[:3]])
        amounts[-1].append(dict(loaded[3].parts)["spectra"])
    assert amounts[0][:2] == amounts[1][:2] and amounts[0][2] < amounts[1][2]  # the host is computed once more
    assert 10**2 < amounts[1][3] / amounts[0][3] < 13**3


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("relax_host", "spectra")])
def test_work_grows_with_the_cell(kind, run):
    config, _, hosts = run
    small = Size.of(hosts[0], None, config)
    large = replace(small, n_sites=2 * small.n_sites)
    grown = sum(terms(kind, large, config, 1.0)) / sum(terms(kind, small, config, 1.0))
    assert 2 <= grown <= 4


def test_batches_fill_their_time_and_never_move(monkeypatch, learned, tmp_path):
    learned.write(tmp_path / "config/costs.json")
    monkeypatch.chdir(tmp_path)
    hosts = [replace(rock_salt("x", "Na", "Cl", 5.64), id=f"host-{i}") for i in range(30)]
    settings = parse_config(
        {"hosts": {"per_batch": "auto", "batch_minutes": 30}, "potential": {"atoms_per_second": 100}}, "test"
    )
    batches = assign(hosts, settings)
    size = Size.of(hosts[0], None, settings)
    speed = speed_of(settings, learned)
    longest = max(seconds(load, learned, speed).mean for load in loads(size, None, settings, learned))
    most = int((1800 - speed.start_s) / longest)
    assert most > 1
    assert {len(ids) for ids in list(batches.values())[:-1]} == {most}
    assert [host for ids in batches.values() for host in ids] == [host.id for host in hosts]
    earlier = assign(hosts[:17], settings)
    for name, ids in earlier.items():
        assert batches[name][: len(ids)] == ids
    # A host that takes longer than that has a batch of its own.
    alone = settings.model_copy(update={"hosts": settings.hosts.model_copy(update={"batch_minutes": 0.01})})
    assert [len(ids) for ids in assign(hosts[:3], alone).values()] == [1, 1, 1]


def test_limits_of_a_profile(run, learned, tmp_path):
    config, _, hosts = run
    profile = tmp_path / "profile"
    profile.mkdir()
    slow = elsewhere(config, tmp_path / "nothing")
    slow = slow.model_copy(update={"potential": slow.potential.model_copy(update={"atoms_per_second": 1.0})})
    planned = plan(slow, hosts, Layout(tmp_path / "nothing"), learned)

    def told(runtime, mem_mb):
        with (profile / "config.yaml").open("w") as file:
            resources = {"runtime": runtime, "mem_mb": mem_mb}
            YAML(typ="safe").dump({"retries": 1, "set-resources": {"phonons": resources}}, file)
        return limits_exceeded(planned, profile)

    assert told("100000 * attempt", "100000") == []
    (short,) = told("min(1 * attempt, 1)", 100000)
    assert "phonons" in short and "2 attempts" in short and "lower hosts.per_batch" in short
    (small,) = told(100000, "5 * attempt")
    assert "gets 10 MB; raise mem_mb" in small
    with pytest.raises(InputError, match="'many' is no number"):
        told("many", 1)
    with pytest.raises(InputError, match="name the folder of a Snakemake profile"):
        limits_exceeded(planned, tmp_path / "nowhere")


def test_commands(run, tmp_path, capsys):
    _, path, _ = run
    costs = tmp_path / "costs.json"
    app(["costs", "--config", str(path), "--output", str(costs)], standalone_mode=False)
    app(["plan", "--config", str(path), "--costs", str(costs), "--json"], standalone_mode=False)
    told = json.loads(capsys.readouterr().out)
    assert told["hosts"] == 2 and told["warnings"] == []
    app(["plan", "--config", str(path), "--costs", str(costs)], standalone_mode=False)
    assert "GPU-hours" in capsys.readouterr().out


def test_speed_without_benchmarks_has_a_start(learned):
    (speed,) = learned.speeds.values()
    assert isinstance(speed, Speed) and speed.start_s > 0
