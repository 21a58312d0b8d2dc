"""``python -m benchmarks gpu``: the quick profile, in one result file that is written anew after every measurement.

Needs the packages already installed and no network, and writes nothing outside the folder of results. Run again on the
same code and GPU, it measures what the file does not have yet; `--parts` measures these again. With `--dry`, or without
a GPU, all of it runs once on tiny shapes and nothing is timed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import environment, timing
from benchmarks.fresh import ROOT
from benchmarks.kernels import UNMEASURED, Plan, measurements, new_run, status
from benchmarks.nvml import harm
from benchmarks.report.quick import quick_table
from benchmarks.schema import Ceilings, Measurement, Process, ResultError, Run, read, write

__all__ = ["PARTS", "measure_parts", "parts"]

#: Seconds that a part may take before what is left of it is skipped: under ten minutes in all.
PARTS = {"ops": 240.0, "flux": 130.0, "vae": 60.0, "optim": 60.0, "step": 60.0}
_SMALL_FLUX = dict(num_layers=1, num_single_layers=1, num_attention_heads=2)
_SMALL_VAE = dict(block_out_channels=(32, 32, 32, 32), layers_per_block=1)


def parts() -> list[str]:
    """Those there are."""
    return [part for part in PARTS if part != "step" or importlib.util.find_spec("benchmarks.step")]


def measure_parts(run: Run, wanted: Sequence[str], path: Path, *, small: bool) -> Run:
    """`run` with the `wanted` parts measured, and written to `path` after each measurement."""
    for part in wanted:
        found: list[Measurement] = []
        others = [m for m in run.measurements if m.part != part]
        for measurement in _within(part, _source(part, run.ceilings, small)):
            found.append(replace(measurement, part=part))
            run = replace(run, measurements=[*others, *found])
            write(run, path)
    return run


def _within(part: str, source: Iterator[Measurement]) -> Iterator[Measurement]:
    """What `source` yields in the part's time. If it fails, the failure is the last."""
    ends = time.monotonic() + PARTS[part]
    try:
        for measurement in source:
            yield measurement
            if time.monotonic() > ends:
                message = f"the rest of {part} was not begun within {PARTS[part]:g} s"
                yield Measurement(name=part, mode="rest", form="profile", status="skipped", error=message)
                return
    except (RuntimeError, ValueError, TypeError, AttributeError, OSError) as error:
        message = f"{type(error).__name__}: {str(error)[:300]}"
        yield Measurement(name=part, mode="rest", status="error", error=message)


def _source(part: str, ceilings: Ceilings, small: bool) -> Iterator[Measurement]:
    """A part's measurements, each made when it is asked for."""
    sources: dict[str, Callable[[Ceilings, bool], Iterator[Measurement]]] = {
        "ops": _operators,
        "flux": lambda _, small: map(measurement_of, _flux(small)),
        "vae": lambda _, small: map(measurement_of, _vae(small)),
        "optim": lambda ceilings, small: map(measurement_of, _optimizers(ceilings, small)),
        "step": _step,
    }
    return sources[part](ceilings, small)


def _operators(ceilings: Ceilings, small: bool) -> Iterator[Measurement]:
    """The operators' tests on this GPU, then their times."""
    yield _tests(small)
    plan = Plan(regime="burst", device="cpu" if small else "cuda", small=small)
    for match in ("(?<!, compiled)$", ", compiled$"):  # compiling takes most of the time, and its turn is last
        yield from measurements(replace(plan, match=match), ceilings)


def _tests(small: bool) -> Measurement:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/ops", "-q", "-x", "-p", "no:cacheprovider"]
    began = time.monotonic()
    done = subprocess.run(command + ["--collect-only"] * small, cwd=ROOT, capture_output=True, text=True)
    last = (done.stdout.strip().splitlines() or [done.stderr[-300:]])[-1]
    about: dict[str, Any] = dict(name="tests of the operators", mode="all", form="profile", details={"summary": last})
    if done.returncode not in (0, 5):  # 5: none for this machine
        print(done.stdout[-3000:], done.stderr[-1000:])
        return Measurement(status="error", error=last, **about)
    if small:
        return Measurement(status="skipped", error=UNMEASURED, **about)
    return Measurement(processes=[Process.of([(time.monotonic() - began) * 1e3])], **about)


