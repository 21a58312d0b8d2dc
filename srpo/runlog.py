"""What a run records: JSON lines always, TensorBoard and Weights & Biases when asked, a progress bar on a terminal."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from srpo.loggers import Background, WandbConfig, tensorboard, wandb

__all__ = ["RunLog", "read_events", "read_log"]

LOG_NAME = "log.jsonl"


class RunLog:
    """Records of one run directory.

    The JSONL file is only ever appended to: a resumed run repeats the steps after its checkpoint, and `read_log` takes
    the last record of a step. What cannot be written is a warning.
    """

    def __init__(
        self, directory: Path, *, start: int, total: int, tensorboard: bool, wandb: WandbConfig | None = None
    ) -> None:
        self._file = (directory / LOG_NAME).open("a", encoding="utf-8")
        if self._file.tell() and not (directory / LOG_NAME).read_bytes().endswith(b"\n"):
            self._file.write("\n")  # close a line that a crash cut off
        self._bar = tqdm(total=total, initial=start, unit="update", disable=not sys.stderr.isatty())
        self._loggers = _loggers(directory, tensorboard, wandb)
        self._total = total

    def event(self, event: str, **values: Any) -> None:
        """Append one record."""
        try:
            self._file.write(json.dumps({"event": event, **values}) + "\n")
            self._file.flush()
        except OSError as error:  # a full disk, say: the checkpoint will tell whether the run can go on
            warnings.warn(f"a record of the log is lost: {error}", stacklevel=2)

    def update(self, step: int, record: dict[str, Any]) -> None:
        """Record finished update `step` (1-based)."""
        self.event("update", step=step, **record)
        losses = " ".join(f"{name} {value:.4f}" for name, value in record["losses"].items())
        scores = " ".join(f"{name} {value:+.4f}" for name, value in record["scores"].items())
        seconds = " ".join(f"{name} {value:.1f}s" for name, value in record["seconds"].items())
        if self._bar.disable:
            print(f"update {step}/{self._total}: loss {losses} | score {scores} | {seconds}", flush=True)
        else:
            self._bar.set_postfix_str(f"loss {losses} | score {scores} | {seconds}", refresh=False)
            self._bar.update()
        groups = ("losses", "scores", "seconds")
        scalars = {f"{group}/{name}": value for group in groups for name, value in record[group].items()}
        self._scalars(step, scalars | {"grad_norm": record["grad_norm"]})

    def validation(self, step: int, record: dict[str, Any], grids: Mapping[Path, Image.Image]) -> None:
        """Record a look at the model after update `step`, and its grids by their files."""
        self.event("validation", step=step, **record)
        self._scalars(step, {f"validation/{name}": value for name, value in record["values"].items()})
        for path, grid in grids.items():
            size = path.stem.removeprefix(f"step-{step:06d}").removeprefix("-")
            for logger in self._loggers:
                logger.picture(step, f"samples/{size or 'grid'}", grid)

    def close(self) -> None:
        self._bar.close()
        for logger in self._loggers:
            logger.close()
        try:
            self._file.close()
        except OSError as error:
            warnings.warn(f"a record of the log is lost: {error}", stacklevel=2)

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        for logger in self._loggers:
            logger.scalars(step, values)


def read_log(directory: Path, event: str = "update") -> list[dict[str, Any]]:
    """The records of one kind of event, the last of each step, in order of steps; none where there is no log."""
    records = {record["step"]: record for record in read_events(directory) if record["event"] == event}
    return [records[step] for step in sorted(records)]


def read_events(directory: Path) -> list[dict[str, Any]]:
    """All records of a run as they were written; a line cut off by a crash is left out."""
    file, records = directory / LOG_NAME, []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def _loggers(directory: Path, board: bool, cloud: WandbConfig | None) -> list[Background]:
    found = []
    if board and find_spec("tensorboard") is not None:
        found.append(Background("TensorBoard", lambda: tensorboard(directory)))
    if cloud is not None:
        found.append(Background("Weights & Biases", lambda: wandb(directory, cloud)))
    return found
