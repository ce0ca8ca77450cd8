"""e3nn's tensor product of neighbours' features with spherical harmonics, in fewer passes over memory.

The convolutions of NequIP-like networks (SevenNet, MACE) weigh every path (l1, l2) -> l3 of a message by its own
function of the distance: "uvu" in e3nn (Geiger & Smidt, arXiv:2207.09453). On a CPU their time goes into reading and
writing arrays of edges x channels, once or more per path. Here all paths of an l1 share one small matrix product per
edge.
``tests/bench/tensor_product.py`` compares the two.
"""

from __future__ import annotations

import torch
from e3nn import o3


class TensorProduct(torch.nn.Module):
    """The same function as an :class:`e3nn.o3.TensorProduct` whose instructions are all "uvu" with external weights.

    Called with features [E, irreps_in1], spherical harmonics [E, irreps_in2] and weights [E, weight_numel]; returns
    [E, irreps_out]. Raises ValueError for other instructions.
    """

    def __init__(self, original: o3.TensorProduct):
        super().__init__()
        features, harmonics, out = original.irreps_in1, original.irreps_in2, original.irreps_out
        where = [instruction.i_out for instruction in original.instructions]
        plain = all(i.connection_mode == "uvu" and i.has_weight for i in original.instructions)
        single = all(multiplicity == 1 for multiplicity, _ in harmonics)
        if not (plain and single and sorted(where) == list(range(len(out)))):
            raise ValueError(f"not a uvu tensor product with one output per path: {original}")
        self._inputs = [(part, mul, ir.dim) for part, (mul, ir) in zip(features.slices(), features, strict=True)]
        self._order = torch.tensor(where).argsort().tolist()  # output parts stand in the order of their irreps
        self._channels = [instruction.path_shape[0] for instruction in original.instructions]
        self._groups: list[list[tuple[int, int]]] = []  # of each l1: (path, 2 l3 + 1)
        for k, (_, ir) in enumerate(features):
            paths = [(n, i) for n, i in enumerate(original.instructions) if i.i_in1 == k]
            sizes = [out[i.i_out].ir.dim for _, i in paths]
            coupling = torch.zeros(harmonics.dim, ir.dim, sum(sizes), dtype=torch.float64)
            for (_, i), part in zip(paths, coupling.split(sizes, dim=2), strict=True):
                l2, l3 = harmonics[i.i_in2].ir.l, out[i.i_out].ir.l
                part[harmonics.slices()[i.i_in2]] = o3.wigner_3j(ir.l, l2, l3).permute(1, 0, 2) * i.path_weight
            self.register_buffer(f"_coupling{k}", coupling.flatten(1))
            self._groups.append([(n, size) for (n, _), size in zip(paths, sizes, strict=True)])

    def forward(self, features: torch.Tensor, harmonics: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """See the class."""
        of_path = weights.split(self._channels, dim=1)
        parts = [features] * len(of_path)
        for k, ((part, multiplicity, dimension), paths) in enumerate(zip(self._inputs, self._groups, strict=True)):
            matrix = (harmonics @ getattr(self, f"_coupling{k}")).unflatten(1, (dimension, -1))
            of_edge = features[:, part].unflatten(1, (multiplicity, dimension))
            # One multiplication; bmm would be slower for an inner dimension of one.
            coupled = of_edge * matrix if dimension == 1 else torch.bmm(of_edge, matrix)
            for (path, _), piece in zip(paths, coupled.split([size for _, size in paths], dim=2), strict=True):
                parts[path] = (piece * of_path[path].unsqueeze(-1)).flatten(1)
        return torch.cat([parts[path] for path in self._order], dim=1)
