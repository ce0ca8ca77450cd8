import contextlib
import json
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from snakemake.cli import parse_config as snakemake_config

from defectnet.config import Config, Spectra, default_yaml, json_schema, load_config, parse_config, write_config
from defectnet.errors import InputError
from defectnet.hosts.sheet import read_sheet

ROOT = Path(__file__).parents[2]


@pytest.fixture
def load(tmp_path):
    """Load a configuration from text; :class:`InputError` as a list of lines."""
    path = tmp_path / "my.yaml"

    def write_and_load(text):
        path.write_text(text)
        return load_config(path)

    return write_and_load


def problems(load, text):
    with pytest.raises(InputError) as caught:
        load(text)
    return str(caught.value).splitlines()


# --- generated files ----------------------------------------------------------------------------------------------


def test_committed_configuration_is_the_generated_one():
    assert (ROOT / "config/config.yaml").read_text() == default_yaml(), "run `make config`"
    assert (ROOT / "config/schema.json").read_text() == json_schema(), "run `make config`"


def test_committed_configuration_says_the_defaults():
    assert load_config(ROOT / "config/config.yaml") == Config()


def test_paper_configuration_is_valid():
    path = ROOT / "config/paper.yaml"
    if not path.exists():
        pytest.skip("no config/paper.yaml")
    paper = load_config(path)
    assert paper.run.results != Config().run.results
    # The published supercells.
    assert (paper.supercells.atoms_min, paper.supercells.atoms_max) == (433, 500)


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.yaml")), ids=lambda path: path.stem)
def test_committed_configurations_bring_their_hosts(path):
    sheet = Path(load_config(path).hosts.sheet)
    assert sheet.parts[:2] == ("config", "hosts")  # where nothing has to be made before
    assert read_sheet(ROOT / sheet)


def test_every_default_is_explained():
    lines = default_yaml().splitlines()
    keys = [i for i, line in enumerate(lines) if line.startswith("  ") and not line.startswith("  #")]
    assert len(keys) == sum(len(block) for block in Config().model_dump().values())
    assert all(lines[i - 1].startswith("  # ") and len(lines[i - 1]) > 10 for i in keys)


def test_schema_judges_like_the_models():
    schema = json.loads(json_schema())
    values = Config().model_dump(mode="json")
    jsonschema.validate(values, schema)
    for block, key, wrong in [
        ("run", "sed", 1),
        ("run", "seed", -1),
        ("supercells", "concentration_max", 25),
        ("potential", "device", "tpu"),
        ("spectra", "sigma_meV", 0),
    ]:
        changed = json.loads(json.dumps(values))
        changed[block][key] = wrong
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(changed, schema)
        with pytest.raises(InputError):
            parse_config(changed, "test")


# --- messages -----------------------------------------------------------------------------------------------------


def test_all_errors_are_reported_together(load, tmp_path):
    lines = problems(
        load,
        """
run: {sed: 3}
hosts: {per_batch: 0}
supercells: {concentration_max: 25, doped_per_host: many}
relaxation: {optimizer: BFGS, host_cell: perhaps}
potentail: {name: sevennet}
""",
    )
    assert len(lines) == 7
    assert all(line.startswith(f"{tmp_path / 'my.yaml'}: ") for line in lines)
    named = {line.split(": ")[1] for line in lines}
    assert named == {
        "run.sed",
        "hosts.per_batch",
        "supercells.concentration_max",
        "supercells.doped_per_host",
        "relaxation.optimizer",
        "relaxation.host_cell",
        "potentail",
    }


