"""SevenNet potentials (Park et al., J. Chem. Theory Comput. 20, 4857 (2024)) through the `sevenn` package.

7net-0, 7net-l3i5 and 7net-mf-0 come with the package; other names are downloaded by it on first use.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols

from defectnet.config import Potential
from defectnet.digests import file_digest
from defectnet.errors import InputError
from defectnet.potentials.base import Evaluation, Identity, require_elements
from defectnet.potentials.copies import SkinnedGraph, displaced_vectors
from defectnet.potentials.loading import (
    choose_device,
    choose_modality,
    model_name,
    named_checkpoint,
    package_version,
    prepare_torch,
    warn_of_pickle,
    wrong_file,
)

SUPPORTED = "0.13."


def identify(settings: Potential) -> Identity:
    """Find the checkpoint, check the modality and digest the file.

    Raises InputError for a wrong environment, a missing or wrong file, or a modality that the model does not have.
    """
    path = _checkpoint(settings)
    if settings.checkpoint is not None:
        warn_of_pickle(path)
    modality = choose_modality(settings, _modalities(_read(path)))
    return Identity("sevennet", model_name(settings, modality), file_digest(path), settings.dtype)


def _checkpoint(settings: Potential) -> Path:
    package_version("sevennet", "sevenn", SUPPORTED)
    path = named_checkpoint(settings, "SevenNet checkpoint (.pth)")
    if path is not None:
        return path
    import sevenn.util

    try:
        with contextlib.redirect_stdout(sys.stderr):  # its progress; stdout is for the identity
            return Path(sevenn.util.pretrained_name_to_path(settings.model))
    except ValueError:
        known = ", ".join(sevenn.util.get_available_pretrained_models())
        raise InputError(f"potential.model: sevenn knows no model {settings.model!r}; it knows {known}") from None
    except OSError as error:
        raise InputError(
            f"potential.model: {settings.model} is not installed and its download failed ({error}); download it "
            "elsewhere and name the file in potential.checkpoint"
        ) from None


def _read(path: Path):
    """The checkpoint with its configuration; no model is built. Raises InputError for another kind of file."""
    with warnings.catch_warnings(action="ignore"):
        from sevenn.checkpoint import SevenNetCheckpoint

        try:
            file = SevenNetCheckpoint(path)
            _ = file.config["cutoff"]
        except Exception as error:  # whatever unpickling a wrong file raises
            raise wrong_file(path, "SevenNet checkpoint", error) from error
    return file


def _modalities(file) -> list[str]:
    return sorted(file.config.get("_modal_map") or {})


def load(settings: Potential) -> SevenNet:
    """Load a SevenNet checkpoint on the configured device. Raises InputError."""
    device = choose_device(settings)
    return SevenNet(_checkpoint(settings), identify(settings), device, settings.modality)


class SevenNet:
    """See the module's docstring; implements :class:`~defectnet.potentials.base.ForceModel`."""

    def __init__(self, checkpoint: Path, identity: Identity, device: str, modality: str | None = None):
        import torch

        prepare_torch(device)
        file = _read(checkpoint)
        with warnings.catch_warnings(action="ignore"):
            import sevenn._keys as key

            try:
                model = file.build_model()
            except Exception as error:  # weights of another architecture than the file describes
                raise wrong_file(checkpoint, "SevenNet checkpoint", error) from error
        self.identity = identity
        self.package = f"sevenn {package_version('sevennet', 'sevenn', SUPPORTED)}"
        self.device = device
        self.cutoff_A = float(file.config[key.CUTOFF])
        self.elements = frozenset(chemical_symbols[z] for z in file.config[key.TYPE_MAP])
        self._modality = modality
        self._dtype = getattr(torch, identity.dtype)
        model.set_is_batch_data(True)
        model.requires_grad_(False)
        if device == "cpu":
            from sevenn.nn.convolution import IrrepsConvolution, IrrepsScatterGatterFusedConvolution

            from defectnet.potentials.convolution import Convolution

            for name, module in model.named_children():
                if isinstance(module, IrrepsConvolution):
                    fused = IrrepsScatterGatterFusedConvolution.from_irreps_convolution(module)
                    fused.convolution = Convolution(module.convolution)
                    setattr(model, name, fused)
        self._model = model.to(device=device, dtype=self._dtype).eval()
        self._skinned = SkinnedGraph(self._skin)

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
            exact = {name: torch.as_tensor(arrays[name], dtype=self._dtype) for name in (key.EDGE_VEC, key.CELL_VOLUME)}
            graph = AtomGraphData.from_numpy_dict(arrays)  # rounds to float32, the arrays it is given as well
            for name, value in exact.items():
                graph[name] = value
            if self._modality is not None:
                graph[key.DATA_MODALITY] = self._modality
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

    def _skin(self, atoms: Atoms, skin: float):
        """Edges within ``skin`` beyond the cutoff: indices [2, E] and vectors [E, 3] in float64."""
        import sevenn._keys as key
        import torch
        from sevenn.train.dataload import unlabeled_atoms_to_graph

        arrays = unlabeled_atoms_to_graph(atoms, self.cutoff_A + skin)
        return tuple(torch.as_tensor(arrays[name], device=self.device) for name in (key.EDGE_IDX, key.EDGE_VEC))

    def forces_of_displaced(self, atoms: Atoms, displacements: np.ndarray) -> np.ndarray:
        """See :class:`~defectnet.potentials.base.ForceModel`; the copies are one structure without edges in between.

        Edges beyond the cutoff have to go: SevenNet's cutoff function rises again there.
        """
        import sevenn._keys as key
        import torch
        from sevenn.atom_graph_data import AtomGraphData

        require_elements(self, [atoms])
        (i, j), vectors = self._skinned(atoms, displacements)
        vectors = displaced_vectors(vectors, i, j, torch.as_tensor(displacements, device=self.device))
        copy, edge = torch.nonzero(vectors.norm(dim=-1) < self.cutoff_A, as_tuple=True)
        numbers = torch.as_tensor(atoms.numbers, device=self.device).repeat(len(displacements))
        graph = AtomGraphData(
            numbers, torch.stack([i[edge], j[edge]]) + copy * len(atoms), **{key.ATOMIC_NUMBERS: numbers}
        )
        graph[key.EDGE_VEC] = vectors[copy, edge].to(self._dtype)
        graph[key.CELL_VOLUME] = torch.ones(1, dtype=self._dtype, device=self.device)  # of the stress, not wanted here
        graph[key.NUM_ATOMS] = torch.tensor([len(numbers)], device=self.device)
        graph[key.BATCH] = torch.zeros_like(numbers)
        if self._modality is not None:
            graph[key.DATA_MODALITY] = [self._modality]
        forces = self._model(graph)[key.PRED_FORCE]
        return forces.detach().cpu().numpy().astype(float).reshape(displacements.shape)

    def hessian_vector_products(self, atoms: Atoms, vectors: np.ndarray) -> np.ndarray:
        """See :class:`~defectnet.potentials.base.HasHessianVectorProduct`; one double backward pass per vector."""
        import sevenn._keys as key
        import torch

        require_elements(self, [atoms])
        try:
            self._model.train()  # keeps the graph of the forces; sevenn has no dropout or batch norm
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
