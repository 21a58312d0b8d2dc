"""A loaded CLIP model as a frozen reward wants it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from srpo_kernels import quick_gelu

__all__ = ["freeze"]


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
