"""Timing, conditions and the kernel tier, on a GPU that is made up and on none."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_gpu import FakeNvml, NVMLError, install
from simulated import run
from torch import Tensor

from benchmarks import kernels, nvml, peers, timing
from benchmarks.__main__ import main
from benchmarks.case import Case
from benchmarks.cases import cases
from benchmarks.fresh import measure
from benchmarks.kernels import Plan, call_of, measurements, planned_of
from benchmarks.schema import Ceilings, Measurement, read, write
from srpo_kernels.patching.eager import EAGER

_CEILINGS = Ceilings(copy_gb_s=4000.0, memory_gb_s=4800.0)
_PLAN = Plan(match="^gelu_tanh \\[", device="cpu", small=True, regime="burst")
_FORWARD = replace(_PLAN, match="gelu_tanh \\[.*forward$")


@pytest.fixture(autouse=True)
def _eager() -> Any:
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


# --- timing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nbytes", "copies", "cache"), [(1 << 30, 2, "cold"), (30 << 20, 4, "cold"), (1 << 20, 64, "warm")]
)
def test_inputs_fill_the_cache_twice_or_are_said_to_be_warm(
    nbytes: int, copies: int, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    found = timing.rotation(nbytes)
    assert (found.copies, found.cache) == (copies, cache)


def test_calls_go_round_the_inputs_queued_in_batches_behind_a_held_device(monkeypatch: pytest.MonkeyPatch) -> None:
    held = install(monkeypatch)
    seen: list[int] = []
    timed = timing.samples(lambda x: seen.append(x) or x * 10, [1, 2, 3], repeats=50)
    assert timed.milliseconds == [1.0] * 50
    assert len(held) == 3
    assert all(0 < cycles <= 0.2 * 2e9 for cycles in held)
    assert Counter(seen[-50:]) == {1: 17, 2: 17, 3: 16}
    assert timed.output == timed.input * 10


def test_a_warm_device_is_one_that_has_run_that_long(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    clock = iter(range(10_000))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    seen: list[int] = []
    timing.samples(seen.append, [1], repeats=2, warm=30.0)
    assert len(seen) >= 10


def test_without_a_gpu_everything_runs_once_and_nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "has_clock", lambda: False)
    seen: list[int] = []
    timed = timing.samples(lambda x: seen.append(x) or x, [7, 8])
    assert (timed.milliseconds, timed.output, seen) == ([], 7, [7])
    row = timing.measured("a", "forward", lambda: seen.append(1), flops=5)
    assert (row["ms"], row["peak_gb"], row["samples"], len(seen)) == (None, None, [], 2)
    assert timing.ceilings() == Ceilings()


def test_rows_hold_time_memory_and_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeNvml(GetTemperature=61))
    row = timing.measured("a", "forward", lambda: None, flops=10**12, peer=True)
    assert (row["ms"], row["tflop_s"], row["peer"]) == (1.0, pytest.approx(1000.0), True)
    assert row["peak_gb"] == pytest.approx(3.2, rel=0.01)
    assert len(row["samples"]) == 10
    assert row["conditions"]["temperature_c"] == 61


def test_version_changes_with_the_code_and_not_with_comments(tmp_path: Path) -> None:
    files = [tmp_path / f"{index}.py" for index in range(3)]
    for file, text in zip(files, ("a = 1\n", "a = 1  # one\n", "a = 2\n"), strict=True):
        file.write_text(text)
    first, commented, changed = (timing.source_hash(str(file)) for file in files)
    assert first == commented != changed


# --- NVML -------------------------------------------------------------------------------------------------------------


def test_conditions_are_what_nvml_says_and_counters_what_passed() -> None:
    library = FakeNvml(
        step={74: 500, 270: 0},
        GetClockInfo=lambda kind: {1: 1755, 2: 2619}[kind],
        GetTemperature=55,
        GetPowerUsage=612e3,
    )
    gpu = nvml.Gpu("abc", library)
    assert library.handles == ["GPU-abc"]
    before = gpu.conditions()
    assert gpu.conditions().since(before) == {
        "sm_mhz": 1755,
        "memory_mhz": 2619,
        "temperature_c": 55,
        "power_w": 612.0,
        "throttled_ns": {"power_cap": 500, "hardware_thermal": 0},
    }


def test_what_nvml_does_not_support_is_none_and_never_zero() -> None:
    refusing = FakeNvml(GetPowerUsage=NVMLError("not supported"), GetMigMode=NVMLError("not supported"))
    for gpu in (nvml.Gpu("abc", refusing), nvml.Gpu(None)):
        found = gpu.conditions()
        assert set(vars(found).values()) == {None}
        assert set(gpu.facts().values()) == {None}
        assert found.since(found)["throttled_ns"] is None
        assert nvml.joules(gpu, lambda: None, lambda: None) is None
    assert nvml.Gpu(None).driver() is None
    assert nvml.Gpu("abc", FakeNvml()).driver() == "580.1"


def test_facts_leave_this_process_out_of_the_others() -> None:
    library = FakeNvml(GetComputeRunningProcesses=[1, 2, 3], GetEnforcedPowerLimit=7e5, GetMigMode=(0, 0))
    facts = nvml.Gpu("abc", library).facts()
    assert (facts["other_processes"], facts["power_limit_w"], facts["mig"]) == (2, 700.0, False)


def test_energy_is_over_two_seconds_and_none_if_the_counter_stood_still(monkeypatch: pytest.MonkeyPatch) -> None:
    counter, clock, calls = iter([1000.0, 9000.0]), iter(x / 2 for x in range(100)), []
    monkeypatch.setattr(nvml.time, "perf_counter", lambda: next(clock))
    gpu = nvml.Gpu("abc", FakeNvml(GetTotalEnergyConsumption=lambda: next(counter)))
    assert nvml.joules(gpu, lambda: calls.append(1), lambda: None) == pytest.approx(8 / len(calls))
    assert len(calls) == 30
    still = nvml.Gpu("abc", FakeNvml(GetTotalEnergyConsumption=5))
    assert nvml.joules(still, lambda: None, lambda: None) is None


def test_environment_tells_no_host_no_path_and_no_user(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/home/someone/cache")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert "expandable_segments:True" in text
    assert "someone" not in text
    assert str(Path.home()) not in text
    assert str(Path(__file__).parents[2]) not in text
    assert re.search(r'"sha": "[0-9a-f]{40}"', text)


# --- kernels ----------------------------------------------------------------------------------------------------------


def by_id(plan: Plan = _PLAN, ceilings: Ceilings = _CEILINGS) -> dict[str, Measurement]:
    """By mode, and form where it is not ours."""
    return {measurement.id.partition("], ")[2]: measurement for measurement in measurements(plan, ceilings)}


def test_every_form_and_mode_is_timed_and_ours_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeNvml(GetClockInfo=1700, step={270: 0}))
    found = by_id()
    modes = ("forward", "forward+backward")
    assert set(found) == {*modes, *(f"{mode}, {form}" for mode in modes for form in ("eager", "compiled"))}
    for name, measurement in found.items():
        assert (measurement.status, measurement.milliseconds) == ("ok", 1.0), measurement.error
        assert measurement.processes[0].n == 60
        assert measurement.processes[0].sm_mhz == 1700
        assert measurement.peak_gb == pytest.approx(2.147, rel=1e-3)
        assert (measurement.accuracy is not None) == (name in modes)
        assert measurement.contract["cache"] == "warm"
    assert len({measurement.recipe for measurement in found.values()}) == 1
    assert found["forward+backward"].bytes == 2.5 * found["forward"].bytes  # type: ignore[operator]


def test_a_slowed_down_gpu_is_tried_thrice_and_called_contaminated(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    install(monkeypatch, FakeNvml(step={74: 100, 270: 100}))
    monkeypatch.setattr(kernels.time, "sleep", pauses.append)
    found = by_id(_FORWARD)["forward"]
    assert (found.status, found.error) == ("contaminated", "the GPU was slowed down: hardware_thermal")
    assert len(pauses) == 3
    assert found.processes
    install(monkeypatch, FakeNvml(step={74: 100}))  # a power cap is how it runs
    assert by_id(_FORWARD)["forward"].status == "ok"


def test_times_that_the_memory_cannot_reach_are_contaminated(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    monkeypatch.setattr(kernels.time, "sleep", lambda _: None)
    monkeypatch.setattr(timing, "rotation", lambda nbytes: timing.Rotation(2, nbytes, 0))
    bytes_moved = by_id(_FORWARD)["forward"].bytes
    assert bytes_moved is not None
    for limit, status in ((bytes_moved / 1e6 / 1.01, "ok"), (bytes_moved / 1e6 / 1.03, "contaminated")):
        found = by_id(_FORWARD, Ceilings(memory_gb_s=limit))["forward"]
        assert found.status == status
    assert "is more than the memory's" in str(found.error)


def broken(change: Any) -> list[Case]:
    (case,) = (case for case in cases("cpu", small=True) if case.op == "gelu_tanh")
    return [replace(case, ours=lambda x: change(case.ours(x)))]


@pytest.mark.parametrize(
    "change",
    [
        lambda y: y * 1.05,
        lambda y: y.flatten()[:3],
        torch.zeros_like,
        lambda y: y / 0,
        lambda y: torch.where(y == y.max(), torch.nan, y),
        lambda y: y.new_empty(0).sum() + y,
    ],
    ids=["scaled", "shape", "zeros", "infinite", "one NaN", "right"],
)
def test_a_wrong_result_is_an_error_and_no_time(change: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch)
    monkeypatch.setattr(kernels, "cases", lambda *_, **__: broken(change))
    found = by_id(replace(_PLAN, match="forward$"))["forward"]
    right = torch.equal(change(torch.ones(4)), torch.ones(4))
    assert found.status == ("ok" if right else "error")
    assert bool(found.processes) == right
    assert read(write(run([found]), tmp_path / "run.json")).measurements == [found]


def test_what_raises_is_an_error_and_the_others_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    install(monkeypatch)
    monkeypatch.setattr(kernels, "cases", lambda *_, **__: broken(fail))
    found = by_id()
    assert found["forward"].error == "OutOfMemoryError: CUDA out of memory"
    assert found["forward, eager"].status == "ok"


def test_what_a_budget_does_not_reach_is_skipped_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    found = by_id(replace(_PLAN, budget=-1.0))
    assert len(found) == 6
    assert {m.error for m in found.values()} == {"the budget of -1 s was spent"}
    assert {m.status for m in found.values()} == {"skipped"}


def test_recipe_is_of_shapes_dtypes_and_strides() -> None:
    (case,) = broken(lambda y: y)
    x = torch.zeros(2, 4, 6)
    others = [x.half(), torch.zeros(2, 6, 4), torch.zeros(2, 6, 4).mT, x]
    recipes = [kernels._recipe(case, {"x": each}) for each in (x, *others)]
    assert len(set(recipes)) == 4
    assert recipes[0] == recipes[-1]


def test_liger_forms_compute_what_eager_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """With Liger's two norms stood in for: it has no CPU kernels."""
    import sys
    import types

    functional: Any = types.ModuleType("liger_kernel.transformers.functional")
    functional.liger_layer_norm = lambda x, w, b, eps: torch.nn.functional.layer_norm(x, x.shape[-1:], w, b, eps)
    functional.liger_rms_norm = lambda x, w, eps, **_: torch.nn.functional.rms_norm(x, x.shape[-1:], w, eps)
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", functional)
    monkeypatch.setattr(peers, "find_spec", lambda name: name)
    seen = []
    for case in cases("cpu", small=True):
        if peers.liger(case) is None:
            continue
        forms = {m.form: m for m in planned_of(case, _PLAN) if m.mode == "forward"}
        inputs = case.make()
        theirs, eager = (call_of(case, forms[form])(inputs) for form in ("liger", "eager"))
        for actual, expected in zip(
            *([each] if isinstance(each, Tensor) else each for each in (theirs, eager)), strict=True
        ):
            torch.testing.assert_close(actual, expected, rtol=2**-6, atol=2**-6)
        seen.append(case.op)
    assert seen == ["layer_norm_modulate", "qk_norm_rope"]
    assert set(seen) <= set(EAGER)


@pytest.mark.slow
def test_a_fresh_process_writes_a_result_that_can_be_read() -> None:
    """The real command, on no GPU."""
    run = measure(["--match", "^gelu_tanh .*forward$", "--dry"])
    (found,) = run.measurements
    assert (found.status, found.error, run.device.name) == ("skipped", "not measured: no GPU", "cpu")
    assert found.accuracy is not None


def test_bad_options_are_status_2() -> None:
    for arguments in (
        ["kernels", "--procs", "0"],
        ["kernels", "--match", "("],
        ["noise", "--procs", "4"],
        ["ab", ".", ".", "--procs", "0"],
    ):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
