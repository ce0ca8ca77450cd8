"""Host sheets, sources, filters and selection: what they promise, and the crystallography behind it."""

import json
import random
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Lattice, Structure
from typer.testing import CliRunner

from defectnet.elements import PUBLISHED_VOCABULARY
from defectnet.errors import InputError
from defectnet.hosts import crystallography as xtal
from defectnet.hosts import sources
from defectnet.hosts.commands import app
from defectnet.hosts.filters import Criteria, apply_criteria, drop_duplicates, write_rejections
from defectnet.hosts.select import select_hosts
from defectnet.hosts.sheet import COLUMNS, Host, check_hosts, extend_sheet, read_sheet, write_sheet

REPOSITORY = Path(__file__).parents[2]
CURATED = REPOSITORY / "config/hosts/curated.tsv"
PHONONDB = REPOSITORY.parent / "shared/data/hosts/phonondb.optimade.jsonl"

GAAS = Host(
    "GaAs-zincblende", "GaAs", "zincblende", "F-43m", 5.6533, 5.6533, 5.6533, 90.0, 90.0, 90.0,
    "Ga 4a 0 0 0; As 4c 1/4 1/4 1/4", None, 1.42, 2, "curated", "Madelung (2004)",
)  # fmt: skip
SILICON = replace(GAAS, id="Si", formula="Si", spacegroup="Fd-3m:1", a=5.431, b=5.431, c=5.431, sites="Si 8a 0 0 0")
RUTILE = replace(
    GAAS, id="TiO2", formula="TiO2", spacegroup="P4_2/mnm", a=4.5937, b=4.5937, c=2.9587, gap_eV=3.03, n_atoms=6,
    sites="Ti 2a 0 0 0; O 4f 0.3053 0.3053 0",
)  # fmt: skip


def problems_of(call, *args) -> list[str]:
    with pytest.raises(InputError) as caught:
        call(*args)
    return str(caught.value).splitlines()


def sheet_text(*rows: str) -> str:
    return "\n".join(["\t".join(COLUMNS), *rows]) + "\n"


def row(**values) -> str:
    """A sheet line: GaAs with some columns replaced by the given text."""
    good = {column: getattr(GAAS, column) for column in COLUMNS} | values
    return "\t".join("" if good[column] is None else str(good[column]) for column in COLUMNS)


# --- space groups and sites -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spacegroup", "label"),
    [
        ("F-43m", "F-43m"),
        ("225", "Fm-3m"),
        ("P 63/m m c".replace("63", "6_3"), "P6_3/mmc"),
        ("Fd-3m:2", "Fd-3m:2"),
        ("227:1", "Fd-3m:1"),
        ("R-3m:H", "R-3m:H"),
        ("P2_1/c", "P2_1/c:b1"),
        ("14", "P2_1/c:b1"),
        ("P2_1/n", "P2_1/c:b2"),
        ("Pnma", "Pnma"),
        ("Pbnm", "Pbnm:cab"),
    ],
)
def test_spacegroups_resolve_to_the_textbook_setting(spacegroup, label):
    assert xtal.spacegroup_label(xtal.hall_number(spacegroup)) == label


def test_every_setting_has_a_label_that_resolves_to_itself():
    for hall in range(1, 531):
        assert xtal.hall_number(xtal.spacegroup_label(hall)) == hall


@pytest.mark.parametrize(
    ("spacegroup", "words"),
    [
        ("Fd-3m", ["spacegroup", "Fd-3m:1", "Fd-3m:2"]),
        ("166", ["spacegroup", "166:H", "166:R"]),
        ("Fd-3m:3", ["no choice '3'", "Fd-3m:1"]),
        ("Q42", ["'Q42'", "database", "F-43m"]),
    ],
)
def test_doubtful_spacegroups_are_refused_with_the_choices(spacegroup, words):
    (problem,) = problems_of(xtal.hall_number, spacegroup)
    assert all(word in problem for word in words)


def test_sites_survive_text():
    sites = xtal.parse_sites("Ga 4a 0 0 0; As 4c 1/4 0.25 -1/3 ; O 8d .1234567 2/3 0")
    assert sites[1].position == (0.25, 0.25, -1 / 3)
    again = xtal.parse_sites(xtal.format_sites(sites))
    for one, other in zip(sites, again, strict=True):
        assert (one.element, one.multiplicity, one.letter) == (other.element, other.multiplicity, other.letter)
        assert np.allclose(np.subtract(one.position, other.position) % 1, 0, atol=1e-7)


def test_decimals_near_a_special_position_count_as_special():
    """0.3333 has to give the 2-fold position of wurtzite, and the exact third."""
    cell = xtal.conventional_cell("P6_3mc", (3.19, 3.19, 5.19, 90, 90, 120), "Ga 2b 0.3333 0.6667 0; N 2b 1/3 2/3 3/8")
    assert len(cell.symbols) == 4
    assert np.allclose(sorted(cell.positions[:2, 0]), [1 / 3, 2 / 3], atol=1e-9)


