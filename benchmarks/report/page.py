"""``python -m benchmarks report RUN``: a page of HTML, a summary in Markdown, pictures; with a base, what changed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.compare import Comparison, compare
from benchmarks.history import runs
from benchmarks.noise import read_noise
from benchmarks.report import charts
from benchmarks.report.quick import quick_table, share
from benchmarks.report.style import STYLE
from benchmarks.report.summary import counts, headline, ordered, percent, short, summary, time
from benchmarks.schema import Finding, Measurement, Run, read
from benchmarks.verdict import Difference, Verdict

__all__ = ["page"]

_HISTORIES = 24


def page(comparison: Comparison | None, run: Run, kept: Sequence[Run] = (), static: Sequence[Finding] = ()) -> str:
    """One HTML file that needs nothing else. `kept` are earlier runs, `static` findings of the static tier beside."""
    said = (
        comparison.differences
        if comparison
        else [Difference(m.id, _alone(m), m.error or "", new=m) for m in run.measurements]
    )
    title = headline(said) if comparison else _title(run)
    slower = any(d.verdict is Verdict.SLOWER and d.gates for d in said)
    sections = [
        f'<h1 class="{"bad" if slower else ""}">{escape(title)}</h1>',
        f'<p class="soft">{_about(comparison, run)}</p>',
        _tiles(said),
        _refused(comparison),
        _changes(said) if comparison else "",
        _drawings(comparison, run, said),
        _histories(kept, said),
        _static([*run.findings, *static]),
        _environment(comparison),
        _lists(said),
        _all(run),
    ]
    head = '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    body = "\n".join(filter(None, sections))
    return f"{head}<title>{escape(title)}</title><style>{STYLE}</style>\n{body}\n"


def _title(run: Run) -> str:
    if run.static:
        worse = sum(finding.verdict == "WORSE" for finding in run.findings)
        return f"{len(run.static)} kernels, operators and models; {worse} figures worse than pinned"
    return f"{sum(m.status == 'ok' for m in run.measurements)} measurements"


def _alone(measurement: Measurement) -> Verdict:
    """Of a run that is compared with nothing."""
    by_status = {"error": Verdict.ERROR, "contaminated": Verdict.CONTAMINATED, "skipped": Verdict.SKIPPED}
    return by_status.get(measurement.status, Verdict.NEW)


def _about(comparison: Comparison | None, run: Run) -> str:
    code = f"<code>{escape(short(run))}</code>"
    if comparison:
        code = f"<code>{escape(short(comparison.base))}</code> → {code}"
    paired = ", processes in turns" if comparison and comparison.base.pair and comparison.base.pair == run.pair else ""
    packages = f"torch {run.software.torch}, Triton {run.software.triton}"
    return f"{escape(run.device.name)} · {code} · {run.created[:10]} · {escape(packages)}{paired}"


def _tiles(said: Sequence[Difference]) -> str:
    tiles = "".join(f'<div class="tile"><b class="{v.lower()}">{n}</b>{v.lower()}</div>' for v, n in counts(said))
    return f'<div class="tiles">{tiles}</div>'


def _refused(comparison: Comparison | None) -> str:
    if comparison is None or comparison.refused is None:
        return ""
    return f'<p class="incomparable">Nothing may be compared: {escape(comparison.refused)}.</p>'


def _changes(said: Sequence[Difference]) -> str:
    quiet = (Verdict.SAME, Verdict.SKIPPED, Verdict.INCOMPARABLE)
    shown = [d for d in ordered(said) if d.verdict not in quiet]
    if not shown:
        return ""
    rows = []
    for d in shown:
        before, after = (m.milliseconds if m else None for m in (d.base, d.new))
        interval = f"{percent(d.low)} to {percent(d.high)}" if d.low is not None else ""
        cells = [time(before), time(after), interval, f"{d.margin:.1%}" if d.margin else ""]
        verdict = f'<td class="left verdict {d.verdict.lower()}">{d.verdict}</td><td>{percent(d.change)}</td>'
        name = f'{verdict}<td class="name">{escape(d.id)}</td>'
        numbers = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        peer = "" if d.gates else ' class="peer"'
        rows.append(f'<tr{peer}>{name}{numbers}<td class="note">{escape(d.reason)}</td></tr>')
    header = [("left", "verdict"), ("", "change"), ("name", "measurement"), *(("", h) for h in _HEADS), ("note", "")]
    return "<h2>What changed</h2>" + _table(header, rows) + _KEY


_HEADS = ("before", "after", "95 %", "margin")
_KEY = (
    '<p class="key">A verdict needs the whole interval beyond the margin. Pale rows are what ours is held against: '
    "they decide nothing.</p>"
)


def _drawings(comparison: Comparison | None, run: Run, said: Sequence[Difference]) -> str:
    roofline = charts.roofline(said, run.ceilings)
    both = {"before": comparison.base, "after": run} if comparison else {"": run}
    parts = []
    if roofline:
        limits = [
            f"{rate:,.0f} {unit}"
            for rate, unit in (
                (run.ceilings.copy_gb_s, "GB/s by copying"),
                (run.ceilings.matmul_tflop_s, "TFLOP/s in bf16 products"),
            )
            if rate is not None
        ]
        key = (
            f'<p class="key">Measured ceilings: {", ".join(limits)}. Arrows go from before to after, up is faster.</p>'
        )
        parts.append(f"<section><h2>Share of the roofline</h2>{roofline}{key}</section>")
    if stack := charts.phases(both):
        parts.append(f"<section><h2>The step by phase</h2>{stack}</section>")
    return f'<div class="pair">{"".join(parts)}</div>' if parts else ""


def _histories(kept: Sequence[Run], said: Sequence[Difference]) -> str:
    figures: list[str] = []
    for d in ordered(said):
        drawn = charts.history(kept, d.id) if d.gates and len(figures) < _HISTORIES else None
        if drawn:
            last = time(d.new.milliseconds if d.new else None)
            figures.append(f"<figure>{drawn}<figcaption>{escape(d.id)}: {last}</figcaption></figure>")
    if not figures:
        return ""
    told = f"{len(kept)} runs, oldest left; the band is the 95 % interval, a dashed line other software."
    return f'<h2>History</h2><p class="key">{told}</p><div class="sparks">{"".join(figures)}</div>'


def _static(findings: Sequence[Finding]) -> str:
    if not findings:
        return ""
    rows = []
    for each in findings:
        sides = ("" if side is None else f"{side:,.12g}" for side in (each.pin, each.value))
        numbers = "".join(f"<td>{side}</td>" for side in sides)
        kind = "changed-figure" if each.verdict == "CHANGED" else escape(each.verdict.lower())
        where = f"{each.id}, {each.pins}"
        name = f'<td class="name">{escape(where)}</td><td class="left">{escape(each.figure)}</td>'
        note = f'<td class="note">{escape(each.reason)}</td>'
        rows.append(f'<tr><td class="left verdict {kind}">{escape(each.verdict)}</td>{name}{numbers}{note}</tr>')
    header = [
        ("left", "verdict"),
        ("name", "kernel, operator or model"),
        ("left", "figure"),
        ("", "pin"),
        ("", "now"),
        ("note", ""),
    ]
    return f"<h2>Static figures that differ from their pins</h2>{_table(header, rows)}"


def _environment(comparison: Comparison | None) -> str:
    if comparison is None:
        return ""
    sides = [
        {"device": asdict(r.device), "software": asdict(r.software), "git": asdict(r.git)}
        for r in (comparison.base, comparison.new)
    ]
    before, after = (_flat(side) for side in sides)
    rows = [
        f'<tr><td class="name">{escape(key)}</td><td class="left">{escape(str(before.get(key)))}</td>'
        f'<td class="left">{escape(str(after.get(key)))}</td></tr>'
        for key in {**before, **after}
        if before.get(key) != after.get(key)
    ]
    if not rows:
        return "<h2>Environment</h2><p>The same in both.</p>"
    return f"<h2>Environment</h2>{_table([('name', 'what differs'), ('left', 'before'), ('left', 'after')], rows)}"


def _flat(items: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in items.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _lists(said: Sequence[Difference]) -> str:
    parts = []
    for verdict in (Verdict.CONTAMINATED, Verdict.INCONCLUSIVE, Verdict.INCOMPARABLE, Verdict.SKIPPED):
        found = [d for d in said if d.verdict is verdict]
        if found:
            items = "".join(f"<li>{escape(d.id)}{escape(f': {d.reason}' if d.reason else '')}</li>" for d in found)
            parts.append(f"<details><summary>{len(found)} {verdict.lower()}</summary><ul>{items}</ul></details>")
    return f"<h2>Without a decision</h2>{''.join(parts)}" if parts else ""


def _all(run: Run) -> str:
    rows = []
    for m in run.measurements:
        if m.processes:
            rate = f"{m.gb_s:,.0f} GB/s" if m.gb_s else f"{m.tflop_s:,.0f} TFLOP/s" if m.tflop_s else ""
            joules = "" if m.joules is None else f"{m.joules * 1e3:.3g} mJ"
            peak = "" if m.peak_gb is None else f"{m.peak_gb:.2f} GB"
            cells = "".join(f"<td>{cell}</td>" for cell in (time(m.milliseconds), rate, share(run, m), peak, joules))
            rows.append(f'<tr><td class="name">{escape(m.id)}</td>{cells}</tr>')
    header = [("name", "measurement"), *(("", h) for h in ("median", "rate", "of copy", "peak memory", "energy"))]
    if not rows and run.static:
        return ""
    if not rows:
        return "<h2>Times</h2><p>Nothing was timed.</p>"
    return f"<details open><summary>All {len(rows)} times of this run</summary>{_table(header, rows)}</details>"


def _table(header: Sequence[tuple[str, str]], rows: Sequence[str]) -> str:
    heads = "".join(f'<th class="{classes}">{escape(name)}</th>' for classes, name in header)
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks report", description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--base", type=Path, help="the run to compare with")
    parser.add_argument("--history", type=Path, metavar="DIR", help="see `history`")
    parser.add_argument("--static", type=Path, metavar="FILE", help="what `static --out` wrote")
    parser.add_argument("--noise", type=Path, help="default benchmarks/noise/DEVICE.json")
    parser.add_argument("--html", type=Path, metavar="FILE")
    parser.add_argument("--md", type=Path, metavar="FILE", help="summary; also printed")
    parser.add_argument("--png", type=Path, metavar="DIR", help="pictures for a README; needs matplotlib")
    options = parser.parse_args(arguments)
    run = read(options.run)
    comparison = compare(read(options.base), run, read_noise(options.noise, run.device)) if options.base else None
    text = summary(comparison) if comparison else quick_table(run)
    print(text)
    if options.md is not None:
        options.md.write_text(text + "\n", encoding="utf-8")
    if options.html is not None:
        kept = runs(options.history, run.device.slug) if options.history else []
        html = page(comparison, run, kept, read(options.static).findings if options.static else [])
        options.html.write_text(html, encoding="utf-8")
    if options.png is not None:
        from benchmarks.report.png import pictures

        for path in pictures(run, options.png):
            print(f"written: {path}")
    return 0
