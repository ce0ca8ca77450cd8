"""Phonon densities of states of pristine hosts: a machine-learned potential against density functional theory.

    .venvs/sevennet/bin/python tests/bench/dft.py --structures phonondb.optimade.jsonl --dos phonondb_pbesol_dos.npz \
        --name sevennet --model 7net-0 --output results/bench/dft.json
    .venvs/sevennet/bin/python tests/bench/dft.py --output results/bench/dft.json --table

Runs in the environment of the potential. Every finished host is merged into the output and not computed again.
The reference is phonondb (A. Togo, Kyoto, 2018-04-17, PBEsol, CC BY 4.0); docs/dft-comparison.md has the results and
says what the two files must contain.

Per host: the primitive cell is relaxed with the potential, a supercell of ``--atoms`` is displaced, and the frequencies
are interpolated onto a dense mesh of wave vectors, without the splitting of longitudinal and transverse optical modes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import spglib
from ase import Atoms
from ase.build import bulk
from ase.data import atomic_numbers
from scipy.optimize import minimize_scalar
from scipy.stats import wasserstein_distance

from defectnet.config import Phonons, Potential, Relaxation
from defectnet.errors import PhysicsError
from defectnet.files import write_atomically
from defectnet.phonons.hessian import reference_phonons, setup
from defectnet.relaxation import relax_host
from defectnet.supercells import expansion_matrix

# Chosen by hand, before any spectrum was computed, from the phonondb crystals with no imaginary DFT frequency (mesh
# minimum above -0.15 THz), Z <= 56 and at most 14 atoms in the primitive cell: one or a few of each structure type,
# all common anions, light and heavy. The order is roughly that of the cost.
HOSTS = {
    "mp-149": "Si diamond",
    "mp-1479": "BP zincblende",
    "mp-830": "GaN zincblende",
    "mp-2172": "AlAs zincblende",
    "mp-2624": "AlSb zincblende",
    "mp-2176": "ZnTe zincblende",
    "mp-1265": "MgO rock salt",
    "mp-23193": "KCl rock salt",
    "mp-22865": "CsCl caesium chloride",
    "mp-2741": "CaF2 fluorite",
    "mp-1960": "Li2O antifluorite",
    "mp-1569": "Be2C antifluorite",
    "mp-9437": "NbFeSb half-Heusler",
    "mp-924130": "TiNiSn half-Heusler",
    "mp-9124": "LiZnAs half-Heusler",
    "mp-1186": "ZrS2 CdI2 layers",
    "mp-567259": "CdI2 layers",
    "mp-661": "AlN wurtzite",
    "mp-7140": "SiC wurtzite",
    "mp-380": "ZnSe wurtzite",
    "mp-5878": "KZnF3 perovskite",
    "mp-7914": "NaScO2 NaFeO2 layers",
    "mp-5795": "CaMg2N2 La2O3 type",
    "mp-856": "SnO2 rutile",
    "mp-1249": "MgF2 rutile",
    "mp-2574": "ZrO2 tetragonal",
    "mp-4524": "ZnGeP2 chalcopyrite",
    "mp-5342": "AgGaS2 chalcopyrite",
    "mp-29463": "LiBeN monoclinic",
    "mp-1143": "Al2O3 corundum",
    "mp-5020": "BaTiO3 rhombohedral perovskite",
    "mp-27546": "CaClF PbFCl type",
    "mp-2231": "SnS orthorhombic",
    "mp-5348": "MgCO3 calcite",
    "mp-3536": "MgAl2O4 spinel",
    "mp-886": "Ga2O3 monoclinic",
}
NOT_IN_FILE = {"mp-149": bulk("Si", "diamond", 5.43)}
"""phonondb's elements are in the file of spectra only; their lattice is a start, not a DFT result."""

