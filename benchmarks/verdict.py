"""The decision rule: what may be said of one measurement in two runs, and the exit status that follows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from benchmarks.schema import Measurement, Run
from benchmarks.stats import log_ratio

__all__ = ["Difference", "Margins", "Verdict", "exit_status", "judge", "refusal"]

MIN_PROCESSES = 5
#: Of what differences are never told: a share, and milliseconds, those of a step and those of anything else.
_SHARE, _STEP_MS, _KERNEL_MS = 0.02, 2.0, 0.0005
_TIMES_NOISE = 3.0


class Verdict(str, Enum):
    SLOWER = "SLOWER"
    FASTER = "FASTER"
    SAME = "SAME"
    INCONCLUSIVE = "INCONCLUSIVE"
    CONTAMINATED = "CONTAMINATED"
    INCOMPARABLE = "INCOMPARABLE"
    MISSING = "MISSING"
    ERROR = "ERROR"
    NEW = "NEW"
    SKIPPED = "SKIPPED"

    def __str__(self) -> str:
        return self.value


#: Exit statuses, the ones that win first. 2, an unreadable file, wins over all and is raised before there are any.
_STATUSES = (
    (3, {Verdict.INCOMPARABLE}),
    (4, {Verdict.MISSING, Verdict.ERROR}),
    (1, {Verdict.SLOWER}),
    (6, {Verdict.FASTER}),
    (5, {Verdict.INCONCLUSIVE, Verdict.CONTAMINATED}),
)
FAIL_ON = (Verdict.INCOMPARABLE, Verdict.MISSING, Verdict.ERROR, Verdict.SLOWER)


@dataclass(frozen=True)
class Difference:
    """One measurement in two runs; ratios are of new over base, less one."""

    id: str
    verdict: Verdict
    reason: str = ""
    base: Measurement | None = None
    new: Measurement | None = None
    change: float | None = None
    low: float | None = None
    high: float | None = None
    margin: float | None = None

    @property
    def gates(self) -> bool:
        """Whether its verdict counts: what ours is held against may change with its own library."""
        form = (self.new or self.base or Measurement(name="", mode="")).form
        return form == "ours"


@dataclass(frozen=True)
class Margins:
    """Noise measured A against A, by measurement; `paired` as its processes are compared."""

    noise: Mapping[str, tuple[float, float]]
    paired: bool = False

    def of(self, measurement: Measurement) -> float:
        """The change that is not told from none: as a share."""
        milliseconds = measurement.milliseconds
        assert milliseconds is not None
        floor = (_STEP_MS if measurement.part == "step" else _KERNEL_MS) / milliseconds
        total, neighbours = self.noise.get(measurement.id, (0.0, 0.0))
        return max(_SHARE, floor, _TIMES_NOISE * (neighbours if self.paired else total))


def refusal(base: Run, new: Run, *, across_software: bool = False) -> str | None:
    """Why nothing of two runs may be compared, or None."""
    for what in ("name", "capability", "multiprocessors", "memory_bytes", "mig", "power_limit_w"):
        before, after = (getattr(run.device, what) for run in (base, new))
        if before != after:
            return f"another GPU: {what} {before} against {after}"
    for what in () if across_software else ("torch", "triton", "cuda", "ptxas", "driver", "variables"):
        before, after = (getattr(run.software, what) for run in (base, new))
        if before != after:
            return f"other software: {what} {before} against {after} (--across-software compares all the same)"
    return None


def judge(base: Measurement | None, new: Measurement | None, margins: Margins) -> Difference:
    """The verdict on one measurement; identity first, then conditions, then numbers."""
    name = (new or base or Measurement(name="", mode="")).id

    def said(verdict: Verdict, reason: str = "") -> Difference:
        return Difference(name, verdict, reason, base, new)

    if base is None:
        return said(Verdict.NEW)
    if new is None:
        return said(Verdict.MISSING, "only in the base")
    if new.status == "error":
        return said(Verdict.ERROR, new.error or "failed")
    if new.status == "skipped":
        measured = base.status == "ok"
        return said(Verdict.MISSING if measured else Verdict.SKIPPED, new.error or "not measured")
    if base.status in ("error", "skipped"):
        return said(Verdict.NEW, f"the base has none: {base.error or base.status}")
    for what in ("version", "recipe", "contract", "unit"):
        if getattr(base, what) != getattr(new, what):
            return said(Verdict.INCOMPARABLE, f"{what} {getattr(base, what)} against {getattr(new, what)}")
    if "contaminated" in (base.status, new.status):
        return said(Verdict.CONTAMINATED, new.error or base.error or "")
    return _decide(name, base, new, margins)


def _decide(name: str, base: Measurement, new: Measurement, margins: Margins) -> Difference:
    before, after = ([process.median for process in each.processes] for each in (base, new))
    margin = margins.of(base)
    if margins.paired and len(before) != len(after):
        return Difference(name, Verdict.INCOMPARABLE, f"{len(before)} processes paired with {len(after)}", base, new)
    change, low, high = log_ratio(before, after, paired=margins.paired)
    verdict, reason = _place(low, high, margin), ""
    if min(len(before), len(after)) < MIN_PROCESSES:
        verdict, reason = Verdict.INCONCLUSIVE, f"{min(len(before), len(after))} processes of {MIN_PROCESSES}"
    elif (cycles := _cycles(base, new, margins)) not in (None, verdict):
        verdict, reason = Verdict.INCONCLUSIVE, f"clocks moved: by cycles it is {cycles}"
    shares = {key: math.expm1(value) for key, value in (("change", change), ("low", low), ("high", high))}
    return Difference(name, verdict, reason, base, new, margin=margin, **shares)


def _place(low: float, high: float, margin: float) -> Verdict:
    slower, faster = math.log1p(margin), -math.log1p(margin)
    if low > slower:
        return Verdict.SLOWER
    if high < faster:
        return Verdict.FASTER
    return Verdict.SAME if faster <= low and high <= slower else Verdict.INCONCLUSIVE


def _cycles(base: Measurement, new: Measurement, margins: Margins) -> Verdict | None:
    """The verdict in cycles, of what arithmetic bounds; None where it says nothing or clocks are unknown."""
    if base.flops is None or any(p.sm_mhz is None for each in (base, new) for p in each.processes):
        return None
    before, after = ([p.median * (p.sm_mhz or 0) for p in each.processes] for each in (base, new))
    _, low, high = log_ratio(before, after, paired=margins.paired)
    return _place(low, high, margins.of(base))


def exit_status(differences: Iterable[Difference], fail_on: Iterable[Verdict] = FAIL_ON) -> int:
    """0, or the status that wins among the verdicts of `fail_on` that were given."""
    given = {difference.verdict for difference in differences if difference.gates} & set(fail_on)
    return next((status for status, verdicts in _STATUSES if verdicts & given), 0)
