"""What the baselines share: images scored by one prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from srpo.algorithm import Algorithm
from srpo.objective import with_control
from srpo.prompts import Prompt
from srpo.sampling import rollout
from srpo_kernels import checkpointed_reward, recover

__all__ = ["SinglePrompt"]


class SinglePrompt(Algorithm):
    """An algorithm that scores an image with one prompt: its own, or that with the positive control word before it."""

    @property
    def own(self) -> Any:
        """The algorithm's own section of the recipe."""
        return self.config.baseline

    def scored(self, step: int, captions: Sequence[Prompt]) -> list[str]:
        texts = [caption.text for caption in captions]
        if not self.own.control:
            return texts
        words = self._batches.controls(step, captions)
        return [with_control(positive, text) for text, (positive, _) in zip(texts, words, strict=True)]

    def sampled(self, step: int, index: int, check: Callable[[], None], until: int) -> tuple[Tensor, list[Prompt]]:
        """Latents of clean batch `index` before step `until` of its rollout, without gradients, and its captions."""
        objective, run = self.config.srpo, self.config.run
        captions, _ = self._batches.chosen(step, index)
        latents = rollout(
            self._flux,
            self._batches.noise(step, index).expand(len(captions), -1, -1),
            [caption.text for caption in captions],
            size=self._batches.size,
            steps=objective.rollout_steps,
            shift=objective.shift,
            guidance=objective.guidance,
            quantized=True,
            gather=run.rollout_gather == "whole",
            on_step=check,
            until=until,
        )
        return latents, captions

    def velocity(self, x_t: Tensor, sigma: float | Tensor, captions: Sequence[Prompt]) -> Tensor:
        """The model's velocity at x_t [B, S, 4C] and level `sigma`, one or [B], by srpo.guidance."""
        levels = torch.as_tensor(sigma, dtype=x_t.dtype, device=x_t.device).expand(len(x_t))
        conditioning = self._flux.encode_prompts([caption.text for caption in captions])
        return self._flux.velocity(x_t, levels, conditioning, self.config.srpo.guidance, self._batches.size)

    def score(
        self, x_t: Tensor, noise: Tensor, velocity: Tensor, levels: tuple[float, float], prompts: list[str]
    ) -> Tensor:
        """Scores [B] of the images recovered after a step from the first to the second level, as SRPO's draws make
        them; to level 0, they are predictions of x0 and `noise` is of no matter."""
        layout = self._flux.layout(self._batches.size)
        recovered: dict[str, Any] = dict(
            unpack=layout.size, scaling_factor=layout.scaling_factor, shift_factor=layout.shift_factor
        )

        def score(images: Tensor, rows: slice) -> Tensor:
            return self._reward.score(images, prompts[rows])

        path = (x_t, noise, velocity, *levels)
        if self.config.model.checkpointing == "none":
            return score(self._flux.decode(recover(*path, **recovered)), slice(len(prompts)))
        chunk = self.config.model.image_chunk
        return checkpointed_reward(*path, **recovered, decode=self._flux.decode, score=score, chunk=chunk)