def _flux(small: bool) -> Iterator[dict[str, Any]]:
    from benchmarks.transformer import float8_results, transformer_results

    if small:
        yield from transformer_results(4, 1, "cpu", **_SMALL_FLUX)
        yield from float8_results(4, 1, "cpu", **_SMALL_FLUX)
    else:
        yield from transformer_results()
        for side in (90, 128):
            yield from float8_results(side)


def _vae(small: bool) -> Iterator[dict[str, Any]]:
    from benchmarks.decoder import decoder_results
    from benchmarks.tower import tower_results

    yield from decoder_results("cpu", [(32, 1)], **_SMALL_VAE) if small else decoder_results()
    yield from tower_results("cpu", "ViT-S-32-alt", [1]) if small else tower_results()


def _optimizers(ceilings: Ceilings, small: bool) -> Iterator[dict[str, Any]]:
    import torch

    from benchmarks.optimizer_gpu import optimizer_results

    bandwidth = (ceilings.copy_gb_s or 1.0) * 1e9
    sizes = [torch.Size((8, 128)), torch.Size((128,))] if small else None
    for row in optimizer_results(bandwidth, "cpu" if small else "cuda", sizes):
        yield {"mode": "step", "peer": not row["form"].startswith("srpo_kernels"), **row}


def _step(ceilings: Ceilings, small: bool) -> Iterator[Measurement]:
    """`benchmarks.step` gives the phases of the step, measured."""
    return importlib.import_module("benchmarks.step").quick(ceilings, small=small)


def measurement_of(row: dict[str, Any]) -> Measurement:
    """A row of `timing.measured`."""
    known = {"form", "mode", "ms", "samples", "conditions", "peak_gb", "tflop_s", "flops", "peer", "moved_gb"}
    moved, times = row.get("moved_gb"), row.get("samples") or []
    conditions = row.get("conditions") or {}
    problem = harm(conditions.get("throttled_ns")) if times else UNMEASURED
    return Measurement(
        name=row["form"],
        mode=row["mode"],
        form="peer" if row.get("peer") else "ours",
        status="ok" if problem is None else "contaminated" if times else "skipped",
        error=problem,
        version=timing.source_hash(timing.__file__),
        contract={"clock": "events", "scope": "device", "regime": "burst", "cache": "as left", "fill": "normal"},
        processes=[Process.of(times, **conditions)] if times else [],
        bytes=None if moved is None else moved * 1e9,
        flops=row.get("flops"),
        peak_gb=row.get("peak_gb"),
        details={key: value for key, value in row.items() if key not in known},
    )


def _begin(out: Path, again: Sequence[str]) -> tuple[Run, list[str], Path]:
    """The run that this code and GPU have in `out`, or a new one; the parts to measure; its file."""
    run = new_run("gpu", Ceilings())
    name = (run.git.sha or "unknown")[:12] + (f"-{run.git.patch}" if run.git.patch else "")
    path = out / run.device.slug / f"{name}.json"
    if path.exists():
        before = read(path)
        if (before.device, before.software) == (run.device, run.software):
            done = {m.part for m in before.measurements}
            return before, list(again) or [part for part in parts() if part not in done], path
        raise ResultError(f"{path} was measured with other software or another GPU; move it away first")
    run = replace(run, ceilings=timing.ceilings())
    return run, list(again) or parts(), path


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="default benchmarks/results")
    parser.add_argument("--parts", type=_names, default=[], metavar=",".join(PARTS), help="default: what is missing")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU, into OUT/cpu")
    options = parser.parse_args(arguments)
    if options.dry:
        environment.rehearse()
    elif not timing.has_clock():
        print(f"benchmarks gpu: no NVIDIA GPU visible to torch {environment.software().torch}", file=sys.stderr)
        return 4
    options.out.mkdir(parents=True, exist_ok=True)
    for variable, folder in _CACHES.items():
        scratch = options.out.resolve() / "cache" / folder
        scratch.mkdir(parents=True, exist_ok=True)
        os.environ[variable] = str(scratch)
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    run, wanted, path = _begin(options.out, options.parts)
    run = measure_parts(run, wanted, path, small=options.dry)
    print(quick_table(run))
    print(f"written: {path}")
    return status(run)


#: What else would be written elsewhere.
_CACHES = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TMPDIR": "tmp"}


def _names(text: str) -> list[str]:
    names = [name for name in text.replace(",", " ").split() if name]
    if wrong := [name for name in names if name not in parts()]:
        raise argparse.ArgumentTypeError(f"{wrong} not among the parts {parts()}")
    return names


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
