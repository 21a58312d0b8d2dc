"""Statistics of few processes: quantiles, and how far a ratio can be told, by resampling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

import numpy as np

__all__ = ["log_ratio", "process_noise", "quantile"]

_RESAMPLES = 4000
_CONFIDENCE = 0.95


def quantile(values: Sequence[float], q: float) -> float:
    return float(np.quantile(values, q))


def log_ratio(base: Sequence[float], new: Sequence[float], *, paired: bool) -> tuple[float, float, float]:
    """Mean of log(new) less that of log(base), and the ends of its 95 % interval.

    Of the medians of fresh processes, which are what is resampled: samples within one share its clocks and addresses.
    `paired` keeps the i-th of `base` with the i-th of `new`, which ran next to it, so that drift cancels. The same
    numbers give the same interval: the resampling is seeded.
    """
    before, after = np.log(base), np.log(new)
    random = np.random.default_rng(0)

    def resampled(values: np.ndarray) -> np.ndarray:
        return values[random.integers(len(values), size=(_RESAMPLES, len(values)))].mean(1)

    drawn = resampled(after - before) if paired else resampled(after) - resampled(before)
    low, high = np.quantile(drawn, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    return float(after.mean() - before.mean()), float(low), float(high)


def process_noise(medians: Sequence[float]) -> tuple[float, float]:
    """Standard deviation of the log medians of processes that ran one after the other, in all and between neighbours.

    That between neighbours (of differences, over the root of two) is what is left where drift cancels.
    """
    logs = [math.log(value) for value in medians]
    steps = [(after - before) for before, after in zip(logs[::2], logs[1::2], strict=False)]
    return stdev(logs), math.sqrt(fmean(step**2 for step in steps) / 2)
