"""``python -m benchmarks list``: what can be measured, by the names that `--match` takes."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

from benchmarks.cases import cases
from benchmarks.gpu import PARTS, parts
from benchmarks.kernels import MATCH, Plan, planned_of, regex

__all__ = ["main"]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks list", description=__doc__)
    parser.add_argument("--match", type=regex, default="", help=MATCH)
    options = parser.parse_args(arguments)
    names = [planned.id for case in cases("cpu") for planned in planned_of(case, Plan())]
    print(*(name for name in names if re.search(options.match, name)), sep="\n")
    seconds = ", ".join(f"{part} {PARTS[part]:.0f} s" for part in parts())
    print(f"\nkernels: {len(names)} measurements. gpu: the parts {seconds} at most.")
    return 0
