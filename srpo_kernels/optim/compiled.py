"""The step of parameters that are stored alike, in one call of the extension or of Triton: the bits of `reference`."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from srpo_kernels import extension
from srpo_kernels.ops._register import interpreting
from srpo_kernels.optim.sharding import local, local_rows, matrix
from srpo_kernels.optim.storage import Storage

if TYPE_CHECKING:
    from srpo_kernels.optim.norm import GradientNorm

__all__ = ["advance_alike", "available", "operators", "takes", "triton_takes"]

_HAS_TRITON = find_spec("triton") is not None


def available(device: torch.device) -> bool:
    """Whether `operators` on lists of tensors exist for `device`."""
    return extension.available(device) or triton_takes(device)


def operators(device: torch.device) -> Any:
    """What has `adamw_step`, `adamw_scalars` and `sums_of_squares`: the extension or, on GPUs without it, Triton.

    With TRITON_INTERPRET=1 CPU tensors take Triton's, as they do in every operator.
    """
    if triton_takes(device):
        return importlib.import_module("srpo_kernels._triton.adamw")
    return torch.ops.srpo


def triton_takes(device: torch.device) -> bool:
    """Whether Triton does what the extension would."""
    wanted = interpreting() if device.type == "cpu" else device.type == "cuda" and not extension.available(device)
    return wanted and _HAS_TRITON


def takes(storage: Storage) -> bool:
    """Whether the operators are there for the device, and the parameter laid out as they want."""
    parameter = local(storage.parameter)
    return available(parameter.device) and parameter.is_contiguous()


def advance_alike(
    group: dict[str, Any],
    members: list[tuple[Storage, Tensor]],
    steps: Tensor,
    norm: GradientNorm,
    coefficient: Tensor,
    scalars: Tensor | None = None,
) -> Tensor:
    """Step `members`, with their gradients, whose numbers of the coming step are `steps`; returns telemetry's sums.

    With `scalars`, from `beginning.begin`, steps are counted already.
    """
    storages = [storage for storage, _ in members]

    def stored(name: str) -> list[Tensor]:
        return [local(storage.state[name]) for storage in storages if name in storage.state]

    ops, counted = operators(steps.device), scalars is not None
    if scalars is None:
        scalars = _scalars(ops, group, steps)
    weights = [local(storage.parameter).detach() for storage in storages]
    changing = {
        name: stored(name)
        for name in ("remainder", "exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale", "ema")
    }
    starts = []
    for storage, weight in zip(storages, weights, strict=True):
        row = local_rows(storage.parameter)[0]
        starts.append(storage.offset + (row and row * matrix(weight).shape[1]))
    sums = ops.adamw_step(
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
    if not counted:
        torch._foreach_add_([storage.state["step"] for storage in storages], norm.finite.float())
    for changed in [list(map(local, (storage.parameter for storage in storages))), *changing.values()]:
        torch.autograd.graph.increment_version(changed)
    return sums


def _scalars(ops: Any, group: dict[str, Any], steps: Tensor) -> Tensor:
    rate = group["lr"]
    if not isinstance(rate, Tensor):
        rate = torch.full((), rate, dtype=torch.float64, device=steps.device)  # a fill: no copy from the host
    rate = rate.detach().to(steps.device, torch.float64)
    return ops.adamw_scalars(steps, rate, *group["betas"], group["eps"], group["weight_decay"])
