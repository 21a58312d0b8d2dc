"""``pytest benchmarks``: pytest-benchmark's statistics and files over times of the GPU.

Without a GPU, or without pytest-benchmark, everything runs once and is checked, and nothing is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import pytest

from benchmarks import environment, timing

_UNMEASURED = pytest.StashKey[list[str]]()


class VirtualClock:
    """A timer that shows the seconds which the GPU worked, so that pytest-benchmark sees those."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def advance(self, milliseconds: float) -> None:
        self.seconds += milliseconds * 1e-3


@pytest.fixture
def gpu_benchmark(request: pytest.FixtureRequest) -> Callable[..., timing.Timed]:
    """``gpu_benchmark(run, inputs, nbytes=None, flops=None)`` times ``run(input)``, going round `inputs`.

    Returns one of the timed calls, its input and what it returned, to be checked. Operators at FLUX shapes want inputs
    that fill the L2 twice: `benchmarks.timing.rotation` says how many.
    """

    def measure(
        run: Callable[[Any], Any], inputs: Sequence[Any], nbytes: float | None = None, flops: float | None = None
    ) -> timing.Timed:
        timed = timing.samples(run, inputs)
        why = _why_unmeasured(request.config, timed)
        if why:
            request.config.stash[_UNMEASURED].append(why)
            return timed
        clock, times = VirtualClock(), iter(timed.milliseconds)
        request.node.add_marker(pytest.mark.benchmark(timer=clock))
        benchmark = request.getfixturevalue("benchmark")
        benchmark.extra_info |= {"bytes": nbytes, "flops": flops, "clock": "events"}
        # Calibration would call a clock that only these samples move.
        benchmark.pedantic(lambda: clock.advance(next(times)), rounds=len(timed.milliseconds), iterations=1)
        return timed

    return measure


def _why_unmeasured(config: pytest.Config, timed: timing.Timed) -> str | None:
    if not timed.milliseconds:
        return "no GPU"
    if not config.pluginmanager.hasplugin("benchmark"):
        return "pytest-benchmark is not installed: pip install '.[bench]'"
    if config.getoption("benchmark_disable", False) or hasattr(config, "workerinput"):
        return "pytest-benchmark is off, as it is under pytest-xdist"
    return None


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_UNMEASURED] = []
    if not timing.has_clock():
        environment.rehearse()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    found = config.stash[_UNMEASURED]
    for why in dict.fromkeys(found):
        terminalreporter.write_line(f"{found.count(why)} ran once for correctness, not measured: {why}")


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """The GPU and the software instead of the host's name and the processor's momentary clock."""
    machine_info["node"] = ""
    machine_info.get("cpu", {}).pop("hz_actual", None)
    machine_info.get("cpu", {}).pop("hz_actual_friendly", None)
    machine_info["gpu"] = asdict(environment.device())
    machine_info["software"] = asdict(environment.software())


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_compare_machine_info(machine_info: dict[str, Any], compared_benchmark: dict[str, Any]) -> None:
    """Times of another GPU are no base."""
    before, now = (info.get("gpu", {}).get("name") for info in (compared_benchmark["machine_info"], machine_info))
    if before != now:
        raise pytest.UsageError(f"benchmarks: saved on {before}, and this is {now}: not comparable")