SIGMA_THZ = 0.15
"""Gaussian broadening of the DFT spectra."""
MESH_LENGTH_A = 80.0
"""phonopy's measure of the mesh: divisions along each reciprocal axis = length x |b|; 25 x 25 x 25 for Si."""
LOWEST_THZ = -30.0
"""Imaginary frequencies count as negative ones down to here, so that the distances see them."""
IMAGINARY_BELOW_THZ = -0.1
SCALES = np.arange(90, 151) / 100
"""Factors on the frequencies of a potential at which the distance to DFT is kept."""
DFT_LATTICE = ", DFT lattice"
"""Ends the label of a potential that did not relax the lattice; such records are summarised only."""
PBESOL_OVER_PBE = 1 / 0.951
"""Ratio of mean frequencies over 74 materials that are in both phonondb (PBEsol) and a PBE set."""


def read_structures(path: Path, wanted: list[str]) -> dict[str, tuple[Atoms, bool]]:
    """Idealised primitive cells by id from OPTIMADE JSON lines, and whether the lattice is that of DFT."""
    found = {host: (atoms, False) for host, atoms in NOT_IN_FILE.items()}
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        if entry["id"] in wanted:
            values = entry["attributes"]
            lattice = np.array(values["lattice_vectors"])
            fractional = np.array(values["cartesian_site_positions"]) @ np.linalg.inv(lattice)
            numbers = [atomic_numbers[symbol] for symbol in values["species_at_sites"]]
            cell, places, kinds = spglib.standardize_cell(
                (lattice, fractional, numbers), to_primitive=True, symprec=1e-3
            )
            found[entry["id"]] = (Atoms(kinds, scaled_positions=places, cell=cell, pbc=True), True)
    return found


def compare(axis: np.ndarray, ours: np.ndarray, dft_axis: np.ndarray, dft: np.ndarray) -> dict[str, Any]:
    """Figures of two densities of states in any normalisation; axes in THz, the DFT axis within the other one.

    The Wasserstein distance is the area between the cumulative distributions, THz (``scipy.stats``). The best scale is
    the factor on the potential's frequencies that minimises it.
    """
    reference = np.interp(axis, dft_axis, dft, left=0.0)
    ours, reference = (np.clip(g, 0, None) / np.clip(g, 0, None).sum() for g in (ours, reference))

    def distance(scale: float) -> float:
        return wasserstein_distance(scale * axis, axis, ours, reference)

    # Convex in the scale: the distance is the integral of |scale x one quantile function - the other|.
    best = minimize_scalar(distance, bounds=(0.5, 4.0), method="bounded", options={"xatol": 1e-4})
    means = ours @ axis, reference @ axis
    tops = [axis[np.searchsorted(np.cumsum(g), 0.995)] for g in (ours, reference)]
    return {
        "mean_THz": means[0],
        "mean_dft_THz": means[1],
        "mean_ratio": means[0] / means[1],
        "wasserstein_THz": distance(1.0),
        "best_scale": best.x,
        "wasserstein_best_scale_THz": best.fun,
        "wasserstein_by_scale_THz": [distance(scale) for scale in SCALES],
        "l1": np.abs(ours - reference).sum(),
        "top_ratio": tops[0] / tops[1],
    }


