"""The dataset: one HDF5 file with every finished spectrum, from normal modes to training targets.

Layout (H hosts, S spectra, B bins, E elements of one spectrum, M modes of one spectrum)::

    attributes         schema_version, defectnet_version, vocabulary, spectra (JSON), provenance (JSON), digest
    /grid/edges_meV    [B + 1]
    /hosts/            id, formula, composition [H, 56], candidates [H, 56] bool,
                       replaces (JSON: dopant -> replaced element), pristine (row of /spectra, -1 when missing)
    /spectra/          id, host (row of /hosts), fidelity, role, reference (row of the pristine spectrum of the same
                       supercell), concentrations [S, 56], pdos [S, B], n_atoms, potential, potential_digest,
                       record_digest
    /spectra/quality/  one column [S] per reported quantity, NaN where a spectrum does not have it
    /modes/            energy_meV [ΣM] float32 with mode_offset [S + 1]; weights [ΣM·E] float16 with weight_offset
                       [S + 1], one spectrum row-major [M, E]; elements (atomic numbers) [ΣE] with element_offset
                       [S + 1]. Incompressible, therefore not compressed, but every chunk has a checksum (fletcher32)
    /comparison/       one row per direct spectrum that superposition was compared with: host (row of /hosts), number of
                       the doped cell, total_doping, superposed_l1, mass_only_l1 (shares of what doping changed),
                       superposed_w1_meV, mass_only_w1_meV, displacement_mae_A, displacement_mean_A
    /missing/          host, item, stage, status, reason

A compact dataset (:mod:`defectnet.dataset.compact`) has neither /modes nor ``pdos`` but two groups, /absolute_axis on
the grid and /host_axis on the published axis of 100 bins, each with intensities (:mod:`defectnet.dataset.samples`):
``pristine`` float32, one row per pristine spectrum in their order, and ``change`` [S, B] float16, each spectrum less
its reference.

Arrays over elements have index Z - 1; where the vocabulary has "Vac", candidates and concentrations have a 57th column
for vacancies. Compositions are atomic fractions, concentrations are fractions of the sites of the undoped supercell,
``n_atoms`` are its atoms, ``pdos`` is in 1/meV and integrates to 1 as far as the grid covers the modes.
The modes are kept so that broadening, binning, weighting and axes can change without computing phonons again. Half
precision rounds a weight by 0.05 % at most; readers divide each mode's weights by their sum.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from itertools import islice, pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
from ase.data import atomic_numbers, chemical_symbols

from defectnet import __version__
from defectnet.config import Spectra
from defectnet.elements import MAX_Z, element_vector, width_of
from defectnet.errors import InputError, RecordError
from defectnet.phonons.modes import Modes
from defectnet.phonons.pdos import Broadening, energy_edges

SCHEMA_VERSION = 4

FIDELITIES = ("direct", "probed", "superposed", "mass_only")
RELAXED = FIDELITIES[:2]
"""Fidelities of spectra of relaxed crystals."""
"""How a spectrum was obtained: all force constants computed; single defects superposed and refined by Hessian-vector
products at the relaxed structure; superposed only; or the host's force constants with other masses."""

ROLES = ("pristine", "doped", "response")
"""What a spectrum is for: a host to be compared with; a sample; or one substitution alone, whose difference from the
host's spectrum is the response to a dopant."""

COMPARED = (
    "number",
    "total_doping",
    "superposed_l1",
    "mass_only_l1",
    "superposed_w1_meV",
    "mass_only_w1_meV",
    "displacement_mae_A",
    "displacement_mean_A",
)
"""Columns of ``/comparison`` beside the host."""

SPECTRA_AT_ONCE = 100
RAGGED = {"energy_meV": "mode_offset", "weights": "weight_offset", "elements": "element_offset"}
"""Arrays of ``/modes`` and the offsets of the spectra in them."""
RAGGED_CHUNK = 1 << 16
COMPRESSED: dict[str, Any] = {"compression": "gzip", "compression_opts": 4, "shuffle": True}


NO_MODES = Modes(np.empty(0), np.empty((0, 0)), ())


