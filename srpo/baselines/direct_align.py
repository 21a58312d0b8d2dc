"""Direct-Align without the relative reward (arXiv 2509.06942, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable

from srpo.algorithm import Draw, DrawingAlgorithm
from srpo.baselines.scoring import SinglePrompt
from srpo.batches import CleanBatch
from srpo.objective import branches, draw_timestep, penalties
from srpo.randomness import generator
from srpo_kernels import inject_noise

__all__ = ["DirectAlign"]


class DirectAlign(SinglePrompt, DrawingAlgorithm[CleanBatch]):
    """SRPO's clean batches, timesteps and denoise branch; one prompt's score. There is nothing to invert for."""

    def load(self, step: int, index: int, check: Callable[[], None]) -> CleanBatch:
        return self._batches.load(step, index, check)

    def draw(self, step: int, name: str, batch: CleanBatch) -> Draw:
        objective, run = self.config.srpo, self.config.run
        x0, noise, captions, forwards = batch
        timestep = draw_timestep(objective, generator(run.seed, step, 0, f"timestep/{name}"))
        denoise = branches(objective, timestep)[0]
        x_t = inject_noise(x0, noise, denoise.sigma_from)
        velocity = self.velocity(x_t, denoise.sigma_from, captions)
        levels = denoise.sigma_from, denoise.sigma_to
        scores = self.score(x_t, noise, velocity, levels, self.scored(step, captions))
        loss = penalties(scores, self.own.threshold).mean()
        cost = forwards / run.draws_per_rollout + self.trained(len(captions))
        return Draw(loss, loss.detach()[None], scores.detach()[None], ("denoise",), captions, timestep, cost)
