"""Optimizer steps on the CPU: ns per parameter of the C++ kernels and of `torch.optim.AdamW(fused=True)`, in one run.

In memory, where bytes decide, and in caches, where arithmetic does.

With --host instead what a step of FLUX.1-dev's 1160 tensors costs the host: ms of a step of as many of one element, or
of none.

    python -m benchmarks.optimizer_cpu [millions of parameters] [--host] [--append PATH]

Calls alternate, so that what else runs on the machine slows all of them; the table has medians of the times, and of the
ratios to torch's step of the same round. Virtual machines change their speed by the minute: a file has a run a line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from srpo_kernels.extension import available
from srpo_kernels.optim import AdamW
from srpo_kernels.optim.storage import MOMENTS, Storage

ROOT = Path(__file__).parent.parent
COLUMNS = 3072
CACHED = 0.25  # millions of parameters that stay in caches
ROUNDS = 45
TENSORS, HOST_ROUNDS = 1160, 200
EVICTED = 64 * 2**20  # bytes that are passed over for caches to be cold
BASE = "torch fused, fp32"
_DTYPES = torch.bfloat16, torch.float32  # ours and torch's


def fp32_steps(rows: int) -> dict[str, Callable[[], object]]:
    """Steps of torch's fused AdamW and of ours in fp32, on the same tensors: other pages may be a twentieth faster.

    And the clipping that the C++ step does on the way.
    """
    weight = torch.randn(rows, COLUMNS).requires_grad_()
    weight.grad = torch.randn(rows, COLUMNS) * 1e-4
    optimizer = torch.optim.AdamW([weight], lr=5e-6, fused=True)
    optimizer.step()
    return {
        BASE: optimizer.step,
        "torch clipping": lambda: torch.nn.utils.clip_grad_norm_([weight], 0.1),
        "fp32 + fp32": our_step(weight.detach(), weight.grad, optimizer.state[weight], "fp32", "fp32"),
    }


def compressed_step(rows: int, weights: str, moments: str) -> Callable[[], Tensor]:
    """A step of bf16 tensors."""
    weight, gradient = torch.randn(rows, COLUMNS).bfloat16(), (torch.randn(rows, COLUMNS) * 1e-4).bfloat16()
    storage = Storage(weight, {}, weights, moments, 0, 0)
    storage._initialise(False)
    return our_step(weight, gradient, storage.state, weights, moments)


def our_step(
    weight: Tensor, gradient: Tensor, state: dict[str, Tensor], weights: str, moments: str
) -> Callable[[], Tensor]:
    """A step by the C++ kernel."""
    names = ("remainder", "exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale")
    lists = [[state[name]] if name in state else [] for name in names]
    steps, lr = torch.ones(1, dtype=torch.int64), torch.tensor(5e-6, dtype=torch.float64)

    def step() -> Tensor:
        scalars = torch.ops.srpo.adamw_scalars(steps, lr, 0.9, 0.999, 1e-8, 0.01)
        numbers = (scalars, steps, torch.tensor(1.0), torch.tensor(True), [0], 0, 0.0, 1)
        telemetry = torch.ops.srpo.adamw_step([weight], *lists, [], [gradient], *numbers, weights, moments)
        steps.add_(1)
        return telemetry

    return step


def our_norm(rows: int) -> Callable[[], Tensor]:
    """The exact norm of bf16 gradients."""
    gradient = torch.randn(rows, COLUMNS).bfloat16()
    return lambda: torch.ops.srpo.sums_of_squares([gradient])


def measured(rows: int, threads: int) -> list[dict[str, Any]]:
    """Medians of every case; prints them."""
    torch.set_num_threads(threads)
    modes = [*(("split32", moments) for moments in MOMENTS), ("split24", "M2"), ("bf16_sr", "M4")]
    cases = fp32_steps(rows)
    cases |= {f"{weights} + {moments}": compressed_step(rows, weights, moments) for weights, moments in modes}
    cases["norm of bf16"] = our_norm(rows)
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(ROUNDS + 1):
        for name, step in cases.items():
            begin = time.perf_counter()
            step()
            times[name].append((time.perf_counter() - begin) / (rows * COLUMNS) * 1e9)
    found = []
    print(f"{threads} thread(s), {rows * COLUMNS / 1e6:.1f} M parameters")
    for name, values in times.items():
        ratios = [base / value for base, value in zip(times[BASE][1:], values[1:], strict=True)]
        median, ratio = statistics.median(values[1:]), statistics.median(ratios)
        row = {"case": name, "parameters": rows * COLUMNS, "threads": threads}
        found.append(row | {"ns_per_parameter": median, "times_torch": ratio})
        print(f"  {name:20} {median:6.2f} ns per parameter  {ratio:5.2f} x torch")
    return found


def host_steps(elements: int) -> tuple[AdamW, Callable[[], object]]:
    """Our optimizer of tensors with gradients, its step prepared, and torch's clipping and step of as many in fp32."""
    ours, torchs = ([torch.ones(elements, dtype=dtype).requires_grad_() for _ in range(TENSORS)] for dtype in _DTYPES)
    optimizer = AdamW(ours, lr=5e-6, max_grad_norm=0.1)
    fused = torch.optim.AdamW(torchs, lr=5e-6, fused=True)
    for parameter in (*ours, *torchs):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()

    def clipped() -> None:
        torch.nn.utils.clip_grad_norm_(torchs, 0.1)
        fused.step()

    return optimizer, clipped