# --- cells ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "atom", "neighbours", "bond_A"),
    [
        (SILICON, "Si", 4, 5.431 * np.sqrt(3) / 4),
        (GAAS, "Ga", 4, 5.6533 * np.sqrt(3) / 4),
        (RUTILE, "Ti", 6, 1.95),
    ],
    ids=lambda value: value.id if isinstance(value, Host) else None,
)
def test_build_gives_the_known_coordination(host, atom, neighbours, bond_A):
    structure = host.build()
    assert len(structure) == host.n_atoms
    center = next(site for site in structure if site.specie.symbol == atom)
    near = structure.get_neighbors(center, 1.25 * bond_A)
    assert len(near) == neighbours
    assert np.mean([site.nn_distance for site in near]) == pytest.approx(bond_A, rel=0.01)


def test_origin_choices_of_one_crystal_agree():
    second = replace(SILICON, spacegroup="Fd-3m:2", sites="Si 8a 1/8 1/8 1/8")
    assert StructureMatcher(scale=False).fit(SILICON.build(), second.build())


def test_rhombohedral_and_hexagonal_axes_agree():
    hexagonal = replace(
        GAAS, id="Sb2Te3", formula="Sb2Te3", spacegroup="R-3m:H", a=4.264, b=4.264, c=30.458, gamma=120.0, n_atoms=5,
        sites="Sb 6c 0 0 0.3988; Te 3a 0 0 0; Te 6c 0 0 0.2128",
    )  # fmt: skip
    edge = np.sqrt(4.264**2 / 3 + 30.458**2 / 9)
    angle = np.degrees(2 * np.arcsin(4.264 / 2 / edge))
    rhombohedral = replace(
        hexagonal, spacegroup="R-3m:R", a=edge, b=edge, c=edge, alpha=angle, beta=angle, gamma=angle,
        sites="Sb 2c 0.3988 0.3988 0.3988; Te 1a 0 0 0; Te 2c 0.2128 0.2128 0.2128",
    )  # fmt: skip
    assert len(rhombohedral.build()) == 5
    assert StructureMatcher(scale=False).fit(hexagonal.build(), rhombohedral.build())


def test_build_is_deterministic():
    one, other = RUTILE.build(), RUTILE.build()
    assert np.array_equal(one.lattice.matrix, other.lattice.matrix)
    assert np.array_equal(one.frac_coords, other.frac_coords)
    assert one.species == other.species


@pytest.mark.parametrize("supercell", [1, [[1, 1, 0], [0, 1, 0], [0, 0, 2]]], ids=["primitive", "redundant cell"])
def test_description_rebuilds_rotated_and_shifted_crystals(supercell):
    structure = RUTILE.build() * supercell
    structure.translate_sites(range(len(structure)), [0.123, 0.456, 0.789])
    rotation, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))
    turned = Structure(Lattice(structure.lattice.matrix @ rotation), structure.species, structure.frac_coords)
    words = xtal.describe(turned)
    assert (words.spacegroup, words.n_atoms) == ("P4_2/mnm", 6)
    cell = xtal.conventional_cell(words.spacegroup, words.parameters, words.sites)
    assert xtal.symmetry_problems(cell, words.n_atoms) == []
    assert StructureMatcher(scale=False).fit(xtal.primitive_cell(cell.lattice, cell.positions, cell.symbols), turned)


def test_crystals_without_symmetry_round_trip():
    rng = np.random.default_rng(2)
    structure = Structure(Lattice.from_parameters(5, 6, 7, 80, 95, 105), ["Si", "O", "O"], rng.random((3, 3)))
    words = xtal.describe(structure)
    assert words.spacegroup == "P1"
    cell = xtal.conventional_cell(words.spacegroup, words.parameters, words.sites)
    assert StructureMatcher(scale=False).fit(xtal.primitive_cell(cell.lattice, cell.positions, cell.symbols), structure)


@pytest.mark.skipif(not PHONONDB.exists(), reason="the phonondb hosts are not in ../shared/data")
def test_real_crystals_survive_the_inline_form(tmp_path):
    """150 phonondb entries: sheet text -> build() matches the structure in the file, without scaling."""
    lines = PHONONDB.read_text().splitlines()[::16][:150]
    sample = tmp_path / "sample.jsonl"
    sample.write_text("\n".join(lines))
    found = sources.optimade_file(sample)
    assert len(found.hosts) == len(lines) == 150
    write_sheet(tmp_path / "sheet.tsv", found.hosts)
    hosts = read_sheet(tmp_path / "sheet.tsv")
    check_hosts(hosts, tmp_path / "sheet.tsv", PUBLISHED_VOCABULARY)
    matcher = StructureMatcher(scale=False, ltol=0.01, stol=0.02, angle_tol=0.5)
    for line, host in zip(lines, hosts, strict=True):
        entry = json.loads(line)["attributes"]
        original = Structure(
            entry["lattice_vectors"], entry["species_at_sites"], entry["cartesian_site_positions"],
            coords_are_cartesian=True,
        )  # fmt: skip
        assert matcher.fit(original, host.build()), host.id
        assert xtal.spacegroup_number(host.spacegroup) == original.get_space_group_info(xtal.SYMPREC_A)[1]


