"""Checkpoints written while training goes on, averaged weights, requests to stop, and memory that does not grow."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import forked, quick_config, state_of
from safetensors.torch import load_file
from torch import Tensor

import srpo.checkpoint
import srpo.saving
import srpo.trainer
from srpo.checkpoint import Checkpoints, SaveError, load_weights
from srpo.cli import main
from srpo.distributed import ALONE
from srpo.optimizer import OptimizerConfig
from srpo.signals import Stop, StopRequestedError
from srpo.trainer import Trainer

QUICKER = ("srpo.batch_size=1", "run.micro_batch=1", "srpo.rollout_steps=1")


def test_checkpoint_is_of_its_update_though_written_during_the_next(tmp_path: Path) -> None:
    changed, write, take_step = threading.Event(), srpo.checkpoint.write_tensors, srpo.trainer.take_step
    steps: list[Any] = []

    def step(*args: Any) -> dict[str, float]:
        steps.append(take_step(*args))
        if len(steps) == 2:
            changed.set()
        return steps[-1]

    def late(*args: Any) -> None:
        assert threading.current_thread() is not threading.main_thread()
        assert changed.wait(60), "nothing went on meanwhile"
        write(*args)

    Trainer(quick_config(tmp_path / "waiting", *QUICKER, "srpo.updates=1", "run.save_async=false")).fit()
    with mock.patch("srpo.trainer.take_step", step), mock.patch("srpo.checkpoint.write_tensors", late):
        Trainer(quick_config(tmp_path / "meanwhile", *QUICKER, "srpo.updates=2", "run.save_every=1")).fit()
    assert state_of(tmp_path / "meanwhile", 1) == state_of(tmp_path / "waiting", 1)


@pytest.mark.parametrize("background", ["true", "false"])
def test_failed_save_stops_the_run_and_names_what_is_left(background: str, tmp_path: Path) -> None:
    updates: list[int] = []
    overrides = ("srpo.updates=9", "run.save_every=1", f"run.save_async={background}")
    trainer = Trainer(quick_config(tmp_path, *QUICKER, *overrides))
    sync = srpo.checkpoint._sync

    def full(path: Path) -> None:
        if ".step-000003" in str(path):
            raise OSError(28, "No space left on device")
        sync(path)

    with (
        mock.patch("srpo.checkpoint._sync", full),
        pytest.raises(SaveError, match=r"step 3 could not be saved \(.*No space left.*\); the checkpoint of step 2 is"),
    ):
        trainer.fit(updates.append)
    assert updates == ([1, 2, 3] if background == "true" else [1, 2]), "no later than at the next update's end"
    assert Checkpoints(tmp_path / "checkpoints", 2).latest() == 2


def test_failed_save_does_not_hide_why_a_run_ended(tmp_path: Path) -> None:
    trainer = Trainer(quick_config(tmp_path, *QUICKER, "srpo.updates=2", "run.save_every=1"))

    def broken(_: int) -> None:
        raise ZeroDivisionError

    with (
        mock.patch("srpo.checkpoint.write_tensors", side_effect=OSError("gone")),
        pytest.warns(UserWarning, match=r"checkpoint of step 1 could not be saved \(gone\)"),
        pytest.raises(ZeroDivisionError),
    ):
        trainer.fit(broken)


def test_copies_share_segments_without_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(srpo.saving, "_SEGMENT", 4096)
    parts = [torch.randn(30, 10), torch.tensor(2.0), torch.randn(0, 7), torch.randn(5000).bfloat16()]
    parts += [torch.randint(-9, 9, (n,), dtype=torch.int8) for n in range(900, 1000, 7)]
    rooms = list(srpo.saving._host_rooms(parts, pinned=False))
    for room, part in zip(rooms, parts, strict=True):
        room.copy_(part)
    assert all(torch.equal(room, part) and room.dtype == part.dtype for room, part in zip(rooms, parts, strict=True))
    assert (
        len({room.untyped_storage().data_ptr() for room in rooms}) == 1 + 1 + 4
    )  # the first, one for the largest, those of bytes


# --- averaged weights -------------------------------------------------------------------------

EMA = (*QUICKER, "optimizer.ema_decay=0.5", "optimizer.ema_every=2")


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four updates that keeps averages."""
    run = tmp_path_factory.mktemp("averaged") / "run"
    Trainer(quick_config(run, *EMA, "srpo.updates=4")).fit()
    return run


