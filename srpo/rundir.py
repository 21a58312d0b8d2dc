"""A run directory belongs to one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from srpo.checkpoint import Checkpoints
from srpo.config import TrainConfig, dump_config
from srpo.errors import InputError

__all__ = ["CONFIG_NAME", "updates_done", "write_bad_images", "write_config"]

CONFIG_NAME = "config.yaml"
_TEMPORARY = f".{CONFIG_NAME}.tmp"

#: Keys that may change when a run is resumed: they do not change what an update computes, but for the order in which
#: ranks add up.
_CACHES = {"reward.text_cache", "model.text_cache", "data.latent_cache"}
_SAVING = {f"run.{name}" for name in ("save_every", "save_async", "keep", "keep_every")}
_SHARING = {f"run.{name}" for name in ("device", "sharding", "shard_size", "reduce", "reshard_after_forward")} | {
    "model.checkpointing"
}
_FREE = {"run.dir", "run.tensorboard", "srpo.updates", "data.max_bad_fraction", *_CACHES, *_SAVING, *_SHARING} | {
    f"run.{name}" for name in ("sample_every", "sample_count", "sample_steps", "wandb")
}


def updates_done(directory: Path, config: TrainConfig, checkpoints: Checkpoints, *, resume: bool) -> int:
    """Updates that the run in `directory` has checkpointed: 0 for a new directory. Writes nothing.

    Raises:
        InputError: the directory holds another run, there is nothing to resume, or what is there was made with
            another config.
    """
    file = directory / CONFIG_NAME
    held = directory.is_dir() and any(entry.name != _TEMPORARY for entry in directory.iterdir())
    if held and not file.is_file():
        raise InputError(f"run directory {directory} is not empty and holds no run; choose another run.dir")
    if held and not resume:
        raise InputError(f"run directory {directory} already holds a run; give --resume, or choose another run.dir")
    if resume and not held:
        raise InputError(f"run directory {directory} holds no run to resume")
    if not resume:
        return 0
    _check_same(file.read_text(encoding="utf-8"), config, f"the run in {directory}")
    step = checkpoints.latest() or 0
    if step:
        _check_same(checkpoints.config(step), config, f"checkpoint {checkpoints.path(step)}")
    if step > config.srpo.updates:
        raise InputError(f"run directory {directory} is at update {step}, beyond srpo.updates={config.srpo.updates}")
    return step


def write_config(directory: Path, config: TrainConfig) -> None:
    """Make `directory` this run's, by leaving the resolved config in it."""
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / _TEMPORARY
    temporary.write_text(dump_config(config), encoding="utf-8")
    temporary.replace(directory / CONFIG_NAME)


def write_bad_images(directory: Path, images: list[str]) -> None:
    """Leave the list of images that a run does not use in its directory; none when all are used."""
    file = directory / "bad_images.txt"
    if images:
        file.write_text("\n".join(images) + "\n", encoding="utf-8")
    else:
        file.unlink(missing_ok=True)


def _check_same(old: str, config: TrainConfig, what: str) -> None:
    before, after = _flat(yaml.safe_load(old)), _flat(yaml.safe_load(dump_config(config)))
    changed = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    changed = [key for key in changed if key not in _FREE and not key.startswith("validation.")]
    if changed:
        listed = "; ".join(f"{key} was {before.get(key)!r}, is {after.get(key)!r}" for key in changed)
        raise InputError(f"{what} was made with another config: {listed}")


def _flat(sections: dict[str, Any]) -> dict[str, Any]:
    sections = dict(sections)
    alone = {"algorithm": sections.pop("algorithm", None)}
    return alone | {f"{name}.{key}": value for name, entries in sections.items() for key, value in entries.items()}
