"""DanceGRPO: rollouts of an SDE, compared within a prompt's group, and the clipped policy gradient of its steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from srpo.algorithm import Draw, Seconds
from srpo.baselines.grpo import clipped_loss, group_advantages, log_probability, transition
from srpo.baselines.scoring import SinglePrompt
from srpo.config import TrainConfig
from srpo.latents import shifted_sigmas
from srpo.objective import with_control
from srpo.prompts import Prompt
from srpo.randomness import generator

__all__ = ["DanceGRPO", "Trajectory"]


@dataclass(frozen=True)
class Trajectory:
    """One image of each of B prompts: its way through T steps, of which the last has no noise, and what it scored."""

    name: str  # "number of the batch/of the image"
    captions: list[Prompt]
    states: Tensor  # [T, B, S, 4C], before each step
    log_old: Tensor  # [T - 1, B], of every transition but the last
    rewards: Tensor  # [B]


class DanceGRPO(SinglePrompt):
    """An update rolls `generations` images of every prompt out, then takes `optimizer_steps` on shares of them.

    Rollouts and gradients go through the same model calls: in other kernels or in e4m3, the ratio of probabilities
    would differ from 1 before anything was learnt.
    """

    def __init__(self, config: TrainConfig, *given: Any, **options: Any) -> None:
        super().__init__(config, *given, **options)
        self.parts = self.own.optimizer_steps
        self._levels = torch.from_numpy(shifted_sigmas(config.srpo.rollout_steps, config.srpo.shift)).float()
        self._shares: list[list[tuple[Trajectory, Tensor]]] = []  # of each part: images, and their advantages

    @classmethod
    def backwards(cls, config: TrainConfig) -> int:
        own = config.dancegrpo
        assert own is not None
        return own.generations // own.optimizer_steps * own.trained_steps(config.srpo.rollout_steps)

    def accumulate(self, step: int, check: Callable[[], None], seconds: Seconds, part: int = 0) -> list[Draw]:
        if part == 0:
            self._shares = [[] for _ in range(self.parts)]
            for index in range(self._batches.count):
                with seconds.of("text"):
                    self._batches.embed_texts(step, index, self.scored)
                with seconds.of("rollout"):
                    group = self.load(step, index, check)
                    advantages = group_advantages(torch.stack([one.rewards for one in group]), self.own.advantage_clip)
                share = len(group) // self.parts
                for image, trajectory in enumerate(group):
                    self._shares[image // share].append((trajectory, advantages[image]))
        draws = []
        with seconds.of("gradient"):
            trajectories, self._shares[part] = self._shares[part], []
            for trajectory, advantages in trajectories:
                last = trajectory is trajectories[-1][0]
                draws.append(self.train(step, trajectory, advantages, len(trajectories), last=last))
            self.finish(step, draws)
        return draws

    @torch.no_grad()
    def load(self, step: int, index: int, check: Callable[[], None]) -> list[Trajectory]:
        """The images of each prompt of a clean batch, which share its noise."""
        captions, _ = self._batches.chosen(step, index)
        start = self._batches.noise(step, index).expand(len(captions), -1, -1)
        names = [f"{self._batches.number(index)}/{image}" for image in range(self.own.generations)]
        with self._flux.whole():
            return [self.roll_out(step, name, start, captions, check) for name in names]

    def roll_out(
        self, step: int, name: str, start: Tensor, captions: list[Prompt], check: Callable[[], None]
    ) -> Trajectory:
        """One image of each prompt, from noise `start` [B, S, 4C]."""
        random = generator(self.config.run.seed, step, 0, f"sde/{name}")
        x, rows, size = start, len(captions), self._batches.size
        states, log_old = [], []
        last = len(self._levels) - 2
        for at in range(last + 1):
            check()
            states.append(x)
            velocity = self.velocity(x, self._levels[at].item(), captions)
            if at == last:
                x = x - self._levels[at].item() * velocity
                break
            mean, deviation = self.transition(x, velocity, torch.full((rows,), at))
            x = mean + deviation[:, None, None] * self._flux.noise(rows, *size, random)
            log_old.append(log_probability(x, mean, deviation))
        rewards = self.judged(self._flux.decode_packed(x, size), step, captions)
        return Trajectory(name, captions, torch.stack(states), torch.stack(log_old), rewards.float())

    def scored(self, step: int, captions: Sequence[Prompt]) -> list[str]:
        """Of a relative score the positive prompts, then the negative ones."""
        if not self.own.relative:
            return super().scored(step, captions)
        words = zip(*self._batches.controls(step, captions), strict=True)
        return [with_control(word, caption.text) for of in words for word, caption in zip(of, captions, strict=True)]

    def judged(self, images: Tensor, step: int, captions: Sequence[Prompt]) -> Tensor:
        """The reward [B] of an image of each prompt."""
        prompts, count = self.scored(step, captions), len(captions)
        if not self.own.relative:
            return self._reward.score(images, prompts)
        kappa = torch.full((count,), self.config.srpo.discount_denoise[0], device=images.device)
        return self._reward.relative(images, prompts[:count], prompts[count:], kappa)

    def train(self, step: int, trajectory: Trajectory, advantages: Tensor, images: int, *, last: bool) -> Draw:
        """Backward through a random choice of each row's transitions; the loss is its share of that of `images`."""
        states, captions = trajectory.states, trajectory.captions
        rows, count = len(captions), self.own.trained_steps(len(states))
        random = generator(self.config.run.seed, step, 0, f"steps/{trajectory.name}")
        chosen = torch.rand(rows, len(states) - 1, generator=random).argsort(1)[:, :count]
        row = torch.arange(rows, device=states.device)
        total = torch.zeros((), device=states.device)
        for number, at in enumerate(chosen.T.to(states.device)):
            x, following = states[at, row], states[at + 1, row]
            velocity = self.velocity(x, self._levels.to(x)[at], captions)
            log_new = log_probability(following, *self.transition(x, velocity, at))
            loss = clipped_loss(log_new, trajectory.log_old[at, row], advantages, self.own.clip_range).mean()
            self.backward(loss / (count * images), last=last and number == count - 1)
            total += loss.detach() / count
        cost = rows * len(states) + count * self.trained(rows)
        return Draw(total, total[None], trajectory.rewards[None], ("policy",), captions, None, cost)

    def transition(self, x: Tensor, velocity: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of what follows states x [B, S, 4C] of steps `at` [B]."""
        levels = self._levels.to(x)
        at = at.to(x.device)
        return transition(x, velocity, levels[at], levels[at + 1], self.own.eta)
