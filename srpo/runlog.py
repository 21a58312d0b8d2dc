"""What a run records: JSON lines always, TensorBoard when installed, a progress bar on a terminal."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

from tqdm import tqdm

__all__ = ["RunLog", "read_log"]

LOG_NAME = "log.jsonl"


class RunLog:
    """Records of one run directory.

    The JSONL file is only ever appended to: a resumed run repeats the steps after its checkpoint, and `read_log` takes
    the last record of a step.
    """

    def __init__(self, directory: Path, *, start: int, total: int, tensorboard: bool) -> None:
        self._file = (directory / LOG_NAME).open("a", encoding="utf-8")
        if self._file.tell() and not (directory / LOG_NAME).read_bytes().endswith(b"\n"):
            self._file.write("\n")  # close a line that a crash cut off
        self._bar = tqdm(total=total, initial=start, unit="update", disable=not sys.stderr.isatty())
        self._board = _tensorboard(directory) if tensorboard else None
        self._total = total

    def event(self, event: str, **values: Any) -> None:
        """Append one record."""
        self._file.write(json.dumps({"event": event, **values}) + "\n")
        self._file.flush()

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
        if self._board is not None:
            for group in ("losses", "scores", "seconds"):
                for name, value in record[group].items():
                    self._board.add_scalar(f"{group}/{name}", value, step)
            self._board.add_scalar("grad_norm", record["grad_norm"], step)

    def close(self) -> None:
        self._bar.close()
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_log(directory: Path) -> list[dict[str, Any]]:
    """The update records of a run, one a step, in order; a line cut off by a crash is left out."""
    records = {}
    for line in (directory / LOG_NAME).read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record["event"] == "update":
            records[record["step"]] = record
    return [records[step] for step in sorted(records)]


def _tensorboard(directory: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(directory / "tensorboard"))
    except ImportError:
        return None
    except OSError as error:  # a logger must never stop training
        warnings.warn(f"TensorBoard is off: {error}", stacklevel=2)
        return None
