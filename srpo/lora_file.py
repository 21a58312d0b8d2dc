"""LoRA adapters as one .safetensors file, under diffusers' names or those of kohya's scripts, which ComfyUI reads.

diffusers': ``transformer.LAYER.lora_A.weight`` [rank, in] and ``.lora_B.weight`` [out, rank]; rank and alpha are in the
header. kohya's: ``lora_unet_LAYER.lora_down.weight``, ``.lora_up.weight`` and ``.alpha``, LAYER being that of Black
Forest Labs' code with underscores. Where that fuses layers, ranks are stacked: down holds one A below the other, up one
B in the rows and columns of each layer and zeros elsewhere, so that ``up @ down`` is every ``B @ A`` in its rows.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from srpo.errors import InputError
from srpo.lora import LoraConfig
from srpo.single_file import BLOCK_LAYERS, single_file_metadata

__all__ = ["LORA_KEY", "LORA_NAME", "from_kohya", "read_lora", "to_diffusers", "to_kohya"]

#: The file's name that diffusers looks for in a directory.
LORA_NAME = "pytorch_lora_weights.safetensors"
#: Tells a file of adapters by its header.
LORA_KEY = "srpo.lora"

_METADATA = "lora_adapter_metadata"  # diffusers' key in the header
_DIFFUSERS, _KOHYA = "transformer.", "lora_unet_"
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"


def to_diffusers(adapters: Mapping[str, Tensor], config: LoraConfig) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file's tensors and header from adapters named as in `srpo.lora`, under diffusers' names."""
    layers = sorted({name.partition(".lora_")[0] for name in adapters})
    settings = {"r": config.rank, "lora_alpha": config.scale * config.rank, "target_modules": layers}
    header = json.dumps({_DIFFUSERS + key: value for key, value in settings.items()})
    tensors = {_DIFFUSERS + name: tensor.contiguous() for name, tensor in adapters.items()}
    return tensors, {LORA_KEY: str(config), _METADATA: header}


def read_lora(path: Path, config: LoraConfig) -> dict[str, Tensor]:
    """The adapters in a file that this module wrote.

    Raises `InputError` when it did not, or the file is damaged or counts adapters otherwise than `config`.
    """
    try:
        stored = load_file(path)
        if any(name.startswith(_KOHYA) for name in stored):
            adapters, scale = from_kohya(stored)
        else:
            settings = json.loads(single_file_metadata(path)[_METADATA])
            scale = settings[f"{_DIFFUSERS}lora_alpha"] / settings[f"{_DIFFUSERS}r"]
            adapters = {name.removeprefix(_DIFFUSERS): tensor for name, tensor in stored.items()}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} holds no adapters as srpo writes them: {error}") from None
    if not math.isclose(scale, config.scale, rel_tol=torch.finfo(torch.float32).eps):
        raise InputError(f"{path} counts adapters {scale:g} times, but model.lora says {config.scale:g} times")
    return adapters


def to_kohya(
    adapters: Mapping[str, Tensor], config: LoraConfig, rows: Mapping[str, int]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The same under kohya's names; every alpha is the adapters' factor times the rank of its stack.

    Layers without an adapter that are fused with others have one of zeros, so that each stack can be taken apart again:
    `rows` says how many rows a layer has.

    Raises `ValueError` naming a layer that has no place there.
    """
    left = {name.partition(".lora_")[0] for name in adapters}
    blocks = {
        (kind, int(match[1]))
        for kind, (ours, _) in BLOCK_LAYERS.items()
        for layer in left
        if (match := re.match(rf"{ours}\.(\d+)\.", layer))
    }
    stored: dict[str, Tensor] = {}
    for name, parts in _stacks(blocks):
        present = left.intersection(parts)
        if not present:
            continue
        left -= present
        like = adapters[min(present) + _DOWN]
        downs = [adapters.get(part + _DOWN, torch.zeros_like(like)) for part in parts]
        ups = [adapters[part + _UP] if part in present else like.new_zeros(rows[part], len(like)) for part in parts]
        stored[f"{name}.lora_down.weight"] = torch.cat(downs)
        stored[f"{name}.lora_up.weight"] = torch.block_diag(*ups)
        stored[f"{name}.alpha"] = torch.tensor(config.scale * config.rank * len(parts))
    if left:
        raise ValueError(f"the adapter of {min(left)} has no place in a file for ComfyUI")
    return stored, {LORA_KEY: str(config)}


def from_kohya(stored: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], float]:
    """The inverse of `to_kohya`: adapters and their scale. Raises `ValueError`, `KeyError` for what it did not make."""
    blocks = {
        (match[1], int(match[2])) for name in stored if (match := re.match(rf"{_KOHYA}(\w+?_blocks)_(\d+)_", name))
    }
    adapters: dict[str, Tensor] = {}
    left, scales = set(stored), set()
    for name, parts in _stacks(blocks):
        keys = [f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha"]
        if left.isdisjoint(keys):
            continue
        left -= {*keys}
        down, up, alpha = (stored[key] for key in keys)
        width = down.shape[1]
        sizes = [width] * 3 + [len(up) - 3 * width] * (len(parts) - 3) if len(parts) > 1 else [len(up)]
        if sum(sizes) != len(up) or len(down) % len(parts) or down.shape[0] != up.shape[1]:
            raise ValueError(f"{name} is no stack of adapters")
        downs = down.chunk(len(parts))
        ups = [piece.chunk(len(parts), 1)[index] for index, piece in enumerate(up.split(sizes))]
        if not torch.equal(torch.block_diag(*ups), up):
            raise ValueError(f"{name} is one adapter for several layers")
        scales.add(alpha.item() / len(down))
        for part, a, b in zip(parts, downs, ups, strict=True):
            if a.any():  # else there is none
                adapters |= {part + _DOWN: a.contiguous(), part + _UP: b.contiguous()}
    if left or len(scales) != 1:
        raise ValueError(f"{min(left)} has no place" if left else "adapters do not count alike")
    return adapters, scales.pop()


def _stacks(blocks: Iterable[tuple[str, int]]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """kohya's name of every layer in `blocks` (kind and number), with the layers of diffusers that it fuses."""
    for kind, index in sorted(blocks):
        ours, layers = BLOCK_LAYERS[kind]
        for name, parts in layers.items():
            yield f"{_KOHYA}{kind}_{index}_{name.replace('.', '_')}", tuple(f"{ours}.{index}.{part}" for part in parts)
