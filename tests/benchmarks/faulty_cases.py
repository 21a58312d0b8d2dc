"""An operator of one Triton kernel, sound or with a fault that makes it slower and changes no result."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.case import Case

ELEMENTS = 2**20


@triton.jit(do_not_specialize=["zero"])
def doubled_kernel(x_ptr, y_ptr, out_ptr, count, zero, SHIFT: tl.constexpr, LOOSE: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK) + SHIFT
    x = tl.load(x_ptr + at, mask=at < count, other=0.0)
    y = tl.load(y_ptr + (at + zero if LOOSE else at), mask=at < count, other=0.0)
    tl.store(out_ptr + at, x + y, mask=at < count)


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fault: str) -> Tensor:
        if fault == "extra saved tensor":
            ctx.save_for_backward(x, x.clone())
        ctx.fault = fault
        return _launch(x, fault)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _launch(gradient, ctx.fault), None


def _launch(x: Tensor, fault: str) -> Tensor:
    out = torch.zeros_like(x) if fault == "extra launch" else torch.empty_like(x)
    blocks = {"spill": dict(BLOCK=16384, num_warps=1, maxnreg=32)}
    options = blocks.get(fault, dict(BLOCK=1024, num_warps=4))
    grid = (triton.cdiv(x.numel(), options["BLOCK"]),)
    for _ in range(2 if fault == "extra pass" else 1):
        faults = dict(SHIFT=int(fault == "narrow access"), LOOSE=fault == "one narrow load")
        doubled_kernel[grid](x, x, out, x.numel(), 0, **faults, **options)
    return out


def case(device: str, fault: str) -> Case:
    return Case(
        "doubled",
        str(ELEMENTS),
        lambda: {"x": torch.randn(ELEMENTS, device=device, dtype=torch.bfloat16)},
        lambda x: _Doubled.apply(x, fault),
        lambda x: 2 * x,
        ("x",),
        2 * ELEMENTS,
        2 * ELEMENTS,
    )


def cases(device: str) -> Iterator[Case]:
    yield case(device, "none")
