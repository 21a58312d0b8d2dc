"""Which weights a run's adapters belong to: they mean nothing on any other."""

from __future__ import annotations

import json
from pathlib import Path

from srpo.digests import weights_fingerprint
from srpo.errors import InputError
from srpo.model_directory import weight_files
from srpo.sealed import replace_file

__all__ = ["base_fingerprint", "check_base", "read_base", "write_base"]

_NAME = "base.json"


def base_fingerprint(model: Path) -> str:
    """`weights_fingerprint` of the transformer in a pipeline directory. Raises `InputError`."""
    try:
        return weights_fingerprint(weight_files(model / "transformer"))
    except (OSError, ValueError) as error:
        raise InputError(f"model directory {model} cannot be read: {error}") from None


def check_base(wanted: str | None, model: Path, what: str) -> None:
    """Raise `InputError` unless `what`, whose adapters were trained on weights of that fingerprint, fits `model`."""
    found = base_fingerprint(model)
    if found != wanted:
        raise InputError(
            f"{what} holds adapters for other weights than those of {model} (fingerprint {str(wanted)[:12]}, "
            f"{found[:12]} here): give the base model they were trained on"
        )


def read_base(directory: Path) -> str:
    """The fingerprint that a run directory holds. Raises `InputError`."""
    try:
        return json.loads((directory / _NAME).read_text(encoding="utf-8"))["transformer"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"run {directory} does not say which base model its adapters are for: {error}") from None


def write_base(directory: Path, model: Path) -> None:
    """Leave the fingerprint of `model` in a run directory, for `read_base`."""
    content = {"transformer": base_fingerprint(model)}
    replace_file(directory / _NAME, json.dumps(content, indent=1).encode())
