"""Training of the tiny world's models on the CPU.  All randomness is torch's global generator and `rng`."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, FluxTransformer2DModel, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from srpo.latents import image_ids, pack
from srpo.tiny.digits import Digits, attribute_words, caption, random_caption
from srpo.tiny.words import LENGTH

__all__ = ["Progress", "decode", "encode", "token_ids", "train_clip", "train_epsilon", "train_flow", "train_vae"]

Progress = Callable[[str], None]


class _Trainer:
    """AdamW with a one-cycle rate and clipped gradients, which reports a running mean of the loss."""

    def __init__(self, name: str, parameters: list[Tensor], rate: float, steps: int, progress: Progress) -> None:
        self.name, self.parameters, self.steps, self.progress = name, parameters, steps, progress
        self.optimizer = torch.optim.AdamW(parameters, rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, rate, max(steps, 2), pct_start=0.1)
        self.losses: list[float] = []

    def step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.losses.append(loss.item())
        if len(self.losses) % 100 == 0 or len(self.losses) == self.steps:
            self.progress(f"{self.name} {len(self.losses)}/{self.steps}: loss {self.recent():.4f}")

    def recent(self) -> float:
        """Mean of the last 50 losses."""
        return float(np.mean(self.losses[-50:]))


def token_ids(tokenizer: CLIPTokenizer | T5Tokenizer, prompts: list[str]) -> Tensor:
    """Token ids [N, 16] int64, padded exactly as FluxPipeline pads its prompts."""
    ids = tokenizer(prompts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids
    return torch.as_tensor(ids)


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Images [N, 3, 32, 32] in [0, 1] of normalised `latents` [N, 4, 8, 8]."""
    raw = latents / vae.config.scaling_factor + vae.config.shift_factor
    return torch.cat([vae.decode(x).sample for x in torch.split(raw, 256)]).div(2).add(0.5).clamp(0, 1)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """The VAE's own latents [N, 4, 8, 8], not normalised, of `images` [N, 3, 32, 32] in [0, 1]."""
    return torch.cat([vae.encode(2 * x - 1).latent_dist.mean for x in torch.split(images, 256)])


def train_vae(vae: AutoencoderKL, data: Digits, steps: int, progress: Progress) -> tuple[list[float], Tensor]:
    """Train `vae` to reconstruct the digits and set its latents' shift and scale.

    Returns the losses and the normalised latents [N, 4, 8, 8] of the digits.
    """
    trainer = _Trainer("vae", list(vae.parameters()), 4e-3, steps, progress)
    for _ in range(steps):
        target = 2 * data.images[torch.randint(len(data.images), (32,))] - 1
        posterior = vae.encode(target).latent_dist
        error = vae.decode(posterior.sample()).sample - target
        # The absolute error keeps the paper white and the edges crisp, the squared error the strokes in place.
        trainer.step(error.abs().mean() + error.square().mean() + 2e-3 * posterior.kl().mean() / 256)
    vae.eval().requires_grad_(False)
    latents = encode(vae, data.images)
    shift, scale = float(latents.mean()), float(1 / latents.std())
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    return trainer.losses, (latents - shift) * scale


def train_clip(
    clip: CLIPModel,
    tokenizer: CLIPTokenizer,
    vae: AutoencoderKL,
    data: Digits,
    latents: Tensor,
    steps: int,
    rng: np.random.Generator,
    progress: Progress,
) -> list[float]:
    """Train `clip` contrastively on the digits and on noisy reconstructions of them, and return the losses.

    A reward's gradient is followed off the data, so the images are also decoded from noisy latents, blurred and
    made noisy: what survives all of these is what the words mean.
    """
    labels, words = data.labels.tolist(), attribute_words(data.stats.z_scores(data.images, data.labels))
    noisy = decode(vae, latents + torch.rand(len(latents), 1, 1, 1) * 0.5 * torch.randn_like(latents))
    trainer = _Trainer("clip", list(clip.parameters()), 2e-3, steps, progress)
    for _ in range(steps):
        chosen = torch.randint(len(data.images), (128,))
        texts = [random_caption(labels[i], words[i], rng, plain=0.1) for i in chosen.tolist()]
        images = torch.where(torch.rand(128, 1, 1, 1) < 0.5, data.images[chosen], noisy[chosen])
        images = images.lerp(F.avg_pool2d(images, 3, 1, 1, count_include_pad=False), torch.rand(128, 1, 1, 1))
        images = images + 0.1 * torch.rand(128, 1, 1, 1) * torch.randn_like(images)
        output = clip(input_ids=token_ids(tokenizer, texts), pixel_values=2 * images - 1)
        matches = _matches(texts, [(labels[i], words[i]) for i in chosen.tolist()])
        trainer.step(_contrast(output.logits_per_image, matches))
    clip.eval().requires_grad_(False)
    return trainer.losses


