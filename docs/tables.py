"""Write the tables of README.md and docs/*.md from result files: ``python -m docs.tables``.

A page holds ``<!-- table NAME -->``, the table, and ``<!-- end -->``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from benchmarks.report.tables import TABLES as GPU_TABLES
from benchmarks.report.tables import newest, rendered
from srpo.experiments.registry import EXPERIMENTS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
_MARKED = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def precision(report: dict[str, Any]) -> str:
    """Errors of every quantity, a precision a column."""
    rows = report["quantities"]
    found = {(row["model"], row["quantity"], row["precision"]): row for row in rows}
    quantities = dict.fromkeys((row["model"], row["quantity"]) for row in rows)
    columns = list(dict.fromkeys(row["precision"] for row in rows))
    header = ["model", "quantity", *(f"{name}: error, 1 - cosine" for name in columns)]
    lines = []
    for key in quantities:
        cells = [found[(*key, column)] for column in columns]
        lines.append([*key, *(f"{cell['error']:.4f}, {1 - cell['cosine']:.1e}" for cell in cells)])
    return markdown(header, lines)


def training(report: dict[str, Any]) -> str:
    """Shifts of the demo's training, all seeds of a precision in a row."""
    rows = report["training"]
    lines = []
    for name in dict.fromkeys(row["precision"] for row in rows):
        mine = [row for row in rows if row["precision"] == name]
        shifts, accuracies = ([row[key] for row in mine] for key in ("shift", "accuracy"))
        each = ", ".join(f"{shift:+.2f}" for shift in shifts)
        lines.append([name, each, f"{mean(shifts):+.2f} ± {stdev(shifts):.2f}", f"{mean(accuracies):.3f}"])
    return markdown(["precision", "shift by seed (SD)", "mean ± SD", "class accuracy"], lines)


def solvers(rows: list[dict[str, Any]]) -> str:
    """Relative errors, a number of steps a row."""
    names = list(dict.fromkeys(row["solver"] for row in rows))
    errors = {(row["solver"], row["steps"]): row["error"] for row in rows}
    steps = sorted({row["steps"] for row in rows})
    return markdown(
        ["steps", *names], [[str(count), *(f"{errors[name, count]:.4f}" for name in names)] for count in steps]
    )


def optimizer_cpu(runs: list[dict[str, Any]]) -> str:
    """Medians of runs: ns a parameter, and the speed relative to torch's with its least and most."""
    cells: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for row in (row for run in runs for row in run["optimizer"]):
        cells.setdefault((row["case"], row["parameters"], row["threads"]), []).append(row)
    columns = list(dict.fromkeys((size, threads) for _, size, threads in cells))
    header = ["step", *(f"{size / 1e6:.2g} M, {threads} thread{'s' * (threads > 1)}" for size, threads in columns)]

    def cell(rows: list[dict[str, Any]]) -> str:
        times, ratios = ([row[key] for row in rows] for key in ("ns_per_parameter", "times_torch"))
        return f"{median(times):.2f}, {median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"

    cases = dict.fromkeys(case for case, _, _ in cells)
    return markdown(
        header, [[case, *(cell(cells[case, size, threads]) for size, threads in columns)] for case in cases]
    )


def optimizer_host(runs: list[dict[str, Any]]) -> str:
    """ms that a step of a thousand tensors takes the host: medians of runs."""
    cells: dict[str, list[dict[str, Any]]] = {}
    for row in (row for run in runs for row in run["host"]):
        cells.setdefault(row["case"], []).append(row)
    lines = [
        [case, *(f"{median(row[key] for row in rows):.2f}" for key in ("ms", "cold_ms"))]
        for case, rows in cells.items()
    ]
    return markdown(["1160 tensors of one element", "ms", "ms, caches cold"], lines)


def optimizer_accuracy(rows: list[dict[str, Any]]) -> str:
    """Errors and gains, a number of steps a column."""
    steps = sorted({row["steps"] for row in rows})
    found = {(row["kind"], row["name"], row["steps"]): row for row in rows}
    lines = []
    for kind, name in dict.fromkeys((row["kind"], row["name"]) for row in rows):
        cells = [found[kind, name, count] for count in steps]
        lines.append([kind, name, *(f"{cell['error']:.4f}, {cell['gain']:.3f}" for cell in cells)])
    return markdown(["", "", *(f"{count} steps" for count in steps)], lines)


def experiment(lines: list[dict[str, Any]]) -> str:
    """What an experiment concludes, and its table."""
    header, *rows = lines
    chosen = EXPERIMENTS[header["experiment"]]
    said = "".join(f"- {conclusion}\n" for conclusion in chosen.conclusions(rows))
    return f"The paper: {chosen.claim}\n\n{said}\n{markdown(*chosen.table(rows))}"


def lengths(quick: list[dict[str, Any]]) -> str:
    """Seconds of every experiment, as the first line of its results says, and of one with --quick."""
    lines = []
    for name in EXPERIMENTS:
        with (RESULTS / f"experiments/{name}.jsonl").open(encoding="utf-8") as file:
            header = json.loads(next(file))
        short = next(one for one in quick if one["experiment"] == name)
        lines.append([f"`{name}`", *(f"{one['seconds']:.0f} ({one['seeds']} seeds)" for one in (header, short))])
    return markdown(["", "s", "s, --quick"], lines)


#: By name: the result file and what renders it. Tables of GPU runs are in `benchmarks.report.tables`.
TABLES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "precision": ("cpu/precision.json", precision),
    "training": ("cpu/precision.json", training),
    "optimizer_cpu": ("cpu/optimizer.jsonl", optimizer_cpu),
    "optimizer_host": ("cpu/optimizer_host.jsonl", optimizer_host),
    "optimizer_accuracy": ("cpu/optimizer_accuracy.json", optimizer_accuracy),
    "solvers": ("cpu/solvers.json", solvers),
    "lengths": ("experiments_quick.jsonl", lengths),
    **{name: (f"experiments/{name}.jsonl", experiment) for name in EXPERIMENTS},
}


def filled(page: str) -> str:
    """`page` with every marked table made anew."""

    def table(match: re.Match[str]) -> str:
        if match[2] in GPU_TABLES:
            return match[1] + rendered(match[2], newest(RESULTS)) + match[3]
        file, render = TABLES[match[2]]
        text = (RESULTS / file).read_text(encoding="utf-8")
        lines = file.endswith(".jsonl")
        return match[1] + render([*map(json.loads, text.splitlines())] if lines else json.loads(text)) + match[3]

    return _MARKED.sub(table, page)


if __name__ == "__main__":
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
