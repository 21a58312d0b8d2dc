"""``python -m benchmarks static``: figures that need no GPU, held against pins; and ``pin``, which accepts them."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.environment import device, git, software
from benchmarks.schema import SCHEMA, Figures, Finding, Run, now, write
from benchmarks.static import cuda
from benchmarks.static.figures import Verdict
from benchmarks.static.pins import Measured, compare, exit_status, read, repin
from benchmarks.static.unit import Unit
from benchmarks.static.units import units
from srpo_kernels.testing.compile_only import ARCHITECTURES

__all__ = ["main", "measure", "pin", "run_of"]

PINS = Path(__file__).parent.parent / "pins"


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0 as pinned, 1 something is worse, 2 usage, 4 missing or failed, 6 (with --ratchet) better."""
    parser = _parser("static", __doc__)
    parser.add_argument("--out", type=Path, help="result file of all figures and findings, for `compare` and `report`")
    parser.add_argument("--ratchet", action="store_true", help="fail with 6 on what is better than its pin")
    options = _parse(parser, arguments)
    began = time.perf_counter()
    measured = _measured(options)
    findings = compare(measured, partial(read, options.pins), matches=_matches(options))
    if options.out is not None:
        write(run_of(measured, findings), options.out)
    _tell(findings, f"{len(measured)} kernels, operators and models in {time.perf_counter() - began:.0f} s")
    if not options.cases and cuda.nvcc() is None:
        print(cuda.MISSING)
    return exit_status(findings, ratchet=options.ratchet)


def pin(arguments: Sequence[str]) -> int:
    """Exit status: 0 written, 2 usage, or something could not be measured."""
    parser = _parser("pin", "Accept the static figures as they are.")
    parser.add_argument("--reason", required=True, help="why they are right: goes to every figure that changes")
    options = _parse(parser, arguments)
    reason = " ".join(options.reason.split())
    if not reason:
        parser.error("--reason must say why the figures are right")
    changes = repin(_measured(options), options.pins, reason, matches=_matches(options))
    for change in changes:
        print(change)
    print(f"{len(changes)} pins changed" if changes else "all pins are as they were")
    return 0


def measure(units: Sequence[Unit], jobs: int) -> list[Measured]:
    """Figures of all units, failures among them, in so many processes."""
    if jobs == 1:
        results = [_figures(unit) for unit in units]
    else:
        global _inherited  # kernels cannot be sent to a process
        _inherited = units
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
            results = list(pool.map(_inherited_figures, range(len(units))))
    return [Measured(unit, *result) for unit, result in zip(units, results, strict=True)]


_inherited: Sequence[Unit] = ()


def _inherited_figures(index: int) -> tuple[dict[str, Any], str | None]:
    return _figures(_inherited[index])


def _figures(unit: Unit) -> tuple[dict[str, Any], str | None]:
    try:
        return unit.measure(), None
    except Exception as error:  # whatever a compiler or a model raises
        return {}, f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _measured(options: argparse.Namespace) -> list[Measured]:
    matches = _matches(options)
    return measure([unit for unit in units(options.cases, options.arch) if matches(unit.id)], options.jobs)


def _matches(options: argparse.Namespace) -> Callable[[str], bool]:
    return lambda name: options.match in name


def _parser(command: str, description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {command}", description=description)
    parser.add_argument("--match", default="", metavar="TEXT", help="only what has TEXT in its name")
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--cases", nargs="+", default=(), metavar="MODULE", help="cases of your own instead of FLUX's")
    parser.add_argument("--pins", type=Path, help=f"folder of pins; needed with --cases, and {PINS.name}/ without")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes, default one a core")
    return parser


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    options = parser.parse_args(arguments)
    if options.cases and options.pins is None:
        parser.error("--cases needs --pins, the folder of their pins")
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    options.pins = options.pins or PINS
    return options


def _tell(findings: Sequence[Finding], measured: str) -> None:
    """Worst first, what other tools make last; then counts of all."""
    order = list(Verdict)
    for finding in sorted(findings, key=lambda finding: order.index(Verdict(finding.verdict))):
        print(finding)
    counts = Counter(Verdict(finding.verdict) for finding in findings)
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items()) or "all as pinned"
    print(f"{measured}: {told}")
    if counts[Verdict.BETTER] or counts[Verdict.CHANGED] or counts[Verdict.UNPINNED] or counts[Verdict.TOOLCHAIN]:
        print('accept with: python -m benchmarks pin --reason "..."')


def run_of(measured: Sequence[Measured], findings: Sequence[Finding]) -> Run:
    return Run(
        schema=SCHEMA,
        run_id=uuid.uuid4().hex[:12],
        created=now(),
        tier="static",
        git=git(),
        software=software(),
        device=device(),
        static=[
            Figures(id=each.unit.id, pins=each.unit.pins, tools=each.unit.tools, values=each.figures, error=each.error)
            for each in measured
        ],
        findings=list(findings),
    )
