"""Where a run keeps its files; the one place that commands and workflow rules take paths from."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from defectnet.config import Config, Training

RECORD_STAGES = ("library", "relax", "phonons", "superposed")
"""Stages whose results are records; each has a manifest per batch."""

FIGURES = (
    "spectra", "attribution", "scores", "parity", "errors", "traces", "calibration", "detection", "umap", "training",
    "quality", "fidelity", "hosts",
)  # fmt: skip
"""Names of the figures of the report."""

COSTS_FILE = Path("config/costs.json")
"""What things cost, learned from runs with 7net-0; `defectnet costs` makes one from your own."""


@dataclass(frozen=True)
class Layout:
    """Paths of one run below its results directory. Arguments may be Snakemake wildcards such as ``{batch}``."""

    results: Path
    given_dataset: Path | None = None
    given_models: Path | None = None
    other_potential: Path | None = None

    @classmethod
    def of(cls, config: Config) -> Layout:
        """Paths of the run that a configuration describes."""
        run = config.run
        given = run.dataset, run.models, run.other_potential
        return cls(Path(run.results), *(None if path is None else Path(path) for path in given))

    @property
    def configs(self) -> Path:
        """Directory of the effective configurations that were used, each named after its content."""
        return self.results / "configs"

    @property
    def records(self) -> Path:
        """Root of the record store."""
        return self.results / "records"

    def batch(self, stage: str, batch: str) -> Path:
        """What one batch made in one stage: ``dopants``, ``supercells`` or one of :data:`RECORD_STAGES`."""
        return self.results / stage / f"{batch}.json"

    @property
    def dataset(self) -> Path:
        """All spectra: a given file, or what the run makes."""
        return self.given_dataset or self.results / "dataset.h5"

    @property
    def missing(self) -> Path:
        """Table of what the dataset lacks, and why."""
        return self.results / "missing.tsv"

    def model(self, preset: str, split: str, repeat: int | str) -> Path:
        """Directory of one trained network: a given one, or what the run makes."""
        return (self.given_models or self.results / "models") / f"{preset}-{split}-{repeat}"

    def models(self, training: Training) -> list[Path]:
        """Directories of all networks that a run trains."""
        runs = product(training.presets, training.splits, range(training.repeats))
        return [self.model(*run) for run in runs]

    @property
    def definet(self) -> Path:
        """Directory of the network that relaxes in one step."""
        return self.results / "definet"

    @property
    def metrics(self) -> Path:
        """Scores of all models on held-out spectra."""
        return self.results / "metrics.json"

    @property
    def predictions(self) -> Path:
        """Every held-out prediction."""
        return self.results / "predictions.csv.gz"

    @property
    def summary(self) -> Path:
        """The scores in words and as a table."""
        return self.results / "summary.html"

    @property
    def figures(self) -> Path:
        """Directory of the figures of the report."""
        return self.results / "figures"

    def figure(self, name: str, suffix: str = "png") -> Path:
        """A figure of the report."""
        return self.figures / f"{name}.{suffix}"
