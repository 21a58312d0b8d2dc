"""Models of rewards, loaded strictly from local files, and made as a frozen reward wants them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from srpo.errors import InputError
from srpo_kernels import quick_gelu

__all__ = ["freeze", "load_open_clip", "load_transformers"]


def load_transformers(kind: Any, path: Path, others: tuple[str, ...] = ()) -> Any:
    """The transformers model of class `kind` in a directory, in fp32 and with fused attention.

    Args:
        others: beginnings of names in the directory's weights that are for other models.

    Raises `InputError` when it cannot be loaded, or a weight is missing, unexpected or of another shape.
    """
    name = f"reward directory {path}"
    if not (path / "config.json").is_file():
        raise InputError(f"{name} is incomplete: {path / 'config.json'} is missing")
    options: dict[str, Any] = dict(local_files_only=True, dtype=torch.float32, attn_implementation="sdpa")
    try:  # mismatched weights are told below, by name
        model, info = kind.from_pretrained(path, ignore_mismatched_sizes=True, output_loading_info=True, **options)
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError) as error:
        raise InputError(f"{name} cannot be loaded: {error}") from None
    # Older files hold the buffer that newer models make themselves.
    surplus = [key for key in info["unexpected_keys"] if not (key.endswith("position_ids") or key.startswith(others))]
    resized = [f"{key} {list(found)} instead of {list(wanted)}" for key, found, wanted in info["mismatched_keys"]]
    # A weight of another size counts as missing, too.
    missing = set(info["missing_keys"]) - {key for key, *_ in info["mismatched_keys"]}
    for label, keys in (("missing", missing), ("unexpected", surplus), ("mismatched", resized)):
        if keys:
            listed = ", ".join(sorted(keys)[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
            raise InputError(f"{name} does not fit {kind.__name__}: {label} weights {listed}")
    return model


def load_open_clip(path: str | Path, architecture: str, device: str | torch.device) -> Any:
    """The open_clip model of a checkpoint file, loaded strictly and without unpickling code, in fp32.

    Raises `InputError` when the file is missing or does not fit the architecture.
    """
    import open_clip

    if not Path(path).is_file():
        raise InputError(f"reward checkpoint {path} does not exist")
    if architecture not in open_clip.list_models():
        raise InputError(f"reward architecture {architecture!r} is not an open_clip model name")
    try:
        return open_clip.create_model(architecture, pretrained=str(path), device=device)
    except Exception as error:  # whatever unpickling and a strict state dict may raise
        reason = str(error) or type(error).__name__
        raise InputError(f"reward checkpoint {path} does not fit {architecture}: {reason}") from None


def freeze(model: nn.Module, vision: Sequence[nn.Module], dtype: torch.dtype, *, activation: type[nn.Module]) -> None:
    """Make `model` constant, its `vision` modules of `dtype`, and rid it of what is slow because it is frozen.

    Weights are held in the dtype they compute in: autocast would cast all of a frozen tower again in every forward, for
    it keeps only casts of weights that need gradients. LayerNorm takes its statistics in fp32 in any case.

    Args:
        activation: the library's QuickGELU, composed of three operators that keep two tensors for backward.
    """
    model.requires_grad_(False).eval()
    for module in vision:
        module.to(dtype)
    for module in model.modules():
        if isinstance(module, activation):
            module.forward = quick_gelu
        elif isinstance(module, nn.MultiheadAttention) and _is_plain(module):
            module.forward = partial(_self_attention, module)  # type: ignore[method-assign]


def _is_plain(module: nn.MultiheadAttention) -> bool:
    packed = module.in_proj_weight is not None and module.batch_first
    return packed and module.bias_k is None and not module.add_zero_attn


def _self_attention(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,  # [L, L], added to the logits
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """What ``nn.MultiheadAttention`` computes of [B, L, D], by one projection for the whole batch.

    Torch transposes the batch first; with frozen weights its projection is then a batched product of L matrices of B
    rows each, every one of which reads all weights. Without gradients it takes a third way, with other last bits.
    """
    if need_weights or others or key is not query or value is not query:
        return type(module).forward(module, query, key, value, need_weights=need_weights, attn_mask=attn_mask, **others)
    packed = linear(query, module.in_proj_weight, module.in_proj_bias).unflatten(-1, (3, module.num_heads, -1))
    q, k, v = (part.transpose(1, 2) for part in packed.unbind(2))
    heads = scaled_dot_product_attention(q, k, v, attn_mask)
    return module.out_proj(heads.transpose(1, 2).flatten(2)), None
