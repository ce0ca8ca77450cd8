"""What a file of one measured spectrum holds, whatever its format: columns and the unit of energy that it states."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from defectnet.errors import InputError
from defectnet.units import INVERSE_CM_TO_MEV, THZ_TO_MEV

UNITS = {"meV": 1.0, "THz": THZ_TO_MEV, "cm-1": INVERSE_CM_TO_MEV}
"""Units of energy that files may have, in meV."""

UNSTATED_TOP_meV = 25.0, 400.0
"""Where the energies of a file that states no unit may end to be taken as meV: below, THz is as likely, above, cm-1."""
TOP_meV = 3.0, 1000.0
"""Where the energies of any spectrum of phonons may end; a stretching mode of O-H lies at 450 meV."""

_UNIT = re.compile(
    r"(?P<meV>(?<![a-zµμ])mev\b|milli-?\s?electron-?\s?volts?)"
    r"|(?P<THz>(?<![a-z])(?:thz|tera-?(?:hz|hertz))\b)"
    r"|(?P<cm>(?<![a-z])cm\s*\^?[{(]?\s*(?:[-−–]\s*1|⁻¹)|\b1\s*/\s*cm\b|wave\s?numbers?|deltae_inwavenumber)"
    r"|(?P<mantid>\bdeltae\b)",  # Mantid's name for an energy transfer in meV
    re.IGNORECASE,
)
_ENERGY = re.compile(
    r"\b(?:energ(?:y|ies)|frequenc(?:y|ies)|wave\s?numbers?|omega|hw|e|x)\b|ω|deltae", re.IGNORECASE
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Columns:
    """Rows as they stand in the file.

    energy, intensity : [P] in the file's units; NaN where a value is missing
    error             : [P] standard deviations of the intensity, or None
    edges             : [P + 1] where the file gives the bins of a histogram, else None; ``energy`` are their centres
    unit              : what the file states, a key of :data:`UNITS` if it is one of them, or None
    """

    energy: np.ndarray
    intensity: np.ndarray
    error: np.ndarray | None
    edges: np.ndarray | None
    unit: str | None


def unit_in(text: str) -> str | None:
    """The unit of energy that a column's name or an attribute states, or None."""
    found = _UNIT.search(text)
    if not found:
        return None
    return {"cm": "cm-1", "mantid": "meV"}.get(found.lastgroup, found.lastgroup)


def unit_in_header(lines: Sequence[str], source: str) -> str | None:
    """The unit that a header states for energies (``energies in meV``, not ``Ei = 100 meV``), or None.

    Raises :class:`InputError` for contradictions.
    """
    stated = set()
    for line in lines:
        word, unit = _ENERGY.search(line), None
        if word:
            found = _UNIT.search(line, word.start())
            if found and not re.search(r"\d", line[word.start() : found.start()]):
                unit = unit_in(found.group())
        stated |= {unit} if unit else set()
    if len(stated) > 1:
        raise InputError(f"{source}: the header states energies in {' and in '.join(sorted(stated))}; say --unit")
    return stated.pop() if stated else None


def in_meV(columns: Columns, unit: str | None, source: str) -> tuple[Columns, str]:
    """The same columns with energies in meV, and a note on where their unit comes from.

    ``unit`` says what the user knows, before anything that the file states. Raises :class:`InputError` where nobody
    says and the energies do not look like meV, and where they are not phonons' in the unit that is said.
    """
    if unit is not None and unit not in UNITS:
        raise InputError(f"--unit {unit}: energies may be in {', '.join(UNITS)}; convert the file to one of them")
    if unit is None and columns.unit not in (None, *UNITS):
        raise InputError(
            f"{source}: states its energies in {columns.unit!r}; say --unit if they are in {', '.join(UNITS)} in "
            "truth, or which column is the energy with --columns"
        )
    top = float(np.nanmax(np.abs(columns.energy), initial=0.0))
    used = unit or columns.unit
    reach = f"{source}: energies reach {top:.4g}"
    converted = ", ".join(f"{top * factor:.4g} meV if they are in {name}" for name, factor in UNITS.items())
    if used is None:
        if not UNSTATED_TOP_meV[0] <= top <= UNSTATED_TOP_meV[1]:
            raise InputError(f"{reach} and no unit is stated: {converted}; say which with --unit")
        used, note = "meV", "no unit is stated; energies are taken as meV (--unit says otherwise)"
    elif unit and columns.unit and unit != columns.unit:
        note = f"energies are read as {unit}, as told, although the file states {columns.unit}"
    else:
        note = f"energies are in {used}, as {'told' if unit else 'the file states'}"
    factor = UNITS[used]
    if not TOP_meV[0] <= top * factor <= TOP_meV[1]:
        raise InputError(
            f"{reach} {used}, where no phonon spectrum ends ({converted}); "
            "correct the unit with --unit, or the column with --columns"
        )
    edges = None if columns.edges is None else columns.edges * factor
    return Columns(columns.energy * factor, columns.intensity, columns.error, edges, "meV"), note