def host_cases() -> dict[str, Callable[[], object]]:
    """Steps of tensors of one element and of none, and what the former consist of."""
    (optimizer, clipped), (empty, _) = host_steps(1), host_steps(0)
    prepared, parameters = optimizer._prepared, optimizer.param_groups[0]["params"]
    assert prepared is not None
    module, state = prepared._module, vars(optimizer)["state"]  # unasked, or the next step is prepared anew
    begun = prepared._begin(optimizer)

    def anew() -> None:
        optimizer._prepared = None
        optimizer.step()

    return {
        "torch clipping and fused step, fp32": clipped,
        "step, prepared anew": anew,
        "step": optimizer.step,
        "step of tensors without elements": empty.step,
        "of a step: are states the same objects": lambda: module.same(prepared._objects, [parameters], state),
        "of a step: parameters, gradients": lambda: module.locate(prepared._stepped, prepared._plan),
        "of a step: adamw_begin": lambda: prepared._begin(optimizer),
        "of a step: adamw_advance": lambda: torch.ops.srpo.adamw_advance(prepared._plan, begun, 0, TENSORS, 0, 0.0, 1),
        "of a step: version counters": lambda: torch.autograd.graph.increment_version(parameters),
    }


def measured_host() -> list[dict[str, Any]]:
    """Least processor time of every host case on one thread, call after call and after other work; prints it."""
    torch.set_num_threads(1)
    other = torch.zeros(EVICTED // 4)
    found = []
    print(f"host, {TENSORS} tensors")
    for name, call in host_cases().items():
        times: dict[bool, list[float]] = {False: [], True: []}
        for cold in times:
            for _ in range(HOST_ROUNDS):
                if cold:
                    other.add_(1)
                begin = time.process_time()
                call()
                times[cold].append((time.process_time() - begin) * 1e3)
        warm, cold_ms = (min(values) for values in times.values())
        found.append({"case": name, "tensors": TENSORS, "ms": warm, "cold_ms": cold_ms})
        print(f"  {name:40} {warm:6.3f} ms, {cold_ms:6.3f} ms with cold caches")
    return found


def environment() -> dict[str, Any]:
    """What the numbers were measured on."""
    information = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    lines = (line.partition(":") for line in information.split("\n\n")[0].splitlines())
    fields = {name.strip(): value.strip() for name, _, value in lines}
    sha = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip() or None
    return {
        "device": fields.get("model name", platform.processor()),
        "cpu_family": fields.get("cpu family"),
        "avx512": "avx512bw" in fields.get("flags", ""),
        "cores": os.cpu_count(),
        "git": sha,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def main() -> None:
    """Print the table, and write it if asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.optimizer_cpu", description=__doc__.splitlines()[0])
    parser.add_argument("millions", type=float, nargs="?", default=24, help="parameters, of steps in memory")
    parser.add_argument(
        "--host", action="store_true", help="measure what a step of many tensors costs the host instead"
    )
    parser.add_argument(
        "--append", type=Path, help="also add the medians and the environment to this file of JSON lines"
    )
    options = parser.parse_args()
    if not available("cpu"):
        raise SystemExit("srpo_kernels._C is not built: python setup.py build_ext --inplace")
    if options.append is not None:
        options.append.open("a").close()  # or nothing is measured
    if options.host:
        found: dict[str, Any] = {"host": measured_host()}
    else:
        sizes = [int(millions * 1e6) // COLUMNS for millions in (options.millions, CACHED)]
        found = {"rounds": ROUNDS, "optimizer": [row for of in product(sizes, (1, 2)) for row in measured(*of)]}
    if options.append is not None:
        with options.append.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"environment": environment(), **found}) + "\n")
        print(f"added to {options.append}")


if __name__ == "__main__":
    main()
