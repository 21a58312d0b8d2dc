"""DanceGRPO on relative scores of a reward that has no gradient, and a taste."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from srpo.assets import TINY
from srpo.config import load_config
from srpo.experiments.arms import Arm, shown, trained
from srpo.experiments.bias import along, pulled
from srpo.experiments.experiment import Conclusion, Experiment, Row, Setting, measured
from srpo.experiments.looks import curve_figure, ends_table, gained, last
from srpo.experiments.taste import TastefulReward, slanted, warm
from srpo.images import panels
from srpo.rewards import Reward

__all__ = ["GRPO", "Rounded"]

SINGLE, RELATIVE = SCORES = ("single prompt", "relative")
TASTED = {name: f"{name}, taste" for name in SCORES}
STRENGTH = 0.25  # of the taste
STEP = 0.01  # of scores
SIZE = (  # of the tiny world: few images and updates suffice
    "srpo.batch_size=8",
    "run.micro_batch=8",
    "dancegrpo.generations=8",
    "dancegrpo.optimizer_steps=2",
    "dancegrpo.eta=0.7",
    "dancegrpo.clip_range=0.01",
)


class GRPO(Experiment):
    """DanceGRPO by the positive prompt's score and by both prompts', with and without a taste in the reward."""

    name = "grpo"
    claim = "a relative form for GRPO, with rewards that cannot be differentiated, is left open."
    seeds = (3, 2)

    def measure(self, setting: Setting, out: Path, say: Callable[[str], None]) -> Iterator[Row]:
        arms = _arms(setting)
        yield from trained(arms, setting, out, say, images=50)
        panels(shown(arms, out, 20), 10, stacked=True).save(out / f"{self.name}.png")

    def table(self, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
        columns = {"moved": "moved", "kept": "kept", "diverse": "diversity"}
        header, lines = ends_table(rows, [*SCORES, *TASTED.values()], columns)
        return [*header, "drift"], [[*line, measured(gained(rows, line[0], along(rows)))] for line in lines]

    def curves(self, rows: Sequence[Row]) -> list[str]:
        keys = {"moved": "moved", along(rows): f"drift: {along(rows)}", "kept": "kept"}
        return [curve_figure(rows, [*SCORES, *TASTED.values()], key, title) for key, title in keys.items()]

    def conclusions(self, rows: Sequence[Row]) -> list[Conclusion]:
        return [*(_alone(rows, name) for name in SCORES), _compared(rows)]


class Rounded(Reward):
    """A reward's scores on a scale of steps of `STEP`, as ratings are: there is nothing to differentiate.

    A relative score is made of two of them, (1 + kappa) positive - negative.
    """

    def __init__(self, reward: Reward) -> None:
        self._reward = reward
        self.files = reward.files

    def embed_prompts(self, prompts: Sequence[str]) -> Tensor | None:
        return self._reward.embed_prompts(prompts)

    def release_text_tower(self, device: str | torch.device = "cpu") -> None:
        self._reward.release_text_tower(device)

    @torch.no_grad()
    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return STEP * (self._reward.score(images, prompts) / STEP).round()

    def relative(self, images: Tensor, positive: list[str], negative: list[str], kappa: Tensor) -> Tensor:
        return (1 + kappa) * self.score(images, positive) - self.score(images, negative)

    def limit(self, kappa: float) -> float:
        return self._reward.limit(kappa) + (2 + kappa) * STEP / 2


def _arms(setting: Setting) -> list[Arm]:
    own = {SINGLE: "dancegrpo.control=true", RELATIVE: "dancegrpo.relative=true"}
    common, taste, every = ["algorithm=dancegrpo"], warm, 0
    if load_config(setting.recipe, [*common, *setting.overrides]).model.path == TINY:
        common += [*SIZE, f"srpo.updates={4 if setting.quick else 10}"]
        taste, every = slanted, 2
    return [
        Arm(arm, (*common, own[name]), every, reward=partial(_rounded, taste=taste, strength=strength))
        for strength, names in ((0.0, SCORES), (STRENGTH, TASTED.values()))
        for name, arm in zip(SCORES, names, strict=True)
    ]


def _rounded(reward: Reward, taste: Callable[[Tensor], Tensor], strength: float) -> Reward:
    return Rounded(TastefulReward(reward, taste, strength))


def _alone(rows: Sequence[Row], name: str) -> Conclusion:
    """How far it moves, with the taste, and how far the taste pulls it."""
    arm = TASTED[name]
    added, per_moved = pulled(rows, arm, name)
    kept, diverse = (measured(last(rows, arm, key)) for key in ("kept", "diverse"))
    text = (
        f"{name}: moved {measured(last(rows, name, 'moved'))} by a reward without a taste, "
        f"{measured(last(rows, arm, 'moved'))} with one that pulls it by {measured(added)} along {along(rows)} "
        f"({measured(per_moved)} per moved); kept {kept}, diversity {diverse}."
    )
    return Conclusion(text, None)


def _compared(rows: Sequence[Row]) -> Conclusion:
    """What the relative score changes, seed by seed."""

    def change(single: list[float], relative: list[float]) -> str:
        return measured([b - a for a, b in zip(single, relative, strict=True)])

    single, relative = (pulled(rows, TASTED[name], name) for name in SCORES)
    moved, kept = (change(*(last(rows, TASTED[name], key) for name in SCORES)) for key in ("moved", "kept"))
    text = (
        f"With a taste, relative less single prompt: moved {moved}, kept {kept}, "
        f"pulled {change(single[0], relative[0])} "
        f"({change(single[1], relative[1])} per moved)."
    )
    return Conclusion(text, None)
