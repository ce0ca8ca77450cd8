"""Where relaxations of doped supercells start: a guess of where the atoms go, and of the force constants there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np

from defectnet.batches.library import read_library
from defectnet.batches.pristine import force_constants_of, pristine_phonons
from defectnet.batches.worker import Job, structure_of
from defectnet.digests import digest, file_digest
from defectnet.phonons.superposition import Superposition
from defectnet.potentials import LazyModel
from defectnet.records import Entry, Record
from defectnet.supercells import HostPlan, Plan, apply

if TYPE_CHECKING:
    from defectnet.definet.fit import Trained


class Start(Protocol):
    """What knows where relaxations of one host's doped supercells should start.

    evaluations : of forces that each guess takes
    """

    evaluations: ClassVar[int]

    def digest(self, plan: Plan) -> str:
        """What the start of an arrangement depends on besides the host's structure; empty if there is none."""

    def guess(self, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
        """Displacements [N, 3] in Å of the N atoms from their sites of the host, and Hessian [3N, 3N] in eV/Å²."""


@dataclass(frozen=True)
class HarmonicStart:
    """At the sites of the host, with its force constants: the first step is where a harmonic crystal would go.

    host: the undoped supercell and its force constants
    key : what these are identified by
    """

    evaluations: ClassVar[int] = 0
    host: Superposition
    key: str

    def digest(self, plan: Plan) -> str:
        """The same for every arrangement."""
        return self.key

    def guess(self, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`Start`."""
        return np.zeros((len(plan.occupied(len(self.host.folding))), 3)), self.host.unchanged(plan)


@dataclass(frozen=True)
class OneStepStart:
    """Positions by a network that relaxes in one step, with the force constants of the host.

    host      : the undoped supercell and its force constants
    potential : for the forces on the unrelaxed cell, which the network is told
    key       : what network and force constants are identified by
    """

    evaluations: ClassVar[int] = 1
    trained: Trained
    host: Superposition
    potential: LazyModel
    key: str

    def digest(self, plan: Plan) -> str:
        """The same for every arrangement."""
        return self.key

    def guess(self, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`Start`."""
        from defectnet.definet.relax import relax_in_one_step
        from defectnet.models.definet import NOTHING

        sites = self.host.folding.atoms
        kept = plan.occupied(len(sites))
        unrelaxed = apply(plan, sites)
        whole, forces = sites.copy(), np.zeros_like(sites.positions)
        whole.numbers[:] = NOTHING
        whole.numbers[kept] = unrelaxed.numbers
        forces[kept] = self.potential.model.evaluate([unrelaxed]).forces[0]
        moved = relax_in_one_step(self.trained, whole, sites.numbers, self.host, forces).positions - sites.positions
        return moved[kept], self.host.unchanged(plan)


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
    host = Superposition(structure_of(relaxed), plan.matrix, force_constants_of(pristine), [])
    if settings.start == "harmonic":
        return HarmonicStart(host, digest(phonons=entry.key))
    from defectnet.definet.fit import load_trained  # torch

    path = Path(settings.definet)
    key = digest(network=file_digest(path), phonons=entry.key)
    return OneStepStart(load_trained(path), host, job.potential, key)
