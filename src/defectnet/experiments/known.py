"""What the pipeline computed of a host: the spectrum of the undoped crystal, and what dopants do to it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from pymatgen.core import Composition

from defectnet.dataset.samples import Axis, Responses, load_responses
from defectnet.dataset.schema import Dataset
from defectnet.errors import InputError
from defectnet.experiments.resolution import Resolution, broadened
from defectnet.experiments.spectrum import MeasuredSpectrum

NETWORK_AXIS = Axis("absolute")


@dataclass(frozen=True)
class KnownHost:
    """What the pipeline computed of a host: ``responses`` of this host alone, on the edges [B + 1] of its dataset.

    ``replaces`` tells the element, or elements, that each candidate replaces.
    """

    name: str
    replaces: dict[str, str]
    responses: Responses
    edges_meV: np.ndarray
    weighting: Literal["none", "neutron"]

    @property
    def density(self) -> np.ndarray:
        """The computed spectrum [B] of unit area, in 1/meV."""
        area = self.responses.pristine[0].astype(float)
        return area / (area.sum() * np.diff(self.edges_meV))

    def broadened(self, resolution: Resolution) -> KnownHost:
        """The same as an instrument shows it."""
        width = np.diff(self.edges_meV)
        curves = {
            name: np.apply_along_axis(
                lambda area: broadened(area / width, self.edges_meV, resolution) * width,
                -1,
                getattr(self.responses, name),
            ).astype(np.float32)
            for name in ("pristine", "library", "mass_only", "finite", "scatter")
        }
        return replace(self, responses=replace(self.responses, **curves))

    def spectrum(self) -> MeasuredSpectrum:
        """In place of a measured one of the undoped host."""
        cells = np.stack([self.edges_meV[:-1], self.edges_meV[1:]], axis=1)
        return MeasuredSpectrum(
            energies_meV=cells.mean(axis=1),
            intensity=self.density,
            error=np.zeros(len(cells)),
            cells_meV=cells,
            weighting=self.weighting,
            source=f"{self.name} as computed",
        ).within(0.0, self.edges_meV[-1])


def look_up(dataset: Path, name: str) -> KnownHost:
    """A host of a dataset by its id or formula. Raises :class:`InputError` where there is none, or several."""
    with Dataset(dataset) as data:
        try:
            wanted = Composition(name).reduced_formula
        except ValueError:
            wanted = None
        ids, formulas = data.hosts.id, [Composition(formula).reduced_formula for formula in data.hosts.formula]
        found = [k for k, host in enumerate(ids) if host == name] or [k for k, f in enumerate(formulas) if f == wanted]
        if len(found) != 1:
            told = f"several hosts {name}: {', '.join(ids[k] for k in found)}" if found else f"no host {name}"
            raise InputError(f"{dataset}: has {told}; name one by its id, or leave --host out")
        responses = load_responses(data, NETWORK_AXIS, found)
        one = {key: value[found] for key, value in vars(responses).items()}
        for key in ("finite", "scatter"):  # a measured spectrum has taught nothing
            one[key] = one[key][:, -1:]
        replaces = data.hosts.replaces[found[0]]
        return KnownHost(ids[found[0]], replaces, Responses(**one), data.edges_meV, data.settings.weighting)