@dataclass(frozen=True)
class HostEntry:
    """A host crystal.

    composition : atomic fraction by symbol; sums to 1.
    candidates  : dopant symbol -> symbol of the host element it may replace.
    """

    id: str
    formula: str
    composition: Mapping[str, float]
    candidates: Mapping[str, str]


@dataclass(frozen=True)
class SpectrumEntry:
    """One supercell's modes and what is known about them.

    concentrations : dopant symbol -> fraction of the sites of the undoped supercell; empty for a pristine cell.
    n_atoms        : of the undoped supercell.
    role           : one of :data:`ROLES`. A host may have pristine spectra of several supercells; the first is its own.
    quality        : any named numbers, such as ``residual_force_eV_per_A`` or ``n_imaginary``.
    """

    id: str
    host_id: str
    fidelity: str
    concentrations: Mapping[str, float]
    modes: Modes
    n_atoms: int
    potential: str
    potential_digest: str
    record_digest: str
    quality: Mapping[str, float] = field(default_factory=dict)
    role: str = "doped"


@dataclass(frozen=True)
class MissingEntry:
    """Work that the dataset lacks: ``status`` is what became of it, ``reason`` why, in words."""

    host: str
    item: str
    stage: str
    status: str
    reason: str


@dataclass(frozen=True)
class HostTable:
    """Hosts as columns: H rows; ``composition`` and ``candidates`` [H, 56]; ``pristine`` is -1 when missing."""

    id: list[str]
    formula: list[str]
    composition: np.ndarray
    candidates: np.ndarray
    replaces: list[dict[str, str]]
    pristine: np.ndarray


@dataclass(frozen=True)
class SpectrumTable:
    """Spectra as columns: S rows; ``concentrations`` [S, 56]; ``pdos`` [S, B] in 1/meV; ``quality`` by name."""

    id: list[str]
    host: np.ndarray
    fidelity: list[str]
    role: list[str]
    reference: np.ndarray
    concentrations: np.ndarray
    pdos: np.ndarray
    n_atoms: np.ndarray
    potential: list[str]
    potential_digest: list[str]
    record_digest: list[str]
    quality: dict[str, np.ndarray]


def write_dataset(
    path: Path,
    hosts: Sequence[HostEntry],
    spectra: Iterable[SpectrumEntry],
    settings: Spectra,
    vocabulary: Sequence[str],
    missing: Sequence[MissingEntry] = (),
    provenance: Mapping[str, Any] | None = None,
    comparisons: Mapping[str, Mapping[str, np.ndarray]] | None = None,
) -> str:
    """Write the whole dataset and return its content digest.

    ``spectra`` is consumed once, in order; the modes of :data:`SPECTRA_AT_ONCE` are in memory at a time. The file
    appears under its name only when it is complete and on disk. Same arguments, same bytes. ``comparisons`` holds by
    host id the arrays :data:`COMPARED`, of equal length.

    Raises :class:`InputError` for inconsistent entries (unknown host or element, dopant that is no candidate,
    doped spectra without a pristine one, repeated id) and :class:`RecordError` when the disk refuses.
    """
    with new_file(path) as file:
        file.attrs["schema_version"] = SCHEMA_VERSION
        file.attrs["defectnet_version"] = __version__
        file.attrs["vocabulary"] = json.dumps(list(vocabulary))
        file.attrs["spectra"] = json.dumps(settings.model_dump(mode="json"), sort_keys=True)
        file.attrs["provenance"] = json.dumps(dict(provenance or {}), sort_keys=True)
        # Groups that HDF5 makes on the way to a dataset would carry a time stamp; those of create_group do not.
        file.create_group("grid")["edges_meV"] = energy_edges(settings)
        pristine = _write_spectra(file, hosts, spectra, settings, frozenset(vocabulary))
        _write_hosts(file.create_group("hosts"), hosts, pristine, frozenset(vocabulary))
        _write_comparisons(file.create_group("comparison"), hosts, comparisons or {})
        group = file.create_group("missing")
        for name in (column.name for column in fields(MissingEntry)):
            _write_text(group, name, [getattr(entry, name) for entry in missing])
        file.attrs["digest"] = digest = digest_of(file)
    return digest


