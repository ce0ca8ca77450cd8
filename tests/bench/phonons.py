"""Ways to the phonon spectrum of a doped supercell, side by side: cost, time and error against the full Hessian.

    make bench
    .venvs/sevennet/bin/python tests/bench/phonons.py [--hosts Si-diamond ...] [--device cuda] [--full]

Methods, for the same supercell and potential in the same run:

ase_vibrations  ASE's `Vibrations` with the package's own calculator, 6N + 1 calls as published
phonopy_ase     phonopy's displacements, the same calculator, one call each
direct          this package's Hessian by finite differences: the reference for all errors
mass_only       the host's force constants and the dopants' masses: no force at all
superposed      single defects superposed, structure and Hessian: no force at all
probed          relaxation from the superposed structure, then Hessian-vector products on the superposed Hessian

`force_evaluations` is what one more spectrum costs, its relaxation included (a Hessian-vector product counts as two);
what the single defects cost once is `library_evaluations`. The Hessians of the first two are the reference's at
another price, so by default a few of their calls are timed and scaled to all (`timed_share`); `--full` makes them all.
Finished parts are kept in `--work` and not computed again; rows of other cases in `--output` stay.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.vibrations import Vibrations
from scipy.stats import wasserstein_distance

from defectnet import potentials
from defectnet.batches import atoms_of
from defectnet.config import Phonons, Potential, Relaxation, Spectra
from defectnet.files import write_atomically
from defectnet.hosts.sheet import read_sheet
from defectnet.phonons.blocks import Blocks
from defectnet.phonons.comparison import l1_share
from defectnet.phonons.crystal import Folding, space_group
from defectnet.phonons.hessian import ONE_CELL, finite_differences, setup
from defectnet.phonons.library import single_defect
from defectnet.phonons.modes import Modes, diagonalise
from defectnet.phonons.pdos import energy_edges, pdos
from defectnet.phonons.probing import probe
from defectnet.phonons.superposition import Defect, Superposition
from defectnet.potentials.base import ForceModelCalculator
from defectnet.relaxation import relax_doped, relax_host
from defectnet.supercells import Plan, apply, expansion_matrix

# Dopants known from the literature of each host, written dopant@replaced. The last two are the hard case, a donor and
# an acceptor that compensate each other: the potential knows neutral and compensated crystals, and in ionic ones a
# single aliovalent defect is neither.
HOSTS = {
    "Si-diamond": ("P@Si", "B@Si", "Ge@Si"),
    "GaN-wurtzite": ("In@Ga", "Al@Ga", "P@N"),
    "MgO-rocksalt": ("Ca@Mg", "Zn@Mg", "Li@Mg"),
    "CaF2-fluorite": ("Sr@Ca", "Cd@Ca", "Ba@Ca"),
    "ZnGeP2-chalcopyrite": ("Cd@Zn", "Sn@Ge", "Si@Ge"),
    "CaSnO3-perovskite": ("Sr@Ca", "Zr@Sn", "Ge@Sn"),
    "CaF2-fluorite compensated": ("Sr@Ca", "Na@Ca", "Y@Ca"),
    "GaN-wurtzite compensated": ("In@Ga", "Mg@Ga", "O@N"),
}
# Smallest and largest number of atoms of the supercells.
SIZES = {"dilute": (76, 100), "concentrated": (40, 56)}
SIZE_OF = {("ZnGeP2-chalcopyrite", "dilute"): (128, 128)}  # no smaller one keeps the symmetry
TOTALS = {"dilute": (None,), "concentrated": (0.10, 0.25)}  # None: one atom of each dopant
SPECTRA = Spectra()
SEED = 1


class Host:
    """A host, its potential and what has been computed for it; every step is kept in a file of its own."""

    def __init__(self, name: str, model, work: Path):
        rows = {row.id: row for row in read_sheet("config/hosts/curated.tsv")}
        self.name, self.model, self.work = name, model, work / model.identity.model / name.replace(" ", "-")
        self.work.mkdir(parents=True, exist_ok=True)
        start = atoms_of(rows[name.split()[0]])
        relaxed = self.kept("primitive", lambda: _structure(self._relaxed(start)))
        self.primitive = _atoms(relaxed)
        self.symbols = [text.split("@")[0] for text in HOSTS[name]]
        sites = space_group(self.primitive).sites
        replaced = [text.split("@")[1] for text in HOSTS[name]]
        self.sites = [int(np.flatnonzero(self.primitive.symbols == element)[0]) for element in replaced]
        assert all(sites[site] == site for site in self.sites)
        self.equivalent = sites

    def _relaxed(self, atoms: Atoms) -> Atoms:
        return relax_host(atoms, self.model, Relaxation(fmax_eV_per_A=0.005)).atoms

    def kept(self, step: str, compute) -> dict[str, np.ndarray]:
        """Arrays of a finished step, or of this one once it is computed, with its wall time ``wall_s``."""
        path = self.work / f"{step}.npz"
        if not path.exists():
            began = time.perf_counter()
            arrays = compute()
            arrays["wall_s"] = time.perf_counter() - began
            np.savez_compressed(path.with_suffix(".part.npz"), **arrays)
            path.with_suffix(".part.npz").replace(path)
            print(f"  {self.name} {step}: {arrays['wall_s']:.0f} s", flush=True)
        with np.load(path) as file:
            return dict(file)

    def folding(self, size: str) -> Folding:
        """The supercell of one of :data:`SIZES`."""
        rotations = space_group(self.primitive).rotations
        matrix = self.kept(
            f"matrix-{size}",
            lambda: {
                "matrix": expansion_matrix(
                    self.primitive.cell.array,
                    len(self.primitive),
                    *SIZE_OF.get((self.name, size), SIZES[size]),
                    rotations,
                )
            },
        )["matrix"]
        return Folding.of(self.primitive, matrix)

    def pristine(self, size: str) -> dict[str, np.ndarray]:
        """``compact`` force constants [n, N, 3, 3] of the pristine supercell."""

        def compute():
            phonon = setup(self.primitive, self.folding(size).matrix, Phonons())
            hessian = finite_differences(phonon, self.model, "auto")
            return {"compact": hessian.compact, "evaluations": hessian.displacements}

        return self.kept(f"pristine-{size}", compute)

    def defect(self, size: str, site: int, dopant: str) -> tuple[Defect, int]:
        """A single defect of a supercell and the force evaluations it cost."""
        folding = self.folding(size)

        def compute():
            hessian = folding.hessian(self.pristine(size)["compact"])
            found = single_defect(
                folding, site, dopant, hessian, self.model, Relaxation(), Phonons(), 0.0, "auto",
                self.work / f"defect-{size}-{dopant}.partial.npy",
            )  # fmt: skip
            defect, blocks = found.defect, found.defect.blocks
            return {
                "atoms": defect.atoms, "displacements": defect.displacements, "first": blocks.first,
                "second": blocks.second, "values": blocks.values.astype(np.float32),
                "relax": found.quality["relax_evaluations"], "displaced": found.quality["displacements"],
                "imaginary": found.quality["imaginary_modes"],
            }  # fmt: skip

        kept = self.kept(f"defect-{size}-{dopant}", compute)
        blocks = Blocks(kept["first"], kept["second"], kept["values"].astype(float))
        return Defect(site, dopant, kept["atoms"], kept["displacements"], blocks), int(
            kept["relax"] + kept["displaced"]
        )

    def plan(self, size: str, total: float | None) -> Plan:
        """One atom of each dopant, or all in equal parts up to a total concentration, at random places."""
        folding = self.folding(size)
        rng = np.random.default_rng(SEED)
        count = len(self.sites) if total is None else round(total * len(folding))
        chosen: dict[int, str] = {}
        for number in range(count):
            site, dopant = (part[number % len(self.sites)] for part in (self.sites, self.symbols))
            free = [i for i in np.flatnonzero(self.equivalent[folding.parent] == site) if i not in chosen]
            chosen[int(rng.choice(free))] = dopant
        return Plan(tuple(sorted(chosen)), tuple(chosen[atom] for atom in sorted(chosen)))


def _structure(atoms: Atoms) -> dict[str, np.ndarray]:
    return {"numbers": atoms.numbers, "positions": atoms.positions, "cell": atoms.cell.array}


def _atoms(arrays: dict[str, np.ndarray]) -> Atoms:
    return Atoms(arrays["numbers"], arrays["positions"], cell=arrays["cell"], pbc=True)


def references(host: Host, size: str, total: float | None) -> dict[str, np.ndarray]:
    """The doped supercell relaxed from the host's sites, and its full Hessian: what all else is compared with."""
    folding, plan = host.folding(size), host.plan(size, total)
    label = f"{size}-{total or 'single'}"

    def relaxation():
        relaxed = relax_doped(apply(plan, folding.atoms), host.model, Relaxation())
        return _structure(relaxed.atoms) | {"evaluations": relaxed.quality["relax_evaluations"]}

    relaxed = host.kept(f"relaxed-{label}", relaxation)

    def hessian():
        phonon = setup(_atoms(relaxed), ONE_CELL, Phonons())
        found = finite_differences(phonon, host.model, "auto", host.work / f"direct-{label}.partial.npy")
        return {"hessian": found.matrix.astype(np.float32), "evaluations": found.displacements + 1}

    direct = host.kept(f"direct-{label}", hessian)
    return (
        {"relax_evaluations": relaxed["evaluations"], "relax_s": relaxed["wall_s"]}
        | _structure(_atoms(relaxed))
        | direct
    )


