"""Argument checks shared by the public operator functions."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor

from srpo_kernels.ops._register import DTYPES


def check_floating(op: str, **tensors: Tensor) -> None:
    """Raise `TypeError` unless every argument is a tensor of `DTYPES`, `ValueError` unless all share one device."""
    (first, reference), *_ = tensors.items()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES:
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{op}: {name} must be a float32, float16 or bfloat16 tensor, got {got}")
        if tensor.device != reference.device:
            raise ValueError(f"{op}: {first} is on {reference.device} but {name} is on {tensor.device}")


def check_forward_only(op: str, instead: str, *tensors: Any) -> None:
    """Raise `RuntimeError` if anyone wants a gradient of `tensors`, which `instead` would give."""
    if torch.is_grad_enabled() and any(isinstance(each, Tensor) and each.requires_grad for each in tensors):
        raise RuntimeError(f"{op} is forward only: call it under torch.no_grad(), or use {instead}")


def check_row_size(op: str, name: str, tensor: Tensor) -> None:
    """Kernels count rows in 64 bits and elements within a row in 32: refuse rows that do not fit."""
    elements = math.prod(tensor.shape[1:])
    if elements >= 2**31:
        raise ValueError(f"{op}: {name} must have fewer than 2**31 elements an image, got {elements}")


def branch_sigma(op: str, name: str, sigma: float | Tensor, like: Tensor, *, bounded: bool = True) -> Tensor:
    """Noise (or signal) levels as [B, K] on the device of `like` [B, ...], in the dtype it is computed in.

    `sigma` is a float, [B] or [B, K]; a float lies in [0, 1] when `bounded`, else in [0, inf).
    """
    batch, dtype = like.shape[0], torch.promote_types(like.dtype, torch.float32)
    if not isinstance(sigma, Tensor):
        if not 0.0 <= sigma <= (1.0 if bounded else sys.float_info.max):  # false for NaN too
            raise ValueError(f"{op}: {name} must lie in {'[0, 1]' if bounded else '[0, inf)'}, got {sigma}")
        return torch.full((batch, 1), float(sigma), dtype=dtype, device=like.device)
    if sigma.ndim not in (1, 2) or sigma.shape[0] != batch:
        raise ValueError(f"{op}: {name} must be a float, [{batch}] or [{batch}, K], got {list(sigma.shape)}")
    levels = sigma.detach().to(like.device, dtype)
    return (levels if sigma.ndim == 2 else levels[:, None]).contiguous()


def row_sigma(op: str, name: str, sigma: float | Tensor, like: Tensor, *, bounded: bool = True) -> tuple[Tensor, int]:
    """Noise (or signal) levels one per row of `like` [K*B, ...] (branch-major), as [K*B], and the number of branches K.

    `sigma` is a float, [K*B] (K counts as 1), or [B, K].
    """
    rows, dtype = like.shape[0], torch.promote_types(like.dtype, torch.float32)
    if not isinstance(sigma, Tensor):
        return branch_sigma(op, name, sigma, like, bounded=bounded).flatten(), 1
    if sigma.ndim not in (1, 2) or sigma.numel() != rows:
        wanted = f"a float, [{rows}] or [B, K] with B*K = {rows}"
        raise ValueError(f"{op}: {name} must be {wanted}, got {list(sigma.shape)}")
    levels = sigma.detach().to(like.device, dtype)
    return (levels.contiguous(), 1) if sigma.ndim == 1 else (levels.T.reshape(-1), sigma.shape[1])


def resolve_noise(op: str, noise: Tensor, name: str, like: Tensor, batch: int) -> Tensor:
    """`noise`, checked to be [B, ...] or [1, ...] for `batch` images shaped as the rows of `like`."""
    check_floating(op, **{name: like}, noise=noise)
    if noise.shape[1:] != like.shape[1:] or noise.shape[0] not in (1, batch):
        shape = [batch, *like.shape[1:]]
        raise ValueError(f"{op}: noise must have shape {shape} (or 1 image), got {list(noise.shape)}")
    return noise
