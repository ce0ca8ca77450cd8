"""Several compact datasets as one: hosts that were computed apart, to be learned from together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np

from defectnet.dataset.compact import write_array
from defectnet.dataset.schema import Dataset, digest_of, new_file
from defectnet.errors import InputError

SAME = {"vocabulary": "its vocabulary", "spectra": "the block `spectra` that it was made with"}
"""Attributes that parts must have in common, and in words."""
QUALITY = "spectra/quality/"


def join(sources: Sequence[Path], output: Path) -> str:
    """Write the compact datasets ``sources``, one after the other, to ``output``; returns its content digest.

    Every host has its spectra in one of them; hosts that have none in any are listed as in the first that knows them.
    The attribute ``made_from`` holds the digests of the parts (JSON), ``provenance`` is that of the first.

    Raises :class:`InputError` for fewer than two sources, one that is not compact, parts with other vocabularies,
    energies or broadening, and a host with spectra in two of them; :class:`RecordError` for damaged files.
    """
    if len(sources) < 2:
        raise InputError(f"{len(sources)} dataset is nothing to join; name two or more")
    parts, attributes = zip(*(_read(source) for source in sources), strict=True)
    for name, told in SAME.items():
        for source, other in zip(sources, attributes, strict=True):
            if other[name] != attributes[0][name]:
                raise InputError(f"{source}: {told} is not that of {sources[0]}; compute one of them again")
    for part, keep, first_host, first_row in _places(sources, parts):
        new_row = np.cumsum(keep) - 1 + first_host
        part["spectra/host"], part["comparison/host"] = new_row[part["spectra/host"]], new_row[part["comparison/host"]]
        part["spectra/reference"] = part["spectra/reference"] + first_row
        part["hosts/pristine"] = np.where(part["hosts/pristine"] < 0, -1, part["hosts/pristine"] + first_row)
        here = np.isin(part["missing/host"], part["hosts/id"][keep])
        for name in part:
            if name.startswith(("hosts/", "missing/")):
                part[name] = part[name][keep if name.startswith("hosts/") else here]

    with new_file(output) as file:
        file.attrs.update(attributes[0])
        file.attrs["made_from"] = json.dumps([str(other["digest"]) for other in attributes])
        for name in sorted({name for part in parts for name in part}):
            if name.startswith("grid/"):
                values = parts[0][name]
            else:
                values = np.concatenate([_column(part, name) for part in parts])
            # Text of one length; numpy forgets that it is text.
            text = h5py.string_dtype(length=values.dtype.itemsize) if values.dtype.kind == "S" else values.dtype
            group = file.require_group(name.rpartition("/")[0])
            write_array(group, name.rpartition("/")[2], values.astype(text), text)
        file.attrs["digest"] = digest = digest_of(file)
    return digest


def _read(source: Path) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """All arrays by path, and all attributes. Raises as :class:`Dataset` does."""
    with Dataset(source) as data:
        if not data.compact:
            raise InputError(f"{source}: is not compact; make it so with `defectnet compact`")
    columns: dict[str, np.ndarray] = {}
    with h5py.File(source) as file:

        def take(name: str, item: h5py.Group | h5py.Dataset) -> None:
            if isinstance(item, h5py.Dataset):
                columns[name] = item[()]

        file.visititems(take)
        return columns, dict(file.attrs)


def _places(
    sources: Sequence[Path], parts: Sequence[dict[str, np.ndarray]]
) -> list[tuple[dict[str, np.ndarray], np.ndarray, int, int]]:
    """Of each part: itself, which of its hosts stay [H], and the rows where its hosts and its spectra begin."""
    with_spectra = [set(part["hosts/id"][np.unique(part["spectra/host"])].tolist()) for part in parts]
    listed: set[bytes] = set()
    owner: dict[bytes, Path] = {}
    for source, names in zip(sources, with_spectra, strict=True):
        for name in sorted(names & owner.keys()):
            raise InputError(f"{source}: host {name.decode()} has spectra in {owner[name]} as well; leave one out")
        owner |= dict.fromkeys(names, source)
    first_host = first_row = 0
    places = []
    for part, own in zip(parts, with_spectra, strict=True):
        names = part["hosts/id"].tolist()
        keep = np.array([name in own or (name not in owner and name not in listed) for name in names], dtype=bool)
        listed |= set(names)
        places.append((part, keep, first_host, first_row))
        first_host, first_row = first_host + int(keep.sum()), first_row + len(part["spectra/id"])
    return places


def _column(part: dict[str, np.ndarray], name: str) -> np.ndarray:
    """An array of a part; NaN for a measure of quality that it does not have."""
    return part[name] if name in part or not name.startswith(QUALITY) else np.full(len(part["spectra/id"]), np.nan)
