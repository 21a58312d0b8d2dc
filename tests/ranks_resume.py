"""Two ranks that save, resume, stop and fail together: run by torchrun, for `test_ranks_resume.py`."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import quick_config
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.tensor import DTensor

from srpo.checkpoint import Checkpoints, SaveError
from srpo.config import TrainConfig
from srpo.saving import Saver
from srpo.trainer import NonFiniteError, Trainer

#: int16 remainders, blocks of 8 bits with their scales, and averages.
STATES = ("model.precision=bf16", "optimizer.moments=M2", "optimizer.ema_decay=0.5")
QUICKER = ("srpo.batch_size=2", "run.micro_batch=1", "run.save_every=1", "run.keep=3", *STATES)

#: Three images, of which two ranks make two and one.
LOOKS = ("run.sample_every=1", "run.sample_count=3", "run.sample_steps=2")


def config(run: Path, updates: int, *overrides: str) -> TrainConfig:
    return quick_config(run, f"srpo.updates={updates}", *QUICKER, *overrides)


def saved_again(trainer: Trainer, directory: Path) -> None:
    """What the trainer holds now, as checkpoint 0 of `directory`."""
    weights = dict(zip(trainer.names, trainer.parameters, strict=True))
    Saver(replace(trainer.checkpoints, directory=directory), weights, trainer.optimizer, "", background=False).save(0)


def main(folder: Path) -> None:
    fsdp = "run.sharding=fsdp"
    Trainer(config(folder / "whole", 3, fsdp, *LOOKS)).fit()
    Trainer(config(folder / "parts", 1, fsdp, *LOOKS)).fit()
    resumed = Trainer(config(folder / "parts", 3, fsdp, *LOOKS, "run.save_async=false"), resume=True)
    assert resumed.start == 1
    resumed.fit()

    from_one = Trainer(config(folder / "one", 2, fsdp), resume=True)
    assert from_one.start == 1
    saved_again(from_one, folder / "one-again")
    from_one.fit()

    mixed(folder)
    signalled_in_rollout(folder)
    damage_is_seen_by_all(folder)
    for sharding in (fsdp, "run.sharding=none"):
        non_finite_on_one_rank(folder, sharding)
    failed_write_on_one_rank(folder)
    signalled_as_slurm_does(folder)


def mixed(folder: Path) -> None:
    """One rank rolls out, with weights that all gather, while the other reads images."""
    images = (f"data.images={folder / 'images'}", "data.mode=mixed", "run.seed=1")
    trainer = Trainer(config(folder / "mixed", 3, "run.sharding=fsdp", *images))
    read = [trainer.ranks.together(lambda step=step: bool(trainer.batches.chosen(step, 0)[1])) for step in range(3)]
    assert any(len(set(ranks)) == 2 for ranks in read), read
    assert trainer.fit() == 3


def signalled_in_rollout(folder: Path) -> None:
    trainer = Trainer(config(folder / "signalled", 3, "run.sharding=fsdp", "srpo.rollout_steps=8", "run.save_every=3"))
    trajectory, calls = trainer.flux.trajectory, []

    def counted(*args: Any, **options: Any) -> Any:
        velocity = trajectory(*args, **options)

        def call(x_t: Tensor, step: int) -> Tensor:
            calls.append(step)
            if len(calls) == 8 + 3 and trainer.ranks.rank == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            return velocity(x_t, step)

        return call

    with mock.patch.object(trainer.flux, "trajectory", counted):
        assert trainer.fit() == 1
    assert len(calls) == 8 + 3, "one step more than the signal's"
    assert trainer.stopped_by == "SIGUSR1"


def damage_is_seen_by_all(folder: Path) -> None:
    """Whichever rank hashes the file, all go on from the checkpoint before."""
    trainer = Trainer(config(folder / "damaged", 2, "run.sharding=fsdp"))
    trainer.fit()
    files = sorted(trainer.checkpoints.path(2).glob("__*"))
    assert {file.name[:3] for file in files} == {"__0", "__1"}, "each rank writes its own"
    if trainer.ranks.is_main:
        content = bytearray(files[-1].read_bytes())
        content[len(content) // 2] ^= 1
        files[-1].write_bytes(content)
    trainer.ranks.barrier()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert Trainer(config(folder / "damaged", 3, "run.sharding=fsdp"), resume=True).start == 1
    named = [str(warning.message) for warning in caught if files[-1].name in str(warning.message)]
    assert len(named) == trainer.ranks.is_main, named


def non_finite_on_one_rank(folder: Path, sharding: str) -> None:
    trainer = Trainer(config(folder / f"nan-{sharding}", 2, sharding, "run.save_every=2"))
    before = [whole(parameter) for parameter in trainer.parameters]
    relative = trainer.reward.relative

    def poisoned(*args: Any) -> Tensor:
        return relative(*args) * (float("nan") if trainer.ranks.rank == 1 else 1)

    message = "update 1: the .* branch scored nan" if trainer.ranks.rank == 1 else "a score of another rank"
    with mock.patch.object(trainer.reward, "relative", poisoned), pytest.raises(NonFiniteError, match=message):
        trainer.fit()
    decode = trainer.flux.decode

    def broken_backward(latents: Tensor) -> Tensor:
        images = decode(latents)
        if trainer.ranks.rank == 1 and images.requires_grad:
            images.register_hook(lambda gradient: gradient * float("nan"))
        return images

    message = r"update 1: the gradient norm is (nan|inf)"
    with mock.patch.object(trainer.flux, "decode", broken_backward), pytest.raises(NonFiniteError, match=message):
        trainer.fit()
    assert all(torch.equal(old, whole(new)) for old, new in zip(before, trainer.parameters, strict=True))
    assert trainer.checkpoints.steps() == []


def failed_write_on_one_rank(folder: Path) -> None:
    trainer = Trainer(config(folder / "full", 3, "run.sharding=fsdp"))
    write, writes, updates = FileSystemWriter.write_data, [], []

    def full(*args: Any) -> Any:
        writes.append(args)
        if len(writes) == 2 and trainer.ranks.rank == 1:
            raise OSError(28, "No space left on device")
        return write(*args)

    with (
        mock.patch.object(FileSystemWriter, "write_data", full),
        pytest.raises(SaveError, match=r"step 2 could not .*No space left .*the checkpoint of step 1 is untouched"),
    ):
        trainer.fit(updates.append)
    assert updates == [1, 2], "training went on while it failed"
    assert trainer.checkpoints.latest() == 1


def signalled_as_slurm_does(folder: Path) -> None:
    """The parent sends SIGTERM to these processes and to torchrun, which passes it on: they get it twice."""
    trainer = Trainer(config(folder / "grouped", 100_000, "run.sharding=fsdp", "run.save_every=100000"))
    ready = folder / f"ready-{trainer.ranks.rank}"
    done = trainer.fit(lambda _: ready.exists() or ready.write_text(str(os.getpid())))
    assert trainer.stopped_by == "SIGTERM"
    assert trainer.checkpoints.latest() == done
    (folder / f"stopped-{trainer.ranks.rank}").write_text(str(done))


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def checkpoints(run: Path) -> Checkpoints:
    return Checkpoints(run / "checkpoints", 3)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
