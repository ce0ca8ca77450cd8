"""What a run will take, told before anything is submitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from defectnet.batches import assign
from defectnet.config import Config
from defectnet.costs import Costs, Seconds, Size, loads, seconds, speed_of, units
from defectnet.errors import InputError
from defectnet.hosts.sheet import Host
from defectnet.layout import FIGURES, RECORD_STAGES, Layout
from defectnet.supercells import HostPlan, read_plans

RULE_OF_STAGE = {"library": "library", "relax": "relax", "phonons": "phonons", "superposed": "superpose"}


@dataclass(frozen=True)
class RulePlan:
    """What is left of one rule.

    jobs, done  : still to run, and finished
    potential   : whether its jobs use a GPU where there is one
    hours       : of all its jobs together; low and high where single hosts differ as those seen so far
    longest_h   : of its longest job
    memory_mb   : peak of a process, disk_mb of everything it makes; None where nothing is known
    """

    rule: str
    jobs: int
    done: int
    potential: bool
    hours: float
    hours_low: float
    hours_high: float
    longest_h: float
    memory_mb: float | None = None
    disk_mb: float | None = None


@dataclass(frozen=True)
class CampaignPlan:
    """What is left of a run; ``hosts_done`` are through all stages of :data:`~defectnet.layout.RECORD_STAGES`."""

    run: str
    hosts: int
    hosts_done: int
    batches: int
    rules: list[RulePlan]


def plan(config: Config, hosts: Sequence[Host], layout: Layout, costs: Costs) -> CampaignPlan:
    """What is left to do. Hosts whose supercells are planned are counted by their plans, others by their rows."""
    batches = assign(hosts, config)
    made = {
        stage: {name for name in batches if layout.batch(stage, name).exists()}
        for stage in ("dopants", "supercells", *RECORD_STAGES)
    }
    plans: dict[str, HostPlan] = {}
    unfit: dict[str, str] = {}
    for name in made["supercells"]:
        known, failed = read_plans(layout.batch("supercells", name))
        plans |= known
        unfit |= failed
    wanted = [host for host in hosts if host.id not in unfit]

    def light(rule: str, jobs: int, done: int) -> RulePlan:
        each = costs.rules_s.get(rule, 0.0) * units(rule, config, hosts, len(batches)) / 3600
        return RulePlan(rule, jobs, done, rule == "train", *(3 * (jobs * each,)), each if jobs else 0.0)

    def of_batches(rule: str) -> RulePlan:
        return light(rule, len(batches) - len(made[rule]), len(made[rule]))

    def single(rule: str, path: Path) -> RulePlan:
        return light(rule, int(not path.exists()), int(path.exists()))

    models = layout.models(config.training)
    trained = [(model / "checkpoint.pt").exists() for model in models]
    return CampaignPlan(
        config.run.name,
        len(hosts),
        sum(len(ids) for name, ids in batches.items() if all(name in made[stage] for stage in RECORD_STAGES)),
        len(batches),
        [
            of_batches("dopants"),
            of_batches("supercells"),
            *_potential_rules(config, wanted, plans, batches, made, costs),
            single("dataset", layout.dataset),
            light("train", trained.count(False), trained.count(True)),
            single("evaluate", layout.metrics),
            single("figures", layout.figure(FIGURES[0])),
        ],
    )


def _potential_rules(
    config: Config,
    hosts: Sequence[Host],
    plans: Mapping[str, HostPlan],
    batches: Mapping[str, Sequence[str]],
    made: Mapping[str, set[str]],
    costs: Costs,
) -> list[RulePlan]:
    speed = speed_of(config, costs)
    sizes = {host.id: Size.of(host, plans.get(host.id), config) for host in hosts}
    of_hosts = {name: loads(size, plans.get(name), config, costs) for name, size in sizes.items()}
    rules = []
    for number, stage in enumerate(RECORD_STAGES):
        jobs, disk_mb, largest = [], 0.0, 0.0
        for name, ids in batches.items():
            if name in made[stage]:
                continue
            job = Seconds(speed.start_s, speed.start_s, speed.start_s)
            for host_id in ids:
                if host_id in sizes:
                    load, size = of_hosts[host_id][number], sizes[host_id]
                    atoms = size.n_wide if stage == "superposed" else size.n_sites
                    job += seconds(load, costs, speed)
                    disk_mb += load.results * atoms * costs.bytes.get(stage, 0.0) / 1e6
                    largest = max(largest, atoms)
            jobs.append(job)
        base, per_atom = costs.memory_mb.get(stage, (0.0, 0.0))
        total = sum(jobs, Seconds(0.0, 0.0, 0.0))
        rules.append(
            RulePlan(
                RULE_OF_STAGE[stage],
                len(jobs),
                len(made[stage]),
                True,
                *(value / 3600 for value in (total.mean, total.low, total.high)),
                max((job.mean for job in jobs), default=0.0) / 3600,
                base + per_atom * largest if jobs and stage in costs.memory_mb else None,
                disk_mb if stage in costs.bytes else None,
            )
        )
    return rules


def show(planned: CampaignPlan, console: Console) -> None:
    """Print a plan as a table."""
    title = f"{planned.run}: {planned.hosts} hosts in {planned.batches} batches, {planned.hosts_done} done"
    table = Table("rule", "jobs", "done", "hours", "longest job (h)", "memory (MB)", "disk (MB)", title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for rule in planned.rules:
        spread = rule.hours_low < rule.hours_high
        table.add_row(
            rule.rule + (" *" if rule.potential else ""),
            f"{rule.jobs:,}",
            f"{rule.done:,}",
            f"{rule.hours:.4g}" + (f" ({rule.hours_low:.3g} to {rule.hours_high:.3g})" if spread else ""),
            f"{rule.longest_h:.3g}",
            "" if rule.memory_mb is None else f"{rule.memory_mb:.0f}",
            "" if rule.disk_mb is None else f"{rule.disk_mb:,.0f}",
        )
    console.print(table)
    for what, chosen in (("GPU-hours, or core-hours without GPUs (*)", True), ("core-hours of the rest", False)):
        rules = [rule for rule in planned.rules if rule.potential is chosen]
        mean, low, high = (sum(getattr(rule, name) for rule in rules) for name in ("hours", "hours_low", "hours_high"))
        console.print(f"{what}: {mean:.4g} ({low:.3g} to {high:.3g})", highlight=False)
    console.print(f"jobs: {sum(rule.jobs for rule in planned.rules):,}", highlight=False)


def limits_exceeded(planned: CampaignPlan, profile: Path) -> list[str]:
    """Where jobs will hit limits of a Snakemake profile, with the remedy. Raises :class:`InputError` if unreadable."""
    settings = _read_profile(profile / "config.yaml")
    attempts = 1 + int(settings.get("retries", 0))
    told = []
    for rule in planned.rules:
        resources = (settings.get("default-resources") or {}) | (settings.get("set-resources") or {}).get(rule.rule, {})
        where = f"{profile}/config.yaml: {rule.rule}"
        if "runtime" in resources and rule.jobs:
            minutes = [_resource(resources["runtime"], attempt, where) for attempt in range(1, attempts + 1)]
            if 60 * rule.longest_h > sum(minutes):
                told.append(
                    f"{where}: its longest job takes about {rule.longest_h:.1f} h, all {attempts} attempts together "
                    f"{sum(minutes) / 60:.1f} h; lower hosts.per_batch or raise runtime"
                )
        if "mem_mb" in resources and rule.memory_mb:
            memory = _resource(resources["mem_mb"], attempts, where)
            if rule.memory_mb > memory:
                told.append(f"{where}: needs about {rule.memory_mb:.0f} MB and gets {memory:.0f} MB; raise mem_mb")
    return told


def _read_profile(path: Path) -> dict[str, Any]:
    try:
        settings = YAML(typ="safe").load(path.read_text())
    except (OSError, YAMLError) as error:
        raise InputError(
            f"--profile: {path} cannot be read ({error}); name the folder of a Snakemake profile"
        ) from None
    if not isinstance(settings, dict):
        raise InputError(f"--profile: {path} holds no settings; name the folder of a Snakemake profile")
    return settings


def _resource(value: Any, attempt: int, where: str) -> float:
    """A number, or an expression of ``attempt``, which Snakemake evaluates as Python as well."""
    try:
        return float(eval(str(value), {"attempt": attempt, "min": min, "max": max}))
    except Exception as error:
        raise InputError(f"{where}: {value!r} is no number or expression of attempt ({error}); correct it") from None
