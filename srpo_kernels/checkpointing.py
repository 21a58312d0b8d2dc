"""Recomputation instead of storage: the image path from the model's velocity to the reward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from srpo_kernels.ops._checks import row_sigma
from srpo_kernels.ops.inject_noise import inject_noise
from srpo_kernels.ops.noise_prior import NoisePrior
from srpo_kernels.ops.recover import recover

__all__ = ["checkpointed_reward"]


def checkpointed_reward(
    x_t: Tensor,
    noise: Tensor | NoisePrior,
    velocity: Tensor,
    sigma_from: float | Tensor,
    sigma_to: float | Tensor,
    *,
    decode: Callable[[Tensor], Tensor],
    score: Callable[[Tensor, slice], Tensor],
    unpack: tuple[int, int] | None = None,
    scaling_factor: float = 1.0,
    shift_factor: float = 0.0,
    chunk: int | None = None,
) -> Tensor:
    """Scores of the recovered images, keeping nothing of the path that leads to them.

    ``recover -> decode -> score`` runs once without storing activations and again in backward. Randomness inside is
    repeated, autocast restored; gradients are those of the plain path.

    Args:
        x_t, noise, velocity, sigma_from, sigma_to, unpack, scaling_factor, shift_factor: as for `recover`; x_t has N
            rows.
        decode: recovered latents of n rows -> images [n, ...].
        score: (images [n, ...], the rows they are) -> scores [n, ...]; resizing, embedding, projection and loss belong
            here.
        chunk: rows decoded and scored at a time, forward and backward: the graph of one chunk is freed before the next
            is built. Default all.

    Returns:
        What `score` returned, for all N rows.

    Raises:
        ValueError: chunk is below 1, or as `recover`.
    """
    rows = x_t.shape[0]
    if chunk is not None and chunk < 1:
        raise ValueError(f"checkpointed_reward: chunk must be at least 1, got {chunk}")
    start, branches = row_sigma("checkpointed_reward", "sigma_from", sigma_from, x_t)
    end, others = row_sigma("checkpointed_reward", "sigma_to", sigma_to, x_t)
    branches = max(branches, others)
    batch = rows // branches

    def region(
        x_t: Tensor, noise: Tensor | NoisePrior, velocity: Tensor, start: Tensor, end: Tensor, at: slice
    ) -> Tensor:
        latents = recover(
            x_t,
            noise,
            velocity,
            start,
            end,
            unpack=unpack,
            scaling_factor=scaling_factor,
            shift_factor=shift_factor,
        )
        return score(decode(latents), at)

    if chunk is None:
        levels = (level.reshape(branches, batch).T for level in (start, end))
        return checkpoint(region, x_t, noise, velocity, *levels, slice(0, rows), use_reentrant=False)
    if isinstance(noise, NoisePrior):
        # It numbers images from the first of the batch, not of a chunk: draw it once, by the kernel that injected it.
        blank = torch.zeros((batch, *x_t.shape[1:]), device=x_t.device)
        noise = inject_noise(blank, noise, 1.0)
    image = torch.arange(rows, device=x_t.device) % (batch if noise.shape[0] > 1 else 1)
    scores = []
    for first in range(0, max(rows, 1), chunk):
        at = slice(first, first + chunk)
        parts = (x_t[at], noise[image[at]], velocity[at], start[at], end[at])
        scores.append(checkpoint(region, *parts, at, use_reentrant=False))
    return torch.cat(scores)
