"""MatterSim potentials (Yang et al., arXiv:2405.04967) through the `mattersim` package.

The pretrained models MatterSim-v1.0.0-1M and -5M are downloaded by the package on first use. Checkpoints are read
as plain tensors: no code in them is run.
"""

from __future__ import annotations

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
from defectnet.potentials.copies import SkinnedGraph, displaced_vectors, places
from defectnet.potentials.loading import (
    choose_device,
    choose_modality,
    model_name,
    named_checkpoint,
    package_version,
    prepare_torch,
    wrong_file,
)

SUPPORTED = "1.2."  # the last that run on Python 3.11
PRETRAINED = {
    name: f"mattersim-v1.0.0-{size}.pth"
    for size in ("1M", "5M")
    for name in (f"MatterSim-v1.0.0-{size}", f"mattersim-v1.0.0-{size}", size)
}


def identify(settings: Potential) -> Identity:
    """Find the checkpoint and digest it. Raises InputError for a wrong environment or a missing file."""
    path = _checkpoint(settings)
    choose_modality(settings, [])
    return Identity("mattersim", model_name(settings), file_digest(path), settings.dtype)


def _import():
    """The package's modules that are used here, imported without their chatter."""
    from types import SimpleNamespace

    with warnings.catch_warnings(action="ignore"):
        try:
            from mattersim.datasets.utils.convertor import GraphConvertor
            from mattersim.forcefield.m3gnet.m3gnet import M3Gnet
            from mattersim.forcefield.potential import batch_to_dict
            from mattersim.utils.download_utils import download_checkpoint
        except (ImportError, RuntimeError) as error:  # torchvision built for another torch raises RuntimeError
            raise InputError(
                f"potential.name: mattersim cannot be imported ({error}); install its environment with `make envs`, or "
                "`pip uninstall torchvision torchaudio` in one of your own: it uses neither, and a build for another "
                "torch breaks it"
            ) from error
    return SimpleNamespace(
        GraphConvertor=GraphConvertor, M3Gnet=M3Gnet, batch_to_dict=batch_to_dict, download=download_checkpoint
    )


def _checkpoint(settings: Potential) -> Path:
    package_version("mattersim", "mattersim", SUPPORTED)
    path = named_checkpoint(settings, "MatterSim checkpoint (.pth)")
    if path is not None:
        return path
    if settings.model not in PRETRAINED:
        known = "MatterSim-v1.0.0-1M, MatterSim-v1.0.0-5M"
        raise InputError(f"potential.model: mattersim knows no model {settings.model!r}; it knows {known}")
    cache = Path("~/.local/mattersim/pretrained_models").expanduser()  # where the package keeps them
    path = cache / PRETRAINED[settings.model]
    if not path.is_file():
        try:
            _import().download(path.name, save_folder=str(cache))
        except OSError as error:
            raise InputError(
                f"potential.model: {settings.model} is not in {path} and its download failed ({error}); put the file "
                "there, or name it in potential.checkpoint"
            ) from None
    return path


def load(settings: Potential) -> MatterSim:
    """Load a MatterSim checkpoint on the configured device. Raises InputError."""
    device = choose_device(settings)
    return MatterSim(_checkpoint(settings), identify(settings), device)


