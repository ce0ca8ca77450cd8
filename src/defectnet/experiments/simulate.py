"""Files as an experiment would leave them, made from computed spectra of a dataset whose dopants are known.

Counts are drawn as if the density of states itself had been counted. In a real one the statistics vary with energy
as counts are divided by Bose and Debye-Waller factors, and what is left of multiphonon scattering is no straight line.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

import numpy as np

from defectnet import __version__
from defectnet.dataset.schema import Dataset
from defectnet.elements import element_amounts
from defectnet.errors import InputError
from defectnet.experiments.resolution import Resolution, area_below, broadened
from defectnet.files import write_atomically, write_json
from defectnet.phonons.pdos import bin_centers, spectrum
from defectnet.seeds import generator

FINE_meV = 0.1
"""Bins in which spectra are broadened, before they are added up to the instrument's."""
FINE_BINS_MAX = 8000
MARGIN_FWHM = 3.0
HEADROOM = 1.25
"""Where the axis ends by default, in units of the highest energy of either spectrum."""
VISIBLE = 1e-3


@dataclass(frozen=True)
class Instrument:
    """How a spectrum is measured.

    resolution           : see :class:`~defectnet.experiments.resolution.Resolution`
    step_meV             : width of the bins
    minimum_meV, maximum_meV : range that is measured; by default up to :data:`HEADROOM` times the band's top
    counts               : expected counts of the phonons in the range, of each of the two spectra; None: no noise
    background           : counts of the background over those of the phonons
    background_slope     : from -1 to 1; the background grows by this share from the middle of the range to its end
    stretch, shift_meV   : E_measured = ``stretch`` × E + ``shift_meV``, a wrong axis or a potential that is too soft
    weighting            : ``neutron`` or ``none``; None: that of the dataset
    """

    resolution: Resolution = field(default_factory=Resolution)
    step_meV: float = 0.5
    minimum_meV: float = 0.0
    maximum_meV: float | None = None
    counts: float | None = 100_000.0
    background: float = 0.0
    background_slope: float = 0.0
    stretch: float = 1.0
    shift_meV: float = 0.0
    weighting: Literal["none", "neutron"] | None = None

    def __post_init__(self) -> None:
        wrong = {
            "--step": (self.step_meV > 0, "a positive width in meV"),
            "--minimum": (self.minimum_meV >= 0, "at least 0 meV"),
            "--maximum": (self.maximum_meV is None or self.maximum_meV > self.minimum_meV, "above --minimum"),
            "--counts": (self.counts is None or 1 <= self.counts <= 1e15, "1 to 1e15 counts"),
            "--background": (self.background >= 0, "at least 0"),
            "--background-slope": (abs(self.background_slope) <= 1, "-1 to 1"),
            "--stretch": (0.5 <= self.stretch <= 2, "0.5 to 2"),
        }
        for option, (fine, allowed) in wrong.items():
            if not fine:
                raise InputError(f"{option}: must be {allowed}")


@dataclass(frozen=True)
class Simulated:
    """Files of one simulated experiment: two spectra, and what they were made from."""

    pristine: Path
    doped: Path
    truth: Path


def simulate_measurement(
    dataset: Path, spectrum_id: str, output: Path, instrument: Instrument | None = None, seed: int = 0
) -> Simulated:
    """Write a doped spectrum of a dataset and its pristine one into the folder ``output`` as if they were measured.

    Same arguments, same bytes. Raises :class:`InputError` for an unknown or pristine spectrum, for a weighting that a
    compact dataset does not have, and for a range without bins or phonons.
    """
    how = instrument or Instrument()
    with Dataset(dataset) as data:
        row = _row(data, spectrum_id)
        reference = int(data.spectra.reference[row])
        pair = {"pristine": reference, "doped": row}
        edges = _edges(data, list(pair.values()), how)
        signal = {role: _measured_density(data, at, edges, how) for role, at in pair.items()}
        host = int(data.spectra.host[row])
        truth = {
            "simulated": True,
            "made_by": f"defectnet {__version__} simulate-measurement",
            "dataset": dataset.name,
            "dataset_digest": data.digest,
            "spectrum": spectrum_id,
            "pristine_spectrum": data.spectra.id[reference],
            "fidelity": data.spectra.fidelity[row],
            "potential": data.spectra.potential[row],
            "formula": data.hosts.formula[host],
            "composition": element_amounts(data.hosts.composition[host]),
            "concentrations": element_amounts(data.spectra.concentrations[row]),
            "candidates": sorted(element_amounts(data.hosts.candidates[host])),
            "settings": asdict(how) | {"weighting": how.weighting or data.settings.weighting},
            "computed_sigma_meV": data.settings.sigma_meV,
            "seed": seed,
        }
    level, shares = _background(edges, how), {}
    stem = spectrum_id.replace("/", "_")
    paths = {}
    for role, density in signal.items():
        shares[role] = float(density.sum() * how.step_meV)
        if shares[role] <= 0:
            raise InputError(f"{spectrum_id}: no phonons from {edges[0]:g} to {edges[-1]:g} meV; measure another range")
        expected = density / shares[role] + level
        random = generator(seed, spectrum_id, "measurement", role)
        values, errors = _counted(expected, how, random)
        paths[role] = output / f"{stem}_{role}.txt"
        header = _header(role, truth)
        rows = zip(bin_centers(edges), values, errors, strict=True)
        table = "".join(f"{energy:.6f} {value:.8e} {error:.8e}\n" for energy, value, error in rows)
        write_atomically(paths[role], (header + table).encode())
    truth |= {
        "range_meV": [float(edges[0]), float(edges[-1])],
        "share_in_range": shares,
        "background_per_meV": {"first_bin": float(level[0]), "last_bin": float(level[-1])},
        "files": {role: path.name for role, path in paths.items()},
    }
    truth_path = output / f"{stem}_truth.json"
    write_json(truth_path, truth)
    return Simulated(paths["pristine"], paths["doped"], truth_path)


