"""What the potentials that load checkpoints share: finding package, file and device, and preparing torch."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from defectnet.config import Potential
from defectnet.errors import InputError

log = logging.getLogger(__name__)


def package_version(potential: str, package: str, supported: str) -> str:
    """Version of ``package`` in this interpreter. Raises InputError unless it starts with ``supported``."""
    try:
        installed = version(package)
    except PackageNotFoundError:
        installed = "none"
    if not installed.startswith(supported):
        raise InputError(
            f"potential.name: {potential} needs the package {package} {supported}*, found {installed} in "
            f"{sys.executable}; run `make envs` and point potential.python at .venvs/{potential}/bin/python"
        )
    return installed


def named_checkpoint(settings: Potential, kind: str) -> Path | None:
    """The file that ``potential.checkpoint`` names, or None; ``kind`` describes it in the message of an InputError."""
    if settings.checkpoint is None:
        return None
    path = Path(settings.checkpoint).expanduser()
    if not path.is_file():
        raise InputError(
            f"potential.checkpoint: {path}: no such file; put the {kind} there, or set potential.checkpoint to null "
            "to use the pretrained potential.model"
        )
    return path


def warn_of_pickle(path: Path) -> None:
    """Say that a checkpoint is about to be unpickled."""
    log.warning("%s is a Python pickle: loading it runs the code in it, so it must come from a source you trust", path)


def wrong_file(path: Path, kind: str, error: Exception) -> InputError:
    """The exception to raise when a checkpoint cannot be read as a ``kind``, whatever reading it raised."""
    return InputError(f"potential.checkpoint: {path}: not a {kind} ({type(error).__name__}: {error})")


def model_name(settings: Potential, modality: str | None = None) -> str:
    """Name of the model for its identity: the checkpoint's file name where there is one, then the modality."""
    name = settings.model if settings.checkpoint is None else Path(settings.checkpoint).name
    return name if modality is None else f"{name}:{modality}"


def choose_modality(settings: Potential, known: list[str]) -> str | None:
    """The modality to use of a model that knows ``known``.

    Raises InputError where one is needed and missing, unknown, or given to a model that has none.
    """
    name = model_name(settings)
    if settings.modality in known or (settings.modality is None and not known):
        return settings.modality
    if not known:
        raise InputError(f"potential.modality: {name} has no modalities; set potential.modality to null")
    raise InputError(f"potential.modality: {name} needs one of {', '.join(known)}, not {settings.modality}")


def choose_device(settings: Potential) -> str:
    """``cpu`` or ``cuda``. Raises InputError when a GPU was asked for that torch does not see."""
    import torch

    if settings.device == "cuda" and not torch.cuda.is_available():
        raise InputError("potential.device: cuda was asked for, but torch sees no GPU; use auto or cpu")
    return "cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu"


def prepare_torch(device: str) -> None:
    """Make results repeatable and memory cheap."""
    import torch

    # Sums over edges in a fixed order, so that an interrupted run and a complete one agree to the last bit.
    torch.use_deterministic_algorithms(True, warn_only=True)
    if device == "cpu":
        _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Let glibc keep freed memory instead of returning it to the kernel after every pass.

    A forward pass allocates and frees hundreds of megabytes; the page faults of getting them back cost 10-20 % of
    the time on two cores (tests/bench/evaluation.py).
    """
    if sys.platform != "linux" or os.environ.get("MALLOC_TRIM_THRESHOLD_"):
        return
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # M_* of <malloc.h>
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # absent from musl
        libc.mallopt(mmap_threshold, 1 << 25)  # the largest value glibc accepts
        libc.mallopt(trim_threshold, (1 << 31) - 1)
        libc.mallopt(top_pad, 1 << 28)