TIMED_CALLS = 8
PROBING_TOLERANCE = 0.03
PUBLISHED = "ase_vibrations"


def ase_calculator(settings: Potential, model):
    """The package's own ASE calculator, as the published pipeline would use it."""
    if settings.name == "sevennet":
        from sevenn.calculator import SevenNetCalculator

        return SevenNetCalculator(settings.checkpoint or settings.model, device=model.device)
    if settings.name == "mace":
        from mace.calculators import MACECalculator

        return MACECalculator(settings.checkpoint, device=model.device, default_dtype=settings.dtype)
    return ForceModelCalculator(model)


def seconds_per_call(atoms: Atoms, calculator, displacements: np.ndarray) -> float:
    """Mean wall time of ASE force calls on displaced copies, the neighbour list made anew each time."""
    atoms = atoms.copy()
    atoms.calc = calculator
    atoms.get_forces()
    began, start = time.perf_counter(), atoms.positions.copy()
    for displacement in displacements:
        atoms.positions = start + displacement
        atoms.get_forces()
    return (time.perf_counter() - began) / len(displacements)


def vibrations(atoms: Atoms, calculator) -> np.ndarray:
    """Hessian [3N, 3N] in eV/Å² by ASE's `Vibrations`."""
    atoms = atoms.copy()
    atoms.calc = calculator
    with tempfile.TemporaryDirectory() as folder:
        run = Vibrations(atoms, name=f"{folder}/vib", delta=Phonons().displacement_A)
        run.run()
        return run.get_vibrations().get_hessian_2d()


