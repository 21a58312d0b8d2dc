"""Builds the tiny world: a FLUX pipeline and a CLIP reward, trained on real digits in minutes on a CPU."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from transformers import CLIPImageProcessor, CLIPModel, CLIPTextModel

from srpo.files import new_directory
from srpo.tiny import models
from srpo.tiny.digits import NAMES, SIZE, caption, load
from srpo.tiny.judge import Judge
from srpo.tiny.training import Progress, train_clip, train_flow, train_vae
from srpo.tiny.words import LENGTH, clip_tokenizer, t5_tokenizer

__all__ = ["LIBRARIES", "Steps", "build", "reproducible", "sample"]

LIBRARIES = ("torch", "diffusers", "transformers", "tokenizers", "scikit-learn", "scipy", "numpy")


@dataclass(frozen=True)
class Steps:
    """Optimiser steps of the three trainings; the flow training also trains the T5 encoder."""

    vae: int = 400
    clip: int = 500
    flow: int = 7000

    def scaled(self, factor: float) -> Steps:
        """These steps times `factor`, at least one each, for a quick and worse build; ValueError unless positive."""
        if not factor > 0:
            raise ValueError(f"factor must be positive, got {factor}")
        return Steps(*(max(1, round(steps * factor)) for steps in (self.vae, self.clip, self.flow)))


def build(out: Path, *, seed: int = 0, steps: Steps = Steps(), progress: Progress = print) -> None:
    """Train the tiny world and write `pipeline/`, `reward/`, `prompts.txt` and `build.json` into `out`.

    The same seed, steps and library versions give the same bytes on the same kind of machine, `build.json` apart,
    which also holds the time taken.  `out` appears only when complete.  Raises `InputError` when it exists and is not
    an empty directory.
    """
    with new_directory(out) as part:
        with reproducible(seed):
            report = _train_and_save(part, seed, steps, progress)
        (part / "prompts.txt").write_text("".join(caption(i) + "\n" for i in range(len(NAMES))), encoding="utf-8")
        (part / "build.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def sample(pipeline: FluxPipeline, count: int, *, seed: int = 0, steps: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` images [count, 3, 32, 32] in [0, 1] of plain captions, and their digits [count], zero to nine in turn."""
    labels = torch.arange(count) % len(NAMES)
    noise = torch.randn(count, SIZE * SIZE // 64, 16, generator=torch.Generator().manual_seed(seed))
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        [caption(label) for label in labels.tolist()],
        height=SIZE,
        width=SIZE,
        latents=noise,
        num_inference_steps=steps,
        max_sequence_length=LENGTH,
        output_type="pt",
    ).images
    return images, labels


def _train_and_save(out: Path, seed: int, steps: Steps, progress: Progress) -> dict[str, object]:
    """Train everything, write the model directories into `out` and return the report for `build.json`."""
    started = time.monotonic()
    data, rng = load(seed=seed), np.random.default_rng(seed)
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    vae, clip = models.vae(), models.clip(tokenizer)
    transformer, t5 = models.transformer(), models.t5(tokenizer_2)
    losses = {}
    losses["vae"], latents = train_vae(vae, data, steps.vae, progress)
    losses["clip"] = train_clip(clip, tokenizer, vae, data, latents, steps.clip, rng, progress)
    losses["flow"] = train_flow(
        transformer, t5, clip, (tokenizer, tokenizer_2), data, latents, steps.flow, rng, progress
    )

    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
        vae=vae,
        text_encoder=_text_tower(clip),
        tokenizer=tokenizer,
        text_encoder_2=t5,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )
    pipeline.save_pretrained(out / "pipeline")
    clip.save_pretrained(out / "reward")
    tokenizer.save_pretrained(out / "reward")
    CLIPImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    ).save_pretrained(out / "reward")
    quality = Judge.load().measure(*sample(pipeline, 300))
    progress("quality: " + ", ".join(f"{key} {value:.3f}" for key, value in quality.items()))
    return {
        "seed": seed,
        "steps": asdict(steps),
        "seconds": round(time.monotonic() - started, 1),
        # "last" is the mean of the last tenth, as single batches are noisy
        "losses": {
            key: {"first": values[0], "last": float(np.mean(values[-max(1, len(values) // 10) :]))}
            for key, values in losses.items()
        },
        "quality": quality,
        "versions": {name: version(name) for name in LIBRARIES},
    }


def _text_tower(clip: CLIPModel) -> CLIPTextModel:
    """A copy of CLIP's text tower on its own, as FLUX uses it for the pooled text."""
    tower = CLIPTextModel(clip.config.text_config)
    tower.load_state_dict(clip.text_model.state_dict())
    return tower.eval().requires_grad_(False)


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Torch seeded and on one thread; the caller's generator state and thread count come back afterwards.

    How sums round depends on the number of threads, and models this small gain little from a second one.  On one
    thread the CPU's operators are deterministic.
    """
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        try:
            torch.manual_seed(seed)
            torch.set_num_threads(1)
            yield
        finally:
            torch.set_num_threads(threads)
