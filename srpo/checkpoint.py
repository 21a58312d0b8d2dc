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
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from srpo.best import best_step
from srpo.distributed import ALONE, Ranks
from srpo.errors import InputError
from srpo.state_files import is_state, read_whole, stored, write_tensors, writer_of

__all__ = ["Checkpoints", "SaveError", "load_weights"]

_COMMIT, _STATE = "COMMIT", "state.json"
#: Begins the names of what is being written or deleted.
_UNFINISHED = ".step-"

Fingerprint = dict[str, int | str]


class SaveError(RuntimeError):
    """A checkpoint could not be written; the previous one is untouched."""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a run directory: its newest `keep`, its best, and those of every `keep_every`-th update.

    `ranks` save together, on a filesystem that all of them see.
    """

    directory: Path
    keep: int
    keep_every: int | None = None
    ranks: Ranks = ALONE

    def path(self, step: int) -> Path:
        return self.directory / f"step-{step:06d}"

    def save(self, step: int, tensors: Mapping[str, Tensor], config: str) -> Path:
        """Publish the state after `step` updates, then delete what need not be kept. See `srpo.state_files` for names.

        Raises `SaveError` (disk full, say) on all ranks and leaves the older checkpoints as they were.
        """
        temporary = self.directory / f"{_UNFINISHED}{step:06d}.tmp"
        together, state = self.ranks.together, json.dumps({"step": step, "config": config})
        try:
            together(partial(self._prepare, temporary, tensors.values(), state), main=True)
            together(partial(write_tensors, temporary, tensors, self.ranks))
            written = together(partial(_synced, temporary, self.ranks.rank))
            listed = {name: entry for files in written for name, entry in files.items()}
            together(partial(self._publish, step, temporary, listed), main=True)
        except Exception as error:  # safetensors raises its own type for I/O errors
            if self.ranks.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            older = self.steps()
            left = f"the checkpoint of step {older[-1]} is untouched" if older else "there is no earlier checkpoint"
            raise SaveError(f"checkpoint of step {step} could not be saved ({error}); {left}") from error
        if self.ranks.is_main:
            self._prune(step)
        return self.path(step)

    def _prepare(self, temporary: Path, tensors: Iterable[Tensor], state: str) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors)  # of sharded ones in all
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise OSError(f"disk full: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free in {self.directory}")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        (temporary / _STATE).write_text(state)

    def _publish(self, step: int, temporary: Path, listed: dict[str, Fingerprint]) -> None:
        hidden = next((name for name in listed if not (temporary / name).is_file()), None)
        if hidden is not None:
            raise OSError(f"{hidden} of another rank is not in {temporary}: run.dir must be where all ranks see it")
        (temporary / _COMMIT).write_text(json.dumps(listed, indent=1))
        _sync(temporary / _COMMIT)
        _sync(temporary)
        self._delete(step)  # only ever a damaged one: `latest` would have found it otherwise
        temporary.rename(self.path(step))
        _sync(self.directory)

    def _prune(self, step: int) -> None:
        """Delete what `step` replaces, and what is left of saves and deletions that were cut off."""
        # Newer ones than this are damaged: a run goes on from the newest sound checkpoint.
        older = [other for other in self.steps() if other <= step]
        kept: set[int | None] = {
            *older[-self.keep :],
            *(other for other in older if self.keep_every and other % self.keep_every == 0),
        }
        kept.add(best_step(self.directory.parent))
        for other in set(self.steps()) - kept:
            with suppress(OSError):  # tried again after the next save
                self._delete(other)
        for left in self.directory.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(left, ignore_errors=True)

    def _delete(self, step: int) -> None:
        """Take checkpoint `step` out of sight, whole, and delete it then."""
        hidden = self.directory / f"{_UNFINISHED}{step:06d}.old"
        shutil.rmtree(hidden, ignore_errors=True)
        with suppress(FileNotFoundError):
            self.path(step).rename(hidden)
            shutil.rmtree(hidden, ignore_errors=True)

    def steps(self) -> list[int]:
        """Steps of the published checkpoints, oldest first."""
        found = (re.fullmatch(r"step-(\d{6,})", commit.parent.name) for commit in self.directory.glob(f"*/{_COMMIT}"))
        return sorted(int(match[1]) for match in found if match)

    def latest(self) -> int | None:
        """Step of the newest checkpoint whose files match their recorded hashes; damaged ones are warned about.

        All ranks must ask together: they share the files out among them.
        """
        [steps] = self.ranks.together(self.steps, main=True)
        for step in reversed(steps):
            found = self.ranks.together(partial(_damaged, self.path(step), self.ranks.rank, self.ranks.world))
            damaged = next(filter(None, found), None)
            if damaged is None:
                return step
            if self.ranks.is_main:
                warnings.warn(f"checkpoint {self.path(step)} is damaged ({damaged}); trying an older one", stacklevel=2)
        return None

    def load(self, step: int) -> dict[str, Tensor]:
        """The tensors of checkpoint `step`, whole, in host memory."""
        return read_whole(self.path(step), stored(self.path(step)))

    def config(self, step: int) -> str:
        """The config that checkpoint `step` was saved with."""
        return json.loads((self.path(step) / _STATE).read_text())["config"]


def load_weights(path: Path, *, ema: bool = False) -> dict[str, Tensor]:
    """The transformer weights of a checkpoint directory, whole, in host memory.

    With `ema` those that were averaged are the averages, in fp32.

    Raises `InputError` when it is missing or damaged, or holds no averages.
    """
    if not (path / _COMMIT).is_file():
        raise InputError(f"{path} is not a checkpoint (no {_COMMIT} file)")
    damaged = _damaged(path)
    if damaged is not None:
        raise InputError(f"checkpoint {path} is damaged: {damaged}")
    layout = stored(path)
    weights = read_whole(path, [name for name in layout if not is_state(name)])
    if ema:
        averaged = [name for name in weights if f"{name}/ema" in layout]
        if not averaged:
            raise InputError(f"checkpoint {path} holds no averaged weights: its run had no optimizer.ema_decay")
        averages = read_whole(path, [f"{name}/ema" for name in averaged])
        weights |= {name: averages[f"{name}/ema"] for name in averaged}
    return weights


def _synced(directory: Path, rank: int) -> dict[str, Fingerprint]:
    """Fingerprints of the files that `rank` wrote, once they are on the disk."""
    mine = sorted(file for file in directory.iterdir() if writer_of(file.name) == rank)
    for file in mine:
        _sync(file)
    return {file.name: _fingerprint(file) for file in mine}


def _fingerprint(file: Path) -> Fingerprint:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}


def _damaged(path: Path, rank: int = 0, world: int = 1) -> str | None:
    """What is wrong with a published checkpoint, or None; `rank` of `world` looks at its share of the files."""
    try:
        listed = dict(json.loads((path / _COMMIT).read_text()))
    except (OSError, ValueError, TypeError) as error:
        return f"{_COMMIT} is not readable: {error}"
    if not listed:
        return f"{_COMMIT} is empty"
    for name, expected in list(listed.items())[rank::world]:
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
