"""FLUX's two text encoders: loaded only when a prompt is not in the cache, and let go of when all are."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import FluxPipeline
from safetensors import SafetensorError
from torch import Tensor

from srpo.embeddings import EmbeddingCache
from srpo.errors import InputError

__all__ = ["CachedTexts"]


class CachedTexts:
    """Embeddings of prompts from a cache on disk, and from the encoders for those that it does not hold.

    Args:
        directory: of the cache. model: pipeline directory, with or without its text encoders.
        device: where embeddings go and encoders run. dtype: of the encoders. max_sequence_length: T5 tokens.

    Raises `InputError` when the cache cannot be used.
    """

    def __init__(
        self,
        directory: str | Path,
        model: Path,
        *,
        device: str | torch.device,
        dtype: torch.dtype,
        max_sequence_length: int,
    ) -> None:
        self.cache = EmbeddingCache(directory, model, max_sequence_length=max_sequence_length, dtype=dtype)
        self.model, self.device, self.dtype, self.max_sequence_length = model, device, dtype, max_sequence_length
        self._pipeline: FluxPipeline | None = None

    @property
    def loaded(self) -> bool:
        """Whether the encoders take memory."""
        return self._pipeline is not None

    def embed(self, prompt: str) -> tuple[Tensor, Tensor]:
        """``prompt_embeds`` [1, L, D] and ``pooled`` [1, P] on the device; what had to be computed is kept on disk.

        Raises `InputError`, naming the prompt, when it is not in the cache and there are no encoders.
        """
        found = self.cache.get(prompt)
        if found is None:
            found = self._encode(prompt)
            try:
                self.cache.put({prompt: found})
            except OSError as error:
                warnings.warn(f"text cache {self.cache.directory} cannot be written: {error}", stacklevel=2)
        embeds, pooled = found
        return embeds.to(self.device), pooled.to(self.device)

    def prepare(self, prompts: Sequence[str], *, shard: int = 64, on_shard: Callable[[int], None] | None = None) -> int:
        """Have all `prompts` in the cache, then let go of the encoders; returns how many had to be computed.

        A shard of `shard` prompts is written as soon as it is full, so that little is lost when this is interrupted.
        `on_shard` is called after each with the number of prompts done.

        Raises `InputError` for a prompt that cannot be computed. `OSError`: the cache cannot be written.
        """
        missing = self.cache.missing(prompts)
        try:
            for start in range(0, len(missing), shard):
                self.cache.put({prompt: self._encode(prompt) for prompt in missing[start : start + shard]})
                if on_shard is not None:
                    on_shard(min(start + shard, len(missing)))
        finally:
            self.release()
        return len(missing)

    def release(self) -> None:
        """Free the memory of the encoders."""
        self._pipeline = None
        if torch.device(self.device).type == "cuda":
            torch.cuda.empty_cache()

    @torch.no_grad()
    def _encode(self, prompt: str) -> tuple[Tensor, Tensor]:
        # Alone, as `Flux` does without a cache: an embedding must not depend on the other prompts of a batch.
        if self._pipeline is None:
            self._pipeline = self._load(prompt)
        embeds, pooled, _ = self._pipeline.encode_prompt(
            prompt, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return embeds, pooled

    def _load(self, prompt: str) -> FluxPipeline:
        absent = [name for name in ("text_encoder", "text_encoder_2") if not (self.model / name).is_dir()]
        if absent:
            raise InputError(
                f"prompt {prompt!r} is not in text cache {self.cache.directory.parent}, and model directory "
                f"{self.model} has no {' and no '.join(absent)} to embed it"
            )
        parts = dict.fromkeys(("transformer", "vae", "scheduler"))
        try:
            pipeline = FluxPipeline.from_pretrained(
                self.model, **parts, torch_dtype=self.dtype, local_files_only=True
            ).to(self.device)
        except (OSError, SafetensorError, ValueError) as error:
            raise InputError(f"text encoders of {self.model} cannot be loaded: {error}") from None
        for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
            encoder.requires_grad_(False).eval()
        return pipeline
