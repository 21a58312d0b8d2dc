"""From a recipe's `reward` section to a loaded reward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from srpo.assets import resolve_asset
from srpo.objective import SRPOConfig
from srpo.rewards.cosine import CLIPReward, CosineReward, OpenCLIPReward

__all__ = ["RewardConfig", "load_reward"]


@dataclass(frozen=True)
class RewardConfig:
    """The reward: "clip" (a transformers CLIPModel directory) or "open_clip" (a checkpoint file)."""

    path: str
    type: Literal["clip", "open_clip"] = "clip"
    processor: str | None = None  # clip: directory of tokenizer and image processor, if not `path`
    architecture: str = "ViT-H-14"  # open_clip: model name
    text_cache: str | None = None  # directory of text embeddings that runs may share; null: in memory only


def load_reward(
    config: RewardConfig, objective: SRPOConfig, *, device: str | torch.device, dtype: torch.dtype
) -> CosineReward:
    """The reward on `device`, its vision tower in `dtype`, in the objective's form and scale.

    Raises `InputError` when it cannot be loaded.
    """
    options: dict[str, Any] = dict(
        device=device,
        logit_scale=objective.reward_logit_scale,
        divisor=objective.reward_divisor,
        # The image-only form compares two scores of one prompt; it never asks for a relative one.
        form="official" if objective.form == "image_only" else objective.form,
        dtype=dtype,
        text_cache=config.text_cache,
    )
    if config.type == "open_clip":
        return OpenCLIPReward(config.path, architecture=config.architecture, **options)
    return CLIPReward(resolve_asset(config.path, "reward"), processor=config.processor, **options)
