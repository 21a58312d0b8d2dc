"""The static tier: regressions put into a real kernel are caught, and pins hold in both directions."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.__main__ import main as benchmarks
from benchmarks.schema import Finding, ResultError, write
from benchmarks.schema import read as read_run
from benchmarks.static import cuda
from benchmarks.static.command import main, measure, pin, run_of
from benchmarks.static.figures import FIGURES, Figure, Verdict, judge
from benchmarks.static.kernels import kernel_units, op_units, record
from benchmarks.static.pins import Measured, compare, exit_status, read, repin
from benchmarks.static.unit import Unit
from srpo_kernels.testing.specialization import specialize

pytestmark = pytest.mark.compile_only


@cache
def measured(fault: str) -> list[Measured]:
    from faulty_cases import case

    recordings = [record(case("meta", fault))]
    return measure([*kernel_units(recordings, [90]), *op_units(recordings)], jobs=1)


def everything(_: str) -> bool:
    return True


def findings(of: str, pins: Path) -> list[Finding]:
    return compare(measured(of), partial(read, pins), matches=everything)


@pytest.fixture
def pins(tmp_path: Path) -> Path:
    """Pins of the sound kernel."""
    repin(measured("none"), tmp_path, "sound", matches=everything)
    return tmp_path


def worse(found: list[Finding]) -> set[str]:
    return {finding.figure for finding in found if finding.verdict is Verdict.WORSE}


# --- injected regressions ---------------------------------------------------------------------


def test_a_sound_kernel_is_as_pinned(pins: Path) -> None:
    assert findings("none", pins) == []
    (kernel, op) = (each.figures for each in measured("none"))
    assert (kernel["load_width"], kernel["store_width"], kernel["spill_st"], kernel["stack"]) == (16, 16, 0, 0)
    assert kernel["narrow_loads"] == kernel["narrow_stores"] == 0
    assert kernel["occupancy"] == 1.0
    assert min(kernel["LDG.128"], kernel["STG.128"]) > 0
    assert op["forward_launches"] == op["backward_launches"] == 1
    assert op["forward_bytes"] == op["forward_floor_bytes"] == 2 * 2 * 2**20
    assert op["saved_bytes"] == 0


@pytest.mark.parametrize(
    ("fault", "figures"),
    [
        ("extra pass", {"forward_bytes", "forward_launches"}),
        ("extra launch", {"forward_launches", "backward_launches"}),
        ("extra saved tensor", {"saved_bytes"}),
        ("narrow access", {"load_width", "store_width", "narrow_loads", "narrow_stores"}),
        ("one narrow load", {"narrow_loads"}),
        ("spill", {"spill_st", "spill_ld", "stack"}),
    ],
)
def test_a_fault_is_caught(fault: str, figures: set[str], pins: Path) -> None:
    found = findings(fault, pins)
    assert figures <= worse(found)
    assert exit_status(found) == 1


# --- pins -------------------------------------------------------------------------------------


def test_the_ratchet_turns_both_ways(tmp_path: Path) -> None:
    repin(measured("spill"), tmp_path, "for now", matches=everything)
    found = findings("none", tmp_path)
    assert {f.figure for f in found if f.verdict is Verdict.BETTER} >= {"spill_st", "spill_ld", "stack"}
    assert not worse(found)
    assert exit_status(found) == 0
    assert exit_status(found, ratchet=True) == 6


def test_other_tools_are_no_regression(pins: Path) -> None:
    """Whatever a new compiler makes of kernels is told, and pins of both stand side by side."""
    other = [replace(each, unit=replace(each.unit, tools="triton 99.0, ptxas 99.0")) for each in measured("spill")[:1]]
    found = compare(other, partial(read, pins), matches=everything)
    assert {finding.verdict for finding in found} == {Verdict.TOOLCHAIN}
    assert exit_status(found, ratchet=True) == 0
    repin(other, pins, "a new Triton", matches=everything)
    assert compare(other, partial(read, pins), matches=everything) == []
    assert findings("none", pins) == []
    assert len(read(pins, "sm90")) == 2


def test_what_is_missing_fails(pins: Path) -> None:
    gone = compare(
        [replace(each, unit=replace(each.unit, id="renamed")) for each in measured("none")[:1]],
        partial(read, pins),
        matches=everything,
    )
    assert {finding.verdict for finding in gone} == {Verdict.MISSING, Verdict.UNPINNED}
    assert exit_status(gone) == 4
    kernel = measured("none")[0]
    less = {name: value for name, value in kernel.figures.items() if name != "occupancy"}
    (lost,) = compare([replace(kernel, figures=less)], partial(read, pins), matches=everything)
    assert (lost.verdict, exit_status([lost])) == (Verdict.MISSING, 4)
    failed = compare([replace(kernel, figures={}, error="no")], partial(read, pins), matches=everything)
    assert exit_status(failed) == 4


def test_only_what_was_to_be_measured_can_be_missing(pins: Path) -> None:
    kernel = measured("none")[0]
    other = replace(kernel, unit=replace(kernel.unit, id="other"))
    found = compare([other], partial(read, pins), matches=lambda name: name == "other")
    assert [finding.verdict for finding in found] == [Verdict.UNPINNED]


@pytest.mark.parametrize(
    ("verdicts", "status"),
    [
        ([], 0),
        ([Verdict.CHANGED, Verdict.TOOLCHAIN], 0),
        ([Verdict.BETTER], 6),
        ([Verdict.BETTER, Verdict.WORSE], 1),
        ([Verdict.BETTER, Verdict.WORSE, Verdict.ERROR], 4),
        ([Verdict.WORSE, Verdict.UNPINNED], 4),
        ([Verdict.WORSE, Verdict.MISSING], 4),
    ],
)
def test_the_gravest_verdict_decides(verdicts: list[Verdict], status: int) -> None:
    assert exit_status([Finding(verdict, "sm90", "x") for verdict in verdicts], ratchet=True) == status


def test_only_what_changes_gets_the_new_reason(pins: Path) -> None:
    changes = repin(measured("narrow access"), pins, "it had to be", matches=everything)
    assert {change.figure for change in changes} >= {"load_width", "store_width"}
    (unit,) = (u for units in read(pins, "sm90").values() for name, u in units.items() if ".forward" in name)
    assert unit["load_width"].reason == "it had to be"
    assert unit["spill_st"].reason == "sound"
    text = (pins / "sm90.json").read_text()
    line = next(line for line in text.splitlines() if '"load_width"' in line)
    assert json.loads("{" + line.rstrip(",") + "}") == {"load_width": {"value": 2, "reason": "it had to be"}}
    assert repin(measured("narrow access"), pins, "again", matches=everything) == []
    assert (pins / "sm90.json").read_text() == text


def test_nothing_is_pinned_of_what_failed(pins: Path) -> None:
    before = (pins / "sm90.json").read_text()
    broken = replace(measured("none")[0], figures={}, error="no compiler")
    with pytest.raises(ResultError, match="no compiler"):
        repin([broken], pins, "why not", matches=everything)
    assert (pins / "sm90.json").read_text() == before


@pytest.mark.parametrize("text", ["[]", "{", '{"triton 3": {"x": {"regs": 4}}}'])
def test_a_file_that_is_none_of_pins_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "sm90.json").write_text(text)
    with pytest.raises(ResultError, match="sm90"):
        read(tmp_path, "sm90")


# --- figures ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("figure", "pin_value", "value", "verdict"),
    [
        ("spill_st", 0, 4, Verdict.WORSE),
        ("occupancy", 0.5, 0.375, Verdict.WORSE),
        ("occupancy", 0.5, 0.75, Verdict.BETTER),
        ("peak_forward_bytes", 1e10, 1.0099e10, Verdict.SAME),
        ("peak_forward_bytes", 1e10, 1.02e10, Verdict.WORSE),
        ("regs", 40, 64, Verdict.CHANGED),
        ("sass", 100, 104, Verdict.SAME),
        ("sass", 100, 120, Verdict.CHANGED),
        ("MMA", 8, 16, Verdict.CHANGED),
        ("MMA", 8, 0, Verdict.WORSE),
    ],
)
def test_judge(figure: str, pin_value: float, value: float, verdict: Verdict) -> None:
    assert judge(FIGURES[figure], pin_value, value) is verdict


def test_every_gate_of_the_design_is_there() -> None:
    failing = {name for name, figure in FIGURES.items() if isinstance(figure, Figure) and figure.bad}
    assert {"spill_st", "spill_ld", "stack", "occupancy", "load_width", "narrow_loads", "warnings"} <= failing
    assert {"saved_bytes"} <= failing
    assert {
        f"{phase}_{what}" for phase in ("forward", "backward") for what in ("launches", "bytes", "flops")
    } <= failing


@pytest.mark.parametrize("count", [1, 7, 16, 2**20, 2**31, -(2**40)])
def test_arguments_are_specialised_as_triton_does(count: int) -> None:
    from faulty_cases import doubled_kernel
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import create_function_from_signature

    tensor = torch.empty(64, dtype=torch.bfloat16)
    arguments: dict[str, Any] = dict(
        x_ptr=tensor, y_ptr=tensor, out_ptr=tensor[1:], count=count, zero=0, SHIFT=0, LOOSE=False, BLOCK=1024
    )
    backend = CUDABackend(GPUTarget("cuda", 90, 32))
    _, theirs, _ = create_function_from_signature(doubled_kernel.signature, doubled_kernel.params, backend)(**arguments)
    ours = specialize(doubled_kernel, (), arguments)
    assert [kind for _, kind in ours.signature] == [kind for kind, _ in theirs]
    assert ours.divisible == {index for index, (_, hint) in enumerate(theirs) if hint == "D"}


# --- two runs, and a report -------------------------------------------------------------------


def written(measured: list[Measured], path: Path, pins: Path) -> str:
    return str(write(run_of(measured, compare(measured, partial(read, pins), matches=everything)), path))


def test_two_runs_are_compared_by_the_same_command(
    pins: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sound, spilt = measured("none"), measured("spill")
    base, new = (written(each, tmp_path / name, pins) for each, name in ((sound, "base.json"), (spilt, "new.json")))
    assert benchmarks(["compare", base, base]) == 0
    assert "2 SAME; 2 in all" in capsys.readouterr().out
    assert benchmarks(["compare", base, new]) == 1
    assert re.search(r"\| SLOWER \|.*doubled_kernel, sm90, spill_st \|.* 0 -> [\d,]+ \|", capsys.readouterr().out)
    assert benchmarks(["compare", new, base]) == 0
    assert benchmarks(["compare", new, base, "--fail-on", "faster"]) == 6
    assert benchmarks(["compare", base, written(sound[:1], tmp_path / "less.json", pins)]) == 4
    assert benchmarks(["compare", written(sound[:1], tmp_path / "less.json", pins), base]) == 0
    failed = [replace(sound[0], figures={}, error="no compiler"), sound[1]]
    assert benchmarks(["compare", base, written(failed, tmp_path / "failed.json", pins)]) == 4
    other = [replace(spilt[0], unit=replace(spilt[0].unit, tools="triton 99.0, ptxas 99.0")), sound[1]]
    capsys.readouterr()
    assert benchmarks(["compare", base, written(other, tmp_path / "other.json", pins)]) == 0
    assert benchmarks(["report", new, "--base", base, "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "Static figures that differ from their pins" in page
    assert page.count("spill_st") == 2  # against the base, and against the pin
    assert "Nothing was timed" not in page


# --- kernels of csrc --------------------------------------------------------------------------


def test_figures_of_nvcc() -> None:
    log = (Path(__file__).parent / "ptxas.log").read_text()
    assert cuda.kernel_figures(log) == {
        "step_kernel<Weights 3, true>": dict(regs=80, stack=24, spill_st=4, spill_ld=8, smem=536, warnings=1),
        "scalars_kernel": dict(regs=44, stack=0, spill_st=0, spill_ld=0, smem=0, warnings=0),
    }


def test_csrc_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file in place of csrc/, whose kernels take half a minute."""
    if cuda.nvcc() is None:
        pytest.skip(cuda.MISSING)
    (tmp_path / "cuda").mkdir()
    source = tmp_path / "cuda/doubled.cu"
    source.write_text("template <int N> __global__ void doubled(float* x) { x[threadIdx.x] *= N; }\n")
    monkeypatch.setattr(cuda, "SOURCES", tmp_path)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    assert list(cuda.cuda_units([90])) == []  # an empty file is none that fails
    with source.open("a") as file:
        file.write("template __global__ void doubled<2>(float*);\n")
    (unit,) = cuda.cuda_units([90])
    assert (unit.id, unit.pins, unit.tools) == ("csrc/cuda/doubled.cu doubled<2>", "sm90", f"nvcc {cuda.nvcc()}")
    figures = unit.measure()
    assert 0 < figures["regs"] < 32
    assert figures["spill_st"] == figures["stack"] == figures["warnings"] == 0
    with monkeypatch.context() as patched:
        patched.setattr(cuda.subprocess, "run", None)  # not called again
        assert next(cuda.cuda_units([90])).measure() == figures
    source.write_text("this is no C++;")
    (failing,) = cuda.cuda_units([90])
    (failed,) = measure([failing], jobs=1)
    assert failed.error is not None
    assert "error" in failed.error


