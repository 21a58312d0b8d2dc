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

__all__ = ["advance_alike", "available", "count_steps", "lists_of", "operators", "starts_of", "takes", "triton_takes"]

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


def lists_of(storages: list[Storage]) -> list[list[Tensor]]:
    """What storages that are alike hold here, as operators take it: weights, and a list of every state, or none."""
    names = ("remainder", "exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale", "ema")
    states = [[local(storage.state[name]) for storage in storages if name in storage.state] for name in names]
    return [[local(storage.parameter).detach() for storage in storages], *states]


def starts_of(storages: list[Storage]) -> list[int]:
    """The places of the first elements that are here."""
    starts = []
    for storage in storages:
        row = local_rows(storage.parameter)[0]
        starts.append(storage.offset + (row and row * matrix(local(storage.parameter)).shape[1]))
    return starts


def advance_alike(
    group: dict[str, Any],
    members: list[tuple[Storage, Tensor]],
    steps: Tensor,
    norm: GradientNorm,
    coefficient: Tensor,
) -> Tensor:
    """Step `members`, with their gradients, whose numbers of the coming step are `steps`; returns telemetry's sums."""
    storages = [storage for storage, _ in members]
    ops, changing = operators(steps.device), lists_of(storages)
    sums = ops.adamw_step(
        *changing,
        [local(gradient).contiguous() for _, gradient in members],
        _scalars(ops, group, steps),
        steps,
        coefficient,
        norm.finite,
        starts_of(storages),
        storages[0].seed,
        group["ema_decay"] or 0.0,
        group["ema_every"],
        storages[0].weights,
        storages[0].moments,
    )
    count_steps(storages, norm)
    torch.autograd.graph.increment_version(local(storage.parameter) for storage in storages)
    return sums


def count_steps(storages: list[Storage], norm: GradientNorm) -> None:
    """Count the step that storages took if everything was finite."""
    steps = [local(storage.state["step"]) for storage in storages]
    # By its name: torch._foreach_add_ would take a tensor without dimensions for a number, and wait for the device.
    torch.ops.aten._foreach_add_.Tensor(steps, norm.finite.float())


def _scalars(ops: Any, group: dict[str, Any], steps: Tensor) -> Tensor:
    rate = group["lr"]
    if not isinstance(rate, Tensor):
        rate = torch.full((), rate, dtype=torch.float64, device=steps.device)  # a fill: no copy from the host
    rate = rate.detach().to(steps.device, torch.float64)
    return ops.adamw_scalars(steps, rate, *group["betas"], group["eps"], group["weight_decay"])