@pytest.mark.parametrize(
    ("text", "path", "says"),
    [
        ("run: {sed: 3}", "run.sed", ["unknown key", "did you mean seed?", "name", "results"]),
        ("potentail: {}", "potentail", ["did you mean potential?", "supercells"]),
        ("run: {zzz: 3}", "run.zzz", ["unknown key", "allowed keys: name, results, dataset, models, other_potential"]),
        ("supercells: {doped_per_host: many}", "supercells.doped_per_host", ["integer", "'many'"]),
        ("supercells: {doped_per_host: 2.5}", "supercells.doped_per_host", ["integer", "2.5"]),
        ("supercells: {doped_per_host: 2000}", "supercells.doped_per_host", ["1000", "2000"]),
        ("phonons: {displacement_A: 0}", "phonons.displacement_A", ["greater than 0"]),
        ("potential: {device: tpu}", "potential.device", ["auto", "cpu", "cuda", "'tpu'"]),
        ("relaxation: {host_cell: perhaps}", "relaxation.host_cell", ["boolean", "'perhaps'"]),
        ("run: {name: a b}", "run.name", ["pattern", "'a b'"]),
        ("run: 3", "run", ["dictionary"]),
        ("hosts: {vocabulary: [Si, Ge, Xx]}", "hosts.vocabulary.2", ["'Xx' is not an element"]),
        ("hosts: {vocabulary: [Si, Ge, U]}", "hosts.vocabulary.2", ["between H and Ba"]),
        ("hosts: {vocabulary: [Si]}", "hosts.vocabulary", ["at least 2"]),
        ("dopants: {overrides: {mp-1: {Si: [Zz]}}}", "dopants.overrides.mp-1.Si.0", ["'Zz' is not an element"]),
        ("dopants: {n_type: 0, p_type: 0}", "dopants", ["n_type + p_type", "at least 1"]),
    ],
)
def test_message_names_place_and_remedy(load, text, path, says):
    (line,) = problems(load, text)
    assert f": {path}: " in line
    for part in says:
        assert part in line


@pytest.mark.parametrize(
    ("percent", "fraction"), [("concentration_max: 25", "0.25"), ("concentration_min: 2.5", "0.025")]
)
def test_percentages_are_recognised(load, percent, fraction):
    (line,) = problems(load, f"supercells: {{{percent}}}")
    assert "fractions" in line
    assert f"write {fraction} " in line


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("supercells: {atoms_min: 500, atoms_max: 433}", "atoms_min (500)", "atoms_max (433)"),
        ("supercells: {species_min: 4, species_max: 2}", "species_min (4)", "species_max (2)"),
        ("supercells: {concentration_min: 0.3}", "concentration_min (0.3)", "concentration_max (0.125)"),
        ("spectra: {energy_min_meV: 50, energy_max_meV: 50}", "energy_min_meV", "energy_max_meV"),
    ],
)
def test_minimum_above_maximum(load, text, low, high):
    (line,) = problems(load, text)
    assert low in line
    assert high in line


def test_duplicate_key(load):
    text = "\n".join(problems(load, "run: {seed: 1}\nrun: {seed: 2}\n"))
    assert "my.yaml" in text
    assert 'duplicate key "run"' in text
    assert "line 2" in text


@pytest.mark.parametrize("text", ["run: [", "run: {seed: 1", "a: 1\n---\nb: 2\n", "run: !!python/name:os.system {}"])
def test_not_yaml(load, text):
    assert "my.yaml: not valid YAML" in problems(load, text)[0]


@pytest.mark.parametrize("text", ["- run", "just words", "[1, 2]"])
def test_not_a_mapping(load, text):
    (line,) = problems(load, text)
    assert "my.yaml" in line
    assert "dictionary" in line


@pytest.mark.parametrize("text", ["0", "false", "[]", "''"])
def test_falsy_document_is_no_configuration(load, text):
    with pytest.raises(InputError):
        load(text)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"gone\.yaml: no such configuration file; start from config/config\.yaml"):
        load_config(tmp_path / "gone.yaml")


@pytest.mark.parametrize("kind", ["folder", "binary"])
def test_unreadable_file_is_named(tmp_path, kind):
    path = tmp_path / "my.yaml"
    if kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(InputError, match=r"my\.yaml"):
        load_config(path)


@pytest.mark.parametrize(
    "text",
    [
        "spectra: {sigma_meV: .nan}",
        "spectra: {bin_meV: .inf}",
        "relaxation: {fmax_eV_per_A: .nan}",
        "spectra: {energy_min_meV: .nan}",
        "spectra: {energy_min_meV: -.inf}",
        "spectra: {energy_max_meV: .inf}",
        "training: {learning_rate: .inf}",
    ],
)
def test_numbers_must_be_finite(load, text):
    (line,) = problems(load, text)
    assert text.split("{")[1].split(":")[0] in line


# --- values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n", "{}"])
def test_empty_file_means_defaults(load, text):
    assert load(text) == Config()


def test_one_value_changes_nothing_else(load):
    changed = load("supercells: {doped_per_host: 8}")
    assert changed.supercells.doped_per_host == 8
    expected = Config().model_dump()
    expected["supercells"]["doped_per_host"] = 8
    assert changed.model_dump() == expected


