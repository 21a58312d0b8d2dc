"""Triton kernels of `srpo_kernels.ops.gated_residual`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from srpo_kernels._triton._common import accumulator, device_guard
from srpo_kernels._triton._partials import rows_per_program, sum_partials


def column_block(width: int) -> tuple[int, int]:
    """Block and warps for a part of a row: 8 elements a thread, which is one 16-byte access in half precision."""
    block = min(triton.next_power_of_2(max(width, 1)), 1024)
    return block, max(block // 256, 1)


@triton.jit
def gated_residual_kernel(
    residual_ptr,
    gate_ptr,
    branch_ptr,
    out_ptr,
    tokens,
    width,
    residual_image,  # elements from an image to the next; likewise below
    residual_token,
    gate_image,
    branch_image,
    branch_token,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (images * tokens, blocks of a row)."""
    row = tl.program_id(0).to(tl.int64)
    image = (tl.program_id(0) // tokens).to(tl.int64)
    token = (tl.program_id(0) % tokens).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    place = image * residual_image + token * residual_token + columns
    residual = tl.load(residual_ptr + place, mask=mask, other=0.0).to(ACC)
    gate = tl.load(gate_ptr + image * gate_image + columns, mask=mask, other=0.0).to(ACC)
    branch = tl.load(branch_ptr + image * branch_image + token * branch_token + columns, mask=mask, other=0.0).to(ACC)
    out = residual + gate * branch
    tl.store(out_ptr + row * width + columns, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gated_residual_backward_kernel(
    gradient_ptr,
    gate_ptr,  # None: no gradient of branch is wanted
    branch_ptr,  # None: no gradient of gate is wanted
    dbranch_ptr,
    partials_ptr,  # every program's sum for gate
    tokens,
    width,
    rows,  # tokens that a program walks
    gradient_image,
    gradient_token,
    gate_image,
    branch_image,
    branch_token,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (images * programs of an image, blocks of a row)."""
    programs = tl.cdiv(tokens, rows)
    image = (tl.program_id(0) // programs).to(tl.int64)
    first = tl.program_id(0) % programs * rows
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + image * gate_image + columns, mask=mask, other=0.0).to(ACC)
    dgate = tl.zeros((BLOCK,), ACC)
    # Stages: rows to come travel to shared memory meanwhile.
    for index in tl.range(first, tl.minimum(first + rows, tokens), num_stages=3):
        token = tl.cast(index, tl.int64)
        place = image * gradient_image + token * gradient_token + columns
        gradient = tl.load(gradient_ptr + place, mask=mask, other=0.0).to(ACC)
        if branch_ptr is not None:
            place = image * branch_image + token * branch_token + columns
            dgate += gradient * tl.load(branch_ptr + place, mask=mask, other=0.0).to(ACC)
        if gate_ptr is not None:
            place = (image * tokens + token) * width + columns
            tl.store(dbranch_ptr + place, (gate * gradient).to(dbranch_ptr.dtype.element_ty), mask=mask)
    if branch_ptr is not None:
        tl.store(partials_ptr + tl.program_id(0).to(tl.int64) * width + columns, dgate, mask=mask)


def forward(residual: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    images, tokens, width = residual.shape
    out = residual.new_empty(residual.shape)
    if out.numel():
        block, warps = column_block(width)
        with device_guard(residual):
            gated_residual_kernel[(images * tokens, triton.cdiv(width, block))](
                residual,
                gate,
                branch,
                out,
                tokens,
                width,
                *residual.stride()[:2],
                gate.stride(0),
                *branch.stride()[:2],
                ACC=accumulator(residual),
                BLOCK=block,
                num_warps=warps,
            )
    return out


def backward(
    gradient: Tensor, gate: Tensor | None, branch: Tensor | None, gate_dtype: torch.dtype, branch_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    images, tokens, width = gradient.shape
    acc = accumulator(gradient)
    rows = 1 if branch is None else rows_per_program(tokens, images)
    programs = triton.cdiv(tokens, rows)
    dbranch = gradient.new_empty(0 if gate is None else gradient.shape, dtype=branch_dtype)
    wide = torch.float64 if acc is tl.float64 else torch.float32
    partials = gradient.new_empty(0 if branch is None else (images, programs, width), dtype=wide)
    if gradient.numel():
        block, warps = column_block(width)
        with device_guard(gradient):
            gated_residual_backward_kernel[(images * programs, triton.cdiv(width, block))](
                gradient,
                gate,
                branch,
                dbranch,
                partials,
                tokens,
                width,
                rows,
                *gradient.stride()[:2],
                0 if gate is None else gate.stride(0),
                *((0, 0) if branch is None else branch.stride()[:2]),
                ACC=acc,
                BLOCK=block,
                num_warps=warps,
            )
    dgate = gradient.new_empty(0, dtype=gate_dtype) if branch is None else sum_partials(partials, gate_dtype)
    return dgate, dbranch