@contextmanager
def new_file(path: Path) -> Iterator[h5py.File]:
    """An HDF5 file to write, which appears under its name when it is complete and on disk.

    Raises :class:`RecordError` when the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(temporary, "w", libver=("v110", "v110")) as file:
            yield file
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except OSError as error:
        raise RecordError(
            f"{path}: cannot write the dataset: {error}; free space or fix the permissions of {path.parent} "
            "and run the command again, records are intact"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _write_hosts(
    group: h5py.Group, hosts: Sequence[HostEntry], pristine: dict[str, int], vocabulary: frozenset[str]
) -> None:
    for host in hosts:
        _refuse_unknown(f"host {host.id}", {*host.composition, *host.candidates}, vocabulary)
        if abs(sum(host.composition.values()) - 1) > 1e-6:
            raise InputError(f"host {host.id}: atomic fractions sum to {sum(host.composition.values()):g}, not 1")
    _write_text(group, "id", [host.id for host in hosts])
    _write_text(group, "formula", [host.formula for host in hosts])
    _write_text(group, "replaces", [json.dumps(dict(host.candidates), sort_keys=True) for host in hosts])
    group["composition"] = np.array([element_vector(host.composition) for host in hosts]).reshape(-1, MAX_Z)
    width = width_of(vocabulary)
    candidates = [element_vector(dict.fromkeys(host.candidates, 1.0), width) for host in hosts]
    group["candidates"] = np.array(candidates, dtype=bool).reshape(-1, width)
    group["pristine"] = np.array([pristine.get(host.id, -1) for host in hosts], dtype=np.int64)


def _write_comparisons(
    group: h5py.Group, hosts: Sequence[HostEntry], comparisons: Mapping[str, Mapping[str, np.ndarray]]
) -> None:
    if foreign := set(comparisons) - {host.id for host in hosts}:
        raise InputError(f"comparison: {', '.join(sorted(foreign))} is not among the hosts")
    compared = [(row, comparisons[host.id]) for row, host in enumerate(hosts) if host.id in comparisons]
    rows = [np.full(len(columns["number"]), row) for row, columns in compared]
    group["host"] = np.concatenate([np.empty(0, np.int64), *rows])
    for name in COMPARED:
        nothing = np.empty(0, np.int64 if name == "number" else np.float64)
        group[name] = np.concatenate([nothing, *(columns[name] for _, columns in compared)])


def _write_spectra(
    file: h5py.File,
    hosts: Sequence[HostEntry],
    spectra: Iterable[SpectrumEntry],
    settings: Spectra,
    vocabulary: frozenset[str],
) -> dict[str, int]:
    """Stream the spectra; returns the row of each host's first pristine one. Only /modes grows on disk meanwhile."""
    by_id = {host.id: host for host in hosts}
    row_of_host = {host.id: row for row, host in enumerate(hosts)}
    if len(by_id) != len(hosts):
        raise InputError("host ids must be unique")
    edges = file["grid/edges_meV"][()]
    modes = file.create_group("modes")
    energies = _Ragged(modes, "energy_meV", "mode_offset", np.float32)
    weights = _Ragged(modes, "weights", "weight_offset", np.float16)
    elements = _Ragged(modes, "elements", "element_offset", np.uint8)

    rows: list[SpectrumEntry] = []
    densities: list[np.ndarray] = []
    pristine: dict[tuple[str, int], int] = {}  # by host and number of atoms
    seen: set[str] = set()
    broadening = Broadening(edges, settings)
    spectra = iter(spectra)
    while some := list(islice(spectra, SPECTRA_AT_ONCE)):
        for entry in some:
            _check(entry, by_id, vocabulary)
            supercell = entry.host_id, entry.n_atoms
            if entry.id in seen or (entry.role == "pristine" and supercell in pristine):
                raise InputError(
                    f"spectrum {entry.id}: a second one with this id, or a second pristine one of its supercell"
                )
            seen.add(entry.id)
            if entry.role == "pristine":
                pristine[supercell] = len(rows)
            energies.append(entry.modes.energies_meV)
            weights.append(entry.modes.weights)
            elements.append(np.array([atomic_numbers[symbol] for symbol in entry.modes.elements]))
            rows.append(replace(entry, modes=NO_MODES))
        densities.append(broadening.spectra([entry.modes for entry in some]).astype(np.float32))
        for ragged in (energies, weights, elements):
            ragged.flush()
    for entry in rows:
        if (entry.host_id, entry.n_atoms) not in pristine:
            raise InputError(
                f"host {entry.host_id}: spectrum {entry.id} has no pristine spectrum of {entry.n_atoms} atoms to be "
                "compared with; list it under missing"
            )
    for ragged in (energies, weights, elements):
        ragged.close()

    group = file.create_group("spectra")
    for name in ("id", "fidelity", "role", "potential", "potential_digest", "record_digest"):
        _write_text(group, name, [getattr(entry, name) for entry in rows])
    group["host"] = np.array([row_of_host[entry.host_id] for entry in rows], dtype=np.int64)
    group["reference"] = np.array([pristine[entry.host_id, entry.n_atoms] for entry in rows], dtype=np.int64)
    group["n_atoms"] = np.array([entry.n_atoms for entry in rows], dtype=np.int64)
    width = width_of(vocabulary)
    concentrations = np.array([element_vector(entry.concentrations, width) for entry in rows]).reshape(-1, width)
    density = np.concatenate([np.empty((0, len(edges) - 1), np.float32), *densities])
    for name, array in (("concentrations", concentrations), ("pdos", density)):
        group.create_dataset(name, data=array, **(COMPRESSED if rows else {}))
    quality = group.create_group("quality")
    for name in sorted({name for entry in rows for name in entry.quality}):
        quality[name] = np.array([entry.quality.get(name, np.nan) for entry in rows], dtype=np.float64)
    return {host: row for (host, _), row in reversed(pristine.items())}  # the first of each host


