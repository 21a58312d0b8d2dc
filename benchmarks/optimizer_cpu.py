"""Optimizer steps on the CPU: ns per parameter of the C++ kernels and of `torch.optim.AdamW(fused=True)`, in one run.

    python -m benchmarks.optimizer_cpu [millions of parameters]

Calls alternate, so that what else runs on the machine slows all of them; the table has medians and ratios to torch.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from srpo_kernels.extension import available
from srpo_kernels.optim.storage import MOMENTS, WEIGHTS, Storage

COLUMNS = 3072
ROUNDS = 15


def torch_steps(rows: int) -> dict[str, Callable[[], object]]:
    """A step of torch's fused AdamW in fp32, and the clipping that the C++ step does on the way."""
    weight = torch.randn(rows, COLUMNS).requires_grad_()
    weight.grad = torch.randn(rows, COLUMNS) * 1e-4
    step = torch.optim.AdamW([weight], lr=5e-6, fused=True).step
    return {"torch fused, fp32": step, "torch clipping": lambda: torch.nn.utils.clip_grad_norm_([weight], 0.1)}


def our_step(rows: int, weights: str, moments: str) -> Callable[[], Tensor]:
    """The same by the C++ kernel; bf16 gradients unless the weights are fp32."""
    dtype = torch.float32 if weights == "fp32" else torch.bfloat16
    weight, gradient = torch.randn(rows, COLUMNS).to(dtype), (torch.randn(rows, COLUMNS) * 1e-4).to(dtype)
    storage = Storage(weight, {}, weights, moments, 0, 0)
    storage._initialise(False)
    steps, lr = torch.ones(1, dtype=torch.int64), torch.tensor(5e-6, dtype=torch.float64)

    def step() -> Tensor:
        names = ("remainder", "exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale")
        lists = [[storage.state[name]] if name in storage.state else [] for name in names]
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


def main() -> None:
    """Print the table."""
    if not available("cpu"):
        raise SystemExit("srpo_kernels._C is not built: python setup.py build_ext --inplace")
    rows = int(float(sys.argv[1] if len(sys.argv) > 1 else 24) * 1e6) // COLUMNS
    cases = torch_steps(rows)
    for weights, moments in [("fp32", "fp32"), *(("split32", name) for name in MOMENTS), (WEIGHTS[2], "M2")]:
        cases[f"{weights} + {moments}"] = our_step(rows, weights, moments)
    cases["norm of bf16"] = our_norm(rows)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        times: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(ROUNDS + 1):
            for name, step in cases.items():
                begin = time.perf_counter()
                step()
                times[name].append((time.perf_counter() - begin) / (rows * COLUMNS) * 1e9)
        medians = {name: statistics.median(values[1:]) for name, values in times.items()}
        base = medians["torch fused, fp32"]
        print(f"{threads} thread(s), {rows * COLUMNS / 1e6:.1f} M parameters")
        for name, value in medians.items():
            print(f"  {name:20} {value:6.2f} ns per parameter  {base / value:5.2f} x torch")


if __name__ == "__main__":
    main()
