"""Timing on a GPU with events."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["copy_bandwidth", "measured", "median_ms", "rotations"]

_REPEATS = 60


def rotations(nbytes: int) -> int:
    """Copies of an input to go round, so that none is still in the L2 when its turn comes."""
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return min(64, max(2, -(-2 * cache // max(nbytes, 1))))


def median_ms(run: Callable[[Any], Any], inputs: Sequence[Any]) -> float:
    """Median milliseconds of ``run(input)`` on the device, going round `inputs`.

    All launches are queued behind a long kernel, so that short ones are not timed at the speed of Python.
    """
    for item in inputs[:2]:
        run(item)
    torch.cuda.synchronize()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(_REPEATS)]
    torch.cuda._sleep(20_000_000)  # about 10 ms
    for index, (start, end) in enumerate(pairs):
        start.record()
        run(inputs[index % len(inputs)])
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs)


def copy_bandwidth(nbytes: int = 2 << 30) -> float:
    """Bytes per second of a device-to-device copy, counting read and write."""
    source = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * nbytes / (median_ms(lambda _: target.copy_(source), [None]) * 1e-3)


def measured(form: str, mode: str, run: Callable[[], Any], flops: int | None = None) -> dict[str, Any]:
    """Median milliseconds, TFLOP/s of `flops` operations, and peak memory of something that takes milliseconds."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(10)]
    for start, end in pairs:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    milliseconds = statistics.median(start.elapsed_time(end) for start, end in pairs)
    row = {"form": form, "mode": mode, "ms": milliseconds, "peak_gb": torch.cuda.max_memory_allocated() / 1e9}
    if flops is not None:
        row["tflop_s"] = flops / (milliseconds * 1e-3) / 1e12
    print(", ".join(f"{key} {value:.1f}" if isinstance(value, float) else str(value) for key, value in row.items()))
    return row
