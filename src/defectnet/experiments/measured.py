"""Measured phonon densities of states: a file in, a clean spectrum of unit area with errors out.

The file holds a density of states, plain or weighted by neutron cross sections, as beamline software reduces it: Bose
factor, detector efficiency and multiphonon scattering are corrected there, not here.
"""

from __future__ import annotations

import gzip
import io
import logging
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from defectnet.errors import InputError
from defectnet.experiments.cleanup import (
    Background,
    Side,
    arranged,
    one_side,
    refuse_impossible,
    without_background,
)
from defectnet.experiments.columns import in_meV
from defectnet.experiments.nexus import read_nexus
from defectnet.experiments.spectrum import MeasuredSpectrum
from defectnet.experiments.text import read_text

log = logging.getLogger(__name__)

TEXT_MAX_MB = 20
OUTSIDE_MAX = 0.05
"""Share of one spectrum's area that the range of the other may lack."""
ENERGY_RATIO_MAX = 1.5
"""Mean energies of a pristine and a doped spectrum do not differ by more; a wrong unit makes a factor of 4 or 8."""

HDF5_MAGIC, GZIP_MAGIC = b"\x89HDF\r\n\x1a\n", b"\x1f\x8b"
FOREIGN = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"%PDF": "a PDF document",
    b"PK\x03\x04": "a ZIP archive or an Excel sheet",
    b"\xd0\xcf\x11\xe0": "an old Excel or Word document",
    b"\x0e\x03\x13\x01": "an HDF4 file",
}


def read_spectrum(
    path: Path,
    *,
    unit: str | None = None,
    columns: Sequence[str | int] | None = None,
    weighting: Literal["none", "neutron"] = "none",
    side: Side | None = None,
    minimum_meV: float = 0.0,
    maximum_meV: float = np.inf,
    background: Background | None = None,
    partial: bool = False,
) -> MeasuredSpectrum:
    """A measured density of states, cleaned up and of unit area over the range that was measured.

    Parameters
    ----------
    path : text table of two or three columns (energy, intensity, error), NeXus or HDF5 file, or either one gzipped
    unit : ``meV``, ``THz`` or ``cm-1``; by default what the file states
    columns : names or numbers from 1, in HDF5 paths, of energy, intensity and, if there is one, error
    weighting : what the intensity is; recorded, nothing is converted
    side : which energies to take of a file that has positive and negative ones, see :func:`.cleanup.one_side`
    minimum_meV, maximum_meV : energies that are kept; the elastic line lies below the first
    background : subtracted before energies are cut, so that it may be fitted above ``maximum_meV``
    partial : accept a spectrum that ends within the band

    What was assumed or changed stands in ``notes`` and in the log. Raises :class:`InputError` naming file, line or
    column, and remedy.
    """
    source = str(path)
    if weighting not in ("none", "neutron"):
        raise InputError(f"--weighting {weighting}: must be none or neutron")
    content = _content(path)
    is_hdf5 = content.read(len(HDF5_MAGIC)) == HDF5_MAGIC
    content.seek(0)
    with content:
        table = read_nexus(content, source, columns) if is_hdf5 else read_text(_text(content, source), source, columns)
    table, unit_note = in_meV(table, unit, source)
    spectrum = one_side(arranged(table, weighting, source), side)
    if background is not None:
        spectrum = without_background(spectrum, background)
    kept = (spectrum.energies_meV >= minimum_meV) & (spectrum.energies_meV <= maximum_meV)
    if not kept.all():
        spectrum = spectrum.rows(kept, f"{(~kept).sum()} rows outside {minimum_meV:g}…{maximum_meV:g} meV left out")
    refuse_impossible(spectrum, partial)
    spectrum = replace(spectrum.normalised(), notes=(unit_note, *spectrum.notes))
    for note in spectrum.notes:
        log.info("%s: %s", source, note)
    return spectrum


def refuse_unlike(pristine: MeasuredSpectrum, doped: MeasuredSpectrum) -> None:
    """Raises :class:`InputError` for a pristine and a doped spectrum that cannot be compared, or are the same."""
    files = f"{pristine.source} and {doped.source}"
    if pristine.weighting != doped.weighting:
        raise InputError(f"{files}: weighted differently ({pristine.weighting}, {doped.weighting}); give both alike")
    same_axis = np.array_equal(pristine.energies_meV, doped.energies_meV)
    if same_axis and np.allclose(pristine.intensity, doped.intensity, rtol=1e-9, atol=0, equal_nan=True):
        raise InputError(f"{files}: the same spectrum twice; give the undoped host as pristine, the sample as doped")
    means = [float((one.areas * one.energies_meV).sum()) for one in (pristine, doped)]
    if max(means) > ENERGY_RATIO_MAX * min(means):
        raise InputError(
            f"{files}: mean energies {means[0]:.3g} and {means[1]:.3g} meV; no doping does that: check units (--unit) "
            "and whether both are of the same host"
        )


def on_common_range(
    pristine: MeasuredSpectrum, doped: MeasuredSpectrum, partial: bool = False
) -> tuple[MeasuredSpectrum, MeasuredSpectrum]:
    """Both spectra over the range that both cover, each of unit area there, so that their areas can be compared.

    Raises :class:`InputError` for pairs that :func:`refuse_unlike` refuses, and when more than :data:`OUTSIDE_MAX` of
    one lies outside the range of the other, unless ``partial``.
    """
    refuse_unlike(pristine, doped)
    ranges = np.array([pristine.range_meV, doped.range_meV])
    low, high = float(ranges[:, 0].max()), float(ranges[:, 1].min())
    cut = []
    for one, other in ((pristine, doped), (doped, pristine)):
        outside = (one.energies_meV < low) | (one.energies_meV > high)
        share = one.areas[outside].sum()
        if share > OUTSIDE_MAX and not partial:
            raise InputError(
                f"{other.source}: covers {other.range_meV[0]:g}…{other.range_meV[1]:g} meV only, where {share:.0%} of "
                f"{one.source} is missing; measure the whole band, or accept a part with --allow-partial"
            )
        cut.append(one.within(low, high))
    return cut[0], cut[1]


def _content(path: Path) -> BinaryIO:
    """The file, unpacked if it is gzipped. Raises :class:`InputError` for what cannot be a spectrum."""
    try:
        with path.open("rb") as file:
            magic = file.read(8)
        if not magic:
            raise InputError(f"{path}: is empty; give a table of energy, intensity and, if known, error")
        if not magic.startswith(GZIP_MAGIC):
            return path.open("rb")
        with gzip.open(path) as packed:
            return io.BytesIO(_at_most(packed, str(path)))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: damaged gzip file ({error}); copy it again") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; check path and permissions") from None


def _text(content: BinaryIO, source: str) -> bytes:
    data = _at_most(content, source)
    kind = next((name for magic, name in FOREIGN.items() if data.startswith(magic)), None)
    utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    if kind is None and b"\0" in data[:4096] and not utf16:
        kind = "a binary file"
    if kind:
        raise InputError(f"{source}: is {kind}; export the spectrum as a text table, NeXus or HDF5")
    return data


def _at_most(content: BinaryIO, source: str) -> bytes:
    data = content.read(TEXT_MAX_MB * 2**20 + 1)
    if len(data) > TEXT_MAX_MB * 2**20:
        raise InputError(
            f"{source}: more than {TEXT_MAX_MB} MB (unpacked); a spectrum has a few thousand rows: export one "
            "density of states, not events or all detectors"
        )
    return data
