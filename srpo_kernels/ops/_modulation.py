"""Layouts that the modulation operators share: tokens [B, S, D], and one vector [B, D] an image that they meet."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from srpo_kernels.ops._checks import check_floating

#: Widest row that a program holds in registers.
MAX_WIDTH = 8192


def check_modulation(op: str, tokens: dict[str, Tensor], vectors: dict[str, Tensor]) -> None:
    """Raise unless `tokens` share one shape [B, ..., D], and `vectors` are [B, D] or [B, 1, D] for it."""
    check_floating(op, **tokens, **vectors)
    (first, reference), *others = tokens.items()
    if reference.ndim < 2:
        raise ValueError(f"{op}: {first} must be [B, ..., D], got {list(reference.shape)}")
    for name, tensor in others:
        if tensor.shape != reference.shape:
            raise ValueError(f"{op}: {name} must be {list(reference.shape)} as {first}, got {list(tensor.shape)}")
    batch, width = reference.shape[0], reference.shape[-1]
    for name, vector in vectors.items():
        if vector.shape not in ((batch, width), (batch, 1, width)):
            wanted = f"[{batch}, {width}] or [{batch}, 1, {width}]"
            raise ValueError(f"{op}: {name} must be {wanted}, got {list(vector.shape)}")


def check_width(op: str, name: str, tensor: Tensor) -> None:
    """Raise unless a row of `tensor` fits a program."""
    if tensor.shape[-1] > MAX_WIDTH:
        raise ValueError(f"{op}: {name} must be at most {MAX_WIDTH} wide, got {tensor.shape[-1]}")


def as_rows(tensor: Tensor) -> Tensor:
    """[B, ..., D] as [B, S, D], a view where rows are contiguous and one stride apart."""
    batch, *middle, width = tensor.shape
    return dense_rows(tensor.reshape(batch, math.prod(middle), width))


def as_vector(tensor: Tensor) -> Tensor:
    """[B, D] or [B, 1, D] as [B, D], a view where rows are contiguous."""
    return dense_rows(tensor if tensor.ndim == 2 else tensor.squeeze(1))


def dense_rows(tensor: Tensor) -> Tensor:
    """`tensor`, copied unless its rows are contiguous: kernels take the other strides."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def wide(tensor: Tensor) -> torch.dtype:
    """The dtype that operators compute in for `tensor`."""
    return torch.promote_types(tensor.dtype, torch.float32)


def unpack(vectors: Tensor, dtypes: Sequence[torch.dtype], wanted: Sequence[bool]) -> list[Tensor | None]:
    """The gradients in `vectors` [wanted ones, B, D], each in its own dtype, and None for the others."""
    found = iter(vectors.unbind())
    return [next(found).to(dtype) if want else None for dtype, want in zip(dtypes, wanted, strict=True)]
