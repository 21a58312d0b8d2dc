"""Prompts with their control words, read from a file and checked line by line."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from srpo.controls import ControlGroup, control_group, nearest, parse_words
from srpo.errors import InputError
from srpo.records import read_rows

__all__ = ["FileReport", "Prompt", "parse_prompt", "read_prompts", "scan_prompts"]

_TEXT = ("prompt", "text", "caption")  # the first that a record has
_OTHER = ("control_group", "positive", "negative", "weight", "id")

#: Kinds of fault: those that must be mended, and how they are told; then those that are only warned of.
_FATAL = {"undecodable": " is not UTF-8 on line{}", "empty": ": no prompt on line{}"}
_WARNED = {
    "duplicate": "duplicates: {count}",
    "long_t5": "cut off after {limit} T5 tokens: {count}",
    "long_clip": "cut off after {limit} CLIP tokens: {count}",
    "long_controlled": "cut off after {limit} CLIP tokens once a control word stands before: {count}",
}


@dataclass(frozen=True)
class Prompt:
    """A text to make images of."""

    text: str
    positive: tuple[str, ...] = ()  # control words in place of the run's; none: the run's
    negative: tuple[str, ...] = ()
    weight: float = 1.0  # how often it is seen, against the others
    id: str | None = None


@dataclass
class FileReport:
    """What is wrong with a file, by kind of fault and line."""

    name: str  # "prompt file data/prompts.txt"
    count: int = 0  # usable entries
    faults: dict[str, list[int]] = field(default_factory=dict)  # kind -> line numbers
    malformed: dict[int, str] = field(default_factory=dict)  # line -> what is wrong with it
    ignored: dict[str, int] = field(default_factory=dict)  # columns that mean nothing here -> rows that have them
    limits: dict[str, int] = field(default_factory=dict)  # kind -> tokens

    def add(self, kind: str, line: int) -> None:
        self.faults.setdefault(kind, []).append(line)

    def fatal(self) -> str | None:
        """All that makes the file unusable, in one line, or None."""
        told = [self.name + _FATAL[kind].format(_numbers(self.faults[kind])) for kind in _FATAL if kind in self.faults]
        if self.malformed:
            lines = [f"line {line} {reason}" for line, reason in list(self.malformed.items())[:3]]
            more = f" and {len(self.malformed) - 3} more lines" if len(self.malformed) > 3 else ""
            told.append(f"{self.name}: {'; '.join(lines)}{more}")
        return "; ".join(told) or None

    def warnings(self) -> list[str]:
        """A few words for each kind of fault that lets the file be used."""
        told = []
        for kind, text in _WARNED.items():
            if lines := self.faults.get(kind):
                counted = text.format(count=len(lines), limit=self.limits.get(kind))
                told.append(f"{counted} (line{_numbers(lines)})")
        return told

    def check(self) -> FileReport:
        """Raises `InputError` when the file is unusable."""
        if problem := self.fatal():
            raise InputError(problem)
        return self

    def record(self) -> dict[str, Any]:
        """For the log: counts of every kind, and the first lines of those there are."""
        kinds = {kind: self.faults.get(kind, []) for kind in (*_FATAL, *_WARNED)} | {"malformed": list(self.malformed)}
        return {
            "file": self.name,
            "count": self.count,
            **{kind: len(lines) for kind, lines in kinds.items()},
            "lines": {kind: lines[:10] for kind, lines in kinds.items() if lines},
        }

    def summary(self) -> str:
        """Several lines for people."""
        lines = [f"{self.name}: {self.count} usable"]
        lines += [f"  error: {problem}" for problem in filter(None, [self.fatal()])]
        lines += [f"  warning: {warning}" for warning in self.warnings()]
        if self.ignored:
            columns = ", ".join(f"{name} ({rows})" for name, rows in self.ignored.items())
            lines.append(f"  ignored columns (rows): {columns}")
        return "\n".join(lines) + ("" if len(lines) > 1 else ", no faults")


def parse_prompt(
    values: Mapping[str, Any], groups: Mapping[str, ControlGroup] | None = None, extra: Iterable[str] = ()
) -> tuple[Prompt | None, list[str]]:
    """The prompt of a record, None where its text is blank, and the columns that mean nothing.

    `groups`: the recipe's own control groups. `extra`: further columns that mean something to the caller.

    Raises `ValueError` that goes on after "line 3".
    """
    known = (*_TEXT, *_OTHER, *extra)
    ignored = [key for key in values if key not in known]
    texts = [key for key in _TEXT if key in values]
    for key in ignored:
        absent = [name for name in known if name not in values and not (texts and name in _TEXT)]
        if near := nearest(key, absent, 0.85):  # height is no weight
            raise ValueError(f"has the unknown key {key!r}{near}")
    if not texts:
        raise ValueError(f"has no {' or '.join(_TEXT)}")
    text = values[texts[0]]
    if not isinstance(text, str):
        raise ValueError(f"must hold text in {texts[0]!r}, got {text!r}")
    if not text.strip():
        return None, ignored
    return Prompt(text.strip(), *_controls(values, groups), _weight(values), _id(values)), ignored


def _controls(
    values: Mapping[str, Any], groups: Mapping[str, ControlGroup] | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    own = ControlGroup((), ())
    if values.get("control_group") is not None:
        try:
            own = control_group(values["control_group"], groups)
        except InputError as error:
            raise ValueError(f"has an {error}") from None
    words = {"positive": own.positive, "negative": own.negative}
    for name in words:
        if values.get(name) is not None:
            try:
                words[name] = parse_words(values[name])
            except ValueError as error:
                raise ValueError(f"{name} {error}") from None
    return words["positive"], words["negative"]


def _weight(values: Mapping[str, Any]) -> float:
    value = values.get("weight", 1.0)
    try:
        weight = float(value)
    except (TypeError, ValueError):
        weight = math.nan
    if isinstance(value, bool) or not 0 < weight < math.inf:
        raise ValueError(f"weight must be positive and finite, got {value!r}")
    return weight


def _id(values: Mapping[str, Any]) -> str | None:
    return None if values.get("id") is None else str(values["id"])


def scan_prompts(
    path: str | Path,
    groups: Mapping[str, ControlGroup] | None = None,
    measure: Callable[[FileReport, Sequence[tuple[int, str]]], None] | None = None,
) -> tuple[list[Prompt], FileReport]:
    """The usable prompts of a txt, jsonl, csv or parquet file, and a report on all of it.

    `groups`: the recipe's own control groups. `measure` adds what is too long (`srpo.tokens`).

    Raises `InputError` when the file cannot be read at all; faults of single lines are in the report.
    """
    report = FileReport(f"prompt file {path}")
    prompts, lines, seen = [], [], set()
    for row in read_rows(path, "prompt file"):
        if row.values is None:
            if row.fault in _FATAL:
                report.add(row.fault, row.line)
            else:
                report.malformed[row.line] = row.fault
            continue
        try:
            prompt, ignored = parse_prompt(row.values, groups)
        except ValueError as error:
            report.malformed[row.line] = str(error)
            continue
        for name in ignored:
            report.ignored[name] = report.ignored.get(name, 0) + 1
        if prompt is None:
            report.add("empty", row.line)
            continue
        if (same := (prompt.text, prompt.positive, prompt.negative)) in seen:
            report.add("duplicate", row.line)
        seen.add(same)
        prompts.append(prompt)
        lines.append(row.line)
    report.count = len(prompts)
    if measure is not None:
        measure(report, [(line, prompt.text) for line, prompt in zip(lines, prompts, strict=True)])
    return prompts, report


def read_prompts(path: str | Path, groups: Mapping[str, ControlGroup] | None = None) -> list[Prompt]:
    """The prompts of a file. Raises `InputError` with the line numbers of what cannot be used."""
    prompts, report = scan_prompts(path, groups)
    report.check()
    return prompts


def _numbers(numbers: list[int], most: int = 10) -> str:
    shown = ", ".join(map(str, numbers[:most]))
    return f"{'s' if len(numbers) > 1 else ''} {shown}" + (
        f" and {len(numbers) - most} more" if len(numbers) > most else ""
    )
