"""VAE latents of real images on disk: an image that any run has encoded the same way is never encoded again."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from srpo.digests import component_digest
from srpo.errors import InputError
from srpo.sealed import read_sealed, write_sealed

__all__ = ["LatentCache"]


class LatentCache:
    """A safetensors file for each image, named after all that its latents depend on.

    Args:
        directory: made when missing; several runs and models may share one. vae: the directory of its weights.
        size: (height, width) that images are brought to. dtype: of the encoder. kernels: what it is patched with.

    Raises `InputError` when the directory cannot be made.
    """

    def __init__(
        self, directory: str | Path, vae: Path, *, size: tuple[int, int], dtype: torch.dtype, kernels: object
    ) -> None:
        self.directory = Path(directory)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            encoder = component_digest(vae, self.directory)
        except OSError as error:
            raise InputError(f"data.latent_cache {directory} cannot be made: {error}") from None
        self._encoding = f"{encoder} {size} {dtype} {kernels}"

    def _key(self, image: str) -> str:
        return hashlib.sha256(f"{self._encoding} {image}".encode()).hexdigest()

    def holds(self, image: str) -> bool:
        """Whether there are latents of the image file with this SHA-256; sound or not."""
        return (self.directory / f"{self._key(image)}.safetensors").is_file()

    def latents(self, image: str, encode: Callable[[], Tensor]) -> Tensor:
        """Packed latents [1, S, 4C] of the image file with this SHA-256, on the CPU: read, or encoded and written.

        A directory that cannot be written is a warning: it costs time, not the run.
        """
        key = self._key(image)
        path = self.directory / f"{key}.safetensors"
        found = read_sealed(path, key)
        if found is not None and "latents" in found:
            return found["latents"]
        latents = encode().cpu().contiguous()
        try:
            write_sealed(path, key, {"latents": latents})
        except OSError as error:
            warnings.warn(f"latent cache {self.directory} cannot be written: {error}", stacklevel=2)
        return latents
