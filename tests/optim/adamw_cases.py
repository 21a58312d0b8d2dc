"""Optimizers to test, their steps, and comparison of everything they hold."""

from __future__ import annotations

import torch
from torch import Tensor

from srpo_kernels.optim import AdamW

LR = 5e-6
MODES = [("fp32", "fp32"), ("split32", "M4"), ("split24", "M2"), ("bf16_sr", "M3")]


def parameters(weights: str, *shapes: tuple[int, ...], seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float32 if weights == "fp32" else torch.bfloat16
    return [torch.nn.Parameter((0.02 * torch.randn(shape, generator=generator)).to(dtype)) for shape in shapes]


def take_steps(optimizer: AdamW, count: int = 3, *, first: int = 0, rms: float = 1e-3) -> None:
    """Steps on gradients that depend on the number of the step only."""
    for number in range(first, first + count):
        generator = torch.Generator().manual_seed(100 + number)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                gradient = rms * torch.randn(parameter.shape, generator=generator)
                parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()


def everything(optimizer: AdamW) -> list[Tensor]:
    """Parameters and states, as copies."""
    found = [parameter.detach().clone() for group in optimizer.param_groups for parameter in group["params"]]
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            found += [value.clone() for _, value in sorted(optimizer.state.get(parameter, {}).items())]
    return found


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    """Bit by bit, NaNs and the signs of zeros included."""
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))
