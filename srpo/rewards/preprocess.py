"""From images to what a vision tower takes, differentiable, with the sizes and crops of the libraries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from srpo_kernels import resize_normalize

__all__ = ["CLIP_MEAN", "CLIP_STD", "clip_normalize", "prepare", "stretch"]

#: OpenAI's statistics, used by most CLIP models and by BLIP.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def prepare(
    images: Tensor,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    squash: bool = False,
    interpolation: str = "bicubic",
) -> Tensor:
    """Images [N, 3, H, W] in [0, 1] to [N, 3, size, size]: antialiased resize of the shorter edge and centre crop as
    torchvision does them, or with `squash` a resize of both edges; then normalised."""
    if squash:
        return stretch(images, (size, size), mean, std, interpolation)
    if interpolation == "bicubic":
        return resize_normalize(images, size, mean, std, value_range=(0, 1))
    short = min(images.shape[-2:])
    height, width = (int(size * edge / short) for edge in images.shape[-2:])
    top, left = (round((edge - size) / 2) for edge in (height, width))
    whole = stretch(images, (height, width), mean, std, interpolation)
    return whole[..., top : top + size, left : left + size]


def stretch(
    images: Tensor,
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str = "bicubic",
) -> Tensor:
    """Images [N, 3, H, W] in [0, 1] to [N, 3, *size]: both edges resized, antialiased; then normalised."""
    wide = images.to(torch.promote_types(images.dtype, torch.float32))
    inside = (wide >= 0) & (wide <= 1)
    wide = wide.where(inside, wide.detach().clamp(0, 1))  # the gradient of resize_normalize: 1 on the bounds
    resized = interpolate(wide, size, mode=interpolation, antialias=True, align_corners=False)
    shift, scale = (torch.tensor(list(values), dtype=wide.dtype, device=wide.device) for values in (mean, std))
    return ((resized - shift[:, None, None]) / scale[:, None, None]).to(images.dtype)


def clip_normalize(images: Tensor, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """`prepare` as transformers' CLIP image processor does it.

    Where the margins of a side differ by a pixel, transformers crops nearer to the top and left, torchvision to where
    the margin is even.
    """
    short = min(images.shape[-2:])
    margins = {dim: int(size * images.shape[dim] / short) - size for dim in (-2, -1)}
    mirrored = [dim for dim, margin in margins.items() if round(margin / 2) != margin // 2]
    return (
        prepare(images.flip(mirrored), size, mean, std).flip(mirrored) if mirrored else prepare(images, size, mean, std)
    )
