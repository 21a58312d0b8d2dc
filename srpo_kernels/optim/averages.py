"""Averaged weights in the place of the exact ones, for sampling and evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from srpo_kernels.optim.sharding import local
from srpo_kernels.optim.work import every_storage

if TYPE_CHECKING:
    from srpo_kernels.optim.adamw import AdamW

__all__ = ["averages_in_place", "check_averages"]


def check_averages(optimizer: AdamW, what: str) -> None:
    """Raise `ValueError` unless every group keeps averages."""
    for number, group in enumerate(optimizer.param_groups):
        if group["ema_decay"] is None:
            raise ValueError(f"AdamW: {what} needs ema_decay, which group {number} does not have")


@contextmanager
def averages_in_place(optimizer: AdamW) -> Iterator[None]:
    """`AdamW.average_parameters`."""
    check_averages(optimizer, "average_parameters")
    with torch.no_grad():
        found = {parameter: storage.state for parameter, storage in every_storage(optimizer) if storage is not None}
        averaged = {parameter: local(state["ema"]) for parameter, state in found.items()}
        # Kept where the averages are: in host memory if that is where there is room.
        kept = {parameter: _copy(local(parameter), average.device) for parameter, average in averaged.items()}
    optimizer._averaged = True
    try:
        _write(averaged)
        yield
    finally:
        _write(kept)
        optimizer._averaged = False


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.detach().to(device, copy=True)


@torch.no_grad()
def _write(values: dict[Tensor, Tensor]) -> None:
    for parameter, value in values.items():
        local(parameter).copy_(value)
