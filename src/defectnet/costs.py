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
from functools import lru_cache
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from scipy.optimize import nnls
from scipy.special import ndtr

from defectnet.config import Config, Supercells
from defectnet.dopants import Candidate
from defectnet.errors import InputError
from defectnet.files import write_atomically
from defectnet.hosts.crystallography import general_positions, parse_sites
from defectnet.hosts.sheet import Host
from defectnet.layout import COSTS_FILE, RECORD_STAGES
from defectnet.seeds import generator
from defectnet.supercells import HostPlan, Plan, plan_substitutions

KINDS = ("relax_host", "phonons_host", "defect", "relax", "direct", "probed", "spectra")
"""Kinds of items whose work differs."""


class Fit(BaseModel):
    """A quantity proportional to known ones: Σ coefficients · terms, within a factor exp(±spread) for single hosts."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    coefficients: tuple[float, ...]
    spread: float
    hosts: int

    @classmethod
    def of(cls, observations: Sequence[tuple[str, Sequence[float], float]], guess: Sequence[float] = (1.0,)) -> Fit:
        """From (host, terms, value), errors relative; a single coefficient is the mean of value / term.

        Several are drawn towards the ``guess`` times one factor: cells of one size cannot tell terms apart.
        """
        terms = np.array([terms for _, terms, _ in observations], float)
        values = np.array([value for _, _, value in observations], float)
        typical = np.mean(values / (terms @ guess)) * np.array(guess)
        expected = terms @ typical
        towards = TRUST_IN_GUESS * np.eye(len(typical))
        shares = np.vstack([terms * typical / expected[:, None], towards])
        factors, _ = nnls(shares, np.append(values / expected, towards.sum(axis=0)))
        coefficients = factors * typical
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

    def above(self, limit: float, term: np.ndarray) -> np.ndarray:
        """Share of hosts whose quantity, of one ``term`` and log-normal, exceeds a limit; shape of ``term``."""
        with np.errstate(divide="ignore"):  # what is proportional to zero exceeds nothing
            return ndtr(np.log(self.coefficients[0] * term / limit) / self.spread)


START_S = 10.0
"""Assumed time to start a potential where no benchmark tells."""

DRAWS = 500
"""Arrangements that stand for those of hosts that have none yet."""

TRUST_IN_GUESS = 0.3
"""A guessed share of a term counts as this squared, observations as one: those scatter by a fifth, guesses twofold."""

REPEATED = 1.2
"""Atoms of repeated supercells over the least number, about."""

UNKNOWN_SPREAD = float(np.log(2.0))
"""Spread between hosts where only one was seen."""


GUESSES = {
    kind: Fit(coefficients=coefficients, spread=UNKNOWN_SPREAD, hosts=0)
    for kind, coefficients in {
        "relax_host": (10.0,),
        "phonons_host": (1.0,),
        "defect": (10.0, 1.0),
        "relax": (15.0,),
        "direct": (1.0,),
        "probed": (1.0,),
        "spectra": (1.6e-7, 6e-11),
    }.items()
}
"""Work where no record tells."""

GUESSED_SPEED = (10.0, 1.0)
"""An evaluation takes as long as so many atoms, besides its own ones: about that of SevenNet-0 on a CPU."""

GUESSED_ERROR = Fit(coefficients=(3.0,), spread=1.0, hosts=0)
"""Error of superposition per concentration where no record tells: about that of the demo's hosts."""

GUESSED_ERROR_PROBED = 0.3
"""Error above which probing misses where no record tells: about that of the demo's hosts."""


