"""What a run costs: how much work each item is, and how long a unit of work takes.

The work is counted in atom-evaluations: forces of one atom, once. How many there are follows from the number of atoms,
from symmetry (a single defect on a site of symmetry S needs about 6N/|S| displaced supercells) and from the
configuration, up to factors that are learned from records of finished runs and hold for every potential. Seconds per
atom-evaluation are learned as well, for each potential and kind of device.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from scipy.optimize import nnls

from defectnet.config import Config
from defectnet.errors import InputError
from defectnet.files import write_atomically
from defectnet.hosts.crystallography import general_positions, parse_sites
from defectnet.hosts.sheet import Host
from defectnet.layout import RECORD_STAGES
from defectnet.supercells import HostPlan

COSTS_FILE = Path("config/costs.json")
"""Learned from runs with 7net-0; `defectnet costs` makes one from your own."""

KINDS = ("relax_host", "phonons_host", "defect", "relax", "direct", "probed", "spectra")
"""Kinds of items whose work differs."""


class Fit(BaseModel):
    """A quantity proportional to known ones: Σ coefficients · terms, within a factor exp(±spread) for single hosts."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    coefficients: tuple[float, ...]
    spread: float
    hosts: int

    @classmethod
    def of(cls, observations: Sequence[tuple[str, Sequence[float], float]]) -> Fit:
        """From (host, terms, value), each weighted so that a single coefficient is the mean of value / term."""
        terms = np.array([terms for _, terms, _ in observations], float)
        values = np.array([value for _, _, value in observations], float)
        weight = 1 / terms.sum(axis=1)
        coefficients, _ = nnls(terms * weight[:, None], values * weight)
        by_host: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for (host, _, value), fitted in zip(observations, terms @ coefficients, strict=True):
            by_host[host][0] += value
            by_host[host][1] += fitted
        off = [np.log(value / fitted) for value, fitted in by_host.values() if value > 0 and fitted > 0]
        spread = float(np.sqrt(np.mean(np.square(off)))) if len(off) > 1 else UNKNOWN_SPREAD
        return cls(coefficients=tuple(coefficients), spread=spread, hosts=len(by_host))

    def __call__(self, terms: Sequence[float]) -> float:
        """The mean."""
        return float(np.dot(self.coefficients, terms))


START_S = 10.0
"""Assumed time to start a potential where no benchmark tells."""

UNKNOWN_SPREAD = float(np.log(2.0))
"""Spread between hosts where only one was seen."""


GUESSES = {
    kind: Fit(coefficients=coefficients, spread=UNKNOWN_SPREAD, hosts=0)
    for kind, coefficients in {
        "relax_host": (10.0,),
        "phonons_host": (1.5,),
        "defect": (10.0, 1.5),
        "relax": (15.0,),
        "direct": (1.0,),
        "probed": (1.0,),
        "spectra": (1e-7, 1e-9),
    }.items()
}
"""Work where no record tells."""


class Speed(BaseModel):
    """Seconds per atom-evaluation of a potential on a kind of device, by kind of item, and what starting it takes."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    seconds: dict[str, Fit]
    start_s: float


class Costs(BaseModel):
    """Everything that has been learned.

    work       : atom-evaluations per term of :func:`terms`, by kind; seconds for ``spectra``
    missed     : share of probed supercells that finite differences had to take over
    refused    : share of hosts whose superposition is not good enough
    speeds     : by ``potential model device``
    rules_s    : seconds per unit of the rules that need no potential, see :data:`RULE_UNITS`
    memory_mb  : peak of a process by stage, as (base, per atom)
    bytes      : size of a record by stage, per atom and spectrum
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    work: dict[str, Fit]
    missed: float
    refused: float
    speeds: dict[str, Speed]
    rules_s: dict[str, float]
    memory_mb: dict[str, tuple[float, float]]
    bytes: dict[str, float]

    @classmethod
    def read(cls, path: Path) -> Costs:
        """Raises :class:`InputError` naming the file."""
        try:
            return cls.model_validate_json(path.read_text())
        except FileNotFoundError:
            raise InputError(f"{path}: no such file; make it with `defectnet costs` from a finished run") from None
        except ValidationError as error:
            raise InputError(f"{path}: not a file of costs ({error}); make it again with `defectnet costs`") from None

    def write(self, path: Path) -> None:
        """As JSON, indented to be read."""
        write_atomically(path, (self.model_dump_json(indent=1) + "\n").encode())


