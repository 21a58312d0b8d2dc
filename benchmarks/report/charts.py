"""The report's drawings: shares of the roofline, the step by phase, histories."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from benchmarks.report.summary import percent, time
from benchmarks.report.svg import Axis, line, picture, polygon, polyline, rectangle, text, titled
from benchmarks.schema import Ceilings, Measurement, Run
from benchmarks.stats import log_ratio
from benchmarks.verdict import Difference, Verdict

__all__ = ["floor_ms", "history", "phases", "roofline"]

_WIDTH = 400.0
_PHASE_COLOURS = 8
_SIZE = 3.5


def floor_ms(measurement: Measurement, ceilings: Ceilings) -> float | None:
    """Milliseconds that it takes at the ceilings measured on the same device: of its bytes, or of its operations."""
    moved = _at(measurement.bytes, ceilings.copy_gb_s, 1e9)
    computed = _at(measurement.flops, ceilings.matmul_tflop_s, 1e12)
    return max((value for value in (moved, computed) if value is not None), default=None)


def roofline(differences: Sequence[Difference], ceilings: Ceilings) -> str | None:
    """Every measurement of ours: its time at the ceilings across, how near it gets up; an arrow from the base's.

    None where nothing was measured that has a floor.
    """
    found = [(d, floor) for d in differences if d.gates and d.new and (floor := floor_ms(d.new, ceilings))]
    found = [(d, floor) for d, floor in found if d.new and d.new.milliseconds]
    if not found:
        return None
    lowest, highest = (pick(floor for _, floor in found) for pick in (min, max))
    x, y = Axis(lowest / 1.5, highest * 1.5, 36, _WIDTH - 8, log=True), Axis(0, 1.1, 250, 8)
    parts = []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        classes = "ceiling" if tick == 1 else "grid"
        parts += [line(36, y(tick), _WIDTH - 8, y(tick), classes), text(32, y(tick) + 4, f"{tick:.0%}", "tick", "end")]
    parts += [text(x(tick), 266, time(tick), "tick", "middle") for tick in x.ticks()]
    parts.append(text(_WIDTH / 2, 284, "time at the ceilings measured on this GPU", "label", "middle"))
    for d, floor in sorted(found, key=lambda item: item[0].verdict in (Verdict.SLOWER, Verdict.FASTER)):
        parts.append(_arrow(d, floor, x(floor), y))
    return picture(_WIDTH, 292, parts, "share of the roofline that each measurement reaches, before and after")


def _arrow(d: Difference, floor: float, at: float, y: Axis) -> str:
    """The new point, and the way to it from the old one."""
    new = y(min(floor / (d.new.milliseconds if d.new and d.new.milliseconds else floor), 1.1))
    kind, old = f"v-{d.verdict.lower()}", new
    if d.base and d.base.milliseconds:
        old = y(min(floor / d.base.milliseconds, 1.1))
    before, after = (m.milliseconds if m else None for m in (d.base, d.new))
    told = f"{d.id}: {time(before)} to {time(after)} {percent(d.change)} {d.verdict}"
    if abs(new - old) < 2 * _SIZE:
        return titled(told, rectangle(at - _SIZE, new - _SIZE, 2 * _SIZE, 2 * _SIZE, f"mark {kind}"))
    tip = 2 * _SIZE if new > old else -2 * _SIZE  # up is better
    head = [(at, new), (at - _SIZE, new - tip), (at + _SIZE, new - tip)]
    return titled(told, line(at, old, at, new - tip, f"shaft {kind}"), polygon(head, f"mark {kind}"))


def phases(runs: Mapping[str, Run]) -> str | None:
    """The step, a bar for every form of every run, its phases, a mode each, side by side. None if there is none."""
    bars: list[tuple[str, list[Measurement]]] = []
    for label, run in runs.items():
        steps = [m for m in run.measurements if m.part == "step" and m.mode != "step" and m.milliseconds]
        for form in dict.fromkeys(m.form for m in steps):
            bars.append((f"{form}, {label}" if len(runs) > 1 else form, [m for m in steps if m.form == form]))
    if not bars:
        return None
    names = list(dict.fromkeys(m.mode for _, found in bars for m in found))
    longest = max(sum(m.milliseconds or 0 for m in found) for _, found in bars)
    x = Axis(0, longest, 4, _WIDTH - 4)
    parts, top = [], 14.0
    for label, found in bars:
        total = sum(m.milliseconds or 0 for m in found)
        parts.append(text(4, top, f"{label}: {time(total)}", "label"))
        at = 0.0
        for m in found:
            taken = m.milliseconds or 0
            bar = rectangle(x(at), top + 5, x(taken) - x(0) - 1, 20, f"p{names.index(m.mode) % _PHASE_COLOURS}")
            parts.append(titled(f"{m.mode}: {time(taken)}, {taken / total:.0%}", bar))
            at += taken
        top += 44
    for index, name in enumerate(names):
        left, row = 4 + index % 2 * _WIDTH / 2, top + index // 2 * 18
        parts += [rectangle(left, row - 9, 10, 10, f"p{index % _PHASE_COLOURS}"), text(left + 15, row, name, "label")]
    return picture(_WIDTH, top + (len(names) + 1) // 2 * 18, parts, "time of the step by phase")


def history(kept: Sequence[Run], name: str) -> str | None:
    """Medians of one measurement over runs with their 95 % interval, and a mark where the software changed."""
    points = [(run, m) for run in kept if (m := run.by_id.get(name)) and m.processes]
    if len(points) < 2:
        return None
    bands = [_interval(m) for _, m in points]
    width, height = 190.0, 54.0
    x, low, high = Axis(0, len(points) - 1, 3, width - 3), min(b[0] for b in bands), max(b[2] for b in bands)
    y = Axis(low - 0.02 * high, high * 1.02, height - 3, 3)
    upper = [(x(i), y(band[2])) for i, band in enumerate(bands)]
    lower = [(x(i), y(band[0])) for i, band in enumerate(bands)]
    parts = [polygon(upper + lower[::-1], "band"), polyline([(x(i), y(b[1])) for i, b in enumerate(bands)], "trend")]
    for i, ((before, _), (after, _)) in enumerate(pairwise(points), 1):
        if before.software != after.software:
            parts.append(titled(f"{after.created[:10]}: other software", line(x(i), 2, x(i), height - 2, "changed")))
    slower = [i for i, (run, _) in enumerate(points) if name in (run.regressions or [])]
    parts += [rectangle(x(i) - 2.5, y(bands[i][1]) - 2.5, 5, 5, "mark v-slower") for i in slower]
    return picture(width, height, parts, f"{name}: {len(points)} runs", "spark", stretched=True)


def _interval(measurement: Measurement) -> tuple[float, float, float]:
    """Low, middle and high of what processes found."""
    medians = [process.median for process in measurement.processes]
    reference = measurement.milliseconds or 1.0
    _, low, high = log_ratio([reference], medians, paired=False)
    return reference * math.exp(low), reference, reference * math.exp(high)


def _at(amount: float | None, rate: float | None, unit: float) -> float | None:
    return None if amount is None or rate is None else amount / unit / rate * 1e3
