"""How long it takes to make a host sheet from a SNUMAT archive of full size.

    .venvs/main/bin/python tests/bench/hosts.py [--entries 10000] [--n 2000]

The archive is made of the curated crystals: every entry is one of them with its volume changed, its atoms moved by
0.001 Å and its elements exchanged for others of their group, in the cell and with the keys of the real archive.
Prints CPU seconds of the one process and megabytes.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
from pymatgen.core import Element
from pymatgen.io.vasp import Poscar

from defectnet.elements import PUBLISHED_VOCABULARY
from defectnet.hosts import sources
from defectnet.hosts.filters import Criteria, apply_criteria, drop_duplicates
from defectnet.hosts.select import select_hosts
from defectnet.hosts.sheet import read_sheet, write_sheet


def write_archive(path: Path, entries: int) -> None:
    """A zip file in the form of the real one."""
    rng = np.random.default_rng(0)
    crystals = [host.build() for host in read_sheet(sources.CURATED_SHEET)]
    groups: dict[int, list[str]] = {}
    for symbol in PUBLISHED_VOCABULARY:
        groups.setdefault(Element(symbol).group, []).append(symbol)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(entries):
            crystal = crystals[number % len(crystals)].copy()
            elements = [element.symbol for element in crystal.elements]
            others = {symbol: str(rng.choice(groups[Element(symbol).group])) for symbol in elements}
            if len(set(others.values())) == len(elements):
                crystal.replace_species(others)
            crystal.scale_lattice(crystal.volume * rng.uniform(0.9, 1.2))
            crystal.perturb(0.001, seed=int(rng.integers(2**31)))
            gap = float(np.round(rng.uniform(0.0, 8.0), 4))
            entry = {
                "Band_gap_GGA": gap / 1.4,
                "Band_gap_GGA_optical": gap / 1.3,
                "Band_gap_HSE": gap,
                "Band_gap_HSE_optical": gap * 1.1,
                "Direct_or_indirect": "Direct",
                "Direct_or_indirect_HSE": "Direct",
                "ICSD_number": 10_000 + number,
                "Magnetic_ordering": "NM",
                "SNUMAT_id": f"SM-{number}",
                "SOC": False,
                "Space_group_rlx": 1,
                "Structure_rlx": Poscar(crystal, comment=" ").get_str(significant_figures=9),
            }
            name = f"hybrid_bandgap/{crystal.reduced_formula}_{entry['ICSD_number']}.json"
            archive.writestr(name, json.dumps(entry))


def main() -> None:
    """Write an archive, read it, select from it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=10_000)
    parser.add_argument("--n", type=int, default=2_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        archive, sheet = Path(folder, "hybrid_bandgap.zip"), Path(folder, "hosts.tsv")
        write_archive(archive, arguments.entries)
        print(f"{arguments.entries} entries, {archive.stat().st_size / 1e6:.1f} MB on disk")
        began = time.process_time()
        found = sources.snumat(archive)
        read = time.process_time()
        print(f"read:   {read - began:6.1f} s, {len(found.hosts)} hosts, {len(found.rejected)} rejected")
        suitable = apply_criteria(found.hosts, Criteria(require_gap=True, gap_min_eV=0.1))
        unique = drop_duplicates(suitable.hosts)
        selected = select_hosts(unique.hosts, arguments.n, seed=0)
        write_sheet(sheet, selected)
        print(f"select: {time.process_time() - read:6.1f} s, {len(unique.hosts)} suitable, {len(selected)} selected")
    print(f"memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:6.0f} MB at most")


if __name__ == "__main__":
    main()
