"""Checkpoints of two ranks, on two ranks and on one."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from helpers import command, environment
from ranks_resume import LOOKS, checkpoints, config, saved_again
from torch import Tensor

from srpo.checkpoint import Checkpoints, load_weights
from srpo.runlog import read_log
from srpo.tiny.digits import export_images
from srpo.trainer import Trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks left that passed their own checks and were stopped in the end."""
    path = tmp_path_factory.mktemp("ranks")
    export_images(path / "images", 12, 0)
    Trainer(config(path / "one", 1, *LOOKS)).fit()
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "tests/ranks_resume.py", str(path)]
    output = path / "output"
    with (
        output.open("w") as stream,
        subprocess.Popen(
            [command()[0], *launch],
            cwd=Path(__file__).parents[1],
            env=environment(PYTHONPATH="tests"),
            stdout=stream,
            stderr=subprocess.STDOUT,
        ) as launched,
    ):
        ready = [path / f"ready-{rank}" for rank in (0, 1)]
        while launched.poll() is None and not all(file.exists() and file.read_text() for file in ready):
            time.sleep(0.05)
        if launched.poll() is None:
            for process in (*(int(file.read_text()) for file in ready), launched.pid):
                os.kill(process, signal.SIGTERM)
            launched.wait(timeout=120)
    stopped = [path / f"stopped-{rank}" for rank in (0, 1)]
    assert all(file.exists() for file in stopped), output.read_text()[-6000:]
    return path


def _assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def test_two_ranks_resume_bitwise(folder: Path) -> None:
    found, wanted = (checkpoints(folder / run).load(3) for run in ("parts", "whole"))
    kinds = {tensor.dtype for tensor in wanted.values()}
    assert kinds == {torch.float32, torch.bfloat16, torch.int16, torch.uint8}
    _assert_equal(found, wanted)


def test_two_ranks_see_what_one_does(folder: Path) -> None:
    whole, parts, one = (
        [{**look, "seconds": None} for look in read_log(folder / run, "validation")]
        for run in ("whole", "parts", "one")
    )
    assert [look["step"] for look in whole] == [0, 1, 2, 3]
    assert parts == whole
    assert one[0] == whole[0]
    assert whole[1]["values"]["drift@0.9"] > 0


def test_one_rank_goes_on_from_two_and_two_from_one(folder: Path, tmp_path: Path) -> None:
    resumed = Trainer(config(folder / "whole", 4), resume=True)
    assert resumed.start == 3
    saved_again(resumed, tmp_path)
    _assert_equal(Checkpoints(tmp_path, 3).load(0), checkpoints(folder / "whole").load(3))
    assert resumed.fit() == 4
    assert (folder / "whole/checkpoints/step-000004/transformer.safetensors").is_file()

    _assert_equal(Checkpoints(folder / "one-again", 3).load(0), checkpoints(folder / "one").load(1))
    assert checkpoints(folder / "one").steps() == [1, 2]
    for run, updates in (("whole", 4), ("one", 2)):
        assert [record["step"] for record in read_log(folder / run)] == list(range(1, updates + 1))


def test_weights_of_ranks_are_read_whole_and_averaged(folder: Path) -> None:
    path, state = checkpoints(folder / "whole").path(3), checkpoints(folder / "whole").load(3)
    exact, averaged = load_weights(path), load_weights(path, ema=True)
    assert exact.keys() == averaged.keys()
    for name, tensor in exact.items():
        assert torch.equal(tensor, state[name])
        assert torch.equal(averaged[name], state[f"{name}/ema"])
    assert any(not torch.equal(tensor.float(), averaged[name]) for name, tensor in exact.items())


def test_signal_to_one_rank_stops_all_within_the_rollout(folder: Path) -> None:
    assert checkpoints(folder / "signalled").steps() == [1]
    assert len(read_log(folder / "signalled")) == 1


def test_signal_to_all_processes_saves_though_it_comes_twice(folder: Path) -> None:
    done = {(folder / f"stopped-{rank}").read_text() for rank in (0, 1)}
    assert checkpoints(folder / "grouped").steps() == [int(done.pop())]
    assert not done
