"""Numbers of the rows that `srpo.experiments.arms.trained` yields: one of every seed, in the order of seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from statistics import fmean

from srpo import page
from srpo.experiments.experiment import Row, interval, measured

__all__ = ["cost_to_reach", "crossing", "curve_figure", "ends_table", "gained", "last", "surely"]


def last(rows: Sequence[Row], arm: str, key: str) -> list[float]:
    """What each seed's last look saw; NaN where the training failed."""
    ends = {row["seed"]: row for row in rows if row["arm"] == arm}
    return [ends[seed].get(key, math.nan) for seed in sorted(ends)]


def gained(rows: Sequence[Row], arm: str, key: str) -> list[float]:
    """What each seed's last look saw more of than its first."""
    starts = {row["seed"]: row for row in reversed(rows) if row["arm"] == arm}
    return [end - starts[seed][key] for seed, end in zip(sorted(starts), last(rows, arm, key), strict=True)]


def cost_to_reach(rows: Sequence[Row], arm: str, target: float, cost: str = "forwards") -> list[float]:
    """What it cost each seed until `moved` was `target`; infinite if it never was."""
    found = []
    for seed in sorted({row["seed"] for row in rows if row["arm"] == arm}):
        looks = [row for row in rows if row["arm"] == arm and row["seed"] == seed and "moved" in row]
        found.append(crossing(looks, cost, lambda look: look["moved"] - target))
    return found


def crossing(looks: Sequence[Row], key: str, height: Callable[[Row], float]) -> float:
    """The value of `key` where `height` first gets up to 0, on the line between two looks; infinite: it never does."""
    for before, after in pairwise(looks):
        low, high = height(before), height(after)
        if low < 0 <= high:
            return before[key] - low / (high - low) * (after[key] - before[key])
    return math.inf


def surely(values: Sequence[float]) -> int:
    """1 or -1 where the 95 % interval of values' mean is above or below 0; else 0."""
    middle, half = interval(values)
    return 0 if not abs(middle) > half else 1 if middle > 0 else -1


def ends_table(
    rows: Sequence[Row], arms: Sequence[str], columns: Mapping[str, str], digits: int = 2
) -> tuple[list[str], list[list[str]]]:
    """Last looks, an arm a line; `columns`: key of a row to its heading."""
    lines = [[arm, *(measured(last(rows, arm, key), digits) for key in columns)] for arm in arms]
    return ["", *columns.values()], lines


def curve_figure(rows: Sequence[Row], arms: Sequence[str], key: str, title: str, over: str = "update") -> str:
    """Means over seeds of every look, over updates, forwards or seconds; up to the first that a seed lacks."""
    series = {}
    for arm in arms:
        of = [row for row in rows if row["arm"] == arm]
        count = len({row["seed"] for row in of})
        points = []
        for update in sorted({row["update"] for row in of}):
            looks = [row for row in of if row["update"] == update and key in row]
            if len(looks) < count:
                break
            points.append((fmean(look[over] for look in looks), fmean(look[key] for look in looks)))
        series[arm] = ([x for x, _ in points], [y for _, y in points])
    return page.curves(title, over, series)