@pytest.mark.parametrize("offload", ["none", "ema"])
def test_averages_resume_bitwise(offload: str, averaged: Path, tmp_path: Path) -> None:
    overrides = (*EMA, f"optimizer.offload={offload}")
    Trainer(quick_config(tmp_path, *overrides, "srpo.updates=3")).fit()
    resumed = Trainer(quick_config(tmp_path, *overrides, "srpo.updates=4"), resume=True)
    assert resumed.start == 3
    resumed.fit()
    assert state_of(tmp_path, 4) == state_of(averaged, 4)


def test_averages_are_of_the_weights_so_far(tmp_path: Path) -> None:
    overrides = ("srpo.updates=3", "run.save_every=1", "run.keep=3", "optimizer.ema_decay=0.5")
    trainer = Trainer(quick_config(tmp_path, *QUICKER, *overrides))
    trainer.fit()
    first, *later = (load_weights(trainer.checkpoints.path(step)) for step in (1, 2, 3))
    state = trainer.checkpoints.load(1)
    for name, average in load_weights(trainer.checkpoints.path(3), ema=True).items():
        expected = state[f"{name}/ema"]
        for weights in later:
            expected = 0.5 * expected + 0.5 * weights[name]
        torch.testing.assert_close(average, expected, rtol=1e-6, atol=1e-7)
        assert first[name].dtype == average.dtype


def test_validation_looks_at_the_averages(tmp_path: Path) -> None:
    overrides = ("optimizer.ema_decay=0.5", "srpo.updates=2", "run.sample_every=2", "run.sample_steps=2")
    trainer = Trainer(quick_config(tmp_path, *QUICKER, *overrides))
    shown: list[list[Tensor]] = []
    run = trainer.validation.run

    def look(*args: Any) -> None:
        shown.append([parameter.detach().clone() for parameter in trainer.parameters])
        run(*args)

    with mock.patch.object(trainer.validation, "run", look):
        trainer.fit()
    averages = trainer.optimizer.ema_weights()
    assert all(torch.equal(last, average) for last, average in zip(shown[-1], averages, strict=True))
    saved = load_weights(trainer.checkpoints.path(2))
    exact = [saved[name] for name in trainer.names]
    assert all(torch.equal(parameter, weight) for parameter, weight in zip(trainer.parameters, exact, strict=True))
    assert any(not torch.equal(last, weight) for last, weight in zip(shown[-1], exact, strict=True))


def test_averages_are_exported_and_sampled(averaged: Path, tmp_path: Path) -> None:
    wanted = load_weights(averaged / "checkpoints/step-000004", ema=True)
    assert main(["export", str(averaged), "--ema", "--out", str(tmp_path / "exported")]) == 0
    [file] = (tmp_path / "exported/transformer").glob("*.safetensors")
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in load_file(file).items())
    options = ["--prompt", "digit three", "run.sample_steps=2"]
    for name, arguments in {"ema": [str(averaged), "--ema"], "again": [str(tmp_path / "exported")]}.items():
        assert main(["sample", *arguments, *options, "--out", str(tmp_path / name)]) == 0
    pixels = [np.fromfile(tmp_path / name / "00000.png", np.uint8) for name in ("ema", "again")]
    assert np.array_equal(*pixels)


def test_averages_that_were_not_kept_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Trainer(quick_config(tmp_path / "run", *QUICKER, "srpo.updates=1")).fit()
    for command in ("export", "sample"):
        assert main([command, str(tmp_path / "run"), "--ema", "--out", str(tmp_path / "out")]) == 2
        assert "holds no averaged weights: its run had no optimizer.ema_decay" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(ema_decay=1.0), r"optimizer.ema_decay must be in \[0, 1\) or null, got 1.0"),
        (dict(ema_every=0), "optimizer.ema_every must be at least 1, got 0"),
        (dict(offload="ema"), "optimizer.offload ema needs optimizer.ema_decay"),
        (dict(name="torch", ema_decay=0.9), "optimizer.ema_decay needs optimizer.name srpo"),
    ],
)
def test_averages_that_cannot_be_kept(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**options)


