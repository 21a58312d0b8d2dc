"""The clean batches of an update: which prompts and images, their control words and texts, and where x0 comes from."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from srpo.config import TrainConfig
from srpo.data import BadImageError, CaptionedImage
from srpo.distributed import Ranks
from srpo.errors import InputError
from srpo.models import Flux
from srpo.prompts import Prompt
from srpo.randomness import generator
from srpo.rewards import Reward
from srpo.sampling import rollout
from srpo.sources import Sources

__all__ = ["CleanBatch", "CleanBatches", "clean_batches"]


class CleanBatch(NamedTuple):
    """Packed latents x0 [B, S, 4C], the noise [B or 1, S, 4C] that Direct-Align injects, and B captions."""

    x0: Tensor
    noise: Tensor
    captions: list[Prompt]
    forwards: int  # of the transformer for one image, that x0 took


class CleanBatches:
    """This rank's clean batches: `count` an update.

    A batch's content depends on the step and its number among those of all ranks alone, so any number of ranks trains
    on the same ones, and resuming is exact.
    """

    def __init__(self, config: TrainConfig, ranks: Ranks, flux: Flux, reward: Reward, sources: Sources) -> None:
        self.config = config
        self.count = clean_batches(config, ranks.world)
        self.size = (config.srpo.height, config.srpo.width)
        self._ranks, self._flux, self._reward, self._sources = ranks, flux, reward, sources

    def number(self, index: int) -> int:
        """Number of this rank's batch `index` among those of all ranks."""
        return self._ranks.rank * self.count + index

    def chosen(self, step: int, index: int) -> tuple[list[Prompt], list[CaptionedImage]]:
        """Captions of a clean batch, and its images: none when it is a rollout's."""
        run, batch = self.config.run, self.number(index)
        first = (step * self._ranks.world * self.count + batch) * run.micro_batch
        positions = range(first, first + run.micro_batch)
        return self._sources.at(positions, generator(run.seed, step, 0, f"mode/{batch}"))

    def controls(self, step: int, captions: Iterable[Prompt]) -> list[tuple[str, str]]:
        """The control words of each caption."""
        return [self._sources.controls.pair(step, caption.positive, caption.negative) for caption in captions]

    def prepare_texts(self, start: int) -> None:
        """Have all that this rank will encode from update `start` on in the cache on disk: no text encoder stays."""
        if self._flux.texts is None:
            return
        texts = [caption.text for _, captions in self._ahead(start) for caption in captions]
        if self.config.run.sample_every:
            texts += self._sources.sample_prompts()
        try:
            self._flux.texts.prepare(texts)
        except OSError as error:
            warnings.warn(f"text cache {self.config.model.text_cache} cannot be written: {error}", stacklevel=2)

    def prepare_reward(self, start: int, scored: Callable[[int, Sequence[Prompt]], list[str]]) -> None:
        """With a text cache of its own, have the reward embed all that it will be asked about from update `start` on:
        its text tower leaves the device.
        """
        if self.config.reward.text_cache is None:
            return
        for step, captions in self._ahead(start):
            self._reward.embed_prompts(scored(step, captions))
        self._reward.release_text_tower()

    def _ahead(self, start: int) -> Iterator[tuple[int, list[Prompt]]]:
        """Step and captions of every clean batch of this rank from update `start` on."""
        for step, index in product(range(start, self.config.srpo.updates), range(self.count)):
            yield step, self.chosen(step, index)[0]

    def embed_texts(self, step: int, index: int, scored: Callable[[int, Sequence[Prompt]], list[str]]) -> None:
        """Have every text that a clean batch's rollout and draws ask for cached: no text tower runs in them.

        `scored`: the prompts that the reward will be asked about, for captions of the step.
        """
        captions, _ = self.chosen(step, index)
        self._flux.encode_prompts([caption.text for caption in captions])
        self._reward.embed_prompts(scored(step, captions))

    def noise(self, step: int, index: int) -> Tensor:
        """Noise [B or 1, S, 4C] of a clean batch."""
        objective, run = self.config.srpo, self.config.run
        if objective.noise == "shared":
            return self._flux.noise(1, *self.size, generator(run.seed, step, 0, "noise"))
        name = f"noise/{self.number(index)}"
        return self._flux.noise(run.micro_batch, *self.size, generator(run.seed, step, 0, name))

    def load(self, step: int, index: int, check: Callable[[], None]) -> CleanBatch:
        """Clean latents, their noise and captions: from a rollout of that noise, or from real images.

        `check` is called between rollout steps, and may raise.
        """
        # One rank may roll out while another reads images: all gather sharded weights, though only some use them.
        with self._flux.whole() if self.config.data.mode == "mixed" else nullcontext():
            return self._load(step, index, check)

    def _load(self, step: int, index: int, check: Callable[[], None]) -> CleanBatch:
        objective, run = self.config.srpo, self.config.run
        noise = self.noise(step, index)
        captions, images = self.chosen(step, index)
        while images:
            latents = []
            try:
                for image in images:
                    latents.append(self._sources.image_latents(image, self._flux.encode_images).to(noise.device))
                return CleanBatch(torch.cat(latents), noise, captions, 0)
            except BadImageError as error:  # since it was checked: the one that resuming would find in its place
                warnings.warn(f"{image.path} {error}; another image takes its place", stacklevel=2)
                self._sources.reject(image, str(error))
                captions, images = self.chosen(step, index)
        x0 = rollout(
            self._flux,
            noise.expand(run.micro_batch, -1, -1),
            [caption.text for caption in captions],
            size=self.size,
            steps=objective.rollout_steps,
            shift=objective.shift,
            guidance=objective.rollout_guidance,
            solver=run.rollout_solver,
            quantized=True,
            gather=run.rollout_gather == "whole",
            # Ranks answer a check together: not while one of them rolls out and another reads images.
            on_step=check if self._ranks.world == 1 or self.config.data.mode == "online" else None,
        )
        return CleanBatch(x0, noise, captions, objective.rollout_steps * len(captions))


def clean_batches(config: TrainConfig, world: int) -> int:
    """Clean batches that each rank needs for one update.

    Raises `InputError` when these cannot be dealt out evenly, or the ranks not into groups that share parameters.
    """
    run = config.run
    if world > 1 and world % (run.shard_size or 1):
        raise InputError(f"run.shard_size ({run.shard_size}) must divide the number of ranks, {world}")
    share = world * run.micro_batch * run.draws_per_rollout
    if config.srpo.batch_size % share:
        raise InputError(
            f"srpo.batch_size ({config.srpo.batch_size}) must be a multiple of ranks x run.micro_batch x "
            f"run.draws_per_rollout = {world} x {run.micro_batch} x {run.draws_per_rollout} = {share}"
        )
    return config.srpo.batch_size // share
