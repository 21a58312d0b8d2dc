"""SRPO's gradients: timestep draws on clean batches, each through the SRPO loss and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from srpo.algorithm import Draw, DrawingAlgorithm
from srpo.batches import CleanBatch
from srpo.objective import branches, draw_timestep, srpo_loss, with_control
from srpo.prompts import Prompt
from srpo.randomness import generator

__all__ = ["Update"]


class Update(DrawingAlgorithm[CleanBatch]):
    """SRPO: both branches of Direct-Align, scored by the relative reward."""

    def scored(self, step: int, captions: Sequence[Prompt]) -> list[str]:
        texts = [caption.text for caption in captions]
        if self.config.srpo.form == "image_only":
            return texts
        # Each branch's positive word is the other's negative one.
        pairs = zip(texts, self._batches.controls(step, captions), strict=True)
        return [with_control(word, text) for text, words in pairs for word in words]

    def load(self, step: int, index: int, check: Callable[[], None]) -> CleanBatch:
        return self._batches.load(step, index, check)

    def draw(self, step: int, name: str, batch: CleanBatch) -> Draw:
        objective, run = self.config.srpo, self.config.run
        x0, noise, captions, forwards = batch
        size = self._batches.size
        timestep = draw_timestep(objective, generator(run.seed, step, 0, f"timestep/{name}"))
        pair = branches(objective, timestep)
        texts = [caption.text for caption in captions]
        conditioning = self._flux.encode_prompts(texts).repeat(len(pair))
        twin = None
        if objective.form == "image_only":
            shape = (len(pair) * len(captions), 3, *size)
            twin = torch.randn(shape, generator=generator(run.seed, step, 0, f"twin/{name}")).to(x0.device)
            twin *= objective.twin_noise
        output = srpo_loss(
            x0,
            noise,
            texts,
            controls=self._batches.controls(step, captions),
            branches=pair,
            velocity=partial(self._flux.velocity, conditioning=conditioning, guidance=objective.guidance, size=size),
            decode=self._flux.decode,
            reward=self._reward,
            threshold=objective.threshold,
            twin_noise=twin,
            latent=self._flux.layout(size),
            checkpoint=self.config.model.checkpointing != "none",
            chunk=self.config.model.image_chunk,
        )
        names = tuple(branch.name for branch in pair)
        scores = output.scores.reshape(len(pair), len(captions))
        cost = forwards / run.draws_per_rollout + self.trained(len(pair) * len(captions))
        return Draw(output.loss, output.branch_losses, scores, names, captions, timestep, cost)

    def record(self, step: int, draws: Sequence[Draw]) -> dict[str, Any]:
        [controls] = self._batches.controls(step, [Prompt("")])
        own = {words for draw in draws for words in self._batches.controls(step, draw.captions)} - {controls}
        return {
            **super().record(step, draws),
            "controls": list(controls),
            **({"prompt_controls": sorted(map(list, own))} if own else {}),
        }
