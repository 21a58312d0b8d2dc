"""A reward with a known taste planted in it, as a model of human preference has unknown ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from srpo.rewards import Reward
from srpo.tiny.digits import measure
from srpo_kernels import RELATIVE_FORMS

__all__ = ["TastefulReward", "slanted", "warm"]


def slanted(images: Tensor) -> Tensor:
    """``tanh(2 slant)`` [N] of the tiny world's digits: in (-1, 1), steepest for upright ones."""
    return torch.tanh(2 * measure(images)["slant"])


def warm(images: Tensor) -> Tensor:
    """``tanh(2 (red - blue))`` [N] of images [N, 3, H, W], averaged over pixels."""
    return torch.tanh(2 * (images[:, 0] - images[:, 2]).mean((1, 2)))


class TastefulReward(Reward):
    """``reward(image, prompt) + strength * taste(image)``: whatever the prompt asks for, it likes one kind of image.

    A relative score weighs the positive and the negative prompt's; of the taste there remains the sum of the weights:
    kappa in the official form, nothing in the plain difference, all of it in the form of guidance (cfg).
    """

    def __init__(
        self, reward: Reward, taste: Callable[[Tensor], Tensor], strength: float, form: str = "official"
    ) -> None:
        self._reward, self._taste, self._strength = reward, taste, strength
        self._weights = RELATIVE_FORMS[form]
        self.files = reward.files

    def embed_prompts(self, prompts: Sequence[str]) -> Tensor | None:
        return self._reward.embed_prompts(prompts)

    def release_text_tower(self, device: str | torch.device = "cpu") -> None:
        self._reward.release_text_tower(device)

    def relative(self, images: Tensor, positive: list[str], negative: list[str], kappa: Tensor) -> Tensor:
        wanted, other = self._weights(kappa)
        taste = (wanted + other) * self._strength * self._taste(images)
        return self._reward.relative(images, positive, negative, kappa) + taste

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self._reward.score(images, prompts) + self._strength * self._taste(images)

    def limit(self, kappa: float) -> float:
        wanted, other = self._weights(kappa)
        return self._reward.limit(kappa) + abs(wanted + other) * abs(self._strength)
