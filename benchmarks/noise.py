"""``python -m benchmarks noise``: how far fresh processes of the same code differ here, which makes the margins."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.fresh import ROOT, Measure, measure, merged
from benchmarks.report.summary import short
from benchmarks.schema import Device, ResultError, Run
from benchmarks.stats import process_noise
from benchmarks.verdict import MIN_PROCESSES, Margins

__all__ = ["measure_noise", "read_noise"]

_FOLDER = Path(__file__).parent / "noise"


def read_noise(path: Path | None, device: Device) -> Margins:
    """Of `path`, or of the device's own file; without one, no noise is known. Raises `ResultError` if unreadable."""
    path = path or _FOLDER / f"{device.slug}.json"
    if path.parent == _FOLDER and not path.exists():
        return Margins({})
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        noise = {name: (float(total), float(neighbours)) for name, (total, neighbours) in found["noise"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ResultError(f"{path}: not a readable noise file: {error}") from error
    if found.get("device") != device.name:
        raise ResultError(f"{path}: noise of {found.get('device')!r}, not of {device.name!r}")
    return Margins(noise)


def measure_noise(processes: int, options: Sequence[str], run: Measure = measure) -> tuple[Run, dict[str, Any]]:
    """What `processes` fresh ones of this code found, one after the other, and the noise file's contents."""
    whole = merged([run(options, ROOT) for _ in range(processes)])
    measured = {m.id: process_noise([p.median for p in m.processes]) for m in whole.measurements if m.status == "ok"}
    about = {"device": whole.device.name, "git": short(whole), "torch": whole.software.torch, "created": whole.created}
    return whole, about | {"processes": processes, "noise": measured}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks noise", description=__doc__, epilog="Other options go to `benchmarks kernels`."
    )
    parser.add_argument("--procs", type=int, default=10, help="fresh processes (default %(default)s)")
    parser.add_argument("--out", type=Path, help="default benchmarks/noise/DEVICE.json")
    options, rest = parser.parse_known_args(arguments)
    if options.procs < MIN_PROCESSES:
        parser.error(f"--procs must be at least {MIN_PROCESSES}, got {options.procs}")
    run, found = measure_noise(options.procs, rest)
    if not found["noise"]:
        print("nothing was measured, so no noise file is written")
        return 4
    path = options.out or _FOLDER / f"{run.device.slug}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name, (total, neighbours) in sorted(found["noise"].items(), key=lambda item: -item[1][0]):
        print(f"{total:7.2%} in all, {neighbours:6.2%} between neighbours  {name}")
    print(f"written: {path}")
    return 0
