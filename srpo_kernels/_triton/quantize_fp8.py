"""Triton kernels of `srpo_kernels.ops.quantize_fp8`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from srpo_kernels._triton._common import device_guard
from srpo_kernels.ops._register import interpreting
from srpo_kernels.ops.quantize_fp8 import BLOCK as SIDE
from srpo_kernels.ops.quantize_fp8 import LARGEST, SMALLEST, scale_shape

_LARGEST, _SMALLEST = tl.constexpr(LARGEST), tl.constexpr(SMALLEST)
_INTERPRETING = tl.constexpr(interpreting())


@triton.jit
def magnitudes(x):
    """|x|, and 0 for what is not finite."""
    size = tl.abs(x)
    return tl.where(size < float("inf"), size, 0.0)


@triton.jit
def scale_of(largest):
    """What to multiply by and to store for the largest finite magnitude of a scale's values."""
    largest = tl.maximum(largest, _SMALLEST)
    return tl.div_rn(_LARGEST, largest), tl.div_rn(largest, _LARGEST)


@triton.jit
def to_e4m3(x, inverse):
    """``x * inverse`` to e4m3, nearest even, saturating; NaN stays."""
    x = x * inverse
    x = tl.where(x > _LARGEST, _LARGEST, tl.where(x < -_LARGEST, -_LARGEST, x))
    if _INTERPRETING:  # its cast cuts off instead of rounding, and gives NaN a value
        bits = x.to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
        # Adding 2^14 leaves multiples of 2^-9, the subnormals' step, in the low bits.
        subnormal = (tl.abs(x) + 2.0**14).to(tl.int32, bitcast=True) - (141 << 23)
        code = tl.where(magnitude < 121 << 23, subnormal, tl.where(x == x, normal, 0x7F))
        return (code | ((bits >> 24) & 0x80)).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    return x.to(tl.float8e4nv)


@triton.jit
def quantize_rows_kernel(x_ptr, values_ptr, scale_ptr, width, x_stride, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """Grid: (rows,). A row wider than BLOCK is read twice, the second time from the cache."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    values_ptr += row * width
    columns = tl.arange(0, BLOCK)
    if WHOLE:
        x = tl.load(x_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
        inverse, scale = scale_of(tl.max(magnitudes(x), 0))
        tl.store(values_ptr + columns, to_e4m3(x, inverse), mask=columns < width)
    else:
        largest = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, width, BLOCK):
            x = tl.load(x_ptr + start + columns, mask=columns < width - start, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, magnitudes(x))
        inverse, scale = scale_of(tl.max(largest, 0))
        for start in range(0, width, BLOCK):
            x = tl.load(x_ptr + start + columns, mask=columns < width - start, other=0.0).to(tl.float32)
            tl.store(values_ptr + start + columns, to_e4m3(x, inverse), mask=columns < width - start)
    tl.store(scale_ptr + row, scale)


@triton.jit
def quantize_blocks_kernel(x_ptr, values_ptr, scale_ptr, rows, width, x_stride, SIDE: tl.constexpr):
    """Grid: (blocks down, blocks across)."""
    down = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    across = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    mask = (down < rows)[:, None] & (across < width)[None, :]
    place = down.to(tl.int64)[:, None]
    x = tl.load(x_ptr + place * x_stride + across[None, :], mask=mask, other=0.0).to(tl.float32)
    inverse, scale = scale_of(tl.max(tl.max(magnitudes(x), 1), 0))
    tl.store(values_ptr + place * width + across[None, :], to_e4m3(x, inverse), mask=mask)
    tl.store(scale_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), scale)


@triton.jit
def largest_kernel(x_ptr, largest_ptr, width, x_stride, BLOCK: tl.constexpr):
    """The largest finite magnitude of every row. Grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        x = tl.load(x_ptr + row * x_stride + start + columns, mask=columns < width - start, other=0.0)
        largest = tl.maximum(largest, magnitudes(x.to(tl.float32)))
    tl.store(largest_ptr + row, tl.max(largest, 0))


@triton.jit
def quantize_alike_kernel(x_ptr, largest_ptr, values_ptr, scale_ptr, width, x_stride, BLOCK: tl.constexpr):
    """All rows with one scale. Grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inverse, scale = scale_of(tl.load(largest_ptr))
    for start in range(0, width, BLOCK):
        x = tl.load(x_ptr + row * x_stride + start + columns, mask=columns < width - start, other=0.0)
        tl.store(
            values_ptr + row * width + start + columns, to_e4m3(x.to(tl.float32), inverse), columns < width - start
        )
    if tl.program_id(0) == 0:
        tl.store(scale_ptr, scale)


def quantize(x: Tensor, granularity: str) -> tuple[Tensor, Tensor]:
    rows, width = x.shape
    values = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    scale = x.new_empty(scale_shape(rows, width, granularity), dtype=torch.float32)
    block, warps = row_block(width)
    with device_guard(x):
        if not x.numel():
            scale.fill_(SMALLEST / LARGEST)
        elif granularity == "row":
            quantize_rows_kernel[(rows,)](
                x, values, scale, width, x.stride(0), BLOCK=block, WHOLE=width <= block, num_warps=warps
            )
        elif granularity == "block":
            quantize_blocks_kernel[tuple(scale.shape)](
                x, values, scale, rows, width, x.stride(0), SIDE=SIDE, num_warps=16
            )
        else:
            largest = x.new_empty(rows, dtype=torch.float32)
            largest_kernel[(rows,)](x, largest, width, x.stride(0), BLOCK=block, num_warps=warps)
            largest = largest.amax()
            quantize_alike_kernel[(rows,)](x, largest, values, scale, width, x.stride(0), BLOCK=block, num_warps=warps)
    return values, scale


def row_block(width: int) -> tuple[int, int]:
    """Block and warps: 16 elements a thread, which are one 16-byte store, and at most 4096 at a time."""
    block = min(max(triton.next_power_of_2(width), 32), 4096)
    return block, max(block // 512, 1)
