"""ReFL: reward feedback at one late step (ImageReward, arXiv 2304.05977, algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from srpo.algorithm import Draw, DrawingAlgorithm
from srpo.baselines.scoring import SinglePrompt
from srpo.latents import shifted_sigmas
from srpo.objective import penalties
from srpo.prompts import Prompt
from srpo.randomness import generator

__all__ = ["LateBatch", "ReFL"]


class LateBatch(NamedTuple):
    """Latents x_t [B, S, 4C] before step `step` (0-based) of their rollout, and B captions."""

    x_t: Tensor
    captions: list[Prompt]
    step: int


class ReFL(SinglePrompt, DrawingAlgorithm[LateBatch]):
    """A rollout to a random late step, then one prediction of x0 from there, which is scored."""

    def load(self, step: int, index: int, check: Callable[[], None]) -> LateBatch:
        number, steps = self._batches.number(index), self.config.srpo.rollout_steps
        first = steps - max(1, round(steps * self.own.late))
        late = int(
            torch.randint(first, steps, (), generator=generator(self.config.run.seed, step, 0, f"late/{number}"))
        )
        return LateBatch(*self.sampled(step, index, check, late), late)

    def draw(self, step: int, name: str, batch: LateBatch) -> Draw:
        del name
        objective = self.config.srpo
        x_t, captions, late = batch
        sigma = float(shifted_sigmas(objective.rollout_steps, objective.shift)[late])
        velocity = self.velocity(x_t, sigma, captions)
        scores = self.score(x_t, x_t, velocity, (sigma, 0.0), self.scored(step, captions))
        loss = self.own.weight * penalties(scores, self.own.threshold).mean()
        cost = late * len(captions) + self.trained(len(captions))
        return Draw(loss, loss.detach()[None], scores.detach()[None], ("late",), captions, late, cost)
