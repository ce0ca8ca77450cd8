"""What a finished run has: the items of every host in the stages whose results are records.

Items are called as :mod:`defectnet.batches` calls them, and stand in the order in which a job works through them.
"""

from __future__ import annotations

from defectnet.batches import COMPARISON, PRISTINE, RESPONSES, WIDE
from defectnet.batches.superposed import SPECTRA_PER_RECORD
from defectnet.config import Config
from defectnet.supercells import HostPlan


def expected_items(config: Config, plan: HostPlan) -> dict[str, list[str]]:
    """Items of a host by stage (:data:`~defectnet.layout.RECORD_STAGES`), if nothing fails."""
    settings = config.superposition
    supercells = [PRISTINE, *(f"doped-{number}" for number in range(len(plan.plans)))]
    wide = [WIDE] if config.phonons.atoms_min is not None else []
    spectra = [
        *_chunks("mass_only", settings.mass_only_per_host),
        *_chunks("superposed", settings.superposed_per_host),
    ]
    defects = [
        f"{candidate.dopant}@{symbol}{site}"
        for candidate in plan.candidates
        for site, symbol in plan.orbits
        if symbol == candidate.replaces
    ]
    return {
        "library": defects if config.needs_library else [],
        "relax": supercells,
        "phonons": [PRISTINE, *wide, *supercells[1:]],
        "superposed": [COMPARISON, RESPONSES, *spectra],
    }


def _chunks(fidelity: str, spectra: int) -> list[str]:
    """Items of that many spectra, which share records."""
    return [f"{fidelity}-{number}" for number in range(-(-spectra // SPECTRA_PER_RECORD))]
