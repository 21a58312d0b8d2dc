"""Small drawings as inline SVG, by the standard library alone. Colours come from the page's classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Axis", "line", "picture", "polygon", "polyline", "rectangle", "text", "titled"]


@dataclass(frozen=True)
class Axis:
    """Maps values between `low` and `high` to pixels between `start` and `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (self.end - self.start) * ((at - low) / (high - low) if high > low else 0.5)

    def ticks(self) -> list[float]:
        """Powers of ten, or about five round numbers."""
        if self.log:
            exponents = range(math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
            return [10.0**exponent for exponent in exponents]
        step = 10 ** math.floor(math.log10((self.high - self.low) or 1))
        step = next(s * step for s in (0.1, 0.2, 0.25, 0.5, 1) if (self.high - self.low) / (s * step) <= 6)
        return [step * index for index in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def picture(
    width: float, height: float, parts: Sequence[str], label: str, classes: str = "chart", *, stretched: bool = False
) -> str:
    """`label` says in words what is to be seen."""
    box = f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}"'
    box += ' preserveAspectRatio="none"' if stretched else ""
    return f'<svg class="{classes}" {box} role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def text(x: float, y: float, content: str, classes: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{classes}" text-anchor="{anchor}">{escape(content)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, classes: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{classes}"/>'


def rectangle(x: float, y: float, width: float, height: float, classes: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{height:.1f}" class="{classes}"/>'


def polyline(points: Sequence[tuple[float, float]], classes: str) -> str:
    return f'<polyline points="{_points(points)}" class="{classes}"/>'


def polygon(points: Sequence[tuple[float, float]], classes: str) -> str:
    return f'<polygon points="{_points(points)}" class="{classes}"/>'


def titled(title: str, *parts: str) -> str:
    """`parts` with a tooltip."""
    return f"<g><title>{escape(title)}</title>{''.join(parts)}</g>"


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
