"""The SRPO step as others run it, in plain PyTorch and diffusers: what `srpo`'s is measured against.

"official" does as the authors' script does: fp32 weights under bf16 autocast, one branch after the other, every block
checkpointed, the reward in fp16 autocast with its text tower run for each prompt of each branch, gradients for the
frozen VAE's weights. "eager" is what a careful user would write on the same libraries: bf16 weights, a frozen VAE, text
embeddings kept, one branch after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.phases import Phases
from srpo.objective import Branch

__all__ = ["Scorer", "Setting", "reference_gradient"]


@dataclass(frozen=True)
class Scorer:
    """A CLIP-like reward as its library makes it. Embeddings are not normalised."""

    embed_images: Callable[[Tensor], Tensor]
    embed_texts: Callable[[list[str]], Tensor]
    size: int
    mean: Sequence[float]
    std: Sequence[float]
    scale: float


@dataclass(frozen=True)
class Setting:
    """One image's step: what a recipe and its draws come to."""

    caption: str
    words: tuple[str, str]  # positive, negative control
    branches: Sequence[Branch]
    sigmas: Sequence[float]  # of the rollout, from 1 to 0
    rollout_guidance: float
    guidance: float
    threshold: float | None
    latent: tuple[int, int]


def reference_gradient(
    style: str,
    transformer: Any,
    vae: Any,
    scorer: Scorer,
    text: Callable[[str], tuple[Tensor, Tensor]],
    noise: Tensor,
    setting: Setting,
    phases: Phases,
    kept: dict[str, Tensor],
) -> list[Tensor]:
    """Adds the gradient of one image's loss to `transformer`; returns the score of each branch.

    Args:
        style: "official" or "eager". text: gives a caption's T5 tokens [1, L, D] and CLIP vector [1, P]. noise: packed
            latents [1, S, 4C]. kept: text embeddings of the reward, between steps.
    """
    device = noise.device
    autocast = style == "official" and device.type == "cuda"
    mixed = torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext()
    h, w = setting.latent
    ids = torch.cartesian_prod(torch.zeros(1, dtype=torch.int64), torch.arange(h // 2), torch.arange(w // 2))
    ids = ids.to(device, noise.dtype)
    with phases.of("text"):
        tokens, pooled = text(setting.caption)

    def velocity(x: Tensor, sigma: float, guidance: float) -> Tensor:
        dtype = transformer.dtype
        levels = torch.full((1,), guidance, device=device) if transformer.config.guidance_embeds else None
        with mixed:
            return transformer(
                hidden_states=x.to(dtype),
                timestep=torch.full((1,), sigma, device=device, dtype=noise.dtype),
                guidance=levels,
                pooled_projections=pooled.to(dtype),
                encoder_hidden_states=tokens.to(dtype),
                txt_ids=torch.zeros(tokens.shape[1], 3, device=device, dtype=noise.dtype),
                img_ids=ids,
                return_dict=False,
            )[0].to(noise.dtype)

    def score(image: Tensor, branch: Branch) -> Tensor:
        words = reversed(setting.words) if branch.swap_prompts else setting.words
        prompts = [f"{word}. {setting.caption}" for word in words]
        half = torch.autocast(device.type, torch.float16) if autocast else nullcontext()
        with half:
            if style == "official":
                texts = [scorer.embed_texts([prompt]) for prompt in prompts]
            else:
                for prompt in prompts:
                    if prompt not in kept:
                        with torch.no_grad():
                            kept[prompt] = scorer.embed_texts([prompt])
                texts = [kept[prompt] for prompt in prompts]
            features = F.normalize(scorer.embed_images(_preprocess(image, scorer)), dim=-1)
            positive, negative = (F.normalize(found.to(features.dtype), dim=-1) for found in texts)
            return scorer.scale * (features * ((1 + branch.kappa) * positive - negative)).sum(-1)

    with phases.of("rollout"), torch.no_grad():
        x0 = noise
        for sigma, following in zip(setting.sigmas, setting.sigmas[1:], strict=False):
            x0 = x0 + (following - sigma) * velocity(x0, sigma, setting.rollout_guidance)
    scores = []
    for branch in setting.branches:
        start, end = branch.sigma_from, branch.sigma_to
        with phases.of("inject"):
            x_t = (1 - start) * x0 + start * noise
        with phases.of(f"forward, {branch.name}"):
            v = phases.at_gradient(velocity(x_t, start, setting.guidance), f"backward, {branch.name}")
        with phases.of("inject"):  # and recover
            x0_hat = (x_t + (end - start) * v - end * noise) / (1 - end)
            latents = _unpack(x0_hat, h, w) / vae.config.scaling_factor + vae.config.shift_factor
        with phases.of("decode"), mixed:
            image = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
            image = (image.to(noise.dtype) / 2 + 0.5).clamp(0, 1)
        with phases.of("reward"):
            found = score(image, branch)
        with phases.of("image backward"):
            penalty = -found if setting.threshold is None else torch.relu(setting.threshold - found)
            (penalty.mean() / len(setting.branches)).backward()
        scores.append(found.detach())
    return scores


def _preprocess(image: Tensor, scorer: Scorer) -> Tensor:
    """Resize the shorter edge, crop the centre, normalise."""
    size = scorer.size
    height, width = (int(size * edge / min(image.shape[-2:])) for edge in image.shape[-2:])
    resized = F.interpolate(image, (height, width), mode="bicubic", antialias=True, align_corners=False)
    top, left = round((height - size) / 2), round((width - size) / 2)
    mean, std = (torch.tensor(list(values)).to(image) for values in (scorer.mean, scorer.std))
    cropped = resized[..., top : top + size, left : left + size]
    return (cropped - mean[:, None, None]) / std[:, None, None]


def _unpack(tokens: Tensor, h: int, w: int) -> Tensor:
    """[B, h w / 4, 4 C] to [B, C, h, w]."""
    batch, _, channels = tokens.shape
    squares = tokens.view(batch, h // 2, w // 2, channels // 4, 2, 2)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // 4, h, w)
