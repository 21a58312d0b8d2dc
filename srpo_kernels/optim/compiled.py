"""The step of parameters that are stored alike, in one call of the compiled extension: the bits of `reference`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from srpo_kernels.extension import available
from srpo_kernels.optim.norm import GradientNorm
from srpo_kernels.optim.sharding import local, local_rows, matrix
from srpo_kernels.optim.storage import Storage

__all__ = ["advance_alike", "takes"]


def takes(storage: Storage) -> bool:
    """Whether the extension is there for the device, and the parameter laid out as it wants."""
    parameter = local(storage.parameter)
    return available(parameter.device) and parameter.is_contiguous()


def advance_alike(
    group: dict[str, Any],
    members: list[tuple[Storage, Tensor]],
    steps: Tensor,
    norm: GradientNorm,
    coefficient: Tensor,
) -> Tensor:
    """Step `members`, with their gradients, whose numbers of the coming step are `steps`; returns telemetry's sums."""
    storages = [storage for storage, _ in members]

    def stored(name: str) -> list[Tensor]:
        return [local(storage.state[name]) for storage in storages if name in storage.state]

    rate = group["lr"]
    if not isinstance(rate, Tensor):
        rate = torch.full((), rate, dtype=torch.float64, device=steps.device)  # a fill: no copy from the host
    scalars = torch.ops.srpo.adamw_scalars(
        steps, rate.detach().to(steps.device, torch.float64), *group["betas"], group["eps"], group["weight_decay"]
    )
    weights = [local(storage.parameter).detach() for storage in storages]
    changing = {
        name: stored(name)
        for name in ("remainder", "exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale", "ema")
    }
    starts = [
        storage.offset + local_rows(storage.parameter)[0] * matrix(weight).shape[1]
        for storage, weight in zip(storages, weights, strict=True)
    ]
    sums = torch.ops.srpo.adamw_step(
        weights,
        *changing.values(),
        [local(gradient).contiguous() for _, gradient in members],
        scalars,
        steps,
        coefficient,
        norm.finite,
        starts,
        storages[0].seed,
        group["ema_decay"] or 0.0,
        group["ema_every"],
        storages[0].weights,
        storages[0].moments,
    )
    for storage in storages:
        storage.state["step"].add_(norm.finite)
    for changed in [list(map(local, (storage.parameter for storage in storages))), *changing.values()]:
        torch.autograd.graph.increment_version(changed)
    return sums
