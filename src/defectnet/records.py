"""Content-addressed records: one file per finished computation, so that nothing computed is ever lost.

A record is one structure's work in one stage: a JSON header and named arrays in a small HDF5 file,
``<root>/<stage>/<host>/<key>.h5``. The key is a digest of everything that *determines* the result (input structure,
settings, potential and its weights, :data:`PHYSICS_VERSION`), never of the result itself; a job looks its keys up
and computes only what is missing. A record carries a checksum of its content, is written under a temporary name
and moved into place, so that a reader sees it whole or not at all.

A manifest is the list of records that one batch produced in one stage, ``<results>/<stage>/<batch>.json``; it is
what Snakemake tracks, because records must survive a failed job and Snakemake deletes the outputs of one.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from defectnet.errors import RecordError
from defectnet.files import write_atomically

log = logging.getLogger(__name__)

PHYSICS_VERSION = 5
"""Part of every key. Raise it when a change of the code changes the numbers that a stage computes."""


CHECKSUM_BYTES = 32
"""A record file ends with the SHA-256 of what precedes it; HDF5 tools ignore trailing bytes."""


@dataclass(frozen=True)
class Record:
    """Header (JSON values) and arrays of one finished or failed computation.

    ``header["status"]`` is ``done`` or ``failed``; a failed one has a ``reason``. ``header["cost"]`` holds what
    depends on the machine (wall time, device) and is no part of the physics.
    """

    header: dict[str, Any]
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        """Whether the computation finished."""
        return self.header["status"] == "done"

    def checksum(self) -> str:
        """SHA-256 of header and arrays."""
        total = hashlib.sha256(json.dumps(self.header, sort_keys=True).encode())
        for name in sorted(self.arrays):
            array = np.ascontiguousarray(self.arrays[name])
            total.update(f"{name}{array.dtype.str}{array.shape}".encode())
            total.update(array.tobytes())
        return total.hexdigest()


def read_record(path: Path) -> Record:
    """Read one record. Raises :class:`RecordError` if it is damaged, FileNotFoundError if there is none."""
    with _opened(path) as file:
        return Record(json.loads(file.attrs["header"]), {name: file[name][()] for name in file})


def read_header(path: Path) -> dict[str, Any]:
    """Read the header of a record and not its arrays; raises as :func:`read_record` does."""
    with _opened(path) as file:
        return json.loads(file.attrs["header"])


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    data = path.read_bytes()
    content, checksum = data[:-CHECKSUM_BYTES], data[-CHECKSUM_BYTES:]
    if hashlib.sha256(content).digest() != checksum:  # before HDF5 sees it: damaged metadata can crash the library
        raise RecordError(f"{path}: content does not match its checksum")
    try:
        with h5py.File(io.BytesIO(content), "r") as file:
            yield file
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise RecordError(f"{path}: not a readable record ({error})") from None


def write_record(path: Path, record: Record) -> None:
    """Write atomically. Raises :class:`RecordError`, leaving no partial file, when the disk refuses."""
    buffer = io.BytesIO()  # HDF5 in memory first: it does not survive a full disk, a plain write does
    with h5py.File(buffer, "w") as file:
        file.attrs["header"] = json.dumps(record.header, sort_keys=True)
        for name, array in record.arrays.items():
            file.create_dataset(name, data=array, compression="gzip", shuffle=True, track_times=False)
    content = buffer.getvalue()
    write_atomically(path, content + hashlib.sha256(content).digest())


@dataclass(frozen=True)
class RecordStore:
    """The records of a run, ``<root>/<stage>/<host>/<key>.h5``."""

    root: Path

    def path(self, stage: str, host: str, key: str) -> Path:
        """Where the record with this key lives, whether it exists or not."""
        return self.root / stage / host / f"{key[:32]}.h5"

    def find(self, stage: str, host: str, key: str) -> Record | None:
        """The record with this key, or None. A damaged one is set aside as ``*.damaged`` and counts as missing."""
        path = self.path(stage, host, key)
        try:
            return read_record(path)
        except FileNotFoundError:
            return None
        except RecordError as error:
            aside = path.with_suffix(".damaged")
            path.replace(aside)
            log.warning("%s; set aside as %s and computed again", error, aside.name)
            return None

    def read(self, stage: str, host: str, key: str) -> Record:
        """The record with this key, which a manifest names. Raises :class:`RecordError` if it is gone or damaged."""
        record = self.find(stage, host, key)
        if record is None:
            raise RecordError(f"{self.path(stage, host, key)}: gone; run `defectnet {stage}` again")
        return record

    def save(self, stage: str, host: str, key: str, record: Record) -> None:
        """Store a record under its key. Raises :class:`RecordError`."""
        path = self.path(stage, host, key)
        write_record(path, record)
        for stale in path.parent.glob(".*.tmp"):  # left by killed jobs; a live one is seconds old
            with contextlib.suppress(FileNotFoundError):  # another writer has just moved it into place
                if time.time() - stale.stat().st_mtime > 86400:
                    stale.unlink()


@dataclass(frozen=True)
class Entry:
    """One line of a manifest: an item of a host (``pristine``, ``doped-0`` …) and what became of it.

    status: ``done``, ``failed`` (the record says why) or ``skipped`` (something it needs has failed; no record).
    """

    host: str
    item: str
    status: str
    key: str = ""
    reason: str = ""


def write_manifest(path: Path, entries: list[Entry]) -> None:
    """Write a batch's manifest atomically."""
    text = json.dumps([asdict(entry) for entry in entries], indent=1) + "\n"
    write_atomically(path, text.encode())


def read_manifest(path: Path) -> list[Entry]:
    """Read a batch's manifest. Raises :class:`RecordError`."""
    try:
        return [Entry(**entry) for entry in json.loads(path.read_text())]
    except FileNotFoundError:
        raise RecordError(f"{path}: no such manifest; run its stage for this batch, or the workflow") from None
    except (ValueError, TypeError) as error:
        raise RecordError(f"{path}: not a manifest ({error}); delete it and run again") from None


def withdraw_stale_manifests(results: Path, stages: tuple[str, ...]) -> list[Path]:
    """Delete manifests that name a record which is no longer on disk, so that their batches run again.

    Snakemake sees manifests only; this is how it learns that somebody deleted a record. Returns what was deleted.
    """
    withdrawn = []
    store = RecordStore(results / "records")
    for stage in stages:
        for manifest in sorted((results / stage).glob("*.json")):
            entries = read_manifest(manifest)
            if any(entry.key and not store.path(stage, entry.host, entry.key).exists() for entry in entries):
                manifest.unlink()
                withdrawn.append(manifest)
    return withdrawn
