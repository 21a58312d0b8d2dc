"""Processes that are killed, for real, at any instant: their run directories stay usable."""

from __future__ import annotations

import os
import random
import select
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import forked, quick_config, state_of

import srpo.checkpoint
from srpo.checkpoint import Checkpoints
from srpo.runlog import read_log
from srpo.trainer import Trainer

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="autograd's threads for GPUs do not survive a fork")

SAVE_EVERY = 2


def _tensors(step: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((100,), float(step)), "w/exp_avg": torch.full((100,), -float(step))}


def _killed_at(event: int) -> None:
    """Have this process kill itself at its `event`-th use of the file system from now on."""
    left = event

    def count(name: str, _arguments: Any) -> None:
        nonlocal left
        if name == "open" or name.startswith(("os.", "shutil.")):
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_save_killed_at_each_of_its_steps_leaves_a_sound_checkpoint(damaged: bool, tmp_path: Path) -> None:
    """Every opening, creation, renaming and deletion of a file, when the checkpoint before the last is deleted.

    `damaged`: and a damaged checkpoint of the same step replaced.
    """
    before = Checkpoints(tmp_path / "before/checkpoints", 2)
    for step in (1, 2):
        before.save(step, _tensors(step), "")
    if damaged:
        shutil.copytree(before.path(2), before.path(3))
        (before.path(3) / "transformer.safetensors").write_bytes(b"")
    event, seen = 0, set()
    while True:
        event += 1
        run = tmp_path / f"run-{event}"
        shutil.copytree(before.directory, run / "checkpoints")
        checkpoints = Checkpoints(run / "checkpoints", 2)

        def save(event: int = event, checkpoints: Checkpoints = checkpoints) -> None:
            _killed_at(event)
            checkpoints.save(3, _tensors(3), "")

        _, status = os.waitpid(forked(save), 0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if damaged else "error")
            latest = checkpoints.latest()
        assert latest in (2, 3), event
        assert torch.equal(checkpoints.load(latest)["w/exp_avg"], _tensors(latest)["w/exp_avg"])
        seen.add(latest)
        checkpoints.save(latest + 1, _tensors(latest + 1), "")
        assert {path.name for path in checkpoints.directory.iterdir()} == {
            f"step-{step:06d}" for step in (latest, latest + 1)
        }
        if not status:
            break
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    assert seen == {2, 3}
    assert event > 25


def test_run_killed_at_random_instants_goes_on(tmp_path: Path) -> None:
    _kill_loop(tmp_path, kills=8, updates=12, overrides=[])


@pytest.mark.slow
def test_run_killed_at_50_random_instants_goes_on(tmp_path: Path) -> None:
    while_writing = _kill_loop(tmp_path, kills=50, updates=60, overrides=["run.sample_every=3", "run.sample_count=2"])
    assert while_writing > 3


def _kill_loop(folder: Path, *, kills: int, updates: int, overrides: list[str]) -> int:
    """Kill a run again and again and let it end: it is bitwise the one that nobody killed.

    Returns how many kills interrupted the writing of a checkpoint.
    """
    quick = ["srpo.batch_size=1", "run.micro_batch=1", "srpo.rollout_steps=1", "run.sample_steps=2", *overrides]
    quick += [f"srpo.updates={updates}", f"run.save_every={SAVE_EVERY}"]
    choose, run = random.Random(0), folder / "killed"
    checkpoints = Checkpoints(run / "checkpoints", 2)
    while_writing, pace = 0, 0.5
    for number in range(kills):
        reader, writer = os.pipe()
        child = forked(lambda writer=writer: _train(quick_config(run, *quick), lambda _: os.write(writer, b".")))
        os.close(writer)
        delay = choose.uniform(0, 3)
        if number % 4:  # a time after the first update, in updates; the rest at any time from the start on
            began = time.monotonic()
            assert select.select([reader], [], [], 120)[0]
            pace = min(pace, time.monotonic() - began)
        time.sleep(delay * pace)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        while_writing += any(checkpoints.directory.glob(".step-*.tmp"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # none is ever damaged
            saved = checkpoints.latest() or 0
        recorded = read_log(run)[-1]["step"] if (run / "log.jsonl").is_file() and read_log(run) else 0
        assert recorded - saved <= SAVE_EVERY
    _, status = os.waitpid(forked(lambda: _train(quick_config(run, *quick), lambda _: None)), 0)
    assert status == 0
    Trainer(quick_config(folder / "whole", *quick)).fit()
    assert state_of(run, updates) == state_of(folder / "whole", updates)
    assert [record["step"] for record in read_log(run)] == list(range(1, updates + 1))
    assert not list(checkpoints.directory.glob(".*"))
    return while_writing


def _train(config: Any, on_update: Callable[[int], object]) -> None:
    """Start or resume a run whose disk takes its time, so that kills fall into saves as well as between them."""
    sync = srpo.checkpoint._sync

    def slow(path: Path) -> None:
        time.sleep(0.02)
        sync(path)

    with mock.patch("srpo.checkpoint._sync", slow):
        Trainer(config, resume=(Path(config.run.dir) / "config.yaml").is_file()).fit(on_update)
