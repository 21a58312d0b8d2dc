"""Operators that feed linear layers, with their result in e4m3 and a scale a row, in the same pass; forward only."""

from __future__ import annotations

import torch
from torch import Tensor

from srpo_kernels.ops._checks import check_floating, check_forward_only
from srpo_kernels.ops._modulation import as_rows, as_vector, check_modulation, check_width, dense_rows
from srpo_kernels.ops._register import define, describe
from srpo_kernels.ops.gated_residual import gated_residual_layer_norm_modulate_reference
from srpo_kernels.ops.gelu import gelu_tanh_reference
from srpo_kernels.ops.layer_norm_modulate import modulate
from srpo_kernels.ops.quantize_fp8 import Float8, quantize_fp8_reference

__all__ = [
    "gated_residual_layer_norm_modulate_fp8",
    "gelu_concat_fp8",
    "gelu_tanh_fp8",
    "layer_norm_modulate_fp8",
]

# --- reference --------------------------------------------------------------------------------


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 x [..., D] by row."""
    values, scale = quantize_fp8_reference(x.reshape(x.shape[:-1].numel(), x.shape[-1]), "row")
    return values.view(x.shape), scale.view(*x.shape[:-1], 1)


def layer_norm_modulate_fp8_reference(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [B, S, D], scale and shift [B, D] -> values [B, S, D] and their scales [B, S, 1]."""
    return _quantize(modulate(x.float(), scale, shift, eps)[0])


