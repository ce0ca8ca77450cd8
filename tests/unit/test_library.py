"""Single defects: which there are, and what is computed for each."""

import numpy as np
import pytest
from ase.build import bulk
from fakes import Interrupted, Wrapped
from test_crystal import MONOCLINIC, RUTILE, refold

from defectnet.config import Phonons, Relaxation
from defectnet.dopants import Candidate
from defectnet.errors import PhysicsError
from defectnet.phonons.crystal import Folding, space_group
from defectnet.phonons.hessian import reference_phonons
from defectnet.phonons.library import inequivalent_sites, single_defect
from defectnet.relaxation import relax_host

ONE = np.eye(3, dtype=int)
LAYERED = bulk("NaCl", "rocksalt", a=5.64, cubic=True)
LAYERED.symbols[np.isclose(LAYERED.get_scaled_positions()[:, 2] % 1, 0) & (LAYERED.symbols == "Na")] = "Li"


def candidate(dopant, replaces):
    return Candidate(dopant=dopant, replaces=replaces, recommender="user", kind="isovalent", score=1.0)


@pytest.mark.parametrize(
    ("primitive", "candidates", "number"),
    [
        (RUTILE, [("Zn", "Mg"), ("O", "F"), ("Be", "Mg")], [1, 1, 1]),
        (MONOCLINIC, [("K", "Na")], [1]),
        (LAYERED, [("F", "Cl"), ("K", "Na"), ("K", "Li")], [2, 1, 1]),  # Cl in layers of Li and in layers of Na
    ],
    ids=["rutile", "monoclinic", "layered"],
)
def test_every_inequivalent_site_of_every_candidate(primitive, candidates, number):
    found = inequivalent_sites(primitive, [candidate(*c) for c in candidates])
    first = space_group(primitive).sites
    expected = [
        (int(site), dopant)
        for dopant, replaces in candidates
        for site in np.unique(first[np.array(primitive.symbols) == replaces])
    ]
    assert found == expected
    assert len(found) == sum(number)


@pytest.fixture(scope="module")
def host(model):
    primitive = relax_host(bulk("NaCl", "rocksalt", a=6.03), model, Relaxation(fmax_eV_per_A=1e-4)).atoms
    folding = Folding.of(primitive, 2 * ONE)
    return folding, reference_phonons(primitive, 2 * ONE, model, Phonons(), 256).hessian.matrix


def computed(host, model, tolerance=0.0, checkpoint=None, phonons=None):
    relaxation = Relaxation(fmax_eV_per_A=1e-4)
    return single_defect(*host[:1], 1, "F", host[1], model, relaxation, phonons or Phonons(), tolerance, 64, checkpoint)


def test_an_atom_that_leaves_its_site_ends_the_relaxation(host, model, monkeypatch):
    moved = computed(host, model).quality["displacement_max_A"]
    relaxation, limits = Relaxation(fmax_eV_per_A=1e-4), (1.01 * moved, 0.99 * moved)
    arguments = host[0], 1, "F", host[1], model, relaxation, Phonons(), 0.0, 64, None
    assert single_defect(*arguments, limits[0]).quality["displacement_max_A"] == moved
    monkeypatch.setattr("defectnet.phonons.library.reference_phonons", None)  # nothing is displaced any more
    with pytest.raises(PhysicsError, match=f"leaves its site: .* {limits[1]:g} Å are allowed"):
        single_defect(*arguments, limits[1])


def test_what_is_computed_for_a_defect(host, model):
    folding, hessian = host
    result = computed(host, model)
    defect, quality = result.defect, result.quality
    assert (defect.site, defect.dopant) == (1, "F")
    origin = int(np.flatnonzero(result.start.symbols == "F")[0])
    assert folding.parent[origin] == 1
    assert quality["converged"] == 1
    # Host and ΔH make the Hessian of the relaxed defect, with a share of the displacements of brute force.
    direct = reference_phonons(result.relaxed.atoms, ONE, model, Phonons(), 64).hessian
    np.testing.assert_allclose(refold(defect.blocks, folding) + hessian, direct.matrix, atol=1e-9)
    assert quality["displacements"] == direct.displacements < 6 * len(folding) / 4
    assert quality["blocks_dropped"] == pytest.approx(0, abs=1e-12)
    # Displacements lead from the host's sites to the relaxed ones, up to a rigid translation.
    where = folding.index(defect.atoms[:, 0], defect.atoms[:, 1:] + folding.lattice[origin])
    assert sorted(where) == list(range(len(folding)))
    moved = (result.relaxed.atoms.positions - folding.atoms.positions)[where] - defect.displacements
    np.testing.assert_allclose(moved, moved[[0] * len(folding)], atol=1e-12)
    np.testing.assert_allclose(defect.displacements.sum(axis=0), 0, atol=1e-12)
    # The dopant, on a centre of inversion, stays; its six neighbours move along their bonds by the same length.
    assert np.abs(defect.displacements[where == origin]).max() < 1e-9
    vectors = folding.atoms.get_distances(origin, where, mic=True, vector=True)
    near = np.argsort(np.linalg.norm(vectors, axis=1))[1:7]
    along = (defect.displacements[near] * vectors[near]).sum(axis=1) / np.linalg.norm(vectors[near], axis=1)
    np.testing.assert_allclose(along, along[[0] * 6], atol=1e-9)
    np.testing.assert_allclose(np.abs(along), np.linalg.norm(defect.displacements[near], axis=1), atol=1e-9)
    assert np.abs(along).max() > 1e-2


def test_tolerance_drops_small_blocks_and_says_how_much(host, model):
    folding, _ = host
    exact, rough = (computed(host, model, tolerance) for tolerance in (0.0, 0.02))
    assert len(rough.defect.blocks) < len(exact.defect.blocks)
    change, cut = refold(exact.defect.blocks, folding), refold(rough.defect.blocks, folding)
    share = np.linalg.norm(cut - change) / np.linalg.norm(change)
    assert 0 < rough.quality["blocks_dropped"] < 0.2
    assert rough.quality["blocks_dropped"] == pytest.approx(share)
    sums = cut.reshape(len(cut), -1, 3).sum(axis=1)
    np.testing.assert_allclose(sums, 0, atol=1e-9)


def test_checkpoint_resumes(host, model, tmp_path):
    counting = Wrapped(model)
    whole = computed(host, counting)
    assert counting.calls > whole.quality["relax_evaluations"] + 1
    file = tmp_path / "forces.npy"
    killed = Interrupted(model, after=counting.calls - 1)
    with pytest.raises(KeyboardInterrupt):
        computed(host, killed, checkpoint=file)
    resumed = Wrapped(model)
    again = computed(host, resumed, checkpoint=file)
    assert resumed.calls == whole.quality["relax_evaluations"] + 1
    np.testing.assert_allclose(again.defect.blocks.values, whole.defect.blocks.values, atol=1e-12)
