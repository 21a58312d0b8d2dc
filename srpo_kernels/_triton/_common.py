"""What the launchers share."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["accumulator", "device_guard", "elementwise"]


def accumulator(tensor: Tensor) -> tl.dtype:
    """The dtype kernels compute in: fp32, or float64 for float64 tensors."""
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


def device_guard(tensor: Tensor) -> torch.cuda.device:
    """Launch on the tensor's own GPU, whichever is current. Does nothing for the interpreter's CPU tensors."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)


def elementwise(count: int, tensor: Tensor, multiple: int = 1) -> tuple[int, int]:
    """Block and warps for a memory-bound pass over `count` elements: two 16-byte loads a thread.

    The block is a multiple of `multiple`, a power of two.
    """
    warps = 4
    block = min(triton.next_power_of_2(count), warps * 32 * 2 * 16 // tensor.element_size())
    return max(block, multiple, 16), warps
