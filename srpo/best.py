"""Which checkpoint of a run did best in validation; `srpo.checkpoint` keeps it beside the newest ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from srpo.sealed import replace_file

__all__ = ["BEST_NAME", "best_of", "best_step", "write_best"]

BEST_NAME = "best.json"


def write_best(directory: Path, step: int, monitor: str, value: float) -> None:
    """Name the best step of the run in `directory`. Raises `OSError`."""
    record = {"step": step, "monitor": monitor, "value": value}
    replace_file(directory / BEST_NAME, (json.dumps(record) + "\n").encode())


def best_step(directory: Path) -> int | None:
    """The best step of the run in `directory`; None when none is named."""
    try:
        record: dict[str, Any] = json.loads((directory / BEST_NAME).read_text(encoding="utf-8"))
        return int(record["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def best_of(directory: Path) -> str:
    """What the run in `directory` names as its best checkpoint, for people."""
    step = best_step(directory)
    return (
        "no best checkpoint is named (validation.best)" if step is None else f"its best checkpoint is of update {step}"
    )
