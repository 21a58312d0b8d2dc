"""Timing on a GPU with events. Without a GPU everything runs once and nothing is timed."""

from __future__ import annotations

import ast
import hashlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment
from benchmarks.schema import Ceilings

__all__ = ["Rotation", "Timed", "ceilings", "has_clock", "measured", "rotation", "samples", "source_hash"]

_REPEATS = 60
_BATCH = 20  # calls queued at once: a stream takes about a thousand launches before the host waits
_CYCLES_A_SECOND = 2e9  # about; of the kernel that holds the queue
_LONGEST_HOLD = 0.2  # seconds
_COPIES = 64


@dataclass(frozen=True)
class Rotation:
    """Copies of an input to go round."""

    copies: int
    nbytes: int  # of one
    l2_bytes: int

    @property
    def cache(self) -> str:
        """Whether an input has left the L2 when its turn comes: "cold", or "warm" where it is too small for that."""
        return "cold" if self.copies * self.nbytes >= 2 * self.l2_bytes else "warm"


@dataclass(frozen=True)
class Timed:
    """Milliseconds of every call; and of one of them, its input and what it returned."""

    milliseconds: list[float]
    input: Any
    output: Any


def has_clock() -> bool:
    """Whether there is a GPU to time on."""
    return environment.gpu_visible()


def rotation(nbytes: int) -> Rotation:
    """Enough copies to fill the L2 twice, 64 at most, 2 at least."""
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return Rotation(min(_COPIES, max(2, -(-2 * cache // max(nbytes, 1)))), nbytes, cache)


def samples(run: Callable[[Any], Any], inputs: Sequence[Any], repeats: int = _REPEATS, warm: float = 0.0) -> Timed:
    """``run(input)`` on the device `repeats` times, going round `inputs`, after `warm` seconds of the same.

    Launches are queued behind a kernel that holds the device until all of a batch are, so that short ones are not timed
    at the speed of Python. Without a GPU: one call, no times.
    """
    output = run(inputs[0])
    if not has_clock():
        return Timed([], inputs[0], output)
    hold = _warm_up(run, inputs, warm)
    pairs, checked = [], repeats // 2
    for first in range(0, repeats, _BATCH):
        torch.cuda._sleep(int(hold * _CYCLES_A_SECOND))
        for index in range(first, min(first + _BATCH, repeats)):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            result = run(inputs[index % len(inputs)])
            end.record()
            pairs.append((start, end))
            if index == checked:
                output = result
        torch.cuda.synchronize()
    times = [start.elapsed_time(end) for start, end in pairs]
    return Timed(times, inputs[checked % len(inputs)], output)


def _warm_up(run: Callable[[Any], Any], inputs: Sequence[Any], seconds: float) -> float:
    """Seconds to hold the device for a batch to be queued: twice what launching one takes the host."""
    hosts: list[float] = []
    began = time.perf_counter()
    while len(hosts) < 3 or time.perf_counter() - began < seconds:
        torch.cuda.synchronize()
        before = time.perf_counter()
        run(inputs[len(hosts) % len(inputs)])
        hosts.append(time.perf_counter() - before)
    torch.cuda.synchronize()
    return min(_LONGEST_HOLD, 2 * _BATCH * min(hosts))


def ceilings(nbytes: int = 2 << 30, size: int = 8192) -> Ceilings:
    """What this very device reaches: a copy of `nbytes`, counting reads and writes, and a bf16 product of `size`."""
    if not has_clock():
        return Ceilings()
    source = torch.randint(256, (nbytes,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = samples(lambda _: target.copy_(source), [None])
    a, b = (torch.rand(size, size, device="cuda").mul(2).sub(1).bfloat16() for _ in range(2))
    product = samples(lambda _: a @ b, [None], warm=0.5)
    return Ceilings(
        copy_gb_s=2 * nbytes / (statistics.median(copy.milliseconds) * 1e-3) / 1e9,
        memory_gb_s=environment.memory_gb_s(),
        matmul_tflop_s=2 * size**3 / (statistics.median(product.milliseconds) * 1e-3) / 1e12,
    )


def measured(form: str, mode: str, run: Callable[[], Any], flops: int | None = None, **about: Any) -> dict[str, Any]:
    """A row of something that takes milliseconds: median, TFLOP/s of `flops` operations, peak memory, samples.

    Without a GPU `run` is called once, and what would have been measured is None.
    """
    row: dict[str, Any] = {"form": form, "mode": mode, "ms": None, "peak_gb": None}
    if not has_clock():
        run()
        return {**row, "samples": [], "flops": flops, **about}
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, began = environment.gpu().conditions(), time.perf_counter()
    run()
    torch.cuda.synchronize()
    once, peak = time.perf_counter() - began, torch.cuda.max_memory_allocated()
    times = samples(lambda _: run(), [None], repeats=max(3, min(10, int(3 / once)))).milliseconds
    row |= {"ms": statistics.median(times), "peak_gb": peak / 1e9}
    if flops is not None:
        row["tflop_s"] = flops / (row["ms"] * 1e-3) / 1e12
    print(", ".join(f"{key} {value:.1f}" if isinstance(value, float) else str(value) for key, value in row.items()))
    conditions = environment.gpu().conditions().since(before)
    return {**row, "samples": times, "flops": flops, "conditions": conditions, **about}


def source_hash(*files: str) -> str:
    """Of what the files say, whatever their comments and layout: times of another hash were taken otherwise."""
    trees = (ast.dump(ast.parse(Path(file).read_text(encoding="utf-8"))) for file in files)
    return hashlib.sha256("".join(trees).encode()).hexdigest()[:12]
