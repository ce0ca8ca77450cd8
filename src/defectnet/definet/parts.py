"""Division of pairs into what is learned from and what is asked about."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from defectnet.definet.pairs import Pair
from defectnet.errors import InputError
from defectnet.seeds import generator

TESTS = ("dopant", "host", "test")
"""Parts that no training sees: dopants of known hosts, hosts, and the test part of a published division."""

PARTS = ("train", "validation", *TESTS)


def deal(pairs: Sequence[Pair], validation_fraction: float, test_fraction: float, seed: int) -> dict[str, np.ndarray]:
    """Indices of the pairs in each part, ascending; parts without any are left out.

    Hosts are dealt out first, equal compositions together: ``test_fraction`` of them to ``host``,
    ``validation_fraction`` to ``validation``. Then, in every other host with three dopants or more, dopants: a pair
    with any that is held out for the test goes to ``dopant``, of the rest one with any for validation to
    ``validation``. A dopant may be held out of one host and be trained on in another. Where pairs bring a published
    division with them, that counts.

    Raises :class:`InputError` where there is too little to divide.
    """
    if any(pair.part for pair in pairs):
        part = [pair.part for pair in pairs]
    else:
        part = _dealt(pairs, (validation_fraction, test_fraction), seed)
    parts = {name: np.flatnonzero(np.array(part) == name) for name in PARTS}
    for name in ("train", "validation"):
        if not len(parts[name]):
            raise InputError(
                f"no pair is left for {name}: {len(pairs)} relaxations of {len({p.host for p in pairs})} hosts are too "
                "few to divide, or the published division has no such part; finish more batches, or give all its files"
            )
    return {name: index for name, index in parts.items() if len(index)}


def _dealt(pairs: Sequence[Pair], fractions: tuple[float, float], seed: int) -> list[str]:
    hosts = _shuffled({pair.host for pair in pairs}, seed, "host")
    counts = [min(max(1, round(fraction * len(hosts))), len(hosts) // 4) for fraction in fractions]
    part_of_host = dict.fromkeys(hosts[: counts[1]], "host")
    part_of_host |= dict.fromkeys(hosts[counts[1] : sum(counts)], "validation")
    held_out: dict[str, list[set[str]]] = {}
    for host in hosts[sum(counts) :]:
        species = _shuffled(set().union(*(pair.species for pair in pairs if pair.host == host)), seed, host)
        test, validation = (max(1, round(fraction * len(species))) for fraction in reversed(fractions))
        if len(species) < 3:
            test = validation = 0
        held_out[host] = [set(species[:test]), set(species[test : test + validation])]

    def part(pair: Pair) -> str:
        if pair.host in part_of_host:
            return part_of_host[pair.host]
        for held, name in zip(held_out[pair.host], ("dopant", "validation"), strict=True):
            if pair.species & held:
                return name
        return "train"

    return [part(pair) for pair in pairs]


def _shuffled(names: set[str], seed: int, purpose: str) -> list[str]:
    return generator(seed, "definet", "parts", purpose).permutation(sorted(names)).tolist()
