"""How far superposed spectra are from direct ones, and how that grows with concentration.

    .venvs/main/bin/python tests/bench/superposition.py [DATASET]

Prints medians of the errors by total doping, and how well laws of growth foretell the error of each host's most doped
cell from its other cells; all as shares of what doping changed.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

import numpy as np

from defectnet.dataset.schema import Dataset

BINS_AT = (0, 3, 5, 7, 10, 15, 25)
LAWS = {"constant": 0.0, "square root": 0.5, "linear": 1.0}


def foretold(errors: np.ndarray, others: np.ndarray, hosts: np.ndarray, power: float) -> np.ndarray:
    """Logarithm of the error that the other cells of its host let expect over that of each host's most doped cell."""
    told = []
    for host in np.unique(hosts):
        mine = np.flatnonzero(hosts == host)
        last = mine[np.argmax(others[mine])]
        rest = mine[others[mine] < others[last]]
        if len(rest):
            told.append(np.median(errors[rest] * (others[last] / others[rest]) ** power) / errors[last])
    return np.log(told)


def relaxed_atoms(repeated: int, totals: np.ndarray, least: int, most: int) -> int:
    """Atoms of the cells that were relaxed, of which spectra are those of the ``repeated`` ones: whole dopants fit."""
    sizes = [n for n in range(least, most + 1) if repeated % n == 0]
    return next(n for n in sizes if np.allclose(totals * n, np.round(totals * n)))


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path, nargs="?", default=Path("data/reference/dataset.h5"))
    with Dataset(parser.parse_args().dataset) as data:
        compared, spectra, settings = data.comparison, data.spectra, data.provenance["config"]["supercells"]
        direct = np.array(spectra.fidelity).astype(str) == "direct"
        hosts, atoms = (np.array(column)[direct].tolist() for column in (spectra.host, spectra.n_atoms))
        repeated = dict(zip(hosts, atoms, strict=True))
    total, errors, hosts = compared["total_doping"], compared["superposed_l1"], compared["host"]
    sizes = {
        host: relaxed_atoms(repeated[host], total[hosts == host], settings["atoms_min"], settings["atoms_max"])
        for host in np.unique(hosts).tolist()
    }
    print("total doping (at.%)  cells  hosts  superposed  masses only")
    for low, high in pairwise(BINS_AT):
        some = (100 * total > low) & (100 * total <= high)
        if some.any():
            medians = np.median(errors[some]), np.median(compared["mass_only_l1"][some])
            print(f"{low:>9} to {high:<7} {some.sum():>6} {len(np.unique(hosts[some])):>6} {medians[0]:>11.2f}", end="")
            print(f" {medians[1]:>12.2f}")
    others = total - 1 / np.array([sizes[host] for host in hosts.tolist()])
    several = others > 1e-9  # a single dopant is exact
    print("\nerror of a host's most doped cell, foretold from its other cells / true:")
    for law, power in LAWS.items():
        told = foretold(errors[several], others[several], hosts[several], power)
        ratio, spread = np.exp(np.median(told)), np.exp(told.std())
        print(f"{law:<12} median {ratio:.2f}, spread a factor of {spread:.2f}, {len(told)} hosts")


if __name__ == "__main__":
    main()
