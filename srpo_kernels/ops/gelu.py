"""GELU in its tanh form, which FLUX's feed-forward layers use, alone and inside the single block's concatenation; and
CLIP's sigmoid form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu

from srpo_kernels.ops._checks import check_floating
from srpo_kernels.ops._register import define, describe

__all__ = ["gelu_concat", "gelu_tanh", "quick_gelu"]

# --- reference --------------------------------------------------------------------------------


def gelu_tanh_reference(x: Tensor, bias: Tensor | None) -> Tensor:
    """x [R, D], bias [D] -> [R, D] in x's dtype, computed in fp32 or wider."""
    return gelu(_biased(x, bias), approximate="tanh").to(x.dtype).contiguous()


def gelu_concat_reference(attn: Tensor, mlp: Tensor) -> Tensor:
    """attn [R, D1], mlp [R, D2] -> [R, D1 + D2] in attn's dtype, its right part computed in fp32 or wider."""
    return torch.cat([attn, gelu(_biased(mlp, None), approximate="tanh").to(attn.dtype)], -1)


def _backward_reference(gradient: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    return _wide_gradient(gradient, x, bias).to(x.dtype).contiguous()


def _bias_backward_reference(gradient: Tensor, x: Tensor, bias: Tensor, wants_x: bool) -> tuple[Tensor, Tensor]:
    """The gradients of x, of no rows unless it is wanted, and of bias."""
    wide = _wide_gradient(gradient, x, bias)
    dx = wide.to(x.dtype, memory_format=torch.contiguous_format, copy=True) if wants_x else x.new_empty(0, x.shape[1])
    return dx, wide.sum(0).to(bias.dtype)


def _wide_gradient(gradient: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    wide = _biased(x, bias)
    return torch.ops.aten.gelu_backward(gradient.to(wide.dtype), wide, approximate="tanh")


def _biased(x: Tensor, bias: Tensor | None) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide if bias is None else wide + bias.to(wide.dtype)


def quick_gelu_reference(x: Tensor) -> Tensor:
    """x [R, D] -> [R, D] in x's dtype, computed in fp32 or wider."""
    wide = _biased(x, None)
    return (wide * torch.sigmoid(1.702 * wide)).to(x.dtype).contiguous()


def _quick_backward_reference(gradient: Tensor, x: Tensor) -> Tensor:
    wide = _biased(x, None)
    gradient, gate = gradient.to(wide.dtype), torch.sigmoid(1.702 * wide)
    # In autograd's own order: in fp32 not a bit differs from the composed form.
    slope = 1.702 * torch.ops.aten.sigmoid_backward(gradient * wide, gate)
    return (gradient * gate + slope).to(x.dtype).contiguous()


# --- contract: tensors are [R, D] with contiguous rows ----------------------------------------

_forward = define(
    "gelu_tanh_fwd(Tensor x, Tensor? bias) -> Tensor",
    fake=lambda x, bias: x.new_empty(x.shape),
    cpu=gelu_tanh_reference,
    cuda="srpo_kernels._triton.gelu:forward",
)
_backward = define(
    "gelu_tanh_bwd(Tensor gradient, Tensor x, Tensor? bias) -> Tensor",
    fake=lambda gradient, x, bias: x.new_empty(x.shape),
    cpu=_backward_reference,
    cuda="srpo_kernels._triton.gelu:backward",
)
_bias_backward = define(
    "gelu_tanh_bias_bwd(Tensor gradient, Tensor x, Tensor bias, bool wants_x) -> (Tensor dx, Tensor dbias)",
    fake=lambda gradient, x, bias, wants_x: (
        x.new_empty(x.shape[0] if wants_x else 0, x.shape[1]),
        bias.new_empty(bias.shape),
    ),
    cpu=_bias_backward_reference,
    cuda="srpo_kernels._triton.gelu:bias_backward",
)
_concat_forward = define(
    "gelu_concat_fwd(Tensor attn, Tensor mlp) -> Tensor",
    fake=lambda attn, mlp: attn.new_empty(attn.shape[0], attn.shape[1] + mlp.shape[1]),
    cpu=gelu_concat_reference,
    cuda="srpo_kernels._triton.gelu:concat_forward",
)
_quick_forward = define(
    "quick_gelu_fwd(Tensor x) -> Tensor",
    fake=lambda x: x.new_empty(x.shape),
    cpu=quick_gelu_reference,
    cuda="srpo_kernels._triton.gelu:quick_forward",
)
_quick_backward = define(
    "quick_gelu_bwd(Tensor gradient, Tensor x) -> Tensor",
    fake=lambda gradient, x: x.new_empty(x.shape),
    cpu=_quick_backward_reference,
    cuda="srpo_kernels._triton.gelu:quick_backward",
)


def _rows(tensor: Tensor) -> Tensor:
    """[..., D] as [R, D] with contiguous rows, copied only where strides do not allow it."""
    rows = tensor.flatten(0, -2) if tensor.ndim > 1 else tensor.reshape(1, -1)
    return rows if rows.stride(1) == 1 else rows.contiguous()


# --- autograd ---------------------------------------------------------------------------------


class _GeluTanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, bias)
        return _forward(x, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, bias = ctx.saved_tensors
        gradient = _rows(gradient)  # its strides are unspecified
        wants_x, wants_bias = ctx.needs_input_grad
        if not wants_bias:
            return _backward(gradient, x, bias), None
        dx, dbias = _bias_backward(gradient, x, bias, wants_x)
        return dx if wants_x else None, dbias


class _GeluConcat(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, attn: Tensor, mlp: Tensor) -> Tensor:
        ctx.save_for_backward(mlp if ctx.needs_input_grad[1] else None)
        ctx.split = attn.shape[1]
        return _concat_forward(attn, mlp)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (mlp,) = ctx.saved_tensors
        gradient = _rows(gradient)  # its strides are unspecified
        dattn = gradient[:, : ctx.split] if ctx.needs_input_grad[0] else None  # a view, as torch.cat's
        dmlp = None if mlp is None else _backward(gradient[:, ctx.split :], mlp, None)
        return dattn, dmlp


class _QuickGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _quick_forward(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return _quick_backward(_rows(gradient), x)  # its strides are unspecified


# --- public functions -------------------------------------------------------------------------


def gelu_tanh(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.gelu(x + bias, approximate="tanh")``, the sum and all that follows in fp32.

    Args:
        x: [..., D], fp32, fp16 or bf16 (float64 for checking). Rows may be strided; other layouts are copied.
        bias: [D] of any such dtype, or None.

    Returns:
        [..., D] in x's dtype. Differentiable in x and bias; backward needs nothing but these.

    Raises:
        TypeError: x or bias has another dtype. ValueError: bias is not [D], or on another device.
    """
    check_floating("gelu_tanh", x=x)
    if bias is not None:
        check_floating("gelu_tanh", x=x, bias=bias)
        if bias.ndim != 1 or bias.shape != x.shape[-1:]:
            wanted = list(x.shape[-1:]) or "None for scalar x"
            raise ValueError(f"gelu_tanh: bias must be {wanted}, got {list(bias.shape)}")
        bias = bias.contiguous()
    return _GeluTanh.apply(_rows(x), bias).reshape(x.shape)


def gelu_concat(attn: Tensor, mlp: Tensor) -> Tensor:
    """``torch.cat([attn, gelu_tanh(mlp)], -1)`` in one pass: what the output projection of a FLUX single block reads.

    Args:
        attn: [..., D1], fp32, fp16 or bf16 (float64 for checking). Rows may be strided; other layouts are copied.
        mlp: [..., D2], likewise, such as a slice of a fused projection.

    Returns:
        [..., D1 + D2] in attn's dtype. Differentiable in both; backward needs mlp only, and the gradient of attn is a
        view of the incoming gradient, as `torch.cat`'s is.

    Raises:
        TypeError: a tensor has another dtype. ValueError: shapes differ in more than the last dimension, or devices.
    """
    check_floating("gelu_concat", attn=attn, mlp=mlp)
    if attn.ndim < 1:
        raise ValueError("gelu_concat: attn must be [..., D1], got []")
    if mlp.shape[:-1] != attn.shape[:-1] or mlp.ndim != attn.ndim:
        wanted = ", ".join(map(str, (*attn.shape[:-1], "D2")))
        raise ValueError(f"gelu_concat: mlp must be [{wanted}], got {list(mlp.shape)}")
    width = attn.shape[-1] + mlp.shape[-1]
    return _GeluConcat.apply(_rows(attn), _rows(mlp)).reshape(*attn.shape[:-1], width)


def quick_gelu(x: Tensor) -> Tensor:
    """``x * sigmoid(1.702 * x)``, the GELU of OpenAI's CLIP towers, in one pass.

    Args:
        x: [..., D], fp32, fp16 or bf16 (float64 for checking). Rows may be strided; other layouts are copied.

    Returns:
        [..., D] in x's dtype, computed in fp32. Differentiable; backward needs x only.

    Raises:
        TypeError: x has another dtype.
    """
    check_floating("quick_gelu", x=x)
    return _QuickGelu.apply(_rows(x)).reshape(x.shape)


describe(
    gelu_tanh,
    formula="gelu(x + bias), tanh form",
    shapes="x [..., D], bias [D] -> [..., D]",
    saved="none",
    floor="forward: read 1, write 1; backward: read 2, write 1",
    schemas=("gelu_tanh_fwd", "gelu_tanh_bwd", "gelu_tanh_bias_bwd"),
)
describe(
    gelu_concat,
    formula="cat([attn, gelu(mlp)], -1), tanh form",
    shapes="attn [..., D1], mlp [..., D2] -> [..., D1 + D2]",
    saved="none",
    floor="forward: read 1, write 1 (of D1 + D2 elements a row); backward: read 2, write 1 (of D2)",
    schemas=("gelu_concat_fwd", "gelu_tanh_bwd"),
)
describe(
    quick_gelu,
    formula="x * sigmoid(1.702 x)",
    shapes="x [..., D] -> [..., D]",
    saved="none",
    floor="forward: read 1, write 1; backward: read 2, write 1",
    schemas=("quick_gelu_fwd", "quick_gelu_bwd"),
)
