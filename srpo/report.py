"""``report.html`` of a run, finished or in progress."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from srpo.best import best_step
from srpo.errors import InputError
from srpo.monitors import MONITORS, Limit, monitor_of
from srpo.page import curves, note, picture, section, side_by_side, table, write_page
from srpo.rundir import CONFIG_NAME
from srpo.runlog import read_events, read_log

__all__ = ["training_curves", "training_report"]


def training_report(directory: Path) -> Path:
    """Write ``report.html`` of a run directory from what the run has left there so far.

    Raises `InputError` when it holds no run.
    """
    file = directory / CONFIG_NAME
    if not file.is_file():
        raise InputError(f"{directory} is not a run directory (no {CONFIG_NAME})")
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    updates, looks, events = read_log(directory), _looks(directory), read_events(directory)
    sections = [_summary(config, updates, looks, events, directory)]
    if any(look["warnings"] or look["stops"] for look in looks):
        sections.append(section("Warnings", _warnings(looks)))
    if looks:
        sections.append(section("Samples", *_samples(directory, looks)))
        sections.append(section("Monitors", _monitors(looks)))
    if updates:
        sections.append(section("Training", side_by_side(training_curves(updates))))
        sections.append(section("Time", _times(updates, looks)))
    sections += [section("Data", part) for part in _data(events)]
    sections.append(section("Config", f"<pre>{html.escape(file.read_text(encoding='utf-8'))}</pre>"))
    return write_page(directory / "report.html", f"SRPO run {directory.resolve().name}", sections)


def training_curves(records: Sequence[Mapping]) -> list[str]:
    """Loss, score and phase-time curves of a run's update records."""
    steps = [record["step"] for record in records]

    def group(key: str) -> dict[str, tuple[list, list]]:
        names = dict.fromkeys(name for record in records for name in record[key])
        return {name: (steps, [record[key].get(name) for record in records]) for name in names}

    return [
        curves("Loss", "update", group("losses")),
        curves("Score by branch", "update", group("scores")),
        curves("Gradient norm before clipping", "update", {"norm": (steps, [r["grad_norm"] for r in records])}),
        curves("Seconds by phase", "update", group("seconds")),
    ]


def _looks(directory: Path) -> list[dict[str, Any]]:
    """Validation records that compare with the last one."""
    looks = read_log(directory, "validation")
    return [look for look in looks if look["set"] == looks[-1]["set"]]


def _summary(
    config: Mapping[str, Any],
    updates: Sequence[Mapping],
    looks: Sequence[Mapping],
    events: Sequence[Mapping],
    directory: Path,
) -> str:
    done, total = max((record["step"] for record in updates), default=0), config["srpo"]["updates"]
    last = events[-1] if events else {"event": "start"}
    state, bad = f"{done} of {total} updates so far", False
    if last["event"] == "end":
        state = f"finished: {done} of {total} updates"
    elif last["event"] == "stop" and last.get("limits"):
        state, bad = f"stopped at update {last['step']} by the limit of {', '.join(last['limits'])}", True
    elif last["event"] == "stop":
        state = f"stopped at update {last['step']} by {last['signal']}; go on with --resume"
    parts = [note(state, bad=bad)]
    if (best := best_step(directory)) is not None:
        parts.append(note(f"Best checkpoint by {config['validation']['best']}: update {best}."))
    if len(looks) > 1:
        first, now = looks[0]["values"], looks[-1]["values"]
        rows = [
            [_title(name), monitor_of(name).unit, _number(first[name]), _number(value)]
            for name, value in now.items()
            if name in first
        ]
        parts.append(table(["monitor", "unit", "step 0", f"update {looks[-1]['step']}"], rows))
    return "\n".join(parts)


def _warnings(looks: Sequence[Mapping]) -> str:
    """Every limit that was passed: in which updates, and how far at the last of them."""
    passed: dict[tuple[str, str], list[tuple[int, Mapping]]] = {}
    for look in looks:
        for kind, key in (("stop", "stops"), ("warn", "warnings")):
            for one in look[key]:
                passed.setdefault((kind, one["monitor"]), []).append((look["step"], one))
    rows = []
    for (kind, name), found in passed.items():
        one = found[-1][1]
        steps = ", ".join(str(step) for step, _ in found)
        values = [_number(one["start"]), _number(one["value"]), one["limit"]]
        worst = f"{one['prompt']}: {_number(one['prompt_start'])} to {_number(one['prompt_value'])}"
        rows.append([_title(name), kind, steps, *values, worst])
    return table(["monitor", "", "updates", "step 0", "last value", "limit", "worst prompt"], rows, text=True)


