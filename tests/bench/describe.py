"""Figures for the card of a dataset: what it holds, how good it is, what is missing and why.

    .venvs/main/bin/python tests/bench/describe.py DATASET [--sheet config/hosts/reference.tsv]

Spectra by kind; doping; how far relaxation moved atoms; imaginary modes; how far superposition and masses alone are off
the direct spectra, as shares of what doping changed, by how far an atom moved and by doping; how far pristine spectra
of the potential are off DFT (results/bench/dft.json); what is missing, and why.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

import numpy as np

from defectnet.dataset.schema import Dataset
from defectnet.hosts.sheet import read_sheet


def told(values: np.ndarray) -> str:
    """Number of values and their quartiles."""
    if not len(values):
        return "none"
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return f"n {len(values)}, median {middle:.3g} (quartiles {low:.3g} to {high:.3g})"


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--dft", type=Path, default=Path("results/bench/dft.json"))
    options = parser.parse_args()
    print(f"file: {options.dataset.stat().st_size / 1e6:.1f} MB")
    with Dataset(options.dataset) as data:
        spectra, hosts = data.spectra, data.hosts
        role, fidelity = np.array(spectra.role), np.array(spectra.fidelity)
        doped = role == "doped"
        used = np.unique(spectra.host[doped])
        print(f"hosts: {len(hosts.id)}, {len(used)} with doped spectra, of {len(set(hosts.formula))} compositions")
        if options.sheet:
            family = {host.id: host.family for host in read_sheet(options.sheet)}
            known = {family[hosts.id[k]] for k in used}
            print(f"families: {len(known)} with doped spectra of {len(set(family.values()))}")
        print("spectra:", dict(Counter(zip(role.tolist(), fidelity.tolist(), strict=True))))
        print("potentials:", dict(Counter(spectra.potential)))
        print("candidates per host:", told(hosts.candidates[used].sum(axis=1)))
        print("atoms:", told(spectra.n_atoms[doped]))
        total = spectra.concentrations.sum(axis=1)
        species = (spectra.concentrations > 0).sum(axis=1)
        for kind in ("direct", "probed", "superposed"):
            some = doped & (fidelity == kind)
            print(
                f"{kind}: doping {told(total[some])}, species {dict(sorted(Counter(species[some].tolist()).items()))}"
            )
        direct = doped & (fidelity == "direct")
        for name in ("displacement_max_A", "imaginary_modes", "energy_lowest_meV", "residual_force_eV_per_A"):
            if name in spectra.quality:
                print(f"{name} of direct spectra: {told(spectra.quality[name][direct])}")
        moved = spectra.quality.get("displacement_max_A", np.full(len(role), np.nan))[direct]
        shares = ", ".join(f"{np.mean(moved > limit):.0%} beyond {limit} Å" for limit in (0.3, 0.5, 1.0))
        print(f"direct spectra in which an atom moved: {shares}")
        compared = data.comparison
        for low, high in ((0, 0.05), (0.05, 0.09), (0.09, 1)):
            some = (compared["total_doping"] > low) & (compared["total_doping"] <= high)
            print(f"superposition off, doping {low:g}-{high:g}: {told(compared['superposed_l1'][some])}; "
                  f"masses only: {told(compared['mass_only_l1'][some])}")  # fmt: skip
        for potential in sorted(set(spectra.potential)):
            known = [one for one in json.loads(options.dft.read_text()).values() if one["potential"] == potential]
            for name, what in (
                ("wasserstein_THz", "Wasserstein distance in THz"),
                ("mean_ratio", "ratio of mean frequencies"),
            ):
                print(f"{potential} against DFT, {what}: {told(np.array([one[name] for one in known]))}")
        print("missing:", dict(Counter((entry.stage, entry.status) for entry in data.missing)))
        for reason, count in Counter(entry.reason.split(":")[0] for entry in data.missing).most_common(10):
            print(f"  {count} x {reason}")


if __name__ == "__main__":
    main()
