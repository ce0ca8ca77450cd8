"""Named recipes: what a network sees and how it is built. ``training.presets`` in the configuration picks some."""

from __future__ import annotations

from dataclasses import dataclass

from defectnet.dataset.samples import Axis
from defectnet.models.defectnet import DefectNet
from defectnet.models.response import ResponseNet


@dataclass(frozen=True)
class Preset:
    """The part of a recipe that is no free number of the configuration.

    ``network`` is a key of :data:`NETWORKS`, ``axis`` the energy axis of the spectra, ``learning_rate`` the step size
    where the Training block names none; epochs, batch size and splits are there.
    """

    network: str
    axis: Axis
    learning_rate: float


NETWORKS = {"published": DefectNet, "response": ResponseNet}


PRESETS = {
    # arXiv:2506.00725: 100 bins on each host's own energy range, plain histograms.
    "published": Preset("published", Axis("host", bins=100, sigma_meV=0.0), 5e-4),
    # The same network on the dataset's energy grid: localised modes and absolute energies stay visible.
    "absolute": Preset("published", Axis("absolute"), 5e-4),
    # One query per candidate, given its response.
    "response": Preset("response", Axis("absolute"), 2e-3),
}

FINETUNED = "finetuned"
"""Preset of a network that another training left behind (``training.pretrained``), trained on with other data."""

FINETUNING_RATE = 3e-4
"""Its step size where none is named."""
