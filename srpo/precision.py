"""What a model computes in."""

from __future__ import annotations

from typing import Literal

import torch

__all__ = ["Precision", "compute_dtype"]

#: "fp8-rollout" is bf16 but for the rollouts of training, whose linear layers multiply in e4m3; "fp8" trains in it too.
Precision = Literal["fp32", "bf16", "fp8-rollout", "fp8"]


def compute_dtype(precision: Precision) -> torch.dtype:
    """What everything is computed in that is not e4m3."""
    return torch.float32 if precision == "fp32" else torch.bfloat16
