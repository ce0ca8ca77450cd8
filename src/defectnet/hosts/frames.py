"""Databases of structures in one extended-xyz file, such as that of the Gaussian approximation potential of silicon.

There (Bartók et al., Phys. Rev. X 8, 041048 (2018); file ``gp_iter6_sparse9k.xml.xyz``) the comment line of every frame
says of what kind it is: ``config_type=amorph``, ``liq``, ``dia``, ...
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from ase import Atoms
from ase.io import iread, write

from defectnet.errors import InputError
from defectnet.files import write_atomically
from defectnet.hosts.filters import Candidates, Rejection
from defectnet.hosts.sources import as_id, from_file

KIND = "config_type"
"""Key in a comment line with the kind of structure."""


def frames(
    path: str | Path,
    folder: str | Path,
    kinds: Collection[str] = (),
    progress: Callable[[Sequence[tuple[int, Atoms]]], Iterable[tuple[int, Atoms]]] = iter,
) -> Candidates:
    """Structures of an extended-xyz file, by :data:`KIND`; all of them where ``kinds`` is empty.

    Species, positions and lattice of each go to ``folder/NAME-KIND-NUMBER.extxyz``, numbered from 0 in the order of the
    whole file, because a host that is too large for a row points to a file. The kind is the host's family.
    Raises :class:`InputError` when the file is missing or malformed, or holds none of the kinds.
    """
    path = Path(path)
    try:
        found = list(enumerate(iread(path, index=":", format="extxyz")))
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise InputError(f"--path: {path} cannot be read ({error}); give an extended-xyz file") from None
    available = Counter(_kind(atoms) for _, atoms in found)
    unknown = sorted(set(kinds) - set(available))
    if unknown or not found:
        listed = ", ".join(f"{kind or '(none)'} {count}" for kind, count in sorted(available.items()))
        raise InputError(f"--config-type: {path} holds no {', '.join(unknown) or 'structures'}; it holds {listed or 0}")
    hosts, rejected = [], []
    for number, atoms in progress([(number, atoms) for number, atoms in found if not kinds or _kind(atoms) in kinds]):
        kind = _kind(atoms)
        host_id = as_id("-".join(filter(None, (path.name.split(".")[0], kind, f"{number:05d}"))))
        file = Path(folder) / f"{host_id}.extxyz"
        text = io.StringIO()
        write(text, Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc), format="extxyz")
        write_atomically(file, text.getvalue().encode())
        try:
            host = from_file(file, host_id, f"{path.name}, frame {number}")
        except InputError as error:
            rejected.append(Rejection(host_id, atoms.get_chemical_formula(), "unreadable", str(error)))
        else:
            hosts.append(replace(host, family=kind or None, source="extxyz"))
    return Candidates(hosts, rejected)


def _kind(atoms: Atoms) -> str:
    return str(atoms.info.get(KIND, ""))
