"""``benchmarks gpu``: its parts, resuming, failures and limits; the whole of it, on no GPU, is a slow test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_gpu import FakeNvml, install
from simulated import measurement

from benchmarks import environment, gpu, timing
from benchmarks.__main__ import main
from benchmarks.gpu import measurement_of
from benchmarks.schema import Ceilings, Measurement, ResultError, read


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What each part gives, instead of measuring: a list, or an exception to raise after it. Calls are counted."""
    given: dict[str, Any] = {part: [measurement([1.0], part)] for part in gpu.PARTS}
    given["asked"] = []

    def source(part: str, *_: Any) -> Iterator[Measurement]:
        given["asked"].append(part)
        for each in given[part]:
            if isinstance(each, Exception):
                raise each
            yield each

    monkeypatch.setattr(gpu, "_source", source)
    monkeypatch.setattr(gpu, "parts", lambda: list(gpu.PARTS))
    monkeypatch.setattr(environment, "rehearse", lambda: None)
    for variable in gpu._CACHES:
        monkeypatch.setenv(variable, "")  # to be put back
    return given


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., int]:
    return lambda *options: main(["gpu", "--dry", "--out", str(tmp_path), *options])


def result(folder: Path) -> Path:
    (path,) = (folder / "cpu").iterdir()
    return path


def test_all_parts_in_order_into_one_file_named_by_device_and_commit(
    parts: dict[str, Any], command: Callable[..., int], tmp_path: Path
) -> None:
    assert command() == 0
    assert parts["asked"] == ["ops", "flux", "vae", "optim", "step"]
    run = read(result(tmp_path))
    assert [m.part for m in run.measurements] == parts["asked"]
    assert run.git.sha is not None
    assert result(tmp_path).stem.startswith(run.git.sha[:12])
    assert {entry.name for entry in tmp_path.iterdir()} == {"cpu", "cache"}


def test_what_is_there_already_is_not_measured_again_unless_asked(
    parts: dict[str, Any], command: Callable[..., int], tmp_path: Path
) -> None:
    command("--parts", "vae,ops")
    assert parts["asked"] == ["vae", "ops"]
    command()
    assert parts["asked"][2:] == ["flux", "optim", "step"]
    parts["vae"] = [measurement([7.0], "vae")]
    command("--parts", "vae")
    run = read(result(tmp_path))
    assert len(run.measurements) == 5
    assert run.by_id["vae, forward"].milliseconds == 7.0
    command()
    assert parts["asked"][6:] == []


def test_a_part_that_fails_is_an_error_and_the_others_are_measured(
    parts: dict[str, Any], command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts["flux"].append(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert command() == 4
    run = read(result(tmp_path))
    assert run.by_id["flux, forward"].status == "ok"
    assert run.by_id["flux, rest"].error == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert run.by_id["step, forward"].status == "ok"
    assert "error: flux, rest: RuntimeError" in capsys.readouterr().out


def test_a_part_keeps_to_its_time(
    parts: dict[str, Any], command: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts["ops"] = [measurement([1.0], f"{index}") for index in range(9)]
    monkeypatch.setitem(gpu.PARTS, "ops", -1.0)
    assert command("--parts", "ops") == 0
    run = read(result(tmp_path))
    assert [m.name for m in run.measurements] == ["0", "ops"]
    assert run.measurements[1].error == "the rest of ops was not begun within -1 s"


def test_what_was_measured_stays_when_the_process_dies(
    parts: dict[str, Any], command: Callable[..., int], tmp_path: Path
) -> None:
    class KilledError(Exception):
        pass

    parts["vae"].append(KilledError())
    with pytest.raises(KilledError):
        command()
    assert set(read(result(tmp_path)).by_id) == {"ops, forward", "flux, forward", "vae, forward"}


@pytest.mark.usefixtures("parts")
def test_results_of_other_software_are_not_mixed_in(
    command: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command("--parts", "vae")
    before = result(tmp_path).read_bytes()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    assert command() == 2
    assert result(tmp_path).read_bytes() == before
    with pytest.raises(ResultError, match="was measured with other software or another GPU; move it away first"):
        gpu._begin(tmp_path, [])


def test_unknown_parts_are_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["gpu", "--parts", "vae,decoder"])
    assert "['decoder'] not among the parts ['ops', 'flux', 'vae', 'optim'" in capsys.readouterr().err


def test_less_than_ten_minutes_in_all() -> None:
    assert sum(gpu.PARTS.values()) + 30 < 600  # ceilings, imports


def test_rows_become_measurements_with_conditions(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeNvml(GetClockInfo=1700))
    row = timing.measured("decoder", "forward", lambda: None, flops=10, peer=True)
    made = measurement_of({**row, "moved_gb": 2.0, "tensors": 5})
    assert (made.id, made.status, made.milliseconds, made.bytes, made.flops) == (
        "decoder, forward, peer",
        "ok",
        1.0,
        2e9,
        10,
    )
    assert (made.processes[0].sm_mhz, made.details) == (1700, {"tensors": 5})
    install(monkeypatch, FakeNvml(step={271: 9}))
    slowed = measurement_of(timing.measured("decoder", "forward", lambda: None))
    assert (slowed.status, slowed.error) == ("contaminated", "the GPU was slowed down: power_brake")
    monkeypatch.setattr(timing, "has_clock", lambda: False)
    nothing = measurement_of(timing.measured("decoder", "forward", lambda: None))
    assert (nothing.status, nothing.error, nothing.processes) == ("skipped", "not measured: no GPU", [])


def test_optimizer_part_runs_on_no_gpu() -> None:
    found = [measurement_of(row) for row in gpu._optimizers(Ceilings(), small=True)]
    ours = [m for m in found if m.form == "ours"]
    assert len(ours) >= 10
    assert {"torch AdamW fused, fp32, step, peer"} <= {m.id for m in found}
    assert {m.status for m in found} == {"skipped"}


def test_failed_tests_of_operators_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for code, text, status in ((1, "1 failed, 3 passed", "error"), (0, "4 passed", "ok"), (5, "no tests ran", "ok")):
        done = gpu.subprocess.CompletedProcess([], code, stdout=f"...\n{text}\n", stderr="")
        monkeypatch.setattr(gpu.subprocess, "run", lambda *_, done=done, **__: done)
        found = gpu._tests(small=False)
        assert (found.status, found.details["summary"]) == (status, text)


@pytest.mark.slow
def test_every_line_of_the_profile_runs_without_a_gpu(tmp_path: Path) -> None:
    import subprocess
    import sys

    command = [sys.executable, "-m", "benchmarks", "gpu", "--dry", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    run = read(result(tmp_path))
    assert {m.part for m in run.measurements} == set(gpu.parts())
    assert {m.status for m in run.measurements} == {"skipped"}
    assert {m.error for m in run.measurements} == {"not measured: no GPU"}
