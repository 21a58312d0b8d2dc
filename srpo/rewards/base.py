"""What every reward can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from srpo.errors import InputError

__all__ = ["ImageOnlyReward", "Reward"]


class Reward(ABC):
    """Differentiable scores [N] of images [N, 3, H, W] in [0, 1]; weights are frozen.

    Attributes:
        files: SHA-256 of each file of weights, where `load_reward` loaded them.
    """

    files: Mapping[Path, str] = MappingProxyType({})

    @abstractmethod
    def relative(self, images: Tensor, positive: list[str], negative: list[str], kappa: Tensor) -> Tensor:
        """Relative scores [N] of images against prompts, with a weight `kappa` [N] for each image."""

    @abstractmethod
    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """The score [N] of each image with its prompt."""

    @abstractmethod
    def limit(self, kappa: float) -> float:
        """No relative score's magnitude is beyond this, whatever the image."""

    def embed_prompts(self, prompts: Sequence[str]) -> Tensor | None:
        """Do ahead of time what the prompts alone decide. By default nothing."""
        del prompts
        return None

    def release_text_tower(self, device: str | torch.device = "cpu") -> None:
        """Move to `device` what only embeds prompts, which it does there from now on. By default nothing does."""
        del device


class ImageOnlyReward(Reward):
    """A reward that reads no prompt. Its relative score is the one of `srpo_loss` with twins (form "image_only"):
    ``score(image) - score(image + noise)``, which `limit` bounds."""

    def relative(self, images: Tensor, positive: list[str], negative: list[str], kappa: Tensor) -> Tensor:
        """Raises `InputError`: prompts play no part."""
        del images, positive, negative, kappa
        raise InputError(f"{type(self).__name__} reads no prompt: it needs srpo.form image_only")
