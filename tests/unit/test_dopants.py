import json
import warnings

import pytest
from pymatgen.core import Lattice, Structure

from defectnet.config import Dopants
from defectnet.dopants import KINDS, Candidate, oxidation_states, propose, recommend
from defectnet.elements import PUBLISHED_VOCABULARY
from defectnet.errors import InputError

THIRDS = [1 / 3, 2 / 3, 0.0]


def crystal(group, lattice, symbols, positions):
    return Structure.from_spacegroup(group, lattice, symbols, positions).get_primitive_structure()


HOSTS = {
    "Si": lambda: crystal("Fd-3m", Lattice.cubic(5.43), ["Si"], [[0, 0, 0]]),
    "GaAs": lambda: crystal("F-43m", Lattice.cubic(5.65), ["Ga", "As"], [[0, 0, 0], [0.25] * 3]),
    "GaN": lambda: crystal("P6_3mc", Lattice.hexagonal(3.19, 5.19), ["Ga", "N"], [THIRDS, [1 / 3, 2 / 3, 0.377]]),
    "MgO": lambda: crystal("Fm-3m", Lattice.cubic(4.21), ["Mg", "O"], [[0, 0, 0], [0.5] * 3]),
    "NaCl": lambda: crystal("Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5] * 3]),
    "CuInSe2": lambda: crystal(
        "I-42d",
        Lattice.tetragonal(5.78, 11.62),
        ["Cu", "In", "Se"],
        [[0, 0, 0], [0, 0, 0.5], [0.22, 0.25, 0.125]],
    ),
    "MoS2": lambda: crystal(
        "P6_3/mmc", Lattice.hexagonal(3.16, 12.3), ["Mo", "S"], [[1 / 3, 2 / 3, 0.25], [1 / 3, 2 / 3, 0.621]]
    ),
    "SrTiO3": lambda: crystal("Pm-3m", Lattice.cubic(3.905), ["Sr", "Ti", "O"], [[0, 0, 0], [0.5] * 3, [0.5, 0.5, 0]]),
    "ZrNiSn": lambda: crystal("F-43m", Lattice.cubic(6.11), ["Zr", "Ni", "Sn"], [[0.5] * 3, [0.25] * 3, [0, 0, 0]]),
}


FIVE_EACH = {"n_type": 5, "p_type": 5}  # as published


def ask(name, vocabulary=PUBLISHED_VOCABULARY, **settings):
    return recommend(HOSTS[name](), name, Dopants(**(FIVE_EACH | settings)), vocabulary)


def dopants(candidates, kind):
    return [candidate.dopant for candidate in candidates if candidate.kind == kind]


@pytest.mark.parametrize("name", HOSTS)
def test_contract(name):
    candidates = ask(name)
    symbols = {species.symbol for species in HOSTS[name]().species}
    assert len(dopants(candidates, "n")) == len(dopants(candidates, "p")) == 5
    elements = [candidate.dopant for candidate in candidates]
    assert len(set(elements)) == len(elements)
    assert not set(elements) & symbols
    assert set(elements) <= set(PUBLISHED_VOCABULARY)
    assert {candidate.replaces for candidate in candidates} <= symbols
    kinds = [KINDS.index(candidate.kind) for candidate in candidates]
    assert kinds == sorted(kinds)
    assert candidates == ask(name)


def test_silicon_has_no_ions_and_gets_its_neighbours():
    candidates = ask("Si")
    assert {candidate.recommender for candidate in candidates} == {"group"}
    assert set(dopants(candidates, "n")) >= {"P", "As", "Sb", "N"}
    assert set(dopants(candidates, "p")) >= {"B", "Al", "Ga", "In"}


def test_known_dopants_are_found():
    assert {("Si", "Ga"), ("Ge", "Ga")} <= {(c.dopant, c.replaces) for c in ask("GaAs") if c.kind == "n"}
    assert ("F", "O") in {(c.dopant, c.replaces) for c in ask("SrTiO3") if c.kind == "n"}
    assert ("Nb", "Ti") in {(c.dopant, c.replaces) for c in ask("SrTiO3") if c.kind == "n"}
    assert ("Sb", "Sn") in {(c.dopant, c.replaces) for c in ask("ZrNiSn") if c.kind == "n"}


def test_later_recommenders_only_fill_what_earlier_ones_left():
    strict = ask("NaCl", probability_min=0.1)
    assert [c.dopant for c in strict if c.recommender == "hautier"] == ["O"]
    assert {c.recommender for c in strict} == {"hautier", "shannon", "group"}
    for candidate in strict:
        if candidate.recommender == "shannon":
            assert 0.7 <= candidate.score <= 1
    assert all(c.score >= 0.01 for c in ask("GaN", probability_min=0.01) if c.recommender == "hautier")


@pytest.mark.parametrize("name", sorted(HOSTS))
def test_a_formula_alone_leads_to_mostly_the_same_dopants(name):
    structure = HOSTS[name]()
    settings = Dopants(**FIVE_EACH)
    of_structure = recommend(structure, "host", settings, PUBLISHED_VOCABULARY)
    of_formula = propose(structure.formula, settings, PUBLISHED_VOCABULARY)
    assert len(of_formula) == len(of_structure)
    dopants = {one.dopant for one in of_formula}
    assert len(dopants) == len(of_formula) and not dopants & {element.symbol for element in structure.elements}
    assert len(dopants & {one.dopant for one in of_structure}) >= 5


def test_nonsense_is_no_formula():
    with pytest.raises(InputError, match="formula 'Xx2'"):
        propose("Xx2", Dopants(), PUBLISHED_VOCABULARY)


def test_isovalent_elements_fill_a_small_vocabulary():
    candidates = ask("Si", ["Si", "P", "B", "C", "Ge", "Sn"], n_type=2, p_type=2)
    assert dopants(candidates, "n") == ["P"]
    assert dopants(candidates, "p") == ["B"]
    assert dopants(candidates, "isovalent") == ["Ge", "Sn"]
    assert ask("Si", ["Si", "He"]) == []


def test_counts_are_respected():
    assert [c.kind for c in ask("GaAs", n_type=0, p_type=3)] == ["p"] * 3
    assert [c.kind for c in ask("GaAs", n_type=2, p_type=0)] == ["n"] * 2


def test_oxidation_states():
    assert oxidation_states(HOSTS["Si"]()) == [0, 0]
    states = dict(
        zip((s.symbol for s in HOSTS["CuInSe2"]().species), oxidation_states(HOSTS["CuInSe2"]()), strict=True)
    )
    assert states == {"Cu": 1, "In": 3, "Se": -2}
    decorated = HOSTS["GaAs"]().copy().add_oxidation_state_by_element({"Ga": 1, "As": -1})
    assert sorted(oxidation_states(decorated)) == [-1, 1]
    fractional = HOSTS["GaAs"]().copy().add_oxidation_state_by_element({"Ga": 1.5, "As": -1.5})
    assert oxidation_states(fractional) == [0, 0]


def test_decorated_and_plain_structures_agree():
    decorated = HOSTS["GaAs"]().copy().add_oxidation_state_by_element({"Ga": 3, "As": -3})
    assert recommend(decorated, "GaAs", Dopants(**FIVE_EACH), PUBLISHED_VOCABULARY) == ask("GaAs")


def test_site_order_does_not_matter():
    structure = HOSTS["CuInSe2"]()
    shuffled = Structure.from_sites(list(structure)[::-1])
    assert recommend(shuffled, "x", Dopants(**FIVE_EACH), PUBLISHED_VOCABULARY) == ask("CuInSe2")


def test_overrides_replace_recommendations_and_allow_antisites():
    candidates = ask("GaAs", overrides={"GaAs": {"As": ["Ga", "Se", "Si"], "Ga": ["Si", "Mn"]}})
    assert [(c.dopant, c.replaces, c.kind, c.recommender) for c in candidates] == [
        ("Ga", "As", "p", "user"),
        ("Se", "As", "n", "user"),
        ("Si", "As", "p", "user"),
        ("Si", "Ga", "n", "user"),
        ("Mn", "Ga", "p", "user"),
    ]
    assert ask("GaAs", overrides={"other": {"As": ["Ga"]}}) == ask("GaAs")


@pytest.mark.parametrize(
    ("entry", "path", "word"),
    [
        ({"In": ["Zn"]}, "dopants.overrides.GaAs.In", "As, Ga"),
        ({"Ga": ["Zn", "Ga"]}, "dopants.overrides.GaAs.Ga", "itself"),
        ({"Ga": ["Xe"]}, "dopants.overrides.GaAs.Ga", "hosts.vocabulary"),
        ({"Ga": []}, "dopants.overrides.GaAs", "no dopant"),
    ],
)
def test_bad_overrides_name_the_field(entry, path, word):
    with pytest.raises(InputError, match=word) as error:
        ask("GaAs", overrides={"GaAs": entry})
    assert str(error.value).startswith(path + ":")


def test_json_round_trip():
    for candidate in ask("Si"):
        assert Candidate.from_dict(json.loads(json.dumps(candidate.to_dict()))) == candidate


def test_no_warnings_escape():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ask("NaCl", probability_min=0.5)
