"""ViT-H-14, the vision tower of HPSv2.1 and PickScore, random weights: as released and as `srpo` holds it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import open_clip
import torch
from open_clip.transformer import QuickGELU
from torch import Tensor

from benchmarks.timing import measured
from srpo.rewards.towers import freeze

__all__ = ["tower_results"]


def tower_results(
    device: str = "cuda", architecture: str = "ViT-H-14", batches: Sequence[int] = (1, 2, 8)
) -> Iterator[dict[str, Any]]:
    """Image embeddings, with backward into the pixels; median ms and peak memory."""
    for form, frozen in (("fp32 weights under bf16 autocast", False), ("frozen bf16", True)):
        model = _model(device, frozen=frozen, architecture=architecture)
        for batch in batches:
            pixels = torch.randn(batch, 3, 224, 224, device=device, dtype=torch.bfloat16 if frozen else torch.float32)
            run = partial(_gradient, model, pixels, autocast=not frozen)
            yield measured(f"{architecture}, {form}, batch {batch}", "forward+backward", run, peer=not frozen)
        del model
        torch.cuda.empty_cache()


def _model(device: str, *, frozen: bool, architecture: str) -> Any:
    model = open_clip.create_model(architecture, device=device).requires_grad_(False).eval()
    if frozen:
        freeze(model, [model.visual], torch.bfloat16, activation=QuickGELU)
    return model


def _gradient(model: Any, pixels: Tensor, *, autocast: bool) -> Tensor:
    pixels = pixels.detach().requires_grad_()
    with torch.autocast(pixels.device.type, torch.bfloat16) if autocast else nullcontext():
        embedding = model.encode_image(pixels)
    return torch.autograd.grad(embedding, pixels, torch.ones_like(embedding))[0]
