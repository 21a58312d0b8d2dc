"""The gradient norm: exact, the same bits for any sharding, and no wait for the device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from srpo_kernels.optim.compiled import available, operators
from srpo_kernels.optim.reference import BINS, sums_of_squares, total
from srpo_kernels.optim.sharding import add_up, check_placements, local, matrix, shard_groups

__all__ = ["GradientNorm", "clip_grad_norm_", "finite_norm", "gradient_norm", "local_sums", "norm_of"]


@dataclass(frozen=True)
class GradientNorm:
    """Tensors without dimensions, on the device."""

    norm: Tensor  # double; NaN when it is not finite
    finite: Tensor  # bool
    nonfinite: Tensor  # int64: how many elements are not finite

    def coefficient(self, max_norm: float) -> Tensor:
        """What clipping multiplies gradients by (fp32): ``min(1, max_norm / (norm + 1e-6))``, as in torch."""
        return (max_norm / (self.norm + 1e-6)).clamp(max=1.0).float()


def gradient_norm(gradients: list[Tensor]) -> GradientNorm:
    """Norm of all `gradients`, plain or DTensor, together; a collective operation for those that are sharded."""
    return norm_of(add_up(local_sums(gradients)))


def local_sums(gradients: list[Tensor]) -> list[tuple[tuple[Any, ...], Tensor]]:
    """What a norm adds up, of this process alone: int64 [34] for every set of process groups that share gradients.

    32 bins of squares, chunks whose sum is not finite, elements that are not.
    """
    alike: dict[Any, list[Tensor]] = {}
    for gradient in gradients:
        alike.setdefault((shard_groups(gradient), gradient.device), []).append(local(gradient))
    parts = []
    for (groups, device), members in alike.items():
        if available(device):
            added = operators(device).sums_of_squares([member.contiguous() for member in members])
        else:
            added = torch.stack([_sums(matrix(member)) for member in members]).sum(0)
        parts.append((groups, added))
    return parts


def norm_of(sums: Tensor) -> GradientNorm:
    """The norm from what `local_sums` are in all processes together."""
    finite = sums[BINS] == 0
    return GradientNorm(torch.where(finite, finite_norm(sums), torch.nan), finite, sums[BINS + 1])


def finite_norm(sums: Tensor) -> Tensor:
    """The norm of what is finite, in double."""
    return torch.sqrt(total(sums[:BINS]))


def _sums(rows: Tensor) -> Tensor:
    bins, lost = sums_of_squares(rows)
    return torch.cat([bins, torch.stack([lost, (~rows.isfinite()).sum()])])


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,  # noqa: ARG001 - torch's signature
) -> Tensor:
    """Scale gradients in place to a norm of at most `max_norm`: `torch.nn.utils.clip_grad_norm_` with exact sums.

    The norm of DTensor gradients is that of the whole tensors, whatever their sharding, with the same bits for all.
    `AdamW(max_grad_norm=...)` does this without passes of its own.

    Args:
        parameters: a tensor or tensors, those without `.grad` being left out.
        norm_type: 2 only. error_if_nonfinite: raise instead of scaling by NaN; waits for the device.
        foreach: without effect.

    Returns:
        The norm before clipping, an fp32 tensor without dimensions (never a DTensor); NaN when it is not finite.

    Raises:
        ValueError: another `norm_type`, or a gradient sharded other than by rows.
        RuntimeError: `error_if_nonfinite`, and the norm is not finite.
    """
    if float(norm_type) != 2.0:
        raise ValueError(f"clip_grad_norm_: norm_type must be 2, got {norm_type}")
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for index, gradient in enumerate(gradients):
        check_placements(f"clip_grad_norm_: gradient {index}", gradient)
    if not gradients:
        return torch.tensor(0.0)
    found = gradient_norm(gradients)
    if error_if_nonfinite and not found.finite:
        raise RuntimeError("clip_grad_norm_: the gradient norm is not finite, so gradients cannot be clipped")
    coefficient = found.coefficient(max_norm)
    for gradient in gradients:
        local(gradient).mul_(coefficient.to(gradient.device))
    return found.norm.float()
