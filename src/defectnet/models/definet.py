"""One forward pass from an unrelaxed crystal with point defects to where its atoms go.

After DefiNet (Yang et al., npj Comput. Mater. 2025, arXiv:2503.15391): equivariant message passing with scalar and
vector channels on the radius graph of a periodic cell, in which every site carries a marker (perfect, substituted,
vacant; a vacancy stays in the graph as a ghost node) that gates the messages. What is done differently:

- A site knows the element that it holds *and* the one that the perfect host holds there, both by their properties.
- Besides scalars, which describe the crystal, a node has a *disturbance*: channels that are zero where nothing was
  replaced. Vectors arise from disturbances and forces only, and messages are linear in both, like the response of a
  harmonic crystal, with coefficients that depend on everything else. So a perfect crystal at rest does not move.
- Where the host's force constants are known, the network also says Kanzaki forces, those that would displace the
  perfect harmonic crystal as the defects do, and the lattice Green's function says where these carry the atoms. So what
  is soft in a host, and how far a disturbance reaches there, need not be learned.
- Where the potential's forces on the unrelaxed cell are known as well, a harmonic crystal's answer to them is the first
  guess, and the network says what is wrong with it: bonds of dopants are stiffer or softer than the host's.
- Nothing else is pooled over the cell: the answer does not depend on which cell describes the crystal.
- Every atom's expected error is predicted as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from ase.data import covalent_radii
from pymatgen.core import Element
from torch import Tensor, nn
from torch.nn import functional

from defectnet.elements import Properties

PERFECT, SUBSTITUTED, VACANT = range(3)
"""Markers of sites."""

NOTHING = 0
"""Atomic number of what a vacant site holds."""

HEAVIEST = 94
"""Largest atomic number that has a row in :data:`ELEMENTS`."""

NEIGHBOURS = 30.0
"""Sums over neighbours are divided by the square root of a typical number of them."""

LEARNED = 8
"""Length of the vector that is learned of each element."""

HIDDEN = 0.1
"""How often training hides that of an element, or the force constants of a host."""

FORCE_eV_PER_A, GUESS_A = 2.0, 0.5
"""Beyond these, forces and what a harmonic crystal makes of them tell little more."""

HIDDEN_FORCES = 0.5
"""How often training hides the forces on an unrelaxed cell: the network has to answer without them, too."""


@dataclass(frozen=True)
class Crystals:
    """A batch of S unrelaxed periodic cells with N sites and E directed edges in all.

    numbers, host_numbers : [N] atomic numbers that each site holds (0: vacant), and holds in the perfect host
    target, source        : [E] the sites of each edge
    vectors               : [E, 3] from target to source in Å
    crystal               : [N] the cell of each site; cells are contiguous
    green                 : S times [3n, 3n] in Å²/eV, the Green's function of the host's lattice at the n sites of a
                            cell, or [0, 0] where it is not known
    forces                : S times [n, 3] in eV/Å on the unrelaxed sites, or [0, 3] where they are not known; they
                            count only beside a Green's function
    """

    numbers: Tensor
    host_numbers: Tensor
    target: Tensor
    source: Tensor
    vectors: Tensor
    crystal: Tensor
    green: tuple[Tensor, ...]
    forces: tuple[Tensor, ...]

    @property
    def markers(self) -> Tensor:
        """[N] each site's marker."""
        changed = torch.where(self.numbers == self.host_numbers, PERFECT, SUBSTITUTED)
        return torch.where(self.numbers == NOTHING, VACANT, changed)

    def to(self, *args: torch.device | torch.dtype) -> Crystals:
        """On another device; a floating-point type applies to vectors, Green's functions and forces alone."""
        several = {name: tuple(one.to(*args) for one in getattr(self, name)) for name in ("green", "forces")}
        moved = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in several}
        for arg in args:
            names = ("vectors",) if isinstance(arg, torch.dtype) else moved
            moved |= {name: moved[name].to(arg) for name in names}
        return replace(self, **moved, **several)

    @property
    def sizes(self) -> list[int]:
        """S times the number of sites of a cell."""
        return torch.bincount(self.crystal, minlength=len(self.green)).tolist()


