"""Chemical elements and vacancies: the vocabulary, and arrays indexed by what a site may hold.

Arrays over elements have length :data:`MAX_Z` and index Z - 1. Where a vocabulary has :data:`VACANCY`, arrays over
dopants have one place more, the last, for sites that are empty.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from ase.data import atomic_masses, atomic_numbers, chemical_symbols, covalent_radii

MAX_Z = 56
"""Largest atomic number of the published vocabulary (Ba)."""

NOBLE_GASES = ("He", "Ne", "Ar", "Kr", "Xe")

PUBLISHED_VOCABULARY = tuple(s for s in chemical_symbols[1 : MAX_Z + 1] if s not in NOBLE_GASES)
"""H-Ba without noble gases (arXiv:2506.00725)."""

VACANCY = "Vac"
"""Stands in the place of a dopant's symbol for a site without an atom."""

SYMBOLS = (*chemical_symbols[1 : MAX_Z + 1], VACANCY)
"""What each index stands for."""

MASSES = np.append(atomic_masses[1 : MAX_Z + 1], 0.0)
"""In u, by index."""


@dataclass(frozen=True)
class Properties:
    """What networks are told about an element: mass in u, covalent radius in Å (Cordero et al., Dalton Trans. 2832
    (2008)), electronegativity by Pauling (2 for noble gases, which have none), period, group, and electrons beyond the
    noble gas or the full d shell before it.
    """

    mass_u: float
    radius_A: float
    electronegativity: float
    period: int
    group: int
    valence: int

    @classmethod
    def of(cls, z: int) -> Properties:
        """Of the element with an atomic number."""
        from pymatgen.core import Element  # slow to import, and nothing else here needs it

        element = Element.from_Z(z)
        negativity = 2.0 if element.is_noble_gas else element.X
        valence = element.group if element.group < 12 else element.group - 10
        return cls(atomic_masses[z], covalent_radii[z], negativity, element.row, element.group, valence)


def index_of(symbol: str) -> int:
    """Index of an element or of :data:`VACANCY` in arrays over dopants."""
    return MAX_Z if symbol == VACANCY else atomic_numbers[symbol] - 1


def width_of(vocabulary: Collection[str]) -> int:
    """Length of arrays over dopants."""
    return MAX_Z + (VACANCY in vocabulary)


def element_vector(amounts: Mapping[str, float], width: int = MAX_Z) -> np.ndarray:
    """Array [width] with ``amounts[symbol]`` at :func:`index_of`, zero elsewhere."""
    vector = np.zeros(width)
    for symbol, amount in amounts.items():
        vector[index_of(symbol)] = amount
    return vector


def element_amounts(vector: np.ndarray) -> dict[str, float]:
    """Inverse of :func:`element_vector`: the non-zero entries of an array, by symbol."""
    return {SYMBOLS[index]: float(vector[index]) for index in np.flatnonzero(vector)}
