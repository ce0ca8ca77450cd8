"""SevenNet potentials (Park et al., J. Chem. Theory Comput. 20, 4857 (2024)) through the `sevenn` package.

7net-0, 7net-l3i5 and 7net-mf-0 come with the package; other names are downloaded by it on first use.
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols

from defectnet.config import Potential
from defectnet.digests import file_digest
from defectnet.errors import InputError
from defectnet.potentials.base import Evaluation, Identity, require_elements

SUPPORTED = "0.13."


def identify(settings: Potential) -> Identity:
    """Find the checkpoint and digest it. Raises InputError for a wrong environment or a missing file."""
    return Identity("sevennet", settings.model, file_digest(_checkpoint(settings)), settings.dtype)


def _package_version() -> str:
    try:
        installed = version("sevenn")
    except PackageNotFoundError:
        installed = "none"
    if not installed.startswith(SUPPORTED):
        raise InputError(
            f"potential.name: sevennet needs the package sevenn {SUPPORTED}*, found {installed} in {sys.executable}; "
            "run `make envs` and point potential.python at .venvs/sevennet/bin/python"
        )
    return installed


def _checkpoint(settings: Potential) -> Path:
    _package_version()
    if settings.checkpoint is not None:
        path = Path(settings.checkpoint)
        if not path.is_file():
            raise InputError(
                f"potential.checkpoint: {path}: no such file; put the SevenNet checkpoint (.pth) there, or set "
                "potential.checkpoint to null to use the pretrained potential.model"
            )
        return path
    import sevenn.util

    try:
        return Path(sevenn.util.pretrained_name_to_path(settings.model))
    except ValueError:
        known = ", ".join(sevenn.util.get_available_pretrained_models())
        raise InputError(f"potential.model: sevenn knows no model {settings.model!r}; it knows {known}") from None
    except OSError as error:
        raise InputError(
            f"potential.model: {settings.model} is not installed and its download failed ({error}); download it "
            "elsewhere and name the file in potential.checkpoint"
        ) from None


def load(settings: Potential) -> SevenNet:
    """Load a SevenNet checkpoint on the configured device. Raises InputError."""
    import torch

    if settings.device == "cuda" and not torch.cuda.is_available():
        raise InputError("potential.device: cuda was asked for, but torch sees no GPU; use auto or cpu")
    use_gpu = settings.device != "cpu" and torch.cuda.is_available()
    return SevenNet(_checkpoint(settings), identify(settings), "cuda" if use_gpu else "cpu")


class SevenNet:
    """See the module's docstring; implements :class:`~defectnet.potentials.base.ForceModel`."""

    def __init__(self, checkpoint: Path, identity: Identity, device: str):
        with warnings.catch_warnings(action="ignore"):
            import sevenn._keys as key
            import sevenn.util
            import torch

            # Sums over edges in a fixed order, so that an interrupted run and a complete one agree to the last bit.
            torch.use_deterministic_algorithms(True, warn_only=True)
            try:
                file = sevenn.util.load_checkpoint(str(checkpoint))
                model = file.build_model()
            except Exception as error:  # whatever unpickling a wrong file raises
                raise InputError(
                    f"potential.checkpoint: {checkpoint}: not a SevenNet checkpoint ({type(error).__name__}: {error})"
                ) from error
        if device == "cpu":
            _keep_freed_memory()
        self.identity = identity
        self.package = f"sevenn {_package_version()}"
        self.device = device
        self.cutoff_A = float(file.config[key.CUTOFF])
        self.elements = frozenset(chemical_symbols[z] for z in file.config[key.TYPE_MAP])
        self._dtype = getattr(torch, identity.dtype)
        model.set_is_batch_data(True)
        model.requires_grad_(False)
        self._model = model.to(device=device, dtype=self._dtype).eval()

        def in_model_dtype(_module, _inputs, data):
            for name in (key.NODE_FEATURE, key.NODE_ATTR):
                data[name] = data[name].to(self._dtype)
            return data

        # The one-hot encoding of the elements is float32 whatever the model is.
        self._model.get_submodule("onehot_idx_to_onehot").register_forward_hook(in_model_dtype)

    def _graph(self, structures: Sequence[Atoms]):
        """All structures as one disconnected graph; edges within the cutoff, vectors in the model's dtype."""
        import sevenn._keys as key
        import torch
        from sevenn.atom_graph_data import AtomGraphData
        from sevenn.train.dataload import unlabeled_atoms_to_graph
        from torch_geometric.data import Batch

        graphs = []
        for atoms in structures:
            arrays = unlabeled_atoms_to_graph(atoms, self.cutoff_A)
            graph = AtomGraphData.from_numpy_dict(arrays)  # rounds to float32
            for name in (key.EDGE_VEC, key.CELL_VOLUME):
                graph[name] = torch.as_tensor(arrays[name], dtype=self._dtype)
            graphs.append(graph)
        return Batch.from_data_list(graphs).to(self.device)

    def evaluate(self, structures: Sequence[Atoms]) -> Evaluation:
        """See :class:`~defectnet.potentials.base.ForceModel`."""
        import sevenn._keys as key

        require_elements(self, structures)
        output = self._model(self._graph(structures))
        forces = output[key.PRED_FORCE].detach().cpu().numpy().astype(float)
        ends = np.cumsum([len(atoms) for atoms in structures])[:-1]
        # sevenn returns the negative stress as xx, yy, zz, xy, yz, zx.
        stress = -output[key.PRED_STRESS].detach().cpu().numpy().astype(float)
        return Evaluation(
            output[key.PRED_TOTAL_ENERGY].detach().cpu().numpy().astype(float).reshape(-1),
            np.split(forces, ends),
            stress[:, [0, 3, 5, 3, 1, 4, 5, 4, 2]].reshape(-1, 3, 3),
        )

    def hessian_vector_products(self, atoms: Atoms, vectors: np.ndarray) -> np.ndarray:
        """See :class:`~defectnet.potentials.base.HasHessianVectorProduct`; one double backward pass per vector."""
        import sevenn._keys as key
        import torch

        require_elements(self, [atoms])
        try:
            self._model.train()  # makes sevenn keep the graph of the forces; it has no dropout or batch norm
            output = self._model(self._graph([atoms]))
        finally:
            self._model.eval()
        source, target = output[key.EDGE_IDX]
        products = []
        for vector in torch.as_tensor(vectors, dtype=self._dtype, device=self.device):
            # sum(-F v) = sum over edges of dE/dr_e (v_target - v_source); its gradient is the change of dE/dr_e.
            work = -(output[key.PRED_FORCE] * vector).sum()
            (change,) = torch.autograd.grad(work, output[key.EDGE_VEC], retain_graph=True)
            product = torch.zeros_like(vector).index_add(0, target, change).index_add(0, source, -change)
            products.append(product.detach().cpu().numpy().astype(float))
        return np.array(products).reshape(vectors.shape)


def _keep_freed_memory() -> None:
    """Let glibc keep freed memory instead of returning it to the kernel after every pass.

    A forward pass allocates and frees hundreds of megabytes; the page faults of getting them back cost 30-60 % of
    the time on two cores (tests/bench/evaluation.py).
    """
    if sys.platform != "linux" or os.environ.get("MALLOC_TRIM_THRESHOLD_"):
        return
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # M_* of <malloc.h>
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # absent from musl
        libc.mallopt(mmap_threshold, 1 << 25)  # the largest value glibc accepts
        libc.mallopt(trim_threshold, (1 << 31) - 1)
        libc.mallopt(top_pad, 1 << 28)
