"""Every monitor: its unit, which change does harm, and the change that is worth a warning."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

__all__ = ["MONITORS", "Limit", "Monitor", "harm_of", "monitor_of"]

#: "rise", "fall", or "either" of them.
Harm = Literal["rise", "fall", "either"]


@dataclass(frozen=True)
class Limit:
    """The largest harmless change from step 0: in the monitor's unit, or relative to its value at step 0."""

    amount: float
    relative: bool = False

    @classmethod
    def parse(cls, text: float | str) -> Limit:
        """A number in the monitor's unit, or a text such as "25%". Raises `ValueError` for anything else."""
        relative = isinstance(text, str) and text.endswith("%")
        try:
            amount = float(text[:-1]) / 100 if relative else float(text)  # type: ignore[index]
        except (TypeError, ValueError):
            amount = math.nan
        if isinstance(text, bool) or not 0 <= amount < math.inf:
            raise ValueError(f"must be a number in the monitor's unit or a text such as '25%', from 0 up, got {text!r}")
        return cls(amount, relative)

    def width(self, start: float) -> float:
        """The change allowed, in the monitor's unit, where step 0 measured `start`."""
        return self.amount * abs(start) if self.relative else self.amount

    def __str__(self) -> str:
        return f"{self.amount:g}" if not self.relative else f"{100 * self.amount:g}%"


@dataclass(frozen=True)
class Monitor:
    """What one monitor measures. `warn`: its default limit; None: it warns only of what the recipe says."""

    title: str
    unit: str
    harm: Harm
    warn: float | str | None = None


#: docs/monitors.md gives the formulas.
MONITORS = {
    "reward": Monitor("Trained reward", "score", "fall"),
    "swapped": Monitor("Trained reward, words swapped", "score", "rise"),
    "held_out": Monitor("Held-out reward", "score", "fall", "2%"),
    "alignment": Monitor("Alignment with the plain prompt", "score", "fall", "5%"),
    "sgp": Monitor("Semantic guided preference", "score", "fall"),
    "lab_a": Monitor("Green to red (a*)", "CIE Lab", "either", 4.0),
    "lab_b": Monitor("Blue to yellow (b*)", "CIE Lab", "either", 4.0),
    "chroma": Monitor("Saturation (chroma)", "CIE Lab", "either", 6.0),
    "clipped": Monitor("Clipped pixels", "share", "rise", 0.05),
    "sharpness": Monitor("Sharpness", "levels²", "either", "60%"),
    "grid_vae": Monitor("Grid of the VAE", "ratio", "rise", 0.25),
    "grid_patch": Monitor("Grid of the patches", "ratio", "rise", 0.25),
    "diversity": Monitor("Diversity of features", "1 - cosine", "fall", "25%"),
    "diversity_pixels": Monitor("Diversity of pixels", "levels", "fall", "25%"),
    "drift": Monitor("Velocity drift", "relative", "rise", 0.3),
}


def monitor_of(name: str) -> Monitor:
    """The monitor of a measurement: ``drift@0.9`` and ``clipped@1024x1024`` are kinds of ``drift`` and ``clipped``."""
    return MONITORS[name.partition("@")[0]]


def harm_of(name: str, change: float) -> float:
    """How much of a change is harmful: positive where it goes the way that does harm."""
    return {"rise": change, "fall": -change, "either": abs(change)}[monitor_of(name).harm]
