"""The configuration: one pydantic model per block, the single source of defaults, ranges and units.

``config/config.yaml`` and ``config/schema.json`` are generated from these models (``defectnet config``).
Units are part of the field names; concentrations are fractions of the sites of the undoped supercell.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from ase.data import chemical_symbols
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from defectnet.elements import MAX_Z, PUBLISHED_VOCABULARY, VACANCY
from defectnet.errors import InputError
from defectnet.files import write_atomically


def _known_element(symbol: str) -> str:
    if symbol not in chemical_symbols[1 : MAX_Z + 1]:
        raise ValueError(f"{symbol!r} is not an element between H and Ba")
    return symbol


Element = Annotated[str, AfterValidator(_known_element)]
Dopant = Annotated[str, AfterValidator(lambda symbol: symbol if symbol == VACANCY else _known_element(symbol))]
ElementOrAll = Annotated[str, AfterValidator(lambda symbol: symbol if symbol == "all" else _known_element(symbol))]


class Block(BaseModel):
    """Base of all blocks: unknown keys are errors, values cannot be changed after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_nothing(cls, values: Any) -> Any:
        """In `snakemake --config run={models: null}`, null arrives as text, like all values there."""
        if not isinstance(values, dict):
            return values
        return {name: None if value == "null" else value for name, value in values.items()}

    def digest(self) -> str:
        """Hexadecimal SHA-256 of the block's values, independent of key order."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


class Run(Block):
    """Name, place and seed of a run."""

    name: str = Field("demo", pattern=r"^[A-Za-z0-9_.-]+$", description="Name of the run, used in titles.")
    results: str = Field("results/demo", description="Directory that receives everything this run makes.")
    dataset: str | None = Field(
        None, description="A finished dataset, for example a compact one, to train on; null: computed by this run."
    )
    models: str | None = Field(
        None, description="Directory of finished networks to evaluate, PRESET-SPLIT-REPEAT/; null: trained by this run."
    )
    other_potential: str | None = Field(
        None,
        description="A dataset of the same hosts by another potential, on which networks of the host split are scored, "
        "too; null: none.",
    )
    seed: int = Field(20250602, ge=0, description="Master seed; each host and purpose draws from its own stream.")


class Hosts(Block):
    """Host crystals and how they are shared out to jobs."""

    sheet: str = Field("config/hosts/demo.tsv", description="Host sheet made by `defectnet hosts select`.")
    per_batch: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        1, description="Hosts per job; 1 fans out per host, auto fills batch_minutes by the costs in config/costs.json."
    )
    batch_minutes: float = Field(
        60, gt=0, description="Wall time of the longest job of a batch that per_batch: auto aims at."
    )
    vocabulary: tuple[Element, ...] = Field(
        PUBLISHED_VOCABULARY, min_length=2, description="Elements that hosts and dopants may contain."
    )


class Dopants(Block):
    """How dopants are recommended."""

    n_type: int = Field(3, ge=0, le=20, description="Recommended n-type dopants per host.")
    p_type: int = Field(3, ge=0, le=20, description="Recommended p-type dopants per host.")
    probability_min: float = Field(
        1e-3, gt=0, lt=1, description="Smallest Hautier substitution probability that is accepted."
    )
    vacancies: tuple[ElementOrAll, ...] = Field(
        (), description="Host elements whose sites may be empty, beside the recommended dopants; [all]: every one."
    )
    overrides: dict[str, dict[Element, tuple[Dopant, ...]]] = Field(
        {},
        description="Own lists instead of recommendations: host id -> replaced element -> dopants; Vac is a vacancy.",
    )
    screened: str | None = Field(
        None, description="Table made by `defectnet screen`; candidates that have a problem there are left out."
    )

    @model_validator(mode="after")
    def _at_least_one(self) -> Dopants:
        if self.n_type + self.p_type == 0:
            raise ValueError("n_type + p_type must be at least 1")
        return self

    def may_be_empty(self, elements: Iterable[str]) -> list[str]:
        """Those of the elements of a host whose sites ``vacancies`` names, in alphabetical order."""
        return sorted(element for element in set(elements) if {element, "all"} & set(self.vacancies))

    @property
    def has_vacancies(self) -> bool:
        """Whether the sites of any host may be empty."""
        named = (dopants for lists in self.overrides.values() for dopants in lists.values())
        return bool(self.vacancies) or any(VACANCY in dopants for dopants in named)


class Supercells(Block):
    """Size of the supercells and what is substituted in them."""

    atoms_min: int = Field(30, ge=2, le=5000, description="Smallest number of atoms of a supercell.")
    atoms_max: int = Field(32, ge=2, le=5000, description="Largest number of atoms of a supercell.")
    doped_per_host: int = Field(3, ge=1, le=1000, description="Doped supercells per host.")
    species_min: int = Field(1, ge=1, le=6, description="Fewest coexisting dopant species.")
    species_max: int = Field(3, ge=1, le=6, description="Most coexisting dopant species.")
    concentration_min: float = Field(
        0.002, gt=0, le=1, description="Lowest concentration per species, as a fraction (0.002 = 0.2 at.%)."
    )
    concentration_max: float = Field(
        0.125, gt=0, le=1, description="Highest concentration of all species together, as a fraction (0.25 = 25 at.%)."
    )
    dilute_per_host: int = Field(
        0, ge=0, le=1000, description="More doped supercells per host, numbered after the others, with few dopants."
    )
    dilute_max: float = Field(
        0.05,
        gt=0,
        le=1,
        description="Highest concentration of all species together in these, as a fraction; they hold two dopant atoms "
        "or more where these fit.",
    )

    @model_validator(mode="after")
    def _ordered(self) -> Supercells:
        for low, high in (
            ("atoms_min", "atoms_max"),
            ("species_min", "species_max"),
            ("concentration_min", "concentration_max"),
            *([("concentration_min", "dilute_max")] if self.dilute_per_host else []),
        ):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(f"{low} ({getattr(self, low)}) must not exceed {high} ({getattr(self, high)})")
        return self

    @property
    def cells_per_host(self) -> int:
        """Doped supercells of a host, dilute ones included."""
        return self.doped_per_host + self.dilute_per_host

    def of_cell(self, number: int) -> Supercells:
        """What one of them is drawn by."""
        if number < self.doped_per_host:
            return self
        return self.model_copy(update={"concentration_max": self.dilute_max})


class Potential(Block):
    """The machine-learned potential and the environment it runs in."""

    name: Literal["sevennet", "mace", "mattersim", "chgnet", "analytic"] = Field(
        "sevennet", description="Package that evaluates forces; each lives in its own environment under envs/."
    )
    model: str = Field("7net-0", description="Name of a pretrained model that the package knows.")
    modality: str | None = Field(
        None,
        description="Level of theory of a model trained on several: PBE or R2SCAN for 7net-mf-0, a head for MACE.",
    )
    checkpoint: str | None = Field(
        None,
        description="File with weights instead of a pretrained model. Checkpoints are pickles: load only your own.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes a GPU where there is one.")
    dtype: Literal["float32", "float64"] = Field("float32", description="Floating-point type of the model.")
    atoms_per_pass: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="Most atoms of displaced copies in one forward pass; auto takes 32 on a CPU and fills a GPU.",
    )
    atoms_per_second: float | None = Field(
        None,
        gt=0,
        description="Atoms whose forces a job gets per second, for planning; null: as learned in config/costs.json.",
    )
    python: str = Field(
        ".venvs/sevennet/bin/python",
        description="Interpreter of the potential's environment; `python` when conda provides it.",
    )


class Relaxation(Block):
    """Relaxation of hosts and doped supercells."""

    fmax_eV_per_A: float = Field(0.01, gt=0, le=1, description="Largest residual force on any atom.")
    steps_max: int = Field(500, ge=1, description="Optimiser steps before a structure counts as not converged.")
    optimizer: Literal["LBFGS", "FIRE"] = Field(
        "LBFGS",
        description="ASE optimiser; LBFGS: FIRE takes over after 150 steps, and where force constants are known "
        "beforehand it is BFGS with these.",
    )
    host_cell: bool = Field(True, description="Relax the lattice of the pristine host as well as its positions.")
    doped_cell: bool = Field(False, description="Relax the lattice of doped supercells (off: dilute limit).")
    start: Literal["unrelaxed", "harmonic", "superposed", "definet"] = Field(
        "superposed",
        description="Where doped supercells start: at the host's sites; there, with the host's force constants for the "
        "first steps; displaced as the single defects predict; or as a network does (`defectnet definet train`).",
    )
    definet: str | None = Field(
        None, description="Checkpoint of the network of start: definet; models/definet/checkpoint.pt knows SevenNet-0."
    )

    @model_validator(mode="after")
    def _startable(self) -> Relaxation:
        if self.start == "definet" and self.definet is None:
            raise ValueError("start: definet needs a network; give its checkpoint as relaxation.definet")
        if self.start == "harmonic" and (self.optimizer != "LBFGS" or self.doped_cell):
            raise ValueError("start: harmonic needs optimizer: LBFGS and doped_cell: false; or take start: unrelaxed")
        return self


class Phonons(Block):
    """Hessians of relaxed supercells: by finite differences, or superposed and refined by probing."""

    displacement_A: float = Field(0.01, gt=0, le=0.1, description="Length of the finite displacements.")
    displacements: Literal["central", "forward"] = Field(
        "central",
        description="central: every atom there and back, where symmetry does not save it; forward: one way only, "
        "half of the evaluations, with errors of odd anharmonicity.",
    )
    symprec_A: float = Field(
        1e-3, gt=0, le=0.1, description="Tolerance of the symmetry search that saves displacements."
    )
    atoms_min: int | None = Field(
        None,
        ge=1,
        le=5000,
        description="Spectra are of the supercells repeated until they have this many atoms, with the host's forces "
        "from one to the next; null: of the supercells as they are.",
    )
    unstable_hosts: Literal["keep", "skip"] = Field(
        "keep",
        description="Hosts with imaginary modes in their supercells: all is computed as for others, or nothing more.",
    )
    direct_per_host: int = Field(
        2,
        ge=0,
        description="Doped supercells with Hessians by finite differences; superposition is compared with them.",
    )
    probes_max: int = Field(
        48, ge=4, le=1000, description="Most Hessian-vector products spent on any other doped supercell."
    )
    probing_tolerance: float = Field(
        0.1,
        gt=0,
        lt=1,
        description="Probing ends when what it leaves unexplained, as a share of what doping changed, is below.",
    )
    follow_imaginary: int = Field(
        1, ge=0, le=5, description="How often an unstable mode of a doped supercell is followed downhill and relaxed."
    )


class Superposition(Block):
    """Spectra from single defects, as many per host as training can use."""

    superposed_per_host: int = Field(1000, ge=0, description="Superposed spectra per host; 0: none.")
    mass_only_per_host: int = Field(
        0, ge=0, description="Spectra per host with the host's force constants and the dopants' masses."
    )
    concentration_max: float = Field(
        0.125, gt=0, le=1, description="Highest total concentration that is superposed, as a fraction."
    )
    tolerance_eV_per_A2: float = Field(
        1e-3, ge=0, le=1, description="Smallest change of a force constant that is kept in the library."
    )
    displacement_max_A: float | None = Field(
        None,
        gt=0,
        description="Single defects that move an atom farther fail, before their force constants are computed: what "
        "leaves its site is no substitutional dopant, and low symmetry is expensive; null: none does.",
    )
    force_constants: bool = Field(
        True,
        description="false: single defects are relaxed and no more, which takes few evaluations. Enough for "
        "relaxation.start: superposed and to train on by `defectnet definet train`, not for spectra.",
    )
    error_max: float = Field(
        0.25,
        gt=0,
        description="Largest expected error of superposed spectra, as a share of the doped-pristine signal; where a "
        "host's comparison tells of more, its concentration_max is halved until it holds.",
    )

    @model_validator(mode="after")
    def _superposable(self) -> Superposition:
        if self.superposed_per_host and not self.force_constants:
            raise ValueError("force_constants: false leaves nothing to superpose; set superposed_per_host to 0 as well")
        return self


class Spectra(Block):
    """From modes to densities of states."""

    sigma_meV: float = Field(1.0, gt=0, le=50, description="Standard deviation of the Gaussian broadening.")
    energy_min_meV: float = Field(-20.0, description="Lower edge of the energy grid; imaginary modes are negative.")
    energy_max_meV: float = Field(140.0, description="Upper edge of the energy grid.")
    bin_meV: float = Field(1.0, gt=0, le=20, description="Width of an energy bin.")
    weighting: Literal["none", "neutron"] = Field(
        "none", description="none: phonon DOS; neutron: generalised DOS weighted by cross section over mass."
    )

    @model_validator(mode="after")
    def _ordered(self) -> Spectra:
        if self.energy_min_meV >= self.energy_max_meV:
            raise ValueError("energy_min_meV must be below energy_max_meV")
        return self


class Training(Block):
    """The network and its training."""

    presets: list[Literal["published", "absolute", "response", "finetuned"]] = Field(
        ["published", "response"],
        min_length=1,
        description="published: network and axis of arXiv:2506.00725; absolute: same network, spectra block's axis; "
        "response: one query per candidate, given what it does to the host's spectrum; finetuned: the network of "
        "pretrained, trained on.",
    )
    pretrained: str | None = Field(None, description="Preset finetuned: checkpoint of the network that it starts from.")
    frozen: list[str] = Field(
        [], description="Preset finetuned: parts of the network that stay as they are, such as corrector or judge."
    )
    epochs: int = Field(10, ge=1, description="Passes over the training spectra.")
    batch_size: int = Field(64, ge=1, description="Spectra per gradient step.")
    learning_rate: float | None = Field(None, gt=0, description="Adam step size; null: the preset's own.")
    validation_fraction: float = Field(0.15, gt=0, lt=0.5, description="Share of hosts (or rows) for validation.")
    test_fraction: float = Field(0.2, gt=0, lt=0.5, description="Share of hosts (or rows) held out for the test.")
    train_fraction: float = Field(
        1.0, gt=0, le=1, description="Share of the training hosts (or rows) that is used, for learning curves."
    )
    splits: list[Literal["host", "row", "configuration", "element"]] = Field(
        ["host", "row"],
        min_length=1,
        description="What is tested: new hosts; spectra dealt out one by one; relaxed known hosts; new dopants.",
    )
    repeats: int = Field(
        3, ge=1, le=50, description="Train/test splits per kind; successive ones test other hosts, metrics pool them."
    )
    distractor_probability: float = Field(
        0.5, ge=0, le=1, description="Chance that an absent candidate stays in the mask of a training sample."
    )
    members: int = Field(1, ge=1, le=20, description="Networks that are trained alike; their answers are averaged.")
    resolution_bins: float = Field(
        2.0, ge=0, description="Preset response: training spectra are blurred by Gaussians of up to this width."
    )
    noise: float = Field(
        0.02, ge=0, description="Preset response: noise of up to this share of the mean intensity in training."
    )
    background: float = Field(
        0.02, ge=0, description="Preset response: background left in training, as a share of the mean intensity."
    )
    axis_scale: float = Field(
        0.02, ge=0, le=0.5, description="Preset response: energies of training spectra are off by up to this factor."
    )
    cut_chance: float = Field(
        0.2, ge=0, le=1, description="Preset response: chance that both ends of a training spectrum are not measured."
    )

    @model_validator(mode="after")
    def _startable(self) -> Training:
        if "finetuned" in self.presets and self.pretrained is None:
            raise ValueError("presets: finetuned needs pretrained, the checkpoint of a trained network")
        return self

    def of_preset(self, preset: str) -> dict[str, Any]:
        """What determines the training of one network, as plain values."""
        others = {"presets", "splits", "repeats"} | (set() if preset == "finetuned" else {"pretrained", "frozen"})
        return self.model_dump(mode="json", exclude=others)


class Config(Block):
    """Everything that determines a run."""

    run: Run = Run()
    hosts: Hosts = Hosts()
    dopants: Dopants = Dopants()
    supercells: Supercells = Supercells()
    potential: Potential = Potential()
    relaxation: Relaxation = Relaxation()
    phonons: Phonons = Phonons()
    superposition: Superposition = Superposition()
    spectra: Spectra = Spectra()
    training: Training = Training()

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """What the sites of a run may hold: the elements, and vacancies if there may be any."""
        return self.hosts.vocabulary + ((VACANCY,) if self.dopants.has_vacancies else ())

    @property
    def needs_library(self) -> bool:
        """Whether any stage makes use of single defects."""
        settings = self.superposition
        probed = self.supercells.cells_per_host > self.phonons.direct_per_host
        asked_for = settings.superposed_per_host > 0 or not settings.force_constants
        return asked_for or self.relaxation.start == "superposed" or probed

    @property
    def needs_hosts_phonons(self) -> bool:
        """Whether a stage before ``phonons`` makes use of the force constants of hosts, and so computes them."""
        early = self.relaxation.start in ("harmonic", "definet") or self.phonons.unstable_hosts == "skip"
        return early or self.needs_library


def parse_config(values: dict[str, Any], source: str) -> Config:
    """Validate a nested mapping; ``source`` names its origin in messages.

    Raises :class:`InputError` that lists *all* errors with their path and the allowed values.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        # Of a field that may be of two types, both complain.
        by_field: dict[str, list[dict[str, Any]]] = {}
        for problem in error.errors():
            by_field.setdefault(_path(problem), []).append(problem)
        lines = [f"{source}: {_explain(path, problems)}" for path, problems in by_field.items()]
        raise InputError("\n".join(lines)) from None


