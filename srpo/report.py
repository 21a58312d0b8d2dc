"""Self-contained HTML reports: curves, pictures and tables in one file."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from srpo.runlog import read_log

__all__ = ["curves", "picture", "section", "table", "training_curves", "training_report", "write_page"]

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1c2024 }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .3rem .9rem; text-align: right }
th:first-child, td:first-child { text-align: left } thead th { border-bottom: 2px solid #889 }
tbody tr + tr td { border-top: 1px solid #dde } figure { margin: 1rem .5rem 1rem 0; display: inline-block }
figure:has(svg) { width: 48% }
figcaption { color: #556; font-size: .9rem } img, svg { max-width: 100%; height: auto }
"""


def write_page(path: Path, title: str, sections: Sequence[str]) -> Path:
    """Write one HTML file that needs nothing else."""
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
    path.write_text(
        f"{head}<style>{_STYLE}</style><h1>{html.escape(title)}</h1>\n" + "\n".join(sections), encoding="utf-8"
    )
    return path


def section(title: str, *parts: str) -> str:
    return f"<h2>{html.escape(title)}</h2>\n" + "\n".join(parts)


def picture(image: Image.Image | Path, caption: str) -> str:
    """A picture embedded in the page."""
    if isinstance(image, Path):
        data = image.read_bytes()
    else:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        data = buffer.getvalue()
    text = html.escape(caption)
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return f'<figure><img alt="{text}" src="{source}"><figcaption>{text}</figcaption></figure>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def cells(values: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(value)}</{tag}>" for value in values) + "</tr>"

    body = "".join(cells(row, "td") for row in rows)
    return f"<table><thead>{cells(header, 'th')}</thead><tbody>{body}</tbody></table>"


def curves(title: str, x_label: str, series: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> str:
    """Lines of name -> (x, y) as an inline SVG."""
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for name, (x, y) in series.items():
        axes.plot(x, y, marker="o", markersize=3, label=name)
    axes.set(title=title, xlabel=x_label)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    return "<figure>" + buffer.getvalue()[buffer.getvalue().index("<svg") :] + "</figure>"


def training_curves(records: Sequence[Mapping]) -> list[str]:
    """Loss, score and phase-time curves of a run's update records."""
    steps = [record["step"] for record in records]

    def group(key: str) -> dict[str, tuple[list, list]]:
        return {name: (steps, [record[key][name] for record in records]) for name in records[0][key]}

    return [
        curves("Loss", "update", group("losses")),
        curves("Relative score by branch", "update", group("scores")),
        curves("Gradient norm before clipping", "update", {"norm": (steps, [r["grad_norm"] for r in records])}),
        curves("Seconds by phase", "update", group("seconds")),
    ]


def training_report(directory: Path) -> Path:
    """``report.html`` of a run directory: curves, first and last sample grid, config."""
    records = read_log(directory)
    sections = []
    if records:
        sections.append(section("Training", *training_curves(records)))
    grids = sorted((directory / "samples").glob("step-*.png"))
    if grids:
        shown = [grids[0], grids[-1]] if len(grids) > 1 else grids
        sections.append(section("Samples (same prompts, same noise)", *(picture(grid, grid.stem) for grid in shown)))
    config = html.escape((directory / "config.yaml").read_text(encoding="utf-8"))
    sections.append(section("Config", f"<pre>{config}</pre>"))
    return write_page(directory / "report.html", f"SRPO run {directory.name}", sections)