# --- the sheet --------------------------------------------------------------------------------------------------------


def test_sheet_round_trip(tmp_path):
    (tmp_path / "crystals").mkdir()
    GAAS.build().to(filename=str(tmp_path / "crystals/POSCAR"), fmt="poscar")
    in_file = Host("in-file", "GaAs", structure=tmp_path / "crystals/POSCAR", n_atoms=2, source="directory")
    path = tmp_path / "sheets/hosts.tsv"
    write_sheet(path, [GAAS, in_file])
    hosts = read_sheet(path)
    assert hosts[0] == GAAS
    assert "../crystals/POSCAR" in path.read_text()
    check_hosts(hosts, path, PUBLISHED_VOCABULARY)
    assert StructureMatcher(scale=False).fit(hosts[1].build(), GAAS.build())
    assert [file.name for file in path.parent.iterdir()] == ["hosts.tsv"]


def test_comments_and_blank_lines_are_skipped_but_counted(tmp_path):
    path = tmp_path / "hosts.tsv"
    path.write_text("# cells in Å\n" + sheet_text("# GaAs", "", row()))
    (host,) = read_sheet(path)
    assert (host, host.line) == (GAAS, 5)


def test_extending_keeps_old_text(tmp_path):
    path = tmp_path / "hosts.tsv"
    path.write_text("# mine\n" + sheet_text(row(), "# end"))
    before = path.read_text()
    extend_sheet(path, [RUTILE])
    assert path.read_text().startswith(before)
    assert [host.id for host in read_sheet(path)] == ["GaAs-zincblende", "TiO2"]


def test_reading_is_light(tmp_path):
    """Workflows read the sheet whenever their DAG is parsed."""
    import subprocess
    import sys
    import time

    path = tmp_path / "hosts.tsv"
    write_sheet(path, [replace(GAAS, id=f"h{i}") for i in range(2000)])
    start = time.perf_counter()
    assert len(read_sheet(path)) == 2000
    assert time.perf_counter() - start < 0.5  # measured 0.02 s; room for a busy machine
    code = "import sys, defectnet.hosts.sheet; print([m for m in ('pymatgen', 'spglib', 'ase') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([row(a="5.6x")], ":2: GaAs-zincblende: a: '5.6x' is not a number"),
        ([row(a="nan")], ":2: GaAs-zincblende: a: 'nan' is not a number"),
        ([row(n_atoms="2.5")], ":2: GaAs-zincblende: n_atoms: '2.5' is not an integer"),
        ([row(sites="")], ":2: GaAs-zincblende: sites: is empty; give"),
        ([row(source="web")], ":2: GaAs-zincblende: source: 'web' is unknown; write one of curated"),
        ([row(structure="x.cif")], ":2: GaAs-zincblende: a: must be empty when a structure file is given"),
        ([row(id="Ga As")], ":2: Ga As: id: is no file name; use"),
        ([row(id=".hidden")], ":2: .hidden: id: is no file name; use"),
        ([row(), "", row()], ":4: GaAs-zincblende: id: already used on line 2; rename"),
        ([row() + "\textra"], ":2: GaAs-zincblende: columns: 17 values for 16 columns; separate"),
    ],
)
def test_malformed_rows_name_line_host_field_and_remedy(tmp_path, lines, message):
    path = tmp_path / "hosts.tsv"
    path.write_text(sheet_text(*lines))
    assert any(problem.startswith(f"{path}{message}") for problem in problems_of(read_sheet, path))


@pytest.mark.parametrize("text", ["", "# only a comment\n", "id\tformula\n"])
def test_a_wrong_header_is_one_clear_message(tmp_path, text):
    path = tmp_path / "hosts.tsv"
    path.write_text(text)
    (problem,) = problems_of(read_sheet, path)
    assert "header: must be these columns, separated by tabs: id formula" in problem


