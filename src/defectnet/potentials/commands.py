"""``defectnet potentials``: find, identify and test machine-learned potentials."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from defectnet.config import Potential, load_config

app = typer.Typer(no_args_is_help=True, help="Find, identify and test machine-learned potentials.")

CONFIG = Annotated[Path, typer.Option("--config", help="Configuration whose potential block is meant.")]
JSON = Annotated[str | None, typer.Option("--json", help="The potential block as JSON instead.")]
DEFAULT_CONFIG = Path("config/config.yaml")


def _settings(config: Path, values: str | None, **changes: Any) -> Potential:
    """The potential block, changed by the options that were given. Raises InputError."""
    from pydantic import ValidationError

    from defectnet.errors import InputError

    changes = {key: value for key, value in changes.items() if value is not None}
    try:
        if values is not None:
            base = Potential.model_validate_json(values)
        elif "name" in changes:  # nothing of another potential's block applies
            base = Potential()
        else:
            base = load_config(config).potential
        return Potential.model_validate(base.model_dump() | changes)
    except ValidationError as error:
        problems = [f"potential.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise InputError("\n".join(problems)) from None


@app.command()
def identify(config: CONFIG = DEFAULT_CONFIG, values: JSON = None) -> None:
    """Find the potential's package and weights and print what identifies them."""
    from defectnet import potentials

    identity = potentials.identify(_settings(config, values))
    print(f"{identity.name} {identity.model} {identity.dtype}, weights sha256 {identity.weights}")


@app.command()
def check(
    config: CONFIG = DEFAULT_CONFIG,
    values: JSON = None,
    name: Annotated[str | None, typer.Option(help="Potential to test instead of the configured one.")] = None,
    model: Annotated[str | None, typer.Option(help="Pretrained model.")] = None,
    modality: Annotated[str | None, typer.Option(help="Level of theory of a model trained on several.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="File with weights instead of a pretrained model.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or float64.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
) -> None:
    """Run the conformance suite; run it in the potential's environment. Exit status 1 when a check fails."""
    from rich.console import Console
    from rich.table import Table

    from defectnet import potentials
    from defectnet.potentials import conformance

    settings = _settings(
        config,
        values,
        name=name,
        model=model,
        modality=modality,
        checkpoint=None if checkpoint is None else str(checkpoint),
        dtype=dtype,
        device=device,
    )
    force_model = potentials.load(settings)
    results = conformance.run(force_model)
    identity = force_model.identity
    place = f"{force_model.package}, {force_model.device}"
    table = Table(title=f"{identity.name} {identity.model} {identity.dtype} ({place})")
    for column in ("check", "", "deviation", "tolerance", "unit", "meaning"):
        table.add_column(column)
    verdicts = {True: "[green]passed[/]", False: "[bold red]failed[/]", None: "skipped"}
    for result in results:
        numbers = [f"{x:.1e}" if x == x else "" for x in (result.value, result.tolerance)]
        table.add_row(result.name, verdicts[result.passed], *numbers, result.unit, result.explanation)
    Console().print(table)
    failed = sum(result.passed is False for result in results)
    print(f"{sum(result.passed is True for result in results)} passed, {failed} failed")
    if failed:
        raise typer.Exit(1)