@dataclass(frozen=True)
class Moves:
    """Where atoms go.

    displacements : [N, 3] in Å, without rigid translation; 0 at vacancies
    log_error     : [N] logarithm of the expected length of the error in Å
    """

    displacements: Tensor
    log_error: Tensor


def _element_table() -> np.ndarray:
    """[HEAVIEST + 1, 9] properties of each element, of order one; row 0, of nothing, is zero."""
    rows = [np.zeros(9)]
    for z in range(1, HEAVIEST + 1):
        element, known = Element.from_Z(z), Properties.of(z)
        states = element.common_oxidation_states or (0,)
        rows.append(
            np.array([
                np.log(known.mass_u / 40), (known.radius_A - 1.3) / 0.3, 2 * (known.electronegativity - 2),
                (known.period - 4) / 2, (known.group - 9) / 6, (known.valence - 5) / 4,
                (float(element.average_ionic_radius) - 0.9) / 0.4, (element.mendeleev_no - 60) / 30,
                np.mean(states) / 3,
            ])
        )  # fmt: skip
    return np.array(rows)


ELEMENTS = _element_table()


State = tuple[Tensor, Tensor, Tensor]


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, outputs))


class Edges(nn.Module):
    """What a message depends on besides the nodes: [E, 2 radial] of distance, and of distance over the sum of radii."""

    def __init__(self, radial: int, cutoff_A: float) -> None:
        super().__init__()
        self.radial, self.cutoff_A = radial, cutoff_A
        self.register_buffer("radii", torch.tensor(covalent_radii[: HEAVIEST + 1], dtype=torch.float32))
        self.radii[NOTHING] = 0.0

    def forward(self, crystals: Crystals) -> tuple[Tensor, Tensor]:
        """Radial functions, which vanish smoothly at the cutoff, and unit vectors [E, 3]."""
        length = crystals.vectors.norm(dim=1, keepdim=True)
        radii = self.radii[crystals.numbers]
        contact = (radii[crystals.target] + radii[crystals.source])[:, None].clamp(min=0.5)
        envelope = 0.5 * (1 + torch.cos(torch.pi * (length / self.cutoff_A).clamp(max=1)))
        functions = [self._gaussians(length, 1.0, self.cutoff_A), self._gaussians(length / contact, 0.6, 2.6)]
        return torch.cat(functions, dim=1) * envelope, crystals.vectors / length

    def _gaussians(self, values: Tensor, first: float, last: float) -> Tensor:
        centres = torch.linspace(first, last, self.radial, dtype=values.dtype, device=values.device)
        return torch.exp(-0.5 * ((values - centres) / (centres[1] - centres[0])) ** 2)


