"""FLUX's latent layout: 2x2 patches of VAE latents as transformer tokens."""

from __future__ import annotations

from torch import Tensor

__all__ = ["pack", "unpack"]


def pack(latents: Tensor) -> Tensor:
    """VAE latents [B, C, h, w] (h and w even) to transformer tokens [B, h*w/4, 4C]."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // 4, channels * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Transformer tokens [B, h*w/4, 4C] to VAE latents [B, C, h, w]: the inverse of `pack`."""
    batch, _, features = tokens.shape
    patches = tokens.reshape(batch, height // 2, width // 2, features // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, features // 4, height, width)
