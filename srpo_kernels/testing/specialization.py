"""What Triton's launcher makes of a kernel's arguments: the types and constants it compiles for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Specialization", "specialize"]

_TYPES = {
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
}


@dataclass(frozen=True)
class Specialization:
    """A kernel with all that its code depends on; two that are equal compile to the same."""

    kernel: Any  # triton.JITFunction
    signature: tuple[tuple[str, str], ...]  # of every parameter, "constexpr" for constants
    constants: tuple[tuple[str, Any], ...]
    divisible: frozenset[int]  # parameters known to be multiples of 16
    options: tuple[tuple[str, Any], ...]  # num_warps and so on

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)


def specialize(kernel: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Specialization:
    """The code that ``kernel[grid](*args, **kwargs)`` would run on a GPU.

    Tensors may be on any device, meta too; storages count as aligned, as those of PyTorch's allocator are.

    Raises:
        TypeError: an argument does not fit the kernel's parameters, or is of a kind this cannot read.
    """
    names = set(kernel.signature.parameters)
    bound = kernel.signature.bind(*args, **{name: value for name, value in kwargs.items() if name in names})
    bound.apply_defaults()
    signature, constants, divisible = {}, {}, set()
    for index, parameter in enumerate(kernel.params):
        value = bound.arguments[parameter.name]
        kind, multiple = _kind(parameter, value)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.name] = value
        elif multiple:
            divisible.add(index)
    options = {name: value for name, value in kwargs.items() if name not in names}
    return Specialization(
        kernel,
        tuple(signature.items()),
        tuple(constants.items()),
        frozenset(divisible),
        tuple(sorted(options.items())),
    )


def _kind(parameter: Any, value: Any) -> tuple[str, bool]:
    """A parameter's type, and whether its value is known to be a multiple of 16."""
    free = parameter.do_not_specialize
    multiple = not free and not parameter.do_not_specialize_on_alignment
    if parameter.is_constexpr or value is None:
        return "constexpr", False
    if isinstance(value, Tensor):
        if value.dtype not in _TYPES:
            raise TypeError(f"{parameter.name}: no Triton type for {value.dtype}")
        address = int(value.storage_offset()) * value.element_size()
        return "*" + _TYPES[value.dtype], multiple and address % 16 == 0
    if isinstance(value, bool):
        return "u1", False
    if isinstance(value, float):
        return parameter.annotation_type or "fp32", False
    if isinstance(value, int):
        if parameter.annotation_type[:2] in ("fp", "bf"):
            return parameter.annotation_type, False
        if value == 1 and not free:
            return "constexpr", False
        size = "i32" if -(2**31) <= value < 2**31 else "i64" if value < 2**63 else "u64"
        return parameter.annotation_type or size, multiple and value % 16 == 0
    raise TypeError(f"{parameter.name}: cannot specialise a {type(value).__name__}")
