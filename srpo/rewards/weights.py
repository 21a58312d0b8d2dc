"""Files of reward weights: local, free of code, checked against what they claim to be."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from srpo.errors import InputError

__all__ = ["check_state", "checksum", "fit", "read_state", "sidecar", "weight_files"]

_logger = logging.getLogger(__name__)
#: Where checkpoints keep their state dict when it is not all of them.
_CONTAINERS = ("state_dict", "model", "module")


def read_state(path: str | Path, what: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a torch file that holds nothing but them (also below "state_dict",
    "model" or "module").

    Raises `InputError`, starting with `what` and the path, when it cannot be read or holds anything else.
    """
    path, name = Path(path), f"{what} {path}"
    if not path.is_file():
        raise InputError(f"{name} does not exist")
    try:
        safe = path.suffix == ".safetensors"
        state: Any = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise InputError(f"{name} is not a sound safetensors file: {error}") from None
    except Exception as error:  # whatever unpickling may raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{name} cannot be loaded as weights only, without running code from it: {reason}") from None
    for key in _CONTAINERS:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
            break
    if not isinstance(state, Mapping) or not state:
        raise InputError(f"{name} must hold named tensors, holds {type(state).__name__}")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise InputError(f"{name} must hold named tensors only, but {key!r} is of type {type(value).__name__}")
    return dict(state)


def check_state(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str) -> None:
    """Raises `InputError`, starting with `what`, when names or shapes differ."""
    problems = [
        f"{label} {_some(sorted(keys))}"
        for label, keys in (("missing", expected.keys() - state.keys()), ("unexpected", state.keys() - expected.keys()))
        if keys
    ]
    both = [key for key in expected if key in state and state[key].shape != expected[key].shape]
    problems += [f"{key} is {list(state[key].shape)} instead of {list(expected[key].shape)}" for key in both[:3]]
    if problems:
        raise InputError(f"{what} does not fit: {'; '.join(problems)}")


def fit(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load `state` into `module`, every tensor of it and nothing else, cast to the module's dtype.

    Raises `InputError` as `check_state` does.
    """
    check_state(module.state_dict(), state, what)
    module.load_state_dict(dict(state))


def checksum(path: str | Path) -> str:
    """SHA-256 of a file, in hex; logged.

    Raises `InputError` when ``FILE.sha256`` lies beside it and says otherwise.
    """
    path, digest = Path(path), hashlib.sha256()
    with path.open("rb") as opened:
        while block := opened.read(1 << 22):
            digest.update(block)
    found, listed = digest.hexdigest(), sidecar(path)
    words = listed.read_text(encoding="utf-8").split() if listed.is_file() else [found]
    if words[:1] != [found]:
        raise InputError(f"reward file {path} has SHA-256 {found}, but {listed} says {' '.join(words[:1])}")
    _logger.info("reward file %s: SHA-256 %s", path, found)
    return found


def sidecar(path: Path) -> Path:
    """Where the checksum of a file is kept, in the form of `sha256sum`."""
    return path.with_name(f"{path.name}.sha256")


def weight_files(path: str | Path) -> Iterator[Path]:
    """The files that hold weights at `path`: itself, or those of a model directory. None that do not exist."""
    path = Path(path)
    if path.is_file():
        yield path
    elif path.is_dir():
        found = sorted(path.glob("*.safetensors"))
        yield from found or sorted(path.glob("pytorch_model*.bin"))


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    return ", ".join(keys[:5]) + more
