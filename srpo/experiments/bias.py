"""A taste planted in the reward: how far along it each algorithm is pulled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean

from srpo import page
from srpo.assets import TINY
from srpo.config import load_config
from srpo.errors import InputError
from srpo.experiments.arms import Arm, shown, trained
from srpo.experiments.experiment import Conclusion, Experiment, Row, Setting, measured
from srpo.experiments.looks import gained, last, surely
from srpo.experiments.taste import TastefulReward, slanted, warm
from srpo.images import panels
from srpo_kernels import RELATIVE_FORMS

__all__ = ["Bias", "along", "pulled"]

RELATIVE: dict[str, tuple[str, ...]] = {
    "srpo": (),
    "srpo, plain difference": ("srpo.form=difference",),
    "srpo, denoise branch": ("srpo.inversion=false",),
}
SINGLE = {name: (f"algorithm={name}", f"{name}.control=true") for name in ("direct_align", "draft", "refl")}
ALGORITHMS = RELATIVE | SINGLE
STRENGTHS = (0.25, 1.0)  # of the taste
QUICK = ("srpo.updates=4",)


class Bias(Experiment):
    """The same trainings on a reward, and on that reward with a taste that no prompt asks for."""

    name = "bias"
    claim = "what a reward likes whatever the prompt is cancelled by the relative reward."
    seeds = (3, 2)

    def measure(self, setting: Setting, out: Path, say: Callable[[str], None]) -> Iterator[Row]:
        strengths = (0.0, *(STRENGTHS[-1:] if setting.quick else STRENGTHS))
        arms = [_arm(setting, name, strength) for strength, name in product(strengths, ALGORITHMS)]
        yield from trained(arms, setting, out, say, images=50 if setting.quick else 100)
        strongest = arms[-len(ALGORITHMS) :]
        panels(shown(strongest, out, 20), 10, stacked=True).save(out / f"{self.name}.png")

    def table(self, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
        lines = []
        for name, strength in product(ALGORITHMS, (0.0, *_strengths(rows))):
            drift = gained(rows, _arm_name(name, strength), along(rows))
            seen = [last(rows, _arm_name(name, strength), key) for key in ("moved", "kept")]
            added = [measured(values) for values in _pulled(rows, name, strength)] if strength else ["", ""]
            lines.append([name, f"{strength:g}", *map(measured, (*seen, drift)), *added])
        return ["", "taste", "moved", "kept", "drift", "pulled", "pulled, per moved"], lines

    def curves(self, rows: Sequence[Row]) -> list[str]:
        strengths = (0.0, *_strengths(rows))

        def figure(title: str, of: Callable[[str], list[float]]) -> str:
            found = {name: [fmean(of(_arm_name(name, strength))) for strength in strengths] for name in ALGORITHMS}
            return page.curves(title, "taste", {name: (strengths, values) for name, values in found.items()})

        return [
            figure(f"drift: {along(rows)}", lambda arm: gained(rows, arm, along(rows))),
            figure("moved", lambda arm: last(rows, arm, "moved")),
        ]

    def conclusions(self, rows: Sequence[Row]) -> list[Conclusion]:
        return [_compared(rows, name, strength) for strength, name in product(_strengths(rows), RELATIVE)]


def _arm(setting: Setting, name: str, strength: float) -> Arm:
    """Raises `InputError` where the reward is not relative."""
    overrides = (*(QUICK if setting.quick else ()), *ALGORITHMS[name])
    config = load_config(setting.recipe, [*overrides, *setting.overrides])
    form = config.srpo.form
    if form not in RELATIVE_FORMS:
        raise InputError(f"experiment bias needs srpo.form to be one of {', '.join(RELATIVE_FORMS)}, got {form}")
    taste = slanted if config.model.path == TINY else warm
    reward = partial(TastefulReward, taste=taste, strength=strength, form=form)
    return Arm(_arm_name(name, strength), overrides, reward=reward)


def _arm_name(name: str, strength: float) -> str:
    return f"{name}, taste {strength:g}"


def _strengths(rows: Sequence[Row]) -> list[float]:
    """Those that were trained with."""
    arms = {row["arm"] for row in rows}
    return [strength for strength in STRENGTHS if _arm_name("srpo", strength) in arms]


def along(rows: Sequence[Row]) -> str:
    """What measures the taste: of the tiny world's digits the slant in SD, else blue to yellow in CIE Lab."""
    return "slant" if "slant" in rows[0] else "lab_b"


def pulled(rows: Sequence[Row], arm: str, without: str) -> tuple[list[float], list[float]]:
    """Of each seed the drift that the taste adds to that of the arm `without` one; and per `moved`."""
    drift, other = (gained(rows, name, along(rows)) for name in (arm, without))
    added = [mine - theirs for mine, theirs in zip(drift, other, strict=True)]
    return added, [far / moved for far, moved in zip(added, last(rows, arm, "moved"), strict=True)]


def _pulled(rows: Sequence[Row], name: str, strength: float) -> tuple[list[float], list[float]]:
    return pulled(rows, _arm_name(name, strength), _arm_name(name, 0.0))


def _compared(rows: Sequence[Row], name: str, strength: float) -> Conclusion:
    """Whether a relative reward is pulled less than every single-prompt one, at the same updates and per `moved`."""
    mine = _pulled(rows, name, strength)
    less, said = [], []
    for other in SINGLE:
        theirs = _pulled(rows, other, strength)
        said.append(f"{other} {measured(theirs[0])} ({measured(theirs[1])})")
        for ours, its in zip(mine, theirs, strict=True):
            less.append(surely([abs(b) - abs(a) for a, b in zip(ours, its, strict=True)]) > 0)
    text = (
        f"taste {strength:g} pulls {name} by {measured(mine[0])} along {along(rows)} in as many updates "
        f"({measured(mine[1])} per moved); {', '.join(said)}."
    )
    return Conclusion(text, all(less))
