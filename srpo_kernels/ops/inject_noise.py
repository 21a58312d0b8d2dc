"""Noise injection of Direct-Align (SRPO, arXiv 2509.06942): ``x_t = alpha x0 + sigma noise``.

In rectified flow alpha is ``1 - sigma``; in DDPM it is ``sqrt(alphas_cumprod)``, sigma ``sqrt(1 - alphas_cumprod)``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from srpo_kernels.ops._checks import branch_sigma, check_floating, check_row_size, resolve_noise
from srpo_kernels.ops._register import define, describe
from srpo_kernels.ops.noise_prior import NoisePrior

__all__ = ["inject_noise", "inject_noise_reference"]

# --- reference --------------------------------------------------------------------------------


def inject_noise_reference(x0: Tensor, noise: Tensor, sigma: Tensor, alpha: Tensor | None = None) -> Tensor:
    """x0 [B, N], noise [B or 1, N], sigma and alpha [B, K] -> [K, B, N] in x0's dtype, computed in fp32 or wider."""
    accumulate = torch.promote_types(x0.dtype, torch.float32)
    level, signal = (each.to(accumulate).T[..., None] for each in (sigma, _signal(sigma, alpha)))
    return (signal * x0.to(accumulate) + level * noise.to(accumulate)).to(x0.dtype).contiguous()


def _prior_reference(x0: Tensor, sigma: Tensor, alpha: Tensor | None, seed: int, offset: int, shared: bool) -> Tensor:
    noise = NoisePrior(seed, offset, shared).sample(tuple(x0.shape), device=x0.device)
    return inject_noise_reference(x0, noise, sigma, alpha)


def _signal(sigma: Tensor, alpha: Tensor | None) -> Tensor:
    """What x0 is multiplied by; None stands for rectified flow."""
    return 1 - sigma if alpha is None else alpha


def _branch_sum_reference(gradient: Tensor, weight: Tensor) -> Tensor:
    """gradient [K, B, N], weight [B, K] -> [B, N]: the sum over branches."""
    accumulate = torch.promote_types(gradient.dtype, torch.float32)
    return (weight.to(accumulate).T[..., None] * gradient.to(accumulate)).sum(0).to(gradient.dtype)


# --- contract ---------------------------------------------------------------------------------


def _fake(x0: Tensor, sigma: Tensor) -> Tensor:
    return x0.new_empty(sigma.shape[1], *x0.shape)


_forward = define(
    "inject_noise_fwd(Tensor x0, Tensor noise, Tensor sigma, Tensor? alpha) -> Tensor",
    fake=lambda x0, noise, sigma, alpha: _fake(x0, sigma),
    cpu=inject_noise_reference,
    cuda="srpo_kernels._triton.inject_noise:forward",
)
_forward_prior = define(
    "inject_noise_prior_fwd(Tensor x0, Tensor sigma, Tensor? alpha, int seed, int offset, bool shared) -> Tensor",
    fake=lambda x0, sigma, alpha, seed, offset, shared: _fake(x0, sigma),
    cpu=_prior_reference,
    cuda="srpo_kernels._triton.inject_noise:forward_prior",
)
_branch_sum = define(
    "branch_sum(Tensor gradient, Tensor weight) -> Tensor",
    fake=lambda gradient, weight: gradient.new_empty(gradient.shape[1:]),
    cpu=_branch_sum_reference,
    cuda="srpo_kernels._triton.inject_noise:branch_sum",
)


def noise_gradient(gradient: Tensor, weight: Tensor, *, shared: bool) -> Tensor:
    """gradient [K, B, N], weight [B, K] -> [B, N]; summed over images too, [1, N], when they share their noise."""
    if shared:  # images become branches of one image, so that nothing is rounded before the sum
        gradient, weight = gradient.flatten(0, 1)[:, None], weight.T.reshape(1, -1)
    return _branch_sum(gradient.contiguous(), weight.contiguous())


# --- autograd ---------------------------------------------------------------------------------


