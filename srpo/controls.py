"""Control words: named groups, the groups of a run by update, and the words of one prompt."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from srpo.errors import InputError
from srpo.objective import SRPOConfig
from srpo.tiny import ATTRIBUTES

__all__ = [
    "CONTROL_GROUPS",
    "ControlGroup",
    "ControlPhase",
    "ControlSchedule",
    "control_group",
    "nearest",
    "parse_groups",
    "parse_schedule",
    "parse_words",
]


@dataclass(frozen=True)
class ControlGroup:
    """Words to steer towards and away from; both lists cycle with the update."""

    positive: tuple[str, ...]
    negative: tuple[str, ...]

    def pair(self, step: int) -> tuple[str, str]:
        """The positive and the negative word of update `step` (0-based)."""
        return self.positive[step % len(self.positive)], self.negative[step % len(self.negative)]


@dataclass(frozen=True)
class ControlPhase:
    """A named group and the first update (1-based) that uses it."""

    group: str
    start: int = 1


_OFFICIAL = SRPOConfig()

#: Groups that every recipe knows.
CONTROL_GROUPS: dict[str, ControlGroup] = {
    "realism": ControlGroup(_OFFICIAL.positive_controls, _OFFICIAL.negative_controls),
    **{to: ControlGroup((to,), (away,)) for pair in ATTRIBUTES.values() for to, away in (pair, pair[::-1])},
}


def control_group(name: object, groups: Mapping[str, ControlGroup] | None = None) -> ControlGroup:
    """The named one of `groups` (a recipe's own), else of `CONTROL_GROUPS`. Raises `InputError`."""
    known = {**CONTROL_GROUPS, **(groups or {})}
    if not isinstance(name, str) or name not in known:
        near = nearest(name, known)
        raise InputError(f"unknown control group {name!r}; known groups: {', '.join(sorted(known))}{near}")
    return known[name]


def nearest(name: object, known: Iterable[str], cutoff: float = 0.7) -> str:
    """Asks "did you mean ...?" after a name that is nearly one of `known`; else nothing."""
    near = difflib.get_close_matches(str(name), list(known), 1, cutoff)
    return f"; did you mean {near[0]!r}?" if near else ""


def parse_words(value: object) -> tuple[str, ...]:
    """Control words from a list of them, or from text with ";" between them. Raises `ValueError`."""
    parts = value.split(";") if isinstance(value, str) else value
    words = [part.strip() if isinstance(part, str) else "" for part in parts] if isinstance(parts, list | tuple) else []
    if not words or not all(words):
        raise ValueError(f"must be one or more non-empty words, got {value!r}")
    return tuple(words)


def parse_groups(value: object) -> dict[str, ControlGroup] | None:
    """``data.control_groups`` of a recipe: ``{name: {positive: words, negative: words}}``. Raises `InputError`."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise InputError(f"data.control_groups must be groups by name, got {value!r}")
    groups = {}
    for name, entry in value.items():
        key = f"data.control_groups.{name}"
        _check_keys(key, entry, ("positive", "negative"), required=("positive", "negative"))
        try:
            groups[str(name)] = ControlGroup(parse_words(entry["positive"]), parse_words(entry["negative"]))
        except ValueError as error:
            raise InputError(f"{key}: words {error}") from None
    return groups


def parse_schedule(value: object, groups: Mapping[str, ControlGroup] | None) -> str | tuple[ControlPhase, ...] | None:
    """``data.control_group`` of a recipe: a group's name, or phases ``[{group: name, start: update}, ...]``.

    Raises `InputError` for an unknown group, and unless phases start at update 1 and at ever later ones.
    """
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not value or not all(isinstance(entry, dict) for entry in value):
        control_group(value, groups)
        return str(value)
    phases: list[ControlPhase] = []
    for entry in value:
        _check_keys("data.control_group", entry, ("group", "start"), required=("group",))
        control_group(entry["group"], groups)
        start = entry.get("start", 1)
        if not isinstance(start, int) or isinstance(start, bool):
            raise InputError(f"data.control_group: start must be the number of an update, got {start!r}")
        phases.append(ControlPhase(entry["group"], start))
    starts = [phase.start for phase in phases]
    if starts[0] != 1 or any(later <= earlier for earlier, later in pairwise(starts)):
        raise InputError(f"data.control_group: phases must start at update 1 and each after the last, got {starts}")
    return tuple(phases)


def _check_keys(key: str, entry: Any, known: Sequence[str], *, required: Sequence[str]) -> None:
    if not isinstance(entry, dict):
        raise InputError(f"{key} must hold {' and '.join(known)}, got {entry!r}")
    for name in entry:
        if name not in known:
            raise InputError(f"{key}: unknown key {name!r}, known are {' and '.join(known)}{nearest(name, known)}")
    for name in required:
        if name not in entry:
            raise InputError(f"{key}: {name} is missing")


class ControlSchedule:
    """The control words of every update and prompt of a run.

    Args:
        objective: its words hold where no schedule is given. schedule: phases of named groups, or a name, whose words
            `objective` then already holds. groups: the recipe's own groups.
    """

    def __init__(
        self,
        objective: SRPOConfig,
        schedule: str | tuple[ControlPhase, ...] | None = None,
        groups: Mapping[str, ControlGroup] | None = None,
    ) -> None:
        self._phases = [(1, ControlGroup(objective.positive_controls, objective.negative_controls))]
        if isinstance(schedule, tuple):
            self._phases = [(phase.start, control_group(phase.group, groups)) for phase in schedule]

    def group(self, step: int) -> ControlGroup:
        """The run's words at update `step` (0-based)."""
        return next(group for start, group in reversed(self._phases) if start <= step + 1)

    def pair(self, step: int, positive: tuple[str, ...] = (), negative: tuple[str, ...] = ()) -> tuple[str, str]:
        """The pair of update `step`; a prompt's own `positive` or `negative` words take the place of the run's."""
        group = self.group(step)
        return ControlGroup(positive or group.positive, negative or group.negative).pair(step)

    def words(self) -> list[str]:
        """Every word of the run."""
        return list(dict.fromkeys(word for _, group in self._phases for word in (*group.positive, *group.negative)))
