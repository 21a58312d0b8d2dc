"""Ctrl-C, SIGTERM and Slurm's warning as a request to all ranks to stop at the next safe point."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any

from srpo.distributed import Ranks

__all__ = ["REQUEUE", "Stop", "StopRequestedError"]

#: Exit status after SIGUSR1: the job is to be started again (sysexits.h calls it EX_TEMPFAIL).
REQUEUE = 75

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
#: torchrun passes on what it receives: a signal to all processes of a job arrives twice, at nearly the same time.
_SAME_SECONDS = 5.0


class StopRequestedError(Exception):
    """Raised on all ranks at a safe point after a signal arrived at one."""


class Stop:
    """Within ``with Stop(ranks) as stop``, SIGINT, SIGTERM or SIGUSR1 to any rank has `check` raise on all of them.

    `signal` then names it. A second one, five seconds later or more, ends the process at once.
    """

    signal: str | None = None

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._received, self._since = 0, 0.0

    def __enter__(self) -> Stop:
        self._previous: dict[int, Any] = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise `StopRequestedError` if a signal has arrived at any rank; all must call it together.

        Cheap enough for every step of a rollout, which takes tenths of a second at the least: four bytes between hosts,
        while the device is busy with what was launched before.
        """
        number = self._ranks.maximum(self._received)
        if number:
            self.signal = signal.Signals(number).name
            raise StopRequestedError(self.signal)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._received:
            self._received, self._since = number, now
        elif now - self._since > _SAME_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