# --- requests to stop -------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signal_is_a_request_and_its_echo_is_the_same(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Stop(ALONE) as stop:
        stop.check()
        for _ in range(2):
            os.kill(os.getpid(), number)
        with pytest.raises(StopRequestedError, match=number.name):
            stop.check()
        assert stop.signal == number.name
    assert signal.getsignal(number) is before


@pytest.mark.skipif(torch.cuda.is_available(), reason="forks")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_later_signal_ends_the_process_at_once(number: signal.Signals) -> None:
    def insist() -> None:
        with mock.patch("srpo.signals._SAME_SECONDS", 0.01), Stop(ALONE):
            os.kill(os.getpid(), number)
            time.sleep(0.05)
            os.kill(os.getpid(), number)
            time.sleep(30)

    _, status = os.waitpid(forked(insist), 0)
    assert os.waitstatus_to_exitcode(status) == -number


def test_signal_stops_a_lone_run_within_its_rollout(tmp_path: Path) -> None:
    trainer = Trainer(quick_config(tmp_path, "srpo.updates=3", "srpo.rollout_steps=5", "run.save_every=3"))
    trajectory, calls = trainer.flux.trajectory, []

    def counted(*args: Any, **options: Any) -> Any:
        velocity = trajectory(*args, **options)

        def call(x_t: Tensor, step: int) -> Tensor:
            calls.append(step)
            if len(calls) == 10 + 2:  # an update has two rollouts
                os.kill(os.getpid(), signal.SIGUSR1)
            return velocity(x_t, step)

        return call

    with mock.patch.object(trainer.flux, "trajectory", counted):
        assert trainer.fit() == 1
    assert len(calls) == 10 + 2
    assert trainer.stopped_by == "SIGUSR1"
    assert trainer.checkpoints.latest() == 1


# --- memory -----------------------------------------------------------------------------------


def _tensor_bytes() -> int:
    """Bytes of all tensors that Python knows, storages counted once."""
    gc.collect()
    return sum(dict(_storage(found) for found in gc.get_objects() if isinstance(found, Tensor)).values())


def _storage(tensor: Tensor) -> tuple[int, int]:
    """Its address and bytes; none of a tensor without data, such as other tests leave behind."""
    try:
        storage = tensor.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    except (RuntimeError, NotImplementedError):
        return 0, 0


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _measured(folder: Path, updates: int, at: tuple[int, int]) -> list[tuple[int, int]]:
    """Bytes of tensors and of the process after two updates of a run, when caches hold all that they will."""
    found: list[tuple[int, int]] = []
    prompts = folder / "prompts.txt"
    prompts.write_text("digit three\ndigit seven\n")

    def look(step: int) -> None:
        if step in at:
            found.append((_tensor_bytes(), _resident_bytes()))

    overrides = (f"srpo.updates={updates}", "run.save_every=2", "optimizer.ema_decay=0.9", f"data.prompts={prompts}")
    Trainer(quick_config(folder / "run", *QUICKER, *overrides)).fit(look)
    return found


def test_tensors_do_not_pile_up(tmp_path: Path) -> None:
    (early, _), (late, _) = _measured(tmp_path, 24, (12, 24))
    assert early == late


@pytest.mark.slow
def test_memory_does_not_grow_over_200_updates(tmp_path: Path) -> None:
    """The second hundred takes less than one copy of the weights, 3.5 MB, in all."""
    (early, early_resident), (late, late_resident) = _measured(tmp_path, 200, (100, 200))
    assert early == late
    weights = load_weights(tmp_path / "run/checkpoints/step-000200")
    assert late_resident - early_resident < sum(tensor.nbytes for tensor in weights.values())