def measure(host: Host, size: str, total: float | None, settings: Potential, full: bool) -> list[dict]:
    """All methods on one supercell; see the module's docstring for the fields."""
    folding, plan, model = host.folding(size), host.plan(size, total), host.model
    reference = references(host, size, total)
    relaxed, n = _atoms(reference), len(folding)
    defects = [host.defect(size, site, dopant) for site, dopant in zip(host.sites, host.symbols, strict=True)]
    superpose = Superposition(
        host.primitive, folding.matrix, host.pristine(size)["compact"], [defect for defect, _ in defects]
    )
    library = sum(cost for _, cost in defects)
    edges = energy_edges(SPECTRA)
    pristine = _modes(superpose.hessian, folding.atoms)
    exact = _modes(reference["hessian"].astype(float), relaxed)
    host_pdos, exact_pdos = (pdos(modes, edges, SPECTRA.sigma_meV) for modes in (pristine, exact))
    rows = []

    def row(method, evaluations, wall, modes=None, positions=None, **more):
        values = {
            "host": host.name,
            "method": method,
            "dopants": " ".join(plan.dopants),
            "potential": model.identity.model,
        }
        values |= {"total_doping": len(plan.sites) / n, "n_atoms": n, "force_evaluations": int(evaluations)}
        values |= {"wall_s": round(wall, 2), "pdos_l1_share": None, "pdos_w1_meV": None, "displacement_mae_A": None}
        if modes is not None:
            values["pdos_l1_share"] = l1_share(pdos(modes, edges, SPECTRA.sigma_meV), exact_pdos, host_pdos)
            values["pdos_w1_meV"] = wasserstein_distance(modes.energies_meV, exact.energies_meV)
        if positions is not None:
            off = positions - relaxed.positions
            values["displacement_mae_A"] = float(np.abs(off - off.mean(axis=0)).mean())
        rows.append(values | more)

    began = time.perf_counter()
    guess = superpose(plan)
    superposed = _modes(guess.hessian, guess.atoms)
    superposed_s = time.perf_counter() - began

    displacements = np.zeros((TIMED_CALLS, n, 3))
    displacements[np.arange(TIMED_CALLS), np.arange(TIMED_CALLS) % n, 0] = Phonons().displacement_A
    calculator = ase_calculator(settings, model)
    for _ in range(2):
        model.forces_of_displaced(relaxed, displacements[:1])
    ase_s = seconds_per_call(relaxed, calculator, displacements)
    began = time.perf_counter()
    for one in displacements:
        model.forces_of_displaced(relaxed, one[None])
    own_s = (time.perf_counter() - began) / TIMED_CALLS
    relax, displaced = int(reference["relax_evaluations"]), int(reference["evaluations"])
    published = 6 * n + 1

    if full:
        began = time.perf_counter()
        modes = _modes(vibrations(relaxed, calculator), relaxed)
        row(PUBLISHED, published + relax, time.perf_counter() - began + relax * ase_s, modes, relaxed.positions)
    else:
        row(PUBLISHED, published + relax, (published + relax) * ase_s, timed_share=TIMED_CALLS / published)
    timed = {"timed_share": TIMED_CALLS / displaced}
    row("phonopy_ase", displaced + relax, (displaced + relax) * ase_s, **timed)
    row("direct", displaced + relax, (displaced + relax) * own_s, exact, relaxed.positions, **timed)
    row("mass_only", 0, superposed_s, _modes(superpose.hessian, guess.atoms), folding.atoms.positions)
    row("superposed", 0, superposed_s, superposed, guess.atoms.positions, library_evaluations=library)

    began = time.perf_counter()
    warm = relax_doped(apply(plan, folding.atoms), model, Relaxation(), guess.displacements)
    most = max(12, published // 25)
    probed = probe(superpose, plan, warm.atoms, model, PROBING_TOLERANCE, most, np.random.default_rng(SEED))
    modes = _modes(probed.hessian, warm.atoms)
    row(
        "probed",
        warm.quality["relax_evaluations"] + 2 * probed.products,
        time.perf_counter() - began,
        modes,
        warm.atoms.positions,
        library_evaluations=library,
        relax_evaluations_cold=relax,
        relax_evaluations_warm=int(warm.quality["relax_evaluations"]),
        products=probed.products,
        estimated_error=probed.error,
    )
    return rows


def _modes(hessian: np.ndarray, atoms: Atoms) -> Modes:
    return diagonalise(hessian, atoms.get_masses(), list(atoms.symbols))


def _case(row: dict) -> tuple:
    return tuple(row[name] for name in ("potential", "host", "n_atoms", "dopants"))


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table, times as shares of that of the published method."""
    lines = [
        "| host | N | at.% | method | force evaluations | time | error / signal | W1 (meV) | positions (Å) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        base = next(other for other in rows if other["method"] == PUBLISHED and _case(other) == _case(row))
        cells = [row["host"], str(row["n_atoms"]), f"{100 * row['total_doping']:.1f}", row["method"]]
        cells += [str(row["force_evaluations"]), f"{row['wall_s'] / base['wall_s']:.3g}"]
        cells += [
            "" if row[k] is None else f"{row[k]:.3g}" for k in ("pdos_l1_share", "pdos_w1_meV", "displacement_mae_A")
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", nargs="+", default=list(HOSTS), choices=list(HOSTS), metavar="HOST")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument(
        "--potential", type=json.loads, default={}, help='as JSON, e.g. \'{"name": "chgnet", "model": "0.3.0"}\''
    )
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--full", action="store_true", help="make every call of the published method")
    parser.add_argument("--prepare", action="store_true", help="compute libraries and references only")
    parser.add_argument("--work", type=Path, default=Path("results/bench/work"))
    parser.add_argument("--output", type=Path, default=Path("results/bench/phonons.json"))
    options = parser.parse_args()
    settings = Potential(**options.potential, device=options.device)
    model = potentials.load(settings)
    if model.device == "cpu":
        import torch

        torch.set_num_threads(1)
    rows = json.loads(options.output.read_text()) if options.output.exists() else []
    for name in options.hosts:
        host = Host(name, model, options.work)
        for size in options.sizes:
            for total in TOTALS[size]:
                if options.prepare:
                    references(host, size, total)
                    continue
                measured = measure(host, size, total, settings, options.full)
                rows = [row for row in rows if _case(row) != _case(measured[0])] + measured
                write_atomically(options.output, (json.dumps(rows, indent=1) + "\n").encode())
    if rows:
        print(table(rows))
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


if __name__ == "__main__":
    main()
