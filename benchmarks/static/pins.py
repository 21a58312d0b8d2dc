"""Pins: the figures that are expected, with the reason for each, and what measured ones are held against them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.schema import Finding, ResultError
from benchmarks.static.figures import FIGURES, Figure, Verdict, judge
from benchmarks.static.unit import Unit

__all__ = ["Change", "Finding", "Measured", "Pin", "Pins", "compare", "exit_status", "read", "repin", "write"]


_UNKNOWN = Figure("", None)


class Pin(NamedTuple):
    value: float
    reason: str


#: Of a file: by tools, unit and figure.
Pins = dict[str, dict[str, dict[str, Pin]]]


@dataclass(frozen=True)
class Measured:
    """A unit and its figures, or why there are none."""

    unit: Unit
    figures: dict[str, Any]
    error: str | None = None

    @property
    def pinned(self) -> dict[str, float]:
        return {name: value for name, value in self.figures.items() if name in FIGURES}


def read(folder: Path, name: str) -> Pins:
    """The pins of a file, none where there is no file. Raises `ResultError` where it is not one."""
    path = folder / f"{name}.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {
            tools: {
                unit: {figure: Pin(float(entry["value"]), str(entry["reason"])) for figure, entry in figures.items()}
                for unit, figures in units.items()
            }
            for tools, units in content.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ResultError(f"{path}: not a file of pins: {error!r}") from error


def write(folder: Path, name: str, pins: Pins) -> None:
    """Sorted, one figure a line, so that a diff tells what changed."""

    def entries(items: dict[str, Any], depth: int, line: Callable[[Any], str]) -> str:
        indent = " " * depth
        rows = (f"{indent} {json.dumps(key)}: {line(value)}" for key, value in sorted(items.items()))
        return "{\n" + ",\n".join(rows) + f"\n{indent}}}"

    def figure(pin: Pin) -> str:
        value = int(pin.value) if pin.value == int(pin.value) else pin.value
        return json.dumps({"value": value, "reason": pin.reason}, ensure_ascii=False)

    text = entries(pins, 0, lambda units: entries(units, 1, lambda figures: entries(figures, 2, figure)))
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{name}.json.partial"
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(folder / f"{name}.json")


def compare(
    measured: Iterable[Measured], pins_of: Callable[[str], Pins], *, matches: Callable[[str], bool]
) -> list[Finding]:
    """Every figure that is not as pinned. Pins of other tools are no expectation: differences are told as TOOLCHAIN.

    `pins_of` reads a file of pins. `matches` tells which ids were to be measured; pins of these alone can be missing.
    """
    found: list[Finding] = []
    for (name, tools), group in _groups(measured).items():
        pins, kind = pins_of(name), tools.split()[0]
        others = [known for known in pins if known.split()[0] == kind]
        known = tools in pins
        expected = pins[tools] if known else pins[others[-1]] if others else {}
        for each in group:
            if each.error is not None:
                found.append(Finding(Verdict.ERROR, name, each.unit.id, reason=each.error))
                continue
            differences = list(_compare(name, each, expected.get(each.unit.id)))
            if others and not known:
                differences = [Finding(**{**vars(f), "verdict": Verdict.TOOLCHAIN}) for f in differences]
            found.extend(differences)
        if known:
            gone = set(expected) - {each.unit.id for each in group}
            found.extend(
                Finding(Verdict.MISSING, name, each, reason="pinned, and no longer there")
                for each in sorted(gone)
                if matches(each)
            )
        elif others:
            found.append(Finding(Verdict.TOOLCHAIN, name, tools, reason=f"no pins yet; compared with {others[-1]}"))
    return found


def _compare(name: str, measured: Measured, expected: dict[str, Pin] | None) -> Iterator[Finding]:
    values = measured.pinned
    if expected is None:
        yield Finding(Verdict.UNPINNED, name, measured.unit.id, reason="has no pins")
        return
    for figure in sorted({*values, *expected}):
        counted = FIGURES.get(figure, _UNKNOWN).unit == "instructions"  # what is not there is there 0 times
        if figure not in values and not counted:
            yield Finding(Verdict.MISSING, name, measured.unit.id, reason=f"{figure} is pinned, and not measured")
        elif figure not in expected and not counted:
            yield Finding(Verdict.UNPINNED, name, measured.unit.id, reason=f"{figure} has no pin")
        else:
            value, pin = values.get(figure, 0), expected.get(figure, Pin(0, ""))
            verdict = judge(FIGURES[figure], pin.value, value)
            if verdict is not Verdict.SAME:
                yield Finding(verdict, name, measured.unit.id, figure, pin.value, value, pin.reason)


def exit_status(findings: Iterable[Finding], *, ratchet: bool = False) -> int:
    """4 where something is missing or failed, else 1 where something is worse, else, with `ratchet`, 6 where better."""
    verdicts = {finding.verdict for finding in findings}
    if verdicts & {Verdict.MISSING, Verdict.UNPINNED, Verdict.ERROR}:
        return 4
    if Verdict.WORSE in verdicts:
        return 1
    return 6 if ratchet and Verdict.BETTER in verdicts else 0


class Change(NamedTuple):
    pins: str
    id: str
    figure: str
    old: float | None
    new: float | None

    def __str__(self) -> str:
        numbers = " -> ".join("none" if number is None else f"{number:,.12g}" for number in (self.old, self.new))
        return f"{self.pins} {self.id}: {self.figure} {numbers}"


def repin(measured: Iterable[Measured], folder: Path, reason: str, *, matches: Callable[[str], bool]) -> list[Change]:
    """Write what was measured; only what changed gets `reason`. Pins of other tools stay as they are.

    Raises `ResultError` when something could not be measured: nothing is written then.
    """
    groups = _groups(measured)
    failed = [each for group in groups.values() for each in group if each.error is not None]
    if failed:
        raise ResultError(f"nothing pinned: {failed[0].unit.id} failed: {failed[0].error}")
    changes: list[Change] = []
    for (name, tools), group in groups.items():
        pins = read(folder, name)
        old = pins.get(tools, {})
        new = {unit: figures for unit, figures in old.items() if not matches(unit)}
        for each in group:
            before = old.get(each.unit.id, {})
            new[each.unit.id] = {
                figure: before[figure] if _same(figure, before.get(figure), value) else Pin(value, reason)
                for figure, value in each.pinned.items()
            }
        changes.extend(_changes(name, old, new))
        write(folder, name, {**pins, tools: new})
    return changes


def _same(figure: str, pin: Pin | None, value: float) -> bool:
    """Small changes leave the pin, so that they cannot add up."""
    return pin is not None and judge(FIGURES[figure], pin.value, value) is Verdict.SAME


def _changes(name: str, old: dict[str, dict[str, Pin]], new: dict[str, dict[str, Pin]]) -> Iterator[Change]:
    for unit in sorted({*old, *new}):
        before, after = old.get(unit, {}), new.get(unit, {})
        for figure in sorted({*before, *after}):
            values = [pins[figure].value if figure in pins else None for pins in (before, after)]
            if values[0] != values[1]:
                yield Change(name, unit, figure, *values)


def _groups(measured: Iterable[Measured]) -> dict[tuple[str, str], list[Measured]]:
    groups: dict[tuple[str, str], list[Measured]] = {}
    for each in measured:
        groups.setdefault((each.unit.pins, each.unit.tools), []).append(each)
    return groups
