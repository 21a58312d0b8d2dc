"""Every algorithm trained far beyond its recipe: how far does it get before images break, and who warns of it?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from srpo.config import load_config
from srpo.experiments.algorithms import algorithm_arm
from srpo.experiments.arms import Arm, shown, trained
from srpo.experiments.experiment import Conclusion, Experiment, Row, Setting, measured
from srpo.experiments.looks import crossing, curve_figure, last, surely
from srpo.images import panels
from srpo.monitors import MONITORS, harm_of
from srpo.monitors.config import ValidationConfig

__all__ = ["Hacking"]

#: Learning rates in the recipe's. Policy gradients are small: DanceGRPO's is what the experiment convergence takes.
RATES = {"srpo": 2.0, "direct_align": 2.0, "refl": 2.0, "draft": 2.0, "dancegrpo": 4.0}
SRPO, *OTHERS = RATES
LENGTH = 10  # in the recipe: updates times learning rate
#: Images are broken that lost a tenth of what they show of their prompt, or a fifth of their diversity.
LOSSES = {"kept": 0.1, "diverse": 0.2}
WARNINGS = ValidationConfig().warnings()
_IMAGES = 50


class Hacking(Experiment):
    """Ten times the recipe, on a quarter of its batch."""

    name = "hacking"
    claim = (
        "optimising the whole trajectory, and for a relative reward, avoids reward hacking. Its authors found 15 to 25 "
        "updates best, and that images drift beyond them."
    )
    seeds = (3, 2)

    def measure(self, setting: Setting, out: Path, say: Callable[[str], None]) -> Iterator[Row]:
        config = load_config(setting.recipe, setting.overrides)
        images = max(1, config.srpo.batch_size // 4)
        smaller = (f"srpo.batch_size={images}", f"run.micro_batch={math.gcd(images, config.run.micro_batch)}")
        small = replace(setting, overrides=(*smaller, *setting.overrides))
        length = config.srpo.updates * LENGTH // (4 if setting.quick else 1)

        def arm(name: str, rate: float) -> Arm:
            count = math.ceil(length / rate)
            return algorithm_arm(name, small, name, count, rate=rate, every=max(1, count // 20))

        arms = [arm(name, rate) for name, rate in RATES.items()]
        yield from trained(arms, replace(setting, overrides=()), out, say, images=_IMAGES)
        panels(shown(arms, out, 20), 10, stacked=True).save(out / f"{self.name}.png")

    def table(self, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
        header = ["limit", *(f"{arm}: moved" for arm in RATES), *(f"{arm}: update" for arm in RATES)]
        lines = []
        for name in _limits(rows):
            found = [_where(rows, arm, name, key) for key in ("moved", "update") for arm in RATES]
            lines.append([name, *(measured(one, 1) if any(map(math.isfinite, one)) else "" for one in found)])
        return header, lines

    def curves(self, rows: Sequence[Row]) -> list[str]:
        keys = ("moved", *LOSSES, *(name for name in rows[0] if name.partition("@")[0] in MONITORS))
        return [curve_figure(rows, list(RATES), key, key) for key in keys]

    def conclusions(self, rows: Sequence[Row]) -> list[Conclusion]:
        return [*(_broke(rows, arm) for arm in RATES), *(one for arm in OTHERS for one in _compared(rows, arm))]


def _broke(rows: Sequence[Row], arm: str) -> Conclusion:
    """When images broke, and which monitors had warned by then."""
    updates, shifts = _breaks(rows, arm, "update"), _breaks(rows, arm, "moved")
    if not any(map(math.isfinite, updates)):
        return Conclusion(f"{arm}: images are whole to the end, moved by {measured(last(rows, arm, 'moved'))}.", None)
    warned = {name: _where(rows, arm, name, "update") for name in _limits(rows) if name not in LOSSES}
    before = [name for name, at in warned.items() if all(one < broken for one, broken in zip(at, updates, strict=True))]
    text = f"{arm}: images break at update {measured(updates, 0)}, moved by {measured(shifts)}"
    return Conclusion(f"{text}; in every seed before that warned {', '.join(before) or 'nothing'}.", None)


def _compared(rows: Sequence[Row], arm: str) -> Iterator[Conclusion]:
    """How much further SRPO goes, and how much more is left in the end."""
    further = [mine - other for mine, other in zip(_reached(rows, SRPO), _reached(rows, arm), strict=True)]
    text = f"SRPO moves images {measured(further)} further than {arm} before they break or training ends."
    yield Conclusion(text, surely(further) > 0)
    left = [mine - other for mine, other in zip(last(rows, SRPO, "kept"), last(rows, arm, "kept"), strict=True)]
    yield Conclusion(f"In the end SRPO has kept {measured(left)} more than {arm}.", surely(left) > 0)


def _limits(rows: Sequence[Row]) -> list[str]:
    """What can be lost, and the monitors that warn by default."""
    return [*LOSSES, *(name for name in rows[0] if name.partition("@")[0] in WARNINGS)]


def _past(name: str, first: Row, row: Row) -> float:
    """How far beyond a limit the change for the worse is; in the limit's."""
    if name in LOSSES:
        return (first[name] - row[name]) / (LOSSES[name] * first[name]) - 1
    return harm_of(name, row[name] - first[name]) / WARNINGS[name.partition("@")[0]].width(first[name]) - 1


def _where(rows: Sequence[Row], arm: str, name: str, key: str) -> list[float]:
    """The value of `key` where each seed first gets to a limit; infinite: it never does."""
    return [crossing(looks, key, partial(_past, name, looks[0])) for looks in _seeds(rows, arm)]


def _breaks(rows: Sequence[Row], arm: str, key: str) -> list[float]:
    """Where the first of what can be lost is."""
    return [min(values) for values in zip(*(_where(rows, arm, name, key) for name in LOSSES), strict=True)]


def _reached(rows: Sequence[Row], arm: str) -> list[float]:
    """How far each seed moved with its images whole."""
    ends = [max(look["moved"] for look in looks) for looks in _seeds(rows, arm)]
    return [min(one, end) for one, end in zip(_breaks(rows, arm, "moved"), ends, strict=True)]


def _seeds(rows: Sequence[Row], arm: str) -> list[list[Row]]:
    """Each seed's looks."""
    of = [row for row in rows if row["arm"] == arm and "moved" in row]
    return [[row for row in of if row["seed"] == seed] for seed in sorted({row["seed"] for row in of})]
