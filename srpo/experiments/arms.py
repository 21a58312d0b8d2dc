"""Trainings that an experiment compares: each arm of it trained from every seed, and looked at along the way."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from srpo.config import TrainConfig, load_config
from srpo.experiments.experiment import Row, Setting, one_thread
from srpo.experiments.witness import Witness, witness
from srpo.rewards import Reward
from srpo.runlog import read_log
from srpo.trainer import NonFiniteError, Trainer

__all__ = ["Arm", "shown", "trained"]

_SHOWN = 40  # images kept of a training's last look


def _as_given(reward: Reward) -> Reward:
    return reward


def _nothing(trainer: Trainer, looker: Witness, update: int) -> Row:
    del trainer, looker, update
    return {}


@dataclass(frozen=True)
class Arm:
    """One way of training.

    Attributes:
        overrides: its changes to the recipe. every: updates between two looks; 0: only before the first and after the
            last. towards: the word whose attribute `moved` tells, where it is not the recipe's first control word.
            reward: what makes of the recipe's reward the one to train on; a function of a module, or a
            `functools.partial` of one. also: what else of the model in training a row of that update has; one, too.
    """

    name: str
    overrides: tuple[str, ...] = ()
    every: int = 0
    towards: str = ""
    reward: Callable[[Reward], Reward] = field(default=_as_given)
    also: Callable[[Trainer, Witness, int], Row] = field(default=_nothing)


def trained(
    arms: Sequence[Arm], setting: Setting, out: Path, say: Callable[[str], None], *, images: int = 100
) -> Iterator[Row]:
    """Train every arm from every seed, and yield a row for each look at each, in the order of arms and seeds.

    A row has `arm`, `seed`, `update`, `forwards` and `seconds` (since update 0, looks not counted), the `score` that
    was trained on, and all that a `Witness` sees, of the tiny world on `images` images, a quarter of them with --quick.
    An arm whose scores or gradients stop being finite ends with a row that has `failed` in the place of what would be
    seen. Runs are directories ``ARM/SEED`` of `out`.
    """
    _check(arms)
    images = max(20, images // 4) if setting.quick else images
    tasks = [
        _Task(arm, seed, setting, out / arm.name / str(seed), images)
        for arm, seed in product(arms, range(setting.seeds))
    ]
    for task, rows in zip(tasks, _each(_train, tasks, setting.workers), strict=True):
        say(f"{task.arm.name}, seed {task.seed}: {rows[-1]['update']} updates")
        yield from rows


def shown(arms: Sequence[Arm], out: Path, count: int) -> list[tuple[str, Tensor]]:
    """Of every arm that was `trained` into `out` its name, and the first images that the first seed's last look saw."""
    found = ((arm.name, np.load(out / arm.name / "0.npy")) for arm in arms)
    return [(name, torch.from_numpy(images[:count])) for name, images in found]


@dataclass(frozen=True)
class _Task:
    arm: Arm
    seed: int
    setting: Setting
    directory: Path
    images: int

    def config(self) -> TrainConfig:
        own = [
            f"run.dir={json.dumps(str(self.directory))}",
            f"run.seed={self.seed}",
            "run.sample_every=0",
            "run.save_every=1000000",  # the last update is always saved
            "run.tensorboard=false",
        ]
        return load_config(self.setting.recipe, [*own, *self.arm.overrides, *self.setting.overrides])


def _check(arms: Sequence[Arm]) -> None:
    names = [arm.name for arm in arms]
    if len(set(names)) != len(names) or any(Path(name).name != name for name in names):
        raise ValueError(f"arms must have different names, each one of a directory, got {names}")


def _each(work: Callable[[_Task], list[Row]], tasks: Sequence[_Task], workers: int) -> Iterator[list[Row]]:
    """What `work` makes of every task, in their order; in processes of their own if there are several."""
    workers = min(workers, len(tasks))
    if workers == 1:
        yield from map(work, tasks)
        return
    # Spawned: a forked child would share the threads' locks of its parent.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        try:
            yield from pool.map(work, tasks)
        finally:
            pool.shutdown(cancel_futures=True)


def _train(task: _Task) -> list[Row]:
    """Every look at one training."""
    config, every = task.config(), task.arm.every
    task.directory.parent.mkdir(parents=True, exist_ok=True)
    with _quiet(task.directory.with_suffix(".txt")), one_thread():
        trainer = Trainer(config, reward=task.arm.reward)
        looker = witness(trainer, task.arm.towards, task.seed, task.images)
        rows: list[Row] = []

        def look(update: int) -> None:
            if update % (every or config.srpo.updates) == 0 or update == config.srpo.updates:
                rows.append(_row(task, update) | looker.look() | task.arm.also(trainer, looker, update))

        look(0)
        try:
            trainer.fit(look)
        except NonFiniteError as error:
            rows.append(_row(task, len(read_log(task.directory))) | {"failed": str(error)})
        if trainer.stopped_by:
            raise KeyboardInterrupt(trainer.stopped_by)
        np.save(task.directory.with_suffix(".npy"), looker.images[:_SHOWN].numpy())
    return rows


def _row(task: _Task, update: int) -> Row:
    records: list[dict[str, Any]] = read_log(task.directory)[:update] if update else []
    forwards = sum(record["forwards"] for record in records)
    seconds = sum(sum(record["seconds"].values()) for record in records)
    row = {
        "arm": task.arm.name,
        "seed": task.seed,
        "update": update,
        "forwards": forwards,
        "seconds": round(seconds, 2),
    }
    scores = records[-1]["scores"].values() if records else ()
    return row | {"score": sum(scores) / len(scores) if scores else None}


@contextlib.contextmanager
def _quiet(file: Path) -> Iterator[None]:
    """What a training prints goes to a file: several may run at once."""
    with (
        file.open("w", encoding="utf-8") as stream,
        contextlib.redirect_stdout(stream),
        contextlib.redirect_stderr(stream),
    ):
        yield
