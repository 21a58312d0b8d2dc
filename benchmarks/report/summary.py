"""A comparison in Markdown, for terminals and pull requests: what got worse first, totals always complete."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from benchmarks.schema import Run
from benchmarks.verdict import Difference, Verdict

if TYPE_CHECKING:
    from benchmarks.compare import Comparison

__all__ = ["ORDER", "headline", "markdown", "percent", "short", "summary", "time"]

#: Worst first.
ORDER = (
    Verdict.SLOWER,
    Verdict.ERROR,
    Verdict.MISSING,
    Verdict.INCOMPARABLE,
    Verdict.CONTAMINATED,
    Verdict.INCONCLUSIVE,
    Verdict.FASTER,
    Verdict.NEW,
    Verdict.SAME,
    Verdict.SKIPPED,
)
_ROWS = 60


def summary(comparison: Comparison) -> str:
    """At most 60 rows, and a marker by which one comment is found and written anew."""
    said = comparison.differences
    lines = [f"### {headline(said)}", "", _between(comparison.base, comparison.new), ""]
    if comparison.refused:
        lines += [f"Nothing may be compared: {comparison.refused}.", ""]
    shown = [d for d in ordered(said) if d.verdict not in (Verdict.SAME, Verdict.SKIPPED)]
    if shown and not comparison.refused:
        header = ["verdict", "change", "measurement", "base", "new", "95 %", "margin", ""]
        lines += [markdown(header, [_row(each) for each in shown[:_ROWS]])]
        if len(shown) > _ROWS:
            lines += [f"{len(shown) - _ROWS} more are not shown; `--out` writes all.", ""]
    lines += [", ".join(f"{count} {verdict}" for verdict, count in counts(said)) + f"; {len(said)} in all."]
    return "\n".join([*lines, f"<!-- srpo-benchmarks {comparison.new.device.slug} -->"])


def headline(differences: Sequence[Difference]) -> str:
    """How many got slower, which is worst, and by how much."""
    slower = [d for d in differences if d.verdict is Verdict.SLOWER and d.gates]
    if not slower:
        decided = sum(d.verdict in (Verdict.SAME, Verdict.FASTER) for d in differences)
        return f"No regression in {decided} decided of {len(differences)} measurements"
    worst = max(slower, key=lambda d: d.change or 0)
    what = "regression" if len(slower) == 1 else "regressions"
    return f"{len(slower)} {what}, the worst {percent(worst.change)}: {worst.id}"


def ordered(differences: Sequence[Difference]) -> list[Difference]:
    """Worst first; ours before what it is held against, large changes before small ones."""
    return sorted(differences, key=lambda d: (ORDER.index(d.verdict), not d.gates, -abs(d.change or 0)))


def counts(differences: Sequence[Difference]) -> list[tuple[Verdict, int]]:
    found = Counter(difference.verdict for difference in differences)
    return [(verdict, found[verdict]) for verdict in ORDER if found[verdict]]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown; bars within cells are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def percent(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:+.1%}"


def time(milliseconds: float | None) -> str:
    """In the unit that leaves it three or four digits."""
    if milliseconds is None:
        return ""
    if milliseconds >= 1000:
        return f"{milliseconds / 1e3:.3f} s"
    return f"{milliseconds * 1e3:.1f} µs" if milliseconds < 1 else f"{milliseconds:.4g} ms"


def short(run: Run) -> str:
    """Which code a run measured."""
    sha = run.git.sha[:12] if run.git.sha else "unknown"
    return f"{sha}, changed" if run.git.dirty else sha


def _between(base: Run, new: Run) -> str:
    return f"{new.device.name}: `{short(base)}` ({base.created[:10]}) against `{short(new)}` ({new.created[:10]})"


def _row(each: Difference) -> list[str]:
    before, after = (m.milliseconds if m else None for m in (each.base, each.new))
    interval = "" if each.low is None else f"{percent(each.low)} to {percent(each.high)}"
    margin = "" if each.margin is None else f"{each.margin:.1%}"
    name = str(each.verdict) if each.gates else f"({each.verdict})"
    return [name, percent(each.change), each.id, time(before), time(after), interval, margin, each.reason]
