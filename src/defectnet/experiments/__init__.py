"""Measured spectra: reading them, comparing them with computed ones, and simulating them."""
