"""The SRPO objective: Direct-Align recovery scored by Semantic Relative Preference (arXiv 2509.06942).

`branches` turns one timestep draw into a denoise and an inversion branch, `srpo_loss` sends both
through the model, the decoder and the reward in one batched call each. A recipe's numbers are the
fields of `SRPOConfig`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from srpo_kernels import checkpointed_reward, inject_noise, recover
from srpo_kernels.ops.recover import Prediction

__all__ = [
    "Branch",
    "LatentLayout",
    "RelativeReward",
    "SRPOConfig",
    "SRPOOutput",
    "branches",
    "draw_timestep",
    "penalties",
    "srpo_loss",
    "with_control",
]

Form = Literal["official", "difference", "cfg", "image_only"]


@dataclass(frozen=True)
class SRPOConfig:
    """Every number of an SRPO recipe. Defaults are the official HPSv2.1 recipe.

    Raises `ValueError`, naming the field, when one is out of range.
    """

    # Timesteps: sigma runs over `timesteps` levels between two points of a shifted schedule.
    timesteps: int = 1000
    window: tuple[int, int] = (5, 25)  # noisiest and cleanest step of the schedule used
    schedule_steps: int = 50
    shift: float = 3.0
    groundtruth_ratio: float = 0.9  # 1 - the part of the window that one Direct-Align step crosses
    margin: int = 5  # draws stay this far from both ends of the window
    inversion: bool = True  # false: the denoise branch alone

    # Semantic Relative Preference
    form: Form = "official"
    discount_denoise: tuple[float, float] = (0.1, 0.25)  # kappa from the cleanest to the noisiest level
    discount_inversion: tuple[float, float] = (0.3, 0.01)
    threshold: float | None = 0.7  # loss is relu(threshold - score); None: -score
    reward_logit_scale: bool = False  # multiply the cosine by the reward's exp(logit_scale)
    reward_divisor: float = 1.0
    twin_noise: float = 0.05  # image_only: standard deviation of the twin's noise, images in [0, 1]
    positive_controls: tuple[str, ...] = ("Natural-lighting", "Detail", "Detailed", "Real")
    negative_controls: tuple[str, ...] = ("Concept art", "Painting", "Anime", "Flat", "Oil")

    # Rollout and gradient pass
    height: int = 720
    width: int = 720
    rollout_steps: int = 25
    rollout_guidance: float = 1.0
    guidance: float = 3.5
    noise: Literal["shared", "independent"] = "shared"  # one noise for all images and ranks of a step, or one each

    # Optimisation (AdamW)
    batch_size: int = 32  # images per update over all ranks
    updates: int = 20
    learning_rate: float = 5e-6
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-4
    max_grad_norm: float = 0.1

    @classmethod
    def preset(cls, name: str) -> SRPOConfig:
        """The official recipe `name`: "hps" (HPSv2.1) or "pickscore". Raises `ValueError` for another name."""
        if not isinstance(name, str) or name not in _PRESETS:
            raise ValueError(f"preset must be one of {sorted(_PRESETS)}, got {name!r}")
        return cls(**_PRESETS[name])

    def __post_init__(self) -> None:
        first, last = self.window
        _require(0 < first < last <= self.schedule_steps, self, "window", f"0 < a < b <= {self.schedule_steps}")
        _require(self.margin >= 1, self, "margin", "at least 1")
        _require(self.timesteps > 2 * self.margin, self, "timesteps", f"more than 2 x margin = {2 * self.margin}")
        _require(0 <= self.groundtruth_ratio <= 1, self, "groundtruth_ratio", "in [0, 1]")
        _require(self.form in Form.__args__, self, "form", f"one of {sorted(Form.__args__)}")  # type: ignore[attr-defined]
        _require(self.noise in ("shared", "independent"), self, "noise", "'shared' or 'independent'")
        for name in ("discount_denoise", "discount_inversion"):
            _require(all(0 <= value <= 1 for value in getattr(self, name)), self, name, "two numbers in [0, 1]")
        _require(self.threshold is None or math.isfinite(self.threshold), self, "threshold", "a finite number or null")
        for name in ("positive_controls", "negative_controls"):
            words = getattr(self, name)
            _require(bool(words) and all(word.strip() for word in words), self, name, "one or more non-empty words")
        for name in ("height", "width", "rollout_steps", "batch_size", "updates"):
            _require(getattr(self, name) >= 1, self, name, "at least 1")
        for name in ("shift", "reward_divisor", "twin_noise", "learning_rate", "eps", "max_grad_norm"):
            _require(0 < getattr(self, name) < math.inf, self, name, "positive and finite")
        for name in ("rollout_guidance", "guidance", "weight_decay"):
            _require(0 <= getattr(self, name) < math.inf, self, name, "non-negative and finite")
        _require(all(0 <= beta < 1 for beta in self.betas), self, "betas", "two numbers in [0, 1)")

    def sigmas(self) -> np.ndarray:
        """Noise levels of the window, index 0 the noisiest: float64 [timesteps]."""
        t = 1 - np.asarray(self.window) / self.schedule_steps
        first, last = self.shift * t / (1 + (self.shift - 1) * t)
        return np.linspace(first, last, self.timesteps)

    def controls(self, step: int) -> tuple[str, str]:
        """The positive and the negative control word of update `step` (0-based): both lists cycle."""
        positive, negative = self.positive_controls, self.negative_controls
        return positive[step % len(positive)], negative[step % len(negative)]


_PRESETS: dict[str, dict] = {
    "hps": {},
    "pickscore": dict(
        window=(5, 30),
        discount_denoise=(0.1, 0.5),
        discount_inversion=(0.6, 0.01),
        rollout_guidance=2.0,
        reward_logit_scale=True,
        reward_divisor=20.0,
    ),
}


def _require(holds: bool, config: SRPOConfig, name: str, accepted: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {accepted}, got {getattr(config, name)!r}")


@dataclass(frozen=True)
class Branch:
    """One Direct-Align step: inject noise at `sigma_from`, step to `sigma_to`, recover, score with weight `kappa`."""

    name: Literal["denoise", "inversion"]
    sigma_from: float
    sigma_to: float
    kappa: float
    swap_prompts: bool  # positive and negative change places
    alpha_from: float | None = None  # what is left of the image at these levels; None: 1 - sigma, rectified flow
    alpha_to: float | None = None


def draw_timestep(config: SRPOConfig, generator: torch.Generator) -> int:
    """A timestep index, uniform in {margin, ..., timesteps - margin}."""
    high = config.timesteps - config.margin + 1
    return int(torch.randint(config.margin, high, (), generator=generator))


def branches(config: SRPOConfig, sel: int) -> tuple[Branch, ...]:
    """The denoise and the inversion branch of timestep index `sel`, in that order, or the first alone.

    Raises `ValueError` unless ``margin <= sel <= timesteps - margin``.
    """
    total = config.timesteps
    if not config.margin <= sel <= total - config.margin:
        raise ValueError(f"sel must lie in [{config.margin}, {total - config.margin}], got {sel}")
    # In floating point, as published: (1 - 0.9) * 1000 is just below 100, so k is 100 and not 101.
    k = min(total - sel, int((1 - config.groundtruth_ratio) * total) + 1, sel)
    levels = config.sigmas()

    def interval(m: int) -> tuple[float, float]:
        return float(levels[total - min(m + k, total)]), float(levels[total - m])

    def kappa(discount: tuple[float, float], m: int) -> float:
        return float(np.linspace(*discount, total)[m])

    m = sel
    noisy, clean = interval(m)
    denoise = Branch("denoise", noisy, clean, kappa(config.discount_denoise, m), swap_prompts=False)
    if not config.inversion:
        return (denoise,)
    m = max(sel - k, 1)
    noisy, clean = interval(m)
    inversion = Branch("inversion", clean, noisy, kappa(config.discount_inversion, m), swap_prompts=True)
    return denoise, inversion


def with_control(word: str, caption: str) -> str:
    """The prompt that a control word makes of a caption."""
    return f"{word}. {caption}"


def penalties(scores: Tensor, threshold: float | None) -> Tensor:
    """``relu(threshold - score)``, or ``-score`` for None."""
    return -scores if threshold is None else torch.relu(threshold - scores)


class RelativeReward(Protocol):
    """What `srpo_loss` asks of a reward. Images are [N, 3, H, W] in [0, 1], scores [N]."""

    def relative(self, images: Tensor, positive: list[str], negative: list[str], kappa: Tensor) -> Tensor: ...

    def score(self, images: Tensor, prompts: list[str]) -> Tensor: ...


@dataclass(frozen=True)
class SRPOOutput:
    """Result of `srpo_loss` for K branches of B images; everything but `loss` is detached."""

    loss: Tensor  # scalar
    scores: Tensor  # [K*B], branch-major
    x0_hat: Tensor  # [K*B, ...], the recovered images
    branch_losses: Tensor  # [K], their sum is the loss


@dataclass(frozen=True)
class LatentLayout:
    """How packed tokens become the decoder's latents: their size (h, w) and the VAE's scale."""

    size: tuple[int, int]
    scaling_factor: float = 1.0
    shift_factor: float = 0.0


def srpo_loss(
    x0: Tensor,
    noise: Tensor,
    captions: Sequence[str],
    *,
    controls: tuple[str, str] | Sequence[tuple[str, str]],
    branches: Sequence[Branch],
    velocity: Callable[[Tensor, Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
    reward: RelativeReward,
    threshold: float | None = 0.7,
    prediction: Prediction = "velocity",
    twin_noise: Tensor | None = None,
    latent: LatentLayout | None = None,
    checkpoint: bool = False,
    chunk: int | None = None,
) -> SRPOOutput:
    """The SRPO loss of one clean batch, all branches in one call of model, decoder and reward.

    Args:
        x0: clean latents [B, ...]; noise: their noise, [B, ...] or one image [1, ...] shared by the batch.
        captions: B captions. controls: the (positive, negative) control word put before each (`with_control`), or B
            such pairs, one for each caption.
        branches: the K branches to average.
        velocity: ``(x_t [K*B, ...], sigma [K*B]) -> v [K*B, ...]``, branch-major.
        decode: ``x0_hat [K*B, ...] -> images [K*B, 3, H, W]`` in [0, 1].
        reward: scores the images against both prompts.
        prediction: what `velocity` returns. Another kind, as `recover` has them, needs branches with alphas, and takes
            no `checkpoint`.
        threshold: a branch's loss is ``relu(threshold - score)``, or ``-score`` for None, its mean over
            images divided by K; the loss is the sum over branches.
        twin_noise: [K*B, 3, H, W]. When given, prompts play no part: the score is reward(image) -
            reward(image + twin_noise), negated where the branch swaps its prompts (the form for image-only rewards).
        latent: x0 is packed tokens [B, h*w/4, 4C], and x0_hat is handed to `decode` as VAE latents [K*B, C, h, w],
            unpacked and rescaled in the pass that recovers it.
        checkpoint: keep nothing of the path from the velocity to the scores and recompute it in backward. chunk: then
            decode and score this many images at a time (default all).

    Raises:
        ValueError: no branches, `captions` or `controls` does not have B entries, or `prediction` does not fit.
    """
    batch, count = x0.shape[0], len(branches)
    if count == 0:
        raise ValueError("srpo_loss: branches must name at least one branch")
    if len(captions) != batch:
        raise ValueError(f"srpo_loss: captions must have one entry per image ({batch}), got {len(captions)}")
    rectified = prediction == "velocity"
    if any((alpha is None) != rectified for each in branches for alpha in (each.alpha_from, each.alpha_to)):
        raise ValueError(f"srpo_loss: branches must {'not ' * rectified}have alphas with prediction={prediction!r}")
    if checkpoint and not rectified:
        raise ValueError(f"srpo_loss: checkpoint needs prediction='velocity', got {prediction!r}")
    pairs: list[Any] = [controls] * batch if isinstance(controls[0], str) else list(controls)
    if len(pairs) != batch:
        raise ValueError(f"srpo_loss: controls must be one pair, or one per image ({batch}), got {len(pairs)}")

    def per_branch(values: list[Any]) -> Tensor:
        """[B, K]"""
        dtype = torch.promote_types(x0.dtype, torch.float32)
        return torch.tensor(values, dtype=dtype, device=x0.device).expand(batch, count)

    def per_row(values: list[float]) -> Tensor:
        """[K*B]"""
        return per_branch(values).T.reshape(-1)

    def prompts(negative: bool) -> list[str]:
        """One for each row, the wanted word put before its caption; a branch that swaps its prompts takes the other."""
        return [
            with_control(words[branch.swap_prompts ^ negative], caption)
            for branch in branches
            for words, caption in zip(pairs, captions, strict=True)
        ]

    positive, negative = prompts(False), prompts(True)
    kappa = per_row([branch.kappa for branch in branches])
    sign = per_row([-1.0 if branch.swap_prompts else 1.0 for branch in branches])

    def score(images: Tensor, rows: slice) -> Tensor:
        if twin_noise is None:
            return reward.relative(images, positive[rows], negative[rows], kappa[rows])
        prompts = (list(captions) * count)[rows]
        twins = (images + twin_noise[rows]).clamp(0, 1)
        return sign[rows] * (reward.score(images, prompts) - reward.score(twins, prompts))

    start = per_branch([branch.sigma_from for branch in branches])
    end = per_branch([branch.sigma_to for branch in branches])
    signal: dict[str, Any] = {}
    options: dict[str, Any] = {}
    if not rectified:
        signal["alpha"] = per_branch([branch.alpha_from for branch in branches])
        alpha_to = per_branch([branch.alpha_to for branch in branches])
        options = dict(alpha_from=signal["alpha"], alpha_to=alpha_to, prediction=prediction)
    x_t = inject_noise(x0, noise, start, **signal)
    v = velocity(x_t, start.T.reshape(-1))
    if latent is not None:
        options |= dict(unpack=latent.size, scaling_factor=latent.scaling_factor, shift_factor=latent.shift_factor)
    if checkpoint:
        scores = checkpointed_reward(x_t, noise, v, start, end, **options, decode=decode, score=score, chunk=chunk)
        x0_hat = recover(x_t, noise, v.detach(), start, end, **options)
    else:
        x0_hat = recover(x_t, noise, v, start, end, **options)
        scores = score(decode(x0_hat), slice(0, count * batch))

    branch_losses = penalties(scores, threshold).reshape(count, batch).mean(1) / count
    return SRPOOutput(branch_losses.sum(), scores.detach(), x0_hat.detach(), branch_losses.detach())
