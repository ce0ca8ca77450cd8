"""Writing files so that a reader sees them whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from defectnet.errors import RecordError


def write_atomically(path: Path, data: bytes) -> None:
    """Write a whole file under a temporary name, sync it, move it into place.

    Raises :class:`RecordError` naming the file and the remedy when the disk is full or not writable.
    """
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise RecordError(
            f"{path}: cannot write {len(data)} bytes: {error.strerror}; free space or fix the permissions of "
            f"{path.parent} and run again: everything written so far is intact"
        ) from error


def write_json(path: Path, content: Any) -> None:
    """Write JSON to be read by people as well; see :func:`write_atomically`."""
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
