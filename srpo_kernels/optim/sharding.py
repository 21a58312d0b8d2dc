"""Where a tensor's elements are: its local rows, its global offset, and the processes that hold the rest."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

__all__ = ["add_up", "check_placements", "local", "local_rows", "matrix", "shard_groups", "sharded_like"]


def local(tensor: Tensor) -> Tensor:
    """The part of `tensor` that this process holds; writing to it writes to `tensor`."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def matrix(tensor: Tensor) -> Tensor:
    """A plain tensor as [rows, columns], rows being what `Shard(0)` deals out."""
    rows = tensor.shape[0] if tensor.ndim else 1
    return tensor.reshape(rows, math.prod(tensor.shape[1:]))


def check_placements(what: str, tensor: Tensor) -> None:
    """Raise `ValueError`, beginning with `what`, unless `tensor` is sharded by rows or not at all."""
    placements = tensor.placements if isinstance(tensor, DTensor) else ()
    if any(type(placement) is not Replicate and placement != Shard(0) for placement in placements):
        raise ValueError(f"{what} has placements {placements}: only Shard(0) and Replicate() are supported")


def local_rows(tensor: Tensor) -> tuple[int, int]:
    """First row that this process holds of `tensor`, and how many: as `torch.chunk` deals them out."""
    first, count = 0, tensor.shape[0] if tensor.ndim else 1
    if isinstance(tensor, DTensor):
        coordinate = tensor.device_mesh.get_coordinate()
        if coordinate is None:
            return 0, 0
        for dimension, placement in enumerate(tensor.placements):
            if placement.is_shard():
                share = -(-count // tensor.device_mesh.size(dimension))
                skipped = min(share * coordinate[dimension], count)
                first, count = first + skipped, min(share, count - skipped)
    return first, count


def sharded_like(tensor: Tensor, part: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor of global `shape`, sharded as `tensor` is, of which this process holds `part`, on whatever device."""
    if not isinstance(tensor, DTensor):
        return part
    meta = TensorMeta(torch.Size(shape), torch.empty(shape, device="meta").stride(), part.dtype)
    # Not DTensor.from_local: it moves what is in host memory to the mesh's device.
    return DTensor(part, DTensorSpec(tensor.device_mesh, tensor.placements, tensor_meta=meta), requires_grad=False)


def shard_groups(tensor: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """The process groups over which sums of local parts are sums over `tensor`."""
    if not isinstance(tensor, DTensor):
        return ()
    return tuple(
        tensor.device_mesh.get_group(dimension)
        for dimension, placement in enumerate(tensor.placements)
        if placement.is_shard() and tensor.device_mesh.size(dimension) > 1
    )


def add_up(parts: list[tuple[tuple[dist.ProcessGroup, ...], Tensor]]) -> Tensor:
    """Sum of the int64 vectors of all tensors over all processes: one all-reduce where all are sharded alike."""
    sums: dict[tuple[dist.ProcessGroup, ...], Tensor] = {}
    for groups, vector in parts:
        sums[groups] = sums[groups] + vector.to(sums[groups].device) if groups in sums else vector.clone()
    for groups, vector in sums.items():
        for group in groups:
            dist.all_reduce(vector, group=group)
    first, *rest = sums.values()
    return sum((vector.to(first.device) for vector in rest), first)
