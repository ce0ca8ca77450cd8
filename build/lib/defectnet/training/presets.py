"""Named recipes: what a network sees and how it is built. ``training.preset`` in the configuration picks one."""

from __future__ import annotations

from dataclasses import dataclass

from defectnet.dataset.samples import Axis


@dataclass(frozen=True)
class Preset:
    """The part of a recipe that is no free number of the configuration.

    ``axis`` is the energy axis of the spectra; epochs, batch size, step size and splits are in the Training block.
    """

    axis: Axis


PRESETS = {
    # arXiv:2506.00725: 100 bins on each host's own energy range, plain histograms.
    "published": Preset(Axis("host", bins=100, sigma_meV=0.0)),
    # The same network on the dataset's energy grid: localised modes and absolute energies stay visible.
    "absolute": Preset(Axis("absolute")),
}
