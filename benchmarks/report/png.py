"""Pictures of a run for a README, by matplotlib."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from benchmarks.report.quick import PEERS
from benchmarks.schema import Measurement, Run

__all__ = ["pictures"]

_COLOURS = {"ours": "#3b6fb6", "eager": "#9aa5b1", "compiled": "#e08a2e", "liger": "#4f9d69"}


def pictures(run: Run, folder: Path) -> list[Path]:
    """How many times as fast as eager every form is at the operator's largest shape, a picture a mode."""
    folder.mkdir(parents=True, exist_ok=True)
    modes = dict.fromkeys(m.mode for m in run.measurements if m.part == "ops" and m.form == "eager" and m.processes)
    return [_speedups(run, mode, folder / f"{mode.replace('+', '_')}.png") for mode in modes]


def _speedups(run: Run, mode: str, path: Path) -> Path:
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    found = run.by_id
    timed = [m for m in run.measurements if m.part == "ops" and m.mode == mode and m.form == "eager" and m.processes]
    largest = {m.name.partition(" [")[0]: m for m in sorted(timed, key=lambda m: m.bytes or 0)}
    eager = sorted(largest.values(), key=timed.index)
    figure = Figure(figsize=(8, 1.2 + 0.32 * len(eager)), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    forms = [form for form in ("ours", *PEERS) if form != "eager"]
    for offset, form in enumerate(forms):
        times = [(index, _times(m, found.get(replace(m, form=form).id))) for index, m in enumerate(eager)]
        drawn = [(index - 0.25 + 0.25 * offset, value) for index, value in times if value is not None]
        if drawn:
            places, values = zip(*drawn, strict=True)
            axes.barh(places, values, height=0.25, label=form, color=_COLOURS[form])
    axes.axvline(1, color=_COLOURS["eager"], linewidth=1)
    axes.set_yticks(range(len(eager)), [m.name for m in eager], fontsize=7)
    axes.set_ylim(len(eager) - 0.5, -0.5)
    axes.set_title(f"{mode}, times as fast as eager, {run.device.name}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)
    return path


def _times(eager: Measurement, other: Measurement | None) -> float | None:
    if other is None or other.milliseconds is None or eager.milliseconds is None:
        return None
    return eager.milliseconds / other.milliseconds
