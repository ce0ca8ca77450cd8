"""Everything that can be found wrong before expensive work starts."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from pymatgen.core import Composition

from defectnet.config import Config, Potential
from defectnet.dataset.schema import Dataset
from defectnet.dopants import recommend
from defectnet.errors import InputError
from defectnet.hosts.sheet import check_hosts, read_sheet
from defectnet.layout import Layout
from defectnet.phonons.pdos import energy_edges
from defectnet.screening import read_dropped


def check(settings: Config, *, with_potential: bool = True) -> Iterator[str]:
    """Check hosts, overrides, potential or the dataset that is given, and networks that something starts from.

    Yields what was found, line by line.

    Raises :class:`InputError` that names file, field and remedy.
    """
    if settings.training.pretrained is not None:
        yield check_pretrained(settings)
    if settings.run.models is not None:
        yield check_models(settings)
    for path in (settings.run.dataset, settings.run.other_potential):
        if path is not None:
            with Dataset(Path(path)) as data:
                yield f"{path}: {len(data.spectra.id)} spectra of {len(data.hosts.id)} hosts"
    if settings.run.dataset is not None:
        return
    hosts = read_sheet(settings.hosts.sheet)
    check_hosts(hosts, settings.hosts.sheet, settings.hosts.vocabulary)
    yield f"{settings.hosts.sheet}: {len(hosts)} hosts are sound"
    by_id = {host.id: host for host in hosts}
    present = {element.symbol for host in hosts for element in Composition(host.formula).elements}
    if absent := sorted(set(settings.dopants.vacancies) - present - {"all"}):
        raise InputError(
            f"dopants.vacancies: no host of {settings.hosts.sheet} contains {', '.join(absent)}; name elements of "
            "hosts, or [all]"
        )
    for host_id in settings.dopants.overrides:
        if host_id not in by_id:
            raise InputError(f"dopants.overrides.{host_id}: {settings.hosts.sheet} has no host with this id")
        recommend(by_id[host_id].build(), host_id, settings.dopants, settings.hosts.vocabulary)
    if settings.dopants.screened is not None:
        dropped = read_dropped(Path(settings.dopants.screened))
        yield f"{settings.dopants.screened}: drops {sum(map(len, dropped.values()))} candidates"
    if settings.relaxation.start == "definet":
        yield check_definet(Path(settings.relaxation.definet))
    if with_potential:
        yield check_potential(settings.potential)


def check_pretrained(settings: Config) -> str:
    """Whether the network that fine-tuning starts from can see the spectra of this run; returns what it is."""
    from defectnet.training.fit import load_checkpoint, require_same_grid

    path = Path(settings.training.pretrained)
    network = load_checkpoint(path)
    if settings.run.dataset is None:
        require_same_grid(network, energy_edges(settings.spectra), "the block spectra")
    about = network.about
    return f"{path}: network {network.network}, trained on spectra of {', '.join(about['potentials'])}"


def check_models(settings: Config) -> str:
    """Whether all networks that are to be evaluated are there; returns how many."""
    from defectnet.training.fit import load_checkpoint

    models = Layout.of(settings).models(settings.training)
    for model in models:
        load_checkpoint(model / "checkpoint.pt")
    return f"{settings.run.models}: {len(models)} networks"


def check_definet(path: Path) -> str:
    """Whether the network that relaxations start from can be read; returns what it is."""
    from defectnet.definet.fit import load_trained

    settings = load_trained(path).about["settings"]
    return f"{path}: network for relaxations, {settings['layers']} layers, {settings['scalars']} scalar channels"


def check_potential(settings: Potential) -> str:
    """Ask the potential's own interpreter whether it finds package and weights; returns what identifies them."""
    if shutil.which(settings.python) is None:
        raise InputError(
            f"potential.python: {settings.python}: no such interpreter; run `make envs`, or name the interpreter of an "
            f"environment that has defectnet and the potential {settings.name}"
        )
    command = [settings.python, "-m", "defectnet", "potentials", "identify", "--json", settings.model_dump_json()]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        lines = answer.stderr.strip().splitlines() or ["it said nothing"]
        said = [line for line in lines if line.startswith("error: ")] or lines[-1:]
        raise InputError(f"{said[0].removeprefix('error: ')} (asked {settings.python})")
    return answer.stdout.strip()