class MatterSim:
    """See the module's docstring; implements :class:`~defectnet.potentials.base.ForceModel`."""

    def __init__(self, checkpoint: Path, identity: Identity, device: str):
        import torch

        prepare_torch(device)
        package = _import()
        try:
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)
            arguments = state["model_args"]
            model = package.M3Gnet(device=device, **arguments)
            missing = set(model.load_state_dict(state["model"], strict=False).missing_keys)
            missing &= {name for name, _ in model.named_parameters()}  # old files lack constant buffers
            if missing:
                raise KeyError(f"no weights for {', '.join(sorted(missing))}")
        except Exception as error:  # whatever reading a wrong file raises
            raise wrong_file(checkpoint, "MatterSim checkpoint", error) from error
        self.identity = identity
        self.package = f"mattersim {package_version('mattersim', 'mattersim', SUPPORTED)}"
        self.device = device
        self.cutoff_A = float(model.model_args["cutoff"])
        self.elements = frozenset(chemical_symbols[1 : model.max_z + 1])
        self._dtype = getattr(torch, identity.dtype)
        self._batch_to_dict = package.batch_to_dict
        self._angle_cutoff_A = float(model.model_args["threebody_cutoff"])
        self._converter = package.GraphConvertor
        model.requires_grad_(False)
        self._model = model.to(device=device, dtype=self._dtype).eval()
        self._skinned = SkinnedGraph(lambda atoms, skin: self._graph(atoms, skin).to(device))

    def _graph(self, atoms: Atoms, skin: float = 0.0):
        """One structure as MatterSim's graph, with positions and cell in float64 and ``skin`` beyond the cutoffs."""
        import torch

        wrapped = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=True)
        converter = self._converter("m3gnet", self.cutoff_A + skin, True, self._angle_cutoff_A + skin)
        graph = converter.convert(wrapped)  # wraps the atoms into the cell; rounds to float32
        graph.atom_pos = torch.tensor(wrapped.positions)
        graph.cell = torch.tensor(wrapped.cell.array)[None]
        return graph

    def _energies(self, structures: Sequence[Atoms]):
        """Total energies [B] in eV and what they depend on: positions [ΣN, 3] in Å and strains [B, 3, 3]."""
        import torch
        from torch_geometric.data import Batch

        batch = Batch.from_data_list([self._graph(atoms) for atoms in structures])
        inputs = self._batch_to_dict(batch, device=self.device)
        inputs |= {name: inputs[name].to(self._dtype) for name in ("cell", "atom_pos")}
        strains = torch.zeros_like(inputs["cell"], requires_grad=True)
        deformations = torch.eye(3, device=self.device, dtype=self._dtype) + strains
        positions = torch.einsum("ni,nij->nj", inputs["atom_pos"], deformations[inputs["batch"]])
        inputs |= {"cell": inputs["cell"] @ deformations, "atom_pos": positions}
        with _float_means(self._dtype):
            return self._model(inputs), positions, strains

    def evaluate(self, structures: Sequence[Atoms]) -> Evaluation:
        """See :class:`~defectnet.potentials.base.ForceModel`."""
        import torch

        require_elements(self, structures)
        energies, positions, strains = self._energies(structures)
        gradient, virials = torch.autograd.grad(energies.sum(), [positions, strains])
        ends = np.cumsum([len(atoms) for atoms in structures])[:-1]
        volumes = np.array([atoms.get_volume() for atoms in structures])
        # Strain here is any deformation; its antisymmetric part is a rotation and costs nothing.
        stresses = virials.cpu().numpy().astype(float) / volumes[:, None, None]
        return Evaluation(
            energies.detach().cpu().numpy().astype(float),
            np.split(-gradient.cpu().numpy().astype(float), ends),
            0.5 * (stresses + stresses.transpose(0, 2, 1)),
        )

    def forces_of_displaced(self, atoms: Atoms, displacements: np.ndarray) -> np.ndarray:
        """See :class:`~defectnet.potentials.base.ForceModel`; the copies are one structure without edges in between.

        Triples are pairs of edges: each copy has those of the skinned graph whose two edges are short enough in it.
        """
        import torch

        require_elements(self, [atoms])
        graph = self._skinned(atoms, displacements)
        displacements = torch.as_tensor(displacements, device=self.device)
        i, j = graph.edge_index
        vectors = graph.atom_pos[j] - graph.atom_pos[i] + graph.pbc_offsets.double() @ graph.cell[0]
        lengths = displaced_vectors(vectors, i, j, displacements).norm(dim=-1)
        near = lengths <= self.cutoff_A
        copy, edge = torch.nonzero(near, as_tuple=True)
        place = places(near)
        short = near & (lengths <= self._angle_cutoff_A)
        one, other = graph.three_body_indices.T
        triple_copy, triple = torch.nonzero(short[:, one] & short[:, other], as_tuple=True)
        triples = torch.stack([place[triple_copy, one[triple]], place[triple_copy, other[triple]]], dim=1)
        positions = (graph.atom_pos + displacements).reshape(-1, 3).to(self._dtype).requires_grad_(True)

        def tensor(*numbers: int):
            return torch.tensor(numbers, device=self.device)

        inputs = {
            "atom_pos": positions,
            "cell": graph.cell.to(self._dtype),
            "pbc_offsets": graph.pbc_offsets[edge],
            "atom_attr": graph.atom_attr.repeat(len(displacements), 1),
            "edge_index": graph.edge_index[:, edge] + copy * len(atoms),
            "three_body_indices": triples,
            "three_body_edge_map": triples[:, 0],  # sorted, as the triples of the skinned graph are
            "bond_index_bias": tensor(0),
            "num_three_body": tensor(len(triples)),
            "num_triple_ij": torch.bincount(triples[:, 0], minlength=len(edge))[:, None],
            "num_bonds": tensor(len(edge)),
            "total_num_bonds": len(edge),
            "num_atoms": tensor(len(positions)),
            "total_num_atoms": len(positions),
            "num_graphs": torch.tensor(1, device=self.device),
            "batch": torch.zeros(len(positions), dtype=torch.long, device=self.device),
        }
        with _float_means(self._dtype):
            energy = self._model(inputs)
        (gradient,) = torch.autograd.grad(energy.sum(), positions)
        return -gradient.cpu().numpy().astype(float).reshape(displacements.shape)

    def hessian_vector_products(self, atoms: Atoms, vectors: np.ndarray) -> np.ndarray:
        """See :class:`~defectnet.potentials.base.HasHessianVectorProduct`; one double backward pass per vector."""
        import torch

        require_elements(self, [atoms])
        energies, positions, _ = self._energies([atoms])
        (gradient,) = torch.autograd.grad(energies.sum(), positions, create_graph=True)
        products = []
        for vector in torch.as_tensor(vectors, dtype=self._dtype, device=self.device):
            (product,) = torch.autograd.grad((gradient * vector).sum(), positions, retain_graph=True)
            products.append(product.cpu().numpy().astype(float))
        return np.array(products).reshape(vectors.shape)


def _float_means(dtype):
    """Context in which ``tensor.float()`` casts to ``dtype``: the model's forward pass calls it on its inputs."""
    import torch
    from torch.overrides import TorchFunctionMode

    class _Cast(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.Tensor.float:
                return args[0].to(dtype)
            return func(*args, **(kwargs or {}))

    return _Cast()
