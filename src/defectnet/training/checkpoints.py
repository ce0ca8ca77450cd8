"""What every training needs of PyTorch: reproducible numbers, and files of weights that are whole and run no code."""

from __future__ import annotations

import io
import logging
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from defectnet.errors import InputError, RecordError
from defectnet.files import write_atomically

log = logging.getLogger(__name__)


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Seeded and deterministic PyTorch inside, the caller's settings again outside."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this
    before = torch.are_deterministic_algorithms_enabled()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)


def save(path: Path, content: dict[str, Any]) -> None:
    """Write tensors and plain values atomically."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


def load(path: Path, command: str = "defectnet train") -> dict[str, Any]:
    """Read what :func:`save` wrote, on the CPU and without running code in it (``weights_only``).

    Raises :class:`InputError` when there is none and :class:`RecordError` when it is damaged; ``command`` makes one.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint; make it with `{command}`") from None
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise RecordError(
            f"{path}: not a readable checkpoint ({reason(error)}); name a checkpoint.pt, or rerun `{command}` if this "
            "one is damaged"
        ) from None
    return content if isinstance(content, dict) else {}


def load_state(path: Path, about: dict[str, Any]) -> dict[str, Any] | None:
    """The state of an interrupted training with the same data and settings, which it has under ``about``, if any."""
    if not path.exists():
        return None
    try:
        content = load(path)
    except RecordError as error:
        log.warning("%s; starting from the first epoch", error)
        return None
    if content.get("about") != about:
        log.warning("%s belongs to other data or settings; starting from the first epoch", path)
        return None
    return content


def reason(error: Exception) -> str:
    """Kind and first line: PyTorch explains itself in paragraphs, and advises to run code in what it cannot read."""
    if isinstance(error, pickle.UnpicklingError):
        return "neither tensors nor plain values in it"
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
