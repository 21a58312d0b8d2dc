"""Line charts as inline SVG: a few kilobytes each, in the page's own font, as wide as there is room."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, groupby

__all__ = ["Points", "line_chart"]

_WIDTH, _HEIGHT = 400, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 42, 40
_COLOURS = ("#1f6fb4", "#d9730d", "#2a8f4c", "#8a4fbf", "#b8324f", "#4d5b6a", "#0f8b8d", "#9a7b00")
#: Colour and dashes of the levels that there can be.
_LEVELS = {"step 0": ("#667788", "2 3"), "warn": ("#c77700", "6 4"), "stop": ("#a40000", "none")}

Points = tuple[Sequence[float], Sequence[float | None]]


def line_chart(
    title: str, x_label: str, series: Mapping[str, Points], levels: Mapping[str, Sequence[float]] | None = None
) -> str:
    """Lines of name -> (x, y) and horizontal ones at `levels` "step 0", "warn" and "stop".

    What is no number is left out: a line has a gap there.
    """
    levels = {name: [*filter(_finite, values)] for name, values in (levels or {}).items()}
    axes = _Axes(series, levels)
    parts, named = [_text(_WIDTH / 2, 17, title, 14, "middle", "600"), *axes.drawn(x_label)], []
    for name, values in levels.items():
        colour, dashes = _LEVELS[name]
        named.append((name, colour))
        for value in values:
            start, end = axes.place(axes.left, value), _WIDTH - _RIGHT
            parts.append(f'<path d="M{start}H{end}" stroke="{colour}" stroke-dasharray="{dashes}"/>')
    for (name, (xs, ys)), colour in zip(series.items(), cycle(_COLOURS)):
        named.append((name, colour))
        for there, points in groupby(zip(xs, ys, strict=True), key=lambda point: _finite(point[1])):
            if there:
                places = [axes.place(x, y) for x, y in points if y is not None]
                line = f'<polyline points="{" ".join(places)}" fill="none" stroke="{colour}" stroke-width="1.8"/>'
                dots = "".join(f"M{place}h0" for place in places)
                parts.append(f'{line}<path d="{dots}" stroke="{colour}" stroke-width="4" stroke-linecap="round"/>')
    if len(named) > 1:
        spans = "   ".join(f'<tspan fill="{colour}">● {html.escape(name)}</tspan>' for name, colour in reversed(named))
        parts.append(f'<text x="{_WIDTH / 2}" y="34" font-size="11" text-anchor="middle">{spans}</text>')
    head = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(title)}" font-family="inherit">'
    return f"{head}{''.join(parts)}</svg>"


class _Axes:
    """Where values are placed, with room for all of `series` and `levels`."""

    def __init__(self, series: Mapping[str, Points], levels: Mapping[str, Sequence[float]]) -> None:
        xs = [x for of, _ in series.values() for x in of]
        ys = [y for _, of in series.values() for y in of if y is not None and _finite(y)]
        ys += [level for of in levels.values() for level in of]
        self.left, self.right = min(xs), max(max(xs), min(xs) + 1)
        low, high = min(ys, default=0.0), max(ys, default=0.0)
        margin = 0.06 * (high - low) or abs(low) * 0.1 or 1.0
        self.low, self.high = low - margin, high + margin
        self.whole = all(float(x).is_integer() for x in xs)

    def place(self, x: float, y: float) -> str:
        """Coordinates of a point."""
        across = (x - self.left) / (self.right - self.left) * (_WIDTH - _LEFT - _RIGHT)
        up = (y - self.low) / (self.high - self.low) * (_HEIGHT - _TOP - _BOTTOM)
        return f"{_LEFT + across:.1f},{_HEIGHT - _BOTTOM - up:.1f}"

    def drawn(self, x_label: str) -> Iterator[str]:
        """Grid lines and numbers."""
        for value in _ticks(self.low, self.high, 5):
            start = self.place(self.left, value)
            yield f'<path d="M{start}H{_WIDTH - _RIGHT}" stroke="#e3e6ea"/>'
            yield _text(_LEFT - 6, float(start.split(",")[1]) + 4, _short(value), 11, "end")
        for value in _ticks(self.left, self.right, 6, whole=self.whole):
            across = float(self.place(value, self.low).split(",")[0])
            yield _text(across, _HEIGHT - _BOTTOM + 15, _short(value), 11, "middle")
        yield _text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 7, x_label, 11, "middle")


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """At most `count` + 1 round numbers within [low, high]."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    step = max(1.0, step) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [step * number for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _short(value: float) -> str:
    return f"{0.0 if abs(value) < 1e-12 else value:.4g}"


def _text(x: float, y: float, text: str, size: int, anchor: str, weight: str = "400") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" '
        f'fill="#334">{html.escape(text)}</text>'
    )
