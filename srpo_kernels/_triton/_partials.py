"""Sums over rows in two stages: every program writes its own fp32 sum, and one pass adds those in their order.

No atomics, so that two runs agree to the bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from srpo_kernels._triton._common import accumulator, device_guard

__all__ = ["rows_per_program", "sum_partials"]

#: Programs of a first stage: two for every SM of a Hopper GPU, whatever runs it, so that sums are the same everywhere.
_PROGRAMS = 264


def rows_per_program(rows: int, groups: int) -> int:
    """Rows that one program of a first stage sums, for `groups` sums of `rows` rows each."""
    return max(1, triton.cdiv(rows * groups, _PROGRAMS))


@triton.jit
def sum_partials_kernel(
    partials_ptr,
    out_ptr,
    count,  # partial sums of a group
    width,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (groups, blocks of columns)."""
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    group = tl.program_id(0).to(tl.int64)
    total = tl.zeros((ROWS, BLOCK), ACC)
    for first in range(0, count, ROWS):
        rows = first + tl.arange(0, ROWS)
        mask = (rows < count)[:, None] & (columns < width)[None, :]
        offsets = (group * count + rows[:, None]) * width + columns[None, :]
        total += tl.load(partials_ptr + offsets, mask=mask, other=0.0)
    tl.store(out_ptr + group * width + columns, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=columns < width)


def sum_partials(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """[G, P, D] partial sums, fp32 (or float64), added over P: [G, D] in `dtype`."""
    groups, count, width = partials.shape
    out = partials.new_empty((groups, width), dtype=dtype)
    if out.numel():
        block = min(64, triton.next_power_of_2(width))
        with device_guard(partials):
            sum_partials_kernel[(groups, triton.cdiv(width, block))](
                partials, out, count, width, ACC=accumulator(partials), ROWS=32, BLOCK=block, num_warps=4
            )
    return out
