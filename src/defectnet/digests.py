"""Digests of what determines a result: the keys of content-addressed records."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

DECIMALS = 8
"""Lengths enter digests rounded to 1e-8 Å, so that rounding noise of a library does not make a new structure."""


def digest(**parts: Any) -> str:
    """Hexadecimal SHA-256 of named parts (JSON values and arrays), independent of their order."""

    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            rounded = np.round(value.astype(float), DECIMALS) + 0.0  # + 0.0 turns -0.0 into 0.0
            return rounded.tolist()
        raise TypeError(f"cannot digest {type(value).__name__}")

    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=plain).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
