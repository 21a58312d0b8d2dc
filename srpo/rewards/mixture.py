"""A weighted sum of rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from srpo.errors import InputError
from srpo.rewards.base import ImageOnlyReward, Reward

__all__ = ["MixtureReward", "Part"]


@dataclass(frozen=True)
class Part:
    """A reward within a mixture."""

    name: str
    reward: Reward
    weight: float


class MixtureReward(Reward):
    """``sum of weight * reward``; values and gradients are those of running the parts one by one.

    Parts that read no prompt have scores only: with one among them, `relative` is refused and the mixture is for
    srpo.form image_only, in which every part scores an image against its noisy twin.

    Raises `InputError` when there are no parts.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        if not parts:
            raise InputError("a mixture of rewards needs at least one part")
        self.parts = tuple(parts)

    def embed_prompts(self, prompts: Sequence[str]) -> None:
        for part in self.parts:
            part.reward.embed_prompts(prompts)

    def release_text_tower(self, device: str | torch.device = "cpu") -> None:
        for part in self.parts:
            part.reward.release_text_tower(device)

    def relative(self, images: Tensor, positive: list[str], negative: list[str], kappa: Tensor) -> Tensor:
        """Raises `InputError`, naming it, when a part reads no prompt."""
        for part in self.parts:
            if isinstance(part.reward, ImageOnlyReward):
                raise InputError(f"part {part.name} of a mixture reads no prompt: it needs srpo.form image_only")
        return self._sum(lambda reward: reward.relative(images, positive, negative, kappa))

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self._sum(lambda reward: reward.score(images, prompts))

    def score_parts(self, images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        """The score [N] of every part, not weighted."""
        return {part.name: part.reward.score(images, prompts) for part in self.parts}

    def limit(self, kappa: float) -> float:
        return sum(abs(part.weight) * part.reward.limit(kappa) for part in self.parts)

    def _sum(self, scores: Callable[[Reward], Tensor]) -> Tensor:
        return torch.stack([part.weight * scores(part.reward) for part in self.parts]).sum(0)
