"""Units and conversions; every constant comes from CODATA 2018 through ``scipy.constants``.

Internal units: Å, eV, eV/Å, eV/Å², amu, and **meV** for phonon energies (neutron-scattering practice).
"""

from math import sqrt

from scipy import constants as _c

THZ_TO_MEV = _c.h * 1e12 / _c.e * 1e3
"""Energy in meV of a quantum of frequency 1 THz, E = h f."""

MEV_TO_THZ = 1.0 / THZ_TO_MEV

INVERSE_CM_TO_MEV = _c.h * _c.c * 100.0 / _c.e * 1e3
"""Energy in meV of a wavenumber of 1 cm⁻¹, E = h c ν̃."""

SQRT_EIGENVALUE_TO_MEV = _c.hbar / _c.e * 1e3 * sqrt(_c.e / 1e-20 / _c.atomic_mass)
"""Energy ħω in meV of a mode whose dynamical-matrix eigenvalue ω² is 1 eV/(Å² amu)."""

SQRT_EIGENVALUE_TO_THZ = SQRT_EIGENVALUE_TO_MEV * MEV_TO_THZ
"""Frequency ω/2π in THz of a mode whose dynamical-matrix eigenvalue is 1 eV/(Å² amu)."""
