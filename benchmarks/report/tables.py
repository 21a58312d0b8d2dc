"""Runs as tables of Markdown, for docs and README."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.report.quick import share
from benchmarks.report.summary import markdown, short, time
from benchmarks.schema import Measurement, Run, read

__all__ = ["TABLES", "newest", "rendered"]


def newest(results: Path) -> list[Run]:
    """Of every GPU in `results`, the last run of the quick profile on an unchanged checkout."""
    folders = (
        folder for folder in sorted(results.iterdir()) if folder.is_dir() and folder.name not in ("cpu", "cache")
    )
    found = [[read(path) for path in sorted(folder.glob("*.json"))] for folder in folders]
    clean = ([run for run in runs if run.tier == "gpu" and run.git.dirty is False] for runs in found)
    return [max(runs, key=lambda run: run.created) for runs in clean if runs]


def rendered(name: str, runs: Sequence[Run]) -> str:
    """The table called `name`, a GPU after another; what nothing is known of is said not to be measured yet."""
    tables = []
    for run in runs:
        table = TABLES[name](run)
        if table:
            tables.append(
                f"{run.device.name}, `{short(run)}`, {run.created[:10]}, torch {run.software.torch}:\n\n{table}"
            )
    return "\n".join(tables) or "Not measured yet: `make gpu` on a machine with an NVIDIA GPU does.\n"


def _operators(run: Run) -> str:
    """Ours at each operator's largest shape, against eager and compiled."""
    ours = [m for m in _timed(run, "ops") if m.form == "ours"]
    largest = {(m.name.partition(" [")[0], m.mode): m for m in sorted(ours, key=lambda m: m.bytes or 0) if m.bytes}
    rows = []
    for m in sorted(largest.values(), key=ours.index):
        times = [_times(run, m, form) for form in ("eager", "compiled", "liger")]
        rows.append([m.name, m.mode, time(m.milliseconds), *times, share(run, m)])
    header = ["operator", "", "ours", "eager takes", "compiled takes", "Liger takes", "of copy bandwidth"]
    return markdown(header, rows) if rows else ""


def _models(run: Run) -> str:
    rows = [
        [m.name, m.mode, time(m.milliseconds), f"{m.tflop_s:.0f}" if m.tflop_s else "", f"{m.peak_gb or 0:.1f}"]
        for part in ("flux", "vae")
        for m in _timed(run, part)
    ]
    return markdown(["model", "", "time", "TFLOP/s", "peak GB"], rows) if rows else ""


def _optimizers(run: Run) -> str:
    rows = [
        [m.name, time(m.milliseconds), f"{m.details.get('parameters', 0) / 1e9:.2f}", share(run, m), f"{m.peak_gb:.1f}"]
        for m in _timed(run, "optim")
    ]
    return markdown(["step", "time", "10^9 parameters", "of copy bandwidth", "peak GB"], rows) if rows else ""


def _step(run: Run) -> str:
    """A phase a row, a form a column."""
    found = list(_timed(run, "step"))
    forms, modes = (list(dict.fromkeys(getattr(m, key) for m in found)) for key in ("form", "mode"))
    times = {(m.mode, m.form): time(m.milliseconds) for m in found}
    rows = [[mode, *(times.get((mode, form), "") for form in forms)] for mode in modes]
    return markdown(["phase", *forms], rows) if rows else ""


#: By the name that a page gives between its markers.
TABLES: dict[str, Callable[[Run], str]] = {
    "gpu_operators": _operators,
    "gpu_models": _models,
    "gpu_optimizers": _optimizers,
    "gpu_step": _step,
}


def _timed(run: Run, part: str) -> Iterator[Measurement]:
    return (m for m in run.measurements if m.part == part and m.status == "ok")


def _times(run: Run, ours: Measurement, form: str) -> str:
    other = run.by_id.get(replace(ours, form=form).id)
    if other is None or other.status != "ok" or not other.milliseconds or not ours.milliseconds:
        return ""
    return f"{other.milliseconds / ours.milliseconds:.2f} x"
