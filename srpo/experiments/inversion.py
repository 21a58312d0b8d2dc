"""Forms of the relative reward, with the inversion branch and without, trained three times as long as the recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

from srpo.assets import TINY
from srpo.config import load_config
from srpo.experiments.arms import Arm, shown, trained
from srpo.experiments.bias import along
from srpo.experiments.experiment import Conclusion, Experiment, Row, Setting, measured
from srpo.experiments.looks import cost_to_reach, curve_figure, gained, last
from srpo.experiments.taste import TastefulReward, slanted, warm
from srpo.images import panels
from srpo_kernels import RELATIVE_FORMS

__all__ = ["Inversion"]

WORDED = {
    "both branches": ("srpo.form=official", "srpo.inversion=true"),
    "denoise only": ("srpo.form=official", "srpo.inversion=false"),
    "both, difference": ("srpo.form=difference", "srpo.inversion=true"),
    "denoise only, difference": ("srpo.form=difference", "srpo.inversion=false"),
}
SRPO, *OTHERS = WORDED
IMAGE_ONLY = "image only"
FORMS = WORDED | {IMAGE_ONLY: ("srpo.form=image_only", "srpo.inversion=true")}
COLUMNS = {"kept": "kept", "diverse": "diversity", "changed": "pixels changed"}
_LONGER = 3


class Inversion(Experiment):
    """A reward with a planted taste, in every form: how far each moves the model, what is kept, what else changes."""

    name = "inversion"
    claim = (
        "a step towards the image and one back, with the prompts' roles swapped, are trained together; the relative "
        "reward also has a plain form, and one for rewards that read no prompt."
    )
    seeds = (4, 2)

    def measure(self, setting: Setting, out: Path, say: Callable[[str], None]) -> Iterator[Row]:
        arms = _arms(setting)
        yield from trained(arms, setting, out, say)
        panels(shown(arms, out, 10), 10, stacked=True).save(out / f"{self.name}.png")

    def table(self, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
        taste = along(rows)
        lines = []
        for arm in FORMS:
            for updates in _lengths(rows):
                seen = [row for row in rows if row["update"] <= updates]
                found = [last(seen, arm, "moved"), gained(seen, arm, taste), *(last(seen, arm, key) for key in COLUMNS)]
                lines.append([arm, str(updates), *map(measured, found)])
        return ["", "updates", "moved", taste, *COLUMNS.values()], lines

    def curves(self, rows: Sequence[Row]) -> list[str]:
        titles = {"moved": "moved", along(rows): along(rows), **COLUMNS}
        return [curve_figure(rows, list(FORMS), key, title) for key, title in titles.items()]

    def conclusions(self, rows: Sequence[Row]) -> list[Conclusion]:
        target = 0.9 * min(moved for arm in WORDED for moved in last(rows, arm, "moved"))
        found = [_compared(rows, arm, target) for arm in OTHERS]
        _, end = _lengths(rows)
        moved, drift = last(rows, IMAGE_ONLY, "moved"), gained(rows, IMAGE_ONLY, along(rows))
        said = ", ".join(f"{title} {measured(last(rows, IMAGE_ONLY, key))}" for key, title in COLUMNS.items())
        text = f"{IMAGE_ONLY}: moved {measured(moved)} and {along(rows)} {measured(drift)} in {end} updates; {said}."
        return [*found, Conclusion(text, None)]


def _arms(setting: Setting) -> list[Arm]:
    config = load_config(setting.recipe, setting.overrides)
    updates = max(1, config.srpo.updates // (4 if setting.quick else 1))
    taste = slanted if config.model.path == TINY else warm
    arms = []
    for name, (form, inversion) in FORMS.items():
        relative = form.partition("=")[2]
        # The form for images weighs no prompts.
        weighed = relative if relative in RELATIVE_FORMS else "official"
        reward = partial(TastefulReward, taste=taste, strength=1.0, form=weighed)
        arms.append(Arm(name, (f"srpo.updates={updates * _LONGER}", form, inversion), every=updates, reward=reward))
    return arms


def _lengths(rows: Sequence[Row]) -> tuple[int, int]:
    """Updates of the recipe, and of the whole training."""
    looks = [row["update"] for row in rows if row["arm"] == SRPO and row["seed"] == 0]
    return looks[1], looks[-1]


def _compared(rows: Sequence[Row], arm: str, target: float) -> Conclusion:
    """A form against SRPO: after the same updates, and where both have moved as far."""
    short, long = _lengths(rows)
    seen = [row for row in rows if row["update"] <= short]

    def moved(of: str) -> str:
        return f"{measured(last(seen, of, 'moved'))} and {measured(last(rows, of, 'moved'))}"

    text = f"{arm}: moved {moved(arm)} in {short} and {long} updates, {SRPO} {moved(SRPO)}"
    share = fmean(last(rows, arm, "forwards")) / fmean(last(rows, SRPO, "forwards"))
    text += f", at {share:.2f} times the forwards."
    if target > 0:
        differences = {  # both began with the same images
            key: [a - b for a, b in zip(*(cost_to_reach(rows, name, target, key) for name in (arm, SRPO)), strict=True)]
            for key in (along(rows), *COLUMNS)
        }
        titles = {along(rows): along(rows), **COLUMNS}
        said = ", ".join(f"{titles[key]} {measured(values)}" for key, values in differences.items())
        text += f" Where both have moved {target:.2f}, it differs from {SRPO} by: {said}."
    return Conclusion(text, None)
