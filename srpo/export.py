"""A tuned pipeline as a diffusers directory."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml

from srpo.assets import TINY, resolve_asset
from srpo.checkpoint import Checkpoints, load_weights
from srpo.config import TrainConfig, load_config
from srpo.errors import InputError
from srpo.files import new_directory
from srpo.models import Flux
from srpo.rundir import CONFIG_NAME

__all__ = ["checkpoint_of", "export_run", "load_run"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_run(directory: Path) -> TrainConfig:
    """The resolved config of a run directory. Raises `InputError` when it holds none."""
    if not (directory / CONFIG_NAME).is_file():
        raise InputError(f"{directory} is not a run directory (no {CONFIG_NAME})")
    return load_config(directory / CONFIG_NAME)


def checkpoint_of(directory: Path, config: TrainConfig, step: int | None) -> Path:
    """The checkpoint of `step`, or the newest sound one. Raises `InputError` when there is none."""
    checkpoints = Checkpoints(directory / "checkpoints", config.run.keep)
    found = checkpoints.latest() if step is None else step
    if found is None or found not in checkpoints.steps():
        kept = ", ".join(map(str, checkpoints.steps())) or "none"
        raise InputError(
            f"run {directory} has no checkpoint{'' if step is None else f' of step {step}'} (kept: {kept})"
        )
    return checkpoints.path(found)


def export_run(directory: Path, out: Path, *, step: int | None = None, dtype: str | None = None) -> Path:
    """Write the pipeline of a run's checkpoint to `out`, loadable with ``FluxPipeline.from_pretrained(out)``.

    Args:
        step: which checkpoint; default the newest. dtype: "fp32" or "bf16"; default the run's precision.

    Raises `InputError`: no such run or checkpoint, or `out` exists.
    """
    config = load_run(directory)
    checkpoint = checkpoint_of(directory, config, step)
    with new_directory(out) as temporary:
        flux = Flux.load(resolve_asset(config.model.path, "pipeline"), precision=config.model.precision, trainable=True)
        flux.transformer.load_state_dict(load_weights(checkpoint))
        flux.transformer.to(_DTYPES[dtype or config.model.precision])
        flux.pipeline.save_pretrained(temporary)
        (temporary / "README.md").write_text(_card(config, checkpoint), encoding="utf-8")
    return out


def _card(config: TrainConfig, checkpoint: Path) -> str:
    licence = (
        "The base model ships with srpo-kernels (Apache-2.0); it was trained on scikit-learn's digits (UCI, CC BY 4.0)."
        if config.model.path == TINY
        else "These weights are derived from the base model and stay under its licence. For FLUX.1-dev that is the "
        "FLUX.1 [dev] Non-Commercial License."
    )
    front = yaml.safe_dump({"library_name": "diffusers", "base_model": config.model.path, "tags": ["srpo"]})
    controls = f"{', '.join(config.srpo.positive_controls)} against {', '.join(config.srpo.negative_controls)}"
    return (
        f"---\n{front}---\n\n# SRPO fine-tuning of {config.model.path}\n\n"
        f"Checkpoint `{checkpoint.name}`, {config.data.mode} mode, control words: {controls}.\n\n{licence}\n"
    )