def gated_residual_layer_norm_modulate_fp8_reference(
    residual: Tensor, gate: Tensor, branch: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """residual and branch [B, S, D], vectors [B, D] -> the sum, and values and scales of its modulation."""
    new, modulated, _ = gated_residual_layer_norm_modulate_reference(residual.float(), gate, branch, scale, shift, eps)
    return new.to(residual.dtype), *_quantize(modulated)


def gelu_concat_fp8_reference(attn: Tensor | None, mlp: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """attn [R, D1] or None, mlp [R, D2], bias [D2] -> values [R, D1 + D2] and scales [R, 1]."""
    activated = gelu_tanh_reference(mlp.float(), bias)
    return _quantize(activated if attn is None else torch.cat([attn.float(), activated], -1))


# --- contract ---------------------------------------------------------------------------------


def _like(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    leading = x.shape[:-1]
    values = x.new_empty(*leading, width, dtype=torch.float8_e4m3fn)
    return values, x.new_empty(*leading, 1, dtype=torch.float32)


def _fake_gelu(attn: Tensor | None, mlp: Tensor, _bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return _like(mlp, mlp.shape[1] + (0 if attn is None else attn.shape[1]))


_modulate = define(
    "layer_norm_modulate_fp8(Tensor x, Tensor scale, Tensor shift, float eps) -> (Tensor values, Tensor row_scale)",
    fake=lambda x, *_: _like(x, x.shape[-1]),
    cpu=layer_norm_modulate_fp8_reference,
    cuda="srpo_kernels._triton.fp8_producers:layer_norm_modulate",
)
_gated_modulate = define(
    "gated_residual_layer_norm_modulate_fp8(Tensor residual, Tensor gate, Tensor branch, Tensor scale, Tensor shift, "
    "float eps) -> (Tensor new_residual, Tensor values, Tensor row_scale)",
    fake=lambda residual, *_: (residual.new_empty(residual.shape), *_like(residual, residual.shape[-1])),
    cpu=gated_residual_layer_norm_modulate_fp8_reference,
    cuda="srpo_kernels._triton.fp8_producers:gated_residual_layer_norm_modulate",
)
_gelu = define(
    "gelu_concat_fp8(Tensor? attn, Tensor mlp, Tensor? bias) -> (Tensor values, Tensor row_scale)",
    fake=_fake_gelu,
    cpu=gelu_concat_fp8_reference,
    cuda="srpo_kernels._triton.fp8_producers:gelu_concat",
)

# --- public functions -------------------------------------------------------------------------


def layer_norm_modulate_fp8(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Float8:
    """`quantize_fp8` of `layer_norm_modulate`, by row, without writing what lies between, nor rounding it.

    Args and errors: as `layer_norm_modulate`; also RuntimeError where a gradient is wanted.

    Returns:
        values [B, ..., D] and scales [B, ..., 1].
    """
    op = "layer_norm_modulate_fp8"
    check_modulation(op, {"x": x}, {"scale": scale, "shift": shift})
    check_width(op, "x", x)
    check_forward_only(op, op.removesuffix("_fp8"), x, scale, shift)
    values, row_scale = _modulate(as_rows(x), as_vector(scale), as_vector(shift), eps)
    return Float8(values.view(x.shape), row_scale.view(*x.shape[:-1], 1))


def gated_residual_layer_norm_modulate_fp8(
    residual: Tensor, gate: Tensor, branch: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Float8]:
    """`gated_residual_layer_norm_modulate` with its second result quantised by row, without rounding it before.

    Args and errors: as `gated_residual_layer_norm_modulate`; also RuntimeError where a gradient is wanted.

    Returns:
        The new residual, shaped and typed as residual, and values [B, ..., D] with scales [B, ..., 1].
    """
    op = "gated_residual_layer_norm_modulate_fp8"
    check_modulation(op, {"residual": residual, "branch": branch}, {"gate": gate, "scale": scale, "shift": shift})
    check_width(op, "residual", residual)
    check_forward_only(op, op.removesuffix("_fp8"), residual, gate, branch, scale, shift)
    vectors = [as_vector(vector) for vector in (gate, scale, shift)]
    new, values, row_scale = _gated_modulate(as_rows(residual), vectors[0], as_rows(branch), *vectors[1:], eps)
    return new.view(residual.shape), Float8(values.view(residual.shape), row_scale.view(*residual.shape[:-1], 1))


def gelu_tanh_fp8(x: Tensor, bias: Tensor | None = None) -> Float8:
    """`quantize_fp8` of `gelu_tanh`, by row, in one pass.

    Args and errors: as `gelu_tanh`, x being [..., D]; also RuntimeError where a gradient is wanted.

    Returns:
        values [..., D] and scales [..., 1].
    """
    op = "gelu_tanh_fp8"
    check_floating(op, **({"x": x} if bias is None else {"x": x, "bias": bias}))
    if x.ndim == 0:
        raise ValueError(f"{op}: x must be [..., D], got []")
    if bias is not None and bias.shape != x.shape[-1:]:
        raise ValueError(f"{op}: bias must be {list(x.shape[-1:])}, got {list(bias.shape)}")
    check_forward_only(op, op.removesuffix("_fp8"), x, bias)
    values, row_scale = _gelu(None, _matrix(x), None if bias is None else bias.contiguous())
    return Float8(values.view(x.shape), row_scale.view(*x.shape[:-1], 1))


def gelu_concat_fp8(attn: Tensor, mlp: Tensor) -> Float8:
    """`quantize_fp8` of `gelu_concat`, by row, in one pass.

    Args and errors: as `gelu_concat`; also RuntimeError where a gradient is wanted.

    Returns:
        values [..., D1 + D2] and scales [..., 1].
    """
    op = "gelu_concat_fp8"
    check_floating(op, attn=attn, mlp=mlp)
    if attn.ndim == 0:
        raise ValueError(f"{op}: attn must be [..., D1], got []")
    if mlp.shape[:-1] != attn.shape[:-1] or mlp.ndim != attn.ndim:
        wanted = ", ".join(map(str, (*attn.shape[:-1], "D2")))
        raise ValueError(f"{op}: mlp must be [{wanted}], got {list(mlp.shape)}")
    check_forward_only(op, op.removesuffix("_fp8"), attn, mlp)
    values, row_scale = _gelu(_matrix(attn), _matrix(mlp), None)
    return Float8(values.view(*attn.shape[:-1], values.shape[-1]), row_scale.view(*attn.shape[:-1], 1))


def _matrix(x: Tensor) -> Tensor:
    return dense_rows(x.reshape(x.shape[:-1].numel(), x.shape[-1]))


describe(
    layer_norm_modulate_fp8,
    formula="quantize_fp8(LN(x) (1 + scale) + shift)",
    shapes="x [B, ..., D], scale and shift [B, D] -> values [B, ..., D], scales [B, ..., 1]",
    saved="none: not differentiable",
    floor="read 1, write 1/2 (of bf16)",
    schemas=("layer_norm_modulate_fp8",),
)
describe(
    gated_residual_layer_norm_modulate_fp8,
    formula="r = residual + gate branch; quantize_fp8(LN(r) (1 + scale) + shift)",
    shapes="residual, branch [B, ..., D], gate, scale, shift [B, D] -> [B, ..., D], values [B, ..., D], "
    "scales [B, ..., 1]",
    saved="none: not differentiable",
    floor="read 2, write 3/2 (of bf16)",
    schemas=("gated_residual_layer_norm_modulate_fp8",),
)
describe(
    gelu_tanh_fp8,
    formula="quantize_fp8(gelu(x + bias)), tanh form",
    shapes="x [..., D], bias [D] -> values [..., D], scales [..., 1]",
    saved="none: not differentiable",
    floor="read 1, write 1/2 (of bf16)",
    schemas=("gelu_concat_fp8",),
)
describe(
    gelu_concat_fp8,
    formula="quantize_fp8(cat([attn, gelu(mlp)], -1)), tanh form",
    shapes="attn [..., D1], mlp [..., D2] -> values [..., D1 + D2], scales [..., 1]",
    saved="none: not differentiable",
    floor="read 1, write 1/2 (of bf16)",
    schemas=("gelu_concat_fp8",),
)
