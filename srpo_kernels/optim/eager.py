"""The step of parameters that are stored alike in plain PyTorch, for devices and layouts that have nothing better."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from srpo_kernels.optim import reference
from srpo_kernels.optim.norm import GradientNorm
from srpo_kernels.optim.reference import scalars, sums_of_squares
from srpo_kernels.optim.sharding import local, matrix
from srpo_kernels.optim.storage import Storage

__all__ = ["advance"]


def advance(
    group: dict[str, Any],
    members: list[tuple[Storage, Tensor]],
    steps: Tensor,
    norm: GradientNorm,
    coefficient: Tensor,
) -> Tensor:
    """As `srpo_kernels.optim.compiled.advance_alike`."""
    numbers = scalars(steps, group["lr"], group["betas"], group["eps"], group["weight_decay"])
    sums = []
    for (storage, gradient), step, number in zip(members, steps.unbind(), numbers, strict=True):
        weight, first, second, update = reference.advance(
            matrix(local(gradient)), coefficient, storage.weight(), storage.first(), storage.second(), number
        )
        sums.append(_write(storage, group, step, norm.finite, weight, (first, second), update))
    return torch.stack(sums).sum(0)


def _write(
    storage: Storage,
    group: dict[str, Any],
    step: Tensor,
    finite: Tensor,
    weight: Tensor,
    moments: tuple[Tensor, Tensor],
    update: Tensor,
) -> Tensor:
    """Store the results of step number `step` if it is `finite`; returns the telemetry's sums of this parameter."""
    parameter = local(storage.parameter)
    if "ema" in storage.state:
        average = matrix(local(storage.state["ema"]))
        moved = average + (weight - average) * torch.full((), 1 - group["ema_decay"], device=average.device)
        storage.store({"ema": moved}, finite & (step % group["ema_every"] == 0))
    values = storage.encode(step, weight=weight, moments=moments)
    changed = torch.zeros((), dtype=torch.int64, device=parameter.device)
    if parameter.dtype == torch.bfloat16:
        changed = (values["weight"].view(torch.int16) != matrix(parameter).view(torch.int16)).sum()
    storage.store(values, finite)
    storage.state["step"].add_(finite)
    squares = [sums_of_squares(x)[0] for x in (torch.where(finite, update, 0.0), storage.weight())]
    return torch.cat([*squares, torch.where(finite, changed, 0)[None]])
