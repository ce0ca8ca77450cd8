"""NeXus and other HDF5 files of one spectrum.

The plot to read is found as the NeXus manual says (https://manual.nexusformat.org/datarules.html): the attributes
``default`` lead from the file to an ``NXdata`` group, whose ``signal`` and ``axes`` name its datasets; in older files
the datasets themselves carry ``signal=1`` and ``axes``.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import h5py
import numpy as np

from defectnet.errors import InputError
from defectnet.experiments.columns import Columns, unit_in

ROWS_MAX = 1_000_000


def read_nexus(content: io.BufferedIOBase, source: str, columns: Sequence[str | int] | None) -> Columns:
    """Energy, intensity and, where there is one, error from an HDF5 file.

    ``columns`` gives the paths of two or three datasets in that order, such as ``entry/data/energy``; without it, the
    file's default plot is read, or its only one. Energies one longer than the intensity are edges of a histogram.
    Raises :class:`InputError` naming group or dataset.
    """
    try:
        with h5py.File(content, "r") as file:
            picked = _named(file, columns, source) if columns is not None else _plot(file, source)
            stated = _text(picked[0].attrs.get("units"))
            energy, intensity, *error = [_values(dataset, source) for dataset in picked]
            counts = _text(picked[0].attrs.get("distribution")) == "0"  # Mantid: per bin, not per energy
            names = [dataset.name for dataset in picked]
    except (OSError, RuntimeError) as problem:
        raise InputError(f"{source}: damaged HDF5 file ({problem}); copy or export it again") from None
    for name, values in zip(names[2:], error, strict=True):
        if values.shape != intensity.shape:
            raise InputError(f"{source}: {name}: {len(values)} errors of {len(intensity)} intensities")
    if len(energy) not in (len(intensity), len(intensity) + 1):
        raise InputError(f"{source}: {names[0]}: {len(energy)} energies for {len(intensity)} intensities of {names[1]}")
    edges = energy if len(energy) == len(intensity) + 1 else None
    if edges is not None:
        steps = np.diff(edges)
        if not ((steps > 0).all() or (steps < 0).all()):
            raise InputError(f"{source}: {names[0]}: the edges of the bins neither ascend nor descend")
        energy = 0.5 * (edges[:-1] + edges[1:])
        if counts:
            intensity, *error = [values / np.abs(steps) for values in (intensity, *error)]
    return Columns(energy, intensity, error[0] if error else None, edges, unit_in(stated) or stated or None)


def _named(file: h5py.File, columns: Sequence[str | int], source: str) -> list[h5py.Dataset]:
    if len(columns) not in (2, 3):
        raise InputError(f"--columns: {len(columns)} given; give energy, intensity and, if there is one, error")
    for name in columns:
        if not isinstance(file.get(str(name)), h5py.Dataset):
            raise InputError(f"{source}: --columns {name}: no such dataset; there are {_datasets(file)}")
    return [file[str(name)] for name in columns]


def _plot(file: h5py.File, source: str) -> list[h5py.Dataset]:
    group = file
    while _text(group.attrs.get("NX_class")) != "NXdata" and (name := _text(group.attrs.get("default"))):
        if not isinstance(group.get(name), h5py.Group):
            raise InputError(f"{source}: {group.name}: its default plot {name!r} is not there; say --columns")
        group = group[name]
    if _signal(group) is None:
        groups: list[h5py.Group] = []
        file.visititems(lambda _, item: groups.append(item) if isinstance(item, h5py.Group) else None)
        plots = [one for one in groups if _text(one.attrs.get("NX_class")) == "NXdata" and _signal(one) is not None]
        if len(plots) != 1:
            there = f"{len(plots)} plots: {', '.join(one.name for one in plots)}" if plots else "no plot (NXdata)"
            raise InputError(f"{source}: holds {there}, and no default; say --columns; there are {_datasets(file)}")
        group = plots[0]
    signal = _signal(group)
    assert signal is not None
    axis = _axis(group, signal)
    if axis is None:
        raise InputError(f"{source}: {signal.name}: its axis is not named; say --columns; there are {_datasets(file)}")
    name = signal.name.rsplit("/", 1)[-1]
    # NXdata's own names, oldest last
    names = [_text(signal.attrs.get("uncertainties")), f"{name}_errors", "errors", f"{name}_error", "error"]
    errors = [group[one] for one in names if one and isinstance(group.get(one), h5py.Dataset)]
    return [axis, signal, *errors[:1]]


def _signal(group: h5py.Group) -> h5py.Dataset | None:
    datasets = {name: item for name, item in group.items() if isinstance(item, h5py.Dataset)}
    if found := datasets.get(_text(group.attrs.get("signal"))):
        return found
    return next((item for item in datasets.values() if _text(item.attrs.get("signal")) == "1"), None)


def _axis(group: h5py.Group, signal: h5py.Dataset) -> h5py.Dataset | None:
    """The axis along which the signal has more than one value."""
    axes = _texts(group.attrs.get("axes", signal.attrs.get("axes")))
    if len(axes) == 1:
        axes = [name for name in axes[0].strip("[]").replace(":", ",").split(",") if name]
    long = [place for place, length in enumerate(signal.shape) if length > 1]
    place = long[0] if len(axes) == signal.ndim and len(long) == 1 else -1
    found = group.get(axes[place].strip()) if axes else None
    return found if isinstance(found, h5py.Dataset) else None


def _values(dataset: h5py.Dataset, source: str) -> np.ndarray:
    if dataset.size > ROWS_MAX:
        raise InputError(f"{source}: {dataset.name}: {dataset.size:,} values, at most {ROWS_MAX:,} are read; rebin it")
    if dataset.dtype.kind not in "fiu":
        raise InputError(f"{source}: {dataset.name}: not numbers but {dataset.dtype}")
    values = np.squeeze(dataset[()]).astype(float)
    if values.ndim != 1:
        raise InputError(
            f"{source}: {dataset.name}: {' × '.join(map(str, dataset.shape))} values; sum over detectors or momentum "
            "transfer, or select one spectrum, before"
        )
    return values


def _text(value: Any) -> str:
    """An attribute as text; NeXus writes text, bytes, numbers, and arrays of one of them."""
    texts = _texts(value)
    return texts[0] if texts else ""


def _texts(value: Any) -> list[str]:
    if value is None:
        return []
    return [one.decode() if isinstance(one, bytes) else str(one) for one in np.atleast_1d(value).tolist()]


def _datasets(file: h5py.File) -> str:
    found: list[str] = []
    file.visititems(lambda name, item: found.append(name) if isinstance(item, h5py.Dataset) and item.ndim else None)
    return ", ".join(found[:12]) + (", …" if len(found) > 12 else "") if found else "none"
