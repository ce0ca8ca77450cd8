"""Measures of disorder: exact for lattices, as published for amorphous silicon."""

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.io import read

from defectnet.hosts.disorder import bond_angles, coordination, measure, pair_distribution, ring_sizes

AMORPHOUS = Path(__file__).parents[3] / "shared/data/amorphous_si"

TETRAHEDRAL_DEG = np.degrees(np.arccos(-1 / 3))

DIAMONDS = [bulk("Si"), bulk("Si", cubic=True), bulk("Si", cubic=True).repeat((2, 2, 1))]


@pytest.mark.parametrize("diamond", DIAMONDS, ids=len)
def test_diamond_has_four_bonds_at_the_tetrahedral_angle(diamond):
    assert (coordination(diamond) == 4).all()
    angles = bond_angles(diamond)
    assert len(angles) == 6 * len(diamond)
    np.testing.assert_allclose(angles, TETRAHEDRAL_DEG, atol=1e-6)


@pytest.mark.parametrize("diamond", DIAMONDS, ids=len)
def test_diamond_has_two_rings_of_six_per_atom_and_no_others(diamond):
    pytest.importorskip("matscipy", reason="needs the extra [amorphous]")
    np.testing.assert_allclose(ring_sizes(diamond), [0, 0, 0, 0, 0, 0, 2, 0, 0])


def test_simple_cubic_lattice():
    """Every cube has six faces, shared by two, and four hexagons around its diagonals."""
    pytest.importorskip("matscipy", reason="needs the extra [amorphous]")
    cubic = Atoms("Si", cell=[2.5] * 3, pbc=True)
    assert coordination(cubic, 2.6) == [6]
    angles = bond_angles(cubic, 2.6)
    assert sorted(angles.round(6)) == [90] * 12 + [180] * 3
    np.testing.assert_allclose(ring_sizes(cubic, 2.6, largest=6), [0, 0, 0, 0, 3, 0, 4])


def test_a_measure_of_several_structures_counts_their_atoms_and_angles():
    """Diamond, and a straight chain."""
    pytest.importorskip("matscipy", reason="needs the extra [amorphous]")
    found = measure([bulk("Si", cubic=True), Atoms("Si", cell=[2.5, 8, 8], pbc=True)])
    assert found.coordination == pytest.approx((8 * 4 + 2) / 9)
    assert found.fourfold == pytest.approx(8 / 9)
    angles = [TETRAHEDRAL_DEG] * 48 + [180]
    assert found.angle_deg == pytest.approx(np.mean(angles))
    assert found.angle_spread_deg == pytest.approx(np.std(angles))
    np.testing.assert_allclose(found.rings, [0, 0, 0, 0, 0, 0, 16 / 9, 0, 0])


def test_pair_distribution_of_an_ideal_gas_is_one():
    gas = Atoms("Si1000", np.random.default_rng(1).uniform(0, 20, (1000, 3)), cell=[20] * 3, pbc=True)
    r, g = pair_distribution(gas, r_max_A=7, bin_A=0.5)
    np.testing.assert_allclose(g[r > 3], 1, atol=0.03)


def test_pair_distribution_integrates_to_the_number_of_neighbours():
    silicon = bulk("Si", a=5.431)
    r, g = pair_distribution(silicon, r_max_A=4.5, bin_A=0.01)
    density = len(silicon) / silicon.get_volume()
    within = 4 * np.pi * density * np.cumsum(g * r**2 * 0.01)
    assert within[r < 3][-1] == pytest.approx(4, rel=1e-4)
    assert within[-1] == pytest.approx(4 + 12, rel=1e-4)


@pytest.mark.skipif(not AMORPHOUS.exists(), reason=f"no {AMORPHOUS}")
@pytest.mark.parametrize("name", ["kaldo_aSi_512", "kaldo_aSi_1728"])
def test_amorphous_silicon_of_others(name):
    pytest.importorskip("matscipy", reason="needs the extra [amorphous]")
    found = measure([read(AMORPHOUS / f"{name}.extxyz")])
    assert found.coordination == pytest.approx(4, abs=0.1)
    assert found.fourfold > 0.9
    assert 9 < found.angle_spread_deg < 12
    # A random network has rings of five and seven, and still more of six than of either.
    assert found.rings[6] > max(found.rings[5], found.rings[7]) > 0.3
