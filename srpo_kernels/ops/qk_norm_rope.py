"""RMSNorm of every head of q and k, then the rotary embedding of FLUX, in one pass.

The operators take one stream of tokens or two, text before image, for `joint_qk_norm_rope`: [q, k] or [text q, text k,
image q, image k]; their weights in the same order; the values [] or [text v, image v].
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor

from srpo_kernels.ops._checks import check_floating
from srpo_kernels.ops._register import define, describe

__all__ = ["QkNormRope", "check_arguments", "qk_norm_rope", "weight_dtype"]

# --- reference --------------------------------------------------------------------------------


def _turn(x: Tensor) -> Tensor:
    """(x0, x1) -> (x1, -x0) for every pair of neighbours."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([odd, -even], -1).flatten(-2)


def _unit(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x over its root mean square, and one over that, in fp32 or wider."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * rstd, rstd


def _places(inputs: list[Tensor]) -> list[tuple[int, slice]]:
    """Of every input: which of q and k it is, 0 or 1, and its tokens' place in the joint sequence."""
    places, start = [], 0
    for stream in inputs[::2]:
        stop = start + stream.shape[1]
        places += [(0, slice(start, stop)), (1, slice(start, stop))]
        start = stop
    return places


def _reference(
    inputs: list[Tensor], values: list[Tensor], weights: list[Tensor], cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Joint q, k and v, each [B, S, H, D]; no values: an empty v."""
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for (index, place), x, weight in zip(_places(inputs), inputs, weights, strict=True):
        unit, _ = _unit(x, eps)
        y = unit * weight.to(unit.dtype)
        rotated = y * cos[place, None].to(y.dtype) - _turn(y) * sin[place, None].to(y.dtype)
        parts[index].append(rotated.to(inputs[index].dtype))
    v = torch.cat([value.to(values[0].dtype) for value in values], 1) if values else cos.new_empty(0)
    return torch.cat(parts[0], 1), torch.cat(parts[1], 1), v


def _backward_reference(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor | None,
    inputs: list[Tensor],
    weights: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    eps: float,
    wanted: list[bool],
    weights_wanted: bool,
) -> tuple[Tensor, ...]:
    """Gradients of the inputs that are `wanted`, others empty; dv in two, if given; of the weights as [2 or 4, D]."""
    outs, sums = [cos.new_empty(0) for _ in range(4)], []
    for number, ((index, place), x, weight) in enumerate(zip(_places(inputs), inputs, weights, strict=True)):
        unit, rstd = _unit(x, eps)
        dout = (dq, dk)[index][:, place].to(unit.dtype)
        dy = dout * cos[place, None].to(unit.dtype) + _turn(dout * sin[place, None].to(unit.dtype))
        sums.append((dy * unit).sum((0, 1, 2)))
        dunit = dy * weight.to(unit.dtype)
        dx = (dunit - unit * (dunit * unit).mean(-1, keepdim=True)) * rstd
        outs[number] = dx.to(x.dtype).contiguous() if wanted[number] else x.new_empty(0)
    parts = [cos.new_empty(0)] * 2 if dv is None else dv.split([x.shape[1] for x in inputs[::2]], 1)
    outs += [part.clone(memory_format=torch.contiguous_format) for part in parts]
    dtype = weight_dtype(weights)
    return *outs, torch.stack(sums).to(dtype) if weights_wanted else cos.new_empty(0, dtype=dtype)


# --- contract ---------------------------------------------------------------------------------


def weight_dtype(weights: list[Tensor]) -> torch.dtype:
    """What the weights' gradients are summed into: a weight's own dtype, or wider where the weights' differ."""
    return reduce(torch.promote_types, (weight.dtype for weight in weights))


def _fake_forward(
    inputs: list[Tensor], values: list[Tensor], _weights: list[Tensor], cos: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    shape = (inputs[0].shape[0], cos.shape[0], *inputs[0].shape[2:])
    q, k = (x.new_empty(shape) for x in inputs[:2])
    return q, k, values[0].new_empty(shape) if values else cos.new_empty(0)


def _fake_backward(
    _dq: Tensor, _dk: Tensor, dv: Tensor | None, inputs: list[Tensor], weights: list[Tensor], cos: Tensor,
    _sin: Tensor, _eps: float, wanted: list[bool], weights_wanted: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    outs = [x.new_empty(x.shape if want else 0) for x, want in zip(inputs, wanted, strict=True)]
    outs += [cos.new_empty(0) for _ in range(4 - len(outs))]
    outs += [cos.new_empty(0) for _ in range(2)] if dv is None else [dv.new_empty(x.shape) for x in inputs[::2]]
    shape = (len(weights), cos.shape[1]) if weights_wanted else 0
    return *outs, cos.new_empty(shape, dtype=weight_dtype(weights))


_forward = define(
    "qk_norm_rope_fwd(Tensor[] inputs, Tensor[] values, Tensor[] weights, Tensor cos, Tensor sin, float eps)"
    " -> (Tensor q, Tensor k, Tensor v)",
    fake=_fake_forward,
    cpu=_reference,
    cuda="srpo_kernels._triton.qk_norm_rope:forward",
)
_backward = define(
    "qk_norm_rope_bwd(Tensor dq, Tensor dk, Tensor? dv, Tensor[] inputs, Tensor[] weights, Tensor cos, Tensor sin,"
    " float eps, bool[] wanted, bool weights_wanted)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor dtext_v, Tensor dimage_v, Tensor dweights)",
    fake=_fake_backward,
    cpu=_backward_reference,
    cuda="srpo_kernels._triton.qk_norm_rope:backward",
)

# --- autograd ---------------------------------------------------------------------------------


class QkNormRope(torch.autograd.Function):
    """(cos, sin, eps, *inputs, *weights, *values) -> q, k and v; there are 2 inputs and no values, or 4 and 2."""

    @staticmethod
    def forward(ctx: Any, cos: Tensor, sin: Tensor, eps: float, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count = 2 if len(tensors) == 4 else 4
        inputs, weights, values = list(tensors[:count]), list(tensors[count : 2 * count]), list(tensors[2 * count :])
        ctx.save_for_backward(cos, sin, *inputs, *weights)
        ctx.eps, ctx.value_dtypes = eps, [value.dtype for value in values]
        return _forward(inputs, values, weights, cos, sin, eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, *tensors = ctx.saved_tensors
        count = len(tensors) // 2
        inputs, weights = tensors[:count], tensors[count:]
        wanted, weights_wanted, values_wanted = (
            list(ctx.needs_input_grad[3 + start : 3 + start + count]) for start in (0, count, 2 * count)
        )
        outs: list[Tensor | None] = [None for _ in tensors]
        parts = dv.split([x.shape[1] for x in inputs[::2]], 1) if any(values_wanted) else ()
        # Of one image they are contiguous. Of several they are written along with the rest.
        split = dv if parts and not (dv.shape[0] == 1 and dv.is_contiguous()) else None
        if any(wanted) or any(weights_wanted) or split is not None:
            *gradients, dtext_v, dimage_v, dweights = _backward(
                dq, dk, split, inputs, weights, cos, sin, ctx.eps, wanted, any(weights_wanted)
            )
            parts = parts if split is None else (dtext_v, dimage_v)
            for index, want in enumerate(wanted):
                outs[index] = gradients[index] if want else None
            for index, want in enumerate(weights_wanted):
                outs[count + index] = dweights[index].to(weights[index].dtype) if want else None
        for index, want in enumerate(values_wanted):
            outs.append(parts[index].to(ctx.value_dtypes[index]) if want else None)
        return None, None, None, *outs


# --- public function --------------------------------------------------------------------------


def check_arguments(
    op: str, streams: list[dict[str, Tensor]], weights: dict[str, Tensor], cos: Tensor, sin: Tensor
) -> None:
    """Raise `TypeError` or `ValueError` unless streams of [B, S, H, D], weights [D] and angles [sum of S, D] fit."""
    tensors = {name: tensor for stream in streams for name, tensor in stream.items()}
    check_floating(op, **tensors, **weights, cos=cos, sin=sin)
    first, like = next(iter(tensors.items()))
    if like.ndim != 4:
        raise ValueError(f"{op}: {first} must be [B, S, H, D], got {list(like.shape)}")
    batch, _, heads, width = like.shape
    if width % 2 or not 2 <= width <= 256:
        raise ValueError(f"{op}: {first} must have heads of an even width from 2 to 256, got {width}")
    sequence = 0
    for stream in streams:
        shape = next(iter(stream.values())).shape
        length = shape[1] if len(shape) == 4 else "S"
        for name, tensor in stream.items():
            if tuple(tensor.shape) != (batch, length, heads, width):
                raise ValueError(
                    f"{op}: {name} must be [{batch}, {length}, {heads}, {width}], got {list(tensor.shape)}"
                )
        sequence += shape[1]
    if batch * sequence * heads >= 2**30:
        raise ValueError(
            f"{op}: {first} must have fewer than 2**30 heads in all tokens, got {batch * sequence * heads}"
        )
    for name, tensor in weights.items():
        if tuple(tensor.shape) != (width,):
            raise ValueError(f"{op}: {name} must be [{width}], got {list(tensor.shape)}")
    for name, tensor in (("cos", cos), ("sin", sin)):
        if tuple(tensor.shape) != (sequence, width):
            raise ValueError(f"{op}: {name} must be [{sequence}, {width}], got {list(tensor.shape)}")
        if tensor.requires_grad:
            raise ValueError(f"{op}: {name} must not require a gradient: there is none for it")


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """RMSNorm of every head, then the rotary embedding, of q and k.

    With ``y = x / sqrt(mean(x^2) + eps) * weight`` over a head, neighbours 2i and 2i + 1 become
    ``y[2i] cos[2i] - y[2i+1] sin[2i]`` and ``y[2i+1] cos[2i+1] + y[2i] sin[2i+1]``, as in `torch.nn.RMSNorm` and
    diffusers' ``apply_rotary_emb(..., use_real_unbind_dim=-1, sequence_dim=1)``, with no rounding between them.

    Args:
        q, k: [B, S, H, D], fp32, fp16 or bf16 (float64 for checking); D even, at most 256. Views whose last dimension
            is contiguous, such as slices of a fused projection, are read in place if q and k share their strides.
        q_weight, k_weight: [D].
        cos, sin: [S, D], no gradient.
        eps: added to the mean square.

    Returns:
        (q, k), contiguous, in the dtypes of q and k; computed in fp32. Differentiable in q, k and the weights; backward
        needs only the inputs.

    Raises:
        TypeError: an argument is not floating. ValueError: shapes or devices do not fit, D is odd or too large, or cos
        or sin requires a gradient.
    """
    check_arguments("qk_norm_rope", [{"q": q, "k": k}], {"q_weight": q_weight, "k_weight": k_weight}, cos, sin)
    q, k, _ = QkNormRope.apply(
        cos.contiguous(), sin.contiguous(), eps, q, k, q_weight.contiguous(), k_weight.contiguous()
    )
    return q, k


describe(
    qk_norm_rope,
    formula="rotate(x / sqrt(mean(x^2) + eps) * weight, cos, sin) for every head of q and k",
    shapes="q, k [B, S, H, D], weights [D], cos and sin [S, D] -> q, k [B, S, H, D]",
    saved="none",
    floor="forward: read 1, write 1; backward: read 2, write 1 (for each of q, k)",
    schemas=("qk_norm_rope_fwd", "qk_norm_rope_bwd"),
)