def test_missing_sheet_says_how_to_make_one(tmp_path):
    assert "defectnet hosts select" in problems_of(read_sheet, tmp_path / "none.tsv")[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spacegroup": "Fd-3m"}, "spacegroup: 'Fd-3m' does not say which setting; write one of Fd-3m:1, Fd-3m:2"),
        ({"sites": "Ga 4a 0 0 0; As 4c 0.24 0.24 0.24"}, "sites: As 4c at 0.24 0.24 0.24 has 16 equivalent positions"),
        ({"sites": "Ga 4b 0 0 0; As 4c 1/4 1/4 1/4"}, "sites: Ga 4b lies on 4a; write that letter"),
        ({"sites": "Ga 4a 0 0 0; As 4a 0 1/2 1/2"}, "sites: As 4a at 0 1/2 1/2 is already taken by Ga 4a; remove"),
        ({"sites": "Ga 4a 0 0; As 4c 1/4 1/4 1/4"}, "sites: 'Ga 4a 0 0' is not a site; write"),
        ({"sites": "Ga 4a 0 0 0; As 4c 1/4 1/4 1/x"}, "sites: '1/4 1/4 1/x' in 'As 4c 1/4 1/4 1/x' are not"),
        ({"sites": "Ga 4a 0 0 0; Qx 4c 1/4 1/4 1/4"}, "sites: 'Qx 4c 1/4 1/4 1/4' is not a site; write"),
        ({"c": 5.7}, "a..gamma: the cell does not have the symmetry of F-43m (cubic); it needs a = b = c"),
        ({"alpha": 190.0}, "a..gamma: these lengths and angles span no cell; give"),
        ({"sites": "Si 4a 0 0 0; Si 4c 1/4 1/4 1/4", "formula": "Si"}, "spacegroup: the sites have the symmetry Fd-3m"),
        ({"formula": "GaP"}, "formula: GaP but the crystal is GaAs; correct"),
        ({"formula": "gallium"}, "formula: 'gallium' is not a chemical formula; write GaAs"),
        ({"n_atoms": 8}, "n_atoms: 8 but the primitive cell has 2; write 2"),
        ({"sites": "Ga 4a 0 0 0; Bi 4c 1/4 1/4 1/4", "formula": "GaBi"}, "sites: Bi not in the vocabulary; remove"),
        ({"a": 2.0, "b": 2.0, "c": 2.0}, "sites: Ga-As are 0.87 Å apart, below 1.45 Å (covalent radii); correct"),
        ({"a": 56.5, "b": 56.5, "c": 56.5}, "a..gamma: no two atoms are within 6 Å; give the cell in Å"),
    ],
)  # fmt: skip
def test_wrong_crystals_name_line_host_field_and_remedy(changes, message):
    host = replace(GAAS, line=7, **changes)
    problems = problems_of(check_hosts, [host], "hosts.tsv", PUBLISHED_VOCABULARY)
    assert any(problem.startswith(f"hosts.tsv:7: GaAs-zincblende: {message}") for problem in problems), problems


def test_check_reports_everything_at_once(tmp_path):
    damaged = tmp_path / "damaged.cif"
    damaged.write_text("data_nothing\n")
    hosts = [
        replace(GAAS, line=2, n_atoms=8, formula="GaP"),
        replace(GAAS, line=3),
        Host("lost", "Si", structure=tmp_path / "lost.cif", n_atoms=2, source="directory", line=4),
        Host("damaged", "Si", structure=damaged, n_atoms=2, source="directory", line=5),
        replace(RUTILE, line=6),
    ]
    text = "\n".join(problems_of(check_hosts, hosts, "hosts.tsv", PUBLISHED_VOCABULARY))
    assert "hosts.tsv:2: GaAs-zincblende: n_atoms" in text
    assert "hosts.tsv:2: GaAs-zincblende: formula" in text
    assert "hosts.tsv:3: GaAs-zincblende: id: already used on line 2" in text
    assert f"hosts.tsv:4: lost: structure: {tmp_path / 'lost.cif'} does not exist" in text
    assert "hosts.tsv:5: damaged: structure:" in text
    assert ":6:" not in text


# --- sources ----------------------------------------------------------------------------------------------------------


def test_directory_reads_every_format_and_reports_the_rest(tmp_path):
    (tmp_path / "sub").mkdir()
    GAAS.build().to(filename=str(tmp_path / "GaAs.cif"), fmt="cif")
    RUTILE.build().to(filename=str(tmp_path / "sub/POSCAR"), fmt="poscar")
    SILICON.build().to(filename=str(tmp_path / "Si 2.vasp"), fmt="poscar")
    GAAS.build().to_ase_atoms().write(tmp_path / "sub/gaas.extxyz")
    (tmp_path / "broken.cif").write_text("not a crystal")
    (tmp_path / "CONTCAR-old").write_text("no symbols\n1.0\n3 0 0\n0 3 0\n0 0 3\n1\nDirect\n0 0 0\n")
    (tmp_path / "molecule.extxyz").write_text("2\n\nH 0 0 0\nH 0 0 0.74\n")
    alloy = Structure(Lattice.cubic(4.0), [{"Si": 0.5, "Ge": 0.5}], [[0, 0, 0]])
    alloy.to(filename=str(tmp_path / "alloy.cif"), fmt="cif")
    (tmp_path / "notes.txt").write_text("ignored")
    found = sources.directory(tmp_path)
    assert {host.id: (host.formula, host.n_atoms) for host in found.hosts} == {
        "GaAs": ("GaAs", 2),
        "Si_2": ("Si", 2),
        "sub-POSCAR": ("TiO2", 6),
        "sub-gaas": ("GaAs", 2),
    }
    assert all(host.sites and host.structure is None and host.source == "directory" for host in found.hosts)
    check_hosts(found.hosts, "sheet", PUBLISHED_VOCABULARY)
    reasons = {rejection.id: rejection.reason for rejection in found.rejected}
    assert set(reasons) == {"broken", "CONTCAR-old", "molecule", "alloy"}
    assert "cannot be read" in reasons["broken"] and "cannot be read" in reasons["CONTCAR-old"]
    assert "not periodic" in reasons["molecule"]
    assert "partial occupancy" in reasons["alloy"]


