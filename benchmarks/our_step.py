"""The SRPO step as `srpo` runs it, phase by phase."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.phases import Phases
from srpo.activations import keep_activations
from srpo.algorithm import Draw, Seconds
from srpo.batches import CleanBatches
from srpo.config import TrainConfig
from srpo.distributed import Ranks
from srpo.models import Flux
from srpo.optimizer import load_optimizer, set_gradient_dtype, take_step
from srpo.prompts import Prompt
from srpo.rewards import Reward
from srpo.sources import control_schedule
from srpo.update import Update

__all__ = ["CAPTION", "OurStep"]

CAPTION = "digit seven"


class OurStep:
    """A run of `config` that keeps training on one caption. Patches `flux`."""

    def __init__(self, config: TrainConfig, flux: Flux, reward: Reward) -> None:
        self.config, self.flux = config, flux
        flux.patch(config.model.kernels)
        for parameter in flux.trainable().values():
            parameter.requires_grad_(True)
        set_gradient_dtype(config.optimizer, flux.trainable().values(), 1)
        keep_activations(config, flux)
        ranks = Ranks(0, 1, flux.device)
        self.batches = CleanBatches(config, ranks, flux, reward, _OneCaption(config))  # type: ignore[arg-type]
        self.update = Update(config, ranks, flux, reward, self.batches, sharded=False)
        self._reward = reward
        self.optimizer = load_optimizer(
            config.optimizer,
            config.srpo,
            list(flux.trainable().values()),
            precision=config.model.precision,
            seed=config.run.seed,
        )

    def gradient(self, step: int, phases: Phases) -> list[Draw]:
        """Adds the gradient of update `step`."""
        with self._watched(phases):
            return self.update.accumulate(step, lambda: None, _Timed(phases, self.flux.device))

    def step(self, step: int, phases: Phases) -> dict[str, float]:
        """All of update `step`; returns what the optimizer tells."""
        self.optimizer.zero_grad(set_to_none=True)
        self.gradient(step, phases)
        with phases.of("optimizer"):
            return take_step(self.optimizer, self.config.srpo.max_grad_norm)

    @contextmanager
    def _watched(self, phases: Phases) -> Iterator[None]:
        """Models and loss tell `phases` when they are at work."""
        flux, reward, update = self.flux, self._reward, self.update
        own: list[tuple[Any, str, Any]] = [
            (flux, "velocity", _forward(flux, phases)),
            (flux, "decode", phases.wrapped("decode", flux.decode)),
            (reward, "relative", phases.wrapped("reward", reward.relative)),
            (update, "draw", _drawn(update, phases)),
        ]
        for target, name, replacement in own:
            setattr(target, name, replacement)
        try:
            yield
        finally:
            for target, name, _ in own:
                delattr(target, name)


def _forward(flux: Flux, phases: Phases) -> Any:
    original = flux.velocity

    def velocity(*args: Any, **kwargs: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return original(*args, **kwargs)  # a rollout's
        with phases.of("forward"):
            return phases.at_gradient(original(*args, **kwargs), "backward")

    return velocity


def _drawn(update: Update, phases: Phases) -> Any:
    original = update.draw

    def draw(*args: Any, **kwargs: Any) -> Draw:
        drawn = original(*args, **kwargs)
        phases.at_gradient(drawn.loss, "image backward")
        return drawn

    return draw


class _Timed(Seconds):
    """The trainer's phases as those of a `Phases`. What its gradient does outside models is to inject and recover."""

    def __init__(self, phases: Phases, device: torch.device) -> None:
        super().__init__(device)
        self._phases = phases

    @contextmanager
    def of(self, phase: str) -> Iterator[None]:
        with self._phases.of({"gradient": "inject"}.get(phase, phase)):
            yield


class _OneCaption:
    """In place of a run's data."""

    def __init__(self, config: TrainConfig) -> None:
        self.controls = control_schedule(config)

    def at(self, positions: range, coin: torch.Generator) -> tuple[list[Prompt], list[Any]]:
        del coin
        return [Prompt(CAPTION) for _ in positions], []
