"""Outputs that start as NaN, so that an element a kernel forgets to write cannot pass by luck."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

__all__ = ["poisoned_outputs"]


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Within the block, ``torch.empty`` and its relatives return NaN-filled floating tensors."""

    def poison(allocate: Any) -> Any:
        def allocated(*arguments: Any, **options: Any) -> Tensor:
            tensor = allocate(*arguments, **options)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return allocated

    with (
        patch.object(torch, "empty", poison(torch.empty)),
        patch.object(torch, "empty_like", poison(torch.empty_like)),
        patch.object(torch, "empty_strided", poison(torch.empty_strided)),
        patch.object(Tensor, "new_empty", poison(Tensor.new_empty)),
    ):
        yield