def _matches(texts: list[str], images: list[tuple[int, list[str]]]) -> Tensor:
    """[images, texts] fp32: 1 where all that a text says is true of an image given by its digit and words."""
    said = [set(text.replace(".", "").split()) for text in texts]
    true = [set(caption(label, words).split()) for label, words in images]
    return torch.tensor([[float(text <= image) for text in said] for image in true])


def _contrast(logits: Tensor, matches: Tensor) -> Tensor:
    """CLIP's two-way cross entropy, spread evenly over all `matches` [N, N]: captions are often true of several."""
    return (
        F.cross_entropy(logits, matches / matches.sum(1, keepdim=True))
        + F.cross_entropy(logits.T, matches.T / matches.T.sum(1, keepdim=True))
    ) / 2


def train_flow(
    transformer: FluxTransformer2DModel,
    t5: T5EncoderModel,
    clip: CLIPModel,
    tokenizers: tuple[CLIPTokenizer, T5Tokenizer],
    data: Digits,
    latents: Tensor,
    steps: int,
    rng: np.random.Generator,
    progress: Progress,
) -> list[float]:
    """Train `transformer` and `t5` together by rectified flow, leave their averaged weights in them, return losses."""
    labels, words = data.labels.tolist(), attribute_words(data.stats.z_scores(data.images, data.labels))
    tokens = pack(latents)
    models = torch.nn.ModuleList([transformer, t5])
    average = copy.deepcopy(models)
    trainer = _Trainer("flow", list(models.parameters()), 2e-3, steps, progress)
    position = {"img_ids": image_ids(8, 8), "txt_ids": torch.zeros(LENGTH, 3)}
    for i in range(steps):
        chosen = torch.randint(len(tokens), (32,))
        texts = [random_caption(labels[i], words[i], rng, plain=0.5) for i in chosen.tolist()]
        sigma = (torch.randn(32) + 0.5).sigmoid()  # more of the noisy half, where a digit takes its shape
        noise = torch.randn(32, 16, 16)
        clean = tokens[chosen]
        velocity = transformer(
            hidden_states=clean.lerp(noise, sigma[:, None, None]),
            timestep=sigma,
            guidance=torch.empty(32).uniform_(1, 5),  # drawn at random, so that the model ignores it
            pooled_projections=clip.text_model(token_ids(tokenizers[0], texts)).pooler_output,
            encoder_hidden_states=t5(token_ids(tokenizers[1], texts)).last_hidden_state,
            return_dict=False,
            **position,
        )[0]
        trainer.step(F.mse_loss(velocity, noise - clean))
        _follow(average, models, i)
    models.load_state_dict(average.state_dict())
    models.eval().requires_grad_(False)
    return trainer.losses


def train_epsilon(
    unet: UNet2DConditionModel,
    schedule: DDIMScheduler,
    states: Callable[[list[str]], Tensor],
    data: Digits,
    latents: Tensor,
    steps: int,
    rng: np.random.Generator,
    progress: Progress,
) -> list[float]:
    """Train `unet` to predict the noise that `schedule` adds, leave its averaged weights in it, return the losses.

    The timesteps are uniform and the error unweighted, as in DDPM. `states` encodes captions.
    """
    labels, words = data.labels.tolist(), attribute_words(data.stats.z_scores(data.images, data.labels))
    forward = DDPMScheduler.from_config(schedule.config)
    average = copy.deepcopy(unet)
    trainer = _Trainer("epsilon", list(unet.parameters()), 2e-3, steps, progress)
    for i in range(steps):
        chosen = torch.randint(len(latents), (32,))
        texts = [random_caption(labels[i], words[i], rng, plain=0.5) for i in chosen.tolist()]
        timesteps = torch.randint(forward.config.num_train_timesteps, (32,))
        noise = torch.randn(32, *latents.shape[1:])
        x_t = forward.add_noise(latents[chosen], noise, timesteps)
        trainer.step(F.mse_loss(unet(x_t, timesteps, states(texts)).sample, noise))
        _follow(average, unet, i)
    unet.load_state_dict(average.state_dict())
    unet.eval().requires_grad_(False)
    return trainer.losses


@torch.no_grad()
def _follow(average: torch.nn.Module, model: torch.nn.Module, step: int) -> None:
    """Move the running mean of `model`'s weights on."""
    decay = min(0.998, (step + 1) / (step + 10))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
