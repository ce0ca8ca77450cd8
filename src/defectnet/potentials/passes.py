"""How many displaced copies of a structure go into one forward pass."""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np
from ase import Atoms

from defectnet.potentials.base import ForceModel

ATOMS_ON_A_CPU = 32
"""Enough to outweigh the overhead of a pass, few enough to stay in the cache (tests/bench/evaluation.py)."""
SHARE_OF_FREE_MEMORY = 0.8


class MemoryMeter(Protocol):
    """The memory that passes share, in bytes."""

    def watch(self) -> None:
        """Start looking for a new :meth:`peak`."""

    def peak(self) -> int:
        """Most that was in use since :meth:`watch`."""

    def free(self) -> int:
        """What a pass may use."""

    def release(self) -> None:
        """Let go of what is reserved and not in use."""


class CudaMemory:
    """Memory of the current GPU as torch sees it; implements :class:`MemoryMeter`."""

    def __init__(self) -> None:
        import torch

        self.watch = torch.cuda.reset_peak_memory_stats
        self.peak = torch.cuda.max_memory_allocated
        self.release = torch.cuda.empty_cache
        self._cuda = torch.cuda

    def free(self) -> int:
        """What a pass may use: what torch has reserved and does not use is as good as free."""
        return self._cuda.mem_get_info()[0] + self._cuda.memory_reserved() - self._cuda.memory_allocated()


class OutOfMemoryError(RuntimeError):
    """A single copy does not fit; named as torch's own."""


def _out_of_memory(error: Exception) -> bool:
    """Whether torch ran out of memory: its own exception, or the RuntimeError that TorchScript makes of it."""
    return type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and "out of memory" in str(error)
    )


class Passes:
    """Evaluates displaced copies of ``atoms``; ``copies`` says how many the next pass should hold.

    ``auto`` means about 32 atoms on a CPU. On a GPU, the first pass holds one copy and the second two; what the second
    took more is the memory of a copy, and 80 % of the free memory is filled from then on. A number of atoms is an upper
    limit. Whenever memory runs out all the same, passes are halved for good.
    """

    def __init__(
        self,
        model: ForceModel,
        atoms: Atoms,
        atoms_per_pass: int | Literal["auto"],
        memory: MemoryMeter | None = None,
    ):
        self._model, self._atoms = model, atoms
        self._memory = CudaMemory() if memory is None and model.device == "cuda" else memory
        self._probing = atoms_per_pass == "auto" and self._memory is not None
        self._peak_of_one = 0
        if self._probing:
            self.copies = 1
        elif atoms_per_pass == "auto":
            self.copies = -(-ATOMS_ON_A_CPU // len(atoms))
        else:
            self.copies = max(1, atoms_per_pass // len(atoms))

    def forces(self, displacements: np.ndarray) -> np.ndarray:
        """Forces [K, N, 3] in eV/Å of copies with ``displacements`` [K, N, 3] in Å, in one pass if they fit.

        Raises :class:`OutOfMemoryError` when not even one copy fits.
        """
        blocks: list[np.ndarray] = []
        first = 0
        while first < len(displacements):
            part = displacements[first : first + self.copies]
            block = self._pass(part)
            if block is None:
                self.copies, self._probing = len(part) // 2, False
            else:
                blocks.append(block)
                first += len(part)
        return np.concatenate(blocks)

    def _pass(self, displacements: np.ndarray) -> np.ndarray | None:
        """Forces [K, N, 3], or None where memory ran out and there is something to halve."""
        if self._probing:
            self._memory.watch()
        try:
            forces = self._model.forces_of_displaced(self._atoms, displacements)
        except Exception as error:
            if not _out_of_memory(error):
                raise
            if len(displacements) == 1:
                raise OutOfMemoryError(f"{error}; not even one structure of {len(self._atoms)} atoms fits") from error
        else:
            if self._probing:
                self._learn(len(displacements))
            return forces
        # Only here, where the exception no longer holds them, are the tensors of the failed pass free to go.
        if self._memory is not None:
            self._memory.release()
        return None

    def _learn(self, copies: int) -> None:
        """Draw conclusions from a pass of one copy, then of two."""
        peak = self._memory.peak()
        if copies == 1:
            self._peak_of_one, self.copies = peak, 2
        else:
            per_copy = max(1, peak - self._peak_of_one)
            self.copies = max(1, int(SHARE_OF_FREE_MEMORY * self._memory.free() / per_copy))
            self._probing = False
