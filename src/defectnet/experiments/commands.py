"""``defectnet predict`` and ``defectnet simulate-measurement``."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from defectnet.errors import InputError
from defectnet.files import write_json

log = logging.getLogger(__name__)


def predict(
    model: Annotated[Path, typer.Argument(help="checkpoint.pt of a trained network of preset response.")],
    doped: Annotated[Path, typer.Option(help="Spectrum of the sample: two or three columns, NeXus or HDF5.")],
    formula: Annotated[str, typer.Option(help="Chemical formula of the host.")],
    pristine: Annotated[
        Path | None, typer.Option(help="Spectrum of the undoped host; by default the one that was computed.")
    ] = None,
    candidates: Annotated[
        str | None, typer.Option(help="Dopants to ask about, separated by commas; by default likely ones.")
    ] = None,
    dataset: Annotated[
        Path | None, typer.Option(help="Dataset that has the host: what its dopants do is looked up there.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Id of the host there; by default by formula.")] = None,
    unit: Annotated[str | None, typer.Option(help="meV, THz or cm-1; by default what the files state.")] = None,
    columns: Annotated[
        str | None, typer.Option(help="Energy, intensity, error: names or numbers, separated by commas.")
    ] = None,
    weighting: Annotated[str, typer.Option(help="none: density of states; neutron: weighted by σ/m.")] = "none",
    side: Annotated[
        str | None, typer.Option(help="loss, gain or fold, of files with positive and negative energies.")
    ] = None,
    minimum: Annotated[float, typer.Option(help="Energies in meV below are left out: the elastic line.")] = 0.0,
    maximum: Annotated[float | None, typer.Option(help="Energies in meV above are left out.")] = None,
    background: Annotated[
        str | None, typer.Option(help="constant (default) or linear: what is fitted above --background-above.")
    ] = None,
    background_above: Annotated[
        float | None, typer.Option(help="Subtract the background that is left above this energy in meV.")
    ] = None,
    resolution: Annotated[
        str | None, typer.Option(help="FWHM of the instrument: in meV (1.2), of the energy (2%), or a file.")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option(help="Stretch the energy axis until the undoped host looks as computed.")
    ] = False,
    allow_partial: Annotated[bool, typer.Option(help="Accept spectra that end within the band.")] = False,
    output: Annotated[Path | None, typer.Option(help="Folder for answer.json and a picture.")] = None,
) -> None:
    """Which dopants a measured sample holds, and how much of each."""
    from defectnet.experiments.answer import ask
    from defectnet.experiments.cleanup import Background

    if background is not None and background_above is None:
        raise InputError("--background: needs --background-above, an energy in meV just above the band")

    def listed(text: str | None) -> list[str] | None:
        return None if text is None else [part.strip() for part in text.split(",") if part.strip()]

    found = ask(
        model, doped, formula, pristine=pristine, candidates=listed(candidates), dataset=dataset, host=host,
        resolution=resolution, calibrate=calibrate, unit=unit, columns=listed(columns), weighting=weighting,
        side=side, minimum_meV=minimum, maximum_meV=math.inf if maximum is None else maximum, partial=allow_partial,
        background=None if background_above is None else Background(background or "constant", background_above),
    )  # fmt: skip
    table = Table("dopant", "for", "at.%", f"{found.coverage:.0%} interval", "present", "limit", "known from")
    for one in found.dopants:
        low, high = 100 * one.low, 100 * one.high
        table.add_row(
            one.element, one.replaces, f"{100 * one.concentration:.2f}", f"{low:.2f} - {high:.2f}",
            f"{one.presence:.0%}", f"{100 * one.detection_limit:.2f}", one.knowledge,
        )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(f"left unexplained: {found.unexplained:.0%} of what doping changed")
    for warning in found.warnings:
        console.print(f"warning: {warning}")
    if output is not None:
        from defectnet.report.identification import identification_figure

        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "answer.json", found.as_dict())
        identification_figure(found, output / "answer")
        console.print(f"wrote {output}/answer.json, answer.png, answer.svg")


def simulate_measurement(
    dataset: Annotated[Path, typer.Argument(help="dataset.h5 of a run.")],
    spectrum: Annotated[str, typer.Argument(help="Id of a doped spectrum in it, such as NaCl/doped-0.")],
    output: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("simulated"),
    resolution: Annotated[
        str, typer.Option(help="FWHM: in meV (1.2), of the energy (2%), or a file of two columns, energy and FWHM.")
    ] = "1.0",
    counts: Annotated[float, typer.Option(help="Counts of the phonons in the range; 0 for no noise.")] = 100_000,
    background: Annotated[float, typer.Option(help="Counts of the background over those of the phonons.")] = 0.0,
    background_slope: Annotated[
        float, typer.Option(help="Growth of the background from mid-range to its end, -1 to 1.")
    ] = 0.0,
    minimum: Annotated[float, typer.Option(help="Lowest energy in meV.")] = 0.0,
    maximum: Annotated[float | None, typer.Option(help="Highest energy in meV; by default above the band.")] = None,
    step: Annotated[float, typer.Option(help="Width of a bin in meV.")] = 0.5,
    stretch: Annotated[float, typer.Option(help="Factor on the energy axis.")] = 1.0,
    shift: Annotated[float, typer.Option(help="Added to the energy axis, in meV.")] = 0.0,
    weighting: Annotated[str | None, typer.Option(help="none or neutron; by default the dataset's.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
) -> None:
    """Write a doped spectrum and its pristine one as an experiment would, and what is true about them."""
    from defectnet.experiments.resolution import parse_resolution
    from defectnet.experiments.simulate import Instrument
    from defectnet.experiments.simulate import simulate_measurement as simulate

    if weighting not in (None, "none", "neutron"):
        raise InputError(f"--weighting {weighting}: must be none or neutron")
    instrument = Instrument(
        resolution=parse_resolution(resolution),
        step_meV=step,
        minimum_meV=minimum,
        maximum_meV=maximum,
        counts=counts or None,
        background=background,
        background_slope=background_slope,
        stretch=stretch,
        shift_meV=shift,
        weighting=weighting,
    )
    written = simulate(dataset, spectrum, output, instrument, seed)
    log.info("wrote %s, %s and %s", written.pristine, written.doped, written.truth)