def _check(entry: SpectrumEntry, hosts: Mapping[str, HostEntry], vocabulary: frozenset[str]) -> None:
    where = f"spectrum {entry.id}"
    if entry.host_id not in hosts:
        raise InputError(f"{where}: its host {entry.host_id} is not among the hosts")
    if entry.fidelity not in FIDELITIES:
        raise InputError(f"{where}: fidelity {entry.fidelity!r} is none of {', '.join(FIDELITIES)}")
    _refuse_unknown(where, {*entry.concentrations, *entry.modes.elements}, vocabulary)
    present = {symbol for symbol, fraction in entry.concentrations.items() if fraction > 0}
    if entry.role not in ROLES:
        raise InputError(f"{where}: role {entry.role!r} is none of {', '.join(ROLES)}")
    if (entry.role == "pristine") == bool(present):
        raise InputError(f"{where}: a pristine cell holds no dopant and a doped one at least one, not {len(present)}")
    if unforeseen := present - set(hosts[entry.host_id].candidates):
        raise InputError(f"{where}: {', '.join(sorted(unforeseen))} is no candidate of host {entry.host_id}")
    if entry.modes.weights.shape != (len(entry.modes.energies_meV), len(entry.modes.elements)):
        raise InputError(f"{where}: mode weights have shape {entry.modes.weights.shape}")


def _refuse_unknown(where: str, symbols: set[str], vocabulary: frozenset[str]) -> None:
    if unknown := symbols - vocabulary:
        raise InputError(f"{where}: {', '.join(sorted(unknown))} is not in hosts.vocabulary")


def _write_text(group: h5py.Group, name: str, values: Sequence[str]) -> None:
    encoded = [value.encode() for value in values]
    # Of fixed length: HDF5 cannot close a file with variable ones on a full disk.
    group[name] = np.array(encoded, dtype=h5py.string_dtype(length=max(map(len, encoded), default=0) or 1))


