"""``defectnet hosts``: make, check and look at host sheets."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from defectnet.errors import InputError

if TYPE_CHECKING:
    from defectnet.config import Config
    from defectnet.hosts.disorder import Disorder
    from defectnet.hosts.filters import Candidates, Rejection
    from defectnet.hosts.sheet import Host

app = typer.Typer(no_args_is_help=True, help="Make, check and look at host sheets.")

SHEET = Annotated[Path, typer.Argument(help="Host sheet.")]


CONFIG = Annotated[Path | None, typer.Option(help="Configuration whose hosts.vocabulary and run.seed count.")]


class Source(StrEnum):
    """Where candidates come from."""

    CURATED = "curated"
    DIRECTORY = "directory"
    EXTXYZ = "extxyz"
    SNUMAT = "snumat"
    OPTIMADE_FILE = "optimade-file"
    OPTIMADE = "optimade"
    MATERIALS_PROJECT = "materials-project"


@app.command()
def select(
    source: Annotated[Source, typer.Option(help="Kind of candidates.")] = Source.CURATED,
    path: Annotated[
        Path | None,
        typer.Option(
            help="Sheet, directory, archive, extended-xyz or JSON-lines file; curated has one of its own. "
            "For databases the folder that keeps their answers, results/downloads by default."
        ),
    ] = None,
    config_type: Annotated[
        list[str] | None, typer.Option(help="Kind of structures to take from an extended-xyz file; repeat; else all.")
    ] = None,
    provider: Annotated[
        list[str] | None, typer.Option(help="OPTIMADE provider: its id (mp, oqmd) or a base URL; repeat.")
    ] = None,
    query: Annotated[
        str | None,
        typer.Option("--filter", help="What to ask a database for: an OPTIMADE filter; for materials-project JSON."),
    ] = None,
    page_limit: Annotated[
        int | None, typer.Option(min=1, help="Structures per OPTIMADE page; by default as many as the server likes.")
    ] = None,
    n: Annotated[int | None, typer.Option(min=1, help="Hosts in the finished sheet; all that pass by default.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the choice; run.seed by default.")] = None,
    min_atoms: Annotated[int, typer.Option(min=1, help="Fewest atoms in the primitive cell.")] = 1,
    max_atoms: Annotated[int, typer.Option(min=1, help="Most atoms in the primitive cell.")] = 25,
    elements_min: Annotated[int, typer.Option(min=1, help="Fewest elements.")] = 2,
    elements_max: Annotated[int, typer.Option(min=1, help="Most elements.")] = 5,
    elemental: Annotated[bool, typer.Option("--elemental", help="Accept hosts of one element too.")] = False,
    gap_min: Annotated[float | None, typer.Option(help="Smallest known band gap in eV.")] = None,
    gap_max: Annotated[float | None, typer.Option(help="Largest known band gap in eV.")] = None,
    require_gap: Annotated[bool, typer.Option("--require-gap", help="Drop hosts without a known gap.")] = False,
    gap_field: Annotated[
        list[str] | None,
        typer.Option(help="OPTIMADE field or SNUMAT key with the gap in eV; wildcards; repeat, best first."),
    ] = None,
    config: CONFIG = None,
    rejected: Annotated[Path | None, typer.Option(help="Table of every rejected candidate and why.")] = None,
    extend: Annotated[Path | None, typer.Option(help="Append to this sheet instead of writing --output.")] = None,
    output: Annotated[Path | None, typer.Option(help="New sheet; an existing file is replaced.")] = None,
) -> None:
    """Select hosts from a source and write them to a sheet."""
    from defectnet.hosts import filters, sheet
    from defectnet.hosts.select import select_hosts

    if (extend is None) == (output is None):
        raise InputError("--output: give either --output FILE for a new sheet or --extend SHEET to append to one")
    settings = _settings(config)
    criteria = filters.Criteria(
        vocabulary=settings.hosts.vocabulary,
        elements_min=elements_min,
        elements_max=elements_max,
        elemental=elemental,
        atoms_min=min_atoms,
        atoms_max=max_atoms,
        gap_min_eV=gap_min,
        gap_max_eV=gap_max,
        require_gap=require_gap,
    )
    existing = sheet.read_sheet(extend) if extend else []
    found = _candidates(source, path, config_type, gap_field, provider, query, page_limit)
    suitable = filters.apply_criteria(found.hosts, criteria)
    unique = filters.drop_duplicates(suitable.hosts, existing, partial(_progress, label="duplicates"))
    refused = [*found.rejected, *suitable.rejected, *unique.rejected]
    if rejected:
        filters.write_rejections(rejected, refused)
    _print_summary(len(found.hosts) + len(found.rejected), refused, len(unique.hosts))
    selected = select_hosts(unique.hosts, n, settings.run.seed if seed is None else seed, existing)
    comment = f"{source}: {', '.join([*(provider or []), query])}" if query else ""
    if extend:
        sheet.extend_sheet(extend, selected, comment)
    else:
        sheet.write_sheet(output, selected, comment)
    typer.echo(f"{extend or output}: {len(existing) + len(selected)} hosts, {len(selected)} of them new")


@app.command()
def amorphous(
    output: Annotated[Path, typer.Option(help="Folder for the structures and their sheet, hosts.tsv.")],
    number: Annotated[int, typer.Option(min=1, help="Structures, all sizes and levels of disorder in turn.")] = 20,
    atoms: Annotated[
        list[int] | None, typer.Option(help="Atoms per cell: 64 (default), 96, 144, 216, ...; repeat.")
    ] = None,
    switches: Annotated[
        list[float] | None, typer.Option(help="Bonds to switch in a crystal, per atom; repeat; 0.02-0.4 by default.")
    ] = None,
    rate: Annotated[
        list[float] | None, typer.Option(help="Rate in K/s to quench a melt at; repeat; 1e14-1e16 by default.")
    ] = None,
    density_min: Annotated[float, typer.Option(help="Lowest density, as a fraction of the crystal's.")] = 0.96,
    density_max: Annotated[float, typer.Option(help="Highest density.")] = 1.0,
    anneal: Annotated[
        float | None, typer.Option(help="Picoseconds at 1200 K of what was quenched; 100 by default, 0: none.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed; the same one makes the same structures.")] = 0,
) -> None:
    """Make disordered silicon, from one switched bond to a fast-quenched melt, and a sheet of it."""
    from defectnet.hosts import amorphous as silicon
    from defectnet.hosts.sheet import write_sheet

    if not switches and not rate:
        switches, rate = list(silicon.SWITCHES_PER_ATOM), list(silicon.RATES_K_PER_S)
    densities = density_min, density_max
    held = silicon.ANNEAL_PS if anneal is None else anneal
    recipes = silicon.recipes(number, atoms or (64,), switches or (), rate or (), densities, seed, held)
    hosts = silicon.generate(recipes, output, partial(_progress, label="structures"))
    write_sheet(output / "hosts.tsv", hosts)
    typer.echo(f"{output / 'hosts.tsv'}: {len(hosts)} hosts")


@app.command()
def disorder(
    sheet_path: SHEET,
    cutoff: Annotated[float, typer.Option(help="Atoms closer than this in Å are bonded.")] = 2.85,
) -> None:
    """Coordination, bond angles and rings of a sheet's hosts, by family."""
    from defectnet.hosts.disorder import measure
    from defectnet.hosts.sheet import read_sheet

    families: dict[str, list[Host]] = {}
    for host in read_sheet(sheet_path):
        families.setdefault(host.family or host.id, []).append(host)
    rows = []
    for family, hosts in _progress(list(families.items()), label="families"):
        rows.append((family, len(hosts), measure([host.build().to_ase_atoms() for host in hosts], cutoff)))
    _print_disorder(rows)


