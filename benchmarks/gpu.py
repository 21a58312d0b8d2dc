"""``python -m benchmarks.gpu``: test and time operators and whole models on this machine's GPU.

Into one JSON file, written anew after every part. Needs the packages already installed and no network. Exit status:
0 done, 1 a test failed, 4 no GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Case, Output
from benchmarks.cases import cases
from benchmarks.decoder import decoder_results
from benchmarks.timing import copy_bandwidth, median_ms, rotations
from benchmarks.tower import tower_results
from benchmarks.transformer import float8_results, transformer_results

ROOT = Path(__file__).parent.parent
_PARTS = ("tests", "operators", "optimizer", "transformer", "float8", "decoder", "tower")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder of the JSON file")
    parser.add_argument("--parts", nargs="+", choices=_PARTS, default=_PARTS, help="default all of them, in order")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"benchmarks.gpu: no NVIDIA GPU visible to torch {torch.__version__}", file=sys.stderr)
        return 4
    started = time.time()
    device = torch.cuda.get_device_name().replace(" ", "-").lower()
    path = options.out / f"{device}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime(started))}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    bandwidth = copy_bandwidth()
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s")
    report: dict[str, Any] = {"environment": _environment(), "copy_bandwidth_tb_s": bandwidth / 1e12, "seconds": {}}
    measures: dict[str, Callable[[], Any]] = {
        "tests": _run_tests,
        "operators": lambda: [_measure(case, bandwidth) for case in cases()],
        "optimizer": lambda: _optimizers(bandwidth),
        "transformer": lambda: list(transformer_results()),
        "float8": lambda: [row for side in (90, 128) for row in float8_results(side)],
        "decoder": lambda: list(decoder_results()),
        "tower": lambda: list(tower_results()),
    }
    for part in options.parts:
        began = time.time()
        report[part] = measures[part]()
        report["seconds"][part] = round(time.time() - began, 1)
        partial_file = path.with_suffix(".partial")
        partial_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        partial_file.replace(path)
    print(f"written: {path}")
    return 1 if report.get("tests", {}).get("exit_status") else 0


def _run_tests() -> dict[str, Any]:
    """The operators' tests on this GPU, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/ops", "-q", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-3000:], done.stderr[-1000:])
    return {"exit_status": done.returncode, "summary": (done.stdout.strip().splitlines() or [""])[-1]}


def _optimizers(bandwidth: float) -> list[dict[str, Any]]:
    """Optimizer steps, in a process of their own: the extension is built first where there is an nvcc."""
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    built = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    print(built.stdout[-500:], built.stderr[-500:] if built.returncode else "")
    command = [sys.executable, "-m", "benchmarks.optimizer_gpu", str(bandwidth)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    print(done.stdout)
    return [json.loads(line) for line in done.stdout.splitlines()]


def _measure(case: Case, bandwidth: float) -> dict[str, Any]:
    """Forward, and forward with backward, of ours, eager and compiled eager."""
    torch.manual_seed(0)
    first = case.make()
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in first.values())
    inputs = [first, *(case.make() for _ in range(rotations(nbytes) - 1))]
    forms = {"ours": case.ours, "eager": case.eager}
    if case.compiled:
        forms["compiled"] = torch.compile(case.eager)
    size = case.dtype.itemsize
    row: dict[str, Any] = {"op": case.op, "shape": case.shape}
    for name, form in forms.items():
        torch.compiler.reset()
        row[name] = {"forward_ms": median_ms(partial(_forward, form), inputs)}
        if case.differentiable:
            row[name]["forward_backward_ms"] = median_ms(partial(_forward_backward, form, case), inputs)
    fastest = row["ours"]
    row["forward_of_copy_bandwidth"] = case.forward_elements * size / (fastest["forward_ms"] * 1e-3) / bandwidth
    moved = (case.forward_elements + case.backward_elements) * size
    if case.differentiable:
        row["forward_backward_of_copy_bandwidth"] = moved / (fastest["forward_backward_ms"] * 1e-3) / bandwidth
    row["moved_mb"] = moved / 1e6
    times = (f"{name} {row[name]['forward_ms'] * 1e3:.1f} us" for name in forms)
    print(f"{case.op} [{case.shape}]: {', '.join(times)}, {row['forward_of_copy_bandwidth']:.0%} of copy bandwidth")
    return row


def _forward(form: Callable[..., Output], inputs: dict[str, Tensor]) -> Output:
    with torch.no_grad():
        return form(**inputs)


def _forward_backward(form: Callable[..., Output], case: Case, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Gradients, the outputs being their own upstream gradients."""
    given = {name: t.detach().requires_grad_(name in case.differentiable) for name, t in inputs.items()}
    output = form(**given)
    outputs = (output,) if isinstance(output, Tensor) else output
    wanted = [given[name] for name in case.differentiable]
    return torch.autograd.grad(outputs, wanted, [each.detach() for each in outputs])


def _environment() -> dict[str, Any]:
    query = "name,driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw,clocks_throttle_reasons.active"
    smi = subprocess.run(
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True
    )
    sha = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip() or None
    packages: dict[str, str | None] = {}
    for package in ("torch", "triton", "torchvision", "diffusers"):
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = None
    return {
        "device": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "cuda": torch.version.cuda,
        "nvidia_smi": dict(zip(query.split(","), smi.stdout.strip().split(", "), strict=False)) if smi.stdout else None,
        "git": sha,
        "python": sys.version.split()[0],
        **packages,
    }


if __name__ == "__main__":
    sys.exit(main())
