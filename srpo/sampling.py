"""Images from noise: Euler integration of the model's velocity along the shifted schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from srpo.latents import shifted_sigmas
from srpo.models import Flux

__all__ = ["rollout", "sample_images", "to_uint8"]


@torch.no_grad()
def rollout(
    flux: Flux,
    noise: Tensor,
    prompts: Sequence[str],
    *,
    size: tuple[int, int],
    steps: int,
    shift: float,
    guidance: float,
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """Clean packed latents [B, S, 4C] from `noise` of that shape, in fp32.

    `on_step` is called before every model call and may raise to abandon the rollout.
    """
    sigmas = shifted_sigmas(steps, shift).tolist()
    velocity = flux.trajectory(sigmas[:-1], flux.encode_prompts(prompts), guidance, size)
    latents = noise
    for step, (sigma, following) in enumerate(pairwise(sigmas)):
        if on_step is not None:
            on_step()
        latents = latents + (following - sigma) * velocity(latents, step)
    return latents


@torch.no_grad()
def sample_images(
    flux: Flux,
    noise: Tensor,
    prompts: Sequence[str],
    *,
    size: tuple[int, int],
    steps: int,
    shift: float,
    guidance: float,
    batch: int = 64,
) -> Tensor:
    """Images [N, 3, H, W] in [0, 1], on the CPU, one per prompt and row of `noise`, made `batch` at a time."""
    images = []
    for start in range(0, len(prompts), batch):
        rows = slice(start, start + batch)
        latents = rollout(flux, noise[rows], prompts[rows], size=size, steps=steps, shift=shift, guidance=guidance)
        images.append(flux.decode_packed(latents, size).cpu())
    return torch.cat(images)


def to_uint8(images: Tensor) -> np.ndarray:
    """Images [N, 3, H, W] in [0, 1] as 8-bit pixels [N, H, W, 3]."""
    return (images.permute(0, 2, 3, 1).float().cpu().numpy() * 255).round().astype(np.uint8)