RULE_UNITS = {
    "dopants": "host",
    "supercells": "host",
    "dataset": "spectrum",
    "train": "spectrum and epoch",
    "evaluate": "spectrum",
    "figures": "run",
}
"""What the seconds of one job of a rule without a potential are counted per."""


def units(rule: str, config: Config, hosts: Sequence[Host], batches: int) -> float:
    """How many :data:`RULE_UNITS` one job of a rule has, on average over the batches."""
    superposition = config.superposition
    per_host = config.supercells.doped_per_host + superposition.superposed_per_host + superposition.mass_only_per_host
    spectra = len(hosts) * per_host
    return {
        "host": len(hosts) / batches,
        "spectrum": spectra,
        "spectrum and epoch": spectra * config.training.epochs,
        "run": 1.0,
    }[RULE_UNITS[rule]]


@dataclass(frozen=True)
class Size:
    """What the cost of a host depends on.

    n_sites, n_primitive: atoms of its supercell and of its primitive cell
    orbits              : element and 6/|S| of every inequivalent site, S being its symmetry
    defects             : 6/|S| of the site of single defects that its candidates can make, and how many there are
    """

    n_sites: float
    n_primitive: int
    orbits: tuple[tuple[str, float], ...]
    defects: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, host: Host, plan: HostPlan | None, config: Config) -> Size:
        """From the host's row, and from its plan; without one, dopants spread evenly over the elements."""
        n_primitive = host.n_atoms or 1
        if host.sites is None:  # a structure file: as if it had no symmetry
            orbits = ((host.formula, 6.0),) * n_primitive
        else:
            group = general_positions(host.spacegroup)
            orbits = tuple((site.element, 6.0 * site.multiplicity / group) for site in parse_sites(host.sites))
        elements = {element for element, _ in orbits}
        if plan is None or host.sites is None:
            wanted = config.dopants.n_type + config.dopants.p_type
            dopants = dict.fromkeys(elements, wanted / len(elements))
        else:
            dopants = Counter(candidate.replaces for candidate in plan.candidates)
        defects = tuple((needed, float(dopants[element])) for element, needed in orbits if dopants[element])
        cells = config.supercells
        n_sites = plan.n_sites if plan else 0.5 * (cells.atoms_min + cells.atoms_max)
        return cls(n_sites, n_primitive, orbits, defects)


def terms(kind: str, size: Size, config: Config, site: float = 0.0) -> tuple[float, ...]:
    """What the work of one item is made of, in atom-evaluations; ``site`` is 6/|S| of a defect's site.

    relax_host, relax: each step. phonons_host, defect (relaxation, then Hessian), direct: displaced supercells.
    probed: the most products that are allowed, two evaluations each. spectra: diagonalisation, quadratic and cubic.
    """
    n = size.n_sites
    return {
        "relax_host": (size.n_primitive,),
        "phonons_host": (n * sum(needed for _, needed in size.orbits),),
        "defect": (n, n * n * site),
        "relax": (n,),
        "direct": (6.0 * n * n,),
        "probed": (2.0 * n * min(config.phonons.probes_max, 1.5 * n),),
        "spectra": ((3.0 * n) ** 2, (3.0 * n) ** 3),
    }[kind]


@dataclass(frozen=True)
class Load:
    """Expected work of one host in one stage: (kind, atom-evaluations, or seconds of ``spectra``), and its spectra or
    records.
    """

    stage: str
    parts: tuple[tuple[str, float], ...]
    results: float