class _InjectNoise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x0: Tensor, noise: Tensor, sigma: Tensor, alpha: Tensor | None) -> Tensor:
        ctx.save_for_backward(sigma, alpha)
        ctx.noise_dtype, ctx.shared = noise.dtype, noise.shape[0] != x0.shape[0]
        return _forward(x0, noise, sigma, alpha)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        sigma, alpha = ctx.saved_tensors
        gradient = gradient.contiguous()  # its strides are unspecified
        dx0 = _branch_sum(gradient, _signal(sigma, alpha)) if ctx.needs_input_grad[0] else None
        dnoise = None
        if ctx.needs_input_grad[1]:
            dnoise = noise_gradient(gradient, sigma, shared=ctx.shared).to(ctx.noise_dtype)
        return dx0, dnoise, None, None


class _InjectNoisePrior(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x0: Tensor, sigma: Tensor, alpha: Tensor | None, seed: int, offset: int, shared: bool
    ) -> Tensor:
        ctx.save_for_backward(sigma, alpha)
        return _forward_prior(x0, sigma, alpha, seed, offset, shared)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        return _branch_sum(gradient.contiguous(), _signal(*ctx.saved_tensors)), None, None, None, None, None


# --- public function --------------------------------------------------------------------------


def inject_noise(
    x0: Tensor, noise: Tensor | NoisePrior, sigma: float | Tensor, *, alpha: float | Tensor | None = None
) -> Tensor:
    """Noisy images of K noise levels from one read of a clean batch.

    Args:
        x0: clean latents [B, ...], fp32, fp16 or bf16 (float64 for checking).
        noise: [B, ...] or one image [1, ...] shared by the batch; or a `NoisePrior`, drawn in the kernel.
        sigma: noise level in [0, 1]: a float, [B], or [B, K] for K branches. No gradient.
        alpha: what is left of x0, as sigma; default ``1 - sigma``, rectified flow. With it sigma may exceed 1.

    Returns:
        [K*B, ...] in x0's dtype, branch-major; computed in fp32. Differentiable in x0 and noise.

    Raises:
        TypeError: x0 or noise has another dtype. ValueError: shapes or devices do not fit, or a float sigma or
        alpha is out of range (values of tensors are not read, which would synchronise the device).
    """
    check_floating("inject_noise", x0=x0)
    if x0.ndim < 1:
        raise ValueError("inject_noise: x0 must have a batch dimension")
    check_row_size("inject_noise", "x0", x0)
    batch = x0.shape[0]
    levels = branch_sigma("inject_noise", "sigma", sigma, x0, bounded=alpha is None)
    signals = None
    if alpha is not None:
        signals = branch_sigma("inject_noise", "alpha", alpha, x0)
        if signals.shape[1] != levels.shape[1] and 1 not in (signals.shape[1], levels.shape[1]):
            raise ValueError(f"inject_noise: alpha has {signals.shape[1]} branches, but sigma {levels.shape[1]}")
        levels, signals = (each.contiguous() for each in torch.broadcast_tensors(levels, signals))
    flat = x0.flatten(1).contiguous() if x0.ndim > 1 else x0[:, None]
    if isinstance(noise, NoisePrior):
        out = _InjectNoisePrior.apply(flat, levels, signals, noise.seed, noise.offset, noise.shared)
    else:
        noise = resolve_noise("inject_noise", noise, "x0", x0, batch)
        flat_noise = noise.reshape(noise.shape[0], flat.shape[1]).contiguous()
        out = _InjectNoise.apply(flat, flat_noise, levels, signals)
    return out.reshape(levels.shape[1] * batch, *x0.shape[1:])


describe(
    inject_noise,
    formula="alpha x0 + sigma noise, alpha = 1 - sigma unless given",
    shapes="x0 [B, ...], noise [B or 1, ...] or NoisePrior, sigma and alpha [B, K] -> [K*B, ...]",
    saved="none",
    floor="forward: read 2 (1 with NoisePrior), write K; backward: read K, write 1 for each of x0, noise",
    schemas=("inject_noise_fwd", "inject_noise_prior_fwd", "branch_sum"),
)
