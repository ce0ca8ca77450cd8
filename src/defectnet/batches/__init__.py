"""Batches of hosts: the unit that a job works through, one record at a time.

A host has the items ``pristine``, ``doped-0``, ``doped-1`` … . Each stage turns an item into a record whose key is
known before anything is computed: it digests the item's input and settings and the key of the stage before.
A job computes what has no record yet; an item that fails is recorded with its reason and stops no other.
"""

from __future__ import annotations

from collections.abc import Sequence

from defectnet.batches.library import library_batch
from defectnet.batches.phonons import phonon_batch
from defectnet.batches.pristine import WIDE
from defectnet.batches.relax import relax_batch
from defectnet.batches.superposed import COMPARISON, RESPONSES, superpose_batch
from defectnet.batches.worker import PRISTINE, atoms_of, modes_of, structure_of
from defectnet.config import Config
from defectnet.errors import InputError
from defectnet.hosts.sheet import Host

__all__ = [
    "COMPARISON",
    "PRISTINE",
    "RESPONSES",
    "WIDE",
    "assign",
    "atoms_of",
    "library_batch",
    "modes_of",
    "phonon_batch",
    "relax_batch",
    "select_batch",
    "structure_of",
    "superpose_batch",
]


def assign(hosts: Sequence[Host], config: Config) -> dict[str, list[str]]:
    """Ids of the hosts of each batch by its name, in the order of the sheet.

    Hosts appended to the sheet never move earlier ones. One host per batch is named after it; larger batches are
    numbered. With ``hosts.per_batch: auto`` a batch is closed when its longest job would take more than
    ``hosts.batch_minutes``; what is learned in config/costs.json later moves hosts, but loses no record.
    """
    per_batch = config.hosts.per_batch
    if per_batch == 1:
        return {host.id: [host.id] for host in hosts}
    if per_batch == "auto":
        from defectnet.costs import fill  # scipy and spglib, which nothing else needs here

        chunks = fill(hosts, config)
    else:
        chunks = [hosts[first : first + per_batch] for first in range(0, len(hosts), per_batch)]
    return {f"batch-{number:05d}": [host.id for host in chunk] for number, chunk in enumerate(chunks)}


def select_batch(hosts: Sequence[Host], config: Config, name: str) -> list[Host]:
    """The hosts of one batch. Raises :class:`InputError` for a name that no batch has."""
    batches = assign(hosts, config)
    if name not in batches:
        raise InputError(f"--batch: no batch {name!r}; there are {', '.join(list(batches)[:8])} …")
    wanted = set(batches[name])
    return [host for host in hosts if host.id in wanted]
