"""A run's checkpoint as a diffusers directory, as one file for ComfyUI, or its LoRA adapters alone for either."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from srpo.checkpoint import Checkpoints
from srpo.config import TrainConfig, load_config
from srpo.errors import InputError
from srpo.exported import DTYPES, RECIPE_NAME, Exported
from srpo.files import new_directory
from srpo.lora import LoraConfig
from srpo.lora_file import LORA_NAME, to_diffusers, to_kohya
from srpo.model_card import portable_recipe
from srpo.rundir import CONFIG_NAME
from srpo.single_file import StoredDtype, stored_bytes, write_single_file

__all__ = ["ExportFormat", "checkpoint_of", "export_run", "load_run"]

ExportFormat = Literal["diffusers", "comfyui", "lora", "lora-comfyui"]

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
    ema: bool = False,
) -> Path:
    """Write a run's checkpoint to `out`, which must not exist; nothing is left there when it fails.

    Args:
        step: which checkpoint; default the newest.
        dtype: what the weights are stored in; default the run's precision. "fp8" only for "comfyui".
        layout: "diffusers", a directory for ``FluxPipeline.from_pretrained``: the tuned transformer with the base
            model's other components, byte for byte. "comfyui", one .safetensors file of the transformer alone (see
            `srpo.single_file`), with its model card beside it, named alike but for ``.md``. Both have the adapters of a
            LoRA run merged in. "lora", a directory for ``FluxPipeline.load_lora_weights``, and "lora-comfyui", a file
            with its card: adapters alone (see `srpo.lora_file`).
        shard_gb: diffusers: the transformer's files hold at most so many gigabytes; default 10.
        ema: the weights' averages instead, of a run with ``optimizer.ema_decay``.

    Raises `InputError`: no such run or checkpoint, arguments that do not fit, `out` exists, a full disk, a base model
    that is not the one of a run's adapters.
    """
    config = load_run(directory)
    stored: StoredDtype = dtype or ("fp32" if config.model.precision == "fp32" else "bf16")
    exported = Exported(directory, config, checkpoint_of(directory, config, step), stored, ema)
    if "comfyui" in layout and out.suffix != ".safetensors":
        raise InputError(f"--out {out} must end in .safetensors with --format {layout}")
    if layout != "diffusers" and shard_gb is not None:
        raise InputError(f"--shard-size is for --format diffusers; {layout} is one file")
    if shard_gb is not None and not shard_gb > 0:
        raise InputError(f"--shard-size must be positive, got {shard_gb}")
    if layout != "comfyui" and stored == "fp8":
        raise InputError("--dtype fp8 is for --format comfyui; diffusers reads no scaled fp8")
    if layout == "diffusers":
        _write_pipeline(exported, out, shard_gb or _SHARD_GB)
    elif layout == "comfyui":
        _write_transformer(exported, out)
    elif config.model.lora is None:
        raise InputError(f"--format {layout} is for LoRA runs; {directory} trained the whole transformer")
    else:
        _write_adapters(exported, out, config.model.lora, comfyui=layout == "lora-comfyui")
    return out


def _write_pipeline(exported: Exported, out: Path, shard_gb: float) -> None:
    base, dtype = exported.base, exported.dtype
    with _failures_named(out), new_directory(out) as temporary:
        weights = exported.transformer()
        copied = _copied_files(base)
        _require_space(out, stored_bytes(weights, dtype) + sum(file.stat().st_size for file in copied))
        for file in copied:
            target = temporary / file.relative_to(base)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        transformer = exported.empty_transformer()
        cast = {name: tensor.to(DTYPES[dtype]) for name, tensor in weights.items()}
        _check_fit(transformer.state_dict(), cast, exported.checkpoint, base)
        transformer.load_state_dict(cast, assign=True)
        transformer.save_pretrained(temporary / "transformer", max_shard_size=int(shard_gb * 1e9))
        _describe(exported, temporary, f"diffusers.FluxPipeline.from_pretrained({out.name!r})\n{_sample(out)}")


def _write_transformer(exported: Exported, out: Path) -> None:
    usage = f"{_sample(out)} --model BASE\n# ComfyUI: models/diffusion_models"
    if exported.dtype != "fp8":
        reader = f'from_single_file({out.name!r}, config=BASE, subfolder="transformer")'
        usage = f"diffusers.FluxTransformer2DModel.{reader}\n{usage}"
    with _file_and_card(exported, out, usage) as file:
        weights = exported.transformer()
        _require_space(out, stored_bytes(weights, exported.dtype))
        try:
            write_single_file(file, weights, exported.dtype, exported.header(weights))
        except ValueError as error:
            raise InputError(f"checkpoint {exported.checkpoint} is no FLUX transformer: {error}") from None


def _write_adapters(exported: Exported, out: Path, config: LoraConfig, *, comfyui: bool) -> None:
    usage = f"pipeline.load_lora_weights({out.name!r})\n{_sample(out)} --model BASE"
    if comfyui:
        with _file_and_card(exported, out, f"{usage}\n# ComfyUI: models/loras", adapters=True) as file:
            _save_adapters(exported, file, out, config, comfyui)
    else:
        with _failures_named(out), new_directory(out) as temporary:
            _save_adapters(exported, temporary / LORA_NAME, out, config, comfyui)
            _describe(exported, temporary, usage, adapters=True)


def _save_adapters(exported: Exported, file: Path, out: Path, config: LoraConfig, comfyui: bool) -> None:
    shapes = exported.empty_transformer().state_dict()
    rows = {name.removesuffix(".weight"): len(tensor) for name, tensor in shapes.items()}
    adapters = exported.adapters()
    tensors, header = to_kohya(adapters, config, rows) if comfyui else to_diffusers(adapters, config)
    _require_space(out, sum(tensor.nbytes for tensor in tensors.values()))
    save_file(tensors, file, metadata={**exported.header(shapes, adapters=True), **header})


def _sample(out: Path) -> str:
    return f"srpo sample {out.name} --out images"


def _describe(exported: Exported, directory: Path, usage: str, *, adapters: bool = False) -> None:
    """Leave recipe and card in a directory that is otherwise complete."""
    (directory / RECIPE_NAME).write_text(portable_recipe(exported.config), encoding="utf-8")
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    (directory / "README.md").write_text(exported.card(usage, files, directory, adapters=adapters), encoding="utf-8")


@contextmanager
def _file_and_card(exported: Exported, out: Path, usage: str, *, adapters: bool = False) -> Iterator[Path]:
    """A temporary file that becomes `out` when the block ends well, with its card beside it."""
    beside = out.with_suffix(".md")
    for path in (out, beside):
        if path.exists():
            raise InputError(f"output {path} already exists; choose another --out or remove it")
    temporary = out.with_name(f".{out.name}.tmp")
    with _failures_named(out):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            file, card = temporary / out.name, temporary / beside.name
            yield file
            card.write_text(exported.card(usage, [file], temporary, adapters=adapters), encoding="utf-8")
            card.rename(beside)
            try:
                file.rename(out)  # last: what is there is whole
            except OSError:
                beside.unlink()
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


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
