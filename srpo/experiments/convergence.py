"""What it costs each algorithm to move the model as far as SRPO's recipe does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from srpo.config import load_config
from srpo.experiments.algorithms import ALGORITHMS, algorithm_arm
from srpo.experiments.arms import Arm, shown, trained
from srpo.experiments.experiment import Conclusion, Experiment, Row, Setting, interval, measured
from srpo.experiments.looks import cost_to_reach, curve_figure, last, surely
from srpo.images import panels

__all__ = ["Convergence"]

SRPO, *OTHERS = ALGORITHMS
RECIPE = "recipe"  # SRPO at the recipe's own rate: how far it goes is the target
RATES = (2.0, 4.0, 8.0)  # tried, in the recipe's
USUAL = 4.0  # where none was tried
ROOM = 2  # as many updates at a rate as the recipe's would need to get this many times as far
#: Of table 1; its DRaFT is DRaFT-LV.
HOURS = {SRPO: 5.3, "direct_align": 16.0, "refl": 16.0, "draft_lv": 24.0, "dancegrpo": 480.0}
KEPT, DIVERSE = 0.9, 0.8  # of the first look's: what images must be past the target, for a rate to be of use
_IMAGES = 50


class Convergence(Experiment):
    """Every algorithm at the best of a few learning rates, which are tried on a seed of their own."""

    name = "convergence"
    claim = (
        "on H20s, SRPO takes 5.3 hours, Direct-Align and ReFL 16, DRaFT-LV 24 and DanceGRPO 480 "
        "(arXiv 2509.06942, table 1); SRPO is 75 times as efficient as DanceGRPO."
    )
    seeds = (3, 2)

    def measure(self, setting: Setting, out: Path, say: Callable[[str], None]) -> Iterator[Row]:
        updates = load_config(setting.recipe, setting.overrides).srpo.updates

        def arm(algorithm: str, name: str, rate: float, *overrides: str) -> Arm:
            count = math.ceil(ROOM * updates / rate)
            return algorithm_arm(algorithm, setting, name, count, *overrides, rate=rate, every=1)

        seed = f"run.seed={setting.seeds}"  # the first that is not reported
        trials = [algorithm_arm(SRPO, setting, RECIPE, updates, seed)]
        for name, rate in ((name, rate) for name in ALGORITHMS for rate in RATES if not setting.quick):
            trials.append(arm(name, _trial(name, rate), rate, seed))
        tried = list(trained(trials, replace(setting, overrides=(), seeds=1), out / "trials", say, images=_IMAGES))
        yield from tried
        arms = [arm(name, name, _rate(tried, name)) for name in ALGORITHMS]
        yield from trained(arms, replace(setting, overrides=()), out, say, images=_IMAGES)
        panels(shown(arms, out, 20), 10, stacked=True).save(out / f"{self.name}.png")

    def table(self, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
        header = ["", "rate", "forwards", "seconds", "forwards, SRPO's = 1", "seconds, SRPO's = 1", "paper's hours"]
        lines = []
        for name in ALGORITHMS:
            costs = (
                measured(cost_to_reach(rows, name, _target(rows), cost), digits)
                for cost, digits in (("forwards", 0), ("seconds", 1))
            )
            ratios = (_times(rows, name, cost)[0] for cost in ("forwards", "seconds"))
            hours = f"{HOURS[name] / HOURS[SRPO]:.1f}" if name in HOURS else ""
            lines.append([name, f"{_rate(rows, name):g}", *costs, *ratios, hours])
        return header, lines

    def curves(self, rows: Sequence[Row]) -> list[str]:
        return [
            curve_figure(rows, list(ALGORITHMS), "moved", "moved", "forwards"),
            curve_figure(rows, [SRPO, *OTHERS[:-1]], "moved", "moved, all but DanceGRPO", "forwards"),
            curve_figure(rows, list(ALGORITHMS), "kept", "kept", "forwards"),
            curve_figure(rows, list(ALGORITHMS), "diverse", "diversity", "forwards"),
        ]

    def conclusions(self, rows: Sequence[Row]) -> list[Conclusion]:
        return [one for name in OTHERS for one in _conclusions(rows, name)]


def _conclusions(rows: Sequence[Row], name: str) -> Iterator[Conclusion]:
    """Whether an algorithm costs more than SRPO; and whether as much more as the paper's hours are."""
    (forwards, ratios), (seconds, _) = _times(rows, name, "forwards"), _times(rows, name, "seconds")
    text = f"{name}: {forwards} times SRPO's forwards until moved by {_target(rows):.2f}, {seconds} times its seconds."
    yield Conclusion(text, surely([one - 1 for one in ratios]) > 0 if name in HOURS else None)
    if name in HOURS:
        paper = HOURS[name] / HOURS[SRPO]
        middle, half = interval(ratios)
        yield Conclusion(f"{name}: {paper:.1f} times SRPO's hours in the paper.", abs(middle - paper) <= half)


def _times(rows: Sequence[Row], name: str, cost: str) -> tuple[str, list[float]]:
    """A cost until the target in SRPO's: as text, and of each seed; at least, where a seed did not get there."""
    costs, spent = cost_to_reach(rows, name, _target(rows), cost), last(rows, name, cost)
    pairs = zip(costs, spent, cost_to_reach(rows, SRPO, _target(rows), cost), strict=True)
    ratios = [min(mine, most) / other for mine, most, other in pairs]
    return ("" if all(map(math.isfinite, costs)) else "more than ") + measured(ratios), ratios


def _target(rows: Sequence[Row]) -> float:
    return last(rows, RECIPE, "moved")[0]


def _trial(name: str, rate: float) -> str:
    return f"{name} x {rate:g}"


def _rate(rows: Sequence[Row], name: str) -> float:
    """The rate of the fewest forwards until the target, of those that leave images intact there if any does."""
    target, costs = _target(rows), {}
    for rate in RATES:
        looks = [row for row in rows if row["arm"] == _trial(name, rate) and "moved" in row]
        there = next((row for row in looks if row["moved"] >= target), None)
        if there is not None:
            broken = there["kept"] < KEPT * looks[0]["kept"] or there["diverse"] < DIVERSE
            costs[rate] = (broken, *cost_to_reach(rows, _trial(name, rate), target))
    return min(costs, key=costs.__getitem__, default=USUAL)
