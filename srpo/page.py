"""One HTML file that needs nothing else: sections, tables, pictures and curves."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from srpo.chart import Points, line_chart

__all__ = ["curves", "note", "picture", "section", "side_by_side", "table", "write_page"]

_STYLE = """
:root { color-scheme: light; --ink: #1c2024; --quiet: #556; --line: #dde }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: var(--ink) }
h1 { line-height: 1.2; overflow-wrap: anywhere } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line) }
.scroll { overflow-x: auto } table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .3rem .7rem; text-align: right; vertical-align: top } thead th { border-bottom: 2px solid #889 }
th:first-child, td:first-child, .text td, .text th { text-align: left }
tbody tr + tr td { border-top: 1px solid var(--line) }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: 1rem }
figure { margin: 1rem 0 } .curves figure { margin: 0 } figcaption { color: var(--quiet); font-size: .9rem }
img, svg { max-width: 100%; height: auto } img { image-rendering: auto; border-radius: 2px }
pre { overflow-x: auto; background: #f5f6f8; padding: 1rem; font-size: .85rem }
@media (max-width: 40rem) { body { margin: 1rem auto } th, td { padding: .25rem .4rem; font-size: .85rem } }
.bad { color: #a40000; font-weight: 600 } .note { color: var(--quiet) }
"""
_WIDEST = 1440  # pixels: a picture beyond this is shrunk, and a JPEG


def write_page(path: Path, title: str, sections: Sequence[str]) -> Path:
    """Write one HTML file that needs nothing else."""
    name = html.escape(title)
    head = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
    )
    body = "\n".join(sections)
    path.write_text(f"{head}<body><h1>{name}</h1>\n{body}\n</body></html>\n", encoding="utf-8")
    return path


def section(title: str, *parts: str) -> str:
    return f"<h2>{html.escape(title)}</h2>\n" + "\n".join(parts)


def side_by_side(figures: Sequence[str]) -> str:
    """As many figures in a row as fit."""
    return f'<div class="curves">{"".join(figures)}</div>'


def note(text: str, *, bad: bool = False) -> str:
    """A line of text."""
    return f'<p class="{"bad" if bad else "note"}">{html.escape(text)}</p>'


def picture(image: Image.Image | Path, caption: str) -> str:
    """A picture embedded in the page, no wider than a page is."""
    if isinstance(image, Path):
        with Image.open(image) as opened:
            image = opened.convert("RGB")
    buffer, kind = io.BytesIO(), "png"
    if image.width > _WIDEST:
        kind = "jpeg"
        height = round(image.height * _WIDEST / image.width)
        image.convert("RGB").resize((_WIDEST, height), Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=85)
    else:
        image.save(buffer, "PNG", optimize=True)
    text = html.escape(caption)
    source = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return f'<figure><img alt="{text}" src="{source}"><figcaption>{text}</figcaption></figure>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, text: bool = False) -> str:
    """A table of numbers, or with `text` of words."""

    def cells(values: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(value)}</{tag}>" for value in values) + "</tr>"

    body = "".join(cells(row, "td") for row in rows)
    kind = ' class="text"' if text else ""
    return f'<div class="scroll"><table{kind}><thead>{cells(header, "th")}</thead><tbody>{body}</tbody></table></div>'


def curves(
    title: str, x_label: str, series: Mapping[str, Points], *, levels: Mapping[str, Sequence[float]] | None = None
) -> str:
    """Lines of name -> (x, y) as a figure, and horizontal ones at `levels`, by name."""
    return f"<figure>{line_chart(title, x_label, series, levels)}</figure>"
