"""What an experiment sees of a model: measurements that the reward it is trained on knows nothing of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache
from statistics import fmean

import torch
from torch import Tensor

from srpo.assets import TINY
from srpo.errors import InputError
from srpo.monitors.looker import Looker
from srpo.monitors.pixels import look
from srpo.monitors.reference import Reference
from srpo.monitors.scores import Scores
from srpo.precision import compute_dtype
from srpo.randomness import generator
from srpo.sampling import sample_images
from srpo.tiny import ATTRIBUTES
from srpo.tiny.digits import NAMES, caption
from srpo.tiny.judge import Judge
from srpo.trainer import Trainer

__all__ = ["DigitWitness", "MonitorWitness", "Witness", "compared_digits", "judge", "witness"]

_DRIFTED = 4


@cache
def judge() -> Judge:
    """The judge of digits, made once a process."""
    return Judge.load()


def compared_digits(found: dict[str, float], first: dict[str, float], attribute: str, sign: int) -> dict[str, float]:
    """moved, kept and diverse of what the judge measured now and at first; `sign` says which way `attribute` moves."""
    return {
        "moved": sign * (found[attribute] - first[attribute]),
        "kept": found["accuracy"],
        "diverse": found["diversity"] / first["diversity"],
    }


class Witness(ABC):
    """Looks at a model again and again, and compares what it sees with its first look.

    Attributes:
        images: what the last look showed, [N, 3, H, W] in [0, 1]. prompts: what they should show, N texts.
    """

    images: Tensor
    prompts: list[str]
    _first: tuple[dict[str, float], Tensor] | None = None

    def look(self) -> dict[str, float]:
        """What is measured now, and from it what experiments compare, whatever the model:

        moved: how far images went where the control words point, from the first look. kept: how well they still show
        what their prompt says. diverse: their diversity, the first look's being 1. changed: the root mean square of
        pixels' change since the first look, in [0, 1].
        """
        found = self._measure()
        first, images = self._first = self._first or (found, self.images)
        changed = (self.images - images).square().mean().sqrt().item()
        return found | self._compared(found, first) | {"changed": changed}

    @abstractmethod
    def judged(self, images: Tensor) -> dict[str, float]:
        """Of other images [N, 3, H, W] of the prompts: where they are that `moved` tells the change of, and kept."""

    @abstractmethod
    def _measure(self) -> dict[str, float]:
        """Measurements by name."""

    @abstractmethod
    def _compared(self, found: dict[str, float], first: dict[str, float]) -> dict[str, float]:
        """moved, kept and diverse."""


class DigitWitness(Witness):
    """Of the tiny world: digits from plain captions, looked at by `srpo.tiny.judge.Judge`.

    moved is in standard deviations of real digits, kept the share of images that are the digit they should be. The
    monitors of pixels, of the trained reward and of velocities are measured, too.

    Args:
        towards: the word whose attribute `moved` tells, such as "bold". seed: of the noise. count: images.

    Raises `InputError` when `towards` is no word of what the judge measures.
    """

    def __init__(self, trainer: Trainer, towards: str, seed: int, count: int) -> None:
        measured = {key: words for key, words in ATTRIBUTES.items() if key != "aspect"}
        self._attribute = next((key for key, words in measured.items() if towards in words), "")
        if not self._attribute:
            known = ", ".join(word for words in measured.values() for word in words)
            raise InputError(f"the tiny world's judge measures nothing of {towards!r}; it knows {known}")
        self._sign = 1 if measured[self._attribute][0] == towards else -1
        self._config, self._flux, self._scores = trainer.config, trainer.flux, _scores(trainer)
        self._seed, self._labels = seed, torch.arange(count) % len(NAMES)
        self.prompts = [caption(label) for label in self._labels.tolist()]
        # Of images of its own: few, as velocities are compared at few.
        self._looker = Looker(trainer.config, trainer.ranks, trainer.flux, self.prompts[:_DRIFTED], self._scores)
        self._start: Reference | None = None

    def judged(self, images: Tensor) -> dict[str, float]:
        found = judge().measure(images, self._labels)
        return {"at": self._sign * found[self._attribute], "kept": found["accuracy"]}

    def _measure(self) -> dict[str, float]:
        objective = self._config.srpo
        size = (objective.height, objective.width)
        self.images = sample_images(
            self._flux,
            self._flux.noise(len(self.prompts), *size, generator(self._seed, 0, 0, "witness")),
            self.prompts,
            size=size,
            steps=self._config.run.sample_steps,
            shift=objective.shift,
            guidance=objective.guidance,
            batch=100,
        )
        with torch.no_grad():
            seen = self._scores.score(self.images.to(self._flux.device), self.prompts)
        seen |= look(self.images, factor=self._flux.pipeline.vae_scale_factor)
        found = {name: of.mean().item() for name, of in seen.items()} | judge().measure(self.images, self._labels)
        moved = self._looker.look(self._start)
        self._start = self._start or moved
        return found | {name: fmean(of.values()) for name, of in moved.measured.items() if name.startswith("drift")}

    def _compared(self, found: dict[str, float], first: dict[str, float]) -> dict[str, float]:
        return compared_digits(found, first, self._attribute, self._sign)


class MonitorWitness(Witness):
    """Of any model: the monitors of the recipe's `validation` section (docs/monitors.md).

    moved is the change of the semantic guided preference, kept the alignment with the plain prompt.

    Raises `InputError` when the recipe measures one of these not.
    """

    def __init__(self, trainer: Trainer) -> None:
        config = trainer.config
        if config.validation.sgp is None or config.validation.noises < 2:
            raise InputError("experiments need validation.sgp and at least 2 validation.noises")
        self.prompts = [text for text in trainer.sources.sample_prompts() for _ in range(config.validation.noises)]
        self._scores, self._device = _scores(trainer), trainer.ranks.device
        self._looker = Looker(config, trainer.ranks, trainer.flux, self.prompts, self._scores)
        self._start: Reference | None = None

    @torch.no_grad()
    def judged(self, images: Tensor) -> dict[str, float]:
        found = self._scores.score(images.to(self._device), self.prompts)
        return {"at": found["sgp"].mean().item(), "kept": found["alignment"].mean().item()}

    def _measure(self) -> dict[str, float]:
        seen = self._looker.look(self._start)
        self._start = self._start or seen
        self.images = next(iter(seen.images.values())).float() / 255
        return {name: fmean(of.values()) for name, of in seen.measured.items()}

    def _compared(self, found: dict[str, float], first: dict[str, float]) -> dict[str, float]:
        diverse = found["diversity_pixels"] / first["diversity_pixels"]
        return {"moved": found["sgp"] - first["sgp"], "kept": found["alignment"], "diverse": diverse}


def _scores(trainer: Trainer) -> Scores:
    config, dtype = trainer.config, compute_dtype(trainer.config.model.precision)
    return Scores.load(
        trainer.reward, config.reward, config.validation, config.srpo, device=trainer.ranks.device, dtype=dtype
    )


def witness(trainer: Trainer, towards: str, seed: int, count: int) -> Witness:
    """A `DigitWitness` of `count` images for the tiny world, else a `MonitorWitness`."""
    if trainer.config.model.path != TINY:
        return MonitorWitness(trainer)
    return DigitWitness(trainer, towards or trainer.config.srpo.positive_controls[0], seed, count)
