"""Text embeddings of FLUX on disk: shards of safetensors, addressed by content.

``DIRECTORY/<identity>/shard-<digest>.safetensors`` holds, for each prompt, ``<key>/prompt_embeds``, ``<key>/pooled``
and ``<key>/seal``. The identity is a digest of all that an embedding depends on but the prompt, the key one of both.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from srpo.digests import component_digest
from srpo.errors import InputError
from srpo.sealed import replace_file, seal

__all__ = ["EmbeddingCache", "TextIdentity"]

_ENCODERS = ("text_encoder", "text_encoder_2")
_TOKENIZERS = ("tokenizer", "tokenizer_2")
_NAME = "identity.json"

#: All that an embedding depends on but the prompt; a digest is None where a pipeline has no encoders.
TextIdentity = dict[str, str | int | None]


class EmbeddingCache:
    """Embeddings of prompts by one pipeline's text encoders.

    Args:
        directory: made when missing; several pipelines and runs may share one.
        model: pipeline directory. Without text encoders, the directory must hold the embeddings of just one pipeline
            that has the same tokenizers.
        max_sequence_length: T5 tokens. dtype: of the encoders.

    Raises `InputError` when the directory cannot be used.
    """

    def __init__(self, directory: str | Path, model: Path, *, max_sequence_length: int, dtype: torch.dtype) -> None:
        root = Path(directory)
        try:
            root.mkdir(parents=True, exist_ok=True)
            parts = {name: _digest(model / name, root) for name in (*_ENCODERS, *_TOKENIZERS)}
            identity: TextIdentity = {**parts, "max_sequence_length": max_sequence_length, "dtype": str(dtype)}
            self.identity = _whole(identity, root, model)
            self._digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
            self.directory = root / self._digest[:32]
            self.directory.mkdir(exist_ok=True)
            if not (self.directory / _NAME).is_file():
                replace_file(self.directory / _NAME, json.dumps(self.identity, indent=1).encode())
        except OSError as error:
            raise InputError(f"text cache {directory} cannot be made: {error}") from None
        self._files: dict[str, Path] = {}
        self.refresh()

    def key(self, prompt: str) -> str:
        """Digest of the prompt and of all else that its embedding depends on."""
        return hashlib.sha256(f"{self._digest} {prompt}".encode()).hexdigest()

    def __contains__(self, prompt: str) -> bool:
        return self.key(prompt) in self._files

    def missing(self, prompts: Iterable[str]) -> list[str]:
        """Those of `prompts` without an embedding, each once, in order."""
        return [prompt for prompt in dict.fromkeys(prompts) if prompt not in self]

    def shards(self) -> list[Path]:
        """Files of embeddings, in the same order for everybody."""
        return sorted(self.directory.glob("shard-*.safetensors"))

    def refresh(self) -> None:
        """See what other processes have written. A shard that cannot be opened holds nothing."""
        self._files = {}
        for shard in self.shards():
            self._files.update(dict.fromkeys(_keys(shard), shard))

    def get(self, prompt: str) -> tuple[Tensor, Tensor] | None:
        """``prompt_embeds`` [1, L, D] and ``pooled`` [1, P] on the CPU, in the encoders' dtype; None when missing.

        A damaged one is a warning, and missing from then on.
        """
        key = self.key(prompt)
        if key not in self._files:
            return None
        found = _read(self._files[key], key)
        if found is None:
            warnings.warn(f"text cache: {self._files.pop(key)} is damaged at prompt {prompt!r}", stacklevel=2)
        return found

    def put(self, embeddings: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Write the embeddings of some prompts as one shard, whole or not at all. Raises `OSError`."""
        tensors: dict[str, Tensor] = {}
        for prompt, (embeds, pooled) in embeddings.items():
            key = self.key(prompt)
            entry = {"prompt_embeds": embeds.cpu().contiguous(), "pooled": pooled.cpu().contiguous()}
            tensors |= {f"{key}/{name}": tensor for name, tensor in entry.items()}
            tensors[f"{key}/seal"] = seal(entry, key)
        keys = sorted(map(self.key, embeddings))
        shard = self.directory / f"shard-{hashlib.sha256(' '.join(keys).encode()).hexdigest()[:32]}.safetensors"
        replace_file(shard, save(tensors))
        self._files.update(dict.fromkeys(keys, shard))

    def remove_damaged(self, shards: Iterable[Path]) -> list[Path]:
        """Read all of some shards, and delete and return those that are not sound. Raises `OSError`."""
        damaged = []
        for shard in shards:
            keys = _keys(shard)
            if not keys or any(_read(shard, key) is None for key in keys):
                shard.unlink()
                damaged.append(shard)
        return damaged


def _digest(component: Path, memo: Path) -> str | None:
    return component_digest(component, memo) if component.is_dir() else None


def _whole(identity: TextIdentity, root: Path, model: Path) -> TextIdentity:
    """`identity`, with what a pipeline without encoders lacks taken from the only cached one that fits."""
    lacking = [name for name in _ENCODERS if identity[name] is None]
    if not lacking:
        return identity
    fitting = []
    for file in sorted(root.glob(f"*/{_NAME}")):
        held = json.loads(file.read_text(encoding="utf-8"))
        if all(held.get(name) == value for name, value in identity.items() if name not in lacking):
            fitting.append(held)
    if len(fitting) != 1:
        raise InputError(
            f"model directory {model} has no {' and no '.join(lacking)}, and text cache {root} holds embeddings of "
            f"{len(fitting)} pipelines that fit it, not of one; precompute them with `srpo embed`"
        )
    return fitting[0]


def _keys(shard: Path) -> list[str]:
    """Keys of the whole entries of a shard, from its header alone."""
    try:
        with safe_open(shard, "pt") as opened:
            return [name.removesuffix("/seal") for name in opened.keys() if name.endswith("/seal")]  # noqa: SIM118
    except (OSError, SafetensorError):
        return []


def _read(shard: Path, key: str) -> tuple[Tensor, Tensor] | None:
    try:
        with safe_open(shard, "pt") as opened:
            # Copies: a mapped tensor would end the process when somebody cuts its file short.
            entry = {name: opened.get_tensor(f"{key}/{name}").clone() for name in ("prompt_embeds", "pooled")}
            sound = torch.equal(opened.get_tensor(f"{key}/seal"), seal(entry, key))
    except (OSError, SafetensorError):
        return None
    return (entry["prompt_embeds"], entry["pooled"]) if sound else None
