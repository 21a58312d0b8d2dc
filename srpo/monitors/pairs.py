"""What takes more than one image, or the model itself: diversity and drift."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

__all__ = ["diversity", "diversity_pixels", "drift"]


def diversity(features: Tensor) -> Tensor:
    """Mean of ``1 - cos`` over all pairs of N >= 2 embeddings [N, D] of images of one prompt; a scalar."""
    unit = normalize(features.double(), dim=-1)
    count = len(unit)
    return 1 - ((unit @ unit.T).sum() - count) / (count * (count - 1))


def diversity_pixels(images: Tensor) -> Tensor:
    """Mean over all pairs of N >= 2 images [N, 3, H, W] in [0, 1] of one prompt of their root mean squared difference,
    in 8-bit levels; a scalar."""
    pixels = images.double().flatten(1) * 255
    return torch.pdist(pixels).mean() / pixels.shape[1] ** 0.5


def drift(velocity: Tensor, start: Tensor, sigmas: Sequence[float]) -> dict[str, float]:
    """``||v - v_0|| / ||v_0||`` of velocities [K, ...] at K noise levels, by ``drift@sigma``; v_0 is step 0's."""
    now, then = velocity.double().flatten(1), start.double().flatten(1)
    values = (now - then).norm(dim=1) / then.norm(dim=1)
    return {f"drift@{sigma:g}": value for sigma, value in zip(sigmas, values.tolist(), strict=True)}
