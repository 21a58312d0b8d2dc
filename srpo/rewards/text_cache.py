"""Text embeddings on disk: a prompt that any run has embedded with the same tower is never embedded again."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from srpo.errors import InputError

__all__ = ["TextCache", "content_digest"]


def content_digest(tensors: Mapping[str, Tensor], prefix: str = "") -> str:
    """SHA-256, in hex, of `prefix` and of names, dtypes, shapes and bytes of `tensors`, whatever their order."""
    digest = hashlib.sha256(prefix.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\0{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class TextCache:
    """A safetensors file for each embedding, named after all that the embedding depends on.

    Args:
        directory: made when missing; several runs and towers may share one. tower: digest of the weights and the
            architecture that embed tokens.

    Raises `InputError` when the directory cannot be made.
    """

    def __init__(self, directory: str | Path, tower: str) -> None:
        self.directory, self.tower = Path(directory), tower
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"reward.text_cache {directory} cannot be made: {error}") from None

    def embedding(self, tokens: Mapping[str, Tensor], compute: Callable[[], Tensor]) -> Tensor:
        """The embedding of `tokens`, on the CPU: read, or computed and written when there is no sound file.

        A directory that cannot be written is a warning: it costs time, not the run.
        """
        key = content_digest(tokens, self.tower)
        path = self.directory / f"{key}.safetensors"
        embedding = _read(path, key)
        if embedding is None:
            embedding = compute().cpu().contiguous()
            try:
                _write(path, key, embedding)
            except OSError as error:
                warnings.warn(f"text cache {self.directory} cannot be written: {error}", stacklevel=2)
        return embedding


def _seal(embedding: Tensor, key: str) -> Tensor:
    """Binds the embedding to its file's name: neither damage nor another prompt's file goes unnoticed."""
    return torch.tensor(list(bytes.fromhex(content_digest({"embedding": embedding}, key))), dtype=torch.uint8)


def _read(path: Path, key: str) -> Tensor | None:
    try:
        tensors = load(path.read_bytes())
        embedding, seal = tensors["embedding"], tensors["seal"]
    except (OSError, SafetensorError, KeyError):
        return None
    return embedding if torch.equal(seal, _seal(embedding, key)) else None


def _write(path: Path, key: str, embedding: Tensor) -> None:
    """Whole or not at all, whoever else writes the same file."""
    temporary = path.with_name(f".{key}.{uuid4().hex}.tmp")
    try:
        temporary.write_bytes(save({"embedding": embedding, "seal": _seal(embedding, key)}))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
