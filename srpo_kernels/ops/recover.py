"""Closed-form recovery of Direct-Align (SRPO, arXiv 2509.06942).

From ``x_t = (1 - s_from) x0 + s_from e`` and a predicted velocity v, one Euler step leads to s_to,
and the known noise left there is removed:

    x0_hat = (x_t + (s_to - s_from) v - s_to e) / (1 - s_to)
"""

from __future__ import annotations

import torch
from torch import Tensor

from srpo_kernels.latents import unpack as unpack_tokens
from srpo_kernels.ops._checks import branch_sigma, check_floating, per_row, resolve_noise
from srpo_kernels.ops.noise_prior import NoisePrior

__all__ = ["recover"]


def recover(
    x_t: Tensor,
    noise: Tensor | NoisePrior,
    velocity: Tensor,
    sigma_from: float | Tensor,
    sigma_to: float | Tensor,
    *,
    unpack: tuple[int, int] | None = None,
    scaling_factor: float = 1.0,
    shift_factor: float = 0.0,
) -> Tensor:
    """Clean images recovered from noisy ones and the model's velocity.

    Args:
        x_t: noisy latents [K*B, ...], as `inject_noise` returns them.
        noise: the injected noise: [B, ...], [1, ...], or the `NoisePrior` it was drawn from.
        velocity: the model's prediction, shape of x_t.
        sigma_from, sigma_to: noise levels before and after the step: a float, [K*B] (one branch per row, B = K*B),
            or [B, K]. sigma_to must be below 1.
        unpack: latent size (h, w): x_t holds packed tokens [K*B, h*w/4, 4C], the result VAE latents [K*B, C, h, w] in
            channels_last.
        scaling_factor, shift_factor: the VAE's latent scale: the result is ``x0_hat / scaling_factor + shift_factor``.

    Returns:
        [K*B, ...] (or [K*B, C, h, w]) in x_t's dtype; computed in fp32 (float64 for float64). Differentiable in
        x_t, noise and velocity; ``d x0_hat / d v = (sigma_to - sigma_from) / (1 - sigma_to)``.

    Raises:
        TypeError: an argument is not floating. ValueError: shapes, devices or noise levels do not fit.
    """
    check_floating("recover", x_t=x_t, velocity=velocity)
    if x_t.ndim < 1:
        raise ValueError("recover: x_t must have a batch dimension")
    if velocity.shape != x_t.shape:
        raise ValueError(f"recover: velocity must have x_t's shape {list(x_t.shape)}, got {list(velocity.shape)}")
    if unpack is not None:
        fits = x_t.ndim == 3 and x_t.shape[1] * 4 == unpack[0] * unpack[1] and x_t.shape[2] % 4 == 0
        if not fits or unpack[0] % 2 or unpack[1] % 2:
            raise ValueError(
                f"recover: unpack={unpack} needs x_t of [B, h*w/4, 4C], h and w even, got {list(x_t.shape)}"
            )
    if not isinstance(sigma_to, Tensor) and sigma_to >= 1.0:
        raise ValueError(f"recover: sigma_to must be below 1 (nothing of the image is left at 1), got {sigma_to}")
    rows = x_t.shape[0]
    start, branches = branch_sigma("recover", "sigma_from", sigma_from, rows)
    end, others = branch_sigma("recover", "sigma_to", sigma_to, rows)
    for name, levels in (("sigma_from", start), ("sigma_to", end)):
        if levels.numel() != rows:
            raise ValueError(f"recover: {name} must be a float, [{rows}] or [B, K] with B*K = {rows} rows of x_t")
    if branches != others and 1 not in (branches, others):
        raise ValueError(f"recover: sigma_to has {others} branches, but sigma_from {branches}")
    batch = rows // max(branches, others)
    noise = resolve_noise("recover", noise, "x_t", x_t, batch)

    accumulate = torch.promote_types(x_t.dtype, torch.float32)
    start, end = per_row(start, x_t, accumulate), per_row(end, x_t, accumulate)
    injected = noise.to(accumulate).expand(batch, *x_t.shape[1:]).repeat(rows // max(batch, 1), *[1] * (x_t.ndim - 1))
    x0_hat = (x_t.to(accumulate) + (end - start) * velocity.to(accumulate) - end * injected) / (1 - end)
    if unpack is not None:
        x0_hat = unpack_tokens(x0_hat, *unpack).contiguous(memory_format=torch.channels_last)
    return (x0_hat / scaling_factor + shift_factor).to(x_t.dtype)
