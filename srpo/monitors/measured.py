"""Measurements of one step, their change from step 0, and the limits they pass."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from srpo.monitors.catalog import Limit, harm_of, monitor_of

__all__ = ["Breach", "Measured", "breaches", "mean_by_prompt", "passes"]

#: Of each monitor its value for each prompt that it could be measured on; their mean is the monitor's.
Measured = Mapping[str, Mapping[str, float]]


def mean_by_prompt(rows: Mapping[int, Mapping[str, float]], prompts: list[str]) -> dict[str, dict[str, float]]:
    """`Measured` from the values of single images, of which image n shows ``prompts[n]``."""
    found: dict[str, dict[str, list[float]]] = {}
    for index, values in sorted(rows.items()):
        for name, value in values.items():
            found.setdefault(name, {}).setdefault(prompts[index], []).append(value)
    return {name: {prompt: fmean(values) for prompt, values in of.items()} for name, of in found.items()}


@dataclass(frozen=True)
class Breach:
    """A monitor that changed more than its limit allows."""

    monitor: str
    start: float
    value: float
    limit: Limit
    prompt: str  # the one that changed most for the worse
    prompt_start: float
    prompt_value: float

    def __str__(self) -> str:
        monitor = monitor_of(self.monitor)
        worst = f"worst for {self.prompt!r}, {self.prompt_start:.4g} to {self.prompt_value:.4g}"
        return (
            f"{self.monitor} ({monitor.title.lower()}, {monitor.unit}) went from {self.start:.4g} to {self.value:.4g}, "
            f"more than {self.limit} away; {worst}"
        )


def passes(name: str, value: float, start: float, limit: Limit) -> bool:
    """Whether a measurement changed more than `limit` allows in the way that does harm; NaN always has."""
    return not harm_of(name, value - start) <= limit.width(start)


def breaches(now: Measured, start: Measured, limits: Mapping[str, Limit]) -> list[Breach]:
    """The monitors of `now` that pass their limit, by monitor."""
    found = []
    for name, of in now.items():
        limit = limits.get(name.partition("@")[0])
        if limit is None or name not in start:
            continue
        value, first = fmean(of.values()), fmean(start[name].values())
        if passes(name, value, first, limit):
            harms = {prompt: harm_of(name, of[prompt] - start[name][prompt]) for prompt in of}
            worst = next((prompt for prompt in harms if math.isnan(harms[prompt])), max(harms, key=harms.__getitem__))
            found.append(Breach(name, first, value, limit, worst, start[name][worst], of[worst]))
    return found