def compute(
    start: Atoms,
    is_dft: bool,
    model: Any,
    size: tuple[int, int],
    fixed_lattice: bool,
    dft_axis: np.ndarray,
    dft: np.ndarray,
) -> dict[str, Any]:
    """Relax, displace, interpolate and compare one host. Ratios are potential / DFT."""
    began = time.perf_counter()
    relaxed = relax_host(start, model, Relaxation(fmax_eV_per_A=0.005, host_cell=not fixed_lattice))
    atoms = relaxed.atoms
    symmetry = spglib.get_symmetry((atoms.cell.array, atoms.get_scaled_positions(), atoms.numbers), symprec=1e-3)
    expansion = expansion_matrix(atoms.cell.array, len(atoms), *size, symmetry["rotations"])
    result = reference_phonons(atoms, expansion, model, Phonons(), atoms_per_pass=32)
    phonon = setup(atoms, expansion, Phonons())
    phonon.force_constants = result.hessian.compact
    with warnings.catch_warnings(action="ignore"):  # phonopy says which grid it took
        phonon.run_mesh(MESH_LENGTH_A)
    weights, frequencies = phonon.mesh.weights, phonon.mesh.frequencies
    pitch = float(dft_axis[1] - dft_axis[0])
    phonon.run_total_dos(SIGMA_THZ, LOWEST_THZ, float(dft_axis[-1]), pitch, use_tetrahedron_method=False)
    unstable = (frequencies < IMAGINARY_BELOW_THZ).mean(axis=1)
    return {
        "atoms_primitive": len(atoms),
        "atoms_supercell": len(result.hessian.matrix) // 3,
        "converged": relaxed.quality["converged"],
        "volume_ratio": 1 + relaxed.quality["volume_change"] if is_dft else None,
        "imaginary_share_mesh": weights @ unstable / weights.sum(),
        "imaginary_share_commensurate": result.quality["imaginary_weight"],
        "lowest_THz": frequencies.min(),
        "force_evaluations": relaxed.quality["relax_evaluations"] + result.quality["displacements"],
        "wall_s": time.perf_counter() - began,
        **compare(phonon.total_dos.frequency_points, phonon.total_dos.dos, dft_axis, dft),
    }


def rounded(value: Any) -> Any:
    """Plain Python numbers with five significant digits."""
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float | np.floating) else value


def run(options: argparse.Namespace, records: dict[str, dict]) -> None:
    """Compute what the output lacks; a host that fails is recorded with its reason and tried again next time."""
    import torch

    from defectnet import potentials

    torch.set_num_threads(1)
    settings = Potential(name=options.name, model=options.model, device="cpu")
    label = f"{options.name} {options.model}" + (DFT_LATTICE if options.fixed_lattice else "")
    wanted = [host for host in list(HOSTS)[: options.hosts] if not options.fixed_lattice or host not in NOT_IN_FILE]
    todo = [host for host in wanted if "failed" in records.get(f"{label} {host}", {"failed": ""})]
    structures = read_structures(options.structures, todo)
    with np.load(options.dos) as table:
        rows = {host: row for row, host in enumerate(table["mp_id"].tolist())}
        axis, spectra = table["freq_THz"].astype(float), table["dos"].astype(float)
    model = potentials.load(settings) if todo else None
    for host in todo:
        record = {"potential": label, "dtype": settings.dtype, "host": host, "description": HOSTS[host]}
        try:
            how = tuple(options.atoms), options.fixed_lattice
            record |= compute(*structures[host], model, *how, axis, spectra[rows[host]])
        except PhysicsError as error:
            record["failed"] = str(error)
        records[f"{label} {host}"] = {name: rounded(value) for name, value in record.items()}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in records.items())
        write_atomically(options.output, f"{{\n{lines}\n}}\n".encode())
        shown = {name: record.get(name) for name in ("wasserstein_THz", "mean_ratio", "wall_s", "failed")}
        print(label, host, HOSTS[host], rounded(list(shown.values())), flush=True)


