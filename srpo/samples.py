"""Sampling to files, from whatever holds a model: a recipe, a run, an export."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image

from srpo.assets import resolve_asset
from srpo.base_model import check_base, read_base
from srpo.checkpoint import load_weights
from srpo.config import TrainConfig, load_config
from srpo.distributed import Ranks
from srpo.errors import InputError
from srpo.export import checkpoint_of, load_run
from srpo.exported import BASE_KEY, RECIPE_KEY, RECIPE_NAME
from srpo.files import new_directory
from srpo.images import save_grid
from srpo.lora_file import LORA_KEY, LORA_NAME, read_lora
from srpo.model_directory import check_model_directory
from srpo.models import Flux
from srpo.prompts import read_prompts
from srpo.randomness import generator
from srpo.rundir import CONFIG_NAME
from srpo.sampling import sample_images, to_uint8
from srpo.single_file import read_single_file, single_file_metadata

__all__ = ["Source", "load_flux", "open_source", "write_samples"]


@dataclass(frozen=True)
class Source:
    """What to sample: `config`, with the model and how it is sampled, and the transformer's weights.

    `weights` are a checkpoint directory, a single file or a file of adapters; None: those of the model itself. Adapters
    are for the base model of fingerprint `base`. With `ema` a checkpoint's averages are meant.
    """

    config: TrainConfig
    weights: Path | None = None
    base: str | None = None
    ema: bool = False


def open_source(
    source: str | Path,
    *,
    step: int | None = None,
    model: str | Path | None = None,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    ema: bool = False,
) -> Source:
    """What `source` holds; no weights are read yet.

    Args:
        source: a run directory; a pipeline directory or single file, exported or not; exported adapters; or a recipe,
            for its base model.
        step: of a run: which checkpoint; default the newest, 0 the base model.
        model: the pipeline directory whose other components, or all, are used, instead of the recipe's ``model.path``.
        recipe: how to sample a pipeline or a file that was not exported by srpo, or otherwise than its own recipe says.
        overrides: ``section.key=value`` changes to the recipe.
        ema: of a run: the weights' averages.

    Raises `InputError`, naming the argument.
    """
    path = Path(source)
    if (path / LORA_NAME).is_file():
        path = path / LORA_NAME
    changes = [*overrides, *([_override("model.path", model)] if model is not None else [])]
    run = path.is_dir() and (path / CONFIG_NAME).is_file()
    exported = (path / "model_index.json").is_file() or (path.is_file() and path.suffix == ".safetensors")
    if step is not None and not run:
        raise InputError(f"--step is for a run directory, which {path} is not")
    if ema and (not run or step == 0):
        raise InputError(f"--ema is for checkpoints of a run directory, which {'step 0' if run else path} is not")
    if recipe is not None and (run or not exported):
        raise InputError(f"--recipe is for a pipeline directory or a single file, which {path} is not")
    if run:
        config = load_run(path, changes)
        weights = None if step == 0 else checkpoint_of(path, config, step)
        return Source(config, weights, read_base(path) if config.model.lora else None, ema)
    if path.is_dir():
        if not exported:
            raise InputError(f"{path} is neither a run directory ({CONFIG_NAME}) nor a pipeline (model_index.json)")
        if model is not None:
            raise InputError(f"--model and {path}: a pipeline directory is a whole model")
        return Source(_merged(_recipe_of_pipeline(path, recipe, [*changes, _override("model.path", path)])))
    if exported:
        config = _recipe_of_file(path, recipe, changes)
        if not resolve_asset(config.model.path, "pipeline").is_dir():
            raise InputError(
                f"{path} holds a transformer only, and its base model {config.model.path} is not here: give --model"
            )
        header = single_file_metadata(path)
        return Source(config, path, header.get(BASE_KEY)) if LORA_KEY in header else Source(_merged(config), path)
    return Source(load_config(path if path.is_file() else str(source), changes))


def load_flux(source: Source, *, device: str | None = None) -> Flux:
    """The model of `source`, to sample with. Raises `InputError` when it cannot be used."""
    config = source.config
    objective, cache, lora = config.srpo, config.model.text_cache, config.model.lora
    model = resolve_asset(config.model.path, "pipeline")
    if lora and source.weights is not None:
        check_base(source.base, model, str(source.weights))
    flux = Flux.load(
        check_model_directory(model, (objective.height, objective.width), text=cache is None),
        device=Ranks.join(device or config.run.device).device,
        precision=config.model.precision,
        max_sequence_length=config.model.max_sequence_length,
        text_cache=cache,
        lora=lora,
    )
    if source.weights is not None:
        if source.weights.is_dir():
            weights = load_weights(source.weights, ema=source.ema)
        else:
            weights = read_lora(source.weights, lora) if lora else read_single_file(source.weights)
        own = flux.trainable()
        shapes, found = ({name: tensor.shape for name, tensor in held.items()} for held in (own, weights))
        if shapes != found:
            first = min(name for name, _ in shapes.items() ^ found.items())
            raise InputError(f"{source.weights} does not fit the model {model}: {first} differs")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(weights[name])
    return flux


def write_samples(
    source: Source,
    prompts: Sequence[str],
    out: Path,
    *,
    count: int,
    seed: int,
    device: str | None = None,
) -> int:
    """Write `count` PNGs for every prompt, ``grid.png`` and ``metadata.jsonl`` to the new directory `out`.

    The directory is a valid image folder for offline training. No `prompts` takes the config's, no `device` also.
    Returns the number of images.

    Raises `InputError` when the model or prompts cannot be used.
    """
    config, objective = source.config, source.config.srpo
    size = (objective.height, objective.width)
    if not prompts and config.data.prompts is None:
        raise InputError("no prompts: give --prompt or --prompts (the recipe's data.prompts is empty)")
    if not prompts:
        path = resolve_asset(str(config.data.prompts), "prompts.txt")
        prompts = [prompt.text for prompt in read_prompts(path, config.data.control_groups)]
    repeated = [prompt for prompt in prompts for _ in range(count)]
    lines = []
    with new_directory(out) as temporary:
        flux = load_flux(source, device=device)
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
        for index, (prompt, pixels) in enumerate(zip(repeated, to_uint8(images), strict=True)):
            name = f"{index:05d}.png"
            Image.fromarray(pixels).save(temporary / name)
            lines.append(json.dumps({"file_name": name, "text": prompt}))
        (temporary / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        save_grid(images, temporary / "grid.png", columns=count if count > 1 else None)
    return len(repeated)


def _recipe_of_pipeline(path: Path, recipe: str | None, overrides: Sequence[str]) -> TrainConfig:
    if recipe is None and not (path / RECIPE_NAME).is_file():
        raise InputError(f"pipeline {path} holds no {RECIPE_NAME}, so give --recipe for how to sample it")
    return load_config(recipe if recipe is not None else path / RECIPE_NAME, overrides)


def _recipe_of_file(path: Path, recipe: str | None, overrides: Sequence[str]) -> TrainConfig:
    if recipe is not None:
        return load_config(recipe, overrides)
    text = single_file_metadata(path).get(RECIPE_KEY)
    if text is None:
        raise InputError(f"{path} holds no recipe, so give --recipe for how to sample it")
    with TemporaryDirectory() as temporary:
        (Path(temporary) / RECIPE_NAME).write_text(text, encoding="utf-8")
        return load_config(Path(temporary) / RECIPE_NAME, overrides)


def _merged(config: TrainConfig) -> TrainConfig:
    """The config of a whole transformer, into which a run's adapters have been merged."""
    return replace(config, model=replace(config.model, lora=None))


def _override(key: str, value: str | Path) -> str:
    return f"{key}={json.dumps(str(value))}"
