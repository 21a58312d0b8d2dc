"""A run's checkpoint as a diffusers directory, or its transformer as one file for ComfyUI."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from diffusers import FluxTransformer2DModel
from safetensors import SafetensorError
from torch import Tensor

from srpo.assets import resolve_asset
from srpo.checkpoint import Checkpoints, load_weights
from srpo.config import TrainConfig, load_config
from srpo.errors import InputError
from srpo.files import new_directory
from srpo.model_card import export_title, licence_name, model_card, portable_recipe
from srpo.model_directory import check_model_directory
from srpo.rundir import CONFIG_NAME
from srpo.single_file import StoredDtype, stored_bytes, write_single_file

__all__ = ["RECIPE_KEY", "RECIPE_NAME", "ExportFormat", "checkpoint_of", "export_run", "load_run"]

ExportFormat = Literal["diffusers", "comfyui"]

#: Where an export keeps the run's recipe: a file of a directory, an entry in the header of a file.
RECIPE_NAME, RECIPE_KEY = "recipe.yaml", "srpo.recipe"

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_SHARD_GB = 10.0
_PICKLES = {".bin", ".ckpt", ".h5", ".msgpack", ".pt"}  # other copies of what the safetensors files hold


def load_run(directory: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The resolved config of a run directory, with overrides. Raises `InputError` when it holds none."""
    if not (directory / CONFIG_NAME).is_file():
        raise InputError(f"{directory} is not a run directory (no {CONFIG_NAME})")
    return load_config(directory / CONFIG_NAME, overrides)


def checkpoint_of(directory: Path, config: TrainConfig, step: int | None) -> Path:
    """The checkpoint of `step`, or the newest sound one. Raises `InputError` when there is none."""
    checkpoints = Checkpoints(directory / "checkpoints", config.run.keep)
    found = checkpoints.latest() if step is None else step
    if found is None or found not in checkpoints.steps():
        kept = ", ".join(map(str, checkpoints.steps())) or "none"
        raise InputError(
            f"run {directory} has no checkpoint{'' if step is None else f' of --step {step}'} (kept: {kept})"
        )
    return checkpoints.path(found)


def export_run(
    directory: Path,
    out: Path,
    *,
    step: int | None = None,
    dtype: StoredDtype | None = None,
    layout: ExportFormat = "diffusers",
    shard_gb: float | None = None,
) -> Path:
    """Write a run's checkpoint to `out`, which must not exist; nothing is left there when it fails.

    Args:
        step: which checkpoint; default the newest.
        dtype: what the transformer is stored in; default the run's precision. "fp8" only as a single file.
        layout: "diffusers", a directory for ``FluxPipeline.from_pretrained``: the tuned transformer with the base
            model's other components, byte for byte. "comfyui", one .safetensors file of the transformer alone (see
            `srpo.single_file`), with its model card beside it, named alike but for ``.md``.
        shard_gb: diffusers: the transformer's files hold at most so many gigabytes; default 10.

    Raises `InputError`: no such run or checkpoint, arguments that do not fit, `out` exists, a full disk.
    """
    config = load_run(directory)
    checkpoint = checkpoint_of(directory, config, step)
    stored: StoredDtype = dtype or ("fp32" if config.model.precision == "fp32" else "bf16")
    if layout == "comfyui":
        if out.suffix != ".safetensors":
            raise InputError(f"--out {out} must end in .safetensors with --format comfyui")
        if shard_gb is not None:
            raise InputError("--shard-size is for --format diffusers; comfyui is one file")
        _write_file(directory, out, config, checkpoint, stored)
    else:
        if stored == "fp8":
            raise InputError("--dtype fp8 is for --format comfyui; diffusers reads no scaled fp8")
        if shard_gb is not None and not shard_gb > 0:
            raise InputError(f"--shard-size must be positive, got {shard_gb}")
        _write_directory(directory, out, config, checkpoint, stored, shard_gb or _SHARD_GB)
    return out


