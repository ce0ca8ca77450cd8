"""A dataset without modes, small enough to hand on: what training and evaluation need on both axes.

Kept are pristine spectra in single precision, and what doping changed in half precision: rounding the spectra
themselves would hide single dopants among hundreds of atoms. The price of compactness is that broadening, bins and
weighting cannot be changed any more.
"""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from defectnet.dataset.samples import PUBLISHED, Axis, intensities_of
from defectnet.dataset.schema import COMPRESSED, Dataset, digest_of, new_file
from defectnet.errors import InputError


def write_compact(source: Path, output: Path) -> str:
    """Write a compact copy of the dataset ``source``; returns its content digest. Same source, same bytes.

    What doping changed is rounded by 0.05 % at most, where it is not negligible. The attribute ``made_from`` is the
    content digest of the source.

    Raises :class:`InputError` when there is no source or it is compact itself, :class:`RecordError` when it is damaged
    or the disk refuses.
    """
    with Dataset(source) as data:
        if data.compact:
            raise InputError(f"{source}: is compact already; copy it, or name the whole dataset")
        reference = data.spectra.reference
        spectra = {axis.kind: intensities_of(data, axis) for axis in (PUBLISHED, Axis("absolute"))}
    with h5py.File(source) as file, new_file(output) as compact:
        compact.attrs.update(file.attrs)
        compact.attrs["made_from"] = file.attrs["digest"]

        def copy(name: str, item: h5py.Group | h5py.Dataset) -> None:
            if name.startswith("modes") or name == "spectra/pdos":
                return
            if isinstance(item, h5py.Group):
                compact.create_group(name)
            else:
                write_array(compact, name, item[()], item.dtype)

        file.visititems(copy)
        for axis, values in spectra.items():
            group = compact.create_group(f"{axis}_axis")
            write_array(group, "pristine", values[np.unique(reference)], np.float32)
            write_array(group, "change", values - values[reference], np.float16)
        compact.attrs["digest"] = digest = digest_of(compact)
    return digest


def write_array(group: h5py.Group, name: str, values: np.ndarray, dtype: np.dtype | type) -> None:
    """A compressed array with checksums; plain where it is empty."""
    stored = {**COMPRESSED, "fletcher32": True} if values.size else {}
    group.create_dataset(name, data=values, dtype=dtype, **stored)
