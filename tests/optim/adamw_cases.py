"""Gradients like SRPO's, AdamW in float64 to judge by, and how other libraries round its moments."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from srpo_kernels.optim import AdamW

LR = 5e-6
MODES = [("fp32", "fp32"), ("split32", "M4"), ("split24", "M2"), ("bf16_sr", "M3")]


def gradients(rms: float, steps: int, *, rows: int = 64, spread: float = 1.0) -> Iterator[Tensor]:
    """fp32 [rows, 512] a step: 0.3 of one direction and noise; scales vary by row (e^.7) and by element (e^spread)."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    scale = torch.exp(0.7 * normal(rows, 1) + spread * normal(rows, 512))
    scale *= rms / scale.square().mean().sqrt()
    direction = normal(rows, 512)
    for _ in range(steps):
        yield (scale * (0.3 * direction + math.sqrt(1 - 0.3**2) * normal(rows, 512))).float()


class Float64:
    """AdamW in float64, its moments rounded by functions if there are any."""

    def __init__(
        self,
        weight: Tensor,
        *,
        lr: float = LR,
        weight_decay: float = 0.0,
        first: Callable[[Tensor], Tensor] = lambda x: x,
        second: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        self.weight, self.lr, self.decay = weight.double(), lr, weight_decay
        self.m = self.v = torch.zeros_like(self.weight)
        self.round_first, self.round_second, self.t = first, second, 0

    def step(self, gradient: Tensor) -> None:
        self.t += 1
        gradient = gradient.double()
        m = 0.9 * self.m + 0.1 * gradient
        v = 0.999 * self.v + 0.001 * gradient.square()
        update = (m / (1 - 0.9**self.t)) / ((v / (1 - 0.999**self.t)).sqrt() + 1e-8)
        self.weight = self.weight * (1 - self.lr * self.decay) - self.lr * update
        self.m, self.v = self.round_first(m), self.round_second(v)


def displacement_error(found: Tensor, wanted: Tensor) -> tuple[float, float]:
    """Relative L2 error, and gain, of a displacement."""
    found, wanted = found.double(), wanted.double()
    gain = (found * wanted).sum() / wanted.square().sum()
    return ((found - wanted).norm() / wanted.norm()).item(), gain.item()


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


# --- other libraries' moments, ported line by line ------------------------------------------------


def _dynamic_map(signed: bool) -> Tensor:
    """bitsandbytes' `create_dynamic_map`, 8 bits."""
    data = [0.0, 1.0]
    for i in range(7):
        borders = torch.linspace(0.1, 1, (2**i if signed else 2 ** (i + 1)) + 1, dtype=torch.float64)
        means = (10.0 ** (i - 6) * (borders[:-1] + borders[1:]) / 2).tolist()
        data += means + ([-mean for mean in means] if signed else [])
    return torch.tensor(sorted(data), dtype=torch.float64)


def _dynamic(signed: bool, smallest_scale: float) -> Callable[[Tensor], Tensor]:
    values = _dynamic_map(signed)
    middles = (values[1:] + values[:-1]) / 2

    def rounded(x: Tensor) -> Tensor:
        blocks = x.view(-1, 256)
        scale = blocks.abs().amax(1, keepdim=True).clamp(min=smallest_scale)
        return (values[torch.bucketize(blocks / scale, middles)] * scale).view_as(x)

    return rounded


def _flash_first(x: Tensor) -> Tensor:
    blocks = x.view(-1, 32)
    scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-12)
    n = blocks / scale
    codes = torch.round(2 * n / (1 + n.abs()) * 127) / 127
    return (codes / (2 - codes.abs()) * scale.half().double()).view_as(x)


def _flash_second(x: Tensor) -> Tensor:
    blocks = x.view(-1, 32).sqrt()
    scale = blocks.amax(1, keepdim=True).clamp(min=1e-12)
    return (torch.round(blocks / scale * 255) / 255 * scale.half().double()).square().view_as(x)


#: How moments are rounded: bitsandbytes and torchao (8 bits), FlashOptim 0.1.4.
PEERS = {
    "bitsandbytes": (_dynamic(True, 1e-38), _dynamic(False, 1e-38)),
    "torchao": (_dynamic(True, 1e-12), _dynamic(False, 1e-12)),
    "FlashOptim": (_flash_first, _flash_second),
}
