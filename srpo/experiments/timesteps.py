"""Gradients from noisy levels only, from clean ones only, and from all: which training is hacked most?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean

from srpo.assets import TINY
from srpo.config import TrainConfig, load_config
from srpo.errors import InputError
from srpo.experiments.arms import Arm, shown, trained
from srpo.experiments.experiment import Conclusion, Experiment, Row, Setting, measured
from srpo.experiments.looks import cost_to_reach, curve_figure, gained, last, surely
from srpo.experiments.taste import TastefulReward, slanted, warm
from srpo.images import panels
from srpo.rewards import Reward
from srpo_kernels import RELATIVE_FORMS

__all__ = ["Timesteps"]

ALGORITHMS = {"direct_align": ("algorithm=direct_align", "direct_align.control=true"), "srpo": ()}
EARLY, LATE, ALL = PARTS = ("early", "late", "all")
TASTES = {"slant": "slant, SD", "lab_b": "blue to yellow, b*"}  # what tells of a planted taste; digits have both


class Timesteps(Experiment):
    """The noisiest quarter of the schedule, the cleanest, and all of it, on a reward with planted tastes."""

    name = "timesteps"
    claim = (
        "trained on the last quarter of timesteps only, images were the most hacked in 77 % of the comparisons; on the "
        "first quarter and on all timesteps, in the other 23 %."
    )
    seeds = (5, 2)

    def measure(self, setting: Setting, out: Path, say: Callable[[str], None]) -> Iterator[Row]:
        arms = [_arm(setting, algorithm, part) for algorithm in ALGORITHMS for part in PARTS]
        yield from trained(arms, setting, out, say)
        panels(shown(arms, out, 10), 10, stacked=True).save(out / f"{self.name}.png")

    def table(self, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
        tastes = _tastes(rows)
        header = ["", "moved", *(f"{TASTES[taste]}: per moved" for taste in tastes)]
        header += ["score, plain prompt: gained", "kept", "diversity", "sharpness"]
        lines = []
        for arm in (_name(algorithm, part) for algorithm in ALGORITHMS for part in PARTS):
            moved, sharp = last(rows, arm, "moved"), last(rows, arm, "sharpness")
            drifts = [_ratios(gained(rows, arm, taste), moved) for taste in tastes]
            first = [end - more for end, more in zip(sharp, gained(rows, arm, "sharpness"), strict=True)]
            ends = [last(rows, arm, key) for key in ("kept", "diverse")]
            columns = [moved, *drifts, gained(rows, arm, "alignment"), *ends, _ratios(sharp, first)]
            lines.append([arm, *map(measured, columns)])
        return header, lines

    def curves(self, rows: Sequence[Row]) -> list[str]:
        keys = {"moved": "moved", **{taste: TASTES[taste] for taste in _tastes(rows)}, "kept": "kept"}
        return [
            curve_figure(rows, [_name(algorithm, part) for part in PARTS], key, f"{algorithm}: {title}")
            for algorithm in ALGORITHMS
            for key, title in keys.items()
        ]

    def conclusions(self, rows: Sequence[Row]) -> list[Conclusion]:
        found = {
            (algorithm, taste): drifts
            for algorithm in ALGORITHMS
            for taste in _tastes(rows)
            if (drifts := _drifts(rows, algorithm, taste))
        }
        if not found:
            return []
        seeds = [
            [max(parts) == parts[PARTS.index(LATE)] for parts in zip(*drifts.values(), strict=True)]
            for drifts in found.values()
        ]
        shares = [fmean(comparisons) for comparisons in zip(*seeds, strict=True)]
        text = (
            f"at equal moved, training on the last quarter alone drifted most in {measured(shares)} of the comparisons "
            f"({len(found)} a seed, of algorithms and tastes; chance: 0.33, the paper: 0.77)."
        )
        above = [share - 1 / len(PARTS) for share in shares]
        return [Conclusion(text, surely(above) > 0), *(_compared(drifts, *of) for of, drifts in found.items())]


def _arm(setting: Setting, algorithm: str, part: str) -> Arm:
    """Raises `InputError` when the recipe's schedule has no quarters, or its reward is not relative."""
    quick = ("srpo.updates=4",) if setting.quick else ()
    config = load_config(setting.recipe, [*quick, *setting.overrides])
    if config.srpo.form not in RELATIVE_FORMS:
        known = ", ".join(RELATIVE_FORMS)
        raise InputError(f"experiment timesteps needs srpo.form to be one of {known}, got {config.srpo.form}")
    overrides = (*quick, *ALGORITHMS[algorithm], *_window(config, part))
    reward = partial(_tasteful, digits=config.model.path == TINY, form=config.srpo.form)
    return Arm(_name(algorithm, part), overrides, every=4, reward=reward)


def _name(algorithm: str, part: str) -> str:
    return f"{algorithm}, {part}"


def _window(config: TrainConfig, part: str) -> tuple[str, str]:
    """A part of the schedule, crossed in steps of the recipe's length."""
    objective, steps = config.srpo, config.srpo.schedule_steps
    if steps < 8:
        raise InputError(f"experiment timesteps needs srpo.schedule_steps of at least 8, for quarters; got {steps}")
    quarter = steps // 4
    window = {EARLY: (1, quarter), LATE: (steps - quarter, steps), ALL: (1, steps)}[part]
    recipe, own = (of.sigmas() for of in (objective, replace(objective, window=window)))
    step = (1 - objective.groundtruth_ratio) * (recipe[0] - recipe[-1])
    return f"srpo.window={list(window)}", f"srpo.groundtruth_ratio={max(0.0, 1 - step / (own[0] - own[-1]))}"


def _tasteful(reward: Reward, *, digits: bool, form: str) -> Reward:
    """`reward` with a taste for warm colours, and of digits also one for slanted shapes."""
    coloured = TastefulReward(reward, warm, 1.0, form)
    return TastefulReward(coloured, slanted, 1.0, form) if digits else coloured


def _tastes(rows: Sequence[Row]) -> list[str]:
    return [taste for taste in TASTES if taste in rows[0]]


def _ratios(values: Sequence[float], of: Sequence[float]) -> list[float]:
    return [value / other for value, other in zip(values, of, strict=True)]


def _drifts(rows: Sequence[Row], algorithm: str, taste: str) -> dict[str, list[float]]:
    """Of each part the distance along a taste, of every seed, at 0.9 times the way that the slowest training went.

    Nothing where one of them went nowhere.
    """
    arms = {part: _name(algorithm, part) for part in PARTS}
    ways = [moved for arm in arms.values() for moved in last(rows, arm, "moved")]
    drifts: dict[str, list[float]] = {}
    if not all(moved > 0 for moved in ways):
        return drifts
    target = 0.9 * min(ways)
    for part, arm in arms.items():
        starts = [row[taste] for row in rows if row["arm"] == arm and row["update"] == 0]
        ends = cost_to_reach(rows, arm, target, taste)
        drifts[part] = [abs(end - start) for end, start in zip(ends, starts, strict=True)]
    return drifts


def _compared(drifts: dict[str, list[float]], algorithm: str, taste: str) -> Conclusion:
    """How much further late drifts than the others, seed by seed."""
    others = zip(drifts[EARLY], drifts[ALL], strict=True)
    more = [late - max(other) for late, other in zip(drifts[LATE], others, strict=True)]
    said = ", ".join(f"{part} {measured(drifts[part])}" for part in PARTS)
    text = (
        f"{algorithm}, drift along {TASTES[taste]} at equal moved: {said}; late is {measured(more)} above the others."
    )
    return Conclusion(text, None)
