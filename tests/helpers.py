"""Small runs of the tiny recipe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from srpo.config import TrainConfig, load_config

#: A run of about a second: two images an update through two rollout steps.
QUICK = (
    "srpo.batch_size=4",
    "run.micro_batch=2",
    "srpo.rollout_steps=2",
    "run.sample_every=0",
    "run.tensorboard=false",
)


def quick_overrides(directory: Path, *overrides: str) -> list[str]:
    return [*QUICK, f"run.dir={json.dumps(str(directory))}", *overrides]


def quick_config(directory: Path, *overrides: str) -> TrainConfig:
    """The tiny recipe, made quick, in run directory `directory`."""
    return load_config("tiny", quick_overrides(directory, *overrides))


def command(*arguments: str | Path) -> list[str]:
    """The `srpo` command line as another process would run it."""
    return [sys.executable, "-m", "srpo", *map(str, arguments)]


def environment(**values: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **values}


def srpo(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run `srpo` in a process of its own."""
    return subprocess.run(command(*arguments), capture_output=True, text=True, env=environment(), timeout=300)


def forked(work: Callable[[], object]) -> int:
    """Start a process that runs `work`, and give its number; one that imports nothing, and prints nothing.

    It exits with what `work` returns, or 1 when that raises.
    """
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        status = int(work() or 0)
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(status)


def state_of(directory: Path, step: int) -> tuple[bytes, bytes]:
    """Model and optimizer bytes of a checkpoint."""
    path = directory / f"checkpoints/step-{step:06d}"
    return (path / "transformer.safetensors").read_bytes(), (path / "optimizer.safetensors").read_bytes()