class _Ragged:
    """A flat dataset that grows by one spectrum's values at a time, and the offsets between them."""

    def __init__(self, group: h5py.Group, name: str, offset_name: str, dtype: type) -> None:
        self.group, self.offset_name, self.dtype = group, offset_name, dtype
        self.values = group.create_dataset(
            name, shape=(0,), maxshape=(None,), chunks=(RAGGED_CHUNK,), dtype=dtype, fletcher32=True
        )
        self.offsets = [0]
        self.pending: list[np.ndarray] = []

    def append(self, values: np.ndarray) -> None:
        flat = np.asarray(values, dtype=self.dtype).ravel()
        self.pending.append(flat)
        self.offsets.append(self.offsets[-1] + flat.size)

    def flush(self) -> None:
        """Write what fills whole chunks."""
        written = len(self.values)
        self._write((self.offsets[-1] - written) // RAGGED_CHUNK * RAGGED_CHUNK)

    def close(self) -> None:
        self._write(self.offsets[-1] - len(self.values))
        self.group[self.offset_name] = np.array(self.offsets, dtype=np.int64)

    def _write(self, count: int) -> None:
        if count:
            flat = np.concatenate(self.pending)
            self.values.resize((len(self.values) + count,))
            self.values[-count:] = flat[:count]
            self.pending = [flat[count:]]


def digest_of(file: h5py.File) -> str:
    """SHA-256 of all arrays and of the attributes that give them meaning, not of version and provenance."""
    total = hashlib.sha256()
    for name in ("schema_version", "vocabulary", "spectra"):
        total.update(f"{name}={file.attrs[name]};".encode())
    names: list[str] = []
    file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    for name in sorted(names):
        item = file[name]
        text = h5py.check_string_dtype(item.dtype) is not None
        total.update(f"{name}{'text' if text else item.dtype.str}{item.shape};".encode())
        for start in range(0, len(item), RAGGED_CHUNK):
            part = item[start : start + RAGGED_CHUNK]
            total.update(json.dumps([value.decode() for value in part]).encode() if text else part.tobytes())
    return total.hexdigest()


def content_digest(path: Path) -> str:
    """Hexadecimal SHA-256 of what the dataset says, computed from its content. Raises :class:`RecordError`."""
    with Dataset(path) as dataset:
        return dataset.recomputed_digest()


class Dataset:
    """Reader of a dataset file; use it as a context manager. Tables are loaded at once, modes on request.

    Raises :class:`RecordError` when the file is not a complete dataset of this schema version.

    vocabulary : symbols that hosts and dopants may contain
    settings   : :class:`~defectnet.config.Spectra` of the ``pdos`` column
    edges_meV  : [B + 1] bin edges of the ``pdos`` column
    hosts, spectra, missing : tables of this module
    comparison : the columns of ``/comparison`` by name
    digest     : content digest stored by the writer
    compact    : whether the file holds spectra on two axes instead of modes
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise InputError(f"{self.path}: no such dataset; make it with `defectnet dataset`")
        try:
            self._file = h5py.File(self.path, "r")
        except OSError as error:
            raise self._damaged(error) from None
        try:
            self._load()
        except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
            self._file.close()
            raise self._damaged(error) from None
        except RecordError:
            self._file.close()
            raise

    def _load(self) -> None:
        file = self._file
        version = int(file.attrs["schema_version"])
        if version != SCHEMA_VERSION:
            raise RecordError(
                f"{self.path}: schema version {version}, this package reads {SCHEMA_VERSION}; "
                "delete it and rerun `defectnet dataset`, records are intact"
            )
        self.digest = str(file.attrs["digest"])
        self.defectnet_version = str(file.attrs["defectnet_version"])
        self.vocabulary = tuple(json.loads(file.attrs["vocabulary"]))
        self.settings = Spectra.model_validate_json(file.attrs["spectra"])
        self.provenance: dict[str, Any] = json.loads(file.attrs["provenance"])
        self.edges_meV: np.ndarray = file["grid/edges_meV"][()]
        hosts = _columns(file["hosts"])
        hosts["replaces"] = [json.loads(text) for text in hosts["replaces"]]
        self.hosts = HostTable(**hosts)
        self.compact = "modes" not in file
        columns = _columns(file["spectra"])
        if self.compact:
            bin_shares = np.diff(self.edges_meV) * (len(self.edges_meV) - 1)
            columns["pdos"] = _restored(file["absolute_axis"], columns["reference"]) / bin_shares.astype(np.float32)
        self.spectra = SpectrumTable(**columns, quality=_columns(file["spectra/quality"]))
        self.comparison: dict[str, np.ndarray] = _columns(file["comparison"])
        missing = _columns(file["missing"])
        names = [column.name for column in fields(MissingEntry)]
        self.missing = [MissingEntry(*row) for row in zip(*(missing[name] for name in names), strict=True)]
        if not self.compact:
            self._offsets = {name: file["modes"][name][()] for name in RAGGED.values()}

    def _damaged(self, error: Exception) -> RecordError:
        return RecordError(
            f"{self.path}: not a complete dataset ({error}); "
            "delete it and rerun `defectnet dataset`, records are intact"
        )

    @property
    def doped(self) -> np.ndarray:
        """Rows of the doped spectra, ascending."""
        return np.flatnonzero(np.array(self.spectra.role) == "doped")

    def modes(self, row: int) -> Modes:
        """The modes of one spectrum, read from disk, as float64."""
        stored = self._read(int(row), int(row) + 1)[0]
        weights = stored.weights.astype(np.float64)
        return Modes(
            stored.energies_meV.astype(np.float64), weights / weights.sum(axis=1, keepdims=True), stored.elements
        )

    def blocks(self) -> Iterator[tuple[slice, list[Modes]]]:
        """All spectra in order, :data:`SPECTRA_AT_ONCE` at a time: their rows, and their modes as they are stored.

        Much faster than one by one. Weights are float16 and sum to 1 only up to its rounding.
        """
        for first in range(0, len(self.spectra.id), SPECTRA_AT_ONCE):
            last = min(first + SPECTRA_AT_ONCE, len(self.spectra.id))
            yield slice(first, last), self._read(first, last)

    def _read(self, first: int, last: int) -> list[Modes]:
        """Stored modes of the rows from ``first`` to before ``last``."""
        if self.compact:
            raise InputError(
                f"{self.path}: /modes: a compact dataset has no modes, only spectra on two axes; for other axes, "
                "broadening or weighting make the whole one with `defectnet dataset`"
            )
        group = self._file["modes"]
        spans = {name: offsets[first : last + 1].tolist() for name, offsets in self._offsets.items()}
        try:
            energies, weights, numbers = (
                group[name][spans[offset][0] : spans[offset][-1]] for name, offset in RAGGED.items()
            )
        except OSError as error:
            raise self._damaged(error) from None
        symbols = [chemical_symbols[number] for number in numbers]
        pieces = []
        for values, offset in ((energies, "mode_offset"), (weights, "weight_offset"), (symbols, "element_offset")):
            start = spans[offset][0]
            pieces.append([values[i - start : j - start] for i, j in pairwise(spans[offset])])
        return [Modes(e, w.reshape(len(e), len(names)), tuple(names)) for e, w, names in zip(*pieces, strict=True)]

    def compact_intensity(self, axis: str) -> np.ndarray:
        """Intensities [S, B] float32 of a compact dataset on its ``absolute`` axis or the published ``host`` axis."""
        try:
            return _restored(self._file[f"{axis}_axis"], self.spectra.reference)
        except (OSError, KeyError, ValueError) as error:
            raise self._damaged(error) from None

    def recomputed_digest(self) -> str:
        """The content digest computed afresh; differs from :attr:`digest` if a value was damaged or edited."""
        try:
            return digest_of(self._file)
        except OSError as error:
            raise self._damaged(error) from None

    def __enter__(self) -> Dataset:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _restored(group: h5py.Group, reference: np.ndarray) -> np.ndarray:
    """Intensities [S, B] float32 from an axis of a compact dataset and the rows [S] of the pristine spectra."""
    change = group["change"][()].astype(np.float32)
    pristine = np.zeros_like(change)
    pristine[np.unique(reference)] = group["pristine"][()]
    return change + pristine[reference]


def _columns(group: h5py.Group) -> dict[str, Any]:
    """Datasets directly under a group: text as lists of str, numbers as arrays."""
    return {
        name: item.asstr()[()].tolist() if h5py.check_string_dtype(item.dtype) else item[()]
        for name, item in group.items()
        if isinstance(item, h5py.Dataset)
    }
