"""GroupNorm, then SiLU: what precedes every convolution of a VAE's residual blocks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from srpo_kernels.ops._checks import check_floating
from srpo_kernels.ops._modulation import unpack, wide
from srpo_kernels.ops._register import define, describe

__all__ = ["group_norm_silu"]

# --- reference: x is [B, C, L] ----------------------------------------------------------------


def group_norm_silu_reference(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, activation: bool
) -> tuple[Tensor, Tensor]:
    """The result, as dense as x is, and mean and 1 / deviation of every group [2, B, G]."""
    grouped = _grouped(x, groups)
    mean = grouped.mean((2, 3), keepdim=True)
    mean = mean + (grouped - mean).mean((2, 3), keepdim=True)  # what rounding left
    variance = (grouped - mean).square().mean((2, 3))
    statistics = torch.stack((mean[..., 0, 0], torch.rsqrt(variance + eps)))
    y = _affine(_unit(x, statistics), weight, bias)
    return _as(x, silu(y) if activation else y), statistics


def _backward_reference(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    activation: bool,
    wanted: list[bool],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    groups, unit = statistics.shape[2], _unit(x, statistics)
    inner = gradient.to(unit.dtype)
    if activation:
        y = _affine(unit, weight, bias)
        gate = torch.sigmoid(y)
        inner = inner * gate * (1 + y * (1 - gate))
    vectors = torch.stack(((inner * unit).sum((0, 2)), inner.sum((0, 2))))[[i for i in (0, 1) if wanted[1 + i]]]
    if not wanted[0]:
        return x.new_empty(0), vectors.to(dtype)
    scaled, unit = _grouped(inner * weight.to(inner.dtype)[:, None], groups), _grouped(unit, groups)
    slope = (scaled * unit).mean((2, 3), keepdim=True)
    dx = statistics[1][..., None, None] * (scaled - scaled.mean((2, 3), keepdim=True) - unit * slope)
    return _as(x, dx.flatten(1, 2)), vectors.to(dtype)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """[B, C, L] as [B, G, C / G, L], wide enough to compute in."""
    return x.to(wide(x)).unflatten(1, (groups, x.shape[1] // groups))


def _unit(x: Tensor, statistics: Tensor) -> Tensor:
    mean, rstd = statistics[..., None, None]
    return ((_grouped(x, statistics.shape[2]) - mean) * rstd).flatten(1, 2)


def _affine(unit: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return unit * weight.to(unit.dtype)[:, None] + bias.to(unit.dtype)[:, None]


def _as(x: Tensor, values: Tensor) -> Tensor:
    """`values` in a tensor with the dtype and strides of x."""
    return torch.empty_like(x).copy_(values)


# --- contract: x is [B, C, L], in memory so or as [B, L, C]; weight and bias are contiguous -----


def _fake_forward(x: Tensor, _weight: Tensor, _bias: Tensor, groups: int, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(2, x.shape[0], groups, dtype=wide(x))


def _fake_backward(
    _gradient: Tensor,
    x: Tensor,
    _weight: Tensor,
    _bias: Tensor,
    _statistics: Tensor,
    _activation: bool,
    wanted: list[bool],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x) if wanted[0] else x.new_empty(0)
    return dx, x.new_empty(sum(wanted[1:]), x.shape[1], dtype=dtype)


_forward = define(
    "group_norm_silu_fwd(Tensor x, Tensor weight, Tensor bias, int groups, float eps, bool activation)"
    " -> (Tensor out, Tensor statistics)",
    fake=_fake_forward,
    cpu=group_norm_silu_reference,
    cuda="srpo_kernels._triton.group_norm_silu:forward",
)
#: `gradient` has the strides of x. `wanted`: the gradients of x, weight and bias; `vectors` holds the last two, those
#: that are wanted, in `dtype`.
_backward = define(
    "group_norm_silu_bwd(Tensor gradient, Tensor x, Tensor weight, Tensor bias, Tensor statistics, bool activation, "
    "bool[] wanted, ScalarType dtype) -> (Tensor dx, Tensor vectors)",
    fake=_fake_backward,
    cpu=_backward_reference,
    cuda="srpo_kernels._triton.group_norm_silu:backward",
)


def _dense(x: Tensor) -> Tensor:
    """[B, C, ...] as [B, C, L], a view where x is contiguous or has its channels last; other layouts are copied."""
    if 0 < x.stride(1) < x.stride(-1):
        return x.movedim(1, -1).flatten(1, -2).contiguous().mT
    return x[..., None].flatten(2).contiguous()


# --- autograd ---------------------------------------------------------------------------------


class _GroupNormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, activation: bool) -> Tensor:
        out, statistics = _forward(x, weight, bias, groups, eps, activation)
        ctx.save_for_backward(x, weight, bias, statistics)
        ctx.activation = activation
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, statistics = ctx.saved_tensors  # once: checkpointing recomputes on the first access
        gradient = gradient.contiguous() if x.is_contiguous() else gradient.mT.contiguous().mT
        wanted, dtypes = list(ctx.needs_input_grad[:3]), (weight.dtype, bias.dtype)
        dx, vectors = _backward(
            gradient, x, weight, bias, statistics, ctx.activation, wanted, torch.promote_types(*dtypes)
        )
        return (dx if wanted[0] else None), *unpack(vectors, dtypes, wanted[1:]), None, None, None


# --- public function --------------------------------------------------------------------------


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float = 1e-6, activation: bool = True
) -> Tensor:
    """``silu(group_norm(x, num_groups, weight, bias, eps))``, or the norm alone.

    A group is ``C / num_groups`` neighbouring channels of one image:
    ``(x - mean) / sqrt(variance + eps) * weight + bias``, then ``y * sigmoid(y)``.

    Args:
        x: [B, C, ...]. Contiguous, or with its channels last (`torch.channels_last`, or a transposed [B, L, C]): no
            copy. Other layouts are copied.
        weight, bias: [C], of any floating dtype.
        num_groups: divides C.
        eps: added to the variance.
        activation: whether SiLU follows.

    Returns:
        A tensor shaped and typed as x, in x's layout, as its gradient is. Computed in fp32 (float64 for float64 x); the
        variance is not a difference of squares. Differentiable in x, weight and bias; backward needs these and two fp32
        numbers a group, and sums in a fixed order.

    Raises:
        TypeError: a tensor is not floating. ValueError: shapes, devices or the number of groups do not fit.
    """
    op = "group_norm_silu"
    check_floating(op, x=x, weight=weight, bias=bias)
    if x.ndim < 2:
        raise ValueError(f"{op}: x must be [B, C, ...], got {list(x.shape)}")
    channels = x.shape[1]
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector.shape != (channels,):
            raise ValueError(f"{op}: {name} must be [{channels}], got {list(vector.shape)}")
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"{op}: num_groups must divide {channels} channels, got {num_groups}")
    if math.prod(x.shape[2:]) >= 2**30:  # kernels count pixels in 32 bits, elements in 64
        raise ValueError(f"{op}: x must have fewer than 2**30 pixels an image, got {math.prod(x.shape[2:])}")
    out = _GroupNormSiLU.apply(_dense(x), weight.contiguous(), bias.contiguous(), num_groups, eps, activation)
    return out.reshape(x.shape)


describe(
    group_norm_silu,
    formula="silu(GN(x) weight + bias), or without silu",
    shapes="x [B, C, ...], weight and bias [C] -> [B, C, ...]",
    saved="two fp32 numbers per image and group: mean and 1 / deviation",
    floor="forward: read 2, write 1; backward: read 4, write 1",
    schemas=("group_norm_silu_fwd", "group_norm_silu_bwd"),
)
