"""DRaFT-K and DRaFT-LV: reward gradients through the end of sampling (arXiv 2309.17400, algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from srpo.algorithm import Draw, DrawingAlgorithm
from srpo.baselines.scoring import SinglePrompt
from srpo.config import TrainConfig
from srpo.latents import shifted_sigmas
from srpo.prompts import Prompt
from srpo.randomness import generator
from srpo_kernels import inject_noise

__all__ = ["DRaFT", "LastBatch"]


@dataclass
class LastBatch:
    """Latents x_t [B, S, 4C] before the last K steps of their rollout, and B captions."""

    x_t: Tensor
    captions: list[Prompt]
    x0: Tensor | None = None  # what draw 0 came to, without gradients


class DRaFT(SinglePrompt, DrawingAlgorithm[LastBatch]):
    """Draw 0 of a batch goes through the last K steps; each further one noises its image to the last level again.

    Of K steps, all but the last keep their latents only, and are computed again in backward.
    """

    @classmethod
    def backwards(cls, config: TrainConfig) -> int:
        assert config.draft is not None
        return 1 + config.draft.lv

    def load(self, step: int, index: int, check: Callable[[], None]) -> LastBatch:
        return LastBatch(*self.sampled(step, index, check, self.config.srpo.rollout_steps - self.own.k))

    def draw(self, step: int, name: str, batch: LastBatch) -> Draw:
        objective, k = self.config.srpo, self.own.k
        x_t, captions = batch.x_t, batch.captions
        first, rows = objective.rollout_steps - k, len(captions)
        levels = shifted_sigmas(objective.rollout_steps, objective.shift)[first:].tolist()
        cost = self.trained(rows)
        if batch.x0 is not None:
            noise = self._flux.noise(rows, *self._batches.size, generator(self.config.run.seed, step, 0, f"lv/{name}"))
            x_t = inject_noise(batch.x0, noise, levels[0])
        else:
            cost += first * rows + (k - 1) * (self.trained(rows) + rows)
        for sigma, following in pairwise(levels[:-1]):
            x_t = x_t + (following - sigma) * checkpoint(self.velocity, x_t, sigma, captions, use_reentrant=False)
        sigma = levels[-2]
        velocity = self.velocity(x_t, sigma, captions)
        if batch.x0 is None:
            batch.x0 = (x_t - sigma * velocity).detach()
        scores = self.score(x_t, x_t, velocity, (sigma, 0.0), self.scored(step, captions))
        loss = -scores.mean()
        return Draw(loss, loss.detach()[None], scores.detach()[None], ("last",), captions, first, cost)
