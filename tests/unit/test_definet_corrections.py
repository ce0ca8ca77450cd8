"""What a network misses in hosts that it knows: carried over to other dopants, sites and cells."""

import numpy as np
import pytest
from ase.build import bulk
from ase.data import atomic_numbers, covalent_radii

from defectnet.definet.corrections import Corrections
from defectnet.definet.pairs import Pair, net_displacements, reduced_formula
from defectnet.phonons.superposition import Superposition

DOPANTS = ("Li", "K", "Rb", "Cs", "Mg", "Ca", "Sr", "Ba", "Cu", "Ag")


def lattice(times, a=5.64):
    matrix = times * np.array([[-1, 1, 1], [1, -1, 1], [1, 1, -1]])  # the cubic cell
    return Superposition(bulk("NaCl", "rocksalt", a=a), matrix, np.zeros((2, 8 * times**3, 3, 3)), [])


def outwards(host, site, dopant):
    """[N, 3]: neighbours leave a site in proportion to what a dopant is larger by."""
    atoms = host.folding.atoms
    vectors = atoms.get_distances(site, range(len(atoms)), mic=True, vector=True)
    near = np.isclose(np.linalg.norm(vectors, axis=1), 2.82, atol=1e-3)
    misfit = covalent_radii[atomic_numbers[dopant]] - covalent_radii[atoms.numbers[site]]
    return 0.02 * misfit * np.where(near[:, None], vectors, 0)


def pair(host, site, dopant):
    atoms = host.folding.atoms
    numbers = atoms.numbers.copy()
    numbers[site] = atomic_numbers[dopant]
    moved = outwards(host, site, dopant)
    moved = net_displacements(0 * moved, moved, atoms.cell.array, numbers > 0)
    name = reduced_formula(atoms.numbers)
    return Pair(dopant, name, numbers, atoms.numbers, atoms.positions, atoms.cell.array, moved, lattice=host)


@pytest.fixture(scope="module")
def host():
    return lattice(2)


@pytest.fixture(scope="module")
def corrections(host):
    """Of a network that says that nothing moves, which has not seen silver."""
    pairs = [pair(host, 0, dopant) for dopant in DOPANTS[:-1]]
    return Corrections.fit(pairs, [np.zeros_like(one.displacements) for one in pairs])


def share_left(corrections, one):
    return np.abs(corrections(one.lattice, one.numbers) - one.displacements).sum() / np.abs(one.displacements).sum()


def test_what_is_missed_of_some_dopants_is_known_of_others(corrections, host):
    assert share_left(corrections, pair(host, 0, "Rb")) < 0.3
    assert share_left(corrections, pair(host, 0, "Ag")) < 0.6


def test_equivalent_sites_and_larger_cells_are_alike(corrections, host):
    other = int(np.flatnonzero(host.folding.parent == 0)[5])
    assert share_left(corrections, pair(host, other, "Rb")) == pytest.approx(
        share_left(corrections, pair(host, 0, "Rb")), abs=1e-6
    )
    assert share_left(corrections, pair(lattice(3), 0, "Rb")) < 0.35


def test_corrections_of_several_defects_add_up(corrections, host):
    one, other = pair(host, 0, "Rb"), pair(host, 17, "K")
    both = np.where(one.numbers != one.host_numbers, one.numbers, other.numbers)
    single = [corrections(host, each.numbers) for each in (one, other)]
    assert np.allclose(corrections(host, both), sum(single), atol=1e-12)


def test_vacancies_are_not_moved(corrections, host):
    numbers = pair(host, 0, "Rb").numbers.copy()
    numbers[40] = 0
    found = corrections(host, numbers)
    assert not found[40].any()
    assert np.abs(found[numbers > 0].mean(axis=0)).max() < 1e-12


def test_other_hosts_and_sites_are_left_alone(corrections, host):
    for one in (pair(lattice(2, a=5.7), 0, "Rb"), pair(host, int(np.flatnonzero(host.folding.parent == 1)[0]), "Br")):
        assert not corrections(one.lattice, one.numbers).any()
    assert not Corrections()(host, pair(host, 0, "Rb").numbers).any()


def test_they_survive_in_a_checkpoint(corrections, host):
    numbers = pair(host, 0, "Ag").numbers
    again = Corrections.of(corrections.state())
    assert np.allclose(again(host, numbers), corrections(host, numbers), atol=1e-4)