def test_large_cells_without_symmetry_stay_in_their_file(tmp_path):
    glass = SILICON.build() * (3, 3, 3)
    glass.perturb(0.1)
    glass.to(filename=str(tmp_path / "glass.cif"), fmt="cif")
    (host,) = sources.directory(tmp_path).hosts
    assert (host.structure, host.spacegroup, host.n_atoms) == (tmp_path / "glass.cif", None, 54)
    write_sheet(tmp_path / "hosts.tsv", [host])
    (again,) = read_sheet(tmp_path / "hosts.tsv")
    check_hosts([again], "hosts.tsv", PUBLISHED_VOCABULARY)
    assert StructureMatcher(primitive_cell=False, scale=False).fit(again.build(), glass)


def test_an_empty_directory_is_an_error(tmp_path):
    assert "*.cif" in problems_of(sources.directory, tmp_path)[0]


def optimade_entry(host: Host, **attributes) -> dict:
    structure = host.build()
    symbols = [site.specie.symbol for site in structure]
    given = {
        "chemical_formula_reduced": host.formula,
        "dimension_types": [1, 1, 1],
        "lattice_vectors": structure.lattice.matrix.tolist(),
        "cartesian_site_positions": structure.cart_coords.tolist(),
        "species_at_sites": symbols,
        "species": [{"name": s, "chemical_symbols": [s], "concentration": [1.0]} for s in sorted(set(symbols))],
    }
    return {"id": host.id, "type": "structures", "attributes": given | attributes}


def test_optimade_entries_become_hosts_or_reasons(tmp_path):
    half = [
        {"name": "Ga", "chemical_symbols": ["Ga", "vacancy"], "concentration": [0.5, 0.5]},
        {"name": "As", "chemical_symbols": ["As"], "concentration": [1.0]},
    ]
    entries = [
        {"x-optimade": {"meta": {"api_version": "1.1"}}},
        {"id": "info", "type": "info", "attributes": {}},
        optimade_entry(GAAS, _db_hse_gaps_ev=[1.2, 1.5, 9.0], _db_gap_oqmd_ev=0.2),
        optimade_entry(RUTILE, _db_hse_gaps_ev=None, _db_gap_oqmd_ev=1.8),
        optimade_entry(replace(GAAS, id="half"), species=half),
        optimade_entry(replace(GAAS, id="slab"), dimension_types=[1, 1, 0]),
        {"id": "empty", "type": "structures", "attributes": {}},
        {"id": "a/b c", "type": "structures", "attributes": optimade_entry(SILICON)["attributes"]},
    ]
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(map(json.dumps, entries)) + "\n{broken\n")
    found = sources.optimade_file(path)
    assert [(host.id, host.formula, host.gap_eV) for host in found.hosts] == [
        ("GaAs-zincblende", "GaAs", 1.5),
        ("TiO2", "TiO2", 1.8),
        ("a_b_c", "Si", None),
    ]
    assert {r.id: r.rule for r in found.rejected} == {
        "half": "disorder",
        "slab": "dimensions",
        "empty": "unreadable",
        "some.jsonl:9": "unreadable",
    }
    assert all(r.reason.startswith("some.jsonl:") for r in found.rejected)
    assert sources.optimade_file(path, ["_db_gap_oqmd_ev"]).hosts[0].gap_eV == 0.2


# --- the SNUMAT archive -----------------------------------------------------------------------------------------------