def table(records: dict[str, dict]) -> str:
    """Summary per potential, over the hosts that all of them have, and figures per host, as Markdown."""
    by_potential: dict[str, dict[str, dict]] = {}
    for record in records.values():
        if "failed" not in record:
            by_potential.setdefault(record["potential"], {})[record["host"]] = record
    common = set.intersection(*(set(h) for name, h in by_potential.items() if not name.endswith(DFT_LATTICE)))
    lines = [
        "| potential | hosts | mean W | median W | mean W x 1.05 | common scale | mean W scaled | mean W best scale "
        "| mean ratio | top ratio | volume ratio | L1 | unstable (mesh) | evaluations | minutes |",
        "|---" * 15 + "|",
    ]
    for potential in by_potential:
        hosts = {host: record for host, record in by_potential[potential].items() if host in common}
        values = {name: np.array([r[name] for r in hosts.values()]) for name in next(iter(hosts.values()))}
        curves, distance, ratio = (values[n] for n in ("wasserstein_by_scale_THz", "wasserstein_THz", "mean_ratio"))
        like_pbe = np.mean([np.interp(PBESOL_OVER_PBE, SCALES, curve) for curve in curves])
        left_out = (curves.sum(axis=0) - curves).argmin(axis=1)  # the scale that is best for all the other hosts
        volume = values["volume_ratio"].astype(float)  # nan where the DFT lattice is not known
        lines.append(
            f"| {potential} | {len(hosts)} | {distance.mean():.2f} | {np.median(distance):.2f} | {like_pbe:.2f} "
            f"| {SCALES[curves.mean(axis=0).argmin()]:.2f} | {curves[np.arange(len(curves)), left_out].mean():.2f} "
            f"| {values['wasserstein_best_scale_THz'].mean():.2f} | {ratio.mean():.3f} ± {ratio.std(ddof=1):.3f} "
            f"| {values['top_ratio'].mean():.3f} ± {values['top_ratio'].std(ddof=1):.3f} "
            f"| {np.nanmean(volume):.3f} ± {np.nanstd(volume, ddof=1):.3f} | {values['l1'].mean():.2f} "
            f"| {(values['imaginary_share_commensurate'] > 0).sum()} ({(values['imaginary_share_mesh'] > 0).sum()}) "
            f"| {values['force_evaluations'].sum()} | {values['wall_s'].sum() / 60:.0f} |"
        )
    by_potential = {name: hosts for name, hosts in by_potential.items() if not name.endswith(DFT_LATTICE)}
    columns = "".join(f"| {potential}: W | ratio | volume " for potential in by_potential)
    lines += ["", f"| host | atoms | DFT mean {columns}|", "|---" * (3 + 3 * len(by_potential)) + "|"]
    for host, description in HOSTS.items():
        found = [hosts.get(host) for hosts in by_potential.values()]
        first = next((record for record in found if record), None)
        if first:
            cells = "".join(f"| {_cells(record)} " if record else "| – | – | – " for record in found)
            lines.append(f"| {description} | {first['atoms_supercell']} | {first['mean_dft_THz']:.2f} {cells}|")
    failed = [f"{key}: {record['failed']}" for key, record in records.items() if "failed" in record]
    return "\n".join(lines + (["", *failed] if failed else []))


def _cells(record: dict) -> str:
    mark = "*" if record["imaginary_share_commensurate"] > 0 else ""
    volume = f"{record['volume_ratio']:.3f}" if record["volume_ratio"] is not None else "–"
    return f"{record['wasserstein_THz']:.2f}{mark} | {record['mean_ratio']:.3f} | {volume}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--structures", type=Path, help="OPTIMADE JSON lines with the crystals, ids mp-…")
    parser.add_argument("--dos", type=Path, help="npz with mp_id [n], freq_THz [B], dos [n, B]")
    parser.add_argument("--name", default="sevennet", help="potential, as in the configuration")
    parser.add_argument("--model", default="7net-0")
    parser.add_argument("--hosts", type=int, default=len(HOSTS), help="how many of the list, from its start")
    parser.add_argument("--atoms", type=int, nargs=2, default=(60, 110), help="smallest and largest supercell")
    parser.add_argument("--fixed-lattice", action="store_true", help="keep the lattice of DFT, relax positions only")
    parser.add_argument("--output", type=Path, required=True, help="JSON file that is added to")
    parser.add_argument("--table", action="store_true", help="print the tables of the output instead of computing")
    options = parser.parse_args()
    records = json.loads(options.output.read_text()) if options.output.exists() else {}
    if options.table:
        print(table(records))
    elif options.structures and options.dos:
        run(options, records)
    else:
        sys.exit("--structures and --dos are required; docs/dft-comparison.md says where they come from")


if __name__ == "__main__":
    main()
