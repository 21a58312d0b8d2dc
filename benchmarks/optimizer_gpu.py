"""Optimizer steps over FLUX.1-dev's 1160 parameters on a GPU: ours in every mode, and others' where they are installed.

Of each: milliseconds, bytes moved a second over the device's copy bandwidth, kernels launched, milliseconds of the
host, peak memory. Parameters are taken in order for as long as a mode's states fit; the row says how many.
"""

from __future__ import annotations

import importlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from benchmarks.timing import measured
from srpo_kernels import extension_status
from srpo_kernels.optim import AdamW

__all__ = ["optimizer_results", "shapes"]

#: Bytes a parameter that a step reads and writes beside its gradient's: every state twice.
_WEIGHTS = {"fp32": 8.0, "split32": 8.0, "split24": 6.0}
_MOMENTS = {"fp32": 16.0, "M4": 8.0, "M3": 6.06, "M2": 4.12}
_MODES = (("fp32", "fp32"), ("split32", "M4"), ("split32", "M3"), ("split32", "M2"), ("split24", "M2"))
_MAX_NORM = 0.1
_NUMBERS: dict[str, Any] = dict(lr=5e-6, weight_decay=1e-4)


def shapes() -> list[torch.Size]:
    """Of FLUX.1-dev's parameters, in order."""
    with torch.device("meta"):
        return [parameter.shape for parameter in FluxTransformer2DModel(guidance_embeds=True).parameters()]


def optimizer_results(bandwidth: float, device: str = "cuda", sizes: list[torch.Size] | None = None) -> Iterator[dict]:
    """A row for every optimizer, with and without clipping; `bandwidth` in bytes a second."""
    every = sizes or shapes()
    for (weights, moments), clip in itertools.product(_MODES, (None, _MAX_NORM)):
        dtype = torch.float32 if weights == "fp32" else torch.bfloat16
        moved = _WEIGHTS[weights] + _MOMENTS[moments] + dtype.itemsize * (2 if clip else 1)
        held = _WEIGHTS[weights] / 2 + _MOMENTS[moments] / 2 + dtype.itemsize
        make: Callable[[list[nn.Parameter]], Callable] = partial(
            _ours, weights=weights, moments=moments, max_grad_norm=clip
        )
        name = f"srpo_kernels AdamW {weights} + {moments}{', clip' if clip else ''}"
        yield _row(name, make, _fitting(every, held, device), dtype, moved, bandwidth, device)
    for name, dtype, held, moved, make in _others():
        yield _row(name, make, _fitting(every, held, device), dtype, moved, bandwidth, device)


def _ours(parameters: list[nn.Parameter], **options: Any) -> Callable:
    return AdamW(parameters, **_NUMBERS, **options).step


def _others() -> Iterator[tuple[str, torch.dtype, float, float, Callable[[list[nn.Parameter]], Callable]]]:
    """Name, dtype, bytes a parameter held and moved, and what makes a step of parameters."""

    def fused(parameters: list[nn.Parameter]) -> Callable:
        return torch.optim.AdamW(parameters, **_NUMBERS, fused=True).step

    def clipped(parameters: list[nn.Parameter]) -> Callable:
        step = fused(parameters)

        def run() -> None:
            nn.utils.clip_grad_norm_(parameters, _MAX_NORM)
            step()

        return run

    yield "torch AdamW fused, fp32", torch.float32, 16.0, 28.0, fused
    yield "torch AdamW fused, fp32, clip", torch.float32, 16.0, 40.0, clipped
    for module in ("torchao.optim", "bitsandbytes.optim"):
        try:
            kind = importlib.import_module(module).AdamW8bit
        except ImportError:
            continue
        name = f"{module.partition('.')[0]} AdamW8bit, bf16"
        yield name, torch.bfloat16, 6.1, 10.1, partial(_step_of, kind)


def _step_of(kind: Any, parameters: list[nn.Parameter]) -> Callable:
    return kind(parameters, **_NUMBERS).step


def _fitting(every: list[torch.Size], held: float, device: str) -> list[torch.Size]:
    """As many of the parameters as take nine tenths of the free memory."""
    if device == "cpu":
        return every
    free = 0.9 * torch.cuda.mem_get_info()[0]
    ends = itertools.accumulate(shape.numel() * held for shape in every)
    return [shape for shape, end in zip(every, ends, strict=True) if end < free]


def _row(
    name: str,
    make: Callable[[list[nn.Parameter]], Callable],
    sizes: list[torch.Size],
    dtype: torch.dtype,
    moved: float,
    bandwidth: float,
    device: str,
) -> dict[str, Any]:
    parameters = [nn.Parameter(torch.randn(shape, dtype=dtype, device=device) * 0.02) for shape in sizes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter) * 1e-6
    count = sum(parameter.numel() for parameter in parameters)
    step = make(parameters)
    step()  # makes the states
    row: dict[str, Any] = {"tensors": len(parameters), "parameters": count, "moved_gb": moved * count / 1e9}
    if device == "cuda":
        row = {**measured(name, "step", step), **row}
        row["of_copy_bandwidth"] = moved * count / (row["ms"] * 1e-3) / bandwidth
        row["host_ms"], row["launches"] = _host_milliseconds(step), _launches(step)
    else:
        row = {"form": name, **row}
    del step, parameters
    if device == "cuda":
        torch.cuda.empty_cache()
    return row


def _host_milliseconds(step: Callable[[], Any]) -> float:
    """Median time that a call takes to return while the device is busy."""
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        torch.cuda._sleep(200_000_000)  # about 100 ms
        began = time.perf_counter()
        step()
        times.append((time.perf_counter() - began) * 1e3)
    torch.cuda.synchronize()
    return statistics.median(times)


def _launches(step: Callable[[], Any]) -> int:
    """Kernels that a step runs on the device."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    kinds = ("Memcpy", "Memset")
    return sum(event.device_type.name == "CUDA" and not event.name.startswith(kinds) for event in profile.events())


def main() -> None:
    """``python -m benchmarks.optimizer_gpu BYTES_A_SECOND``: what runs the steps, then the rows, as lines of JSON."""
    print(json.dumps({"form": "extension", "status": extension_status()}, default=str), flush=True)
    for row in optimizer_results(float(sys.argv[1])):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