def snumat_entry(host: Host, icsd: int, first_line: str = "", **keys) -> dict:
    """An entry as the archive of Kim et al. (2020) has it; the first line of its POSCAR is whatever was there."""
    lines = host.build().to(fmt="poscar").splitlines()
    return {
        "Band_gap_GGA": 0.7 * host.gap_eV,
        "Band_gap_GGA_optical": 0.8 * host.gap_eV,
        "Band_gap_HSE": host.gap_eV,
        "Band_gap_HSE_optical": 1.1 * host.gap_eV,
        "Direct_or_indirect": "Direct",
        "Direct_or_indirect_HSE": "Direct",
        "ICSD_number": icsd,
        "Magnetic_ordering": "NM",
        "SNUMAT_id": f"SM-{icsd}",
        "SOC": False,
        "Space_group_rlx": 216,
        "Structure_rlx": "\n".join([first_line, *lines[1:]]) + "\n",
    } | keys


def write_archive(path: Path, files: dict[str, dict | str]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize("first_line", ["", "   ", "Ga As 1.0", "3", "{'system': ["])
def test_snumat_entries_are_read_whatever_their_first_line(tmp_path, first_line):
    archive = write_archive(tmp_path / "a.zip", {"x/GaAs_41674.json": snumat_entry(GAAS, 41674, first_line)})
    (host,) = sources.snumat(archive).hosts
    assert (host.id, host.formula, host.gap_eV, host.n_atoms) == ("GaAs_41674", "GaAs", 1.42, 2)
    assert (host.source, host.reference) == ("snumat", "ICSD 41674, SNUMAT SM-41674, Kim et al. (2020)")
    check_hosts([host], "sheet", PUBLISHED_VOCABULARY)
    assert StructureMatcher(scale=False).fit(host.build(), GAAS.build())


def test_whatever_an_archive_holds_is_a_host_or_a_reason(tmp_path):
    alloy = {"Structure_rlx": "\n1.0\n4 0 0\n0 4 0\n0 0 4\n1\nDirect\n0 0 0\n"}
    files = {
        "db/GaAs_1.json": snumat_entry(GAAS, 1),
        "db/GaAs_1 copy.json": snumat_entry(GAAS, 1),
        "db/TiO2_2.json": snumat_entry(RUTILE, 2),
        "db/Si_3.json": "{broken",
        "db/Si_4.json": "[1, 2]",
        "db/Si_5.json": {"ICSD_number": 5},
        "db/Si_6.json": snumat_entry(SILICON, 6, **alloy),
        "db/README.txt": "text",
        "__MACOSX/db/._GaAs_1.json": "resource fork",
    }
    found = sources.snumat(write_archive(tmp_path / "a.zip", files))
    assert sorted(ids(found.hosts)) == ["GaAs_1_copy", "TiO2_2"]
    assert {r.id: r.rule for r in found.rejected} == {
        "GaAs_1": "duplicate",
        "Si_3": "unreadable",
        "Si_4": "unreadable",
        "Si_5": "unreadable",
        "Si_6": "unreadable",
    }
    assert all(r.reason.startswith("db/") for r in found.rejected)
    assert "same ICSD number as db/GaAs_1 copy.json" in found.rejected[0].reason


def test_one_damaged_member_leaves_the_others(tmp_path):
    path = write_archive(
        tmp_path / "a.zip", {"GaAs_1.json": snumat_entry(GAAS, 1), "TiO2_2.json": snumat_entry(RUTILE, 2)}
    )
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("GaAs_1.json")
    data = bytearray(path.read_bytes())
    middle = member.header_offset + 30 + len(member.filename) + member.compress_size // 2
    data[middle : middle + 8] = bytes(8)
    path.write_bytes(data)
    found = sources.snumat(path)
    assert ids(found.hosts) == ["TiO2_2"]
    assert [(r.id, r.rule) for r in found.rejected] == [("GaAs_1", "unreadable")]
    assert "damaged in the archive" in found.rejected[0].reason


@pytest.mark.parametrize(
    ("gaps", "fields", "gap_eV"),
    [
        ({"Band_gap_HSE": 1.5, "Band_gap_HSE_optical": 1.9, "Band_gap_GGA": 0.9}, None, 1.5),
        ({"Band_gap_HSE": "1.5"}, None, 1.5),
        ({"Band_gap_HSE06": 1.5}, None, 1.5),
        ({"HSE_band_gap": 1.5}, None, 1.5),
        ({"Band_gap_HSE": None, "Band_gap_HSE_optical": 1.9, "Band_gap_GGA": 0.9}, None, None),
        ({"Band_gap_HSE": "na", "Band_gap_GGA": 0.9}, None, None),
        ({"Band_gap_HSE": float("nan")}, None, None),
        ({"Band_gap_HSE": None, "Band_gap_GGA": 0.9}, ["Band_gap_HSE", "Band_gap_GGA"], 0.9),
    ],
)
def test_gaps_are_those_of_the_hybrid_functional_unless_others_are_wanted(tmp_path, gaps, fields, gap_eV):
    entry = {key: value for key, value in snumat_entry(GAAS, 1).items() if not key.startswith("Band")} | gaps
    archive = write_archive(tmp_path / "a.zip", {"GaAs_1.json": entry})
    (host,) = sources.snumat(archive, *([fields] if fields else [])).hosts
    assert host.gap_eV == gap_eV


@pytest.mark.parametrize("content", [None, b"not a zip", b""], ids=["missing", "no zip", "empty"])
def test_a_wrong_archive_is_an_error(tmp_path, content):
    path = tmp_path / "a.zip"
    if content is not None:
        path.write_bytes(content)
    assert "--path:" in problems_of(sources.snumat, path)[0]


def test_an_archive_of_something_else_is_an_error(tmp_path):
    assert "Formula_ICSD.json" in problems_of(sources.snumat, write_archive(tmp_path / "a.zip", {"x.txt": "x"}))[0]


def test_hosts_are_drawn_from_an_archive(tmp_path):
    """Polymorph, duplicate crystal under another ICSD number, gap below the limit: two hosts of four can be drawn."""
    rocksalt = replace(GAAS, spacegroup="Fm-3m", a=5.3, b=5.3, c=5.3, sites="Ga 4a 0 0 0; As 4b 1/2 1/2 1/2")
    files = {
        "GaAs_1.json": snumat_entry(GAAS, 1),
        "GaAs_2.json": snumat_entry(GAAS, 2),
        "GaAs_3.json": snumat_entry(rocksalt, 3, Band_gap_HSE=0.0),
        "TiO2_4.json": snumat_entry(RUTILE, 4),
    }
    archive, output = write_archive(tmp_path / "a.zip", files), tmp_path / "hosts.tsv"
    arguments = ["--source", "snumat", "--path", archive, "--require-gap", "--gap-min", 0.1]
    out = run("select", *arguments, "--n", 2, "--output", output)
    assert "1 rejected: duplicate" in out and "1 rejected: gap" in out
    assert ids(read_sheet(output)) == ["GaAs_1", "TiO2_4"]
    assert "all sound" in run("check", output)


# --- filters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "criteria", "rule"),
    [
        ({}, {}, None),
        ({"formula": "Si"}, {}, "elements"),
        ({"formula": "Si"}, {"elemental": True}, None),
        ({"formula": "CaMgC2O6"}, {"elements_max": 3}, "elements"),
        ({"formula": "GaBi"}, {}, "vocabulary"),
        ({"formula": "XeF2"}, {}, "vocabulary"),
        ({"formula": "GaBi"}, {"vocabulary": ("Ga", "Bi")}, None),
        ({"formula": "?"}, {}, "formula"),
        ({"n_atoms": 25}, {}, None),
        ({"n_atoms": 26}, {}, "atoms"),
        ({"gap_eV": 0.05}, {"gap_min_eV": 0.1}, "gap"),
        ({"gap_eV": 9.0}, {"gap_max_eV": 6.0}, "gap"),
        ({"gap_eV": None}, {"gap_min_eV": 0.1, "gap_max_eV": 6.0}, None),
        ({"gap_eV": None}, {"require_gap": True}, "gap"),
    ],
)
def test_criteria(changes, criteria, rule):
    kept, rejected = apply_criteria([replace(GAAS, **changes)], Criteria(**criteria))
    assert len(kept) + len(rejected) == 1
    assert [r.rule for r in rejected] == ([] if rule is None else [rule])


