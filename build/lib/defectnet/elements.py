"""Chemical elements: the vocabulary, and arrays indexed by atomic number."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from ase.data import atomic_numbers, chemical_symbols

MAX_Z = 56
"""Largest atomic number of the published vocabulary (Ba). Per-element arrays have length MAX_Z and index Z - 1."""

NOBLE_GASES = ("He", "Ne", "Ar", "Kr", "Xe")

PUBLISHED_VOCABULARY = tuple(s for s in chemical_symbols[1 : MAX_Z + 1] if s not in NOBLE_GASES)
"""H-Ba without noble gases (arXiv:2506.00725)."""


def element_vector(amounts: Mapping[str, float]) -> np.ndarray:
    """Array [MAX_Z] with ``amounts[symbol]`` at index Z - 1, zero elsewhere."""
    vector = np.zeros(MAX_Z)
    for symbol, amount in amounts.items():
        vector[atomic_numbers[symbol] - 1] = amount
    return vector


def element_amounts(vector: np.ndarray) -> dict[str, float]:
    """Inverse of :func:`element_vector`: the non-zero entries of an array [MAX_Z], by symbol."""
    return {chemical_symbols[z + 1]: float(vector[z]) for z in np.flatnonzero(vector)}