@app.command()
def check(sheet_path: SHEET, config: CONFIG = None) -> None:
    """Build every host of a sheet and report everything that is wrong."""
    from defectnet.hosts.sheet import check_hosts, read_sheet

    hosts = read_sheet(sheet_path)
    check_hosts(hosts, sheet_path, _settings(config).hosts.vocabulary, partial(_progress, label="hosts"))
    typer.echo(f"{sheet_path}: {len(hosts)} hosts, all sound")


@app.command()
def show(sheet_path: SHEET, host_id: Annotated[str | None, typer.Argument(help="Id of one host.")] = None) -> None:
    """List a sheet, or everything about one of its hosts."""
    from defectnet.hosts.sheet import read_sheet

    hosts = read_sheet(sheet_path)
    if host_id is None:
        _print_sheet(hosts)
        return
    host = next((host for host in hosts if host.id == host_id), None)
    if host is None:
        import difflib

        near = difflib.get_close_matches(host_id, [host.id for host in hosts], n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"`defectnet hosts show {sheet_path}` lists them"
        raise InputError(f"{sheet_path}: {host_id}: no host has this id; {hint}")
    _print_host(host)


def _settings(config: Path | None) -> Config:
    from defectnet.config import Config, load_config

    return load_config(config) if config else Config()


def _candidates(
    source: Source,
    path: Path | None,
    config_types: list[str] | None,
    gap_fields: list[str] | None,
    providers: list[str] | None,
    query: str | None,
    page_limit: int | None,
) -> Candidates:
    from defectnet.hosts import sources

    if (providers or page_limit) and source is not Source.OPTIMADE:
        raise InputError(
            f"--provider, --page-limit: not for --source {source}; leave them out or use --source optimade"
        )
    if config_types and source is not Source.EXTXYZ:
        raise InputError(f"--config-type: not for --source {source}; leave it out or use --source extxyz")
    if source is Source.CURATED:
        return sources.curated(path or sources.CURATED_SHEET)
    if source in (Source.OPTIMADE, Source.MATERIALS_PROJECT):
        if not query:
            raise InputError(f"--filter: needed with --source {source}; say which structures to download")
        folder, progress = path or sources.DOWNLOADS, partial(_progress, label="pages")
        if source is Source.MATERIALS_PROJECT:
            return sources.materials_project(_search_arguments(query), folder, progress)
        if not providers:
            raise InputError("--provider: needed with --source optimade; give a provider id such as mp, or a base URL")
        return sources.optimade(providers, query, folder, gap_fields or sources.GAP_FIELDS, page_limit, progress)
    if path is None:
        raise InputError(f"--path: needed with --source {source}; give the directory or file to read")
    if source is Source.DIRECTORY:
        return sources.directory(path, partial(_progress, label="files"))
    if source is Source.EXTXYZ:
        from defectnet.hosts.frames import frames

        return frames(path, sources.DOWNLOADS / path.stem, config_types or (), partial(_progress, label="frames"))
    progress = partial(_progress, label="entries")
    if source is Source.SNUMAT:
        return sources.snumat(path, gap_fields or sources.SNUMAT_GAP_FIELDS, progress)
    return sources.optimade_file(path, gap_fields or sources.GAP_FIELDS, progress)


def _search_arguments(query: str) -> dict[str, Any]:
    """Arguments of the Materials Project's search from JSON text."""
    try:
        arguments = json.loads(query)
    except ValueError as error:
        arguments = error
    if not isinstance(arguments, dict) or not arguments:
        raise InputError(
            f"--filter: {query!r} is not a JSON object of arguments of MPRester.materials.summary.search; write "
            """'{"num_elements": [2, 5], "band_gap": [0.1, 10]}'"""
        )
    return arguments


def _progress(items: Sequence[Any], label: str) -> Iterable[Any]:
    from defectnet.progress import track  # tqdm only where there is something to show

    return track(items, label)


def _print_summary(candidates: int, rejected: list[Rejection], suitable: int) -> None:
    typer.echo(f"{candidates:6d} candidates")
    for rule, count in sorted(Counter(rejection.rule for rejection in rejected).items()):
        example = min((r for r in rejected if r.rule == rule), key=lambda r: r.id)
        typer.echo(f"{count:6d} rejected: {rule} (such as {example.id}: {example.reason})")
    typer.echo(f"{suitable:6d} suitable")


def _print_sheet(hosts: list[Host]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("id", "formula", "family", "space group", "gap / eV", "atoms", "source", box=None)
    for host in hosts:
        gap = "" if host.gap_eV is None else f"{host.gap_eV:g}"
        group = host.spacegroup or str(host.structure)
        table.add_row(host.id, host.formula, host.family, group, gap, str(host.n_atoms), host.source)
    Console(width=None if sys.stdout.isatty() else 160).print(table)  # a pipe has no width of its own
    typer.echo(f"{len(hosts)} hosts")


def _print_disorder(rows: list[tuple[str, int, Disorder]]) -> None:
    from rich.console import Console
    from rich.table import Table

    from defectnet.hosts.disorder import RING_MAX

    measures = ("hosts", "bonds", "fourfold", "angle / °", "spread / °")
    table = Table("family", *measures, *(f"{size}-rings" for size in range(3, RING_MAX + 1)), box=None)
    for family, count, found in rows:
        numbers = found.coordination, found.fourfold, found.angle_deg, found.angle_spread_deg, *found.rings[3:]
        table.add_row(family, str(count), *(f"{number:.2f}" for number in numbers))
    Console(width=None if sys.stdout.isatty() else 160).print(table)  # a pipe has no width of its own
    typer.echo("bonds, rings: per atom")


def _print_host(host: Host) -> None:
    from defectnet.hosts.sheet import COLUMNS

    for column in COLUMNS:
        value = getattr(host, column)
        if value is not None:
            typer.echo(f"{column:12}{value}")
    structure = host.build()
    typer.echo(f"\nprimitive cell, {structure.volume:.3f} Å³\n{structure}")
