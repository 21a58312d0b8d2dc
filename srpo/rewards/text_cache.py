"""Text embeddings on disk: a prompt that any run has embedded with the same tower is never embedded again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from srpo.errors import InputError
from srpo.sealed import content_digest, read_sealed, write_sealed

__all__ = ["TextCache"]


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
        found = read_sealed(path, key)
        if found is not None and "embedding" in found:
            return found["embedding"]
        embedding = compute().cpu().contiguous()
        try:
            write_sealed(path, key, {"embedding": embedding})
        except OSError as error:
            warnings.warn(f"text cache {self.directory} cannot be written: {error}", stacklevel=2)
        return embedding
