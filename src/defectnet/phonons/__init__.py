"""Hessians, normal modes and phonon densities of states."""
