"""Triton kernels of `srpo_kernels.ops.gelu`.

``gelu(x) = x (1 + tanh(u)) / 2 = x sigmoid(2u)`` with ``u = sqrt(2/pi) (x + 0.044715 x^3)``: nothing cancels in the
sigmoid, as it does in ``1 + tanh`` for negative x. QuickGELU is the same with ``2u = 1.702 x``.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from srpo_kernels._triton._common import accumulator, device_guard, elementwise
from srpo_kernels._triton._partials import rows_per_program, sum_partials

# 2u = x (_LINEAR + _CUBIC x^2), and the same to base 2
_LINEAR = tl.constexpr(2 * math.sqrt(2 / math.pi))
_CUBIC = tl.constexpr(0.044715 * _LINEAR.value)
_LINEAR_2 = tl.constexpr(_LINEAR.value * math.log2(math.e))
_CUBIC_2 = tl.constexpr(_CUBIC.value * math.log2(math.e))
_SLOPE_CUBIC = tl.constexpr(3 * _CUBIC.value)
_QUICK = tl.constexpr(1.702)
_QUICK_2 = tl.constexpr(_QUICK.value * math.log2(math.e))


@triton.jit
def _sigmoid(x, QUICK: tl.constexpr):
    """sigmoid(2u), and its product with sigmoid(-2u). The power never overflows, and small results lose no digits."""
    exponent = x * (_QUICK_2 if QUICK else _LINEAR_2 + _CUBIC_2 * (x * x))
    power = tl.exp2(-tl.abs(exponent))
    larger = 1 / (1 + power)
    smaller = power * larger
    return tl.where(exponent < 0, smaller, larger), larger * smaller


@triton.jit
def gelu_kernel(
    attn_ptr,
    x_ptr,
    bias_ptr,  # or None
    out_ptr,
    attn_width,  # 0: there is none
    width,
    attn_stride,
    x_stride,
    QUICK: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows of [attn, gelu(x + bias)]; no block lies across the two. Grid: (rows * blocks of a row,)."""
    attn_blocks = tl.cdiv(attn_width, BLOCK)
    blocks = attn_blocks + tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    columns = tl.arange(0, BLOCK)
    out_ptr += row * (attn_width + width)
    if block < attn_blocks:
        start = block.to(tl.int64) * BLOCK
        mask = columns < attn_width - start
        attn = tl.load(attn_ptr + row * attn_stride + start + columns, mask=mask)
        tl.store(out_ptr + start + columns, attn, mask=mask)
    else:
        start = (block - attn_blocks).to(tl.int64) * BLOCK
        mask = columns < width - start
        x = tl.load(x_ptr + row * x_stride + start + columns, mask=mask, other=0.0).to(ACC)
        if bias_ptr is not None:
            x += tl.load(bias_ptr + start + columns, mask=mask, other=0.0).to(ACC)
        out = x * _sigmoid(x, QUICK)[0]
        tl.store(out_ptr + attn_width + start + columns, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gelu_backward_kernel(
    gradient_ptr,
    x_ptr,
    bias_ptr,  # or None
    dx_ptr,  # or None
    partials_ptr,  # sums of the gradient over the program's rows, or None
    rows,
    rows_each,
    width,
    gradient_stride,
    x_stride,
    QUICK: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of columns of `rows_each` rows, in order. Grid: (groups of rows * blocks of a row,)."""
    blocks = tl.cdiv(width, BLOCK)
    group = tl.program_id(0) // blocks
    start = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    columns = tl.arange(0, BLOCK)
    mask = columns < width - start
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + start + columns, mask=mask, other=0.0).to(ACC)
    total = tl.zeros((BLOCK,), ACC)
    for index in range(group * rows_each, tl.minimum((group + 1) * rows_each, rows)):
        row = tl.cast(index, tl.int64)
        gradient = tl.load(gradient_ptr + row * gradient_stride + start + columns, mask=mask, other=0.0).to(ACC)
        x = tl.load(x_ptr + row * x_stride + start + columns, mask=mask, other=0.0).to(ACC)
        if bias_ptr is not None:
            x += bias
        gate, slope = _sigmoid(x, QUICK)
        dx = gradient * (gate + x * slope * (_QUICK if QUICK else _LINEAR + _SLOPE_CUBIC * (x * x)))
        if dx_ptr is not None:
            tl.store(dx_ptr + row * width + start + columns, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        total += dx
    if partials_ptr is not None:
        tl.store(partials_ptr + group.to(tl.int64) * width + start + columns, total, mask=mask)


def forward(x: Tensor, bias: Tensor | None, *, quick: bool = False) -> Tensor:
    out = x.new_empty(x.shape)
    if bias is None and x.is_contiguous():
        x = x.view(1, -1)  # one row, however narrow the rows are
    return _forward(x[:, :0], x, bias, out, quick)


def quick_forward(x: Tensor) -> Tensor:
    return forward(x, None, quick=True)


def concat_forward(attn: Tensor, mlp: Tensor) -> Tensor:
    return _forward(attn, mlp, None, attn.new_empty(attn.shape[0], attn.shape[1] + mlp.shape[1]), False)


def backward(gradient: Tensor, x: Tensor, bias: Tensor | None, *, quick: bool = False) -> Tensor:
    dx = x.new_empty(x.shape)
    if bias is None and x.is_contiguous() and gradient.is_contiguous():
        gradient, x = gradient.view(1, -1), x.view(1, -1)
    _backward(gradient, x, bias, dx, None, 1, *elementwise(x.shape[1], x), quick)
    return dx


def quick_backward(gradient: Tensor, x: Tensor) -> Tensor:
    return backward(gradient, x, None, quick=True)


def bias_backward(gradient: Tensor, x: Tensor, bias: Tensor, wants_x: bool) -> tuple[Tensor, Tensor]:
    rows, width = x.shape
    dx = x.new_empty(rows if wants_x else 0, width)
    block, warps = _part_of_row(width, x.element_size())
    each = rows_per_program(rows, triton.cdiv(width, block))
    dtype = torch.promote_types(x.dtype, torch.float32)
    partials = x.new_empty(1, triton.cdiv(rows, each), width, dtype=dtype)
    _backward(gradient, x, bias, dx if wants_x else None, partials, each, block, warps, False)
    return dx, sum_partials(partials, bias.dtype)[0]


def _forward(attn: Tensor, x: Tensor, bias: Tensor | None, out: Tensor, quick: bool) -> Tensor:
    if out.numel():
        block, warps = elementwise(max(attn.shape[1], x.shape[1]), x)
        blocks = triton.cdiv(attn.shape[1], block) + triton.cdiv(x.shape[1], block)
        with device_guard(x):
            gelu_kernel[(x.shape[0] * blocks,)](
                attn,
                x,
                bias,
                out,
                attn.shape[1],
                x.shape[1],
                attn.stride(0),
                x.stride(0),
                QUICK=quick,
                ACC=accumulator(x),
                BLOCK=block,
                num_warps=warps,
            )
    return out


def _backward(
    gradient: Tensor,
    x: Tensor,
    bias: Tensor | None,
    dx: Tensor | None,
    partials: Tensor | None,
    rows_each: int,
    block: int,
    warps: int,
    quick: bool,
) -> None:
    rows, width = x.shape
    if x.numel():
        with device_guard(x):
            gelu_backward_kernel[(triton.cdiv(rows, rows_each) * triton.cdiv(width, block),)](
                gradient,
                x,
                bias,
                dx,
                partials,
                rows,
                rows_each,
                width,
                gradient.stride(0),
                x.stride(0),
                QUICK=quick,
                ACC=accumulator(x),
                BLOCK=block,
                num_warps=warps,
            )


def _part_of_row(width: int, size: int) -> tuple[int, int]:
    """Block and warps of programs that sum: 16 bytes a thread, and wide, for every program writes its sums."""
    block = max(min(triton.next_power_of_2(width), 16 * 32 * 16 // size), 32)
    return block, max(block * size // (32 * 16), 1)
