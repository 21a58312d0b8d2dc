"""Results kept for the very tensors they were made from."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["IdentityCache"]


class IdentityCache:
    """Calls `make` once for the same, unchanged tensors; compares no values, so that no device is waited for.

    What is made carries no gradient and may be used in inference mode and out of it.
    """

    def __init__(self, make: Callable[..., Any], size: int = 8) -> None:
        self._make = make
        self._entries: deque[tuple[tuple[weakref.ref[Tensor], ...], tuple[int, ...], Any]] = deque(maxlen=size)

    def __call__(self, *tensors: Tensor) -> Any:
        versions = tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors)
        for references, known, value in self._entries:
            if known == versions and all(r() is t for r, t in zip(references, tensors, strict=True)):
                return value
        with torch.inference_mode(False), torch.no_grad():
            value = self._make(*tensors)
        self._entries.append((tuple(map(weakref.ref, tensors)), versions, value))
        return value
