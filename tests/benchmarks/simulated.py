"""Runs with chosen medians, on a GPU that is made up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.schema import SCHEMA, Device, Git, Measurement, Process, Run, Software

GPU = Device(name="NVIDIA H200", capability="9.0", multiprocessors=132, memory_bytes=150 << 30, power_limit_w=700.0)
CONTRACT = {"clock": "events", "cache": "cold"}
#: Standard deviation between processes that bench_design's thresholds are stated for.
NOISE = 0.007


def process(median: float, **conditions: Any) -> Process:
    return Process(n=60, median=median, q25=0.99 * median, q75=1.01 * median, minimum=0.98 * median, **conditions)


def measurement(medians: Sequence[float], name: str = "gelu [4]", **changes: Any) -> Measurement:
    made = Measurement(name=name, mode="forward", contract=CONTRACT, recipe="r", version="v", bytes=1e9)
    return replace(made, **{"processes": [process(median) for median in medians], **changes})


def run(medians: Mapping[str, Sequence[float]] | Sequence[Measurement], **changes: Any) -> Run:
    """A run of "NAME, forward, ours" measurements, by name, or of those given."""
    given = [measurement(v, k) for k, v in medians.items()] if isinstance(medians, Mapping) else list(medians)
    made = Run(
        schema=SCHEMA,
        run_id="0123456789ab",
        created="2026-11-21T00:00:00Z",
        tier="kernels",
        git=Git(sha="a" * 40, dirty=False),
        software=Software(python="3.11", torch="2.15", triton="3.9", cuda="13.0"),
        device=GPU,
    )
    return replace(made, **{"measurements": given, **changes})


def drawn(random: np.random.Generator, count: int, *, sd: float = NOISE, factor: float = 1.0) -> list[float]:
    """Process medians around one millisecond times `factor`."""
    return list(np.exp(random.normal(0, sd, count)) * factor)
