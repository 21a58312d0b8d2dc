"""What is pinned of anything, and when a figure fails."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

__all__ = ["FIGURES", "Figure", "Verdict", "judge"]


class Verdict(str, Enum):
    WORSE = "WORSE"
    BETTER = "BETTER"
    CHANGED = "CHANGED"  # by more than a figure that only warns may
    SAME = "SAME"
    UNPINNED = "UNPINNED"
    MISSING = "MISSING"  # pinned, and no longer measured
    ERROR = "ERROR"
    TOOLCHAIN = "TOOLCHAIN"  # differs from what was pinned with other tools

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Figure:
    """A number that is pinned. `bad` is the direction that fails, None for figures that only tell.

    "none left" fails at zero where there were some. Changes within `slack`, a share of the pin, are none.
    """

    unit: str
    bad: Literal["more", "less", "none left"] | None
    slack: float = 0.0


_MIX = Figure("instructions", None, 0.05)
_BYTES, _LAUNCHES, _FLOPS = Figure("B", "more"), Figure("launches", "more"), Figure("FLOP", "more")
_PEAK = Figure("B", "more", 0.01)
_PHASES = ("forward", "backward")

#: By name; other figures are told in the result and not pinned. Static figures of a kernel are those of its code.
FIGURES: dict[str, Figure] = {
    # a kernel
    "regs": Figure("registers", None, 0.05),  # matter where they cost occupancy
    "stack": Figure("B", "more"),
    "spill_st": Figure("B", "more"),
    "spill_ld": Figure("B", "more"),
    "smem": Figure("B", None, 0.05),
    "occupancy": Figure("of 64 warps", "less"),
    "load_width": Figure("B", "less"),  # of the widest access of a thread
    "store_width": Figure("B", "less"),
    "narrow_loads": Figure("accesses", "more"),  # of fewer than 16 bytes: one such tensor among wide ones
    "narrow_stores": Figure("accesses", "more"),
    "warnings": Figure("of ptxas", "more"),
    "sass": _MIX,  # all of them
    "MMA": Figure("instructions", "none left", 0.05),
    **{f"{name}.{width}": _MIX for name in ("LDG", "STG") for width in (8, 16, 32, 64, 128, 256)},
    **dict.fromkeys(("LDGSTS", "LDL", "STL", "LDS", "STS", "BAR", "MUFU", "FFMA", "SHFL", "ATOM"), _MIX),
    # an operator or a block of a model
    **{f"{phase}_launches": _LAUNCHES for phase in _PHASES},
    **{f"{phase}_bytes": _BYTES for phase in _PHASES},
    **{f"{phase}_flops": _FLOPS for phase in _PHASES},
    "saved_bytes": _BYTES,
    # a model
    "parameters": Figure("parameters", "more"),
    "flops": _FLOPS,
    # a training step
    "resident_bytes": _PEAK,
    **{f"peak_{phase}_bytes": _PEAK for phase in (*_PHASES, "optimizer")},
}


def judge(figure: Figure, pin: float, value: float) -> Verdict:
    """The verdict on one value."""
    if abs(value - pin) <= figure.slack * abs(pin):
        return Verdict.SAME
    if figure.bad is None:
        return Verdict.CHANGED
    if figure.bad == "none left":
        return Verdict.WORSE if not value else Verdict.CHANGED
    return Verdict.WORSE if (value > pin) == (figure.bad == "more") else Verdict.BETTER
