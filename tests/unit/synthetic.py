"""Spring crystals: physically sensible spectra within milliseconds, for tests of everything behind the phonons."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import numpy as np
from ase.build import bulk
from ase.data import atomic_masses, atomic_numbers
from ase.neighborlist import neighbor_list

from defectnet.config import Config, Spectra
from defectnet.dataset.schema import HostEntry, MissingEntry, SpectrumEntry, write_dataset
from defectnet.elements import PUBLISHED_VOCABULARY, VACANCY
from defectnet.phonons.blocks import cut_out
from defectnet.phonons.modes import Modes, diagonalise

# formula: structure, lattice constant in Å, nearest-neighbour spring in eV/Å², candidates by replaced element
CRYSTALS = {
    "Si": ("diamond", 5.43, 8.5, {"Si": ("Ge", "B", "P", "Sn", "Al", "C")}),
    "Ge": ("diamond", 5.66, 7.2, {"Ge": ("Si", "Ga", "As", "Sn", "Sb")}),
    "GaAs": ("zincblende", 5.65, 6.6, {"Ga": ("Al", "In", "Si", "Zn"), "As": ("P", "Sb", "Se", "N")}),
    "AlP": ("zincblende", 5.46, 6.9, {"Al": ("Ga", "In", "B", "Si"), "P": ("N", "As", "S")}),
    "ZnSe": ("zincblende", 5.67, 4.4, {"Zn": ("Cd", "Mg", "Cu", "Ga"), "Se": ("S", "Te", "Br")}),
    "InSb": ("zincblende", 6.48, 4.6, {"In": ("Ga", "Al", "Cd", "Sn"), "Sb": ("As", "P", "Te")}),
    "MgO": ("rocksalt", 4.21, 4.2, {"Mg": ("Ca", "Zn", "Li", "Al"), "O": ("S", "N", "F")}),
    "NaCl": ("rocksalt", 5.64, 1.0, {"Na": ("K", "Li", "Ca"), "Cl": ("Br", "F", "S")}),
    "CaS": ("rocksalt", 5.69, 1.9, {"Ca": ("Mg", "Sr", "Y"), "S": ("Se", "O", "Cl")}),
    "AgBr": ("rocksalt", 5.77, 0.9, {"Ag": ("Cu", "Cd", "Na"), "Br": ("Cl", "I", "S")}),
    "KBr": ("rocksalt", 6.60, 0.8, {"K": ("Na", "Rb"), "Br": ("Cl", "Vac")}),
}


def supercell_modes(
    formula: str, repeats: int, substitutions: dict[int, str] | None = None, own_springs: bool = True
) -> Modes:
    """Modes of a cubic supercell of ``8 repeats³`` atoms with springs to first and second neighbours.

    A dopant has its own mass, and springs that are stiffer the smaller its atomic number is, if ``own_springs``; a
    vacancy has none, and its neighbours have softer ones, if ``own_springs``.
    """
    structure, a, spring, _ = CRYSTALS[formula]
    atoms = bulk(formula, structure, a=a, cubic=True).repeat(repeats)
    original = np.array(atoms.get_chemical_symbols(), dtype=object)
    symbols = original.copy()
    for site, symbol in (substitutions or {}).items():
        symbols[site] = symbol
    kept = np.flatnonzero(symbols != VACANCY)
    numbers = np.array([atomic_numbers[o if s == VACANCY else s] for o, s in zip(original, symbols, strict=True)])
    softness = 0.25 if own_springs else 0.0
    stiffness = np.array([(atomic_numbers[o] / z) ** softness for o, z in zip(original, numbers, strict=True)])
    first = a * (np.sqrt(3) / 4 if structure != "rocksalt" else 0.5)
    i, j, D = neighbor_list("ijD", atoms, a * 0.71 + 0.02)
    length = np.linalg.norm(D, axis=1)
    n = D / length[:, None]
    k = spring * np.where(length < 1.05 * first, 1.0, 0.07) * np.sqrt(stiffness[i] * stiffness[j])
    blocks = k[:, None, None] * (0.78 * n[:, :, None] * n[:, None, :] + 0.22 * np.eye(3))
    size = len(atoms)
    hessian = np.zeros((size, 3, size, 3))
    if own_springs:
        beside = np.isin(np.arange(size), j[(symbols[i] == VACANCY) & (length < 1.05 * first)])
        blocks = blocks * np.where(beside[i] & beside[j], 0.5, 1.0)[:, None, None]
    for p, q, block in zip(i, j, blocks, strict=True):
        hessian[p, :, q, :] -= block
        hessian[p, :, p, :] += block
    left = cut_out(hessian.reshape(3 * size, 3 * size), kept)
    return diagonalise(left, atomic_masses[numbers[kept]], list(symbols[kept]))


def host_entry(formula: str) -> HostEntry:
    symbols = bulk(formula, CRYSTALS[formula][0], a=5.0, cubic=True).get_chemical_symbols()
    composition = {s: symbols.count(s) / len(symbols) for s in sorted(set(symbols))}
    candidates = {d: replaced for replaced, dopants in CRYSTALS[formula][3].items() for d in dopants}
    return HostEntry(f"host-{formula}", formula, composition, candidates)


def spectra(formulas: list[str], per_host: int, repeats: int, seed: int = 0):
    """One pristine and ``per_host`` doped spectra of each crystal, with up to four dopants of up to 10 at.% each."""
    for formula in formulas:
        rng = np.random.default_rng([seed, *formula.encode()])
        common = {"host_id": f"host-{formula}", "potential": "springs", "potential_digest": "0" * 8}
        n = 8 * repeats**3
        modes = supercell_modes(formula, repeats)
        quality = {"relax_steps": 0.0, "residual_force_eV_per_A": 1e-4, "imaginary_weight": 0.0}
        yield SpectrumEntry(
            f"{formula}-pristine", fidelity="direct", concentrations={}, modes=modes, n_atoms=n,
            record_digest="r0", quality=quality, role="pristine", **common,
        )  # fmt: skip
        original = bulk(formula, CRYSTALS[formula][0], a=5.0, cubic=True).get_chemical_symbols() * repeats**3
        host = host_entry(formula)
        for index in range(per_host):
            free = set(range(n))
            substitutions: dict[int, str] = {}
            for dopant in rng.choice(sorted(host.candidates), size=rng.integers(1, 5), replace=False):
                sites = sorted(s for s in free if original[s] == host.candidates[dopant])
                count = rng.integers(1, max(2, int(0.1 * n) + 1))
                chosen = rng.choice(sites, size=min(count, len(sites)), replace=False)
                free -= set(chosen)
                substitutions |= {int(site): str(dopant) for site in chosen}
            names = list(substitutions.values())
            quality = {
                "relax_steps": float(rng.integers(5, 40)),
                "residual_force_eV_per_A": float(0.01 * rng.beta(4, 1.5)),
                "n_imaginary": float(rng.poisson(0.15)),
                "imaginary_weight": float(rng.exponential(2e-3) * (rng.random() < 0.15)),
                "acoustic_residual_eV_per_A2": float(rng.lognormal(np.log(2e-3), 0.6)),
                "wall_s": float(rng.lognormal(3, 0.3)),
            }
            yield SpectrumEntry(
                f"{formula}-{index}", fidelity="superposed" if index % 3 else "direct",
                concentrations={d: names.count(d) / n for d in sorted(set(names))},
                modes=supercell_modes(formula, repeats, substitutions), n_atoms=n,
                record_digest=f"r{index}", quality=quality, **common,
            )  # fmt: skip


def responses(formulas: list[str], repeats: int):
    """Spectra of every single substitution of each crystal, with the dopant's springs and with its mass only."""
    for formula in formulas:
        original = bulk(formula, CRYSTALS[formula][0], a=5.0, cubic=True).get_chemical_symbols() * repeats**3
        for fidelity in ("superposed", "mass_only"):
            for dopant, replaced in host_entry(formula).candidates.items():
                site = original.index(replaced)
                yield SpectrumEntry(
                    f"{formula}-response-{dopant}-{fidelity}", host_id=f"host-{formula}", fidelity=fidelity,
                    concentrations={dopant: 1 / len(original)}, role="response", quality={"site_share": 1.0},
                    modes=supercell_modes(formula, repeats, {site: dopant}, fidelity == "superposed"),
                    n_atoms=len(original), potential="springs", potential_digest="0" * 8, record_digest="s0",
                )  # fmt: skip