def load_config(path: str | Path) -> Config:
    """Read and validate a YAML file. Raises :class:`InputError`."""
    path = Path(path)
    try:
        values = YAML(typ="safe").load(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: no such configuration file; start from config/config.yaml") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable text file ({error}); start from config/config.yaml") from None
    except YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {error}") from None
    return parse_config({} if values is None else values, str(path))


def config_path(config: Config, directory: Path) -> Path:
    """Where :func:`write_config` puts a configuration: its name is its content's."""
    return directory / f"{config.digest()[:16]}.yaml"


def write_config(config: Config, directory: Path) -> Path:
    """Write a configuration to its :func:`config_path` unless it is there; returns the path."""
    path = config_path(config, directory)
    if not path.exists():
        text = io.BytesIO()
        YAML(typ="safe").dump(config.model_dump(mode="json"), text)
        write_atomically(path, text.getvalue())
    return path


def _path(problem: dict[str, Any]) -> str:
    """Where a value stands, without the name of the type that it failed to be of."""
    parts = [str(part) for part in problem["loc"]]
    return ".".join(part for part in parts if not re.fullmatch(r"constrained-int|literal\[.*\]", part))


def _explain(path: str, problems: list[dict[str, Any]]) -> str:
    """What is wrong with a value in a sentence: path, value, what is allowed, remedy."""
    problem = problems[0]
    if problem["type"] == "extra_forbidden":
        allowed = list(_block_at(problem["loc"][:-1]).model_fields)
        guess = difflib.get_close_matches(str(problem["loc"][-1]), allowed, n=1)
        hint = f"did you mean {guess[0]}? " if guess else ""
        return f"{path}: unknown key; {hint}allowed keys: {', '.join(allowed)}"
    wanted = " or ".join(one["msg"].removeprefix("Input should be ") for one in problems[1:])
    message = f"{path}: {problem['msg']}{' or ' if wanted else ''}{wanted} (got {problem['input']!r})"
    name = str(problem["loc"][-1]) if problem["loc"] else ""
    if name.startswith("concentration") and isinstance(problem["input"], (int, float)) and problem["input"] > 1:
        message += f"; concentrations are fractions: write {problem['input'] / 100:g} for {problem['input']:g} at.%"
    return message


def _block_at(loc: tuple[Any, ...]) -> type[BaseModel]:
    model: type[BaseModel] = Config
    for part in loc:
        model = model.model_fields[str(part)].annotation  # blocks nest one level deep
    return model


def default_yaml() -> str:
    """The default configuration as commented YAML, generated from the models."""
    lines = [
        "# Default configuration: the demo. Generated by `defectnet config`; config/README.md explains the blocks."
    ]
    for name, field in Config.model_fields.items():
        block = field.default
        lines += ["", f"{name}:"]
        for key, info in type(block).model_fields.items():
            value = block.model_dump(mode="json")[key]
            lines += [f"  # {info.description}", f"  {key}: {json.dumps(value)}"]
    return "\n".join(lines) + "\n"


def json_schema() -> str:
    """JSON schema of the configuration, for editors and `snakemake.utils.validate`."""
    return json.dumps(Config.model_json_schema(), indent=2) + "\n"
