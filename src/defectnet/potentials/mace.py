"""MACE potentials (Batatia et al., NeurIPS 35, 11423 (2022); MACE-MP-0: arXiv:2401.00096) through `mace-torch`.

The foundation models (small, medium, large, medium-mpa-0 …) are downloaded by the package on first use. A `.model`
file is a pickle of the whole module: only the one that the user named is unpickled.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
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

SUPPORTED = "0.3."
UNPICKLE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def identify(settings: Potential) -> Identity:
    """Find the checkpoint and digest it.

    Raises InputError for a wrong environment or a missing file. Whether a head of that name is in the file is found
    out by :func:`load`, because MACE keeps its heads inside the pickled model.
    """
    return Identity("mace", model_name(settings, settings.modality), file_digest(_checkpoint(settings)), settings.dtype)


@contextlib.contextmanager
def _importing() -> Iterator[None]:
    """Import modules of mace without their chatter and without their side effect.

    mace makes torch unpickle whatever it loads, for the whole process and its children, by setting an environment
    variable. That is only needed by e3nn 0.4.4, to read a table of tensors and slices when it is imported; allowing
    slices does as well.
    """
    import torch

    before = os.environ.get(UNPICKLE)
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            contextlib.redirect_stdout(io.StringIO()),
            torch.serialization.safe_globals([slice]),
        ):
            yield
    finally:
        if before is None:
            os.environ.pop(UNPICKLE, None)
        else:
            os.environ[UNPICKLE] = before


def _checkpoint(settings: Potential) -> Path:
    package_version("mace", "mace-torch", SUPPORTED)
    path = named_checkpoint(settings, "MACE model (.model)")
    if path is not None:
        return path
    with _importing():
        from mace.calculators import foundations_models
        from mace.tools.utils import get_cache_dir

        if settings.model not in foundations_models.mace_mp_urls:
            known = ", ".join(foundations_models.mace_mp_urls)
            raise InputError(f"potential.model: mace knows no model {settings.model!r}; it knows {known}")
        try:
            with contextlib.redirect_stdout(sys.stderr):  # its licence notes; stdout is for the identity
                return Path(foundations_models.download_mace_mp_checkpoint(settings.model))
        except (OSError, RuntimeError) as error:
            file = Path(foundations_models.mace_mp_urls[settings.model]).name
            cached = get_cache_dir() / "".join(c for c in file if c.isalnum() or c == "_")
            raise InputError(
                f"potential.model: {settings.model} is not in {cached} and its download failed ({error}); put the file "
                f"{file} there under that name, or name it in potential.checkpoint"
            ) from None


def load(settings: Potential) -> MACE:
    """Load a MACE model on the configured device. Raises InputError."""
    device = choose_device(settings)
    identity = identify(settings)
    path = _checkpoint(settings)
    warn_of_pickle(path)
    return MACE(path, identity, device, settings)


class MACE:
    """See the module's docstring; implements :class:`~defectnet.potentials.base.ForceModel`.

    On a GPU, the kernels of cuEquivariance are used where `cuequivariance_torch` is installed.
    """

    def __init__(self, checkpoint: Path, identity: Identity, device: str, settings: Potential):
        import torch

        prepare_torch(device)
        with _importing():
            import mace.calculators  # noqa: F401  e3nn reads its table now, not while the model is unpickled
            from mace.tools.utils import AtomicNumberTable

            try:
                model = torch.load(checkpoint, map_location="cpu", weights_only=False)
                self._table = AtomicNumberTable([int(z) for z in model.atomic_numbers])
                self.cutoff_A = float(model.r_max)
            except Exception as error:  # whatever unpickling a wrong file raises
                raise wrong_file(checkpoint, "MACE model", error) from error
        heads = list(getattr(model, "heads", None) or ["Default"])
        self._head = choose_modality(settings, heads if len(heads) > 1 else []) or heads[0]
        self._heads = heads
        self.identity = identity
        self.package = f"mace-torch {package_version('mace', 'mace-torch', SUPPORTED)}"
        self.device = device
        self.elements = frozenset(chemical_symbols[z] for z in self._table.zs)
        self._dtype = getattr(torch, identity.dtype)
        model = model.to(device=device, dtype=self._dtype)
        if device == "cuda" and find_spec("cuequivariance_torch"):
            with _importing():
                from mace.cli.convert_e3nn_cueq import run

                model = run(model, device=device).to(device=device, dtype=self._dtype)
            self.package += f", cuequivariance-torch {package_version('mace', 'cuequivariance-torch', '')}"
        model.requires_grad_(False)
        self._model = model.eval()
        self._skinned = SkinnedGraph(lambda atoms, skin: self._graph([atoms], self.cutoff_A + skin))

    def _graph(self, structures: Sequence[Atoms], cutoff_A: float) -> dict:
        """All structures as one disconnected graph, in the model's dtype."""
        from mace.data import AtomicData, config_from_atoms
        from mace.tools.torch_geometric import Batch
        from mace.tools.torch_tools import default_dtype

        graphs = []
        with default_dtype(self._dtype):
            for atoms in structures:
                bare = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=True)
                graphs.append(
                    AtomicData.from_config(
                        config_from_atoms(bare, head_name=self._head),
                        z_table=self._table,
                        cutoff=cutoff_A,
                        heads=self._heads,
                    )
                )
        return Batch.from_data_list(graphs).to(self.device).to_dict()

    def evaluate(self, structures: Sequence[Atoms]) -> Evaluation:
        """See :class:`~defectnet.potentials.base.ForceModel`."""
        require_elements(self, structures)
        output = self._model(self._graph(structures, self.cutoff_A), compute_stress=True)
        ends = np.cumsum([len(atoms) for atoms in structures])[:-1]
        return Evaluation(
            output["energy"].detach().cpu().numpy().astype(float),
            np.split(output["forces"].detach().cpu().numpy().astype(float), ends),
            output["stress"].detach().cpu().numpy().astype(float),
        )

    def forces_of_displaced(self, atoms: Atoms, displacements: np.ndarray) -> np.ndarray:
        """See :class:`~defectnet.potentials.base.ForceModel`; the copies are one structure without edges in between."""
        import torch

        require_elements(self, [atoms])
        graph = self._skinned(atoms, displacements)
        i, j = graph["edge_index"]
        start = torch.as_tensor(atoms.positions, device=self.device)
        lattice = torch.as_tensor(atoms.cell.array, device=self.device)
        displacements = torch.as_tensor(displacements, device=self.device)
        vectors = start[j] - start[i] + graph["unit_shifts"].double() @ lattice
        lengths = displaced_vectors(vectors, i, j, displacements).norm(dim=-1)
        copy, edge = torch.nonzero(lengths < self.cutoff_A, as_tuple=True)
        positions = (start + displacements).reshape(-1, 3).to(self._dtype)
        copies = graph | {
            "positions": positions,
            "node_attrs": graph["node_attrs"].repeat(len(displacements), 1),
            "edge_index": graph["edge_index"][:, edge] + copy * len(atoms),
            "shifts": graph["shifts"][edge],
            "unit_shifts": graph["unit_shifts"][edge],
            "batch": torch.zeros(len(positions), dtype=torch.long, device=self.device),
            "ptr": torch.tensor([0, len(positions)], device=self.device),
        }
        forces = self._model(copies)["forces"]
        return forces.detach().cpu().numpy().astype(float).reshape(displacements.shape)

    def hessian_vector_products(self, atoms: Atoms, vectors: np.ndarray) -> np.ndarray:
        """See :class:`~defectnet.potentials.base.HasHessianVectorProduct`; one double backward pass per vector."""
        import torch

        require_elements(self, [atoms])
        graph = self._graph([atoms], self.cutoff_A)
        positions = graph["positions"].requires_grad_(True)
        forces = self._model(graph, training=True)["forces"]  # training: keeps the graph of the forces
        products = []
        for vector in torch.as_tensor(vectors, dtype=self._dtype, device=self.device):
            (product,) = torch.autograd.grad(-(forces * vector).sum(), positions, retain_graph=True)
            products.append(product.cpu().numpy().astype(float))
        return np.array(products).reshape(vectors.shape)
