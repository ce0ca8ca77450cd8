from math import pi, sqrt

import ase.units
import pytest
from phonopy.physical_units import get_physical_units

from defectnet.units import INVERSE_CM_TO_MEV, MEV_TO_THZ, SQRT_EIGENVALUE_TO_MEV, SQRT_EIGENVALUE_TO_THZ, THZ_TO_MEV

# Other packages hold older CODATA values, which differ from those of 2018 by up to a few 1e-7.
CODATA = 5e-7


def test_textbook_values():
    assert pytest.approx(4.135667696, rel=1e-9) == THZ_TO_MEV  # h is exact since 2019
    assert pytest.approx(0.1239841984, rel=1e-9) == INVERSE_CM_TO_MEV
    assert pytest.approx(1, rel=1e-9) == 8.065543937 * INVERSE_CM_TO_MEV


def test_there_and_back():
    assert pytest.approx(1, rel=1e-15) == THZ_TO_MEV * MEV_TO_THZ
    # c = 29.9792458 GHz per inverse centimetre
    assert pytest.approx(0.0299792458, rel=1e-12) == INVERSE_CM_TO_MEV / THZ_TO_MEV


def test_agrees_with_ase():
    assert pytest.approx(ase.units._hplanck * 1e12 / ase.units._e * 1e3, rel=CODATA) == THZ_TO_MEV
    assert pytest.approx(ase.units.invcm * 1e3, rel=CODATA) == INVERSE_CM_TO_MEV
    # ase.units measures time so that sqrt(eV / amu) / Å is 1; hbar in eV times that unit is the energy.
    hbar_eV = ase.units._hbar / ase.units._e * ase.units.second
    assert pytest.approx(hbar_eV * 1e3, rel=CODATA) == SQRT_EIGENVALUE_TO_MEV


def test_agrees_with_phonopy():
    units = get_physical_units()
    assert pytest.approx(units.DefaultToTHz, rel=CODATA) == SQRT_EIGENVALUE_TO_THZ
    assert pytest.approx(units.THzToEv * 1e3, rel=CODATA) == THZ_TO_MEV
    assert pytest.approx(units.THzToCm, rel=CODATA) == THZ_TO_MEV / INVERSE_CM_TO_MEV


def test_hydrogen_on_a_spring():
    # 1 eV/Å² = 16.0217663 N/m holds a mass of 1 amu = 1.66053907e-27 kg: f = sqrt(k/m) / 2π.
    frequency_THz = sqrt(16.02176634 / 1.66053906660e-27) / (2 * pi) / 1e12
    assert pytest.approx(frequency_THz, rel=1e-9) == SQRT_EIGENVALUE_TO_THZ
    assert pytest.approx(frequency_THz * 4.135667696, rel=1e-9) == SQRT_EIGENVALUE_TO_MEV
