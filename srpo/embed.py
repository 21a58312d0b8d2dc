"""Precomputed prompt embeddings: all prompts of a recipe in a cache on disk, shared out among ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from srpo.assets import resolve_asset
from srpo.config import TrainConfig
from srpo.distributed import Ranks
from srpo.errors import InputError
from srpo.model_directory import check_model_directory
from srpo.precision import compute_dtype
from srpo.sources import Sources
from srpo.text_encoders import CachedTexts

__all__ = ["Embedded", "embed_prompts"]


@dataclass(frozen=True)
class Embedded:
    """What `embed_prompts` found and did on this rank."""

    directory: Path  # of the pipeline's embeddings, within the cache
    prompts: int  # of the recipe, each counted once
    computed: int
    damaged: int  # shards that were deleted, to be computed again


def embed_prompts(
    config: TrainConfig,
    directory: str | Path | None = None,
    *,
    ranks: Ranks | None = None,
    shard: int = 64,
    report: Callable[[str], None] = lambda _line: None,
) -> Embedded:
    """Have the embedding of every prompt and caption of a recipe, those of sample grids too, in a cache on disk.

    Embeddings that are there and sound are kept, so that an interrupted call goes on where it was. Each rank takes its
    share. Neither transformer nor VAE is loaded.

    Args:
        directory: of the cache; None: ``model.text_cache``. ranks: None joins torchrun's job. shard: prompts a file.
        report: told of progress.

    Raises `InputError` when prompts or model cannot be used, or the cache cannot be written.
    """
    directory = directory or config.model.text_cache
    if directory is None:
        raise InputError("no directory for embeddings: give --out, or model.text_cache in the recipe")
    if shard < 1:
        raise InputError(f"a shard must hold at least 1 prompt, got {shard}")
    ranks = ranks or Ranks.join(config.run.device)
    model = check_model_directory(resolve_asset(config.model.path, "pipeline"), text=False)
    sources = Sources(config, model)
    if ranks.is_main:
        sources.warn()
    texts = CachedTexts(
        directory,
        model,
        device=ranks.device,
        dtype=compute_dtype(config.model.precision),
        max_sequence_length=config.model.max_sequence_length,
    )
    cache = texts.cache
    try:
        shards = cache.shards()[ranks.rank :: ranks.world]
        ranks.barrier()  # nobody deletes before everybody has looked
        damaged = cache.remove_damaged(shards)
        ranks.barrier()
        cache.refresh()
        missing = cache.missing(sources.texts())
        ranks.barrier()  # nobody writes before everybody has looked
        share = missing[ranks.rank :: ranks.world]
        computed = texts.prepare(share, shard=shard, on_shard=lambda done: report(f"{done}/{len(share)} prompts"))
    except OSError as error:
        raise InputError(f"text cache {directory} cannot be written: {error}") from None
    ranks.barrier()
    return Embedded(cache.directory, len(sources.texts()), computed, len(damaged))
