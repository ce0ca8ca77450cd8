"""Where relaxations of doped supercells start: a guess of where the atoms go, and of the force constants there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from defectnet.batches.library import read_library
from defectnet.batches.pristine import pristine_phonons
from defectnet.batches.worker import Job, structure_of
from defectnet.digests import digest, file_digest
from defectnet.phonons.crystal import Folding
from defectnet.records import Entry, Record
from defectnet.supercells import HostPlan, Plan, apply

if TYPE_CHECKING:
    from defectnet.definet.fit import Trained


class Start(Protocol):
    """What knows where relaxations of one host's doped supercells should start."""

    def digest(self, plan: Plan) -> str:
        """What the start of an arrangement depends on besides the host's structure; empty if there is none."""

    def guess(self, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
        """Displacements [N, 3] in Å from the sites of the host, and Hessian [3N, 3N] in eV/Å²."""


@dataclass(frozen=True)
class OneStepStart:
    """Positions by a network that relaxes in one step, with the force constants of the host.

    folding, hessian: the undoped supercell and its force constants [3N, 3N]
    key             : what network and force constants are identified by
    """

    trained: Trained
    folding: Folding
    hessian: np.ndarray
    key: str

    def digest(self, plan: Plan) -> str:
        """The same for every arrangement."""
        return self.key

    def guess(self, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`Start`."""
        from defectnet.definet.relax import relax_in_one_step

        host = self.folding.atoms
        moved = relax_in_one_step(self.trained, apply(plan, host), host.numbers).positions - host.positions
        return moved, self.hessian


def start_of(job: Job, relaxation: Entry, relaxed: Record, plan: HostPlan, library: Sequence[Entry]) -> Start | None:
    """Where ``relaxation.start`` says that the doped supercells of a relaxed host start; None: at its sites."""
    settings = job.config.relaxation
    if settings.start == "unrelaxed" or (settings.start == "superposed" and not library):
        return None
    entry, pristine = pristine_phonons(job, relaxation, relaxed, plan.matrix)
    if not pristine.done:
        return None
    if settings.start == "superposed":
        return read_library(job.store, relaxed, pristine, plan, library)
    from defectnet.definet.fit import load_trained  # torch

    path = Path(settings.definet)
    folding = Folding.of(structure_of(relaxed), plan.matrix)
    hessian = folding.hessian(pristine.arrays["force_constants"].astype(float))
    return OneStepStart(load_trained(path), folding, hessian, digest(network=file_digest(path), phonons=entry.key))
