"""Noise injection of Direct-Align (SRPO, arXiv 2509.06942): ``x_t = (1 - sigma) x0 + sigma noise``."""

from __future__ import annotations

import torch
from torch import Tensor

from srpo_kernels.ops._checks import branch_sigma, check_floating, per_row, resolve_noise
from srpo_kernels.ops.noise_prior import NoisePrior

__all__ = ["inject_noise"]


def inject_noise(x0: Tensor, noise: Tensor | NoisePrior, sigma: float | Tensor) -> Tensor:
    """Noisy images of K noise levels from one clean batch.

    Args:
        x0: clean latents [B, ...], any floating dtype.
        noise: [B, ...] or one image [1, ...] shared by the batch, or a `NoisePrior` drawn for [B, ...].
        sigma: noise level in [0, 1]: a float, [B], or [B, K] for K branches.

    Returns:
        [K*B, ...] in x0's dtype, branch-major; computed in fp32 (float64 for float64 inputs).
        Differentiable in x0 and noise.

    Raises:
        TypeError: x0 or noise is not floating. ValueError: shapes or devices do not fit, or a float sigma is
        outside [0, 1] (values of a sigma tensor are not read, which would synchronise the device).
    """
    check_floating("inject_noise", x0=x0)
    if x0.ndim < 1:
        raise ValueError("inject_noise: x0 must have a batch dimension")
    batch = x0.shape[0]
    rows, branches = branch_sigma("inject_noise", "sigma", sigma, batch)
    if rows.numel() != branches * batch:
        got = f"[{rows.numel() // branches}, {branches}]" if branches > 1 else f"[{rows.numel()}]"
        raise ValueError(f"inject_noise: sigma must be a float, [{batch}] or [{batch}, K], got {got}")
    noise = resolve_noise("inject_noise", noise, "x0", x0, batch)
    accumulate = torch.promote_types(x0.dtype, torch.float32)
    level = per_row(rows, x0, accumulate).unflatten(0, (branches, batch))
    return ((1 - level) * x0.to(accumulate) + level * noise.to(accumulate)).flatten(0, 1).to(x0.dtype)
