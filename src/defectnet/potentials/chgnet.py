"""CHGNet potentials (Deng et al., Nat. Mach. Intell. 5, 1031 (2023)) through the `chgnet` package.

The weights of 0.3.0, 0.2.0 and r2scan come with the package. Magnetic moments are not evaluated. Checkpoints are read
as plain tensors: no code in them is run.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols

from defectnet.config import Potential
from defectnet.digests import file_digest
from defectnet.errors import InputError, PhysicsError
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

SUPPORTED = "0.4."


def identify(settings: Potential) -> Identity:
    """Find the checkpoint and digest it. Raises InputError for a wrong environment or a missing file."""
    path = _checkpoint(settings)
    choose_modality(settings, [])
    return Identity("chgnet", model_name(settings), file_digest(path), settings.dtype)


def _checkpoint(settings: Potential) -> Path:
    package_version("chgnet", "chgnet", SUPPORTED)
    path = named_checkpoint(settings, "CHGNet checkpoint (.pth.tar)")
    if path is not None:
        return path
    import chgnet

    pretrained = Path(chgnet.__file__).parent / "pretrained"
    files = sorted((pretrained / settings.model).glob("*.pth.tar"))
    if not files:
        known = ", ".join(sorted(folder.name for folder in pretrained.iterdir() if folder.is_dir()))
        raise InputError(f"potential.model: chgnet knows no model {settings.model!r}; it knows {known}")
    return files[0]


def load(settings: Potential) -> CHGNet:
    """Load a CHGNet checkpoint on the configured device. Raises InputError."""
    device = choose_device(settings)
    return CHGNet(_checkpoint(settings), identify(settings), device)


class CHGNet:
    """See the module's docstring; implements :class:`~defectnet.potentials.base.ForceModel`."""

    def __init__(self, checkpoint: Path, identity: Identity, device: str):
        import chgnet.model
        import torch

        prepare_torch(device)
        try:
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)["model"]
            # Version 0.2.0 has biases that later ones lack, which its file does not mention among the arguments.
            bias = any("mlp_out" in name and name.endswith("bias") for name in state["state_dict"])
            with contextlib.redirect_stdout(io.StringIO()):  # it announces its number of parameters
                model = chgnet.model.CHGNet.from_dict(state, mlp_out_bias=bias)
        except Exception as error:  # whatever reading a wrong file raises
            raise wrong_file(checkpoint, "CHGNet checkpoint", error) from error
        self.identity = identity
        self.package = f"chgnet {package_version('chgnet', 'chgnet', SUPPORTED)}"
        self.device = device
        self.cutoff_A = float(model.graph_converter.atom_graph_cutoff)
        self.elements = frozenset(chemical_symbols[1 : model.atom_embedding.embedding.num_embeddings + 1])
        self._dtype = getattr(torch, identity.dtype)
        model.graph_converter.set_isolated_atom_response("ignore")  # _graph has a message of its own
        model.requires_grad_(False)
        self._model = model.to(device=device, dtype=self._dtype).eval()
        self._skinned = SkinnedGraph(self._skin)

    def _graph(self, atoms: Atoms):
        """One structure as CHGNet's graph, in the model's dtype."""
        import torch
        from pymatgen.core import Structure

        structure = Structure(atoms.cell.array, atoms.numbers, atoms.get_scaled_positions(wrap=False))
        graph = self._model.graph_converter(structure)
        self._require_neighbours(atoms, graph)
        # The converter rounds to float32.
        graph.lattice = torch.tensor(structure.lattice.matrix, dtype=self._dtype)
        graph.atom_frac_coord = torch.tensor(structure.frac_coords, dtype=self._dtype, requires_grad=True)
        graph.neighbor_image = graph.neighbor_image.to(self._dtype)
        return graph.to(self.device)

    def _require_neighbours(self, atoms: Atoms, graph) -> None:
        """Raise :class:`PhysicsError` for isolated atoms in the graph of one or several copies of ``atoms``."""
        alone = len(graph.atomic_number) - len(graph.atom_graph.reshape(-1, 2)[:, 0].unique())
        if alone:
            raise PhysicsError(
                f"{atoms.get_chemical_formula()}: CHGNet cannot describe {alone} isolated atom(s) without a neighbour "
                f"within {self.cutoff_A:g} Å"
            )

    def _energies(self, graphs: Sequence, stress: bool = True):
        """Total energies [B] in eV, attached to the positions and strains of the returned batch of graphs."""
        import torch
        from chgnet.model.model import BatchedGraph

        batch = BatchedGraph.from_graphs(
            graphs, self._model.bond_basis_expansion, self._model.angle_basis_expansion, compute_stress=stress
        )
        batch.angle_bases = batch.angle_bases.to(self._dtype)  # float32 where no structure has angles
        energies = self._model._compute(batch)["e"]
        sizes = torch.tensor([len(graph.atomic_number) for graph in graphs], dtype=self._dtype, device=self.device)
        intensive = self._model.is_intensive  # energies per atom, as in all pretrained models
        composition = self._model.composition_model
        if composition is not None:
            counts = torch.stack(
                [torch.bincount(graph.atomic_number - 1, minlength=composition.max_num_elements) for graph in graphs]
            ).to(self._dtype)
            energies = energies + composition._get_energy(counts / sizes[:, None] if intensive else counts)
        if intensive:
            energies = energies * sizes
        return energies, batch

    def evaluate(self, structures: Sequence[Atoms]) -> Evaluation:
        """See :class:`~defectnet.potentials.base.ForceModel`; refuses isolated atoms with a PhysicsError.

        Structures without any bond angle take a pass of their own: beside others, version 0.2.0 would add the biases
        of its angular layers to them.
        """
        import torch

        require_elements(self, structures)
        graphs = [self._graph(atoms) for atoms in structures]
        energies, stresses = np.zeros(len(graphs)), np.zeros((len(graphs), 3, 3))
        forces: list[np.ndarray] = [np.zeros((len(atoms), 3)) for atoms in structures]
        for angular in (True, False):
            group = [index for index, graph in enumerate(graphs) if (len(graph.bond_graph) > 0) == angular]
            if not group:
                continue
            energy, batch = self._energies([graphs[index] for index in group])
            gradients = torch.autograd.grad(energy.sum(), [*batch.atom_positions, *batch.strains])
            gradients = [gradient.cpu().numpy().astype(float) for gradient in gradients]
            energies[group] = energy.detach().cpu().numpy()
            for index, gradient, virial in zip(group, gradients, gradients[len(group) :], strict=False):
                forces[index] = -gradient
                # Strain here is any deformation; its antisymmetric part is a rotation and costs nothing.
                stresses[index] = 0.5 * (virial + virial.T) / structures[index].get_volume()
        return Evaluation(energies, forces, stresses)

    def _skin(self, atoms: Atoms, skin: float):
        """CHGNet's graph with ``skin`` beyond both cutoffs, and i, j [U] and vectors [U, 3] of its bonds in float64."""
        import torch
        from chgnet.graph import CrystalGraphConverter
        from pymatgen.core import Structure

        own = self._model.graph_converter
        converter = CrystalGraphConverter(
            atom_graph_cutoff=own.atom_graph_cutoff + skin,
            bond_graph_cutoff=own.bond_graph_cutoff + skin,
            algorithm=own.algorithm,
            on_isolated_atoms="ignore",
            verbose=False,
        )
        graph = converter(Structure(atoms.cell.array, atoms.numbers, atoms.get_scaled_positions(wrap=False)))
        graph = graph.to(self.device)
        graph.atom_graph = graph.atom_graph.reshape(-1, 2).long()
        graph.bond_graph = graph.bond_graph.reshape(-1, 5).long()
        positions, cell = (torch.as_tensor(array, device=self.device) for array in (atoms.positions, atoms.cell.array))
        one_way = graph.undirected2directed.long()
        i, j = graph.atom_graph[one_way].T
        return graph, i, j, positions[j] - positions[i] + graph.neighbor_image[one_way].double() @ cell

    def _copies(self, graph, atoms: Atoms, displacements: np.ndarray, near, angles):
        """Displaced copies as one graph without bonds in between, in the model's dtype.

        ``near`` [K, U] and ``angles`` [K, A] say which bonds and angles of the skinned ``graph`` each copy has.
        """
        import torch
        from chgnet.graph import CrystalGraph

        to_bond, to_edge = graph.directed2undirected.long(), graph.undirected2directed.long()
        edges = near[:, to_bond]
        bond_place, edge_place = places(near), places(edges)
        bond_copy, bond = torch.nonzero(near, as_tuple=True)
        edge_copy, edge = torch.nonzero(edges, as_tuple=True)
        angle_copy, angle = torch.nonzero(angles, as_tuple=True)
        centre, bond_1, edge_1, bond_2, edge_2 = graph.bond_graph[angle].T
        joined = CrystalGraph(
            atomic_number=graph.atomic_number.repeat(len(displacements)),
            atom_frac_coord=torch.tensor(
                ((atoms.positions + displacements) @ np.linalg.inv(atoms.cell.array)).reshape(-1, 3),
                dtype=self._dtype,
                device=self.device,
                requires_grad=True,
            ),
            atom_graph=graph.atom_graph[edge] + edge_copy[:, None] * len(atoms),
            atom_graph_cutoff=self.cutoff_A,
            neighbor_image=graph.neighbor_image[edge].to(self._dtype),
            directed2undirected=bond_place[edge_copy, to_bond[edge]],
            undirected2directed=edge_place[bond_copy, to_edge[bond]],
            bond_graph=torch.stack(
                [
                    centre + angle_copy * len(atoms),
                    bond_place[angle_copy, bond_1],
                    edge_place[angle_copy, edge_1],
                    bond_place[angle_copy, bond_2],
                    edge_place[angle_copy, edge_2],
                ],
                dim=1,
            ),
            bond_graph_cutoff=self._model.graph_converter.bond_graph_cutoff,
            lattice=torch.tensor(atoms.cell.array, dtype=self._dtype, device=self.device),
        )
        self._require_neighbours(atoms, joined)
        return joined

    def forces_of_displaced(self, atoms: Atoms, displacements: np.ndarray) -> np.ndarray:
        """See :class:`~defectnet.potentials.base.ForceModel`.

        A copy has the bonds and angles of the skinned graph that are short enough in it. As in :meth:`evaluate`, copies
        without any angle take a pass of their own.
        """
        import torch

        require_elements(self, [atoms])
        graph, i, j, vectors = self._skinned(atoms, displacements)
        lengths = displaced_vectors(vectors, i, j, torch.as_tensor(displacements, device=self.device)).norm(dim=-1)
        near = lengths <= self.cutoff_A
        short = near & (lengths <= self._model.graph_converter.bond_graph_cutoff)
        angles = short[:, graph.bond_graph[:, 1]] & short[:, graph.bond_graph[:, 3]]
        angular = angles.any(dim=1)
        forces = np.empty(displacements.shape)
        for group in (angular, ~angular):
            rows = group.nonzero().flatten().tolist()
            if not rows:
                continue
            copies = self._copies(graph, atoms, displacements[rows], near[rows], angles[rows])
            energy, batch = self._energies([copies], stress=False)
            (gradient,) = torch.autograd.grad(energy.sum(), batch.atom_positions)
            forces[rows] = -gradient.cpu().numpy().astype(float).reshape(-1, len(atoms), 3)
        return forces

    def hessian_vector_products(self, atoms: Atoms, vectors: np.ndarray) -> np.ndarray:
        """See :class:`~defectnet.potentials.base.HasHessianVectorProduct`; one double backward pass per vector."""
        import torch

        require_elements(self, [atoms])
        energies, batch = self._energies([self._graph(atoms)])
        (gradient,) = torch.autograd.grad(energies.sum(), batch.atom_positions, create_graph=True)
        products = []
        for vector in torch.as_tensor(vectors, dtype=self._dtype, device=self.device):
            (product,) = torch.autograd.grad((gradient * vector).sum(), batch.atom_positions, retain_graph=True)
            products.append(product.cpu().numpy().astype(float))
        return np.array(products).reshape(vectors.shape)
