"""Closed-form recovery of Direct-Align (SRPO, arXiv 2509.06942), for any schedule ``x_t = alpha x0 + sigma e``.

One deterministic step (Euler's for a velocity, DDIM's, arXiv 2010.02502, for a predicted noise) leads from one level to
another, ``x_to = alpha_to x0_hat' + sigma_to e_hat``, where the known noise e takes the place of e_hat:

    x0_hat = (x_to - sigma_to e) / alpha_to

This is linear in x_t, the model's prediction and e (`_weights`). Of a velocity it comes to

    x0_hat = (x_t + (sigma_to - sigma_from) v - sigma_to e) / (1 - sigma_to)
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from srpo_kernels.latents import pack
from srpo_kernels.latents import unpack as unpack_tokens
from srpo_kernels.ops._checks import check_floating, check_row_size, resolve_noise, row_sigma
from srpo_kernels.ops._register import define, describe
from srpo_kernels.ops.inject_noise import noise_gradient
from srpo_kernels.ops.noise_prior import NoisePrior

__all__ = ["Prediction", "recover", "recover_reference"]

#: What the model predicts: rectified flow's e - x0, the noise e, or diffusers' alpha e - sigma x0.
Prediction = Literal["velocity", "epsilon", "v_prediction"]

# --- reference --------------------------------------------------------------------------------


def recover_reference(
    x_t: Tensor,
    noise: Tensor,
    predicted: Tensor,
    sigma_from: Tensor,
    sigma_to: Tensor,
    alpha_from: Tensor | None,
    alpha_to: Tensor | None,
    prediction: str,
    batch: int,
    size: list[int],
    scaling_factor: float,
    shift_factor: float,
) -> Tensor:
    """x_t and predicted [K*B, ...], noise [B or 1, ...], levels [K*B]; `size` is [] or the latent's [h, w]."""
    accumulate = torch.promote_types(x_t.dtype, torch.float32)
    injected = noise.to(accumulate).expand(batch, *x_t.shape[1:])
    injected = injected.repeat(x_t.shape[0] // max(batch, 1), *[1] * (x_t.ndim - 1))
    weights = _weights(sigma_from, sigma_to, alpha_from, alpha_to, prediction)
    of_x_t, of_predicted, of_noise = (_column(weight.to(accumulate), x_t) for weight in weights)
    x0_hat = of_x_t * x_t.to(accumulate) + of_predicted * predicted.to(accumulate) + of_noise * injected
    if size:
        x0_hat = unpack_tokens(x0_hat, *size).contiguous(memory_format=torch.channels_last)
    return (x0_hat / scaling_factor + shift_factor).to(x_t.dtype)


def _prior_reference(
    x_t: Tensor,
    predicted: Tensor,
    sigma_from: Tensor,
    sigma_to: Tensor,
    alpha_from: Tensor | None,
    alpha_to: Tensor | None,
    prediction: str,
    batch: int,
    seed: int,
    offset: int,
    shared: bool,
    *rest: Any,
) -> Tensor:
    noise = NoisePrior(seed, offset, shared).sample((batch, *x_t.shape[1:]), device=x_t.device)
    levels = (sigma_from, sigma_to, alpha_from, alpha_to)
    return recover_reference(x_t, noise, predicted, *levels, prediction, batch, *rest)


def _backward_reference(
    gradient: Tensor,
    sigma_from: Tensor,
    sigma_to: Tensor,
    alpha_from: Tensor | None,
    alpha_to: Tensor | None,
    prediction: str,
    size: list[int],
    scaling_factor: float,
    wrt: str,
) -> Tensor:
    """The gradient of "x_t" or of what was "predicted": the output's gradient times a number per row."""
    accumulate = torch.promote_types(gradient.dtype, torch.float32)
    of_x_t, of_predicted, _ = _weights(sigma_from, sigma_to, alpha_from, alpha_to, prediction)
    factor = (of_predicted if wrt == "predicted" else of_x_t).to(accumulate) / scaling_factor
    packed = pack(gradient) if size else gradient
    return (packed.to(accumulate) * _column(factor, packed)).to(gradient.dtype)


def _weights(
    sigma_from: Tensor, sigma_to: Tensor, alpha_from: Tensor | None, alpha_to: Tensor | None, prediction: str
) -> tuple[Tensor, Tensor, Tensor]:
    """What x_t, the prediction and the noise are multiplied by in x0_hat, shaped as the levels."""
    if alpha_from is None or alpha_to is None:  # of a velocity they are 1 - sigma
        return 1 / (1 - sigma_to), (sigma_to - sigma_from) / (1 - sigma_to), -sigma_to / (1 - sigma_to)
    left = sigma_to / alpha_to
    if prediction == "epsilon":
        return 1 / alpha_from, left - sigma_from / alpha_from, -left
    return alpha_from + left * sigma_from, left * alpha_from - sigma_from, -left


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


_LEVELS = "Tensor sigma_from, Tensor sigma_to, Tensor? alpha_from, Tensor? alpha_to, str prediction"

_forward = define(
    f"recover_fwd(Tensor x_t, Tensor noise, Tensor predicted, {_LEVELS}, int batch, {_ARGUMENTS}) -> Tensor",
    fake=lambda x_t, noise, predicted, s_f, s_t, a_f, a_t, prediction, batch, size, *scale: _fake(x_t, size),
    cpu=recover_reference,
    cuda="srpo_kernels._triton.recover:forward",
)
_forward_prior = define(
    f"recover_prior_fwd(Tensor x_t, Tensor predicted, {_LEVELS}, int batch, int seed, int offset, bool shared, "
    f"{_ARGUMENTS}) -> Tensor",
    fake=lambda x_t, predicted, s_f, s_t, a_f, a_t, prediction, batch, seed, offset, shared, size, *scale: _fake(
        x_t, size
    ),
    cpu=_prior_reference,
    cuda="srpo_kernels._triton.recover:forward_prior",
)
_backward = define(
    f"recover_bwd(Tensor gradient, {_LEVELS}, int[] size, float scaling_factor, str wrt) -> Tensor",
    fake=lambda gradient, s_f, s_t, a_f, a_t, prediction, size, scaling_factor, wrt: _fake_backward(gradient, size),
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
        predicted: Tensor,
        sigma_from: Tensor,
        sigma_to: Tensor,
        alpha_from: Tensor | None,
        alpha_to: Tensor | None,
        prediction: str,
        batch: int,
        size: list[int],
        scaling_factor: float,
        shift_factor: float,
    ) -> Tensor:
        levels = (sigma_from, sigma_to, alpha_from, alpha_to)
        ctx.save_for_backward(*levels)
        ctx.prediction, ctx.batch, ctx.size, ctx.scaling_factor = prediction, batch, size, scaling_factor
        ctx.predicted_dtype = predicted.dtype
        latent = (size, scaling_factor, shift_factor)
        if isinstance(noise, tuple):
            return _forward_prior(x_t, predicted, *levels, prediction, batch, *noise, *latent)
        ctx.noise_shape, ctx.noise_dtype = noise.shape, noise.dtype
        return _forward(x_t, noise, predicted, *levels, prediction, batch, *latent)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # Once: checkpointing recomputes on the first access and refuses a second.
        sigma_from, sigma_to, alpha_from, alpha_to = levels = ctx.saved_tensors
        layout = torch.channels_last if ctx.size else torch.contiguous_format
        gradient = gradient.contiguous(memory_format=layout)  # its strides are unspecified

        def scaled(wrt: str) -> Tensor:
            return _backward(gradient, *levels, ctx.prediction, ctx.size, ctx.scaling_factor, wrt)

        dx_t = scaled("x_t") if ctx.needs_input_grad[0] else None
        dnoise = None
        if ctx.needs_input_grad[1]:
            _, _, of_noise = _weights(sigma_from, sigma_to, alpha_from, alpha_to, ctx.prediction)
            weight = (of_noise / ctx.scaling_factor).unflatten(0, (-1, ctx.batch)).T
            rows = (pack(gradient) if ctx.size else gradient).reshape(weight.shape[1], ctx.batch, -1)
            dnoise = noise_gradient(rows, weight, shared=ctx.noise_shape[0] != ctx.batch)
            dnoise = dnoise.reshape(ctx.noise_shape).to(ctx.noise_dtype)
        dpredicted = scaled("predicted").to(ctx.predicted_dtype) if ctx.needs_input_grad[2] else None
        return dx_t, dnoise, dpredicted, *[None] * 9


# --- public function --------------------------------------------------------------------------


def recover(
    x_t: Tensor,
    noise: Tensor | NoisePrior,
    velocity: Tensor,
    sigma_from: float | Tensor,
    sigma_to: float | Tensor,
    *,
    alpha_from: float | Tensor | None = None,
    alpha_to: float | Tensor | None = None,
    prediction: Prediction = "velocity",
    unpack: tuple[int, int] | None = None,
    scaling_factor: float = 1.0,
    shift_factor: float = 0.0,
) -> Tensor:
    """Clean images recovered in one pass from noisy ones and the model's prediction.

    Args:
        x_t: noisy latents [K*B, ...], as `inject_noise` returns them; fp32, fp16 or bf16 (float64 for checking).
        noise: the injected noise: [B, ...], [1, ...], or the `NoisePrior` it was drawn from.
        velocity: the model's prediction, whatever its kind; shape of x_t.
        sigma_from, sigma_to: noise levels before and after the step: a float, [K*B] (one branch per row, so B = K*B),
            or [B, K]. sigma_to must be below 1. No gradient.
        alpha_from, alpha_to: what is left of x0 at these levels, in the same forms; above 0, alpha_from of a
            v_prediction apart. Both are needed, and taken, unless the model predicts a velocity, whose are 1 - sigma.
        prediction: "velocity", rectified flow's e - x0; "epsilon", the noise; or "v_prediction", alpha_from e -
            sigma_from x0, for levels with alpha^2 + sigma^2 = 1. The last two are stepped as diffusers'
            `DDIMScheduler` does without noise, where alpha = sqrt(alphas_cumprod).
        unpack: latent size (h, w): x_t holds packed tokens [K*B, h*w/4, 4C], the result VAE latents [K*B, C, h, w] in
            channels_last.
        scaling_factor, shift_factor: the VAE's latent scale: the result is ``x0_hat / scaling_factor + shift_factor``.

    Returns:
        [K*B, ...] (or [K*B, C, h, w]) in x_t's dtype; computed in fp32. Differentiable in x_t, noise and the
        prediction: ``d x0_hat / d v = (sigma_to - sigma_from) / (1 - sigma_to)`` for a velocity, and ``sigma_to /
        alpha_to - sigma_from / alpha_from`` for an epsilon. Nothing but the levels is kept for backward.

    Raises:
        TypeError: an argument has another dtype. ValueError: shapes, devices or levels do not fit, or an
            unknown prediction.
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
    levels, branches = _row_levels(x_t, sigma_from, sigma_to, alpha_from, alpha_to, prediction)
    batch = x_t.shape[0] // branches
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
        *levels,
        prediction,
        batch,
        fused,
        float(scaling_factor),
        float(shift_factor),
    )
    if unpack is not None and not fused:
        out = unpack_tokens(out, *unpack).contiguous(memory_format=torch.channels_last)
    return out


def _row_levels(
    x_t: Tensor,
    sigma_from: float | Tensor,
    sigma_to: float | Tensor,
    alpha_from: float | Tensor | None,
    alpha_to: float | Tensor | None,
    prediction: str,
) -> tuple[list[Tensor | None], int]:
    """The levels, checked, one per row of x_t, and the number of branches."""
    if prediction not in get_args(Prediction):
        raise ValueError(f"recover: prediction must be one of {get_args(Prediction)}, got {prediction!r}")
    rectified = prediction == "velocity"
    for name, alpha in (("alpha_from", alpha_from), ("alpha_to", alpha_to)):
        if (alpha is None) != rectified:
            wanted = "must be None, as the alpha of a velocity is 1 - sigma" if rectified else "must be given"
            raise ValueError(f"recover: {name} {wanted} with prediction={prediction!r}")
    if rectified and not isinstance(sigma_to, Tensor) and sigma_to >= 1.0:
        raise ValueError(f"recover: sigma_to must be below 1 (nothing of the image is left at 1), got {sigma_to}")
    divisors = {"alpha_to": alpha_to, "alpha_from": alpha_from if prediction == "epsilon" else None}
    for name, alpha in divisors.items():
        if isinstance(alpha, float | int) and alpha <= 0.0:
            raise ValueError(f"recover: {name} must be above 0 (nothing of the image is left at 0), got {alpha}")
    given = dict(sigma_from=sigma_from, sigma_to=sigma_to, alpha_from=alpha_from, alpha_to=alpha_to)
    levels: list[Tensor | None] = []
    other, branches = "sigma_from", 1
    for name, level in given.items():
        if level is None:
            levels.append(None)
            continue
        rows, count = row_sigma("recover", name, level, x_t, bounded=rectified)
        if 1 not in (count, branches) and count != branches:
            raise ValueError(f"recover: {name} has {count} branches, but {other} {branches}")
        if count > branches:
            other, branches = name, count
        levels.append(rows)
    return levels, branches


describe(
    recover,
    formula="(x_t + (sigma_to - sigma_from) v - sigma_to noise) / (1 - sigma_to) / scaling_factor + shift_factor; "
    "of a predicted noise e_hat: x_t / alpha_from + (sigma_to / alpha_to - sigma_from / alpha_from) e_hat - sigma_to / "
    "alpha_to noise",
    shapes="x_t, velocity [K*B, ...], noise [B or 1, ...] or NoisePrior -> [K*B, ...]; unpack=(h, w): [K*B, h*w/4, 4C] "
    "-> [K*B, C, h, w] channels_last",
    saved="none (the levels)",
    floor="forward: read 3 (2 with NoisePrior), write 1; backward: read 1, write 1 for each of velocity, x_t, noise",
    schemas=("recover_fwd", "recover_prior_fwd", "recover_bwd"),
)
