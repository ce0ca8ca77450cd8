"""Division of spectra into training, validation and test parts without leaks.

What each kind asks:

``host``
    New materials: no crystal, and no other crystal of the same composition, is in two parts. Where all hosts have one
    composition, new structures of it.
``row``
    New arrangements in known materials, all spectra dealt out one by one (the published, more flattering split).
``configuration``
    New arrangements in known materials as they really are: training and validation on superposed and mass-only spectra,
    test on all direct and probed ones of hosts of the same compositions. The test part is the same in every repeat;
    repeats differ in what is kept for validation.
``element``
    New dopants: elements are dealt out. Training spectra hold no dopant of the other parts, and training must not
    ask about those either (:func:`without_unseen`): an element that is a candidate everywhere and present nowhere
    teaches that it never occurs. Validation spectra hold an element of their part and none of the test, test spectra
    at least one of the test.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage

from defectnet.dataset.samples import Samples
from defectnet.dataset.schema import RELAXED, Dataset
from defectnet.errors import InputError
from defectnet.seeds import generator

KINDS = ("host", "row", "configuration", "element")
SAME_CRYSTAL = 0.02
"""Share of the area by which pristine spectra of one crystal may differ. Two networks of 64 silicon atoms that relaxed
to the crystal differ by 0.005, the most similar two that stayed disordered by 0.07."""


@dataclass(frozen=True)
class Split:
    """Row numbers of the three parts, ascending; each row once at most."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def host_groups(data: Dataset) -> np.ndarray:
    """Group number [H] of each host; hosts of equal composition share one.

    Polymorphs have nearly the same answer to every question the network is asked, so they stay together. Where all
    hosts have one composition, as disordered ones of an element do, each is a group of its own, but those whose
    pristine spectra are alike (:data:`SAME_CRYSTAL`) share one: some may have relaxed to the same crystal.
    """
    rounded = np.round(data.hosts.composition, 4)
    groups = np.unique(rounded, axis=0, return_inverse=True)[1].reshape(-1)
    if len(groups) < 2 or groups.any():
        return groups
    shares = data.spectra.pdos[data.hosts.pristine] * np.diff(data.edges_meV)
    # Half of the sum of the differences is the share of the area that is elsewhere.
    return fcluster(linkage(shares, "single", metric="cityblock"), 2 * SAME_CRYSTAL, "distance") - 1


def split(
    groups: np.ndarray,
    kind: str,
    validation_fraction: float,
    test_fraction: float,
    seed: int,
    repeat: int = 0,
    *,
    fidelity: np.ndarray | None = None,
    targets: np.ndarray | None = None,
) -> Split:
    """Deal rows out to the three parts.

    Parameters: ``groups`` [n] group number of each row (kinds ``host`` and ``configuration``); shares of groups, rows
    or elements for validation and test, each rounded but at least one; ``fidelity`` [n] of each row (``configuration``,
    which has no use for ``test_fraction``); ``targets`` [n, 56] concentrations (``element``). Deterministic in these,
    seed and repeat. Successive repeats test successive, disjoint blocks of one shuffled order until every block had
    its turn, then of a newly shuffled one: pooled over repeats, the test parts cover what is dealt out evenly.

    Raises :class:`InputError` where there is too little to divide.
    """
    if kind not in KINDS:
        raise InputError(f"split {kind!r} is none of {', '.join(KINDS)}")
    fractions = validation_fraction, test_fraction
    if kind == "configuration":
        return _configuration(groups, fidelity, validation_fraction, seed, repeat)
    if kind == "element":
        return _element(targets, *fractions, seed, repeat)
    members = np.unique(groups, return_inverse=True)[1] if kind == "host" else np.arange(len(groups))
    n = int(members.max()) + 1 if len(members) else 0
    if n < 3:
        what = "host compositions (or structures of a single one)" if kind == "host" else "doped spectra"
        raise InputError(
            f"a {kind} split needs at least 3 {what} for training, validation and test, but the dataset has {n}; "
            "add hosts to the host sheet" + (" or use the row split" if kind == "host" else "")
        )
    part = _deal(n, kind, *fractions, seed, repeat)
    return Split(*(np.flatnonzero(part[members] == which) for which in range(3)))


def _deal(n: int, kind: str, validation_fraction: float, test_fraction: float, seed: int, repeat: int) -> np.ndarray:
    """Part [n] of each of n things: 0 training, 1 validation, 2 test."""
    n_test = int(np.clip(round(test_fraction * n), 1, n - 2))
    n_validation = int(np.clip(round(validation_fraction * n), 1, n - n_test - 1))
    cycle, block = divmod(repeat, n // n_test)
    order = np.roll(generator(seed, "split", kind, str(cycle)).permutation(n), -block * n_test)
    part = np.zeros(n, dtype=int)
    part[order[:n_test]] = 2
    part[order[n_test : n_test + n_validation]] = 1
    return part


def _configuration(
    groups: np.ndarray, fidelity: np.ndarray | None, validation_fraction: float, seed: int, repeat: int
) -> Split:
    if fidelity is None:
        raise ValueError("a configuration split needs the fidelity of each row")
    relaxed = np.isin(fidelity, RELAXED)
    made = np.flatnonzero(~relaxed)
    test = np.flatnonzero(relaxed & np.isin(groups, groups[made]))
    if len(made) < 2 or not len(test):
        raise InputError(
            "a configuration split needs a host with direct or probed spectra and two superposed or mass-only ones, "
            f"but of {len(fidelity)} doped spectra of the dataset {len(made)} are superposed or mass-only and "
            f"{len(test)} others belong to their hosts; raise superposition.superposed_per_host"
        )
    n_validation = int(np.clip(round(validation_fraction * len(made)), 1, len(made) - 1))
    order = generator(seed, "split", "configuration", str(repeat)).permutation(made)
    return Split(np.sort(order[n_validation:]), np.sort(order[:n_validation]), test)


def _element(
    targets: np.ndarray | None, validation_fraction: float, test_fraction: float, seed: int, repeat: int
) -> Split:
    if targets is None:
        raise ValueError("an element split needs the concentrations of each row")
    present = targets > 0
    elements = np.flatnonzero(present.any(axis=0))
    if len(elements) >= 3:
        part_of = np.zeros(targets.shape[1], dtype=int)
        part_of[elements] = _deal(len(elements), "element", validation_fraction, test_fraction, seed, repeat)
        # A spectrum belongs to the part of the least known of its dopants.
        part = (present * part_of).max(axis=1)
        parts = Split(*(np.flatnonzero(part == which) for which in range(3)))
        if all(len(rows) for rows in vars(parts).values()):
            return parts
    raise InputError(
        f"an element split needs spectra without the dopants that are held out, but with {len(elements)} different "
        f"dopants in {len(targets)} doped spectra a part is empty; add hosts to the host sheet, or lower "
        "training.validation_fraction and training.test_fraction"
    )


def thinned(parts: Split, groups: np.ndarray, fraction: float, seed: int, repeat: int = 0) -> Split:
    """The same with a share of the training groups only, at least one; smaller shares are parts of larger ones.

    ``groups`` [n] are the hosts' of each row, or every row's own.
    """
    members = np.unique(groups[parts.train])
    order = generator(seed, "split", "thinned", str(repeat)).permutation(members)
    kept = order[: max(1, round(fraction * len(members)))]
    return replace(parts, train=parts.train[np.isin(groups[parts.train], kept)])


def without_unseen(training: Samples) -> Samples:
    """The training part of an ``element`` split, not asking about elements that none of its spectra holds."""
    seen = (training.targets > 0).any(axis=0)
    return replace(training, candidates=training.candidates & seen)
