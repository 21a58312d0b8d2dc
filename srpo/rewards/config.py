"""A recipe's `reward` section."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import ConfigDict

from srpo.errors import InputError
from srpo.objective import SRPOConfig

__all__ = ["IMAGE_ONLY", "RewardConfig", "RewardModel", "RewardPart", "check_reward", "describe_types"]

#: Of each type the keys that it needs, and those that it may have.
_KEYS: dict[str, tuple[set[str], set[str]]] = {
    "clip": ({"path"}, {"processor"}),
    "open_clip": ({"path"}, {"processor", "tag"}),
    "aesthetic": ({"path", "head"}, set()),
    "siglip_aesthetic": ({"path", "head"}, set()),
    "image_reward": ({"path", "processor"}, set()),
    "hpsv3": ({"path", "processor"}, set()),
    "mixture": ({"parts"}, set()),
}
#: What each type is.
_KINDS = {
    "clip": "a transformers CLIPModel: CLIP, PickScore",
    "open_clip": "any open_clip model: HPSv2.1 (ViT-H-14), SigLIP",
    "aesthetic": "LAION's aesthetic predictor v2, on CLIP ViT-L/14; reads no prompt",
    "siglip_aesthetic": "an aesthetic predictor on SigLIP; reads no prompt",
    "image_reward": "ImageReward: BLIP with a head",
    "hpsv3": "HPSv3: Qwen2-VL with a head",
    "mixture": "a weighted sum of others",
}
#: Types that read no prompt.
IMAGE_ONLY = ("aesthetic", "siglip_aesthetic")
#: Types whose model has a logit scale.
_SCALED = ("clip", "open_clip")


@dataclass(frozen=True)
class RewardModel:
    """One model and its files (docs/rewards.md)."""

    path: str = ""  # a transformers directory (clip, siglip_aesthetic; aesthetic, too) or a checkpoint file
    type: Literal["clip", "open_clip", "aesthetic", "siglip_aesthetic", "image_reward", "hpsv3", "mixture"] = "clip"
    head: str | None = None  # aesthetic, siglip_aesthetic: file of the predictor
    processor: str | None = None  # directory of tokenizer (and clip: image processor, hpsv3: configuration)
    architecture: str = "ViT-H-14"  # open_clip, and aesthetic on a checkpoint file: model name
    tag: str | None = None  # open_clip: the registered weights whose preprocessing to use, where they differ

    def __post_init__(self) -> None:
        self._check(f"reward type {self.type}")

    def _check(self, what: str, parts: tuple[RewardPart, ...] = ()) -> None:
        needed, allowed = _KEYS[self.type]
        values = dict(path=self.path, head=self.head, processor=self.processor, tag=self.tag, parts=parts)
        given = {key for key, value in values.items() if value}
        accepts = f"it needs {' and '.join(sorted(needed, reverse=True))}"
        accepts += f" and may have {' and '.join(sorted(allowed))}" if allowed else ""
        if needed - given:
            raise ValueError(f"{what} lacks {', '.join(sorted(needed - given))}: {accepts}")
        if given - needed - allowed:
            raise ValueError(f"{what} has no {', '.join(sorted(given - needed - allowed))}: {accepts}")


@dataclass(frozen=True)
class RewardPart(RewardModel):
    """A reward within a mixture."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    weight: float = 1.0  # factor of its scores; a negative one makes the model avoid what the part likes
    logit_scale: bool = False  # multiply the cosine by the model's exp(logit_scale)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.type == "mixture":
            raise ValueError("a part of reward type mixture cannot be a mixture itself")
        if not math.isfinite(self.weight) or self.weight == 0:
            raise ValueError(f"weight must be finite and not 0, got {self.weight}")
        if self.logit_scale and self.type not in _SCALED:
            raise ValueError(f"logit_scale is for {' and '.join(_SCALED)}; reward type {self.type} has none")


@dataclass(frozen=True)
class RewardConfig(RewardModel):
    """The reward: one model, or with type "mixture" a weighted sum of several."""

    text_cache: str | None = None  # directory of text embeddings that runs may share; null: in memory only
    parts: tuple[RewardPart, ...] = ()  # mixture: [{type, path, ..., weight, logit_scale}, ...]

    def __post_init__(self) -> None:
        self._check(f"reward type {self.type}", self.parts)


def check_reward(config: RewardConfig, objective: SRPOConfig) -> None:
    """Raises `InputError` when the objective asks of a reward what it cannot do."""
    for index, part in enumerate(config.parts or (config,)):
        name = f"reward.parts[{index}]" if config.parts else "reward"
        if part.type in IMAGE_ONLY and objective.form != "image_only":
            raise InputError(
                f"{name} of type {part.type} reads no prompt and needs srpo.form image_only (also of all it is mixed "
                f"with), got {objective.form}"
            )
    if config.type == "mixture" and (objective.reward_logit_scale or objective.reward_divisor != 1):
        raise InputError(
            "srpo.reward_logit_scale and srpo.reward_divisor are for a single reward; the parts of a mixture have "
            "logit_scale and weight of their own: set them to false and 1"
        )
    if objective.reward_logit_scale and config.type not in (*_SCALED, "mixture"):
        raise InputError(f"srpo.reward_logit_scale must be false: reward type {config.type} has no logit scale")


def describe_types() -> str:
    """A line for each type of reward: its name, what it is, the keys that it needs and [may have]."""
    lines = []
    for name, (needed, allowed) in _KEYS.items():
        keys = [*sorted(needed, reverse=True), *(f"[{key}]" for key in sorted(allowed))]
        lines.append(f"{name:17} {_KINDS[name]}; reward.{', '.join(keys)}")
    return "\n".join(lines)
