"""``defectnet definet``: train, evaluate and use a network that relaxes doped crystals in one step."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from defectnet.errors import InputError
from defectnet.interruption import stops_in_time

if TYPE_CHECKING:
    from defectnet.definet.pairs import Pair

log = logging.getLogger(__name__)

app = typer.Typer(no_args_is_help=True, help="Relax doped crystals in one step, after learning it from relaxations.")

Configs = Annotated[
    list[Path] | None,
    typer.Option("--config", help="Configuration of a run with relaxed cells; may be given several times."),
]
Relaxations = Annotated[Path | None, typer.Option(help="File of `defectnet definet collect` instead.")]
Published = Annotated[Path | None, typer.Option(help="Folder of the published two-dimensional structures instead.")]


def _pairs(
    config: list[Path] | None, relaxations: Path | None, published: Path | None, superpose: bool = False
) -> list[Pair]:
    from defectnet.definet.archive import read_pairs
    from defectnet.definet.pairs import pairs_of_runs
    from defectnet.definet.published import published_pairs

    if [config, relaxations, published].count(None) != 2:
        raise InputError("give one of --config (of one or several runs), --relaxations and --published")
    if relaxations is not None:
        return read_pairs(relaxations)
    return pairs_of_runs(config, superpose=superpose) if config is not None else published_pairs(published)


@app.command()
def collect(
    config: Configs,
    output: Annotated[Path, typer.Option(help="File to write (HDF5).")],
) -> None:
    """Put the relaxations of finished runs and the force constants of their hosts into one file."""
    from defectnet.definet.archive import write_pairs

    write_pairs(output, _pairs(config, None, None, superpose=True))
    log.info("wrote %s, %.1f MB", output, output.stat().st_size / 1e6)


@app.command()
def train(
    output: Annotated[Path, typer.Option(help="Folder for checkpoint.pt and history.csv.")],
    config: Configs = None,
    relaxations: Relaxations = None,
    published: Published = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training pairs, at most.")] = 30,
    scalars: Annotated[int, typer.Option(min=1, help="Scalar channels.")] = 64,
    vectors: Annotated[int, typer.Option(min=1, help="Vector channels.")] = 32,
    layers: Annotated[int, typer.Option(min=1, help="Rounds of message passing.")] = 2,
    radial: Annotated[int, typer.Option(min=2, help="Radial functions of each of two kinds.")] = 12,
    cutoff: Annotated[float, typer.Option(min=1, help="Farthest neighbours in Å.")] = 4.5,
    members: Annotated[
        int,
        typer.Option(min=1, help="Networks to average; of three or more, each leaves out some dopants."),
    ] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Cells per gradient step.")] = 8,
    learning_rate: Annotated[float, typer.Option(min=1e-6, help="Largest step size.")] = 3e-3,
    patience: Annotated[int, typer.Option(min=1, help="Epochs without improvement before it stops.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Of the division, the first weights and the order of pairs.")] = 0,
    minutes: Annotated[
        float | None, typer.Option(min=0.1, help="Stop cleanly before this much wall time is over.")
    ] = None,
) -> None:
    """Train on the relaxations of finished runs, or on the published ones; run again to go on after an interruption."""
    with stops_in_time(minutes):
        from defectnet.definet.fit import Settings
        from defectnet.definet.fit import train as fit

        settings = Settings(
            scalars=scalars, vectors=vectors, layers=layers, radial=radial, cutoff_A=cutoff, members=members,
            epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, patience=patience, seed=seed,
        )  # fmt: skip
        log.info("wrote %s", fit(_pairs(config, relaxations, published), settings, output))


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="checkpoint.pt of a trained network.")],
    output: Annotated[Path, typer.Option(help="File to write, metrics.json for example.")],
    config: Configs = None,
    relaxations: Relaxations = None,
    published: Published = None,
    force_calls: Annotated[
        Path | None, typer.Option(help="Table of `defectnet definet count-forces`, to be summed up as well.")
    ] = None,
) -> None:
    """Score a network on the dopants and hosts that its training did not see."""
    from defectnet.definet.evaluate import ANSWERS
    from defectnet.definet.evaluate import evaluate as score
    from defectnet.definet.fit import load_trained
    from defectnet.definet.force_calls import read_counts

    counts = read_counts(force_calls) if force_calls else {}
    pairs = _pairs(config, relaxations, published, superpose=True)
    rows = score(load_trained(model), pairs, output, counts)
    columns = (
        "split",
        "pairs",
        "defects",
        "n",
        *(f"{answer}_mae_A" for answer in ANSWERS),
    )
    table = Table(*columns)
    for row in rows:
        told = (row[name] for name in columns)
        table.add_row(
            *("" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value) for value in told)
        )
    Console(width=160).print(table)
    log.info("wrote %s", output)


@app.command()
def count_forces(
    model: Annotated[Path, typer.Argument(help="checkpoint.pt of a trained network.")],
    config: Configs,
    output: Annotated[Path, typer.Option(help="Table to write (CSV).")],
    cells: Annotated[int, typer.Option(min=1, help="Cells of each part, with one defect and with several.")] = 10,
    minutes: Annotated[
        float | None, typer.Option(min=0.1, help="Stop cleanly before this much wall time is over.")
    ] = None,
) -> None:
    """Count what starting where the network says saves, by relaxing cells it has not seen with the potential."""
    with stops_in_time(minutes):
        from defectnet.definet.force_calls import count

        count(model, _pairs(config, None, None), config, cells, output)
        log.info("wrote %s", output)


@app.command()
def relax(
    model: Annotated[Path, typer.Argument(help="checkpoint.pt of a trained network.")],
    doped: Annotated[Path, typer.Argument(help="Unrelaxed doped cell, in any format of ASE; vacancies are left out.")],
    host: Annotated[Path, typer.Option(help="The same cell without defects, relaxed.")],
    output: Annotated[Path, typer.Option(help="File for the relaxed cell; its suffix is its format.")],
) -> None:
    """Write where the atoms of a doped cell go, and say how sure that is."""
    from ase.io import read, write

    from defectnet.definet.fit import load_trained
    from defectnet.definet.relax import on_host_sites, relax_in_one_step

    try:
        cells = [read(path) for path in (doped, host)]
    except Exception as error:  # every reader of ASE has its own
        raise InputError(f"{doped}, {host}: not readable as structures ({error}); give files that ASE reads") from None
    whole, host_numbers = on_host_sites(*cells)
    found = relax_in_one_step(load_trained(model), whole, host_numbers)
    atoms = len(cells[0])
    relaxed = cells[0].copy()
    relaxed.positions = found.positions[:atoms]
    write(output, relaxed)
    error = found.error_A[:atoms]
    log.info("wrote %s; expected error %.3f Å, %.3f Å of the least certain atom", output, error.mean(), error.max())
