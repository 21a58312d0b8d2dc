"""Files of tensors that are written whole or not at all, and whose damage does not go unnoticed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

__all__ = ["content_digest", "read_sealed", "replace_file", "seal", "write_sealed"]


def content_digest(tensors: Mapping[str, Tensor], prefix: str = "") -> str:
    """SHA-256, in hex, of `prefix` and of names, dtypes, shapes and bytes of `tensors`, whatever their order."""
    digest = hashlib.sha256(prefix.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\0{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def seal(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    """uint8 [32] that binds `tensors` to the key they are kept under: neither damage nor a mix-up goes unnoticed."""
    return torch.tensor(list(bytes.fromhex(content_digest(tensors, key))), dtype=torch.uint8)


def read_sealed(path: Path, key: str) -> dict[str, Tensor] | None:
    """What `write_sealed` wrote, on the CPU; None unless the file is there, sound and of `key`."""
    try:
        tensors = load(path.read_bytes())
        found = tensors.pop("seal")
    except (OSError, SafetensorError, KeyError):
        return None
    return tensors if torch.equal(found, seal(tensors, key)) else None


def write_sealed(path: Path, key: str, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file of CPU `tensors` and their seal. Raises `OSError`."""
    replace_file(path, save({**tensors, "seal": seal(tensors, key)}))


def replace_file(path: Path, content: bytes) -> None:
    """`path` with this content, whole or not at all, whoever else writes the same file. Raises `OSError`."""
    temporary = path.with_name(f".{path.stem}.{uuid4().hex}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
