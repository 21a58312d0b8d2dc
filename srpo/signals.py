"""Ctrl-C and SIGTERM as a request to stop at the next safe point."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

__all__ = ["Stop", "StopRequestedError"]


class StopRequestedError(Exception):
    """Raised at a safe point after a signal arrived."""


class Stop:
    """Within ``with Stop() as stop``, the first SIGINT or SIGTERM sets `stop.signal`; the second ends the process."""

    signal: str | None = None

    def __enter__(self) -> Stop:
        self._previous: dict[int, Any] = {
            number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def check(self) -> None:
        """Raise `StopRequestedError` if a signal has arrived."""
        if self.signal is not None:
            raise StopRequestedError(self.signal)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
