"""Checkpoints that are either whole or not there.

A checkpoint is written to a temporary directory, synced, listed in COMMIT with sizes and hashes, and
renamed into place. A reader takes a directory only if everything COMMIT lists is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from srpo.errors import InputError

__all__ = ["Checkpoints", "SaveError", "load_optimizer_tensors", "load_weights", "optimizer_tensors"]

_COMMIT = "COMMIT"


class SaveError(RuntimeError):
    """A checkpoint could not be written; the previous one is untouched."""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a run directory, `keep` of them."""

    directory: Path
    keep: int

    def path(self, step: int) -> Path:
        return self.directory / f"step-{step:06d}"

    def save(self, step: int, model: dict[str, Tensor], optimizer: dict[str, Tensor], config: str) -> Path:
        """Publish the state after `step` updates, then delete all but the newest `keep`.

        Raises `SaveError` (disk full, say) and leaves the older checkpoints as they were.
        """
        final, temporary = self.path(step), self.directory / f".step-{step:06d}.tmp"
        try:
            _require_space(self.directory, model, optimizer)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            save_file(model, temporary / "transformer.safetensors")
            save_file(optimizer, temporary / "optimizer.safetensors")
            (temporary / "state.json").write_text(json.dumps({"step": step, "config": config}))
            files = {file.name: _fingerprint(file) for file in sorted(temporary.iterdir())}
            (temporary / _COMMIT).write_text(json.dumps(files, indent=1))
            for file in (*temporary.iterdir(), temporary):
                _sync(file)
            shutil.rmtree(final, ignore_errors=True)  # only ever a damaged one: `latest` would have found it otherwise
            temporary.rename(final)
            _sync(self.directory)
        except Exception as error:  # safetensors raises its own type for I/O errors
            shutil.rmtree(temporary, ignore_errors=True)
            older = self.steps()
            left = f"the checkpoint of step {older[-1]} is untouched" if older else "there is no earlier checkpoint"
            raise SaveError(f"checkpoint of step {step} could not be saved ({error}); {left}") from error
        # Newer ones than this are damaged: a run goes on from the newest sound checkpoint.
        kept = [older for older in self.steps() if older <= step][-self.keep :]
        for other in set(self.steps()) - set(kept):
            shutil.rmtree(self.path(other), ignore_errors=True)
        return final

    def steps(self) -> list[int]:
        """Steps of the published checkpoints, oldest first."""
        found = (re.fullmatch(r"step-(\d{6,})", commit.parent.name) for commit in self.directory.glob(f"*/{_COMMIT}"))
        return sorted(int(match[1]) for match in found if match)

    def latest(self) -> int | None:
        """Step of the newest checkpoint whose files match their recorded hashes; damaged ones are warned about."""
        for step in reversed(self.steps()):
            damaged = _damaged(self.path(step))
            if damaged is None:
                return step
            warnings.warn(f"checkpoint {self.path(step)} is damaged ({damaged}); trying an older one", stacklevel=2)
        return None

    def load(self, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Model and optimizer state of checkpoint `step`, as given to `save`."""
        path = self.path(step)
        return load_file(path / "transformer.safetensors"), load_file(path / "optimizer.safetensors")

    def config(self, step: int) -> str:
        """The config that checkpoint `step` was saved with."""
        return json.loads((self.path(step) / "state.json").read_text())["config"]


def load_weights(path: Path) -> dict[str, Tensor]:
    """The transformer weights of a checkpoint directory. Raises `InputError` when it is missing or damaged."""
    if not (path / _COMMIT).is_file():
        raise InputError(f"{path} is not a checkpoint (no {_COMMIT} file)")
    damaged = _damaged(path)
    if damaged is not None:
        raise InputError(f"checkpoint {path} is damaged: {damaged}")
    return load_file(path / "transformer.safetensors")


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """Optimizer state as flat tensors ``<parameter>/<state>``; `names` are the parameters in the optimizer's order."""
    state = optimizer.state_dict()["state"]
    return {f"{names[index]}/{key}": value for index, entry in state.items() for key, value in entry.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str], tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`; hyper-parameters stay the optimizer's own."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        state.setdefault(names.index(name), {})[entry] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _require_space(directory: Path, *states: dict[str, Tensor]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    needed = sum(tensor.numel() * tensor.element_size() for state in states for tensor in state.values())
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(f"disk full: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free in {directory}")


def _fingerprint(file: Path) -> dict[str, int | str]:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}


def _damaged(path: Path) -> str | None:
    """What is wrong with a published checkpoint, or None."""
    try:
        listed = dict(json.loads((path / _COMMIT).read_text()))
    except (OSError, ValueError, TypeError) as error:
        return f"{_COMMIT} is not readable: {error}"
    if not listed:
        return f"{_COMMIT} is empty"
    for name, expected in listed.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if _fingerprint(path / name) != expected:
            return f"{name} does not match its recorded hash"
    return None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