def loads(size: Size, plan: HostPlan | None, config: Config, costs: Costs) -> list[Load]:
    """What a host takes in every stage that needs the potential."""
    doped = len(plan.plans) if plan else config.supercells.doped_per_host
    settings = config.superposition
    direct = min(doped, config.phonons.direct_per_host) if config.needs_library else doped

    def work(kind: str, count: float = 1.0, site: float = 0.0) -> tuple[str, float]:
        return kind, count * costs.work[kind](terms(kind, size, config, site))

    host = [work("relax_host"), work("phonons_host")]
    defects = [work("defect", count, site) for site, count in size.defects] if config.needs_library else []
    if not config.needs_library:  # then the host's own phonons come with those of its doped supercells
        of_library, of_relax, of_phonons = [], host[:1], host[1:]
    else:
        of_library, of_relax, of_phonons = [*host, *defects], [], []
    fallback = costs.refused * (settings.fallback_per_host if settings.superposed_per_host else 0)
    spectra = (1 - costs.refused) * settings.superposed_per_host + settings.mass_only_per_host

    def probed(count: float) -> list[tuple[str, float]]:
        return [work("probed", count), work("direct", costs.missed * count)]

    return [
        Load("library", tuple(of_library), sum(count for _, count in size.defects)),
        Load("relax", (*of_relax, work("relax", doped)), 1 + doped),
        Load("phonons", (*of_phonons, work("direct", direct), *probed(doped - direct)), 1 + doped),
        Load("superposed", (work("relax", fallback), *probed(fallback), work("spectra", spectra)), fallback + spectra),
    ]


@dataclass(frozen=True)
class Seconds:
    """A duration with the range that single hosts scatter over."""

    mean: float
    low: float
    high: float

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.mean + other.mean, self.low + other.low, self.high + other.high)


def seconds(load: Load, costs: Costs, speed: Speed) -> Seconds:
    """How long a load takes, without starting the potential."""
    total = Seconds(0.0, 0.0, 0.0)
    for kind, amount in load.parts:
        spread, mean = costs.work[kind].spread, amount
        if kind != "spectra":
            rate = speed.seconds.get(kind) or speed.seconds["relax"]
            mean, spread = amount * rate((1.0,)), float(np.hypot(spread, rate.spread))
        total += Seconds(mean, mean * np.exp(-spread), mean * np.exp(spread))
    return total


def speed_key(config: Config, device: str) -> str:
    """Name of a potential on a kind of device, such as ``sevennet 7net-0 cpu``."""
    return f"{config.potential.name} {config.potential.checkpoint or config.potential.model} {device.split(':')[0]}"


def speed_of(config: Config, costs: Costs) -> Speed:
    """Speed of the configured potential: as configured, or as learned. Raises :class:`InputError` if it is unknown."""
    if config.potential.atoms_per_second is not None:
        fit = Fit(coefficients=(1 / config.potential.atoms_per_second,), spread=0.0, hosts=0)
        return Speed(seconds=dict.fromkeys(KINDS, fit), start_s=START_S)
    device = config.potential.device.replace("auto", "cpu")
    key = speed_key(config, device)
    if key not in costs.speeds:
        raise InputError(
            f"potential.atoms_per_second: not known for {key!r} ({COSTS_FILE} knows {', '.join(costs.speeds)}); "
            "set it, or run one batch and then `defectnet costs`"
        )
    return costs.speeds[key]


def fill(hosts: Sequence[Host], config: Config) -> list[list[Host]]:
    """Batches of consecutive hosts, as large as ``hosts.batch_minutes`` allows the longest of their jobs to be."""
    costs = Costs.read(COSTS_FILE)
    speed = speed_of(config, costs)
    batches: list[list[Host]] = []
    spent = np.full(len(RECORD_STAGES), np.inf)
    for host in hosts:
        own = np.array(
            [seconds(load, costs, speed).mean for load in loads(Size.of(host, None, config), None, config, costs)]
        )
        if (spent + own).max() + speed.start_s > 60 * config.hosts.batch_minutes:
            batches.append([])
            spent = np.zeros_like(own)
        batches[-1].append(host)
        spent += own
    return batches
