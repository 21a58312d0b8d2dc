"""Outputs that start as NaN, so that an element a kernel forgets to write cannot pass by luck."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["poisoned_outputs"]


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Within the block, ``torch.empty`` and its relatives return NaN-filled floating tensors.

    PyTorch does so itself in deterministic mode (`torch.utils.deterministic.fill_uninitialized_memory`).
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
