"""All that a run learns from: its prompts, images and control words, checked before any weights are loaded."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from srpo.assets import resolve_asset
from srpo.config import TrainConfig
from srpo.controls import ControlSchedule
from srpo.data import CaptionedImage, ImageSet, order, read_images
from srpo.latent_cache import LatentCache
from srpo.model_directory import check_model_directory
from srpo.precision import compute_dtype
from srpo.prompts import FileReport, Prompt, scan_prompts
from srpo.tokens import TokenLimits

__all__ = ["Sources", "control_schedule", "read_sources", "read_validation"]


def control_schedule(config: TrainConfig) -> ControlSchedule:
    """The control words of a run."""
    return ControlSchedule(config.srpo, config.data.control_group, config.data.control_groups)


def read_sources(
    config: TrainConfig, limits: TokenLimits | None, latents: LatentCache | None = None
) -> tuple[list[Prompt], ImageSet | None, list[FileReport]]:
    """The usable prompts and the images of a recipe, and a report on each file.

    `limits` tells what is too long. Images that `latents` holds are not decoded.

    Raises `InputError` when a file cannot be read at all, or a list of images cannot be used.
    """
    data, objective = config.data, config.srpo
    prompts: list[Prompt] = []
    images, reports = None, []
    if data.prompts is not None:
        path = resolve_asset(data.prompts, "prompts.txt")
        prompts, report = scan_prompts(path, data.control_groups, limits.measure if limits else None)
        reports.append(report)
    if data.images is not None:
        images = read_images(
            data.images,
            (objective.height, objective.width),
            groups=data.control_groups,
            max_bad_fraction=data.max_bad_fraction,
            max_upscale=data.max_upscale,
            **({"known": latents.holds} if latents is not None else {}),
        )
        if limits is not None:
            limits.measure(images.report, [(image.line, image.prompt.text) for image in images.images])
        reports.append(images.report)
    return prompts, images, reports


def read_validation(config: TrainConfig, limits: TokenLimits | None) -> tuple[list[Prompt], list[FileReport]]:
    """The usable prompts of ``validation.prompts``, and a report on it; nothing where there is none.

    Raises `InputError` when the file cannot be read at all.
    """
    if config.validation.prompts is None:
        return [], []
    prompts, report = scan_prompts(config.validation.prompts, measure=limits.measure if limits else None)
    return prompts, [report]


class Sources:
    """The data of a run. What is drawn is a pure function of the seed and of a position.

    `model`: the pipeline directory, checked.

    Raises `InputError` when a file, a line of it or too many of its images cannot be used.
    """

    def __init__(self, config: TrainConfig, model: Path) -> None:
        self._config = config
        self.controls = control_schedule(config)
        self.latents = None
        if config.data.latent_cache is not None and config.data.images is not None:
            self.latents = LatentCache(
                config.data.latent_cache,
                model / "vae",
                size=(config.srpo.height, config.srpo.width),
                dtype=compute_dtype(config.model.precision),
                kernels=config.model.kernels,
            )
        limits = TokenLimits(model, config.model.max_sequence_length, self.controls.words())
        self.prompts, self.images, self.reports = read_sources(config, limits, self.latents)
        self.validation, reports = read_validation(config, limits)
        self.reports += reports
        for size in config.validation.sizes:
            check_model_directory(model, size, text=False)
        for report in self.reports:
            report.check()
        self._weights = tuple(prompt.weight for prompt in self.prompts)
        self._image_weights = tuple(image.prompt.weight for image in self.images.images) if self.images else ()

    def warn(self) -> None:
        """Warn of all that is wrong with the data but lets it be used."""
        for report in self.reports:
            for warning in report.warnings():
                warnings.warn(f"{report.name}: {warning}", stacklevel=2)
        if bad := self.bad_images():
            warnings.warn(f"{len(bad)} images cannot be used and are skipped: {'; '.join(bad[:3])}", stacklevel=2)

    def record(self) -> dict[str, Any]:
        """For the log."""
        return {"files": [report.record() for report in self.reports], "bad_images": self.bad_images()}

    def bad_images(self) -> list[str]:
        """Line, path and reason of every image that is not used."""
        return self.images.bad_images() if self.images else []

    def reject(self, image: CaptionedImage, reason: str) -> None:
        """Never use an image again. Raises `InputError` when too many are bad."""
        if self.images is not None:
            self.images.reject(image, reason)

    def texts(self) -> list[str]:
        """Every text that a prompt, an image or validation has, each once: those of prompts first."""
        images = [image.prompt for image in self.images.images] if self.images else []
        return list(dict.fromkeys(prompt.text for prompt in (*self.prompts, *images, *self.validation)))

    def sample_prompts(self) -> list[str]:
        """Texts of a grid of samples: those of validation, or the first of the run's."""
        if self.validation:
            return [prompt.text for prompt in self.validation]
        texts = [prompt.text for prompt in self.prompts] or self.texts()
        return [texts[index % len(texts)] for index in range(self._config.run.sample_count)]

    def at(self, positions: range, coin: torch.Generator) -> tuple[list[Prompt], list[CaptionedImage]]:
        """Prompts at `positions` of the run, and their images: none when those are a rollout's.

        In mixed mode, `coin` tells which of both.
        """
        data, seed = self._config.data, self._config.run.seed
        heads = torch.rand((), generator=coin) < data.offline_fraction
        if self.images is not None and (data.mode == "offline" or (data.mode == "mixed" and heads)):
            places = order(len(self.images.images), positions, seed, self._image_weights)
            images = [self.images.at(place) for place in places]
            return [image.prompt for image in images], images
        return [self.prompts[item] for item in order(len(self.prompts), positions, seed, self._weights)], []

    def image_latents(self, image: CaptionedImage, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """Packed latents [1, S, 4C] of an image: cached, or ``encode(pixels [1, 3, H, W])``.

        Raises `BadImageError` when the file cannot be read any more.
        """
        size = (self._config.srpo.height, self._config.srpo.width)

        def latents() -> Tensor:
            # Alone: latents must not depend on the other images of a batch, or a cache would change a run.
            return encode(image.pixels(size)[None])

        return latents() if self.latents is None else self.latents.latents(image.digest, latents)
