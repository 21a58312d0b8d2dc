"""From a recipe's `reward` section to a loaded reward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from srpo.assets import resolve_asset
from srpo.objective import SRPOConfig
from srpo.rewards.aesthetic import AestheticReward, SiglipAestheticReward
from srpo.rewards.base import Reward
from srpo.rewards.config import IMAGE_ONLY, RewardConfig, RewardModel, check_reward
from srpo.rewards.cosine import CLIPReward, OpenCLIPReward
from srpo.rewards.hpsv3 import HPSv3Reward
from srpo.rewards.image_reward import ImageReward
from srpo.rewards.mixture import MixtureReward, Part
from srpo.rewards.weights import checksum, weight_files

__all__ = ["checksums", "load_reward"]


def load_reward(
    config: RewardConfig, objective: SRPOConfig, *, device: str | torch.device, dtype: torch.dtype
) -> Reward:
    """The `Reward` on `device`, its vision towers in `dtype`, in the objective's form and scale.

    Every file of weights is read once more for its checksum: seconds for each few gigabytes.

    Raises `InputError` when it cannot be loaded, or cannot do what the objective asks of it.
    """
    check_reward(config, objective)
    files = checksums(config)
    reward = _load_all(config, objective, device, dtype)
    reward.files = files
    return reward


def _load_all(config: RewardConfig, objective: SRPOConfig, device: str | torch.device, dtype: torch.dtype) -> Reward:
    shared: dict[str, Any] = dict(
        device=device,
        dtype=dtype,
        # The image-only form compares two scores of one prompt; it never asks for a relative one.
        form="official" if objective.form == "image_only" else objective.form,
        text_cache=config.text_cache,
    )
    if config.type != "mixture":
        return _load(config, shared, objective.reward_logit_scale, objective.reward_divisor)
    return MixtureReward(
        [
            Part(f"{part.type} {index}", _load(part, shared, part.logit_scale, 1.0), part.weight)
            for index, part in enumerate(config.parts)
        ]
    )


def checksums(config: RewardConfig) -> dict[Path, str]:
    """SHA-256 of every file of weights that a reward is loaded from; logged.

    Raises `InputError` when a file differs from its ``.sha256`` sidecar.
    """
    places = [place for part in (config.parts or (config,)) for place in (_place(part), part.head) if place]
    return {file: checksum(file) for place in places for file in weight_files(place)}


def _place(config: RewardModel) -> Path:
    return resolve_asset(config.path, "reward") if config.type == "clip" else Path(config.path)


def _load(config: RewardModel, shared: dict[str, Any], logit_scale: bool, divisor: float) -> Reward:
    place, options = _place(config), dict(shared, divisor=divisor)
    if config.type in IMAGE_ONLY:
        del options["form"], options["text_cache"]
        head = Path(str(config.head))
        if config.type == "siglip_aesthetic":
            return SiglipAestheticReward(place, head, **options)
        return AestheticReward(place, head, architecture=config.architecture, **options)
    if config.type in ("image_reward", "hpsv3"):
        del options["text_cache"]  # what reads the text looks at the image
        return (ImageReward if config.type == "image_reward" else HPSv3Reward)(place, str(config.processor), **options)
    options["logit_scale"] = logit_scale
    if config.type == "open_clip":
        options.update(architecture=config.architecture, processor=config.processor, tag=config.tag)
        return OpenCLIPReward(place, **options)
    return CLIPReward(place, processor=config.processor, **options)
