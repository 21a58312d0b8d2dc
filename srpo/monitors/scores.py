"""What rewards say about images: the trained one, one that was held out, and one for the plain prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from srpo.errors import InputError
from srpo.monitors.config import ValidationConfig
from srpo.objective import SRPOConfig, with_control
from srpo.rewards import CosineReward, MixtureReward, Reward, RewardConfig, RewardPart, load_reward
from srpo.rewards.config import IMAGE_ONLY

__all__ = ["Scores"]


@dataclass(frozen=True)
class Scores:
    """The rewards that look at validation images.

    Attributes:
        pairs: the control words (positive, negative) that the run starts with, all of them together once.
        kappa: of the trained score. words: of the semantic guided preference.
    """

    trained: Reward
    relative: bool
    pairs: tuple[tuple[str, str], ...]
    kappa: float
    words: tuple[str, str] | None
    held_out: Reward | None = None
    alignment: Reward | None = None

    @classmethod
    def load(
        cls,
        trained: Reward,
        reward: RewardConfig,
        config: ValidationConfig,
        objective: SRPOConfig,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Scores:
        """Load the rewards of a `validation` section beside the `trained` one, which `reward` describes.

        Raises `InputError` when one cannot be loaded, or the held-out reward is the trained one.
        """
        learned = {part.path for part in (reward.parts or (reward,))}
        if config.held_out is not None and config.held_out.path in learned:
            raise InputError(f"validation.held_out must not be what the run trains on: {config.held_out.path}")
        reads = any(part.type not in IMAGE_ONLY for part in (reward.parts or (reward,)))
        plain = replace(objective, form="image_only", reward_logit_scale=False, reward_divisor=1.0)

        def load(part: RewardPart | None) -> Reward | None:
            if part is None:
                return None
            alone = RewardConfig(type="mixture", parts=(part,), text_cache=reward.text_cache)
            return load_reward(alone, plain, device=device, dtype=dtype)

        count = max(len(objective.positive_controls), len(objective.negative_controls))
        return cls(
            trained,
            relative=objective.form != "image_only",
            pairs=tuple(dict.fromkeys(objective.controls(step) for step in range(count))),
            kappa=sum(objective.discount_denoise) / 2,
            words=config.sgp if reads else None,
            held_out=load(config.held_out),
            alignment=load(config.alignment) or (trained if reads else None),
        )

    def score(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The scores [N] of images [N, 3, H, W] in [0, 1], each with its plain prompt.

        reward: what an update raises, ``relative(image, positive, negative, kappa)``, the mean over the pairs of
        control words; of a run without these (form image_only) the plain score. swapped: the same with positive and
        negative words exchanged. sgp: ``score(image, "word+. prompt") - score(image, "word-. prompt")``.
        """
        texts = list(prompts)
        found = {}
        if self.relative:
            found["reward"] = self._relative(images, texts, swap=False)
            found["swapped"] = self._relative(images, texts, swap=True)
        else:
            found["reward"] = self.trained.score(images, texts)
        if self.held_out is not None:
            found["held_out"] = self.held_out.score(images, texts)
        if self.alignment is not None:
            found["alignment"] = self.alignment.score(images, texts)
        if self.words is not None:
            real, drawn = ([with_control(word, text) for text in texts] for word in self.words)
            found["sgp"] = self.trained.score(images, real) - self.trained.score(images, drawn)
        return found

    def _relative(self, images: Tensor, texts: list[str], *, swap: bool) -> Tensor:
        kappa = torch.full((len(texts),), self.kappa, device=images.device)
        total = torch.zeros(len(texts), device=images.device)
        for pair in self.pairs:
            positive, negative = ([with_control(word, text) for text in texts] for word in pair)
            wanted, other = (negative, positive) if swap else (positive, negative)
            total = total + self.trained.relative(images, wanted, other, kappa)
        return total / len(self.pairs)

    def features(self, images: Tensor) -> Tensor | None:
        """Embeddings [N, D] of images by the first model that has any; one that was not trained on, if possible."""
        for reward in (self.alignment, self.held_out, self.trained):
            for single in [part.reward for part in reward.parts] if isinstance(reward, MixtureReward) else [reward]:
                if isinstance(single, CosineReward):
                    return single.embed_images(images)
        return None
