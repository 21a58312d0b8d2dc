"""Closed-form recovery of Direct-Align (SRPO, arXiv 2509.06942).

From ``x_t = (1 - s_from) x0 + s_from e`` and a predicted velocity v, one Euler step leads to s_to, and the known noise
left there is removed:

    x0_hat = (x_t + (s_to - s_from) v - s_to e) / (1 - s_to)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from srpo_kernels.latents import pack
from srpo_kernels.latents import unpack as unpack_tokens
from srpo_kernels.ops._checks import check_floating, check_row_size, resolve_noise, row_sigma
from srpo_kernels.ops._register import define, describe
from srpo_kernels.ops.inject_noise import noise_gradient
from srpo_kernels.ops.noise_prior import NoisePrior

__all__ = ["recover", "recover_reference"]

# --- reference --------------------------------------------------------------------------------


def recover_reference(
    x_t: Tensor,
    noise: Tensor,
    velocity: Tensor,
    sigma_from: Tensor,
    sigma_to: Tensor,
    batch: int,
    size: list[int],
    scaling_factor: float,
    shift_factor: float,
) -> Tensor:
    """x_t and velocity [K*B, ...], noise [B or 1, ...], sigmas [K*B]; `size` is [] or the latent's [h, w]."""
    accumulate = torch.promote_types(x_t.dtype, torch.float32)
    start, end = (_column(sigma.to(accumulate), x_t) for sigma in (sigma_from, sigma_to))
    injected = noise.to(accumulate).expand(batch, *x_t.shape[1:])
    injected = injected.repeat(x_t.shape[0] // max(batch, 1), *[1] * (x_t.ndim - 1))
    x0_hat = (x_t.to(accumulate) + (end - start) * velocity.to(accumulate) - end * injected) / (1 - end)
    if size:
        x0_hat = unpack_tokens(x0_hat, *size).contiguous(memory_format=torch.channels_last)
    return (x0_hat / scaling_factor + shift_factor).to(x_t.dtype)


def _prior_reference(
    x_t: Tensor,
    velocity: Tensor,
    sigma_from: Tensor,
    sigma_to: Tensor,
    batch: int,
    seed: int,
    offset: int,
    shared: bool,
    *rest: Any,
) -> Tensor:
    noise = NoisePrior(seed, offset, shared).sample((batch, *x_t.shape[1:]), device=x_t.device)
    return recover_reference(x_t, noise, velocity, sigma_from, sigma_to, batch, *rest)


def _backward_reference(
    gradient: Tensor, sigma_from: Tensor, sigma_to: Tensor, size: list[int], scaling_factor: float, wrt: str
) -> Tensor:
    """The gradient of "x_t" or "velocity": the output's gradient times a number per row."""
    accumulate = torch.promote_types(gradient.dtype, torch.float32)
    start, end = sigma_from.to(accumulate), sigma_to.to(accumulate)
    factor = (end - start if wrt == "velocity" else 1) / ((1 - end) * scaling_factor)
    packed = pack(gradient) if size else gradient
    return (packed.to(accumulate) * _column(factor, packed)).to(gradient.dtype)


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1))


# --- contract ---------------------------------------------------------------------------------

_ARGUMENTS = "int[] size, float scaling_factor, float shift_factor"


