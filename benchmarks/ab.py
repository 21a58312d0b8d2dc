"""``python -m benchmarks ab REF_A REF_B``: two revisions in fresh processes that take turns, compared in pairs.

"." is the working tree. What seems slower is measured once more before it is called so.
"""

from __future__ import annotations

import argparse
import json
import re
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.compare import Comparison, compare, fail_on, verdicts
from benchmarks.fresh import Measure, checkout, measure, merged
from benchmarks.noise import read_noise
from benchmarks.report.summary import summary
from benchmarks.schema import Run, write
from benchmarks.verdict import FAIL_ON, MIN_PROCESSES, Difference, Margins, Verdict, exit_status

__all__ = ["alternate", "confirmed"]


def alternate(first: Path, second: Path, pairs: int, options: Sequence[str], run: Measure = measure) -> tuple[Run, Run]:
    """`pairs` processes of each folder's code. Who begins changes from pair to pair: A B B A A B ..."""
    found: dict[Path, list[Run]] = {first: [], second: []}
    for pair in range(pairs):
        for folder in (first, second) if pair % 2 == 0 else (second, first):
            found[folder].append(run(options, folder))
    token = uuid.uuid4().hex[:12]
    base, new = (replace(merged(found[folder]), pair=token) for folder in (first, second))
    return base, new


def confirmed(
    first: Path,
    second: Path,
    pairs: int,
    options: Sequence[str],
    noise: Margins | None = None,
    run: Measure = measure,
) -> Comparison:
    """The comparison, where SLOWER was found twice. `noise`: default the device's own."""

    def compared(base: Run, new: Run) -> Comparison:
        return compare(base, new, noise or read_noise(None, new.device))

    comparison = compared(*alternate(first, second, pairs, options, run))
    slower = [d.id for d in comparison.differences if d.verdict is Verdict.SLOWER and d.gates]
    if not slower:
        return comparison
    match = "|".join(f"^{re.escape(name)}$" for name in slower)
    again = compared(*alternate(first, second, pairs, [*options, "--match", match], run))
    second_time = {d.id: d for d in again.differences}
    said = [_confirm(d, second_time.get(d.id)) if d.id in slower else d for d in comparison.differences]
    return replace(comparison, differences=said)


def _confirm(first: Difference, again: Difference | None) -> Difference:
    if again is not None and again.verdict is Verdict.SLOWER:
        return replace(first, reason=f"confirmed: {again.change:+.1%} when measured again")
    found = "nothing" if again is None else str(again.verdict)
    return replace(first, verdict=Verdict.INCONCLUSIVE, reason=f"slower once, {found} when measured again")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks ab", description=__doc__, epilog="Other options go to `benchmarks kernels`."
    )
    parser.add_argument("a", metavar="REF_A", help="revision, or .")
    parser.add_argument("b", metavar="REF_B", help="revision, or .")
    parser.add_argument("--procs", type=int, default=MIN_PROCESSES, help="of each (default %(default)s)")
    parser.add_argument("--fail-on", type=fail_on, default=FAIL_ON, metavar="VERDICT,...", help="see `compare`")
    parser.add_argument("--out", type=Path, help="folder for a.json, b.json and verdict.json")
    options, rest = parser.parse_known_args(arguments)
    if options.procs < 1:
        parser.error(f"--procs must be at least 1, got {options.procs}")
    with checkout(options.a) as first, checkout(options.b) as second:
        comparison = confirmed(first, second, options.procs, rest)
    status = exit_status(comparison.differences, options.fail_on)
    if options.out is not None:
        write(comparison.base, options.out / "a.json")
        write(comparison.new, options.out / "b.json")
        (options.out / "verdict.json").write_text(json.dumps(verdicts(comparison, status), indent=1) + "\n")
    print(summary(comparison))
    return status