def test_impossible_criteria_are_refused():
    assert "swap" in problems_of(lambda: Criteria(elements_min=4, elements_max=2))[0]
    assert "swap" in problems_of(lambda: Criteria(gap_min_eV=4, gap_max_eV=2))[0]


def test_duplicates_are_told_from_polymorphs():
    shifted = replace(GAAS, id="shifted", gap_eV=None, sites="As 4a 0 0 0; Ga 4c 1/4 1/4 1/4", a=5.7, b=5.7, c=5.7)
    rocksalt = replace(GAAS, id="B1", spacegroup="Fm-3m", a=5.3, b=5.3, c=5.3, sites="Ga 4a 0 0 0; As 4b 1/2 1/2 1/2")
    hosts = [shifted, GAAS, rocksalt, RUTILE, replace(GAAS, id="A-first-but-no-gap", gap_eV=None)]
    expected = {"GaAs-zincblende", "B1", "TiO2"}
    for seed in range(4):
        random.Random(seed).shuffle(hosts)
        kept, rejected = drop_duplicates(hosts)
        assert {host.id for host in kept} == expected
        assert {r.reason for r in rejected} == {"same crystal as GaAs-zincblende"}


def test_existing_hosts_win_over_new_ones():
    kept, rejected = drop_duplicates([GAAS, RUTILE, replace(SILICON, id="mine")], [replace(GAAS, id="mine")])
    assert [host.id for host in kept] == ["TiO2"]
    assert {r.id: r.rule for r in rejected} == {"GaAs-zincblende": "duplicate", "mine": "id"}


