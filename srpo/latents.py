"""Where FLUX's tokens sit in the image, and the noise levels of its sampling schedule."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from srpo_kernels.latents import pack, unpack

__all__ = ["image_ids", "pack", "shifted_sigmas", "unpack"]


def image_ids(height: int, width: int) -> Tensor:
    """Rotary position ids [h*w/4, 3] of the tokens of an h x w latent: (0, row, column), fp32."""
    rows, columns = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float()


def shifted_sigmas(steps: int, shift: float) -> np.ndarray:
    """Noise levels of a schedule, from 1 down to 0: ``shift t / (1 + (shift - 1) t)``, float64 [steps + 1]."""
    t = np.linspace(1.0, 0.0, steps + 1)
    return shift * t / (1 + (shift - 1) * t)
