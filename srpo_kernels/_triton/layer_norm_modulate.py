"""Triton kernels of `srpo_kernels.ops.layer_norm_modulate`: a row in the registers of one program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from srpo_kernels._triton._common import accumulator, device_guard
from srpo_kernels._triton._partials import rows_per_program, sum_partials


def row_block(width: int) -> tuple[int, int]:
    """Block and warps for a whole row: 8 elements a thread, which is one 16-byte access in half precision."""
    block = triton.next_power_of_2(max(width, 1))
    return block, min(max(block // 256, 1), 32)


def backward_options(width: int, size: int) -> dict[str, int]:
    """Of a launch of backward, for elements of `size` bytes.

    Two blocks of 512 threads and 64 registers fill a multiprocessor; ptxas needs no more, but would take more. Stages:
    two rows to come wait in shared memory, where they fit.
    """
    block, warps = row_block(width)
    return dict(BLOCK=block, STAGES=3 if block * size <= 2**15 else 1, num_warps=warps, maxnreg=64)


@triton.jit
def normalize(x, mask, width, eps, ACC: tl.constexpr):
    """``(x - mean) rstd`` of a row, mean and rstd. Lanes outside the mask must be 0 in x, and are not in the result."""
    mean = tl.sum(x, 0) / width
    centred = x - mean
    variance = tl.sum(tl.where(mask, centred * centred, 0.0), 0) / width
    rstd = 1 / tl.sqrt(variance + tl.cast(eps, ACC))
    return centred * rstd, mean, rstd


@triton.jit
def through_norm(gradient, unit, rstd, width):
    """From the gradient of `unit`, a normalised row, to that of the row. The gradient must be 0 outside the row."""
    return rstd * (gradient - tl.sum(gradient, 0) / width - unit * (tl.sum(gradient * unit, 0) / width))


@triton.jit
def layer_norm_modulate_kernel(
    x_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,
    statistics_ptr,  # every mean, then every 1 / deviation
    tokens,
    width,
    x_image,  # elements from an image to the next; likewise below
    x_token,
    scale_image,
    shift_image,
    eps: tl.float64,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (images * tokens,)."""
    row = tl.program_id(0).to(tl.int64)
    image = (tl.program_id(0) // tokens).to(tl.int64)
    token = (tl.program_id(0) % tokens).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    x = tl.load(x_ptr + image * x_image + token * x_token + columns, mask=mask, other=0.0).to(ACC)
    scale = tl.load(scale_ptr + image * scale_image + columns, mask=mask, other=0.0).to(ACC)
    shift = tl.load(shift_ptr + image * shift_image + columns, mask=mask, other=0.0).to(ACC)
    unit, mean, rstd = normalize(x, mask, width, eps, ACC)
    out = unit * (1 + scale) + shift
    tl.store(out_ptr + row * width + columns, out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(statistics_ptr + row, mean)
    tl.store(statistics_ptr + tl.num_programs(0) + row, rstd)


@triton.jit
def layer_norm_modulate_backward_kernel(
    gradient_ptr,
    x_ptr,
    scale_ptr,
    statistics_ptr,
    dx_ptr,  # None: not wanted
    partials_ptr,  # every program's sum for scale, then for shift, of those that are wanted
    images,
    tokens,
    width,
    rows,  # tokens that a program walks
    gradient_image,
    gradient_token,
    x_image,
    x_token,
    scale_image,
    DSCALE: tl.constexpr,
    DSHIFT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid: (images * programs of an image,)."""
    programs = tl.cdiv(tokens, rows)
    image = (tl.program_id(0) // programs).to(tl.int64)
    first = tl.program_id(0) % programs * rows
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    scale = tl.load(scale_ptr + image * scale_image + columns, mask=mask, other=0.0).to(ACC)
    dscale = tl.zeros((BLOCK,), ACC)
    dshift = tl.zeros((BLOCK,), ACC)
    for index in tl.range(first, tl.minimum(first + rows, tokens), num_stages=STAGES):
        token = tl.cast(index, tl.int64)
        row = image * tokens + token
        place = image * gradient_image + token * gradient_token + columns
        gradient = tl.load(gradient_ptr + place, mask=mask, other=0.0).to(ACC)
        x = tl.load(x_ptr + image * x_image + token * x_token + columns, mask=mask, other=0.0).to(ACC)
        mean = tl.load(statistics_ptr + row)
        rstd = tl.load(statistics_ptr + tl.cast(images, tl.int64) * tokens + row)
        unit = (x - mean) * rstd
        if DSCALE:
            dscale += gradient * unit
        if DSHIFT:
            dshift += gradient
        if dx_ptr is not None:
            dx = through_norm(gradient * (1 + scale), unit, rstd, width)
            tl.store(dx_ptr + row * width + columns, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    partials_ptr += tl.program_id(0).to(tl.int64) * width
    if DSCALE:
        tl.store(partials_ptr + columns, dscale, mask=mask)
        partials_ptr += tl.num_programs(0).to(tl.int64) * width
    if DSHIFT:
        tl.store(partials_ptr + columns, dshift, mask=mask)


def forward(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    images, tokens, width = x.shape
    acc = accumulator(x)
    out = x.new_empty(x.shape)
    statistics = x.new_empty(2, images, tokens, dtype=torch.float64 if acc is tl.float64 else torch.float32)
    if out.numel():
        block, warps = row_block(width)
        with device_guard(x):
            layer_norm_modulate_kernel[(images * tokens,)](
                x,
                scale,
                shift,
                out,
                statistics,
                tokens,
                width,
                *x.stride()[:2],
                scale.stride(0),
                shift.stride(0),
                eps,
                ACC=acc,
                BLOCK=block,
                num_warps=warps,
            )
    return out, statistics


def backward(
    gradient: Tensor, x: Tensor, scale: Tensor, statistics: Tensor, wanted: list[bool], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    images, tokens, width = x.shape
    vectors = sum(wanted[1:])
    rows = rows_per_program(tokens, images) if vectors else 1
    programs = triton.cdiv(tokens, rows)
    dx = x.new_empty(x.shape if wanted[0] else 0)
    partials = statistics.new_empty(vectors * images, programs, width)
    if x.numel():
        with device_guard(x):
            layer_norm_modulate_backward_kernel[(images * programs,)](
                gradient,
                x,
                scale,
                statistics,
                dx if wanted[0] else None,
                partials,
                images,
                tokens,
                width,
                rows,
                *gradient.stride()[:2],
                *x.stride()[:2],
                scale.stride(0),
                DSCALE=wanted[1],
                DSHIFT=wanted[2],
                ACC=accumulator(x),
                **backward_options(width, x.element_size()),
            )
    return dx, sum_partials(partials, dtype).view(vectors, images, width)
