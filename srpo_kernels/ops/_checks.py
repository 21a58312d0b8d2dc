"""Argument checks shared by the public operator functions."""

from __future__ import annotations

import torch
from torch import Tensor

from srpo_kernels.ops.noise_prior import NoisePrior


def check_floating(op: str, **tensors: Tensor) -> None:
    """Raise `TypeError` unless every argument is a floating tensor, `ValueError` unless all share one device."""
    (first, reference), *_ = tensors.items()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{op}: {name} must be a floating point tensor, got {got}")
        if tensor.device != reference.device:
            raise ValueError(f"{op}: {first} is on {reference.device} but {name} is on {tensor.device}")


def branch_sigma(op: str, name: str, sigma: float | Tensor, rows: int) -> tuple[Tensor, int]:
    """Noise levels one per row, branch-major, and the number of branches K.

    `sigma` is a float (repeated for `rows` rows), [B] or [B, K].
    """
    if not isinstance(sigma, Tensor):
        if not 0.0 <= sigma <= 1.0:  # false for NaN too
            raise ValueError(f"{op}: {name} must lie in [0, 1], got {sigma}")
        return torch.full((rows,), float(sigma), dtype=torch.float64), 1
    if sigma.ndim not in (1, 2):
        raise ValueError(f"{op}: {name} must be a float, [B] or [B, K], got shape {list(sigma.shape)}")
    return (sigma, 1) if sigma.ndim == 1 else (sigma.T.reshape(-1), sigma.shape[1])


def resolve_noise(op: str, noise: Tensor | NoisePrior, name: str, like: Tensor, batch: int) -> Tensor:
    """Noise [B, ...] or [1, ...] for `batch` images shaped as rows of `like`, drawn if it is a `NoisePrior`."""
    shape = (batch, *like.shape[1:])
    if isinstance(noise, NoisePrior):
        return noise.sample(shape, device=like.device)
    check_floating(op, **{name: like}, noise=noise)
    if noise.shape[1:] != like.shape[1:] or noise.shape[0] not in (1, batch):
        raise ValueError(f"{op}: noise must have shape {list(shape)} (or 1 image), got {list(noise.shape)}")
    return noise


def per_row(values: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` [N] in `dtype` on `like`'s device, shaped to broadcast over the rows of `like` [N, ...]."""
    return values.to(device=like.device, dtype=dtype).reshape(-1, *[1] * (like.ndim - 1))
