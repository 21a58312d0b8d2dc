"""Whether what was timed also computed the right thing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Case
from benchmarks.timing import Timed

__all__ = ["accuracy"]


def accuracy(case: Case, eager: Callable[[dict[str, Tensor]], Any], timed: Timed) -> dict[str, float] | None:
    """Relative error, by norm, of what a timed call returned; and what is allowed of it.

    The exact result is eager's in fp32, on that call's input. Allowed are twice eager's own error, and an ulp of the
    dtype returned. None where the operator draws its own noise, which eager cannot know.
    """
    if "NoisePrior" in case.op:
        return None
    wide = {name: t.float() if t.dtype == torch.bfloat16 else t for name, t in timed.input.items()}
    worst = {"error": 0.0, "allowed": 0.0, "share": -1.0}
    for actual, plain, exact in zip(
        *(_tensors(each) for each in (timed.output, eager(timed.input), eager(wide))), strict=True
    ):
        error, own = (_error(each, exact) for each in (actual, plain))
        allowed = 2 * own + torch.finfo(actual.dtype).eps
        if error / allowed > worst["share"]:
            worst = {"error": error, "allowed": allowed, "share": error / allowed}
    return {key: worst[key] for key in ("error", "allowed")}


def _error(actual: Tensor, exact: Tensor) -> float:
    """Infinite where the shape differs or a value is not finite."""
    if actual.shape != exact.shape:
        return math.inf
    error = ((actual.float() - exact.float()).norm() / exact.float().norm().clamp_min(1e-30)).item()
    return error if math.isfinite(error) else math.inf


def _tensors(output: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (output,) if isinstance(output, Tensor) else output
