"""How well `defectnet plan` foresees a host that it has not learned from.

    .venvs/main/bin/python tests/bench/plan.py config/config.yaml [MORE.yaml ...]

For each host of the finished runs with these configurations: costs are learned from all other hosts, the work of this
one is predicted from its row of the sheet (its dopants unknown) and from its plan, and compared with the time that its
records took. The last lines are sums over the hosts of each run.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

from defectnet.batches import assign
from defectnet.calibration import Calibration
from defectnet.config import load_config
from defectnet.costs import Size, loads, seconds, speed_of
from defectnet.hosts.sheet import read_sheet
from defectnet.layout import RECORD_STAGES, Layout
from defectnet.records import read_header
from defectnet.supercells import read_plans


def main(paths: list[str]) -> None:
    """See the module's docstring."""
    runs = []
    for path in paths:
        config = load_config(path)
        runs.append((config, read_sheet(config.hosts.sheet)))
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    print(f"{'run':<12}{'host':<18}{'stage':<12}{'taken s':>9}{'by row':>9}{'by plan':>9}")
    for config, hosts in runs:
        layout = Layout(Path(config.run.results))
        batch_of = {host: name for name, ids in assign(hosts, config).items() for host in ids}
        for host in hosts:
            learned = Calibration()
            for other, others in runs:
                if left := [row for row in others if other is not config or row.id != host.id]:
                    learned.observe(other, left, assign(others, other))
            costs = learned.costs()
            speed = speed_of(config, costs)
            plan = read_plans(layout.batch("supercells", batch_of[host.id]))[0][host.id]
            ways = [loads(Size.of(host, one, config), one, config, costs) for one in (None, plan)]
            taken = dict.fromkeys(RECORD_STAGES, 0.0)
            for record in layout.records.glob(f"*/{host.id}/*.h5"):
                header = read_header(record)
                # What the library stage makes for the stages behind it is counted where it is made.
                early = config.needs_library and header["item"] == "pristine"
                taken["library" if early else header["stage"]] += header["cost"]["wall_s"]
            told = {stage: [taken[stage]] for stage in RECORD_STAGES}
            for way in ways:
                for load in way:
                    told[load.stage].append(seconds(load, costs, speed).mean)
            told["all"] = [sum(values) for values in zip(*told.values(), strict=True)]
            for stage, values in told.items():
                print(f"{config.run.name:<12}{host.id:<18}{stage:<12}" + "".join(f"{value:9.1f}" for value in values))
                if stage == "all":
                    totals[config.run.name] = [a + b for a, b in zip(totals[config.run.name], values, strict=True)]
    for name, (taken_s, by_row, by_plan) in totals.items():
        print(f"{name}: taken {taken_s:.0f} s; by row x {by_row / taken_s:.2f}, by plan x {by_plan / taken_s:.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