def _fake(x_t: Tensor, size: list[int]) -> Tensor:
    if not size:
        return x_t.new_empty(x_t.shape)
    return x_t.new_empty(x_t.shape[0], *size, x_t.shape[2] // 4).permute(0, 3, 1, 2)


def _fake_backward(gradient: Tensor, size: list[int]) -> Tensor:
    if not size:
        return gradient.new_empty(gradient.shape)
    return gradient.new_empty(gradient.shape[0], size[0] * size[1] // 4, 4 * gradient.shape[1])


_forward = define(
    "recover_fwd(Tensor x_t, Tensor noise, Tensor velocity, Tensor sigma_from, Tensor sigma_to, int batch, "
    f"{_ARGUMENTS}) -> Tensor",
    fake=lambda x_t, noise, velocity, sigma_from, sigma_to, batch, size, scaling_factor, shift_factor: _fake(x_t, size),
    cpu=recover_reference,
    cuda="srpo_kernels._triton.recover:forward",
)
_forward_prior = define(
    "recover_prior_fwd(Tensor x_t, Tensor velocity, Tensor sigma_from, Tensor sigma_to, int batch, int seed, "
    f"int offset, bool shared, {_ARGUMENTS}) -> Tensor",
    fake=lambda x_t, velocity, sigma_from, sigma_to, batch, seed, offset, shared, size, scaling_factor, shift_factor: (
        _fake(x_t, size)
    ),
    cpu=_prior_reference,
    cuda="srpo_kernels._triton.recover:forward_prior",
)
_backward = define(
    "recover_bwd(Tensor gradient, Tensor sigma_from, Tensor sigma_to, int[] size, float scaling_factor, str wrt) "
    "-> Tensor",
    fake=lambda gradient, sigma_from, sigma_to, size, scaling_factor, wrt: _fake_backward(gradient, size),
    cpu=_backward_reference,
    cuda="srpo_kernels._triton.recover:backward",
)

# --- autograd ---------------------------------------------------------------------------------


class _Recover(torch.autograd.Function):
    """`noise` is a tensor, or the (seed, offset, shared) of a prior."""

    @staticmethod
    def forward(
        ctx: Any,
        x_t: Tensor,
        noise: Tensor | tuple[int, int, bool],
        velocity: Tensor,
        sigma_from: Tensor,
        sigma_to: Tensor,
        batch: int,
        size: list[int],
        scaling_factor: float,
        shift_factor: float,
    ) -> Tensor:
        ctx.save_for_backward(sigma_from, sigma_to)
        ctx.batch, ctx.size, ctx.scaling_factor = batch, size, scaling_factor
        ctx.velocity_dtype = velocity.dtype
        rest = (sigma_from, sigma_to, batch)
        latent = (size, scaling_factor, shift_factor)
        if isinstance(noise, tuple):
            return _forward_prior(x_t, velocity, *rest, *noise, *latent)
        ctx.noise_shape, ctx.noise_dtype = noise.shape, noise.dtype
        return _forward(x_t, noise, velocity, *rest, *latent)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        start, end = ctx.saved_tensors  # once: checkpointing recomputes on the first access and refuses a second
        layout = torch.channels_last if ctx.size else torch.contiguous_format
        gradient = gradient.contiguous(memory_format=layout)  # its strides are unspecified

        def scaled(wrt: str) -> Tensor:
            return _backward(gradient, start, end, ctx.size, ctx.scaling_factor, wrt)

        dx_t = scaled("x_t") if ctx.needs_input_grad[0] else None
        dnoise = None
        if ctx.needs_input_grad[1]:
            weight = (-end / ((1 - end) * ctx.scaling_factor)).unflatten(0, (-1, ctx.batch)).T
            rows = (pack(gradient) if ctx.size else gradient).reshape(weight.shape[1], ctx.batch, -1)
            dnoise = noise_gradient(rows, weight, shared=ctx.noise_shape[0] != ctx.batch)
            dnoise = dnoise.reshape(ctx.noise_shape).to(ctx.noise_dtype)
        dvelocity = scaled("velocity").to(ctx.velocity_dtype) if ctx.needs_input_grad[2] else None
        return dx_t, dnoise, dvelocity, *[None] * 6


# --- public function --------------------------------------------------------------------------


def recover(
    x_t: Tensor,
    noise: Tensor | NoisePrior,
    velocity: Tensor,
    sigma_from: float | Tensor,
    sigma_to: float | Tensor,
    *,
    unpack: tuple[int, int] | None = None,
    scaling_factor: float = 1.0,
    shift_factor: float = 0.0,
) -> Tensor:
    """Clean images recovered in one pass from noisy ones and the model's velocity.

    Args:
        x_t: noisy latents [K*B, ...], as `inject_noise` returns them; fp32, fp16 or bf16 (float64 for checking).
        noise: the injected noise: [B, ...], [1, ...], or the `NoisePrior` it was drawn from.
        velocity: the model's prediction, shape of x_t.
        sigma_from, sigma_to: noise levels before and after the step: a float, [K*B] (one branch per row, so B = K*B),
            or [B, K]. sigma_to must be below 1. No gradient.
        unpack: latent size (h, w): x_t holds packed tokens [K*B, h*w/4, 4C], the result VAE latents [K*B, C, h, w] in
            channels_last.
        scaling_factor, shift_factor: the VAE's latent scale: the result is ``x0_hat / scaling_factor + shift_factor``.

    Returns:
        [K*B, ...] (or [K*B, C, h, w]) in x_t's dtype; computed in fp32. Differentiable in x_t, noise and velocity:
        ``d x0_hat / d v = (sigma_to - sigma_from) / (1 - sigma_to)``. Nothing but the sigmas is kept for backward.

    Raises:
        TypeError: an argument has another dtype. ValueError: shapes, devices or noise levels do not fit.
    """
    check_floating("recover", x_t=x_t, velocity=velocity)
    if x_t.ndim < 1:
        raise ValueError("recover: x_t must have a batch dimension")
    check_row_size("recover", "x_t", x_t)
    if velocity.shape != x_t.shape:
        raise ValueError(f"recover: velocity must have x_t's shape {list(x_t.shape)}, got {list(velocity.shape)}")
    if unpack is not None:
        fits = x_t.ndim == 3 and x_t.shape[1] * 4 == unpack[0] * unpack[1] and x_t.shape[2] % 4 == 0
        if not fits or unpack[0] % 2 or unpack[1] % 2:
            raise ValueError(
                f"recover: unpack={unpack} needs x_t of [B, h*w/4, 4C], h and w even, got {list(x_t.shape)}"
            )
    if not isinstance(sigma_to, Tensor) and sigma_to >= 1.0:
        raise ValueError(f"recover: sigma_to must be below 1 (nothing of the image is left at 1), got {sigma_to}")
    start, branches = row_sigma("recover", "sigma_from", sigma_from, x_t)
    end, others = row_sigma("recover", "sigma_to", sigma_to, x_t)
    if branches != others and 1 not in (branches, others):
        raise ValueError(f"recover: sigma_to has {others} branches, but sigma_from {branches}")
    batch = x_t.shape[0] // max(branches, others)
    source: Tensor | tuple[int, int, bool]
    if isinstance(noise, NoisePrior):
        source = (noise.seed, noise.offset, noise.shared)
    else:
        source = resolve_noise("recover", noise, "x_t", x_t, batch).contiguous()
    channels = x_t.shape[2] // 4 if unpack is not None else 1
    # The kernel permutes whole tokens in registers, which needs a power of two of channels (FLUX: 16).
    fused = list(unpack) if unpack is not None and channels & (channels - 1) == 0 else []
    out = _Recover.apply(
        x_t.contiguous(),
        source,
        velocity.contiguous(),
        start,
        end,
        batch,
        fused,
        float(scaling_factor),
        float(shift_factor),
    )
    if unpack is not None and not fused:
        out = unpack_tokens(out, *unpack).contiguous(memory_format=torch.channels_last)
    return out


describe(
    recover,
    formula="(x_t + (sigma_to - sigma_from) v - sigma_to noise) / (1 - sigma_to) / scaling_factor + shift_factor",
    shapes="x_t, velocity [K*B, ...], noise [B or 1, ...] or NoisePrior -> [K*B, ...]; unpack=(h, w): [K*B, h*w/4, 4C] "
    "-> [K*B, C, h, w] channels_last",
    saved="none (the sigmas)",
    floor="forward: read 3 (2 with NoisePrior), write 1; backward: read 1, write 1 for each of velocity, x_t, noise",
    schemas=("recover_fwd", "recover_prior_fwd", "recover_bwd"),
)