class Layer(nn.Module):
    """Messages along edges, then an update within each node.

    State of a node: ``scalars`` [N, C], ``disturbance`` [N, D], ``vectors`` [N, 3, D].
    """

    def __init__(self, scalars: int, vectors: int, radial: int) -> None:
        super().__init__()
        self.widths = [scalars] + 6 * [vectors]
        self.sums = [scalars, vectors, 3 * vectors]
        self.of_source = _mlp(scalars + vectors, scalars, sum(self.widths))
        self.of_target = _mlp(scalars + vectors, scalars, scalars + 2 * vectors)
        self.gate_source = _gate(sum(self.widths))
        self.gate_target = _gate(scalars + 2 * vectors)
        self.filters = nn.Linear(2 * radial, sum(self.widths), bias=False)
        self.turn = nn.Linear(vectors, 2 * vectors, bias=False)
        self.update = _mlp(scalars + 2 * vectors, scalars, scalars + 4 * vectors)

    def forward(self, state: State, crystals: Crystals, radial: Tensor, unit: Tensor) -> State:
        """The next state, from ``radial`` functions [E, R] and ``unit`` vectors [E, 3] of edges."""
        scalars, disturbance, vectors = state
        source, target, markers = crystals.source, crystals.target, crystals.markers
        known = torch.cat([scalars, disturbance], dim=1)
        offered = self.of_source(known) * self.gate_source(markers)
        weights = self.filters(radial) * offered.index_select(0, source)
        plain, spread, squeezed, carried, along, push, own = weights.split(self.widths, dim=1)

        # Springs act on differences of displacements, across and along the bond.
        apart = vectors.index_select(0, source) - vectors.index_select(0, target)
        stretch = (apart * unit[:, :, None]).sum(dim=1)
        near, here = disturbance.index_select(0, source), disturbance.index_select(0, target)
        force = along * stretch + push * near + own * here
        to_vectors = carried[:, None] * apart + force[:, None] * unit[:, :, None]
        messages = torch.cat([plain, spread * near + squeezed * stretch, to_vectors.flatten(1)], dim=1)
        total = messages.new_zeros((len(scalars), sum(self.sums))).index_add(0, target, messages)
        to_scalars, to_disturbance, to_vectors = (total / NEIGHBOURS**0.5).split(self.sums, dim=1)
        accepted = self.of_target(known) * self.gate_target(markers)
        of_scalars, of_disturbance, of_vectors = accepted.split(self.widths[:3], dim=1)
        scalars = scalars + of_scalars * to_scalars
        disturbance = disturbance + of_disturbance * to_disturbance
        vectors = vectors + of_vectors[:, None] * to_vectors.view(vectors.shape)

        first, second = self.turn(vectors).chunk(2, dim=2)
        coefficients = self.update(torch.cat([scalars, disturbance, _lengths(second)], dim=1))
        more, keep, from_vectors, of_first, of_own = coefficients.split([self.widths[0], *4 * [self.widths[1]]], dim=1)
        scalars = scalars + more
        disturbance = disturbance + keep * disturbance + from_vectors * (first * second).sum(dim=1)
        vectors = vectors + of_first[:, None] * first + of_own[:, None] * vectors
        return scalars, disturbance, vectors


def _gate(width: int) -> nn.Embedding:
    """What a marker multiplies messages with; training goes on from 1."""
    gate = nn.Embedding(3, width)
    nn.init.ones_(gate.weight)
    return gate


def _lengths(vectors: Tensor) -> Tensor:
    """[N, D] of vectors [N, 3, D]; smooth at 0."""
    return ((vectors**2).sum(dim=1) + 1e-6).sqrt()


def _bounded(vectors: Tensor, most: float) -> Tensor:
    """Vectors [N, 3] that are never longer than ``most``: forces on unrelaxed cells reach tens of eV/Å."""
    return vectors / (1 + (vectors**2).sum(dim=1, keepdim=True) / most**2).sqrt()


