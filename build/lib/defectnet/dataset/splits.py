"""Division of spectra into training, validation and test parts without leaks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from defectnet.dataset.schema import HostTable
from defectnet.errors import InputError
from defectnet.seeds import generator

KINDS = ("host", "row")
"""host: no crystal in two parts, the measure of what a model knows about *new* materials. row: spectra are dealt out
one by one, so that the test asks about new arrangements in known materials (the published, more flattering split)."""


@dataclass(frozen=True)
class Split:
    """Row numbers of the three parts, ascending; together each row once."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def host_groups(hosts: HostTable) -> np.ndarray:
    """Group number [H] of each host; hosts of equal composition share one.

    Polymorphs have nearly the same answer to every question the network is asked, so they stay together.
    """
    rounded = np.round(hosts.composition, 4)
    return np.unique(rounded, axis=0, return_inverse=True)[1].reshape(-1)


def split(
    groups: np.ndarray, kind: str, validation_fraction: float, test_fraction: float, seed: int, repeat: int = 0
) -> Split:
    """Deal rows out to the three parts.

    Parameters: ``groups`` [n] group number of each row (used by kind ``host``), shares of groups (or rows) for
    validation and test, each rounded but at least one. Deterministic in (groups, kind, fractions, seed, repeat).
    Successive repeats test successive, disjoint blocks of one shuffled order until every block had its turn, then
    of a newly shuffled one: pooled over repeats, the test parts cover the groups evenly.

    Raises :class:`InputError` for fewer than three groups.
    """
    if kind not in KINDS:
        raise InputError(f"split {kind!r} is none of {', '.join(KINDS)}")
    members = np.unique(groups, return_inverse=True)[1] if kind == "host" else np.arange(len(groups))
    n = int(members.max()) + 1 if len(members) else 0
    if n < 3:
        what = "different host compositions" if kind == "host" else "doped spectra"
        raise InputError(
            f"a {kind} split needs at least 3 {what} for training, validation and test, but the dataset has {n}; "
            "add hosts to the host sheet" + (" or use the row split" if kind == "host" else "")
        )
    n_test = int(np.clip(round(test_fraction * n), 1, n - 2))
    n_validation = int(np.clip(round(validation_fraction * n), 1, n - n_test - 1))
    cycle, block = divmod(repeat, n // n_test)
    order = np.roll(generator(seed, "split", kind, str(cycle)).permutation(n), -block * n_test)
    part = np.zeros(n, dtype=int)
    part[order[:n_test]] = 2
    part[order[n_test : n_test + n_validation]] = 1
    return Split(*(np.flatnonzero(part[members] == which) for which in range(3)))
