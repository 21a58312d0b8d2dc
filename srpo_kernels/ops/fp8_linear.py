"""A linear layer whose operands are e4m3 with row scales: twice the rate of bf16 on Hopper and later."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from srpo_kernels.ops._checks import check_floating, check_forward_only
from srpo_kernels.ops._register import define, describe
from srpo_kernels.ops.quantize_fp8 import Float8, quantize_fp8

__all__ = ["fp8_linear", "fp8_unsupported"]

#: Compute capability from which `torch._scaled_mm` takes row scales.
_CAPABILITY = (9, 0)
#: What both dimensions of the weight are multiples of.
_ALIGNMENT = 16


def fp8_unsupported(weight_shape: torch.Size | tuple[int, ...], device: torch.device | str) -> str | None:
    """Why a weight [N, K] on `device` is multiplied in bf16 (fp32 on the CPU) instead of e4m3, or None.

    | | e4m3 GEMM |
    |---|---|
    | device | CUDA, compute capability 9.0 or later |
    | N, K | multiples of 16 |
    | rows of x | any number |
    | result | bf16; other dtypes are converted from it |
    """
    device = torch.device(device)
    if device.type != "cuda":
        return f"it is on {device.type}, not on a GPU"
    if torch.cuda.get_device_capability(device) < _CAPABILITY:
        return "the GPU is older than compute capability 9.0"
    if any(size % _ALIGNMENT for size in weight_shape):
        return f"its shape {list(weight_shape)} is not of multiples of {_ALIGNMENT}"
    return None


# --- reference --------------------------------------------------------------------------------


def fp8_linear_reference(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """x [M, K] and weight [N, K] in e4m3 with scales [M, 1] and [N, 1] -> [M, N]: exact products, added in fp32."""
    with torch.autocast(x.device.type, enabled=False):  # would round the operands' products to bf16
        out = linear(x.float(), weight.float()) * x_scale * weight_scale.T
    return (out if bias is None else out + bias.float()).to(dtype)


def multiply(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The same on a GPU, where it can. Not for empty operands: with K = 0 `_scaled_mm` leaves out the bias."""
    if x.numel() and weight.numel() and fp8_unsupported(weight.shape, x.device) is None:
        if bias is not None:
            bias = bias.to(torch.bfloat16)
        return torch._scaled_mm(
            x, weight.T, x_scale, weight_scale.T, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
        ).to(dtype)
    if x.device.type == "cpu":  # the interpreter's
        return fp8_linear_reference(x, x_scale, weight, weight_scale, bias, dtype)
    rows, columns = (Float8(*pair).dequantize(torch.bfloat16) for pair in ((x, x_scale), (weight, weight_scale)))
    return linear(rows, columns, None if bias is None else bias.to(torch.bfloat16)).to(dtype)


# --- contract ---------------------------------------------------------------------------------


def _fake(x: Tensor, _x_scale: Tensor, weight: Tensor, _weight_scale: Tensor, _bias: Any, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)


_linear = define(
    "fp8_linear(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, ScalarType dtype) "
    "-> Tensor",
    fake=_fake,
    cpu=fp8_linear_reference,
    cuda="srpo_kernels.ops.fp8_linear:multiply",
)

# --- public function --------------------------------------------------------------------------


def fp8_linear(
    x: Tensor | Float8, weight: Float8, bias: Tensor | None = None, *, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """``x @ weight.T + bias`` of e4m3 operands, forward only (see `Float8Linear` for training).

    Products are exact. Tensor cores add them with fewer bits than fp32 ("fast accumulation"), the CPU in fp32.

    Args:
        x: [..., K], quantised by row, as `quantize_fp8` and the operators ending in _fp8 return it; a tensor is
            quantised first.
        weight: [N, K], quantised by row.
        bias: [N], any floating dtype.
        dtype: of the result.

    Returns:
        [..., N]. Where `fp8_unsupported` gives a reason, the values are multiplied in bf16 (on the CPU in fp32,
        exactly).

    Raises:
        TypeError: weight is not a `Float8`, x neither that nor floating, or bias not floating. ValueError: shapes,
            scales or devices do not fit. RuntimeError: a gradient is wanted.
    """
    check_forward_only("fp8_linear", "Float8Linear", x, bias)
    if not isinstance(weight, Float8):
        raise TypeError(f"fp8_linear: weight must be a Float8, got {type(weight).__name__}; see quantize_fp8")
    if weight.values.ndim != 2 or weight.scale.shape != (weight.shape[0], 1):
        shapes = f"{list(weight.shape)} with scales {list(weight.scale.shape)}"
        raise ValueError(f"fp8_linear: weight must be [N, K] quantised by row, with scales [N, 1], got {shapes}")
    outputs, inputs = weight.shape
    if not isinstance(x, Float8):
        check_floating("fp8_linear", x=x)
    if x.shape[-1:] != (inputs,):
        raise ValueError(f"fp8_linear: x must be [..., {inputs}], got {list(x.shape)}")
    if bias is not None:
        check_floating("fp8_linear", bias=bias)
        if bias.shape != (outputs,):
            raise ValueError(f"fp8_linear: bias must be [{outputs}], got {list(bias.shape)}")
    quantized = x if isinstance(x, Float8) else quantize_fp8(x)
    if quantized.scale.shape != (*quantized.shape[:-1], 1):
        raise ValueError(f"fp8_linear: x must be quantised by row, got scales {list(quantized.scale.shape)}")
    for name, tensor in {"weight": weight.values, "bias": bias}.items():
        if tensor is not None and tensor.device != quantized.values.device:
            raise ValueError(f"fp8_linear: x is on {quantized.values.device} but {name} on {tensor.device}")
    count = x.shape[:-1].numel()
    operands = quantized.values.reshape(count, inputs), quantized.scale.reshape(count, 1), *weight
    # Slices and transposes are copied: `_scaled_mm` takes no other layout.
    return _linear(*(operand.contiguous() for operand in operands), bias, dtype).view(*x.shape[:-1], outputs)


describe(
    fp8_linear,
    formula="x @ weight.T + bias, x and weight in e4m3 with a scale for each of their rows",
    shapes="x [..., K], weight [N, K], bias [N] -> [..., N]",
    saved="none: not differentiable",
    floor="read x, weight, bias once, write 1",
    schemas=("fp8_linear",),
)
