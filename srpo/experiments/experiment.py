"""What an experiment is, and how one is run: rows of JSON, a page and a picture in a new directory."""

from __future__ import annotations

import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, ClassVar

import torch
from PIL import Image
from scipy.stats import t as student

from srpo import page
from srpo.errors import InputError

__all__ = ["Conclusion", "Experiment", "Setting", "interval", "measured", "one_thread", "run"]

Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What to run on: a recipe with overrides, how many seeds, and how many trainings at once."""

    recipe: str
    overrides: tuple[str, ...]
    seeds: int
    quick: bool
    workers: int = 1


@dataclass(frozen=True)
class Conclusion:
    """What the rows say of a claim; `agrees` is None where the paper says nothing."""

    text: str
    agrees: bool | None

    def __str__(self) -> str:
        words = {True: "agrees with the paper", False: "DISAGREES with the paper", None: "not in the paper"}
        return f"{self.text} [{words[self.agrees]}]"


class Experiment(ABC):
    """One claim and its measurement. What it concludes is a function of its rows alone."""

    name: ClassVar[str]
    claim: ClassVar[str]  # of the paper
    seeds: ClassVar[tuple[int, int]]  # and with --quick

    @abstractmethod
    def measure(self, setting: Setting, out: Path, say: Callable[[str], None]) -> Iterator[Row]:
        """One row for every measurement, each with its `seed`. A picture goes to ``out/NAME.png``; `say` how far it is.

        With ``setting.quick`` fewer seeds suffice, and what is trained or looked at may be less.
        """

    @abstractmethod
    def table(self, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
        """Header and lines of means and intervals."""

    @abstractmethod
    def curves(self, rows: Sequence[Row]) -> list[str]:
        """Figures of a page."""

    @abstractmethod
    def conclusions(self, rows: Sequence[Row]) -> list[Conclusion]:
        """What the rows say, with numbers and intervals."""


@contextmanager
def one_thread() -> Iterator[None]:
    """As sums depend on the number of threads, results must not depend on how many trainings run at once."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean of one value a seed, and half the width of its 95 % confidence interval (Student's t); 2 values or more.

    NaN where a value is not finite: there is no mean of what not every seed has.
    """
    if not all(map(math.isfinite, values)):
        return math.nan, math.nan
    spread = stdev(values) / len(values) ** 0.5
    return mean(values), float(student.ppf(0.975, len(values) - 1)) * spread


def measured(values: Sequence[float], digits: int = 2) -> str:
    """`interval` as text, or in how many seeds there is a value."""
    finite = sum(map(math.isfinite, values))
    if finite < len(values):
        return f"in {finite} of {len(values)} seeds"
    middle, half = interval(values)
    return f"{middle:.{digits}f} ± {half:.{digits}f}"


def run(experiment: Experiment, setting: Setting, out: Path, say: Callable[[str], None] = print) -> Path:
    """Measure into the new directory `out`, and return its page.

    ``NAME.jsonl`` holds the setting in its first line, then the rows.

    Raises `InputError` when `out` is not empty, or there are fewer than two seeds to make an interval of.
    """
    if out.exists() and any(out.iterdir()):
        raise InputError(f"experiment directory {out} is not empty; choose another --out")
    if setting.seeds < 2:
        raise InputError(f"--seeds must be at least 2, for an interval; got {setting.seeds}")
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()

    def tell(text: str) -> None:
        say(f"[{time.perf_counter() - started:5.1f} s] {text}")

    with one_thread():
        rows = list(experiment.measure(setting, out, tell))
    header = {"experiment": experiment.name, **asdict(setting), "seconds": round(time.perf_counter() - started, 1)}
    lines = [json.dumps(line) + "\n" for line in (header, *rows)]
    (out / f"{experiment.name}.jsonl").write_text("".join(lines), encoding="utf-8")
    for conclusion in experiment.conclusions(rows):
        say(str(conclusion))
    return _write_page(experiment, header, rows, out)


def _write_page(experiment: Experiment, header: Mapping[str, Any], rows: Sequence[Row], out: Path) -> Path:
    concluded = [page.note(str(one), bad=one.agrees is False) for one in experiment.conclusions(rows)]
    about = [[key, str(value)] for key, value in header.items()]
    sections = [
        page.section("Conclusions", page.note(f"The paper: {experiment.claim}"), *concluded),
        page.section("Measured", page.side_by_side(experiment.curves(rows)), page.table(*experiment.table(rows))),
    ]
    strip = out / f"{experiment.name}.png"
    if strip.is_file():
        with Image.open(strip) as picture:
            sections.insert(1, page.section("Pictures", page.picture(picture.convert("RGB"), experiment.name)))
    sections.append(page.section("Setting", page.table(["", ""], about, text=True)))
    return page.write_page(out / "report.html", f"Experiment {experiment.name}", sections)
