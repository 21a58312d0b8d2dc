"""LayerNorm without weights, then a scale and a shift for every image: adaLN of DiT and FLUX."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from srpo_kernels.ops._modulation import as_rows, as_vector, check_modulation, check_width, dense_rows, unpack, wide
from srpo_kernels.ops._register import define, describe

__all__ = ["layer_norm_modulate"]

# --- reference --------------------------------------------------------------------------------


def modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``LN(x) (1 + scale) + shift`` in the dtype of x, and the statistics [2, B, S]: mean and 1 / deviation."""
    mean = x.mean(-1, keepdim=True)
    rstd = torch.rsqrt((x - mean).square().mean(-1, keepdim=True) + eps)
    out = (x - mean) * rstd * (1 + scale.to(x.dtype)[:, None]) + shift.to(x.dtype)[:, None]
    return out, torch.stack((mean[..., 0], rstd[..., 0]))


def modulate_backward(gradient: Tensor, x: Tensor, scale: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, and of scale and shift as [B, D], in the dtype of x."""
    mean, rstd = statistics[..., None]
    gradient, unit = gradient.to(x.dtype), (x - mean) * rstd
    inner = gradient * (1 + scale.to(x.dtype)[:, None])
    dx = rstd * (inner - inner.mean(-1, keepdim=True) - unit * (inner * unit).mean(-1, keepdim=True))
    return dx, (gradient * unit).sum(1), gradient.sum(1)


def stack_wanted(vectors: list[Tensor], wanted: list[bool], dtype: torch.dtype) -> Tensor:
    """Those of `vectors` that are wanted, [wanted ones, B, D]."""
    return torch.stack(vectors)[[index for index, want in enumerate(wanted) if want]].to(dtype)


def layer_norm_modulate_reference(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [B, S, D], scale and shift [B, D] -> the result, and mean and 1 / deviation of every row [2, B, S]."""
    out, statistics = modulate(x.to(wide(x)), scale, shift, eps)
    return out.to(x.dtype).contiguous(), statistics


def _backward_reference(
    gradient: Tensor, x: Tensor, scale: Tensor, statistics: Tensor, wanted: list[bool], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    dx, *vectors = modulate_backward(gradient, x.to(wide(x)), scale, statistics)
    dx = dx.to(x.dtype).contiguous() if wanted[0] else x.new_empty(0)
    return dx, stack_wanted(vectors, wanted[1:], dtype)


# --- contract ---------------------------------------------------------------------------------


def _fake_forward(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(2, *x.shape[:2], dtype=wide(x))


def _fake_backward(
    _gradient: Tensor, x: Tensor, scale: Tensor, _statistics: Tensor, wanted: list[bool], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    dx = x.new_empty(x.shape if wanted[0] else 0)
    return dx, x.new_empty(sum(wanted[1:]), *scale.shape, dtype=dtype)


_forward = define(
    "layer_norm_modulate_fwd(Tensor x, Tensor scale, Tensor shift, float eps) -> (Tensor out, Tensor statistics)",
    fake=_fake_forward,
    cpu=layer_norm_modulate_reference,
    cuda="srpo_kernels._triton.layer_norm_modulate:forward",
)
#: `wanted`: the gradients of x, scale and shift; `vectors` holds the last two, those that are wanted, in `dtype`.
_backward = define(
    "layer_norm_modulate_bwd(Tensor gradient, Tensor x, Tensor scale, Tensor statistics, bool[] wanted, "
    "ScalarType dtype) -> (Tensor dx, Tensor vectors)",
    fake=_fake_backward,
    cpu=_backward_reference,
    cuda="srpo_kernels._triton.layer_norm_modulate:backward",
)

# --- autograd ---------------------------------------------------------------------------------


class _LayerNormModulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
        out, statistics = _forward(x, scale, shift, eps)
        ctx.save_for_backward(x, scale, statistics)
        ctx.dtypes = scale.dtype, shift.dtype
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, statistics = ctx.saved_tensors  # once: checkpointing recomputes on the first access
        wanted = list(ctx.needs_input_grad[:3])
        dtype = torch.promote_types(*ctx.dtypes)
        dx, vectors = _backward(dense_rows(gradient), x, scale, statistics, wanted, dtype)
        return (dx if wanted[0] else None), *unpack(vectors, ctx.dtypes, wanted[1:]), None


# --- public function --------------------------------------------------------------------------


def layer_norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """``LN(x) * (1 + scale) + shift``, with ``LN(x) = (x - mean) / sqrt(variance + eps)`` over the last dimension.

    Args:
        x: [B, ..., D], D at most 8192. Its rows may be any stride apart (a slice of a joint sequence): no copy.
        scale, shift: [B, D] or [B, 1, D], of any floating dtype, such as chunks of a modulation [B, 6 D]: no copy.
        eps: added to the variance.

    Returns:
        A contiguous tensor, shaped and typed as x. Computed in fp32 (float64 for float64 x). Differentiable in x, scale
        and shift; backward needs x, scale and two fp32 numbers a row, and sums over tokens in a fixed order.

    Raises:
        TypeError: a tensor is not floating. ValueError: shapes or devices do not fit, or x is too wide.
    """
    op = "layer_norm_modulate"
    check_modulation(op, {"x": x}, {"scale": scale, "shift": shift})
    check_width(op, "x", x)
    return _LayerNormModulate.apply(as_rows(x), as_vector(scale), as_vector(shift), eps).reshape(x.shape)


describe(
    layer_norm_modulate,
    formula="LN(x) (1 + scale) + shift",
    shapes="x [B, ..., D], scale and shift [B, D] or [B, 1, D] -> [B, ..., D]",
    saved="two fp32 numbers per row: mean and 1 / deviation",
    floor="forward: read 1, write 1; backward: read 2, write 1",
    schemas=("layer_norm_modulate_fwd", "layer_norm_modulate_bwd"),
)
