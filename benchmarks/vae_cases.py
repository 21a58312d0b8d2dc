"""Norms of the FLUX VAE decoder, whose weights are frozen and whose images have their channels last."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import group_norm, silu

import srpo_kernels as sk
from benchmarks.case import Case

__all__ = ["norm_case"]

_GROUPS, _EPS = 32, 1e-6


def norm_case(batch: int, channels: int, side: int, device: str) -> Case:
    weight = 1 + torch.randn(channels, device=device, dtype=torch.bfloat16) / 8
    bias = torch.randn(channels, device=device, dtype=torch.bfloat16) / 8

    def make() -> dict[str, Tensor]:
        x = torch.randn(batch, channels, side, side, device=device, dtype=torch.bfloat16)
        return {"x": x.contiguous(memory_format=torch.channels_last)}

    image = batch * channels * side * side
    return Case(
        "group_norm_silu",
        f"{batch} x {channels} x {side} x {side}, channels last",
        make,
        lambda x: sk.group_norm_silu(x, weight, bias, _GROUPS, _EPS),
        lambda x: silu(group_norm(x, _GROUPS, weight.to(x.dtype), bias.to(x.dtype), _EPS)),
        ("x",),
        3 * image,
        5 * image,
    )
