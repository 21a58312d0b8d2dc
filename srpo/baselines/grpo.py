"""The formulas of DanceGRPO (arXiv 2505.07818): the SDE of a rectified flow, its transitions, the clipped objective."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["clipped_loss", "group_advantages", "log_probability", "transition"]


def transition(x: Tensor, velocity: Tensor, sigma: Tensor, following: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """Mean [B, ...] and standard deviation [B] of the next state, of the SDE with the flow's own marginals.

    ``dx = (v - eta^2 score / 2) dsigma + eta dW``, where the flow's score is ``-(x - (1 - sigma) x0) / sigma^2`` at the
    predicted ``x0 = x - sigma v``. One Euler-Maruyama step from levels `sigma` to `following` [B].
    """
    level, step = (_rows(each, x) for each in (sigma, following - sigma))
    score = -(x - (1 - level) * (x - level * velocity)) / level**2
    return x + (velocity - eta**2 / 2 * score) * step, eta * (sigma - following).sqrt()


def log_probability(state: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Log-density [B] of `state` [B, ...] under a normal of `deviation` [B], its mean over an image's elements.

    Of the mean, not of the sum: so published, and what `clip_range` is for.
    """
    spread = _rows(deviation, state)
    density = -(((state - mean) / spread) ** 2) / 2 - spread.log() - math.log(2 * math.pi) / 2
    return density.flatten(1).mean(1)


def group_advantages(rewards: Tensor, clip: float) -> Tensor:
    """Rewards [G, B] of G images of each of B prompts, in standard deviations (of G - 1) from the prompt's mean."""
    spread = rewards.std(0) + 1e-8
    return ((rewards - rewards.mean(0)) / spread).clamp(-clip, clip)


def clipped_loss(log_new: Tensor, log_old: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """``max(-A r, -A clip(r, 1 - c, 1 + c))`` [B] of the ratio r of probabilities, new to old."""
    ratio = (log_new - log_old).exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))


def _rows(values: Tensor, like: Tensor) -> Tensor:
    """Values [B] to multiply with [B, ...]."""
    return values.reshape(-1, *[1] * (like.ndim - 1))
