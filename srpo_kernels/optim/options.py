"""What `AdamW` accepts."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from srpo_kernels.optim.sharding import check_placements
from srpo_kernels.optim.storage import MOMENTS, OFFLOADS, WEIGHTS

__all__ = ["check_gradient", "check_group", "check_options"]

_GRADIENTS = (torch.float32, torch.bfloat16)


def check_options(max_grad_norm: float | None, seed: int, offload: str) -> None:
    """Raise `ValueError` unless the options that hold for all groups are usable."""
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"AdamW: max_grad_norm must be positive or None, got {max_grad_norm}")
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"AdamW: seed must be an integer in [0, 2**63), got {seed!r}")
    if offload not in OFFLOADS:
        raise ValueError(f"AdamW: offload must be one of {', '.join(OFFLOADS)}, got {offload!r}")


def check_group(groups: list[dict[str, Any]], number: int) -> None:
    """Raise `TypeError` or `ValueError` unless the options of group `number` and all its parameters are usable."""
    group, prefix = groups[number], f"AdamW: group {number}:"
    lr, betas, decay, every = group["lr"], group["betas"], group["ema_decay"], group["ema_every"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"{prefix} lr must have one element, got shape {list(lr.shape)}")
    elif not 0 <= lr < math.inf:
        raise ValueError(f"{prefix} lr must be finite and not negative, got {lr}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"{prefix} betas must be two numbers in [0, 1), got {betas}")
    for name in ("eps", "weight_decay"):
        if not 0 <= group[name] < math.inf:
            raise ValueError(f"{prefix} {name} must be finite and not negative, got {group[name]}")
    for name, known in (("weights", WEIGHTS), ("moments", MOMENTS)):
        if group[name] not in known:
            raise ValueError(f"{prefix} {name} must be one of {', '.join(known)}, got {group[name]!r}")
    if decay is not None and not 0 <= decay < 1:
        raise ValueError(f"{prefix} ema_decay must lie in [0, 1) or be None, got {decay}")
    if not isinstance(every, int) or every < 1:
        raise ValueError(f"{prefix} ema_every must be a positive integer, got {every!r}")

    device = next(parameter.device for other in groups for parameter in other["params"])
    dtype = torch.float32 if group["weights"] == "fp32" else torch.bfloat16
    for index, parameter in enumerate(group["params"]):
        where = f"{prefix} parameter {index}"
        if parameter.dtype != dtype:
            raise TypeError(f'{where} is {parameter.dtype}, but weights="{group["weights"]}" needs {dtype}')
        if parameter.device != device:
            raise ValueError(f"{where} is on {parameter.device}, but the first parameter on {device}")
        check_placements(where, parameter)


def check_gradient(parameter: Tensor, number: int, index: int) -> Tensor:
    """Gradient of parameter `index` of group `number`; raises `TypeError` or `ValueError` unless it can be used."""
    gradient = parameter.grad
    assert gradient is not None
    plain = type(gradient) is Tensor and not isinstance(parameter, DTensor)
    if plain and gradient.dtype in _GRADIENTS and gradient.layout == torch.strided:
        return gradient  # nearly always, and there are a thousand
    where = f"AdamW: group {number}: the gradient of parameter {index}"
    if gradient.dtype not in _GRADIENTS:
        raise TypeError(f"{where} is {gradient.dtype}; torch.float32 and torch.bfloat16 are supported")
    if gradient.layout != torch.strided:
        raise TypeError(f"{where} is {gradient.layout}; only dense gradients are supported")
    if isinstance(gradient, DTensor) != isinstance(parameter, DTensor):
        raise ValueError(f"{where} and the parameter must both be DTensors or both not")
    if isinstance(gradient, DTensor) and isinstance(parameter, DTensor) and gradient.placements != parameter.placements:
        raise ValueError(f"{where} has placements {gradient.placements}, its parameter {parameter.placements}")
    return gradient
