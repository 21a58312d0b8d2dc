"""This process among the ranks of a torchrun job, and what they agree on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["ALONE", "Ranks"]

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """`rank` of `world` processes, computing on `device`; `control` is their group for values in host memory."""

    rank: int
    world: int
    device: torch.device
    control: dist.ProcessGroup | None = None

    @classmethod
    def join(cls, device: str) -> Ranks:
        """Join the job that torchrun's environment describes; alone without one. `device` "auto" prefers a GPU."""
        rank, world, local = (int(os.environ.get(name, at)) for name, at in _ENVIRONMENT.items())
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        chosen = torch.device(device, local) if device == "cuda" else torch.device(device)
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        if world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
        return cls(rank, world, chosen).twin()

    def twin(self) -> Ranks:
        """The same ranks with a control group of their own, for a thread; all ranks must call it together."""
        if self.world == 1:
            return self
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)  # all ranks are in it
        return replace(self, control=group)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace every tensor by its mean over the ranks; small ones of a dtype travel together."""
        if self.world == 1:
            return
        for bucket in _buckets(tensors):
            whole = bucket[0] if len(bucket) == 1 else torch.cat([tensor.flatten() for tensor in bucket])
            dist.all_reduce(whole)
            whole /= self.world
            if len(bucket) > 1:
                for tensor, mean in zip(bucket, whole.split([tensor.numel() for tensor in bucket]), strict=True):
                    tensor.copy_(mean.view_as(tensor))

    def maximum(self, value: int) -> int:
        """The largest `value` of any rank; all must call it together. Nothing waits for the device."""
        if self.world == 1:
            return value
        largest = torch.tensor(value)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.control)
        return int(largest)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank; all ranks must call it together."""
        return bool(self.maximum(int(flag)))

    def together(self, work: Callable[[], T], *, main: bool = False) -> list[T]:
        """What `work` returns on each rank, or with `main` on rank 0 alone; all ranks must call it together.

        When it raises on one rank, all raise.
        """
        if self.world == 1:
            return [work()]
        mine, failure = [], None
        try:
            mine = [work()] if self.is_main or not main else []
        except Exception as error:
            failure = error
        told: list[Any] = [None] * self.world
        dist.all_gather_object(told, (mine, failure and f"{type(failure).__name__}: {failure}"), group=self.control)
        if failure is not None:
            raise failure
        for rank, (_, problem) in enumerate(told):
            if problem is not None:
                raise RuntimeError(f"rank {rank}: {problem}")
        return [result for results, _ in told for result in results]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier()


#: A process that has none beside it, and computes nothing.
ALONE = Ranks(0, 1, torch.device("cpu"))


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype, together of at most `_BUCKET` bytes, in order; larger ones alone."""
    open_buckets: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        bucket = open_buckets.setdefault(tensor.dtype, [])
        if bucket and sum(held.nbytes for held in bucket) + tensor.nbytes > _BUCKET:
            yield bucket
            bucket = open_buckets[tensor.dtype] = []
        bucket.append(tensor)
    yield from filter(None, open_buckets.values())


_ENVIRONMENT = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
_BUCKET = 32 << 20
