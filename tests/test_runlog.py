"""Loggers: none of them can stop, delay or spoil a run."""

from __future__ import annotations

import json
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import srpo.loggers
from srpo.loggers import Background, WandbConfig
from srpo.runlog import RunLog, read_events, read_log

_UPDATE = {"losses": {"total": 1.0}, "scores": {"denoise": 0.5}, "seconds": {"rollout": 2.0}, "grad_norm": 3.0}
_LOOK = {"values": {"chroma": 4.0, "drift@0.9": 0.1}, "warnings": [], "stops": []}


class _Fake:
    """A logger that fails at one of its calls, or none."""

    def __init__(self, fails: str | None = None) -> None:
        self.fails, self.calls = fails, list[tuple]()
        self._do("open")

    def _do(self, name: str, *values: Any) -> None:
        if name == self.fails:
            raise ConnectionError(f"no network in {name}")
        self.calls.append((name, *values))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._do("scalars", step, dict(values))

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        self._do("picture", step, name, image.size)

    def close(self) -> None:
        self._do("close")


def _write(log: RunLog, directory: Path, steps: range) -> None:
    for step in steps:
        log.update(step, dict(_UPDATE))
        grids = {directory / f"samples/step-{step:06d}{size}.png": Image.new("RGB", (8, 4)) for size in ("", "-64x64")}
        log.validation(step, dict(_LOOK), grids)
    log.close()


