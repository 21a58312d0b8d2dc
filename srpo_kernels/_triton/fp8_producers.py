"""Triton kernels of `srpo_kernels.ops.fp8_producers`: a row belongs to one program, which so knows its scale."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from srpo_kernels._triton._common import device_guard
from srpo_kernels._triton.gelu import _sigmoid
from srpo_kernels._triton.layer_norm_modulate import normalize, row_block
from srpo_kernels._triton.quantize_fp8 import magnitudes, scale_of, to_e4m3
from srpo_kernels._triton.quantize_fp8 import row_block as part_block


@triton.jit
def modulate_fp8_kernel(
    x_ptr,
    gate_ptr,  # with branch and new, or None
    branch_ptr,
    scale_ptr,
    shift_ptr,
    new_ptr,
    values_ptr,
    row_scale_ptr,
    tokens,
    width,
    x_image,  # elements from an image to the next; likewise below
    x_token,
    gate_image,
    branch_image,
    branch_token,
    scale_image,
    shift_image,
    eps: tl.float64,
    BLOCK: tl.constexpr,
):
    """Grid: (images * tokens,)."""
    row = tl.program_id(0).to(tl.int64)
    image = (tl.program_id(0) // tokens).to(tl.int64)
    token = (tl.program_id(0) % tokens).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    x = tl.load(x_ptr + image * x_image + token * x_token + columns, mask=mask, other=0.0).to(tl.float32)
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + image * gate_image + columns, mask=mask, other=0.0).to(tl.float32)
        place = image * branch_image + token * branch_token + columns
        x += gate * tl.load(branch_ptr + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(new_ptr + row * width + columns, x.to(new_ptr.dtype.element_ty), mask=mask)
    scale = tl.load(scale_ptr + image * scale_image + columns, mask=mask, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + image * shift_image + columns, mask=mask, other=0.0).to(tl.float32)
    unit, _, _ = normalize(x, mask, width, eps, tl.float32)
    modulated = unit * (1 + scale) + shift
    inverse, row_scale = scale_of(tl.max(tl.where(mask, magnitudes(modulated), 0.0), 0))
    tl.store(values_ptr + row * width + columns, to_e4m3(modulated, inverse), mask=mask)
    tl.store(row_scale_ptr + row, row_scale)


@triton.jit
def _gelu_part(mlp_ptr, bias_ptr, start, columns, width):
    """gelu(mlp + bias) of some columns, 0 outside the row, and the mask."""
    mask = columns < width - start
    x = tl.load(mlp_ptr + start + columns, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + start + columns, mask=mask, other=0.0).to(tl.float32)
    return x * _sigmoid(x, False)[0], mask


@triton.jit
def gelu_concat_fp8_kernel(
    attn_ptr,  # or None
    mlp_ptr,
    bias_ptr,  # or None
    values_ptr,
    row_scale_ptr,
    attn_width,
    width,
    attn_stride,
    mlp_stride,
    BLOCK: tl.constexpr,
):
    """Every row twice, the second time from the cache: GELU costs less than keeping it. Grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    mlp_ptr += row * mlp_stride
    values_ptr += row * (attn_width + width)
    columns = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float32)
    if attn_ptr is not None:
        attn_ptr += row * attn_stride
        for start in range(0, attn_width, BLOCK):
            attn = tl.load(attn_ptr + start + columns, mask=columns < attn_width - start, other=0.0)
            largest = tl.maximum(largest, magnitudes(attn.to(tl.float32)))
    for start in range(0, width, BLOCK):
        x, _ = _gelu_part(mlp_ptr, bias_ptr, start, columns, width)
        largest = tl.maximum(largest, magnitudes(x))
    inverse, row_scale = scale_of(tl.max(largest, 0))
    if attn_ptr is not None:
        for start in range(0, attn_width, BLOCK):
            mask = columns < attn_width - start
            attn = tl.load(attn_ptr + start + columns, mask=mask, other=0.0).to(tl.float32)
            tl.store(values_ptr + start + columns, to_e4m3(attn, inverse), mask=mask)
    for start in range(0, width, BLOCK):
        x, mask = _gelu_part(mlp_ptr, bias_ptr, start, columns, width)
        tl.store(values_ptr + attn_width + start + columns, to_e4m3(x, inverse), mask=mask)
    tl.store(row_scale_ptr + row, row_scale)


def modulate_options(width: int) -> dict[str, int]:
    """Of a launch: 16 elements a thread, which are one 16-byte store."""
    block, warps = row_block(width)
    return dict(BLOCK=block, num_warps=max(warps // 2, 1))


def gelu_options(attn_width: int, width: int) -> dict[str, int]:
    """Of a launch: the same, at most 4096 at a time."""
    block, warps = part_block(max(attn_width, width))
    return dict(BLOCK=block, num_warps=warps)


def layer_norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _modulate(x, None, None, scale, shift, None, eps)


def gated_residual_layer_norm_modulate(
    residual: Tensor, gate: Tensor, branch: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    new = residual.new_empty(residual.shape)
    return new, *_modulate(residual, gate, branch, scale, shift, new, eps)


def gelu_concat(attn: Tensor | None, mlp: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    rows, width = mlp.shape
    attn_width = 0 if attn is None else attn.shape[1]
    values, row_scale = _results(mlp, attn_width + width)
    if row_scale.numel():
        with device_guard(mlp):
            gelu_concat_fp8_kernel[(rows,)](
                attn,
                mlp,
                bias,
                values,
                row_scale,
                attn_width,
                width,
                0 if attn is None else attn.stride(0),
                mlp.stride(0),
                **gelu_options(attn_width, width),
            )
    return values, row_scale


def _modulate(
    x: Tensor,
    gate: Tensor | None,
    branch: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    new: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    images, tokens, width = x.shape
    values, row_scale = _results(x, width)
    if row_scale.numel():
        with device_guard(x):
            modulate_fp8_kernel[(images * tokens,)](
                x,
                gate,
                branch,
                scale,
                shift,
                new,
                values,
                row_scale,
                tokens,
                width,
                *x.stride()[:2],
                0 if gate is None else gate.stride(0),
                *((0, 0) if branch is None else branch.stride()[:2]),
                scale.stride(0),
                shift.stride(0),
                eps,
                **modulate_options(width),
            )
    return values, row_scale


def _results(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    leading = x.shape[:-1]
    return x.new_empty(*leading, width, dtype=torch.float8_e4m3fn), x.new_empty(*leading, 1, dtype=torch.float32)
