"""The optimizer's Triton kernels, which take no tensors but a table of where these are: the kinds that FLUX has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from benchmarks.static.kernels import kernel_figures
from benchmarks.static.unit import Unit, triton_tools
from srpo_kernels._triton import adamw
from srpo_kernels.testing.specialization import Specialization, specialize

__all__ = ["optimizer_units"]

#: Of weights and moments: the default, the smallest, and what `torch.optim` keeps.
_MODES = (("split32", "M4"), ("split24", "M2"), ("fp32", "fp32"))


def optimizer_units(architectures: Iterable[int]) -> Iterator[Unit]:
    codes = dict(_codes())
    for architecture in architectures:
        for name, code in codes.items():
            measure = partial(kernel_figures, code, architecture)
            yield Unit(f"optimizer {name}", f"sm{architecture}", triton_tools(architecture), measure)


def _codes() -> Iterator[tuple[str, Specialization]]:
    """Wide are matrices, whose gradients are bf16, or fp32 when several passes add up; narrow are vectors."""

    def made(dtype: torch.dtype) -> Tensor:
        return torch.empty(64, dtype=dtype, device="meta")

    words, numbers = made(torch.int64), made(torch.float32)
    one: dict[str, Any] = dict(table_ptr=words, sums_ptr=words)
    step = dict(one, scalars_ptr=numbers, steps_ptr=words, coefficient_ptr=numbers, finite_ptr=made(torch.bool))
    step |= dict(seed=2**40 + 7, average_rate=0.01, AVERAGES=False, CONVERTS=True)
    kinds = {"bf16": tl.int16, "fp32": tl.float32}
    for weights, moments in _MODES:
        kind = "fp32" if weights == "fp32" else "bf16"
        for wide in (True, False):
            modes = dict(WEIGHTS=weights.upper(), MOMENTS=moments.upper(), KIND=kinds[kind], WIDE=wide)
            name = f"step_kernel[{weights}, {moments}, {kind} gradients, {'wide' if wide else 'narrow'}]"
            yield name, specialize(adamw.step_kernel, (), step | modes | adamw.OPTIONS[wide])
    for kind in kinds:
        modes = dict(KIND=kinds[kind], WIDE=True)
        yield f"squares_kernel[{kind}, wide]", specialize(adamw.squares_kernel, (), one | modes | adamw.SQUARES_OPTIONS)
