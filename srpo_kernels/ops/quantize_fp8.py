"""Quantisation to e4m3 with one fp32 scale a row, a tensor or a 128 x 128 block."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from srpo_kernels.ops._checks import check_floating
from srpo_kernels.ops._register import define, describe

__all__ = ["GRANULARITIES", "Float8", "fake_quantize_fp8", "quantize_fp8"]

GRANULARITIES = ("row", "tensor", "block")
BLOCK = 128
LARGEST = 448.0  # of e4m3fn
#: Magnitudes below this count as this, so that neither a scale nor its inverse leaves fp32's normal range.
SMALLEST = 2.0**-96


class Float8(NamedTuple):
    """What `quantize_fp8` returns: e4m3 `values` and their fp32 `scale`; ``values * scale`` is what they stand for."""

    values: Tensor
    scale: Tensor

    @property
    def shape(self) -> torch.Size:
        """Of the values."""
        return self.values.shape

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``values * scale``, computed in fp32, as a tensor of `dtype`."""
        scale = self.scale
        if scale.ndim == 2 and scale.numel() != 1 and scale.shape != (self.shape[0], 1):
            rows, columns = self.shape
            scale = scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
        return (self.values.float() * scale).to(dtype)


# --- reference --------------------------------------------------------------------------------


def encode(x: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 x as e4m3 (nearest even) for the largest finite magnitudes of what shares a scale, and those scales."""
    largest = largest.clamp(min=SMALLEST)
    inverse = torch.full_like(largest, LARGEST) / largest  # 448 / tensor would multiply by a rounded reciprocal
    # Clamped: not every version of PyTorch saturates. NaN stays NaN.
    return (x * inverse).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), largest / LARGEST


def magnitudes(x: Tensor) -> Tensor:
    """|x|, and 0 for what is not finite, which no scale is made for."""
    return torch.where(x.isfinite(), x.abs(), 0.0)


def quantize_fp8_reference(x: Tensor, granularity: str) -> tuple[Tensor, Tensor]:
    """x [R, C] -> values [R, C], and scale [R, 1], [1, 1] or [ceil(R / 128), ceil(C / 128)]."""
    x = x.float()
    if granularity == "row":
        return encode(x, magnitudes(x).amax(1, keepdim=True) if x.numel() else x.new_zeros(x.shape[0], 1))
    if granularity == "tensor":
        return encode(x, magnitudes(x).amax().reshape(1, 1) if x.numel() else x.new_zeros(1, 1))
    rows, columns = x.shape
    down, across = -(-rows // BLOCK), -(-columns // BLOCK)
    padded = torch.nn.functional.pad(x, (0, across * BLOCK - columns, 0, down * BLOCK - rows))
    blocks = padded.view(down, BLOCK, across, BLOCK)
    values, scale = encode(blocks, magnitudes(blocks).amax((1, 3), keepdim=True))
    return values.view(down * BLOCK, across * BLOCK)[:rows, :columns].contiguous(), scale.view(down, across)


# --- contract ---------------------------------------------------------------------------------


def scale_shape(rows: int, columns: int, granularity: str) -> tuple[int, int]:
    """Of the scales of a matrix."""
    if granularity == "block":
        return -(-rows // BLOCK), -(-columns // BLOCK)
    return (rows if granularity == "row" else 1), 1


def _fake(x: Tensor, granularity: str) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    scale = x.new_empty(scale_shape(rows, columns, granularity), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), scale


_quantize = define(
    "quantize_fp8(Tensor x, str granularity) -> (Tensor values, Tensor scale)",
    fake=_fake,
    cpu=quantize_fp8_reference,
    cuda="srpo_kernels._triton.quantize_fp8:quantize",
)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: Tensor, granularity: str) -> Tensor:
        return quantize_fp8(x, granularity).dequantize(x.dtype)

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


# --- public functions -------------------------------------------------------------------------


@torch.no_grad()
def quantize_fp8(x: Tensor, granularity: str = "row") -> Float8:
    """e4m3 values of x and the scales that give x back: ``scale = max|x| / 448`` over what shares it.

    The largest finite magnitude becomes 448; infinities become +-448, NaN stays NaN, and neither affects a scale. Where
    everything is zero, or smaller than 2^-96, the scale is ``2^-96 / 448``. Rounded to nearest, ties to even.

    Args:
        x: [..., D] fp32, fp16 or bf16 (float64 is rounded to fp32 first); its rows may be strided. For "block" [R, C].
        granularity: "row", one scale for every vector along the last dimension (activations, and weights [out, in]);
            "tensor", one for all; "block", one for every 128 x 128 of a matrix, less at the edges (weights).

    Returns:
        `values`, float8_e4m3fn, contiguous and shaped as x, and `scale`, fp32: [..., 1], [1] * x.ndim, or
        [ceil(R / 128), ceil(C / 128)]. Not differentiable; see `fake_quantize_fp8`.

    Raises:
        TypeError: x is not floating. ValueError: an unknown granularity, or x has no dimension, or not two for "block".
    """
    check_floating("quantize_fp8", x=x)
    if granularity not in GRANULARITIES:
        raise ValueError(f"quantize_fp8: granularity must be one of {', '.join(GRANULARITIES)}, got {granularity!r}")
    if x.ndim == 0 or (granularity == "block" and x.ndim != 2):
        wanted = "[R, C]" if granularity == "block" else "[..., D]"
        raise ValueError(f"quantize_fp8: x must be {wanted}, got {list(x.shape)}")
    rows = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.reshape(x.shape[:-1].numel(), 0)
    values, scale = _quantize(rows if rows.stride(-1) == 1 else rows.contiguous(), granularity)
    if granularity == "row":
        scale = scale.view(*x.shape[:-1], 1)
    elif granularity == "tensor":
        scale = scale.view([1] * x.ndim)
    return Float8(values.view(x.shape), scale)


def fake_quantize_fp8(x: Tensor, granularity: str = "row") -> Tensor:
    """What is left of x after `quantize_fp8`, in x's shape and dtype, with the straight-through gradient: that of x.

    Raises as `quantize_fp8` does.
    """
    return _FakeQuantize.apply(x, granularity)


describe(
    quantize_fp8,
    formula="e4m3(x / scale), scale = max|x| / 448 over a row, the tensor or a 128 x 128 block",
    shapes="x [..., D] -> values [..., D], scale [..., 1], [1, ...] or [ceil(R / 128), ceil(C / 128)]",
    saved="none: not differentiable",
    floor="read 1, write 1/2 (of bf16); tensor-wise: read 2, write 1/2",
    schemas=("quantize_fp8",),
)
