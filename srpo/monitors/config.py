"""A recipe's `validation` section."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field

from srpo.monitors.catalog import MONITORS, Limit
from srpo.rewards.config import RewardPart

__all__ = ["ValidationConfig", "check_validation"]


@dataclass(frozen=True)
class ValidationConfig:
    """What is measured when `run.sample_every` asks for sample grids, and what follows (docs/monitors.md)."""

    prompts: str | None = None  # file of validation prompts; null: the first run.sample_count of the run's own
    noises: int = 1  # images of each, from different noise; diversity needs at least 2 of a prompt
    sizes: tuple[tuple[int, int], ...] = ()  # further sizes [height, width] to look at, such as that of inference
    held_out: RewardPart | None = None  # a reward that the run does not train on
    alignment: RewardPart | None = None  # what scores plain prompts; null: the trained reward
    sgp: tuple[str, str] | None = ("Realistic photo", "CG Render")  # words of the semantic guided preference
    drift_sigmas: tuple[float, ...] = (0.9, 0.6, 0.3)  # noise levels at which velocities are compared
    # The largest change of a monitor from step 0, in its unit or as in "25%": beyond it a run warns, or stops.
    warn: Mapping[str, float | str | None] = field(default_factory=dict)  # null: not of this monitor
    stop: Mapping[str, float | str] = field(default_factory=dict)
    best: str | None = None  # the monitor whose best checkpoint is kept, such as held_out

    def __post_init__(self) -> None:
        if self.noises < 1:
            raise ValueError(f"validation.noises must be at least 1, got {self.noises}")
        if not self.drift_sigmas or any(not 0 < sigma < 1 for sigma in self.drift_sigmas):
            raise ValueError(f"validation.drift_sigmas must be levels between 0 and 1, got {self.drift_sigmas}")
        for key in ("warn", "stop"):
            for name, limit in getattr(self, key).items():
                _check_monitor(f"validation.{key}", name)
                if limit is not None or key == "stop":
                    try:
                        Limit.parse(limit)
                    except ValueError as error:
                        raise ValueError(f"validation.{key}.{name} {error}") from None
        if self.best is not None:
            _check_monitor("validation.best", self.best)
            if self.best == "drift" or MONITORS[self.best].harm == "either":
                raise ValueError(
                    f"validation.best {self.best} has no best value but step 0's: any change of it does harm"
                )
        if self.held_out is None and "held_out" in (*self.stop, self.best):
            raise ValueError("validation.stop or validation.best asks for validation.held_out, which names no reward")

    def warnings(self) -> dict[str, Limit]:
        """The limit of every monitor that warns."""
        limits = {name: monitor.warn for name, monitor in MONITORS.items()} | dict(self.warn)
        return {name: Limit.parse(limit) for name, limit in limits.items() if limit is not None}

    def stops(self) -> dict[str, Limit]:
        """The limit of every monitor that stops a run."""
        return {name: Limit.parse(limit) for name, limit in self.stop.items()}


def check_validation(config: ValidationConfig, sample_every: int, save_every: int) -> None:
    """Raises `ValueError` when steps that a recipe needs are not looked at, or not kept."""
    if sample_every == 0 and (config.stop or config.best):
        raise ValueError("validation.stop and validation.best need run.sample_every: with 0 nothing is measured")
    if config.best and sample_every % save_every:
        raise ValueError(
            f"validation.best needs checkpoints of the steps it compares: run.sample_every ({sample_every}) must be a "
            f"multiple of run.save_every ({save_every})"
        )


def _check_monitor(key: str, name: str) -> None:
    if name not in MONITORS:
        near = difflib.get_close_matches(name, MONITORS, 1, 0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"monitors are {', '.join(MONITORS)}"
        raise ValueError(f"{key}: unknown monitor {name!r}: {hint}")
