"""States in host memory pass through the device in slices while a step uses them.

A slice is rows of some parameters. While one is stepped, the next is copied in and the one before is copied out: three
queues of work over three buffers. No order is left to a default stream: each queue waits for the events it needs, and
buffers belong to the caller's stream, which waits for the last copy before they are freed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from srpo_kernels.optim.compiled import count_steps
from srpo_kernels.optim.norm import GradientNorm
from srpo_kernels.optim.reference import BINS
from srpo_kernels.optim.sharding import local, local_rows
from srpo_kernels.optim.storage import Storage

__all__ = ["DEVICE_BYTES", "streamed", "wait_for_copies"]

#: Device memory for states on their way.
DEVICE_BYTES = 256 * 2**20
_BUFFERS = 3  # one is filled, one stepped, one emptied
_ALIGNMENT = 256

Members = list[tuple[Storage, Tensor]]
#: Steps parameters that are stored alike: options, members, numbers of the coming step, norm, coefficient -> telemetry.
Step = Callable[[dict[str, Any], Members, Tensor, GradientNorm, Tensor], Tensor]


def streamed(
    step: Step, group: dict[str, Any], members: Members, steps: Tensor, norm: GradientNorm, coefficient: Tensor
) -> Tensor:
    """What `step` does, for members some of whose states are in host memory.

    Only the averages' turn has to be known here, so only with `ema_every` > 1 this waits for the step numbers.
    """
    device = steps.device
    sums = torch.zeros(2 * BINS + 1, dtype=torch.int64, device=device)
    numbers = steps.unbind()
    scratch = torch.zeros((), device=device)  # slices of a parameter are one step of it, counted below
    for names, chosen in _turns(group, members, steps):
        whole = [_Rows(i, *members[i], 0, local_rows(members[i][0].parameter)[1]) for i in chosen]
        slices = list(_slices(whole, names, DEVICE_BYTES // _BUFFERS))
        size = max((sum(part.room(names) for part in slice_) for slice_ in slices), default=0)
        slots = [_Slot(size, device) for _ in slices[:_BUFFERS]]
        with _lanes(device) as (fill, compute, empty):
            for turn, slice_ in enumerate(slices):
                slot = slots[turn % _BUFFERS]
                with fill.after(slot.emptied, slot.filled):
                    held = slot.fill(slice_, names)
                with compute.after(slot.filled, slot.stepped):
                    inside = [part.inside(states, scratch) for part, states in zip(slice_, held, strict=True)]
                    chosen_numbers = torch.stack([numbers[part.number] for part in slice_])
                    sums += step(group, inside, chosen_numbers, norm, coefficient)
                with empty.after(slot.stepped, slot.emptied):
                    for part, states in zip(slice_, held, strict=True):
                        for name, state in states.items():
                            part.of(part.storage.state[name]).copy_(state, non_blocking=True)
    count_steps([storage for storage, _ in members], norm)
    return sums


def wait_for_copies(device: torch.device) -> None:
    """Return when the host may read the states that `streamed` left to the device's stream to write."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _turns(group: dict[str, Any], members: Members, steps: Tensor) -> list[tuple[list[str], list[int]]]:
    """Which states in host memory a step uses, and of which members."""
    storage, _ = members[0]
    names, everyone = [name for name in storage.state if name in storage.hosted], list(range(len(members)))
    if "ema" not in names or group["ema_every"] == 1:
        return [(names, everyone)]
    due = (steps % group["ema_every"] == 0).tolist()
    without = [name for name in names if name != "ema"]
    turns = [(names, [i for i in everyone if due[i]]), (without, [i for i in everyone if not due[i]])]
    return [turn for turn in turns if turn[1]]


@dataclass(frozen=True)
class _Rows:
    """`count` of a member's local rows."""

    number: int  # among the members
    storage: Storage
    gradient: Tensor
    first: int
    count: int

    def of(self, tensor: Tensor) -> Tensor:
        """These rows of the parameter, its gradient or a state."""
        part = local(tensor).detach()
        return part[self.first : self.first + self.count] if part.ndim else part

    def room(self, names: list[str]) -> int:
        """Bytes of a buffer that the states take."""
        return sum(_aligned(self.of(self.storage.state[name]).nbytes) for name in names)

    def fitting(self, names: list[str], free: int) -> int:
        """How many of these rows fit into so many bytes."""
        row = sum(self.of(self.storage.state[name]).nbytes for name in names) // self.count
        return min(self.count, max(free - len(names) * _ALIGNMENT, 0) // row) if row else self.count

    def inside(self, states: dict[str, Tensor], step: Tensor) -> tuple[Storage, Tensor]:
        """The rows as a parameter of their own with `states` on the device, and their gradient."""
        storage = self.storage
        start = local_rows(storage.parameter)[0] + self.first
        part = self.of(storage.parameter)
        own = {name: self.of(state) for name, state in storage.state.items() if name not in storage.hosted}
        offset = storage.offset + start * (part.numel() // self.count)
        return replace(
            storage, parameter=part, state={**own, **states, "step": step}, offset=offset, hosted=frozenset()
        ), self.of(self.gradient)


def _slices(whole: list[_Rows], names: list[str], capacity: int) -> Iterator[list[_Rows]]:
    """All rows, in lists whose states fit into `capacity` bytes, or are those of a single row."""
    found: list[_Rows] = []
    free = capacity
    for rest in whole:
        while rest.count:
            count = rest.fitting(names, free) or (0 if found else 1)
            if count:
                found.append(replace(rest, count=count))
                free -= found[-1].room(names)
                rest = replace(rest, first=rest.first + count, count=rest.count - count)
            if rest.count:
                yield found
                found, free = [], capacity
    if found:
        yield found


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class _Slot:
    """A buffer on the device, and events of its last turn."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.bytes = torch.empty(size, dtype=torch.uint8, device=device)
        self.filled, self.stepped, self.emptied = (torch.cuda.Event() if device.type == "cuda" else None for _ in "123")

    def fill(self, slice_: list[_Rows], names: list[str]) -> list[dict[str, Tensor]]:
        """The states of `slice_` copied to the device."""
        held, start = [], 0
        for part in slice_:
            states = {}
            for name in names:
                rows = part.of(part.storage.state[name])
                states[name] = self.bytes[start : start + rows.nbytes].view(rows.dtype).view(rows.shape)
                states[name].copy_(rows, non_blocking=True)
                start += _aligned(rows.nbytes)
            held.append(states)
        return held


@dataclass(frozen=True)
class _Lane:
    """A queue of work on a GPU. On a CPU there is none: what is written first is done first."""

    stream: torch.cuda.Stream | None

    @contextmanager
    def after(self, before: torch.cuda.Event | None, done: torch.cuda.Event | None) -> Iterator[None]:
        """Queue the block's work here, to begin after `before` (at once if that never was recorded), then `done`."""
        if self.stream is None or before is None or done is None:
            yield
            return
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(before)
            yield
            done.record(self.stream)


@contextmanager
def _lanes(device: torch.device) -> Iterator[tuple[_Lane, _Lane, _Lane]]:
    """Queues for copying in, for stepping, which is the caller's stream, and for copying out."""
    if device.type != "cuda":
        yield _Lane(None), _Lane(None), _Lane(None)
        return
    compute, fill, empty = torch.cuda.current_stream(device), torch.cuda.Stream(device), torch.cuda.Stream(device)
    fill.wait_stream(compute)  # which may still use the memory that buffers were made of
    try:
        yield _Lane(fill), _Lane(compute), _Lane(empty)
    finally:
        compute.wait_stream(fill)
        compute.wait_stream(empty)
