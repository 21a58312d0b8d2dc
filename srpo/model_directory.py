"""A FLUX pipeline directory: whether it is complete, and which weights it holds."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from srpo.errors import InputError
from srpo.files import has_vocabulary

__all__ = ["check_image_size", "check_model_directory", "component_weights", "weight_files"]

_WEIGHTS = ("transformer", "vae", "text_encoder", "text_encoder_2")
_COMPONENTS = (*_WEIGHTS, "tokenizer", "tokenizer_2", "scheduler")


def check_image_size(height: int, width: int, *, multiple: int) -> None:
    """Raise `InputError` unless both sides are positive multiples of `multiple` (2 x the VAE's downsampling)."""
    for name, value in (("height", height), ("width", width)):
        if value < multiple or value % multiple:
            raise InputError(f"{name} must be a positive multiple of {multiple} for this model, got {value}")


def check_model_directory(path: str | Path, size: tuple[int, int] | None = None, *, text: bool = True) -> Path:
    """Check, without loading weights, that `path` is a complete FLUX pipeline directory and can make `size` images.

    It may lack its text encoders unless `text`.

    Raises `InputError` naming what is missing or does not fit.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"model directory {path} does not exist")
    index = _read_json(path / "model_index.json", path)
    if index.get("_class_name") != "FluxPipeline":
        raise InputError(f"model directory {path} holds a {index.get('_class_name')}, expected a FluxPipeline")
    for component in _COMPONENTS:
        if (path / component).is_dir():
            if component in _WEIGHTS:
                _check_weights(path / component, path)
        elif text or not component.startswith("text_encoder"):
            raise InputError(f"model directory {path} is incomplete: {component}/ is missing")
    for component in ("tokenizer", "tokenizer_2"):
        if not has_vocabulary(path / component):
            raise InputError(f"model directory {path} is incomplete: {component}/tokenizer.json is missing")
    _read_json(path / "scheduler/scheduler_config.json", path)
    transformer = _read_json(path / "transformer/config.json", path)
    vae = _read_json(path / "vae/config.json", path)
    if transformer["in_channels"] != 4 * vae["latent_channels"]:
        raise InputError(
            f"model directory {path}: the transformer takes {transformer['in_channels']} channels, but the VAE's "
            f"{vae['latent_channels']} latent channels pack into {4 * vae['latent_channels']}"
        )
    if size is not None:
        check_image_size(*size, multiple=2 ** len(vae["block_out_channels"]))
    return path


def weight_files(component: Path) -> list[Path]:
    """The safetensors files of a component's weights, of which none need be there: those of its index if it has one.

    Raises `InputError` when the index cannot be read.
    """
    indexes = list(component.glob("*.safetensors.index.json"))
    if indexes:
        return [component / name for name in sorted({*_read_json(indexes[0], component.parent)["weight_map"].values()})]
    return sorted(component.glob("*.safetensors"))


def component_weights(component: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """All weights of a component, on the CPU in `dtype`. Raises OSError or `safetensors.SafetensorError`."""
    return {name: tensor.to(dtype) for file in weight_files(component) for name, tensor in load_file(file).items()}


def _read_json(file: Path, root: Path) -> dict:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"model directory {root} is incomplete: {file.relative_to(root)} is missing") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"model directory {root}: {file.relative_to(root)} is not valid JSON ({error})") from None


def _check_weights(component: Path, root: Path) -> None:
    """Every weight file of a component, single or sharded, is there and not empty."""
    _read_json(component / "config.json", root)
    files = weight_files(component)
    missing = [file.name for file in files if not file.is_file() or not file.stat().st_size]
    if missing or not files:
        what = f"{component.name}/{missing[0]}" if missing else f"{component.name}/*.safetensors"
        raise InputError(f"model directory {root} is incomplete: {what} is missing or empty")
