"""Sampling to files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from srpo.assets import resolve_asset
from srpo.checkpoint import load_weights
from srpo.config import TrainConfig
from srpo.data import read_prompts
from srpo.distributed import Ranks
from srpo.errors import InputError
from srpo.files import new_directory
from srpo.images import save_grid
from srpo.models import Flux, check_model_directory
from srpo.randomness import generator
from srpo.sampling import sample_images, to_uint8

__all__ = ["write_samples"]


def write_samples(
    config: TrainConfig,
    checkpoint: Path | None,
    prompts: Sequence[str],
    out: Path,
    *,
    count: int,
    seed: int,
    device: str,
) -> int:
    """Write `count` PNGs for every prompt, ``grid.png`` and ``metadata.jsonl`` to the new directory `out`.

    The directory is a valid image folder for offline training. `checkpoint` None samples the base model; no
    `prompts` takes the config's. Returns the number of images.

    Raises `InputError` when the model or prompts cannot be used.
    """
    objective = config.srpo
    size = (objective.height, objective.width)
    if not prompts and config.data.prompts is None:
        raise InputError("no prompts: give --prompt or --prompts (the recipe's data.prompts is empty)")
    prompts = list(prompts) or read_prompts(resolve_asset(str(config.data.prompts), "prompts.txt"))
    repeated = [prompt for prompt in prompts for _ in range(count)]
    model = check_model_directory(resolve_asset(config.model.path, "pipeline"), size)
    flux = Flux.load(
        model,
        device=Ranks.join(device).device,
        precision=config.model.precision,
        max_sequence_length=config.model.max_sequence_length,
    )
    if checkpoint is not None:
        flux.transformer.load_state_dict(load_weights(checkpoint))
    noise = flux.noise(len(repeated), *size, generator(seed, 0, 0, "sample"))
    images = sample_images(
        flux,
        noise,
        repeated,
        batch=config.run.micro_batch,
        size=size,
        steps=config.run.sample_steps,
        shift=objective.shift,
        guidance=objective.guidance,
    )
    lines = []
    with new_directory(out) as temporary:
        for index, (prompt, pixels) in enumerate(zip(repeated, to_uint8(images), strict=True)):
            name = f"{index:05d}.png"
            Image.fromarray(pixels).save(temporary / name)
            lines.append(json.dumps({"file_name": name, "text": prompt}))
        (temporary / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        save_grid(images, temporary / "grid.png", columns=count if count > 1 else None)
    return len(repeated)
