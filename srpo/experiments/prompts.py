"""Control words that the reward knows, words that it does not, and weights of a pair of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path

from srpo.assets import TINY
from srpo.config import load_config
from srpo.controls import CONTROL_GROUPS, ControlGroup
from srpo.errors import InputError
from srpo.experiments.arms import Arm, shown, trained
from srpo.experiments.experiment import Conclusion, Experiment, Row, Setting, measured
from srpo.experiments.looks import curve_figure, ends_table, gained, last, surely
from srpo.images import panels
from srpo.tiny import ATTRIBUTES

__all__ = ["Prompts"]

KINDS = WORDS, RARE, WEIGHTS = "words", "rare words", "weights"  # what an arm tells of
#: Form of the relative score, and its kappa or k in both branches.
FORMS = {
    "kappa 0": ("difference", 0),
    "kappa 0.5": ("official", 0.5),
    "kappa 1": ("official", 1),
    "cfg, k 0.5": ("cfg", 0.5),
    "cfg, k 1": ("cfg", 1),
}
UNKNOWN = ("zxqv", "wkjp")  # to any reward
MEASURED = [key for key in ATTRIBUTES if key != "aspect"]  # by the judge of digits


class Prompts(Experiment):
    """A recipe with other control words, and with other weights of its own."""

    name = "prompts"
    claim = "control words steer without training another reward; rare ones fail."
    seeds = (3, 2)

    def measure(self, setting: Setting, out: Path, say: Callable[[str], None]) -> Iterator[Row]:
        arms = _arms(setting)
        kinds = {arm.name: kind for kind, those in arms.items() for arm in those}
        for row in trained([*chain(*arms.values())], setting, out, say, images=50):
            yield row | {"kind": kinds[row["arm"]]}
        panels(shown(arms[WORDS], out, 8), 8, stacked=True).save(out / f"{self.name}.png")

    def table(self, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
        arms = [*chain(*(_names(rows, kind) for kind in KINDS))]
        header, lines = ends_table(rows, arms, {"moved": "moved", "kept": "kept", "diverse": "diversity"})
        if not _of_digits(rows):
            return header, lines
        return [*header, "others moved"], [[*line, measured(_others(rows, line[0]))] for line in lines]

    def curves(self, rows: Sequence[Row]) -> list[str]:
        return [curve_figure(rows, _names(rows, kind), "moved", f"moved: {kind}") for kind in KINDS]

    def conclusions(self, rows: Sequence[Row]) -> list[Conclusion]:
        own, *_ = _names(rows, WORDS)
        return [
            *(_steered(rows, arm, own) for arm in _names(rows, WORDS)),
            *(_failed(rows, arm, own) for arm in _names(rows, RARE)),
            *(_weighed(rows, arm, own) for arm in _names(rows, WEIGHTS)),
        ]


def _arms(setting: Setting) -> dict[str, list[Arm]]:
    """By kind. The first pair of words is the recipe's, and of the tiny world "bold" and "thin".

    Raises `InputError` where an override chooses the words.
    """
    chosen = [key for key in setting.overrides if key.startswith(("data.control_group=", "srpo.positive_", "srpo.neg"))]
    if chosen:
        raise InputError(f"experiment prompts chooses control words itself; leave out {', '.join(chosen)}")
    config = load_config(setting.recipe, setting.overrides)
    if config.model.path == TINY:
        words = {word: CONTROL_GROUPS[word] for key in MEASURED for word in ATTRIBUTES[key]}
        pairs = [UNKNOWN, ("heavy", "light"), ("bolld", "thinn"), (UNKNOWN[0], "thin"), ("bold", UNKNOWN[1])]
    else:
        own = ControlGroup(config.srpo.positive_controls, config.srpo.negative_controls)
        words = {"the recipe's": own, **(config.data.control_groups or {})}
        pairs = [UNKNOWN, (UNKNOWN[0], own.negative[0]), (own.positive[0], UNKNOWN[1])]
    own, *_ = words.values()
    rare = {", not ".join(pair): ControlGroup((pair[0],), (pair[1],)) for pair in pairs}
    towards = own.positive[0]
    weights = {
        name: (f"srpo.form={form}", *(f"srpo.discount_{branch}=[{k},{k}]" for branch in ("denoise", "inversion")))
        for name, (form, k) in FORMS.items()
    }
    arms = {
        WORDS: [_arm(name, group, group.positive[0]) for name, group in words.items()],
        RARE: [_arm(name, group, towards) for name, group in rare.items()],
        WEIGHTS: [_arm(name, own, towards, overrides) for name, overrides in weights.items()],
    }
    return {kind: those[::3] for kind, those in arms.items()} if setting.quick else arms


def _arm(name: str, group: ControlGroup, towards: str, overrides: tuple[str, ...] = ()) -> Arm:
    words = (f"srpo.{key}_controls={json.dumps(getattr(group, key))}" for key in ("positive", "negative"))
    return Arm(name, ("data.control_group=null", *words, *overrides), towards=towards)


def _names(rows: Sequence[Row], kind: str) -> list[str]:
    """Arms of a kind, in their order."""
    return list(dict.fromkeys(row["arm"] for row in rows if row["kind"] == kind))


def _others(rows: Sequence[Row], arm: str) -> list[float]:
    """How far, either way, the attributes moved on average that the arm's words do not name."""
    far = [[abs(value) for value in gained(rows, arm, key)] for key in MEASURED]
    named = [abs(value) for value in last(rows, arm, "moved")]
    return [(sum(all_) - own) / (len(MEASURED) - 1) for *all_, own in zip(*far, named, strict=True)]


def _steered(rows: Sequence[Row], arm: str, own: str) -> Conclusion:
    """Whether words move what they name; of any but the tiny world that is measured for the recipe's own alone."""
    moved = last(rows, arm, "moved")
    others = f", other attributes {measured(_others(rows, arm))} either way" if _of_digits(rows) else ""
    agrees = surely(moved) > 0 if others or arm == own else None
    return Conclusion(f"words {arm}: moved {measured(moved)}{others}.", agrees)


def _failed(rows: Sequence[Row], arm: str, own: str) -> Conclusion:
    """Whether rare words move less than half as far as those that the reward knows."""
    rare, known = (last(rows, name, "moved") for name in (arm, own))
    part = [mine / other for mine, other in zip(rare, known, strict=True)]
    text = (
        f"rare words {arm}: moved {measured(rare)}, {measured(part)} times as far as words {own} (to fail: below 0.5)."
    )
    return Conclusion(text, surely([0.5 - share for share in part]) > 0)


def _weighed(rows: Sequence[Row], arm: str, own: str) -> Conclusion:
    """What other weights do to the distance and to what images show."""
    more = []
    for key in ("moved", "kept"):
        pairs = zip(last(rows, arm, key), last(rows, own, key), strict=True)
        more.append(measured([mine - other for mine, other in pairs]))
    return Conclusion(f"{arm}: moved {more[0]} further than with the recipe's weights, kept {more[1]} more.", None)


def _of_digits(rows: Sequence[Row]) -> bool:
    return MEASURED[0] in rows[0]
