"""The tiny world's model of another kind: a UNet that predicts the noise of a DDPM schedule.

It shares the digits, the VAE and the T5 encoder of a built tiny world, and follows diffusers' conventions: integer
timesteps, ``x_t = alpha x0 + sigma e`` with ``alpha = sqrt(alphas_cumprod)`` and ``sigma = sqrt(1 - alphas_cumprod)``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import T5EncoderModel, T5Tokenizer

from srpo.files import new_directory
from srpo.model_directory import check_model_directory
from srpo.tiny import models
from srpo.tiny.build import LIBRARIES, reproducible
from srpo.tiny.digits import NAMES, SIZE, caption, load
from srpo.tiny.judge import Judge
from srpo.tiny.training import Progress, decode, encode, token_ids, train_epsilon

__all__ = ["STEPS", "EpsilonModel", "build_epsilon", "schedule"]

STEPS = 5000  # of the optimiser, in a build


def schedule() -> DDIMScheduler:
    """Stable Diffusion's betas; sampling starts at the noisiest timestep and ends at a clean image."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        timestep_spacing="trailing",
        prediction_type="epsilon",
    )


@dataclass(frozen=True)
class EpsilonModel:
    """A noise-predicting UNet with what it takes to sample pictures from captions. Latents are [B, 4, 8, 8]."""

    unet: UNet2DConditionModel
    scheduler: DDIMScheduler
    vae: AutoencoderKL
    tokenizer: T5Tokenizer
    t5: T5EncoderModel

    @classmethod
    def load(cls, directory: Path, pipeline: Path) -> EpsilonModel:
        """What `build_epsilon` wrote into `directory`, in fp32, on the tiny world whose pipeline is given."""
        return cls(
            UNet2DConditionModel.from_pretrained(directory / "unet", torch_dtype=torch.float32),
            DDIMScheduler.from_pretrained(directory / "scheduler"),
            *_world(pipeline),
        )

    def levels(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) of integer timesteps, shaped as they are; -1 is the clean image. fp32."""
        signal = torch.cat([self.scheduler.alphas_cumprod, torch.ones(1)])[timesteps]
        return signal.sqrt(), (1 - signal).sqrt()

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> Tensor:
        """Text states [N, 16, 64]."""
        return self.t5(token_ids(self.tokenizer, list(captions))).last_hidden_state

    def encode_images(self, images: Tensor) -> Tensor:
        """Clean latents of `images` [N, 3, 32, 32] in [0, 1]."""
        config = self.vae.config
        return (encode(self.vae, images) - config.shift_factor) * config.scaling_factor

    def predict(self, x_t: Tensor, timesteps: Tensor, states: Tensor) -> Tensor:
        """The noise in latents `x_t` [N, 4, 8, 8] at integer timesteps [N], captions encoded."""
        return self.unet(x_t, timesteps, encoder_hidden_states=states, return_dict=False)[0]

    @torch.no_grad()
    def sample(self, noise: Tensor, states: Tensor, steps: int) -> Tensor:
        """Clean latents that deterministic DDIM makes of `noise` in so many steps."""
        self.scheduler.set_timesteps(steps)
        x_t = noise
        for timestep in self.scheduler.timesteps:
            prediction = self.predict(x_t, timestep.expand(len(x_t)), states)
            x_t = self.scheduler.step(prediction, timestep, x_t).prev_sample
        return x_t

    def decode(self, latents: Tensor) -> Tensor:
        """Images [N, 3, 32, 32] in [0, 1]. Differentiable."""
        return decode(self.vae, latents)

    def pictures(self, count: int, *, seed: int = 0, steps: int = 20) -> tuple[Tensor, Tensor]:
        """`count` images of plain captions, and their digits [count], zero to nine in turn."""
        labels = torch.arange(count) % len(NAMES)
        noise = torch.randn(count, models.CHANNELS, SIZE // 4, SIZE // 4, generator=torch.Generator().manual_seed(seed))
        states = self.encode([caption(label) for label in labels.tolist()])
        with torch.no_grad():
            return self.decode(self.sample(noise, states, steps)), labels


def build_epsilon(out: Path, pipeline: Path, *, seed: int = 0, steps: int = STEPS, progress: Progress = print) -> None:
    """Train a UNet on the tiny world of `pipeline`; write `unet/` (fp16), `scheduler/` and `build.json` into `out`.

    The same seed, steps and library versions give the same bytes on the same kind of machine, `build.json` apart,
    which also holds the time taken. `out` appears only when complete. Raises `InputError` when it exists and is not an
    empty directory, or `pipeline` is no model directory.
    """
    check_model_directory(pipeline, (SIZE, SIZE))
    with new_directory(out) as part, reproducible(seed):
        started = time.monotonic()
        model = EpsilonModel(models.unet(), schedule(), *_world(pipeline))
        data, rng = load(seed=seed), np.random.default_rng(seed)
        latents = model.encode_images(data.images)
        losses = train_epsilon(model.unet, model.scheduler, model.encode, data, latents, steps, rng, progress)
        model.unet.half().save_pretrained(part / "unet")
        model.scheduler.save_pretrained(part / "scheduler")
        quality = Judge.load().measure(*EpsilonModel.load(part, pipeline).pictures(300))
        progress("quality: " + ", ".join(f"{key} {value:.3f}" for key, value in quality.items()))
        report = {
            "seed": seed,
            "steps": steps,
            "seconds": round(time.monotonic() - started, 1),
            "loss": {"first": losses[0], "last": float(np.mean(losses[-max(1, len(losses) // 10) :]))},
            "quality": quality,
            "versions": {name: version(name) for name in LIBRARIES},
        }
        (part / "build.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _world(pipeline: Path) -> tuple[AutoencoderKL, T5Tokenizer, T5EncoderModel]:
    """VAE, tokenizer and text encoder of a tiny world, frozen."""
    vae = AutoencoderKL.from_pretrained(pipeline / "vae").requires_grad_(False)
    t5 = T5EncoderModel.from_pretrained(pipeline / "text_encoder_2").requires_grad_(False)
    return vae, T5Tokenizer.from_pretrained(pipeline / "tokenizer_2"), t5.eval()