def comparisons(formulas: list[str], per_host: int, seed: int = 0) -> dict[str, dict[str, np.ndarray]]:
    """What superposition could look like: good where doping is light, better in some hosts than in others."""
    made = {}
    for formula in formulas:
        rng = np.random.default_rng([seed, *formula.encode()])
        doping = rng.uniform(0.02, 0.12, per_host)
        superposed = rng.uniform(0.5, 3.0) * doping * rng.lognormal(0, 0.2, per_host)
        mass_only = rng.uniform(0.3, 1.0) * rng.lognormal(0, 0.15, per_host)
        moved = 0.5 * doping * rng.lognormal(0, 0.3, per_host)
        made[f"host-{formula}"] = {
            "number": np.arange(per_host),
            "total_doping": doping,
            "superposed_l1": superposed,
            "mass_only_l1": mass_only,
            "superposed_w1_meV": superposed,
            "mass_only_w1_meV": 2 * mass_only,
            "displacement_mae_A": moved * superposed,
            "displacement_mean_A": moved,
        }
    return made


def make_dataset(path: Path, formulas: list[str], per_host: int, repeats: int = 1, **changes) -> str:
    """Write a dataset of spring crystals; ``changes`` replace arguments of :func:`write_dataset`."""
    arguments = {
        "hosts": [host_entry(formula) for formula in formulas],
        "spectra": spectra(formulas, per_host, repeats),
        "settings": Spectra(energy_max_meV=120.0),
        "vocabulary": PUBLISHED_VOCABULARY,
        "missing": [MissingEntry("host-Si", "doped-7", "relax", "failed", "exploded")],
        "provenance": {"config": Config().model_dump(mode="json")},
        "comparisons": comparisons(formulas, 2),
    }
    return write_dataset(path, **arguments | changes)


def make_dataset_with_responses(path: Path, formulas: list[str], per_host: int, **changes) -> str:
    """The same with the response of every candidate."""
    made = chain(spectra(formulas, per_host, 1), responses(formulas, 1))
    return make_dataset(path, formulas, per_host, spectra=made, **changes)