def test_null_on_the_command_line_of_snakemake_is_nothing():
    said = snakemake_config(["run={models: null, results: results/other}"])
    assert said["run"]["models"] == "null"
    assert parse_config(said, "--config").run == Config().run.model_copy(update={"results": "results/other"})


def test_values_cannot_be_changed_afterwards():
    with pytest.raises(ValidationError):
        Config().run.seed = 3


def shuffled(value, rng):
    if not isinstance(value, dict):
        return value
    names = list(value)
    rng.shuffle(names)
    return {name: shuffled(value[name], rng) for name in names}


@settings(deadline=None, max_examples=20)
@given(st.randoms(use_true_random=False))
def test_digest_does_not_depend_on_the_order_of_keys(rng):
    values = Config().model_dump(mode="json")
    values["dopants"]["overrides"] = {"a": {"Si": ["B", "P"], "C": ["N"]}, "b": {"Ge": ["As"]}}
    reference = parse_config(values, "test")
    assert parse_config(shuffled(values, rng), "test").digest() == reference.digest()


def other_values(value, allowed):
    """Candidates for a different value of the same kind; some may not fit their range."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value + 1, value - 1, value * 0.9, value * 1.1]
    if isinstance(value, str | None):
        return [*allowed, f"{value}x", 1]  # a number in place of auto
    return [["Si", "Ge", "B"], ["host"], ["absolute"], {"Si": {"Si": ["B"]}}]


TOGETHER = {"force_constants": {"superposed_per_host": 0}}
"""What has to change with a key for another value of it to make sense."""


def test_digest_depends_on_every_value():
    values = Config().model_dump(mode="json")
    definitions = json.loads(json_schema())["$defs"]
    digests = {Config().digest()}
    count = 1
    for block, keys in values.items():
        for key, value in keys.items():
            allowed = definitions[block.capitalize()]["properties"][key].get("enum", [])
            if allowed == [value] or "const" in definitions[block.capitalize()]["properties"][key]:
                continue
            found = set()
            for other in other_values(value, allowed):
                with contextlib.suppress(InputError):
                    other_keys = keys | TOGETHER.get(key, {}) | {key: other}
                    found.add(parse_config(values | {block: other_keys}, "test").digest())
            new = found - {Config().digest()}
            assert new, f"{block}.{key}: no other value was accepted, or none changed the digest"
            assert not new & digests
            digests |= new
            count += 1
    assert count > 35


def test_order_of_dopants_is_a_value():
    """Plans are drawn from the list in its order."""
    one, other = (
        parse_config({"dopants": {"overrides": {"Si": {"Si": dopants}}}}, "test")
        for dopants in (["B", "P"], ["P", "B"])
    )
    assert one.digest() != other.digest()


def test_same_digest_same_candidates():
    from pymatgen.core import Lattice, Structure

    from defectnet.dopants import recommend

    structure = Structure(Lattice.cubic(5.6).matrix / 2, ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    overrides = {"Na": ["Li", "K"], "Cl": ["F", "Br"]}
    one, other = (
        parse_config({"dopants": {"overrides": {"salt": order}}}, "test")
        for order in (overrides, dict(reversed(overrides.items())))
    )
    assert one.digest() == other.digest()
    lists = [recommend(structure, "salt", c.dopants, c.hosts.vocabulary) for c in (one, other)]
    assert lists[0] == lists[1]


def test_blocks_have_digests_of_their_own():
    assert Spectra().digest() != Spectra(sigma_meV=2.0).digest()
    assert Config().spectra.digest() == Spectra().digest()


# --- effective configuration --------------------------------------------------------------------------------------


def test_written_configuration_reads_back(tmp_path):
    config = parse_config(
        {"dopants": {"overrides": {"a": {"Si": ["B", "P"]}}}, "potential": {"checkpoint": "w.pth"}}, "test"
    )
    path = write_config(config, tmp_path / "new" / "configs")
    assert load_config(path) == config
    assert config.digest().startswith(path.stem)


def test_writing_again_touches_nothing(tmp_path):
    path = write_config(Config(), tmp_path)
    before = path.stat()
    assert write_config(Config(), tmp_path) == path
    after = path.stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)
    other = write_config(parse_config({"run": {"seed": 1}}, "test"), tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([path, other])