def _samples(directory: Path, looks: Sequence[Mapping]) -> list[str]:
    """The grids of the last look, and of the best one if it is another."""
    shown = {looks[-1]["step"]: ""}
    if (best := best_step(directory)) is not None and best not in shown:
        shown[best] = ", the best"
    parts = []
    for step, remark in shown.items():
        pairs = ": of each pair step 0 is on the left" if step else ""
        for file in sorted((directory / "samples").glob(f"step-{step:06d}*.png")):
            size = file.stem.removeprefix(f"step-{step:06d}").removeprefix("-")
            parts.append(picture(file, f"update {step}{remark}{f', {size}' if size else ''}{pairs}"))
    return parts


def _monitors(looks: Sequence[Mapping]) -> str:
    """A curve for each monitor, with step 0 and the limits around it."""
    limits = looks[-1]["limits"]
    names = list(dict.fromkeys(name for look in looks for name in look["values"]))
    figures = []
    for kind, monitor in MONITORS.items():
        of = [name for name in names if name.partition("@")[0] == kind]
        groups = [of] if kind == "drift" else [[name] for name in of]  # noise levels belong in one picture
        for group in filter(None, groups):
            series = {name: _points(looks, name) for name in group}
            start = series[group[0]][1][0]
            levels = {"step 0": [start]}
            for key in ("warn", "stop"):
                if kind in limits[key]:
                    width = Limit.parse(limits[key][kind]).width(start)
                    signs = {"rise": [1], "fall": [-1], "either": [-1, 1]}[monitor.harm]
                    levels[key] = [start + sign * width for sign in signs]
            title = monitor.title if kind == "drift" else _title(group[0])
            figures.append(curves(f"{title} ({monitor.unit})", "update", series, levels=levels))
    return side_by_side(figures)


def _points(looks: Sequence[Mapping], name: str) -> tuple[list[int], list[float]]:
    having = [look for look in looks if name in look["values"]]
    return [look["step"] for look in having], [look["values"][name] for look in having]


def _times(updates: Sequence[Mapping], looks: Sequence[Mapping]) -> str:
    """Seconds of every phase: the mean, the slowest and the share of all."""
    phases = list(dict.fromkeys(name for record in updates for name in record["seconds"]))
    spent = {name: [record["seconds"].get(name, 0.0) for record in updates] for name in phases}
    if looks:
        spent["validation"] = [look["seconds"] for look in looks]
    total = sum(map(sum, spent.values())) or 1.0
    rows = [
        [
            name,
            f"{sum(values) / len(values):.2f}",
            f"{max(values):.2f}",
            f"{sum(values):.1f}",
            f"{sum(values) / total:.0%}",
        ]
        for name, values in spent.items()
    ]
    return table(["phase", "mean s", "slowest s", "all s", "share"], rows)


def _data(events: Sequence[Mapping]) -> list[str]:
    """What the data of the run is, and what is wrong with it."""
    found = [event for event in events if event["event"] == "data"]
    if not found:
        return []
    rows = []
    for file in found[-1]["files"]:
        faults = [f"{count} {kind}" for kind, count in file.items() if kind not in ("file", "count", "lines") and count]
        rows.append([file["file"], str(file["count"]), ", ".join(faults) or "none"])
    parts = [table(["file", "usable", "faults"], rows, text=True)]
    bad = found[-1]["bad_images"]
    if bad:
        listed = "".join(f"<li>{html.escape(line)}</li>" for line in bad[:20])
        parts.append(note(f"{len(bad)} images cannot be used and are skipped:") + f"<ul>{listed}</ul>")
    return ["\n".join(parts)]


def _title(name: str) -> str:
    """The title of a measurement, with its size or noise level."""
    at = name.partition("@")[2]
    return monitor_of(name).title + (f", {at}" if at else "")


def _number(value: float) -> str:
    return f"{value:.4g}"
