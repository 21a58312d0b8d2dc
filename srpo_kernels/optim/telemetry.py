"""What a step tells about itself, without waiting for the device."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from srpo_kernels.optim.norm import GradientNorm
from srpo_kernels.optim.reference import BINS, total
from srpo_kernels.optim.sharding import add_up

__all__ = ["Sums", "telemetry"]

#: Of some parameters: the process groups that share them, and int64 sums [65] of the updates and of the weights in bins
#: [32] each, and of bf16 weights that changed.
Sums = tuple[tuple[dist.ProcessGroup, ...], Tensor]


def telemetry(norm: GradientNorm, sums: list[Sums], parameters: Iterable[Tensor]) -> dict[str, Tensor]:
    """`AdamW.telemetry` of a step of `parameters`; a collective operation for those that are sharded."""
    added = add_up(sums)
    halves = sum(parameter.numel() for parameter in parameters if parameter.dtype == torch.bfloat16)
    squares = total(added[: 2 * BINS].view(2, BINS))
    update, weight = torch.sqrt(squares).float().unbind()
    return {
        "grad_norm": norm.norm.float(),
        "update_norm": update,
        "weight_norm": weight,
        "changed": (added[-1] / max(halves, 1)).float(),
        "nonfinite": norm.nonfinite,
    }
