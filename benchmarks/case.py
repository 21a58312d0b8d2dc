"""What is measured of an operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Case", "Output"]

Output = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One operator at one shape. `make` draws inputs by name; `eager` is what one would write without the package."""

    op: str
    shape: str
    make: Callable[[], dict[str, Tensor]]
    ours: Callable[..., Output]
    eager: Callable[..., Output]
    differentiable: tuple[str, ...]
    forward_elements: float  # moved at least, in elements of `dtype`
    backward_elements: float
    dtype: torch.dtype = torch.bfloat16
    compiled: bool = True  # also time the eager form compiled, which takes seconds to prepare
