"""One GPU for each job on a machine that has several and no scheduler to hand them out.

Snakemake counts how many jobs may use GPUs at a time, but not which job uses which. Here a job takes the first free
slot and with it a device: slots go round the devices, so that further workers share them evenly. A slot is a locked
file; the kernel lifts the lock when its job ends, however it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

log = logging.getLogger(__name__)

VISIBLE = "CUDA_VISIBLE_DEVICES"


def slots_folder() -> Path:
    """Where slots are locked: local to the machine, whatever the number of runs on it."""
    return Path(tempfile.gettempdir()) / f"defectnet-gpus-{os.getuid()}"


@contextlib.contextmanager
def one_gpu(gpus: int | None) -> Iterator[str | None]:
    """Make one of ``gpus`` devices the only visible one inside the block; None leaves everything as it is.

    Has to surround the import of whatever uses GPUs. If CUDA_VISIBLE_DEVICES is set, its devices are handed out.
    """
    if gpus is None:
        yield None
        return
    visible = os.environ.get(VISIBLE)
    devices = (visible.split(",") if visible else [str(number) for number in range(gpus)])[:gpus]
    folder = slots_folder()
    folder.mkdir(exist_ok=True)
    with contextlib.ExitStack() as held:
        for number in count():
            file = held.enter_context((folder / f"slot-{number}").open("w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            os.environ[VISIBLE] = devices[number % len(devices)]
            log.info("GPU %s of %d", os.environ[VISIBLE], len(devices))
            break
        try:
            yield os.environ[VISIBLE]
        finally:
            if visible is None:
                del os.environ[VISIBLE]
            else:
                os.environ[VISIBLE] = visible