def test_without_nvcc_csrc_is_absent_and_no_pin_is_missing(
    monkeypatch: pytest.MonkeyPatch, pins: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unit = Unit("csrc/cuda/adamw.cu step_kernel", "sm90", "nvcc 13.0.88", dict)
    repin([*measured("none"), Measured(unit, {"regs": 80})], pins, "with nvcc", matches=everything)
    assert findings("none", pins) == []
    monkeypatch.setattr(cuda, "nvcc", lambda: None)
    assert list(cuda.cuda_units([90])) == []
    monkeypatch.setattr("benchmarks.static.command.units", lambda *_: [])
    assert main(["--pins", str(pins / "none")]) == 0
    assert "csrc/cuda was not compiled" in capsys.readouterr().out


# --- commands ---------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", [[], ["--reason", "  "]])
def test_pins_need_a_reason(reason: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        pin(reason)
    assert stopped.value.code == 2
    assert "--reason" in capsys.readouterr().err


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--cases", "faulty_cases", "--arch", "90", "--jobs", "1", "--pins", str(tmp_path / "pins")]
    assert main(common) == 4
    assert "has no pins" in capsys.readouterr().out
    assert pin([*common, "--reason", "first"]) == 0
    assert main([*common, "--out", str(tmp_path / "out.json")]) == 0
    assert "all as pinned" in capsys.readouterr().out
    result = read_run(tmp_path / "out.json")
    assert result.findings == []
    assert {each.id: each.error for each in result.static} == {
        "doubled.forward[1048576] doubled_kernel": None,
        "doubled[1048576]": None,
    }
    with pytest.raises(ResultError, match="no_such_module"):
        main(["--cases", "no_such_module", "--pins", str(tmp_path)])
    with pytest.raises(SystemExit):
        main(["--cases", "faulty_cases"])


def test_the_documented_case_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).parents[2] / "docs/benchmarks.md"
    (code,) = re.findall(r"## Your own op.*?```python\n(.*?)```", page.read_text(), re.S)
    (tmp_path / "my_ops.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    common = ["--cases", "my_ops", "--arch", "90", "--jobs", "1", "--pins", str(tmp_path / "pins")]
    assert pin([*common, "--reason", "first"]) == 0
    assert main([*common, "--ratchet"]) == 0
    kernels, operators = read(tmp_path / "pins", "sm90"), read(tmp_path / "pins", "model")
    (kernel,) = (unit for units in kernels.values() for unit in units.values())
    assert (kernel["load_width"].value, kernel["spill_st"].value) == (16, 0)
    (operator,) = (unit for units in operators.values() for unit in units.values())
    assert operator["forward_bytes"].value == 2 * 2 * 4608 * 3072
