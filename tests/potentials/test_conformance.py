"""The conformance suite on what is installed, and on models that are wrong on purpose."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pytest
from ase.neighborlist import neighbor_list

from defectnet.config import Potential
from defectnet.errors import PhysicsError
from defectnet.potentials import analytic, conformance, copies
from defectnet.potentials.base import Evaluation


def test_conforms(model):
    results = conformance.run(model)
    failed = [result for result in results if result.passed is False]
    assert not failed, "\n".join(map(str, failed))
    assert sum(result.passed is True for result in results) >= 14


class Wrong:
    """The analytic potential with one mistake."""

    def __init__(self, mistake):
        self._right = analytic.load(Potential(name="analytic"))
        self._mistake = mistake

    def __getattr__(self, name):
        return getattr(self._right, name)

    def evaluate(self, structures):
        return self._mistake(self._right.evaluate(structures), structures)

    def forces_of_displaced(self, atoms, displacements):
        structures = [atoms.copy() for _ in displacements]
        for structure, displacement in zip(structures, displacements, strict=True):
            structure.positions += displacement
        return np.array(self.evaluate(structures).forces)


def _change(**changes):
    def mistake(result, structures):
        return dataclasses.replace(result, **{name: change(result, structures) for name, change in changes.items()})

    return mistake


def _scaled_forces(result, _):
    return [1.01 * forces for forces in result.forces]


def _drifting_forces(result, _):
    return [forces + 1e-3 for forces in result.forces]


def _voigt_mixed_up(result, _):
    return result.stresses[:, [1, 0, 2]][:, :, [1, 0, 2]]


def _absolute_positions(result, structures):
    return result.energies + np.array([1e-3 * atoms.positions[0, 0] for atoms in structures])


def _intensive(result, structures):
    return result.energies / [len(atoms) for atoms in structures]


def _batch_mean(result, _):
    return result.energies - result.energies.mean()


def _rounded(result, _):
    return [forces.astype(np.float32).astype(float) for forces in result.forces]


@pytest.mark.parametrize(
    ("changes", "caught_by"),
    [
        ({"forces": _scaled_forces}, {"forces", "hessian-vector product"}),
        ({"forces": _drifting_forces}, {"momentum", "forces", "rotation", "isolated atom"}),
        ({"stresses": _voigt_mixed_up}, {"stress", "rotation"}),
        ({"stresses": lambda result, _: -result.stresses}, {"stress"}),
        (
            {"energies": _absolute_positions},
            {"translation", "rotation", "permutation", "extensivity", "forces", "stress"},
        ),
        ({"energies": _intensive}, {"extensivity", "forces", "stress", "energy conservation"}),
        ({"energies": _batch_mean}, {"batch", "energy conservation"}),
        ({"forces": _rounded}, {"dtype", "rotation", "hessian-vector product"}),
    ],
)
def test_catches_mistakes(changes, caught_by):
    results = {result.name: result for result in conformance.run(Wrong(_change(**changes)))}
    failed = {name for name, result in results.items() if result.passed is False}
    assert failed == caught_by
    assert results["determinism"].passed


def _undisplaced(model, atoms, displacements):
    return model.forces_of_displaced(atoms, 0 * displacements)


def _exchanged(model, atoms, displacements):
    return model.forces_of_displaced(atoms, displacements)[::-1]


def _no_skin(model, atoms, displacements):
    model._skinned = copies.SkinnedGraph(lambda atoms, _: neighbor_list("ijD", atoms, analytic.CUTOFF_A))
    return model.forces_of_displaced(atoms, displacements)


@pytest.mark.parametrize("mistake", [_undisplaced, _exchanged, _no_skin])
def test_catches_mistakes_in_displaced_copies(mistake):
    wrong = Wrong(lambda result, _: result)
    wrong.forces_of_displaced = partial(mistake, wrong._right)
    assert [r.name for r in conformance.run(wrong) if r.passed is False] == ["displaced copies"]


def test_catches_randomness():
    rng = np.random.default_rng(1)
    noisy = Wrong(lambda result, _: dataclasses.replace(result, energies=result.energies + 1e-13 * rng.normal()))
    assert {r.name for r in conformance.run(noisy) if r.passed is False} == {"determinism"}


def test_exceptions_fail_their_check_only():
    def crash(result: Evaluation, structures):
        if any(len(atoms) == 1 for atoms in structures):
            raise IndexError("no edges")
        return result

    failed = [result for result in conformance.run(Wrong(crash)) if result.passed is False]
    assert [result.name for result in failed] == ["isolated atom"]
    assert "IndexError: no edges" in failed[0].explanation


def test_refusing_isolated_atoms_is_fine():
    def refuse(result: Evaluation, structures):
        if any(len(atoms) == 1 for atoms in structures):
            raise PhysicsError("too lonely")
        return result

    results = {result.name: result for result in conformance.run(Wrong(refuse))}
    assert results["isolated atom"].passed
    assert "too lonely" in results["isolated atom"].explanation


def test_hessian_is_optional():
    class Bare:
        def __init__(self):
            right = analytic.load(Potential(name="analytic"))
            self.identity, self.elements, self.cutoff_A = right.identity, right.elements, right.cutoff_A
            self.package, self.device = right.package, right.device
            self.evaluate, self.forces_of_displaced = right.evaluate, right.forces_of_displaced

    results = {result.name: result for result in conformance.run(Bare())}
    assert results["hessian-vector product"].passed is None
    assert "does not offer" in results["hessian-vector product"].explanation
