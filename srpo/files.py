"""Directories: outputs that appear whole or not at all, inputs that are complete."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from srpo.errors import InputError

__all__ = ["has_vocabulary", "new_directory"]


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A temporary directory beside `path` that becomes `path` when the block ends well, and is removed otherwise.

    Raises `InputError` at once when `path` exists and is not an empty directory: nothing is overwritten.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"output {path} already exists; choose another or remove it")
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.exists():
            path.rmdir()
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def has_vocabulary(tokenizer: Path) -> bool:
    """Whether a tokenizer directory holds its vocabulary. Without it transformers loads an empty one, silently."""
    forms = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",))
    return any(all((tokenizer / name).is_file() for name in form) for form in forms)
