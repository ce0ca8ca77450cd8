"""Independent random streams, so that a result depends on its own purpose and on nothing that ran before it."""

from __future__ import annotations

import hashlib
import json

import numpy as np


def generator(seed: int, *purpose: str) -> np.random.Generator:
    """The random stream of one purpose, e.g. ``generator(config.run.seed, host_id, "plan", "3")``.

    The same arguments give the same stream on every machine; any other arguments give an independent one: the SHA-256
    of ``purpose`` is the spawn key of a ``numpy.random.SeedSequence`` whose entropy is ``seed`` (>= 0).
    Raises ``ValueError`` for a negative seed.
    """
    # JSON keeps the boundaries: ("ab", "c") and ("a", "bc") are different purposes.
    digest = hashlib.sha256(json.dumps(purpose).encode()).digest()
    words = np.frombuffer(digest, dtype="<u4").tolist()
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=words))
