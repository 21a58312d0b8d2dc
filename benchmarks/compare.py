"""``python -m benchmarks compare BASE NEW``: what changed between two runs, by the rule of `benchmarks.verdict`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.noise import read_noise
from benchmarks.report.summary import summary
from benchmarks.schema import Run, read
from benchmarks.static import between
from benchmarks.verdict import FAIL_ON, Difference, Margins, Verdict, exit_status, judge, refusal

__all__ = ["Comparison", "compare", "fail_on", "verdicts"]


@dataclass(frozen=True)
class Comparison:
    """Every measurement of either run, in the new one's order, those that are gone last."""

    base: Run
    new: Run
    differences: list[Difference]
    refused: str | None  # why nothing may be compared


def compare(base: Run, new: Run, noise: Margins | None = None, *, across_software: bool = False) -> Comparison:
    """Paired where the runs' processes took turns. `noise` is that of the device, if it was measured."""
    margins = Margins(noise.noise if noise else {}, paired=base.pair is not None and base.pair == new.pair)
    before, after = base.by_id, new.by_id
    ids = dict.fromkeys([*after, *before])
    refused = refusal(base, new, across_software=across_software) if ids else None  # static figures name their tools
    if refused:
        said = [Difference(name, Verdict.INCOMPARABLE, refused, before.get(name), after.get(name)) for name in ids]
    else:
        said = [judge(before.get(name), after.get(name), margins) for name in ids]
    return Comparison(base, new, [*said, *between.differences(base, new)], refused)


def verdicts(comparison: Comparison, status: int) -> dict[str, Any]:
    """What a program may read: every verdict and number."""
    keys = ("id", "reason", "change", "low", "high", "margin", "gates")
    rows = [{"verdict": str(d.verdict)} | {key: getattr(d, key) for key in keys} for d in comparison.differences]
    return {"exit_status": status, "base": comparison.base.run_id, "new": comparison.new.run_id, "differences": rows}


def fail_on(text: str) -> tuple[Verdict, ...]:
    """Verdicts by name, parted by commas."""
    try:
        return tuple(Verdict(word.strip().upper()) for word in text.split(",") if word.strip())
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}; verdicts are {', '.join(v.lower() for v in Verdict)}") from None


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks compare", description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--noise", type=Path, help="A/A noise; default benchmarks/noise/DEVICE.json, if there is one")
    parser.add_argument("--fail-on", type=fail_on, default=FAIL_ON, metavar="VERDICT,...", help=_FAIL_ON)
    parser.add_argument("--across-software", action="store_true", help="compare runs of other torch, Triton or driver")
    parser.add_argument("--out", type=Path, help="write every verdict to this JSON file")
    options = parser.parse_args(arguments)
    base, new = read(options.base), read(options.new)
    noise = read_noise(options.noise, new.device)
    comparison = compare(base, new, noise, across_software=options.across_software)
    status = exit_status(comparison.differences, options.fail_on)
    if options.out is not None:
        options.out.write_text(json.dumps(verdicts(comparison, status), indent=1) + "\n", encoding="utf-8")
    print(summary(comparison))
    return status


_FAIL_ON = (
    f"what the exit status tells of; default {','.join(v.lower() for v in FAIL_ON)}. "
    "Statuses, first wins: 2 unreadable, 3 incomparable, 4 missing or error, 1 slower, 6 faster, 5 inconclusive"
)