def test_unbuildable_candidates_are_rejected_not_fatal():
    kept, rejected = drop_duplicates([replace(GAAS, spacegroup="Fd-3m"), RUTILE])
    assert [host.id for host in kept] == ["TiO2"]
    assert rejected[0].rule == "unreadable" and "Fd-3m:1" in rejected[0].reason


def test_rejection_table_is_sorted(tmp_path):
    _, rejected = apply_criteria([replace(SILICON, id=i) for i in "cab"], Criteria())
    write_rejections(tmp_path / "rejected.tsv", rejected)
    lines = (tmp_path / "rejected.tsv").read_text().splitlines()
    assert lines[0] == "id\tformula\trule\treason"
    assert [line.split("\t")[0] for line in lines[1:]] == ["a", "b", "c"]


# --- selection --------------------------------------------------------------------------------------------------------

POOL = [replace(GAAS, id=f"mp-{i}") for i in range(200)]


def ids(hosts) -> list[str]:
    return [host.id for host in hosts]


def test_selection_ignores_input_order_and_follows_the_seed():
    shuffled = random.Random(0).sample(POOL, len(POOL))
    assert select_hosts(POOL, 50, seed=1) == select_hosts(shuffled, 50, seed=1)
    assert select_hosts(POOL, 50, seed=1) != select_hosts(POOL, 50, seed=2)


def test_larger_selections_contain_smaller_ones():
    small, large = select_hosts(POOL, 50, seed=1), select_hosts(POOL, 120, seed=1)
    assert set(ids(small)) < set(ids(large))
    added = select_hosts(POOL, 120, seed=1, existing=small)
    assert sorted(ids(small) + ids(added)) == ids(large)


def test_every_candidate_is_equally_likely():
    """Of 200 candidates, 50 are taken: over 400 seeds each one 100 ± 8.7 times."""
    counts = dict.fromkeys(ids(POOL), 0)
    for seed in range(400):
        for host_id in ids(select_hosts(POOL, 50, seed)):
            counts[host_id] += 1
    assert np.std(list(counts.values())) == pytest.approx(np.sqrt(400 * 0.25 * 0.75), rel=0.25)


def test_too_few_candidates_is_an_error():
    assert "only 200 are available; lower --n" in problems_of(select_hosts, POOL, 201, 1)[0]
    assert len(select_hosts(POOL, None, 1)) == 200


# --- commands ---------------------------------------------------------------------------------------------------------


def run(*arguments) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_select_check_show(tmp_path):
    source, output, rejected = tmp_path / "source.tsv", tmp_path / "hosts.tsv", tmp_path / "rejected.tsv"
    write_sheet(source, [RUTILE, SILICON, GAAS, replace(GAAS, id="again")])
    out = run("select", "--path", source, "--output", output, "--rejected", rejected)
    assert "4 candidates" in out and "1 rejected: duplicate" in out and "1 rejected: elements" in out
    assert ids(read_sheet(output)) == ["GaAs-zincblende", "TiO2"]
    assert len(rejected.read_text().splitlines()) == 3
    out = run("select", "--path", source, "--elemental", "--extend", output, "--n", 3)
    assert "3 hosts, 1 of them new" in out
    assert ids(read_sheet(output)) == ["GaAs-zincblende", "TiO2", "Si"]
    assert "all sound" in run("check", output)
    assert "P4_2/mnm" in run("show", output) and "3 hosts" in run("show", output)
    assert "O 4f 0.3053 0.3053 0" in run("show", output, "TiO2")


def test_selection_is_reproducible_from_the_command_line(tmp_path):
    for name in ("one.tsv", "two.tsv"):
        run("select", "--path", CURATED, "--n", 5, "--seed", 3, "--max-atoms", 2, "--output", tmp_path / name)
    assert (tmp_path / "one.tsv").read_bytes() == (tmp_path / "two.tsv").read_bytes()


def test_the_configuration_sets_the_vocabulary(tmp_path):
    sheet, config = tmp_path / "hosts.tsv", tmp_path / "config.yaml"
    write_sheet(sheet, [GAAS, RUTILE])
    config.write_text("hosts: {vocabulary: [Ga, As]}\n")
    out = run("select", "--path", sheet, "--config", config, "--output", tmp_path / "kept.tsv")
    assert "1 rejected: vocabulary (such as TiO2: O, Ti not in the vocabulary)" in out
    result = CliRunner().invoke(app, ["check", str(sheet), "--config", str(config)])
    assert "TiO2: sites: O, Ti not in the vocabulary" in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["select"], "--output FILE for a new sheet or --extend SHEET"),
        (["select", "--source", "directory", "--output", "x.tsv"], "--path: needed with --source directory"),
        (["show", str(CURATED), "GaAs-zinkblende"], "did you mean GaAs-zincblende"),
    ],
)
def test_command_errors_say_what_to_do(arguments, message):
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)
