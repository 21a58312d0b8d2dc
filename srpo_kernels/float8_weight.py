"""A weight of which a process holds e4m3 values and nothing else, as a parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from srpo_kernels.ops.quantize_fp8 import Float8, quantize_fp8

__all__ = ["Float8Weight", "in_float8"]

aten = torch.ops.aten


class Float8Weight(Tensor):
    """A weight [N, K] gathered in e4m3 (`gather_float8`): its values and row scales, `quantized`, and no others.

    For autograd it is a leaf of `dtype`, in which it gets its gradient. No operator takes it: multiplying is
    `Float8Linear`'s, and any other raises TypeError.
    """

    e4m3: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, values: Tensor, scale: Tensor, dtype: torch.dtype) -> Float8Weight:
        weight = Tensor._make_wrapper_subclass(cls, values.shape, dtype=dtype, device=values.device)
        weight.e4m3, weight.scale = values, scale
        return weight

    @property
    def quantized(self) -> Float8:
        return Float8(self.e4m3, self.scale)

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return ["e4m3", "scale"], self.dtype

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, Tensor], dtype: torch.dtype, _size: Any, _stride: Any
    ) -> Float8Weight:
        return cls(inner["e4m3"], inner["scale"], dtype)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """What FSDP2 makes a parameter with, and the gradient of one that was not used."""
        weight, *rest = args
        if isinstance(weight, cls):
            same = func is aten.as_strided.default and rest[:2] == [list(weight.shape), list(weight.stride())]
            if same or func is aten.detach.default:
                return cls(*weight.quantized, weight.dtype)
            if func is aten.zeros_like.default:
                return torch.zeros(weight.shape, **{"dtype": weight.dtype, "device": weight.device, **kwargs})
        raise TypeError(f"{func}: a weight gathered in e4m3 (gather_float8) is for Float8Linear only")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        del tensor_contents
        return f"Float8Weight({self.quantized}, dtype={self.dtype})"


def in_float8(weight: Tensor) -> Float8:
    """A weight [N, K] quantised by row, unless it is already."""
    return weight.quantized if isinstance(weight, Float8Weight) else quantize_fp8(weight)