class Speed(BaseModel):
    """What a potential takes on a kind of device: seconds per evaluation and per atom-evaluation, and to start.

    forces  : of displaced and relaxing supercells
    products: the evaluations of Hessian-vector products in the stage that needs them, with all that belongs to them
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    forces: Fit
    products: Fit
    start_s: float


class Costs(BaseModel):
    """Everything that has been learned.

    work        : atom-evaluations per term of :func:`terms`, by kind; seconds for ``spectra``
    error       : of superposition, as a share of the doped-pristine signal, per :func:`other_dopants`
    error_probed: error above which probing, which starts from superposition, misses its tolerance
    speeds      : by ``potential model device``
    rules_s     : seconds per unit of the rules that need no potential, see :data:`RULE_UNITS`
    memory_mb   : peak of a process by stage, as (base, per atom)
    bytes       : size of a record by stage, per atom and spectrum
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    work: dict[str, Fit]
    error: Fit
    error_probed: float
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
    per_host = config.supercells.cells_per_host + superposition.superposed_per_host + superposition.mass_only_per_host
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

    n_sites, n_wide, n_primitive: atoms of its supercell, of that of its spectra, of its primitive cell
    orbits : element and 6/|S| of every inequivalent site, S being its symmetry
    defects: 6/|S| of the site of single defects that its candidates can make, and how many there are
    """

    n_sites: float
    n_wide: float
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
            empty = config.dopants.may_be_empty(elements)
            dopants = {element: wanted / len(elements) + (element in empty) for element in elements}
        else:
            dopants = Counter(candidate.replaces for candidate in plan.candidates)
        defects = tuple((needed, float(dopants[element])) for element, needed in orbits if dopants[element])
        cells, least = config.supercells, config.phonons.atoms_min
        n_sites = plan.n_sites if plan else 0.5 * (cells.atoms_min + cells.atoms_max)
        n_wide = REPEATED * max(least, n_sites) if least else n_sites
        return cls(n_sites, n_wide, n_primitive, orbits, defects)


def terms(kind: str, size: Size, config: Config, needed: float = 0.0) -> tuple[float, ...]:
    """What the work of one item is made of, in atom-evaluations.

    relax_host, relax: each step. phonons_host, defect (relaxation, then Hessian), direct: displaced supercells, for a
    doped one ``needed`` per atom. probed: the most products that are allowed, two evaluations each. spectra:
    diagonalisation, quadratic and cubic.
    """
    n, modes = size.n_sites, 3.0 * size.n_wide
    # There and back; forward only saves less where symmetry gives the way back.
    ways = 1.0 if config.phonons.displacements == "forward" else 2.0
    return {
        "relax_host": (size.n_primitive,),
        "phonons_host": (n * ways * sum(directions(orbit) for _, orbit in size.orbits),),
        "defect": (n, n * ways * displaced_of_defect(n, needed) * config.superposition.force_constants),
        "relax": (n,),
        "direct": (n * n * ways * needed / 2.0,),
        "probed": (2.0 * n * min(config.phonons.probes_max, 1.5 * n),),
        "spectra": (modes**2, modes**3),
    }[kind]


def directions(needed: float) -> float:
    """In how many directions one atom of an orbit is displaced for the force constants of a perfect crystal.

    Three for |S| = 1 (``needed`` = 6/|S| = 6), one for the highest symmetries. The power in between is that of 143
    crystals of 60 structure types; the sums over their orbits scatter around it by a factor of 1.4.
    """
    return max(1.0, 3.0 * (needed / 6.0) ** 0.3)


def displaced_of_defect(n: float, needed: float) -> float:
    """Displacements, one way, for the force constants of n atoms around a defect with site symmetry S, |S| = 6/needed.

    Half of 6N/|S|, and more for the atoms on mirror planes, whose number grows as the area: 32 and 432 atoms around a
    defect in diamond and 32 in rock salt. Supercells that are less symmetric than their crystal need up to five times
    as many.
    """
    share = needed / 6.0
    return 3.0 * n * share + 1.75 * n ** (2 / 3) * (share**0.5 - share)


def other_dopants(plan: Plan, n_sites: int) -> float:
    """Concentration, as a fraction, of the dopants besides the one that is looked at.

    Superposition is exact for a single dopant; what it neglects is proportional to the others.
    """
    return (len(plan.sites) - 1) / n_sites


def needed_displacements(size: Size, others: np.ndarray) -> np.ndarray:
    """Displaced supercells per atom of doped cells with ``others``, :func:`other_dopants`; of the same shape.

    A single dopant leaves the symmetry of its site. Each further one is taken to break it in half of the arrangements
    where it was left: random ones of five crystals, 32 to 216 atoms, need 0.4, 0.7, 0.9 and 1.0 of 6N for two to five.
    """
    single = sum(needed * count for needed, count in size.defects) / sum(count for _, count in size.defects)
    return 6.0 - (6.0 - single) * 0.5 ** (others * size.n_sites)


@lru_cache
def _drawn(settings: Supercells, candidates: int) -> np.ndarray:
    """:func:`other_dopants` of arrangements as they will be drawn."""
    n_sites, rng = settings.atoms_max, generator(0, "costs")
    dopants = [Candidate(f"dopant {number}", "host", "n", "user", 1.0) for number in range(candidates)]
    cells = (settings.of_cell(number % settings.cells_per_host) for number in range(DRAWS))
    plans = [plan_substitutions(["host"] * n_sites, dopants, cell, rng) for cell in cells]
    return np.array([other_dopants(plan, n_sites) for plan in plans])


@dataclass(frozen=True)
class Load:
    """Expected work of one host in one stage: (kind, atom-evaluations, or seconds of ``spectra``), and its spectra or
    records. Supercells have ``n_sites`` atoms.
    """

    stage: str
    parts: tuple[tuple[str, float], ...]
    results: float
    n_sites: float


def loads(size: Size, plan: HostPlan | None, config: Config, costs: Costs) -> list[Load]:
    """What a host takes in every stage that needs the potential."""
    empty = config.dopants.may_be_empty(element for element, _ in size.orbits)
    doped = len(plan.plans) if plan else config.supercells.cells_per_host
    cells, settings = config.supercells, config.superposition
    wanted = config.dopants.n_type + config.dopants.p_type + len(empty)
    superposable = config.needs_library and settings.force_constants
    direct = min(doped, config.phonons.direct_per_host) if superposable else doped
    others = np.array([other_dopants(one, plan.n_sites) for one in plan.plans]) if plan else _drawn(cells, wanted)
    of_direct, of_probed = (others[:direct], others[direct:]) if plan else (others, others)

    def work(kind: str, count: float = 1.0, needed: float = 0.0) -> tuple[str, float]:
        return kind, count * costs.work[kind](terms(kind, size, config, needed))

    def by_differences(count: float, others: np.ndarray, share: np.ndarray | float = 1.0) -> tuple[str, float]:
        """All force constants of ``count`` supercells like these, or of a share of each."""
        return work("direct", count, np.mean(share * needed_displacements(size, others)) if count else 0.0)

    def missed(others: np.ndarray) -> np.ndarray:
        return costs.error.above(costs.error_probed, others)

    host = [work("relax_host"), work("phonons_host")]
    defects = [work("defect", count, needed) for needed, count in size.defects] if config.needs_library else []
    if not config.needs_library:  # then the host's own phonons come with those of its doped supercells
        of_library, of_relax, of_phonons = [], host[:1], host[1:]
    else:
        of_library, of_relax, of_phonons = [*host, *defects], [], []
    if config.phonons.atoms_min is not None:
        of_phonons.append(work("phonons_host", size.n_wide / size.n_sites))
    # Besides those that are asked for, every single substitution has two: of its mass only and of the whole defect.
    singles = sum(count for _, count in size.defects)
    responses = singles * (2 if superposable else 1)
    spectra = settings.superposed_per_host + settings.mass_only_per_host + responses
    probed = [work("probed", doped - direct), by_differences(doped - direct, of_probed, missed(of_probed))]
    return [
        Load("library", tuple(of_library), singles if config.needs_library else 0, size.n_sites),
        Load("relax", (*of_relax, work("relax", doped)), 1 + doped, size.n_sites),
        Load("phonons", (*of_phonons, by_differences(direct, of_direct), *probed), 1 + doped, size.n_sites),
        Load("superposed", (work("spectra", spectra),), spectra, size.n_sites),
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
            rate = speed.products if kind == "probed" else speed.forces
            mean, spread = amount * rate((1.0 / load.n_sites, 1.0)), float(np.hypot(spread, rate.spread))
        total += Seconds(mean, mean * np.exp(-spread), mean * np.exp(spread))
    return total


def speed_key(config: Config, device: str) -> str:
    """Name of a potential on a kind of device, such as ``sevennet 7net-0 cpu``."""
    return f"{config.potential.name} {config.potential.checkpoint or config.potential.model} {device.split(':')[0]}"


def speed_of(config: Config, costs: Costs) -> Speed:
    """Speed of the configured potential: as configured, or as learned. Raises :class:`InputError` if it is unknown."""
    if config.potential.atoms_per_second is not None:
        fit = Fit(coefficients=(0.0, 1 / config.potential.atoms_per_second), spread=0.0, hosts=0)
        return Speed(forces=fit, products=fit, start_s=START_S)
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