class DefiNet(nn.Module):
    """The network: C = ``scalars``, D = ``vectors``.

    An element is described by its properties and by what is ``learned`` of it, a vector that training hides at times,
    so that elements which it never saw (they have zeros) are no surprise; the same with force constants.
    The published network has 512 channels of both kinds, 4 layers, 128 radial functions, and a cutoff of 6 Å.
    """

    def __init__(
        self, scalars: int = 64, vectors: int = 32, layers: int = 2, radial: int = 12, cutoff_A: float = 4.5
    ) -> None:
        super().__init__()
        self.config = {
            "scalars": scalars, "vectors": vectors, "layers": layers, "radial": radial, "cutoff_A": cutoff_A,
        }  # fmt: skip
        self.register_buffer("elements", torch.tensor(ELEMENTS, dtype=torch.float32))
        self.learned = nn.Parameter(torch.zeros(HEAVIEST + 1, LEARNED))
        properties = self.elements.shape[1] + LEARNED + 1
        self.describe = _mlp(2 * properties + 5, scalars, scalars)
        self.feel = nn.Linear(2, vectors, bias=False)
        self.disturb = _mlp(properties, scalars, vectors)
        self.edges = Edges(radial, cutoff_A)
        self.layers = nn.ModuleList(Layer(scalars, vectors, radial) for _ in range(layers))
        self.move = _mlp(scalars + vectors, scalars, vectors)
        self.push = _mlp(scalars + vectors, scalars, vectors)
        self.judge = _mlp(scalars + 2 * vectors, scalars, 1)

    def forward(self, crystals: Crystals) -> Moves:
        """See :class:`Crystals` and :class:`Moves`."""
        markers = crystals.markers
        told = functional.one_hot(markers, 3).to(self.elements.dtype)
        green = [one if self._shown(1) else one[:0, :0] for one in crystals.green]
        forces = [
            one if len(one) and len(by) and self._shown(1, HIDDEN_FORCES) else None
            for one, by in zip(crystals.forces, green, strict=True)
        ]
        known = told.new_tensor([[len(by) > 0, one is not None] for by, one in zip(green, forces, strict=True)])
        felt = torch.cat([
            told.new_zeros(n, 3) if one is None else one for one, n in zip(forces, crystals.sizes, strict=True)
        ])  # fmt: skip
        properties = self._properties()
        held, held_by_host = (properties[numbers] for numbers in (crystals.numbers, crystals.host_numbers))
        scalars = self.describe(torch.cat([held, held_by_host, told, known[crystals.crystal]], dim=1))
        disturbance = self.disturb(held) - self.disturb(held_by_host)
        guess = _answers(green, felt, crystals.sizes)
        vectors = self.feel(torch.stack([_bounded(felt, FORCE_eV_PER_A), _bounded(guess, GUESS_A)], dim=2))
        radial, unit = self.edges(crystals)
        state = scalars, disturbance, vectors
        for layer in self.layers:
            state = layer(state, crystals, radial, unit)
        scalars, disturbance, vectors = state
        known = torch.cat([scalars, disturbance], dim=1)
        displacements = (self.move(known)[:, None] * vectors).sum(dim=2)
        pushed = (self.push(known)[:, None] * vectors).sum(dim=2) * (markers != VACANT)[:, None]
        displacements = guess + displacements + _answers(green, pushed, crystals.sizes)
        log_error = self.judge(torch.cat([known, _lengths(vectors)], dim=1)).squeeze(1) - 3
        return Moves(_without_translation(displacements, crystals.crystal, markers != VACANT), log_error)

    def _properties(self) -> Tensor:
        """[HEAVIEST + 1, P] what is known of each element."""
        nothing = torch.zeros_like(self.elements[:, :1])
        nothing[NOTHING] = 1
        shown = self._shown(len(self.learned)).to(self.learned)[:, None]
        return torch.cat([self.elements, self.learned * shown, nothing], dim=1)

    def _shown(self, n: int, hidden: float = HIDDEN) -> Tensor:
        """[n] what training does not hide this time."""
        return torch.rand(n) > hidden if self.training else torch.ones(n, dtype=torch.bool)


def _answers(green: Sequence[Tensor], forces: Tensor, sizes: list[int]) -> Tensor:
    """[N, 3] displacements in Å of harmonic crystals under forces [N, 3] in eV/Å; 0 where they are not known."""
    return torch.cat([
        (one @ force.flatten()).view(force.shape) if len(one) else torch.zeros_like(force)
        for one, force in zip(green, forces.split(sizes), strict=True)
    ])  # fmt: skip


def _without_translation(displacements: Tensor, crystal: Tensor, atoms: Tensor) -> Tensor:
    """Less the mean over the atoms of each cell; 0 elsewhere."""
    displacements = displacements * atoms[:, None]
    cells = int(crystal.max()) + 1
    total = displacements.new_zeros((cells, 3)).index_add(0, crystal, displacements)
    count = displacements.new_zeros(cells).index_add(0, crystal, atoms.to(displacements.dtype))
    return (displacements - (total / count[:, None])[crystal]) * atoms[:, None]


def loss(moves: Moves, displacements: Tensor, atoms: Tensor) -> Tensor:
    """What training minimises: mean length of the errors in Å over ``atoms`` [N], and the likelihood of these lengths.

    ``displacements`` [N, 3] in Å are the true ones. The likelihood is that of exponentially distributed lengths, and
    has no say in where the atoms go.
    """
    error = ((moves.displacements - displacements)[atoms].square().sum(dim=1) + 1e-8).sqrt()
    log_error = moves.log_error[atoms]
    likelihood = log_error + error.detach() * torch.exp(-log_error)
    return error.mean() + 0.01 * likelihood.mean()
