"""Gradients of one update: timestep draws on clean batches, each through the SRPO loss and back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from srpo.batches import CleanBatch, CleanBatches
from srpo.config import TrainConfig
from srpo.distributed import Ranks
from srpo.models import Flux
from srpo.objective import branches, draw_timestep, srpo_loss
from srpo.prompts import Prompt
from srpo.randomness import generator
from srpo.rewards import Reward

__all__ = ["Draw", "NonFiniteError", "Seconds", "Update"]


class NonFiniteError(RuntimeError):
    """A score or gradient is NaN or infinite; the weights have not been touched by it."""


@dataclass(frozen=True)
class Draw:
    """One timestep draw on one clean batch. Keeps no graph once its loss has gone backward."""

    loss: Tensor
    branch_losses: Tensor  # [K]
    scores: Tensor  # [K, B]
    branches: tuple[str, ...]
    captions: list[Prompt]
    timestep: int

    def non_finite(self) -> str | None:
        """Branch and prompt of the first score that is NaN or infinite."""
        bad = (~self.scores.isfinite()).nonzero().tolist()
        if not bad:
            return None
        branch, row = bad[0]
        score = self.scores[branch, row].item()
        return f"the {self.branches[branch]} branch scored {score} for prompt {self.captions[row].text!r}"


class Seconds(dict[str, float]):
    """Time of each phase of an update, with the device's work done."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    @contextmanager
    def of(self, phase: str) -> Iterator[None]:
        """Add the time of the block to `phase`."""
        start = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self[phase] = self.get(phase, 0.0) + time.perf_counter() - start


class Update:
    """The SRPO gradient of a whole batch, left in the transformer's parameters."""

    def __init__(
        self, config: TrainConfig, ranks: Ranks, flux: Flux, reward: Reward, batches: CleanBatches, *, sharded: bool
    ) -> None:
        self.config = config
        self._ranks, self._flux, self._reward, self._batches = ranks, flux, reward, batches
        self._sharded = sharded

    def accumulate(self, step: int, check: Callable[[], None], seconds: Seconds) -> list[Draw]:
        """Add the mean gradient over all draws of all ranks to the parameters; `check` may raise between draws.

        Raises:
            NonFiniteError: a score of any rank is not finite; all ranks raise together.
        """
        count, batches = self.config.run.draws_per_rollout, self._batches
        total = batches.count * count
        draws: list[Draw] = []
        for index in range(batches.count):
            with seconds.of("text"):
                batches.embed_texts(step, index)
            with seconds.of("rollout"):
                batch = batches.load(step, index, check)
            for number in range(count):
                check()
                with seconds.of("gradient"):
                    draw = self.draw(step, f"{batches.number(index)}/{number}", batch)
                    self._flux.reduce_gradients(len(draws) == total - 1, every=self.config.run.reduce == "backward")
                    (draw.loss / total).backward()
                draws.append(replace(draw, loss=draw.loss.detach()))
        with seconds.of("gradient"):
            problem = next(filter(None, (draw.non_finite() for draw in draws)), None)
            if self._ranks.any(problem is not None):
                raise NonFiniteError(f"update {step + 1}: {problem or 'a score of another rank is not finite'}")
            if not self._sharded:  # FSDP2 averages them in backward
                parameters = self._flux.transformer.parameters()
                self._ranks.average(parameter.grad for parameter in parameters if parameter.grad is not None)
        return draws

    def draw(self, step: int, name: str, batch: CleanBatch) -> Draw:
        """The loss of timestep draw `name` of an update, ready for backward."""
        objective, run = self.config.srpo, self.config.run
        x0, noise, captions = batch
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
        return Draw(output.loss, output.branch_losses, scores, names, captions, timestep)

    def record(self, step: int, draws: list[Draw]) -> dict[str, Any]:
        """What the log keeps of an update's draws: means over all of them and all ranks."""
        names = draws[0].branches
        losses = torch.stack([draw.branch_losses for draw in draws]).mean(0)
        scores = torch.stack([draw.scores.mean(1) for draw in draws]).mean(0)
        self._ranks.average([losses, scores])
        [controls] = self._batches.controls(step, [Prompt("")])
        own = {words for draw in draws for words in self._batches.controls(step, draw.captions)} - {controls}
        return {
            "losses": {"total": losses.sum().item(), **dict(zip(names, losses.tolist(), strict=True))},
            "scores": dict(zip(names, scores.tolist(), strict=True)),
            "timesteps": [draw.timestep for draw in draws],
            "controls": list(controls),
            **({"prompt_controls": sorted(map(list, own))} if own else {}),
        }