def _row(data: Dataset, spectrum_id: str) -> int:
    if spectrum_id not in data.spectra.id:
        alike = get_close_matches(spectrum_id, data.spectra.id, n=3) or data.spectra.id[:3]
        raise InputError(f"{data.path}: no spectrum {spectrum_id!r}; there are for example {', '.join(alike)}")
    row = data.spectra.id.index(spectrum_id)
    if data.spectra.role[row] == "pristine":
        raise InputError(f"{data.path}: {spectrum_id} is pristine; name a doped spectrum, its pristine one comes along")
    return row


def _edges(data: Dataset, rows: list[int], how: Instrument) -> np.ndarray:
    """Edges [B + 1] in meV of the instrument's bins; the upper end is rounded up to a whole bin."""
    top = how.maximum_meV
    if top is None:
        density = data.spectra.pdos[rows]
        highest = data.edges_meV[1:][(density > VISIBLE * density.max()).any(axis=0)][-1]
        top = HEADROOM * (how.stretch * float(highest) + how.shift_meV)
    count = int(np.ceil((top - how.minimum_meV) / how.step_meV - 1e-9))
    if count < 1:
        raise InputError(f"--minimum: {how.minimum_meV:g} meV is above the band, which ends below {top:g} meV")
    return how.minimum_meV + how.step_meV * np.arange(count + 1)


def _measured_density(data: Dataset, row: int, edges_meV: np.ndarray, how: Instrument) -> np.ndarray:
    """The spectrum [B] in 1/meV as the instrument would show it without noise and background, on its own bins."""
    parts = int(np.ceil(how.step_meV / FINE_meV - 1e-9))
    fine_step = how.step_meV / parts
    margin = int(np.ceil(MARGIN_FWHM * how.resolution.fwhm_meV(edges_meV).max() / fine_step))
    bins = (len(edges_meV) - 1) * parts
    if bins + 2 * margin > FINE_BINS_MAX:
        raise InputError(
            f"--step: {bins // parts} bins of {how.step_meV:g} meV are too many; widen them or lower --maximum"
        )
    fine = edges_meV[0] + fine_step * np.arange(-margin, bins + margin + 1)
    density = _density(data, row, (fine - how.shift_meV) / how.stretch, how) / how.stretch
    density = broadened(density, fine, how.resolution)
    return density[margin : margin + bins].reshape(-1, parts).mean(axis=1)


def _density(data: Dataset, row: int, edges_meV: np.ndarray, how: Instrument) -> np.ndarray:
    """The computed spectrum [B] in 1/meV on any bins: from its modes, or from what a compact dataset has."""
    weighting = how.weighting or data.settings.weighting
    if not data.compact:
        return spectrum(data.modes(row), edges_meV, data.settings.model_copy(update={"weighting": weighting}))
    if weighting != data.settings.weighting:
        raise InputError(
            f"--weighting {weighting}: {data.path} is a compact dataset, of weighting {data.settings.weighting} only; "
            "use the whole one"
        )
    below = area_below(data.spectra.pdos[row], data.edges_meV)
    return np.diff(below(edges_meV.clip(*data.edges_meV[[0, -1]]))) / np.diff(edges_meV)


def _background(edges_meV: np.ndarray, how: Instrument) -> np.ndarray:
    """Background [B] in 1/meV, of area ``how.background``."""
    centers = bin_centers(edges_meV)
    middle, half = 0.5 * (edges_meV[0] + edges_meV[-1]), 0.5 * (edges_meV[-1] - edges_meV[0])
    return how.background / (2 * half) * (1 + how.background_slope * (centers - middle) / half)


def _counted(expected: np.ndarray, how: Instrument, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Intensities and errors [B] in 1/meV; an empty bin has the error of one count."""
    if how.counts is None:
        return expected, np.zeros_like(expected)
    per_count = 1 / (how.counts * how.step_meV)
    counted = random.poisson(np.maximum(expected, 0) / per_count)
    return counted * per_count, np.sqrt(np.maximum(counted, 1)) * per_count


def _header(role: str, truth: dict) -> str:
    settings = truth["settings"]
    lines = [
        "SIMULATED, not measured",
        f"made by {truth['made_by']}",
        f"from the {role} spectrum of the pair {truth['spectrum']}, {truth['pristine_spectrum']} in {truth['dataset']}",
        f"dataset digest: {truth['dataset_digest']}",
        f"host: {truth['formula']}",
        f"weighting: {settings['weighting']}",
        f"resolution (FWHM): {_told(settings['resolution'])}",
        f"counts: {'no noise' if settings['counts'] is None else format(settings['counts'], 'g')}",
        f"background: {settings['background']:g} of the phonons' counts, slope {settings['background_slope']:g}",
        f"axis: stretched by {settings['stretch']:g}, shifted by {settings['shift_meV']:g} meV",
        "energy (meV)  intensity (1/meV)  error (1/meV)",
    ]
    return "".join(f"# {line}\n" for line in lines)


def _told(resolution: dict) -> str:
    table = f", and a table of {len(resolution['table'])} energies" if resolution["table"] else ""
    return f"{resolution['constant_meV']:g} meV, {resolution['fraction']:.2%} of the energy{table}, in quadrature"
