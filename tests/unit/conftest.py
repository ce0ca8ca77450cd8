import os

# The matrices of these tests are tiny: threads of the linear algebra would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from fakes import rock_salt

from defectnet.config import Config, parse_config
from defectnet.potentials import load
from defectnet.potentials.analytic import MorsePairs
from defectnet.records import RecordStore


@pytest.fixture(scope="session")
def config() -> Config:
    """A run with the analytic potential on cells of 16 atoms."""
    values = {
        "potential": {"name": "analytic", "atoms_per_pass": 64},
        "supercells": {"atoms_min": 16, "atoms_max": 16, "doped_per_host": 2, "species_max": 2},
        "dopants": {
            "overrides": {
                "NaCl": {"Na": ["Li", "Mg"], "Cl": ["S"]},
                "KF": {"K": ["Na", "Ca"], "F": ["O"]},
                "CaS": {"Ca": ["Mg", "Na"]},
            }
        },
    }
    return parse_config(values, "test")


@pytest.fixture(scope="session")
def hosts():
    """Three rock salts in a host sheet's form."""
    return [rock_salt("NaCl", "Na", "Cl", 5.64), rock_salt("KF", "K", "F", 5.34), rock_salt("CaS", "Ca", "S", 5.69)]


@pytest.fixture(scope="session")
def model(config) -> MorsePairs:
    """The analytic potential."""
    return load(config.potential)


@pytest.fixture
def store(tmp_path) -> RecordStore:
    """An empty record store."""
    return RecordStore(tmp_path / "records")


@pytest.fixture
def evaluated(monkeypatch) -> list:
    """Every structure that the analytic potential evaluates from here on."""
    seen = []
    evaluate_original, copies_original = MorsePairs.evaluate, MorsePairs.forces_of_displaced

    def evaluate(self, structures):
        seen.extend(atoms.copy() for atoms in structures)
        return evaluate_original(self, structures)

    def forces_of_displaced(self, atoms, displacements):
        seen.extend(atoms.copy() for _ in displacements)
        return copies_original(self, atoms, displacements)

    monkeypatch.setattr(MorsePairs, "evaluate", evaluate)
    monkeypatch.setattr(MorsePairs, "forces_of_displaced", forces_of_displaced)
    return seen
