"""Pairs from the published structures of DefiNet: point defects in six two-dimensional crystals (2DMD), 14,866 in all.

The layout is that of the archive which goes with the paper, as the authors' preprocessing reads it:

    high_density_defects/MATERIAL_500/CIF/ID_unrelaxed.cif, ID_relaxed.cif
    high_density_defects/MATERIAL_500/{train,val,test}.csv     with a column atoms_id
    high_density_defects/HOST.cif                              the perfect unit cell
    low_density_defects/MATERIAL/CIF_POSCAR/…                  and as above

Markers are not stored: a vacancy is a site of the perfect supercell without an atom.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import make_supercell
from ase.io import read

from defectnet.definet.pairs import Pair, net_displacements, reduced_formula
from defectnet.definet.relax import on_host_sites
from defectnet.errors import InputError
from defectnet.progress import track

DENSITIES = {"high_density_defects": "CIF", "low_density_defects": "CIF_POSCAR"}
"""Folders of the archive, and where each material's structures are."""

HOST_FILES = {"BP": "P", "hBN": "BN"}
"""Names of perfect unit cells that are not the material's."""

DIVISION = {"train": "train", "val": "validation", "test": "test"}


def published_pairs(folder: Path) -> list[Pair]:
    """All pairs below ``folder``, which holds one or both of :data:`DENSITIES`, with their published division.

    Raises :class:`InputError` where files are missing or relaxed atoms are others than unrelaxed ones.
    """
    tables = [path for density in DENSITIES for path in sorted((folder / density).glob("*/train.csv"))]
    if not tables:
        raise InputError(
            f"{folder}: holds neither high_density_defects/*/train.csv nor low_density_defects/*/train.csv; unpack the "
            "published archive there"
        )
    pairs = []
    for material in (path.parent for path in tables):
        unit = _read(material.parent / f"{_host_file(material.name)}.cif")
        for name, part in DIVISION.items():
            ids = _ids(material / f"{name}.csv")
            for identity in track(ids, f"reading {material.name} {name}"):
                pairs.append(_pair(material, identity, unit, part))
    return pairs


def _host_file(material: str) -> str:
    host = material.partition("_")[0]
    return HOST_FILES.get(host, host)


def _ids(path: Path) -> list[str]:
    try:
        with path.open(newline="") as file:
            return [row["atoms_id"] for row in csv.DictReader(file)]
    except (OSError, KeyError) as error:
        raise InputError(
            f"{path}: no table with a column atoms_id ({error}); unpack the published archive anew"
        ) from None


def _read(path: Path) -> Atoms:
    try:
        return read(path)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise InputError(f"{path}: not a readable structure ({error}); unpack the published archive anew") from None


def _pair(material: Path, identity: str, unit: Atoms, part: str) -> Pair:
    structures = material / DENSITIES[material.parent.name]
    unrelaxed, relaxed = (_read(structures / f"{identity}_{kind}.cif") for kind in ("unrelaxed", "relaxed"))
    if not np.array_equal(unrelaxed.numbers, relaxed.numbers):
        raise InputError(f"{structures}/{identity}: relaxed atoms are not those of the unrelaxed cell, in its order")
    whole, host_numbers = on_host_sites(unrelaxed, _supercell(unit, unrelaxed))
    ends = np.concatenate([relaxed.positions, whole.positions[len(relaxed) :]])
    return Pair(
        id=f"{material.parent.name}/{material.name}/{identity}",
        host=reduced_formula(unit.numbers),
        numbers=whole.numbers,
        host_numbers=host_numbers,
        positions=whole.positions,
        cell=whole.cell.array,
        displacements=net_displacements(whole.positions, ends, whole.cell.array, whole.numbers > 0),
        part=part,
    )


def _supercell(unit: Atoms, defective: Atoms) -> Atoms:
    """The perfect layer repeated in its plane to the size of a defective one, in a cell of the latter's height."""
    layer = unit.copy()
    a, b, _, *angles = layer.cell.cellpar()
    layer.set_cell([a, b, defective.cell.lengths()[2], *angles])
    times = np.rint(defective.cell.lengths()[:2] / (a, b)).astype(int)
    return make_supercell(layer, np.diag([*times, 1]))
