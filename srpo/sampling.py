"""Images from noise: integration of the model's velocity along the shifted schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from srpo.latents import shifted_sigmas
from srpo.models import Flux

__all__ = ["Solver", "integrate", "rollout", "sample_images", "to_uint8"]

Solver = Literal["euler", "adams2"]


def integrate(
    velocity: Callable[[Tensor, int], Tensor], start: Tensor, sigmas: Sequence[float], solver: Solver = "euler"
) -> Tensor:
    """The solution of ``dx/dsigma = velocity(x, step)`` at the last of `sigmas`, from `start` at the first.

    "euler" is of first order. "adams2", Adams and Bashforth's two-step method for steps of any length, is of second at
    the same cost: after its first step, which is Euler's, it extrapolates from the last two velocities.
    """
    x, last_velocity, last_step = start, None, 0.0
    for index, (sigma, following) in enumerate(pairwise(sigmas)):
        step, current = following - sigma, velocity(x, index)
        slope = current
        if solver == "adams2" and last_velocity is not None:
            slope = current + (step / last_step / 2) * (current - last_velocity)
        x, last_velocity, last_step = x + step * slope, current, step
    return x


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
    solver: Solver = "euler",
    quantized: bool = False,
    gather: bool = True,
    on_step: Callable[[], None] | None = None,
    until: int | None = None,
) -> Tensor:
    """Clean packed latents [B, S, 4C] from `noise` of that shape, in fp32.

    `quantized`: see `Flux.trajectory`. `gather`: sharded weights are gathered whole once, for all steps, or else block
    by block in each. `on_step` is called before every model call and may raise to abandon it all. `until`: stop before
    this step (0-based), with latents that are still noisy.
    """
    if until == 0:
        return noise
    sigmas = shifted_sigmas(steps, shift).tolist()[: None if until is None else until + 1]
    conditioning = flux.encode_prompts(prompts)
    with flux.whole() if gather else nullcontext():
        velocity = flux.trajectory(sigmas[:-1], conditioning, guidance, size, quantized=quantized)

        def evaluate(latents: Tensor, step: int) -> Tensor:
            if on_step is not None:
                on_step()
            return velocity(latents, step)

        return integrate(evaluate, noise, sigmas, solver)


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
