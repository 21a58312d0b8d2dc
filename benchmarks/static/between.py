"""Static figures of two runs: what differs, in the verdicts that `compare` gives."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.schema import Figures, Finding, Run
from benchmarks.static.figures import FIGURES
from benchmarks.static.figures import Verdict as Static
from benchmarks.static.pins import Measured, Pin, Pins, compare
from benchmarks.static.unit import Unit
from benchmarks.verdict import Difference, Verdict

__all__ = ["differences"]

#: Other tools make other code: that is told, and no regression.
_MEANS = {
    Static.WORSE: Verdict.SLOWER,
    Static.BETTER: Verdict.FASTER,
    Static.CHANGED: Verdict.SAME,
    Static.TOOLCHAIN: Verdict.SAME,
    Static.UNPINNED: Verdict.NEW,
    Static.MISSING: Verdict.MISSING,
    Static.ERROR: Verdict.ERROR,
}


def differences(base: Run, new: Run) -> Iterator[Difference]:
    """One for every figure that differs, and one for each id of which none does. The base's figures are the pins."""
    pins: dict[str, Pins] = {}
    for each in base.static:
        values = {name: Pin(value, "") for name, value in each.values.items() if name in FIGURES}
        if each.error is None:
            pins.setdefault(each.pins, {}).setdefault(each.tools, {})[each.id] = values
    measured = [Measured(Unit(f.id, f.pins, f.tools, dict), f.values, f.error) for f in new.static]
    found = compare(measured, lambda name: pins.get(name, {}), matches=lambda _: True)
    for finding in found:
        yield _difference(finding)
    told = {(finding.pins, finding.id) for finding in found}
    after = {(each.pins, each.id) for each in new.static}
    for each in new.static:
        if (each.pins, each.id) not in told:
            yield Difference(_name(each), Verdict.SAME)
    for each in base.static:
        if (each.pins, each.id) not in told | after and each.error is None:
            yield Difference(_name(each), Verdict.MISSING, "only in the base")


def _difference(finding: Finding) -> Difference:
    if not finding.figure:
        return Difference(_name(finding), _MEANS[Static(finding.verdict)], finding.reason)
    share = (finding.value - finding.pin) / finding.pin if finding.pin and finding.value is not None else None
    tools = f" ({Static.TOOLCHAIN.lower()})" if finding.verdict == Static.TOOLCHAIN else ""
    name = f"{_name(finding)}, {finding.figure}"
    return Difference(name, _MEANS[Static(finding.verdict)], finding.numbers + tools, change=share)


def _name(of: Figures | Finding) -> str:
    return f"{of.id}, {of.pins}"
