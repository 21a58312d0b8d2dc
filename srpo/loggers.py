"""Loggers beside a run's JSONL: TensorBoard and Weights & Biases. None can stop or delay a run."""

from __future__ import annotations

import json
import queue
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol
from uuid import uuid4

import numpy as np
import yaml
from PIL import Image

from srpo.sealed import replace_file

__all__ = ["Background", "Logger", "WandbConfig", "tensorboard", "wandb"]

_WAITING = 1000  # records that a logger may be behind
_CLOSING = 30.0  # seconds it is given to write the last of them


@dataclass(frozen=True)
class WandbConfig:
    """A recipe's `run.wandb`."""

    project: str = "srpo"
    name: str | None = None  # null: the run directory's
    mode: Literal["online", "offline"] = "online"  # offline: `wandb sync` sends it later


class Logger(Protocol):
    """Where numbers and pictures of a step go. Any method may raise."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def picture(self, step: int, name: str, image: Image.Image) -> None: ...

    def close(self) -> None: ...


class Background:
    """A logger in a thread of its own: a slow one delays nothing, one that fails is off from then on, with a warning.

    `open_logger` makes the logger, in that thread.
    """

    def __init__(self, name: str, open_logger: Callable[[], Logger]) -> None:
        self.name = name
        self._calls: queue.Queue[Callable[[Logger], None] | None] = queue.Queue(_WAITING)
        self._failure: str | None = None
        self._off = False
        self._thread = threading.Thread(target=self._work, args=(open_logger,), name=f"log to {name}", daemon=True)
        self._thread.start()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._call(lambda logger: logger.scalars(step, values))

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        self._call(lambda logger: logger.picture(step, name, image))

    def close(self) -> None:
        """Wait a while for what is not written yet."""
        self._call(None)
        if not self._off:
            self._thread.join(_CLOSING)
            if self._thread.is_alive():
                self._failure = f"did not finish within {_CLOSING:.0f} s"
        self._report()

    def _call(self, call: Callable[[Logger], None] | None) -> None:
        self._report()
        if self._off:
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._failure = f"is more than {_WAITING} records behind"
            self._report()

    def _report(self) -> None:
        """Warn of a failure, in the thread that trains, once."""
        if self._failure is not None and not self._off:
            self._off = True
            warnings.warn(f"{self.name} is off: {self._failure}", stacklevel=3)

    def _work(self, open_logger: Callable[[], Logger]) -> None:
        try:
            logger = open_logger()
            while (call := self._calls.get()) is not None:
                call(logger)
            logger.close()
        except Exception as error:  # whatever a logger raises, training goes on
            self._failure = f"{type(error).__name__}: {error}"


def tensorboard(directory: Path) -> Logger:
    """TensorBoard events in ``DIRECTORY/tensorboard``. Raises `ImportError` where it is not installed."""
    from torch.utils.tensorboard import SummaryWriter

    class Board:
        writer: Any = SummaryWriter(str(directory / "tensorboard"))

        def scalars(self, step: int, values: Mapping[str, float]) -> None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

        def picture(self, step: int, name: str, image: Image.Image) -> None:
            self.writer.add_image(name, np.asarray(image), step, dataformats="HWC")

        def close(self) -> None:
            self.writer.close()

    return Board()


def wandb(directory: Path, config: WandbConfig) -> Logger:
    """A Weights & Biases run, which a resumed run goes on with. Raises whatever wandb does."""
    library = import_module("wandb")

    file = directory / "wandb.json"
    if not file.is_file():
        replace_file(file, json.dumps({"id": uuid4().hex[:12]}).encode())
    run = library.init(
        project=config.project,
        name=config.name or directory.resolve().name,
        mode=config.mode,
        id=json.loads(file.read_text(encoding="utf-8"))["id"],
        resume="allow",
        dir=str(directory),
        config=yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8")),
    )

    class Cloud:
        def scalars(self, step: int, values: Mapping[str, float]) -> None:
            run.log({**values, "update": step})

        def picture(self, step: int, name: str, image: Image.Image) -> None:
            run.log({name: library.Image(image), "update": step})

        def close(self) -> None:
            run.finish()

    run.define_metric("*", step_metric="update")  # a resumed run repeats updates, which wandb's own step cannot
    return Cloud()
