"""Relaxations of finished runs in one compact file, from which networks are trained and judged without any records."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
from ase import Atoms

from defectnet import __version__
from defectnet.dataset.compact import write_array
from defectnet.dataset.schema import new_file
from defectnet.definet.pairs import Pair, reduced_formula
from defectnet.errors import InputError, RecordError
from defectnet.phonons.superposition import Superposition

log = logging.getLogger(__name__)

VERSION = 1
"""Of the layout. A host is a group with ``primitive_numbers`` [n], ``primitive_positions`` [n, 3] and
``primitive_cell`` [3, 3] in Å, the supercell ``matrix`` [3, 3], its ``force_constants`` [n, N, 3, 3] in eV/Å² (rows of
the primitive atoms), and of its P relaxations ``id``, ``also`` (names on a line each), ``numbers`` [P, N] (0 where
vacant), ``displacements`` [P, N, 3] in Å, ``superposed`` [P, N, 3] in Å and ``forces`` [P, N, 3] in eV/Å (not a number
where these are not known) and ``stays``: the fields of :class:`~defectnet.definet.pairs.Pair`."""


def write_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    """Write the pairs of runs, with the force constants of their hosts, in single precision.

    Raises :class:`InputError` for published pairs, whose hosts have no force constants.
    """
    if any(pair.lattice is None for pair in pairs):
        raise InputError(f"{path}: only relaxations of runs can be collected, which know their hosts' force constants")
    with new_file(path) as file:
        file.attrs.update(version=VERSION, made_by=f"defectnet {__version__}")
        for number, (_, group) in enumerate(itertools.groupby(pairs, key=lambda pair: id(pair.lattice))):
            some = list(group)
            _write_host(file.create_group(f"hosts/{number:05d}"), some[0].lattice, some)


def _write_host(group: h5py.Group, lattice: Superposition, pairs: Sequence[Pair]) -> None:
    primitive, folding = lattice.primitive, lattice.folding
    group["primitive_numbers"] = primitive.numbers.astype(np.uint8)
    group["primitive_positions"] = primitive.positions
    group["primitive_cell"] = primitive.cell.array
    group["matrix"] = folding.matrix.astype(np.int16)
    write_array(group, "force_constants", folding.compact(lattice.hessian), np.float32)
    group["id"] = np.array([pair.id.encode() for pair in pairs])
    group["also"] = np.array(["\n".join(pair.also).encode() for pair in pairs])
    group["stays"] = np.array([pair.stays for pair in pairs])
    write_array(group, "numbers", np.array([pair.numbers for pair in pairs]), np.uint8)
    write_array(group, "displacements", np.array([pair.displacements for pair in pairs]), np.float32)
    unknown = np.full((len(folding), 3), np.nan)
    for name in ("superposed", "forces"):
        values = [getattr(pair, name) for pair in pairs]
        write_array(group, name, np.array([unknown if one is None else one for one in values]), np.float32)


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a file.

    Raises :class:`InputError` where there is none, and :class:`RecordError` if it is no such file.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file; make it with `defectnet definet collect`")
    try:
        with h5py.File(path) as file:
            if file.attrs["version"] != VERSION:
                raise KeyError(f"version {file.attrs['version']}")
            pairs = [pair for group in file["hosts"].values() for pair in _read_host(group)]
    except (OSError, KeyError, ValueError) as error:
        raise RecordError(
            f"{path}: not a file of relaxations of this version ({error}); make it with `defectnet definet collect`"
        ) from None
    log.info("%d relaxations of %d host compositions", len(pairs), len({pair.host for pair in pairs}))
    return pairs


def _read_host(group: h5py.Group) -> list[Pair]:
    numbers, positions, cell = (group[f"primitive_{name}"][()] for name in ("numbers", "positions", "cell"))
    primitive = Atoms(numbers, positions, cell=cell, pbc=True)
    lattice = Superposition(primitive, group["matrix"][()].astype(int), group["force_constants"][()].astype(float), [])
    sites = lattice.folding.atoms
    held, moved, stays = (group[name][()] for name in ("numbers", "displacements", "stays"))
    superposed, forces = ([_known(one) for one in group[name][()]] for name in ("superposed", "forces"))
    return [
        Pair(
            id=name.decode(),
            host=reduced_formula(sites.numbers),
            numbers=held[k].astype(int),
            host_numbers=sites.numbers.astype(int),
            positions=sites.positions,
            cell=sites.cell.array,
            displacements=moved[k].astype(float),
            superposed=superposed[k],
            lattice=lattice,
            forces=forces[k],
            stays=bool(stays[k]),
            also=also.decode().splitlines(),  # a run's name may hold spaces
        )
        for k, (name, also) in enumerate(zip(group["id"][()], group["also"][()], strict=True))
    ]


def _known(values: np.ndarray) -> np.ndarray | None:
    return None if np.isnan(values).any() else values.astype(float)
