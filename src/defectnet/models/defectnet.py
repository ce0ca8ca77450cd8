"""The published network (arXiv:2506.00725 and its public notebooks), kept as the faithful baseline.

Two known flaws are kept on purpose: the 100 tokens carry no position, so attention cannot tell at which energy a
feature lies (only the zero padding of the convolutions leaks some of it); and the output is one vector over
elements, computed without looking at the properties of the element that is asked about.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from defectnet.dataset.samples import Samples
from defectnet.elements import MAX_Z

TARGET_SCALE = 10.0
"""The network is trained on 10 × concentration, so that targets are of order one."""


class DefectNet(nn.Module):
    """Pristine DOS, doped DOS, host composition and candidate list to concentrations.

    ``bins`` is the length of the spectra, at least 56 because the composition is a channel of the same length;
    100 as published, which gives 238,456 parameters. The number of parameters does not depend on ``bins``.
    ``elements`` is the width of candidates and answers, 57 where vacancies are among them.
    """

    def __init__(self, bins: int = 100, elements: int = MAX_Z, width: int = 128, heads: int = 8) -> None:
        super().__init__()
        if bins < elements:
            raise ValueError(f"the composition channel needs at least {elements} bins, not {bins}")
        self.config = {"bins": bins, "elements": elements, "width": width, "heads": heads}
        self.encoder = nn.Sequential(
            nn.Conv1d(3, 32, kernel_size=5, padding="same"), nn.ReLU(),
            nn.Conv1d(32, 64, kernel_size=5, padding="same"), nn.ReLU(),
            nn.Conv1d(64, width, kernel_size=5, padding="same"), nn.ReLU(),
        )  # fmt: skip
        self.query = nn.Linear(elements, width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.head = nn.Sequential(
            nn.Linear(width, 256), nn.ReLU(),
            nn.Linear(256, 256), nn.ReLU(),
            nn.Linear(256, elements),
        )  # fmt: skip

    def forward(self, pristine: Tensor, doped: Tensor, composition: Tensor, mask: Tensor) -> Tensor:
        """10 × concentration [n, elements], exactly zero outside the mask.

        Shapes: ``pristine`` and ``doped`` [n, B] intensities, ``composition`` [n, 56], ``mask`` [n, elements] bool.
        """
        mask = mask.to(pristine.dtype)
        padded = nn.functional.pad(composition, (0, pristine.shape[1] - composition.shape[1]))  # [n, B], index Z - 1
        channels = torch.stack([pristine, doped, padded], dim=1)  # [n, 3, B]
        tokens = self.encoder(channels).transpose(1, 2)  # [n, B, 128]
        query = self.query(mask).unsqueeze(1)  # [n, 1, 128]
        attended, _ = self.attention(query, tokens, tokens, need_weights=False)  # [n, 1, 128]
        return self.head(attended.squeeze(1)) * mask  # [n, 56]

    @torch.no_grad()
    def predict(self, samples: Samples, batch_size: int = 512) -> np.ndarray:
        """Concentrations [n, 56] as fractions with ``samples.candidates`` as mask.

        They come from an unconstrained regression: read small negative values as zero.
        """
        device = next(self.parameters()).device
        parts = [np.empty((0, samples.candidates.shape[1]), dtype=np.float32)]
        for start in range(0, len(samples), batch_size):
            part = samples[np.arange(start, min(start + batch_size, len(samples)))]
            arrays = (part.pristine, part.doped, part.composition, part.candidates)
            output = self(*(torch.from_numpy(array).to(device) for array in arrays))
            parts.append((output / TARGET_SCALE).cpu().numpy())
        return np.concatenate(parts)


def masked_mse(output: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over the entries of the mask, in units of (10 × concentration)².

    Shapes: ``output`` [n, 56] in units of 10 × concentration, ``targets`` [n, 56] fractions, ``mask`` [n, 56] bool.
    """
    mask = mask.to(output.dtype)
    return ((output - TARGET_SCALE * targets).square() * mask).sum() / mask.sum().clamp(min=1)


def count_parameters(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
