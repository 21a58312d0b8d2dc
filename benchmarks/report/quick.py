"""A run in a few lines, for the terminal: what ours takes, and how many times faster than what it is held against."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from benchmarks.report.summary import short, time
from benchmarks.schema import Measurement, Run

__all__ = ["PEERS", "quick_table", "share"]

PEERS = ("eager", "compiled", "liger")


def quick_table(run: Run) -> str:
    """Ours, measurement by measurement; then what failed or was not measured, and totals."""
    found = run.by_id
    ours = [m for m in run.measurements if m.form == "ours" and m.processes]
    header = ["", *(f"{peer}/ours" for peer in PEERS), "of copy"]
    lines = [f"{run.device.name}, {short(run)}", _line("", header)] if ours else []
    for each in ours:
        times = (_times(each, found.get(replace(each, form=peer).id)) for peer in PEERS)
        lines.append(_line(f"{each.name}, {each.mode}", [time(each.milliseconds), *times, share(run, each)]))
    lines += [f"{m.status}: {m.id}: {m.error}" for m in run.measurements if m.status in ("error", "contaminated")]
    lines += [f"{count} {reason}" for reason, count in Counter(_skipped(run)).items()]
    lines += [str(finding) for finding in run.findings]
    totals: Counter[str] = Counter(m.status for m in run.measurements)
    totals.update("error" if each.error else "with static figures" for each in run.static)
    return "\n".join([*lines, ", ".join(f"{count} {status}" for status, count in sorted(totals.items()))])


def share(run: Run, each: Measurement) -> str:
    """Its rate over the copy bandwidth measured in the same run."""
    rate, ceiling = each.gb_s, run.ceilings.copy_gb_s
    return "" if rate is None or ceiling is None else f"{rate / ceiling:.0%}"


def _skipped(run: Run) -> list[str]:
    return [m.error or "skipped" for m in run.measurements if m.status == "skipped"]


def _line(name: str, cells: list[str]) -> str:
    return f"{name[:63]:64}" + "".join(f"{cell:>14}" for cell in cells)


def _times(ours: Measurement, other: Measurement | None) -> str:
    if other is None or other.milliseconds is None or ours.milliseconds is None:
        return ""
    return f"{other.milliseconds / ours.milliseconds:.2f}x"