def _write_directory(
    run: Path, out: Path, config: TrainConfig, checkpoint: Path, dtype: StoredDtype, shard_gb: float
) -> None:
    base = check_model_directory(resolve_asset(config.model.path, "pipeline"))
    with _failures_named(out), new_directory(out) as temporary:
        weights = load_weights(checkpoint)
        copied = _copied_files(base)
        _require_space(out, stored_bytes(weights, dtype) + sum(file.stat().st_size for file in copied))
        for file in copied:
            target = temporary / file.relative_to(base)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        with torch.device("meta"):
            transformer = FluxTransformer2DModel.from_config(FluxTransformer2DModel.load_config(base / "transformer"))
        cast = {name: tensor.to(_DTYPES[dtype]) for name, tensor in weights.items()}
        _check_fit(transformer.state_dict(), cast, checkpoint, base)
        transformer.load_state_dict(cast, assign=True)
        transformer.save_pretrained(temporary / "transformer", max_shard_size=int(shard_gb * 1e9))
        (temporary / RECIPE_NAME).write_text(portable_recipe(config), encoding="utf-8")
        card = model_card(
            config,
            run=run,
            step=_step(checkpoint),
            dtype=dtype,
            usage=f"diffusers.FluxPipeline.from_pretrained({out.name!r})\nsrpo sample {out.name} --out images",
            files=sorted(file for file in temporary.rglob("*") if file.is_file()),
            root=temporary,
        )
        (temporary / "README.md").write_text(card, encoding="utf-8")


def _write_file(run: Path, out: Path, config: TrainConfig, checkpoint: Path, dtype: StoredDtype) -> None:
    beside = out.with_suffix(".md")
    for path in (out, beside):
        if path.exists():
            raise InputError(f"output {path} already exists; choose another --out or remove it")
    temporary = out.with_name(f".{out.name}.tmp")
    with _failures_named(out):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            weights = load_weights(checkpoint)
            _require_space(out, stored_bytes(weights, dtype))
            file, card = temporary / out.name, temporary / beside.name
            try:
                write_single_file(file, weights, dtype, _header(config, checkpoint, weights, dtype))
            except ValueError as error:
                raise InputError(f"checkpoint {checkpoint} is no FLUX transformer: {error}") from None
            usage = f"srpo sample {out.name} --model BASE --out images\n# ComfyUI: models/diffusion_models"
            if dtype != "fp8":
                usage = (
                    f"diffusers.FluxTransformer2DModel.from_single_file({out.name!r}, config=BASE, "
                    f'subfolder="transformer")\n{usage}'
                )
            card.write_text(
                model_card(
                    config, run=run, step=_step(checkpoint), dtype=dtype, usage=usage, files=[file], root=temporary
                ),
                encoding="utf-8",
            )
            card.rename(beside)
            try:
                file.rename(out)  # last: what is there is whole
            except OSError:
                beside.unlink()
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _header(config: TrainConfig, checkpoint: Path, weights: Mapping[str, Tensor], dtype: str) -> dict[str, str]:
    """Keys of the Stability AI Model Metadata Standard 1.0.1, and our own."""
    recipe = portable_recipe(config)
    width = len(weights["x_embedder.bias"]) if "x_embedder.bias" in weights else 0
    guided = any("guidance_embedder" in name for name in weights)
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        # Only models of this width are FLUX.1 to those who read the key.
        "modelspec.architecture": ("flux-1-dev" if guided else "flux-1-schnell") if width == 3072 else "flux-1-other",
        "modelspec.implementation": "https://github.com/black-forest-labs/flux",
        "modelspec.title": export_title(config),
        "modelspec.license": licence_name(config),
        "modelspec.resolution": f"{config.srpo.width}x{config.srpo.height}",
        "srpo.version": version("srpo-kernels"),
        "srpo.step": str(_step(checkpoint)),
        "srpo.dtype": dtype,
        RECIPE_KEY: recipe,
        "srpo.recipe_sha256": hashlib.sha256(recipe.encode()).hexdigest(),
    }


def _copied_files(base: Path) -> list[Path]:
    """The files of a pipeline directory that an export takes as they are: all but the transformer's."""
    index = base / "model_index.json"
    listed = json.loads(index.read_text(encoding="utf-8"))
    components = [name for name, value in listed.items() if isinstance(value, list) and value[0] is not None]
    files = [index, *(file for file in base.glob("LICENSE*") if file.is_file())]
    for component in sorted({*components} - {"transformer"}):
        files += [file for file in sorted((base / component).rglob("*")) if file.is_file()]
    return [file for file in files if file.suffix not in _PICKLES and not file.name.startswith(".")]


def _check_fit(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], checkpoint: Path, base: Path) -> None:
    wrong = [
        name
        for name in sorted({*wanted, *found})
        if name not in wanted or name not in found or wanted[name].shape != found[name].shape
    ]
    if wrong:
        raise InputError(f"checkpoint {checkpoint} does not fit the base model {base}: {wrong[0]} differs")


def _require_space(out: Path, needed: int) -> None:
    parent = next(path for path in out.absolute().parents if path.is_dir())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise InputError(f"--out {out}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free in {parent}")


@contextmanager
def _failures_named(out: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(f"nothing was exported to --out {out}: {error}") from None


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))
