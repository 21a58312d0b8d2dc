"""The models of a step: FLUX.1-dev and ViT-H-14 at full size with random weights, or the tiny ones that are shipped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

import open_clip
import torch
from diffusers import FluxPipeline
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from benchmarks.reference_step import Scorer
from srpo.assets import resolve_asset
from srpo.config import TrainConfig, load_config
from srpo.models import Flux
from srpo.plan.sizes import Sizes
from srpo.precision import compute_dtype
from srpo.randomness import generator
from srpo.rewards import Reward, load_reward
from srpo.rewards.cosine import OpenCLIPReward

__all__ = ["MODELS", "flux", "recipe", "reward", "scorer"]

MODELS = ("flux-dev", "tiny")

_TOWER = "ViT-H-14"
_COMMON = ("srpo.batch_size=1", "run.micro_batch=1", "run.draws_per_rollout=1")


def recipe(model: str, size: int | None, overrides: Sequence[str]) -> TrainConfig:
    """The recipe of one image's step on `model`, at `size` pixels a side or its own."""
    name = "flux-dev-hps" if model == "flux-dev" else "tiny"
    sized = [] if size is None else [f"srpo.height={size}", f"srpo.width={size}"]
    return load_config(name, [*_COMMON, *sized, *overrides])


def flux(model: str, config: TrainConfig, device: torch.device, *, dtype: torch.dtype | None = None) -> Flux:
    """`model` as a run of `config` holds it, or, for a reference, with its transformer in `dtype`; unpatched."""
    precision, length = config.model.precision, config.model.max_sequence_length
    weights = config.optimizer.model_weights(precision)
    if model == "tiny":
        path = resolve_asset("tiny", "pipeline")
        common: dict[str, Any] = dict(device=device, max_sequence_length=length, trainable=True)
        loaded = Flux.load(path, precision=precision, weights=weights, **common)
        if dtype is not None:
            loaded.transformer.to(dtype)
        return loaded
    chosen = dtype or {"fp32": torch.float32, "bf16": torch.bfloat16}[weights]
    sizes = Sizes.of(config)
    transformer = _random(sizes.transformer, chosen, device)
    vae = _random(sizes.vae, compute_dtype(precision), device).eval()
    absent: dict[str, Any] = dict.fromkeys(("scheduler", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipeline = FluxPipeline(transformer=transformer, vae=vae, **absent)
    return Flux(pipeline, precision=precision, max_sequence_length=length, texts=_RandomTexts(device, length))  # type: ignore[arg-type]


def reward(model: str, config: TrainConfig, device: torch.device) -> Reward:
    """The reward as a run holds it."""
    dtype = compute_dtype(config.model.precision)
    if model == "tiny":
        return load_reward(config.reward, config.srpo, device=device, dtype=dtype)
    with mock.patch("srpo.rewards.cosine.load_open_clip", return_value=_tower(device)):
        return OpenCLIPReward("", architecture=_TOWER, device=device, dtype=dtype, form=config.srpo.form)


def scorer(model: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Scorer:
    """The same reward as its library has it."""
    if model == "tiny":
        path = resolve_asset("tiny", "reward")
        clip: Any = CLIPModel.from_pretrained(path, local_files_only=True).to(device, dtype)
        clip.requires_grad_(False).eval()
        tokenizer = CLIPTokenizer.from_pretrained(path, local_files_only=True)
        images = CLIPImageProcessor.from_pretrained(path, local_files_only=True)

        def tokens(texts: list[str]) -> Mapping[str, Tensor]:
            return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").to(device)

        return Scorer(
            lambda pixels: clip.get_image_features(pixel_values=pixels.to(dtype)).pooler_output,
            lambda texts: clip.get_text_features(**tokens(texts)).pooler_output,
            images.size["shortest_edge"],
            images.image_mean,
            images.image_std,
            1.0,
        )
    tower, words = _tower(device).to(dtype), open_clip.get_tokenizer(_TOWER)
    return Scorer(
        lambda pixels: tower.encode_image(pixels.to(dtype)),
        lambda texts: tower.encode_text(words(texts).to(device)),
        tower.visual.image_size[0],
        tower.visual.image_mean,
        tower.visual.image_std,
        1.0,
    )


def _tower(device: torch.device) -> Any:
    return open_clip.create_model(_TOWER, device=device).requires_grad_(False).eval()


def _random(module: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A module on the meta device with small random weights on `device`, never in host memory."""
    module.to(dtype)
    module.to_empty(device=device)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)
    return module


class _RandomTexts:
    """Embeddings of texts that no encoder has seen, in place of a cache."""

    def __init__(self, device: torch.device, length: int) -> None:
        self._device, self._length = device, length

    def embed(self, prompt: str) -> tuple[Tensor, Tensor]:
        drawn = generator(0, 0, 0, f"text/{prompt}")
        shapes = (1, self._length, 4096), (1, 768)
        tokens, pooled = (torch.randn(shape, generator=drawn).to(self._device, torch.bfloat16) for shape in shapes)
        return tokens, pooled