def _wandb(monkeypatch: pytest.MonkeyPatch, fails: str | None = None) -> list[tuple]:
    """A module in wandb's place; what is asked of it."""
    calls: list[tuple] = []

    def call(name: str) -> Any:
        def done(*values: Any, **named: Any) -> Any:
            if name == fails:
                raise RuntimeError(f"wandb: {name} failed")
            calls.append((name, *values, named))
            return run if name == "init" else f"image of {values[0].size}" if name == "Image" else None

        return done

    run = types.SimpleNamespace(**{name: call(name) for name in ("log", "finish", "define_metric")})
    module = types.ModuleType("wandb")
    module.__dict__.update(init=call("init"), Image=call("Image"))
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def _run_directory(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text("srpo: {updates: 2}\n")
    return tmp_path


def test_loggers_get_what_the_file_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = _Fake()
    monkeypatch.setattr("srpo.runlog.tensorboard", lambda _: fake)
    _write(RunLog(tmp_path, start=0, total=2, tensorboard=True), tmp_path, range(1, 3))
    scalars = {"losses/total": 1.0, "scores/denoise": 0.5, "seconds/rollout": 2.0, "grad_norm": 3.0}
    looked = {"validation/chroma": 4.0, "validation/drift@0.9": 0.1}
    expected: list[tuple] = [("open",)]
    for step in (1, 2):
        pictures = [("picture", step, f"samples/{size}", (8, 4)) for size in ("grid", "64x64")]
        expected += [("scalars", step, scalars), ("scalars", step, looked), *pictures]
    assert fake.calls == [*expected, ("close",)]
    assert read_log(tmp_path) == [{"event": "update", "step": step, **_UPDATE} for step in (1, 2)]
    assert [record["values"] for record in read_log(tmp_path, "validation")] == [_LOOK["values"]] * 2


@pytest.mark.parametrize("call", ["open", "scalars", "picture", "close"])
def test_a_logger_that_fails_is_one_warning_and_off(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[_Fake] = []
    monkeypatch.setattr("srpo.runlog.tensorboard", lambda _: made.append(fake := _Fake(call)) or fake)
    with pytest.warns(UserWarning, match=" is off: ") as caught:
        _write(RunLog(tmp_path, start=0, total=9, tensorboard=True), tmp_path, range(1, 10))
    told = [str(warning.message) for warning in caught]
    assert told == [f"TensorBoard is off: ConnectionError: no network in {call}"]
    assert len(read_events(tmp_path)) == 18
    calls = [name for fake in made for name, *_ in fake.calls]
    assert calls == {"open": [], "scalars": ["open"], "picture": ["open", "scalars", "scalars"]}.get(call, calls)


def test_a_logger_that_hangs_delays_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    monkeypatch.setattr(srpo.loggers, "_CLOSING", 0.2)
    monkeypatch.setattr(srpo.loggers, "_WAITING", 4)

    def hang(_: Path) -> _Fake:
        released.wait(60)
        return _Fake()

    monkeypatch.setattr("srpo.runlog.tensorboard", hang)
    began = time.perf_counter()
    with pytest.warns(UserWarning, match="TensorBoard is off: is more than 4 records behind"):
        _write(RunLog(tmp_path / ".", start=0, total=9, tensorboard=True), tmp_path, range(1, 10))
    with pytest.warns(UserWarning, match=r"slow is off: did not finish within 0 s"):
        Background("slow", lambda: hang(tmp_path)).close()
    released.set()
    assert time.perf_counter() - began < 30
    assert len(read_log(tmp_path)) == 9


def test_wandb_run_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _wandb(monkeypatch)
    directory = _run_directory(tmp_path)
    config = WandbConfig(project="tuning", mode="offline")
    for steps in (range(1, 2), range(2, 3)):
        _write(RunLog(directory, start=0, total=2, tensorboard=False, wandb=config), directory, steps)
    first, second = ([call for call in calls if call[0] == "init"][index][1] for index in (0, 1))
    assert first == second
    assert first["id"] == json.loads((directory / "wandb.json").read_text())["id"]
    wanted = {"project": "tuning", "name": directory.name, "mode": "offline", "resume": "allow", "dir": str(directory)}
    assert {key: first[key] for key in wanted} == wanted
    assert first["config"] == {"srpo": {"updates": 2}}
    logged = [call[1] for call in calls if call[0] == "log"]
    assert [record["update"] for record in logged] == [1, 1, 1, 1, 2, 2, 2, 2]
    assert logged[2] == {"samples/grid": "image of (8, 4)", "update": 1}
    assert [call[0] for call in calls].count("finish") == 2


@pytest.mark.parametrize("fails", ["init", "define_metric", "log", "Image", "finish"])
def test_wandb_failures_are_warnings(fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _wandb(monkeypatch, fails)
    directory = _run_directory(tmp_path)
    with pytest.warns(UserWarning, match=" is off: ") as caught:
        _write(RunLog(directory, start=0, total=3, tensorboard=False, wandb=WandbConfig()), directory, range(1, 4))
    told = [str(warning.message) for warning in caught]
    assert told == [f"Weights & Biases is off: RuntimeError: wandb: {fails} failed"]
    assert len(read_log(directory)) == 3


def test_wandb_that_is_not_installed_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    directory = _run_directory(tmp_path)
    with pytest.warns(UserWarning, match="Weights & Biases is off: ModuleNotFoundError"):
        _write(RunLog(directory, start=0, total=1, tensorboard=False, wandb=WandbConfig()), directory, range(1, 2))


def test_tensorboard_files_hold_numbers_and_pictures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _write(RunLog(tmp_path, start=0, total=2, tensorboard=True), tmp_path, range(1, 3))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(one.step, one.value) for one in events.Scalars("validation/chroma")] == [(1, 4.0), (2, 4.0)]
    assert {"losses/total", "grad_norm", "seconds/rollout"} <= set(events.Tags()["scalars"])
    assert [(one.width, one.height) for one in events.Images("samples/64x64")] == [(8, 4)] * 2


def test_a_line_that_a_crash_cut_off_is_left_out(tmp_path: Path) -> None:
    _write(RunLog(tmp_path, start=0, total=2, tensorboard=False), tmp_path, range(1, 2))
    (tmp_path / "log.jsonl").open("a").write('{"event": "upd')
    _write(RunLog(tmp_path, start=1, total=2, tensorboard=False), tmp_path, range(2, 3))
    assert [record["step"] for record in read_log(tmp_path)] == [1, 2]
    assert read_log(tmp_path / "nowhere") == []


class _FullDisk:
    """A file that can no longer be written."""

    def write(self, _: str) -> None:
        raise OSError(28, "No space left on device")

    def close(self) -> None:
        raise OSError(28, "No space left on device")


def test_a_full_disk_is_a_warning(tmp_path: Path) -> None:
    log = RunLog(tmp_path, start=0, total=2, tensorboard=False)
    log._file = _FullDisk()  # type: ignore[assignment]
    with pytest.warns(UserWarning, match="a record of the log is lost: .*No space left"):
        _write(log, tmp_path, range(1, 2))
