"""Where the time of a step goes: a clock that always runs for exactly one phase."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["Phases"]

F = TypeVar("F", bound=Callable[..., Any])


class Phases:
    """Seconds by phase, without a sync in between: on CUDA an event marks every change of phase.

    Phases nest: what is timed within another one is not that one's. Their sum is the whole.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._stack: list[str] = []
        self._marks: list[tuple[str | None, Any]] = []  # the phase that begins there; None: none

    @contextmanager
    def of(self, phase: str) -> Iterator[None]:
        """The block is `phase`."""
        self._stack.append(phase)
        self._mark()
        try:
            yield
        finally:
            self._stack.pop()
            self._mark()

    def switch(self, phase: str) -> None:
        """What is left of the current block is `phase`."""
        self._stack[-1] = phase
        self._mark()

    def at_gradient(self, tensor: Tensor, phase: str) -> Tensor:
        """`tensor`, at whose gradient backward becomes `phase`."""
        if tensor.requires_grad:
            tensor.register_hook(lambda _: self.switch(phase))
        return tensor

    def wrapped(self, phase: str, function: F) -> F:
        """`function`, each call of which is `phase`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.of(phase):
                return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    def seconds(self) -> dict[str, float]:
        """By phase, in the order in which they first came; waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
        found: dict[str, float] = {}
        for (phase, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            if phase is not None:
                spent = start.elapsed_time(end) / 1e3 if self._cuda else end - start
                found[phase] = found.get(phase, 0.0) + spent
        return found

    def _mark(self) -> None:
        now: Any = time.perf_counter()
        if self._cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self._marks.append((self._stack[-1] if self._stack else None, now))
