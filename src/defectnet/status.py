"""How far a run has come, from what is on disk while jobs write it.

Manifests count as they stand. A batch without one is counted by the headers of its records, but only of those written
since the configuration was first used here: whether older ones still apply is known once their job has run. Nothing is
locked or written, and a file that vanishes, is half written or damaged is no error.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from defectnet.batches import assign
from defectnet.config import Config, config_path
from defectnet.errors import RecordError
from defectnet.expected import expected_items
from defectnet.hosts.sheet import Host
from defectnet.layout import FIGURES, RECORD_STAGES, Layout
from defectnet.records import Entry, read_header, read_manifest
from defectnet.supercells import HostPlan, read_plans

RECENT_S = 3600.0
"""What counts as now in a rate."""

HEADERS_TIMED = 25
"""Headers per stage that are read to learn what a record costs."""

LINES_MAX = 15
"""Most lines of each list that are shown; JSON has them all."""


@dataclass(frozen=True)
class Stage:
    """Progress of one stage, counted in ``unit``: hosts, records or files.

    expected = done + failed + skipped + missing. Rates count records written per hour, in the last hour and since the
    run began.
    """

    stage: str
    unit: str
    expected: int
    done: int
    failed: int = 0
    skipped: int = 0
    missing: int = 0
    batches: int = 0
    batches_finished: int = 0
    per_hour_now: float = 0.0
    per_hour_overall: float = 0.0


@dataclass(frozen=True)
class Trouble:
    """Failed and skipped items with one cause, whatever the numbers in it.

    stages: where, with the number of items. reason, host, item: those of the first.
    """

    count: int
    stages: dict[str, int]
    reason: str
    host: str
    item: str


@dataclass(frozen=True)
class Unfinished:
    """Forces of displaced structures that a job has computed so far, or had when it was stopped ``idle_s`` ago.

    ``item`` is the first one of its host that has no record, where its job should be; None if all have one.
    """

    stage: str
    host: str
    item: str | None
    structures: int | None
    structures_total: int | None
    idle_s: float


@dataclass(frozen=True)
class Status:
    """A run at one moment; times are ISO 8601 in UTC.

    began: when this configuration was first used here. earlier: records from before, of batches without a manifest,
    which are counted nowhere. eta_s: seconds left to the last record, None if unknown; eta_excludes: stages that it
    knows no cost of. disk_bytes: by folder. notes: what to keep in mind, eta_s included.
    """

    run: str
    results: str
    time: str
    began: str | None
    last_record: str | None
    hosts: int
    hosts_planned: int
    stages: list[Stage]
    troubles: list[Trouble]
    unfinished: list[Unfinished]
    eta_s: float | None
    eta_excludes: list[str]
    disk_bytes: dict[str, int]
    damaged: int
    earlier: int
    notes: list[str]


def survey(config: Config, hosts: Sequence[Host], layout: Layout, now: float) -> Status:
    """The status of a run at the time ``now``, in seconds since the epoch."""
    batches = assign(hosts, config)
    files = _Files.below(layout.results)
    began = files.configs.get(config_path(config, layout.configs).name)
    plans: dict[str, HostPlan] = {}
    refused: dict[str, str] = {}
    for batch in batches:
        if ("supercells", batch) in files.manifests:
            with suppress(RecordError):
                made, failed = read_plans(layout.batch("supercells", batch))
                plans |= made
                refused |= failed
    known = len(plans) + len(refused)
    tallies = {stage: _tally(stage, batches, plans, config, layout, files, began or 0.0) for stage in RECORD_STAGES}

    made = {stage: [batch for batch in batches if (stage, batch) in files.manifests] for stage in _LIGHT}
    recommended = sum(len(batches[batch]) for batch in made["dopants"])
    stages = [
        Stage(stage, "hosts", len(hosts), done, failed, 0, len(hosts) - done - failed, len(batches), len(made[stage]))
        for stage, done, failed in (("dopants", recommended, 0), ("supercells", len(plans), len(refused)))
    ]
    times = {stage: files.times(stage, began or 0.0) for stage in RECORD_STAGES}
    start = began or min((min(times[stage]) for stage in times if times[stage]), default=now)
    last = max((max(times[stage]) for stage in times if times[stage]), default=None)
    for stage, tally in tallies.items():
        states = tally.states
        # Hosts without a plan are taken for the mean of those that have one.
        missing = states["missing"] + (round(tally.expected * (len(hosts) - known) / len(plans)) if plans else 0)
        counted = (states["done"], states["failed"], states["skipped"], missing)
        recent = sum(time > now - RECENT_S for time in times[stage]) / max(min(RECENT_S, now - start), 1.0)
        overall = len(times[stage]) / max((last or now) - start, 1.0)
        rates = (3600 * recent, 3600 * overall)
        stages.append(Stage(stage, "records", sum(counted), *counted, len(batches), tally.batches_finished, *rates))
    outputs = {
        "dataset": [layout.dataset],
        "train": [model / "checkpoint.pt" for model in layout.models(config.training)],
        "evaluate": [layout.metrics, layout.predictions],
        "figures": [layout.figure(name) for name in FIGURES],
    }
    for stage, paths in outputs.items():
        done = sum(path.exists() for path in paths)
        stages.append(Stage(stage, "files", len(paths), done, missing=len(paths) - done))

    troubles = [("supercells", Entry(host, "plan", "failed", reason=reason)) for host, reason in refused.items()]
    troubles += [(stage, entry) for stage, tally in tallies.items() for entry in tally.troubles]
    costs = {stage: files.seconds_per_record(stage, began or 0.0) for stage in RECORD_STAGES}
    eta, excluded, assumed = None, [], ""
    if known:
        eta, excluded, assumed = _eta([stage for stage in stages if stage.unit == "records"], costs)
    earlier = sum(tally.earlier for tally in tallies.values())
    notes = list(_notes(config, layout, files, batches, began, earlier, len(hosts) - known))
    return Status(
        run=config.run.name,
        results=str(layout.results),
        time=_iso(now),
        began=began and _iso(began),
        last_record=last and _iso(last),
        hosts=len(hosts),
        hosts_planned=len(plans),
        stages=stages,
        troubles=_grouped(troubles),
        unfinished=sorted(_unfinished(files, tallies, now), key=lambda one: one.idle_s),
        eta_s=eta,
        eta_excludes=excluded,
        disk_bytes=dict(sorted(files.sizes.items())),
        damaged=files.damaged,
        earlier=earlier,
        notes=[assumed, *notes] if assumed else notes,
    )


_LIGHT = ("dopants", "supercells")


@dataclass
class _Files:
    """What lies below a results directory: times of modification, paths, sizes."""

    records: dict[tuple[str, str], list[tuple[float, Path]]] = field(default_factory=lambda: defaultdict(list))
    partial: list[tuple[str, str, float, Path]] = field(default_factory=list)
    manifests: dict[tuple[str, str], float] = field(default_factory=dict)
    configs: dict[str, float] = field(default_factory=dict)
    sizes: Counter[str] = field(default_factory=Counter)
    damaged: int = 0

    @classmethod
    def below(cls, results: Path) -> _Files:
        """Everything that is there; temporary files count by their size only."""
        files = cls()
        for *folders, name, path, stat in _walk(str(results)):
            of = folders[:2] if folders[:1] == ["records"] else folders[:1]
            files.sizes["/".join(of) or "."] += 512 * stat.st_blocks
            match folders:
                case ["records", stage, host] if name.endswith(".h5"):
                    files.records[stage, host].append((stat.st_mtime, Path(path)))
                case ["records", stage, host] if name.endswith(".partial.npy"):
                    files.partial.append((stage, host, stat.st_mtime, Path(path)))
                case ["records", _, _] if name.endswith(".damaged"):
                    files.damaged += 1
                case ["configs"]:
                    files.configs[name] = stat.st_mtime
                case [stage] if name.endswith(".json"):
                    files.manifests[stage, name.removesuffix(".json")] = stat.st_mtime
        return files

    def times(self, stage: str, since: float) -> list[float]:
        """When the records of a stage were written."""
        return [time for (of, _), found in self.records.items() if of == stage for time, _ in found if time >= since]

    def seconds_per_record(self, stage: str, since: float) -> float | None:
        """Mean computing time of a record, from a few of them evenly spread over time; None without any."""
        found = sorted(one for (of, _), some in self.records.items() if of == stage for one in some if one[0] >= since)
        seconds = []
        for number in sorted(set(np.linspace(0, len(found) - 1, HEADERS_TIMED).astype(int))) if found else []:
            with suppress(RecordError, FileNotFoundError):
                seconds.append(read_header(found[number][1])["cost"]["wall_s"])
        return float(np.mean(seconds)) if seconds else None


def _walk(folder: str, *folders: str) -> Iterator[tuple]:
    """Names of the folders of every visible file, its own name, its path and its stat."""
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # it was there a moment ago
                if entry.is_dir(follow_symlinks=False):
                    yield from _walk(entry.path, *folders, entry.name)
                else:
                    yield *folders, entry.name, entry.path, entry.stat(follow_symlinks=False)


@dataclass
class _Tally:
    """What became of the items of one stage: how many are in which state, what went wrong, who waits for which."""

    states: Counter[str] = field(default_factory=Counter)
    troubles: list[Entry] = field(default_factory=list)
    next_items: dict[str, str] = field(default_factory=dict)
    expected: int = 0
    batches_finished: int = 0
    earlier: int = 0


def _tally(
    stage: str,
    batches: Mapping[str, Sequence[str]],
    plans: Mapping[str, HostPlan],
    config: Config,
    layout: Layout,
    files: _Files,
    since: float,
) -> _Tally:
    tally = _Tally()
    for batch, members in batches.items():
        lines = None
        if (stage, batch) in files.manifests:
            with suppress(RecordError):
                lines = read_manifest(layout.batch(stage, batch))
        tally.batches_finished += lines is not None
        for host in members:
            if lines is not None:
                known = {line.item: line for line in lines if line.host == host}
            else:
                known = _on_record(files, stage, host, since, tally)
            tally.states.update(entry.status for entry in known.values())
            tally.troubles += [entry for entry in known.values() if entry.status != "done"]
            if host not in plans:
                continue
            expected = expected_items(config, plans[host])[stage]
            if lines is not None:  # it says what could not be made; it may be of a plan with fewer items
                expected = [item for item in expected if _kind(item) in set(map(_kind, known))]
            missing = [item for item in expected if item not in known]
            tally.expected += len(expected)
            tally.states["missing"] += len(missing)
            if missing:
                tally.next_items[host] = missing[0]
    return tally


def _kind(item: str) -> str:
    return "defect" if "@" in item else item.split("-")[0]


def _on_record(files: _Files, stage: str, host: str, since: float, tally: _Tally) -> dict[str, Entry]:
    """The newest record of every item."""
    known = {}
    for time, path in sorted(files.records[stage, host]):
        if time < since:
            tally.earlier += 1
            continue
        try:
            header = read_header(path)
        except FileNotFoundError:
            continue
        except RecordError:
            files.damaged += 1
            continue
        item, status = header["item"], header["status"]
        known[item] = Entry(host, item, status, reason=header.get("reason", ""))
    return known


def _grouped(troubles: Sequence[tuple[str, Entry]]) -> list[Trouble]:
    """One line per cause, most frequent first."""
    groups: dict[str, list[tuple[str, Entry]]] = defaultdict(list)
    for stage, entry in troubles:
        cause = re.sub(r"^(pristine host: |relaxation: )+", "", entry.reason)
        cause = re.sub(rf"\b{re.escape(entry.host)}\b", "", cause)
        groups[re.sub(r"\d+(\.\d+)?(e[-+]?\d+)?", "#", cause)].append((stage, entry))
    made = []
    for members in groups.values():
        first = members[0][1]
        made.append(
            Trouble(len(members), dict(Counter(stage for stage, _ in members)), first.reason, first.host, first.item)
        )
    return sorted(made, key=lambda trouble: -trouble.count)


def _unfinished(files: _Files, tallies: Mapping[str, _Tally], now: float) -> Iterator[Unfinished]:
    for stage, host, time, path in files.partial:
        done = total = None
        with suppress(OSError, ValueError, IndexError):
            forces = np.load(path, mmap_mode="r")
            done, total = int(np.isfinite(forces[:, 0, 0]).sum()), len(forces)
        item = tallies[stage].next_items.get(host) if stage in tallies else None
        yield Unfinished(stage, host, item, done, total, max(now - time, 0.0))


def _eta(stages: Sequence[Stage], costs: Mapping[str, float | None]) -> tuple[float | None, list[str], str]:
    """Seconds left, the stages that are not in it, and what was assumed."""
    waiting = [stage for stage in stages if stage.missing]
    if not waiting:
        return 0.0, [], ""
    excluded = [stage.stage for stage in waiting if costs[stage.stage] is None]
    work = sum(stage.missing * (costs[stage.stage] or 0.0) for stage in waiting)
    for rates, told in (
        ([stage.per_hour_now for stage in stages], "in the last hour"),
        ([stage.per_hour_overall for stage in stages], "on average, pauses included, as nothing was finished lately"),
    ):
        pace = sum(rate / 3600 * (costs[stage.stage] or 0.0) for rate, stage in zip(rates, stages, strict=True))
        if pace > 0 and work > 0:
            return (
                work / pace,
                excluded,
                f"Time left: if {pace:.1f} jobs compute side by side as they did {told}, if the records of a stage go "
                "on costing what they did and nothing has to be computed twice; training and report not included.",
            )
    return None, excluded, ""


def _notes(
    config: Config,
    layout: Layout,
    files: _Files,
    batches: Mapping[str, Sequence[str]],
    began: float | None,
    earlier: int,
    unplanned: int,
) -> Iterator[str]:
    if began is None:
        yield (
            f"No workflow with exactly this configuration has run in {layout.results}: everything found is counted. "
            f"The configurations that were used are in {layout.configs}."
        )
    else:
        older = sum(
            files.manifests.get((stage, batch), began) < began
            for stage in (*_LIGHT, *RECORD_STAGES)
            for batch in batches
        )
        if older:
            yield (
                f"{older} manifests are older than the first use of this configuration; they count as they stand, and "
                "`snakemake -n` says which of them will be made again."
            )
    if earlier:
        yield (
            f"{earlier} records of batches without a manifest are older than the first use of this configuration and "
            "are not counted; jobs find those that still apply."
        )
    if unplanned:
        yield f"{unplanned} hosts have no plan yet; what they will need is estimated from those that have one."
    if files.damaged:
        yield f"{files.damaged} damaged records; their jobs compute them again."


def show(status: Status, console: Console) -> None:
    """Print a status: tables on a terminal, plain columns elsewhere."""
    style = {"box": SIMPLE_HEAD if console.is_terminal else None, "pad_edge": False, "title_justify": "left"}
    ago = (
        f"last record {_duration(_seconds(status.last_record, status.time))} ago" if status.last_record else "no record"
    )
    console.print(f"{status.run} in {status.results}, {status.time}: {status.hosts:,} hosts, {ago}\n", highlight=False)

    table = Table("stage", "of", **style)
    for column in ("expected", "done", "failed", "skipped", "missing", "%", "batches", "per h now", "overall"):
        table.add_column(column, justify="right")
    for stage in status.stages:
        over = stage.expected - stage.missing
        percent = f"{100 * over / stage.expected:.0f}" if stage.expected else ""
        batches = f"{stage.batches_finished}/{stage.batches}" if stage.batches else ""
        rates = [f"{rate:,.4g}" for rate in (stage.per_hour_now, stage.per_hour_overall)]
        counts = (stage.expected, stage.done, stage.failed, stage.skipped, stage.missing)
        numbers = [f"{count:,}" for count in counts]
        table.add_row(stage.stage, stage.unit, *numbers, percent, batches, *(rates if stage.unit == "records" else ()))
    console.print(table)

    if status.troubles:
        table = Table("items", "stages", "reason", "first", title="\nfailed and skipped", **style)
        for trouble in status.troubles[:LINES_MAX]:
            where = ", ".join(trouble.stages)
            table.add_row(str(trouble.count), where, trouble.reason, f"{trouble.host} {trouble.item}")
        console.print(table)
        _more(len(status.troubles), "reasons", console)
    if status.unfinished:
        table = Table("stage", "host", "item", "structures", "idle", title="\nforces so far", **style)
        for one in status.unfinished[:LINES_MAX]:
            rows = "" if one.structures is None else f"{one.structures} of {one.structures_total}"
            table.add_row(one.stage, one.host, one.item or "", rows, _duration(one.idle_s))
        console.print(table)
        _more(len(status.unfinished), "items", console)

    left = "unknown" if status.eta_s is None else _duration(status.eta_s)
    if status.eta_excludes:
        left += f", without {', '.join(status.eta_excludes)}, of which no record says what one costs"
    disk = sum(status.disk_bytes.values())
    records = sum(size for folder, size in status.disk_bytes.items() if folder.startswith("records"))
    console.print(
        f"\nTime left: {left}", f"Disk: {_size(disk)}, {_size(records)} of it records", sep="\n", highlight=False
    )
    for note in status.notes:
        console.print(note, highlight=False)


def _more(total: int, what: str, console: Console) -> None:
    if total > LINES_MAX:
        console.print(f"{total - LINES_MAX} more {what}: --json lists them all", highlight=False)


def _iso(time: float) -> str:
    return datetime.fromtimestamp(time, UTC).isoformat(timespec="seconds")


def _seconds(earlier: str, later: str) -> float:
    return (datetime.fromisoformat(later) - datetime.fromisoformat(earlier)).total_seconds()


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    if minutes < 120:
        return f"{minutes} min"
    hours = round(seconds / 3600)
    return f"{hours} h" if hours < 72 else f"{round(hours / 24)} days"


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
