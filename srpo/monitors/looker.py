"""What a model shows: images of fixed prompts from fixed noise, velocities at fixed places, and their measurements."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import NamedTuple

import torch
from torch import Tensor

from srpo.config import TrainConfig
from srpo.distributed import Ranks
from srpo.models import Flux
from srpo.monitors.measured import mean_by_prompt
from srpo.monitors.pairs import diversity, diversity_pixels, drift
from srpo.monitors.pixels import look
from srpo.monitors.reference import Reference
from srpo.monitors.scores import Scores
from srpo.randomness import generator
from srpo.sampling import rollout
from srpo.sealed import content_digest

__all__ = ["Looker"]

_DRIFTED = 4  # prompts whose velocities are compared


class _Seen(NamedTuple):
    """One image: uint8 [3, H, W], its clean latents [S, 4C], embedding [D] and measurements."""

    pixels: Tensor
    latents: Tensor
    features: Tensor | None
    values: dict[str, float]


class Looker:
    """Looks at a model, all ranks together. What it sees is a pure function of the weights and of the recipe.

    Args:
        prompts: the prompt of each image. scores: the rewards that look at them.

    Attributes:
        key: digest of all but the weights that what is seen depends on.
    """

    def __init__(self, config: TrainConfig, ranks: Ranks, flux: Flux, prompts: list[str], scores: Scores) -> None:
        self._config, self._ranks, self._flux, self._scores = config, ranks, flux, scores
        self._prompts = prompts
        self._sizes = list(dict.fromkeys([(config.srpo.height, config.srpo.width), *config.validation.sizes]))
        self._drifted = [prompts.index(prompt) for prompt in dict.fromkeys(prompts)][:_DRIFTED]
        self._whole = config.run.rollout_gather == "whole"
        self.key = self._digest()

    @torch.no_grad()
    def look(self, start: Reference | None) -> Reference:
        """The model as it is; `start`: what step 0 showed, None when this is step 0."""
        with self._flux.whole() if self._whole else nullcontext():
            seen = {size: self._together(self._images(size)) for size in self._sizes}
            rows = seen[self._sizes[0]]
            latents = torch.stack([rows[row].latents for row in self._drifted]) if start is None else start.latents
            moved = self._together(self._velocities(latents))
        velocities = torch.stack([moved[number] for number in range(len(latents))])
        measured: dict[str, dict[str, float]] = {}
        for size, images in seen.items():
            at = "" if size == self._sizes[0] else f"@{size[0]}x{size[1]}"
            found = mean_by_prompt({row: one.values for row, one in images.items()}, self._prompts)
            measured |= {f"{name}{at}": values for name, values in (found | self._diversity(images)).items()}
        measured |= self._drift(velocities, velocities if start is None else start.velocities)
        pixels = {
            f"{size[0]}x{size[1]}": torch.stack([images[row].pixels for row in range(len(images))])
            for size, images in seen.items()
        }
        return Reference(measured, pixels, latents, velocities)

    def _together(self, own: Iterator[tuple[int, object]]) -> dict:
        """What all ranks make, by number."""
        return {number: one for part in self._ranks.together(lambda: dict(own)) for number, one in part.items()}

    def _dealt(self, count: int) -> range:
        """This rank's share of `count` things: all of them where ranks can only call the model together."""
        return range(self._ranks.rank, count, self._ranks.world) if self._whole else range(count)

    def _images(self, size: tuple[int, int]) -> Iterator[tuple[int, _Seen]]:
        """This rank's images of `size`, each sampled in the same batch whatever the number of ranks."""
        run, objective = self._config.run, self._config.srpo
        noise = self._noise(size)
        for number in self._dealt(-(-len(self._prompts) // run.micro_batch)):
            first = number * run.micro_batch
            prompts = self._prompts[first : first + run.micro_batch]
            latents = rollout(
                self._flux,
                noise[first : first + run.micro_batch],
                prompts,
                size=size,
                steps=run.sample_steps,
                shift=objective.shift,
                guidance=objective.guidance,
                gather=self._whole,
            )
            # As 8-bit pixels: what is measured is what is shown.
            pixels = (self._flux.decode_packed(latents, size) * 255).round().to(torch.uint8)
            images = pixels.float() / 255
            values = self._scores.score(images, prompts) | look(images, factor=self._flux.pipeline.vae_scale_factor)
            features = self._scores.features(images)
            for place in range(len(prompts)):
                embedding = None if features is None else features[place].cpu()
                of = {name: value[place].item() for name, value in values.items()}
                yield first + place, _Seen(pixels[place].cpu(), latents[place].cpu(), embedding, of)

    def _velocities(self, latents: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Velocities [K, S, 4C] at K noise levels of this rank's share of `latents` [D, S, 4C]."""
        size, device = self._sizes[0], self._flux.device
        sigmas = torch.tensor(self._config.validation.drift_sigmas, device=device)
        noise = self._noise(size)
        for number in self._dealt(len(latents)):
            row = self._drifted[number]
            x_t = torch.lerp(latents[number].to(device), noise[row], sigmas[:, None, None])
            conditioning = self._flux.encode_prompts([self._prompts[row]] * len(sigmas))
            yield number, self._flux.velocity(x_t, sigmas, conditioning, self._config.srpo.guidance, size).cpu()

    def _noise(self, size: tuple[int, int]) -> Tensor:
        purpose = "sample" if size == self._sizes[0] else f"sample/{size[0]}x{size[1]}"
        return self._flux.noise(len(self._prompts), *size, generator(self._config.run.seed, 0, 0, purpose))

    def _drift(self, velocities: Tensor, start: Tensor) -> dict[str, dict[str, float]]:
        sigmas = self._config.validation.drift_sigmas
        rows = {row: drift(now, then, sigmas) for row, now, then in zip(self._drifted, velocities, start, strict=True)}
        return mean_by_prompt(rows, self._prompts)

    def _diversity(self, images: dict[int, _Seen]) -> dict[str, dict[str, float]]:
        """Diversity of the images of each prompt that has several."""
        found: dict[str, dict[str, float]] = {}
        for prompt in dict.fromkeys(self._prompts):
            same = [images[row] for row, text in enumerate(self._prompts) if text == prompt]
            if len(same) > 1:
                pixels = torch.stack([one.pixels for one in same]).double() / 255
                found.setdefault("diversity_pixels", {})[prompt] = diversity_pixels(pixels).item()
                features = [one.features for one in same if one.features is not None]
                if features:
                    found.setdefault("diversity", {})[prompt] = diversity(torch.stack(features)).item()
        return found

    def _digest(self) -> str:
        config, section = self._config, self._config.validation
        rewards = [replace(config.reward, text_cache=None), section.held_out, section.alignment]
        told = {
            "prompts": self._prompts,
            "sizes": self._sizes,
            "rewards": [asdict(reward) if reward else None for reward in rewards],
            "measured": [section.sgp, section.drift_sigmas],
            "model": asdict(replace(config.model, text_cache=None)),
            "srpo": asdict(replace(config.srpo, updates=1)),
            "run": [config.run.seed, config.run.sample_steps, config.run.micro_batch],
        }
        return content_digest({}, json.dumps(told, sort_keys=True))[:16]
