"""Progress of long loops: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

log = logging.getLogger(__name__)

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 30.0


def track(items: Sequence[T], description: str) -> Iterator[T]:
    """Yield the items, showing how far the loop has come."""
    if sys.stderr.isatty():
        yield from tqdm(items, desc=description, leave=False)
        return
    began = last = time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() - last > SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            left = (last - began) / done * (len(items) - done)
            log.info("%s: %d of %d, about %.0f s left", description, done, len(items), left)
        yield item
