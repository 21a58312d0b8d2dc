"""Result files: what is written is read back, and what is not one is refused by name and place."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from simulated import measurement, run

from benchmarks.__main__ import commands, main
from benchmarks.schema import Process, ResultError, read, write

_GOOD = run([measurement([1.0, 2.0]), measurement([], name="b", status="error", error="out of memory")])


def test_a_run_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    path = write(_GOOD, tmp_path / "there/run.json")
    assert read(path) == _GOOD
    assert [entry.name for entry in path.parent.iterdir()] == ["run.json"]


def _without(key: str) -> dict[str, Any]:
    return {name: value for name, value in asdict(_GOOD).items() if name != key}


def _measured(**changes: Any) -> dict[str, Any]:
    first = asdict(_GOOD)["measurements"][0]
    return asdict(_GOOD) | {"measurements": [first | changes]}


_PROCESS = asdict(_GOOD)["measurements"][0]["processes"][0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a readable result file"),
        ("[]", "the file must be an object"),
        (json.dumps(asdict(_GOOD)).replace("1.0", "NaN"), "NaN is no measurement; what was not measured is null"),
        (asdict(_GOOD) | {"schema": 7}, "schema 7, this version reads 1"),
        (_without("git"), "missing 1 required keyword-only argument: 'git'"),
        (asdict(_GOOD) | {"extra": 1}, r"the file: unknown \['extra'\], known are"),
        (asdict(_GOOD) | {"source": "mine"}, r"source must be one of \['scheduled', 'pull-request', 'local'\]"),
        (_measured(flops="many"), r"measurements\[0\].flops must be a finite number, got 'many'"),
        (_measured(status="fine"), r"measurements\[0\].status must be one of \['ok', "),
        (_measured(processes=[]), "gelu .*: ok, 0 processes"),
        (_measured(status="error"), "gelu .*: error, 2 processes"),
        (_measured(processes=[_PROCESS | {"median": 0.0}]), "a time or a count that is not positive"),
        (_measured(processes=[_PROCESS | {"n": 1.5}]), r"processes\[0\].n must be an integer, got '1.5'"),
        (_measured(processes=[_PROCESS | {"n": True}]), r"processes\[0\].n must be an integer, got 'True'"),
        (asdict(_GOOD) | {"measurements": 2 * [_measured()["measurements"][0]]}, "measured twice: .*gelu"),
    ],
)
def test_what_is_no_result_is_refused_by_place_with_status_2(
    content: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ResultError, match=message) as raised:
        read(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert main(["compare", str(path), str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"benchmarks compare: {path}: ")


def test_a_file_that_is_not_there_is_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 2
    assert "a.json" in capsys.readouterr().err


def test_nothing_half_written_when_a_number_cannot_be(tmp_path: Path) -> None:
    path = write(_GOOD, tmp_path / "run.json")
    with pytest.raises(ValueError, match="Out of range float"):
        write(run([measurement([float("inf")])]), path)
    assert read(path) == _GOOD


def test_a_process_is_its_samples_quantiles() -> None:
    made = Process.of([4.0, 1.0, 2.0, 3.0, 10.0], sm_mhz=1980.0)
    assert (made.n, made.median, made.q25, made.q75, made.minimum, made.sm_mhz) == (5, 3.0, 2.0, 4.0, 1.0, 1980.0)


def test_rates_are_of_the_median_and_none_without_one() -> None:
    made = measurement([2.0, 1.0, 4.0], bytes=4e9, flops=6e12)
    assert (made.milliseconds, made.gb_s, made.tflop_s) == (2.0, 2000.0, 3000.0)
    nothing = measurement([], status="skipped")
    assert (nothing.milliseconds, nothing.gb_s, nothing.tflop_s) == (None, None, None)


def test_every_command_that_is_listed_can_be_run(capsys: pytest.CaptureFixture[str]) -> None:
    import importlib

    for name, module in commands().items():
        assert callable(importlib.import_module(module).main), name
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert main(["mesure"]) == 2
    assert "unknown command 'mesure'; commands are" in capsys.readouterr().err
