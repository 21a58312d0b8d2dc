"""What diffusers computes where an operator of this package is not wanted, with the operator's own signature."""

from __future__ import annotations

from collections.abc import Callable, Collection
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor
from torch.nn.functional import gelu, group_norm, layer_norm, rms_norm, silu

import srpo_kernels as sk

__all__ = ["EAGER", "choose"]


def choose(selected: Collection[str]) -> SimpleNamespace:
    """Functions by operator name: this package's where selected, diffusers' elsewhere."""
    return SimpleNamespace(**{name: getattr(sk, name) if name in selected else eager for name, eager in EAGER.items()})


def _layer_norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    return layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale[:, None]) + shift[:, None]


def _gated_residual(residual: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    return residual + gate[:, None] * branch


def _gated_residual_layer_norm_modulate(
    residual: Tensor, gate: Tensor, branch: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    residual = _gated_residual(residual, gate, branch)
    return residual, _layer_norm_modulate(residual, scale, shift, eps)


def _qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, ...]:
    return tuple(
        apply_rotary_emb(rms_norm(x, x.shape[-1:], weight, eps), (cos, sin), sequence_dim=1)
        for x, weight in ((q, q_weight), (k, k_weight))
    )


def _joint_qk_norm_rope(
    text_q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    image_q: Tensor,
    image_k: Tensor,
    image_v: Tensor,
    text_q_weight: Tensor,
    text_k_weight: Tensor,
    image_q_weight: Tensor,
    image_k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, ...]:
    def norm(text: Tensor, text_weight: Tensor, image: Tensor, image_weight: Tensor) -> Tensor:
        normed = [rms_norm(x, x.shape[-1:], w, eps) for x, w in ((text, text_weight), (image, image_weight))]
        return apply_rotary_emb(torch.cat(normed, dim=1), (cos, sin), sequence_dim=1)

    q = norm(text_q, text_q_weight, image_q, image_q_weight)
    k = norm(text_k, text_k_weight, image_k, image_k_weight)
    return q, k, torch.cat([text_v, image_v], dim=1)


def _gelu_tanh(x: Tensor) -> Tensor:
    return gelu(x, approximate="tanh")


def _gelu_concat(attn: Tensor, mlp: Tensor) -> Tensor:
    return torch.cat([attn, gelu(mlp, approximate="tanh")], dim=-1)


def _group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, activation: bool) -> Tensor:
    normed = group_norm(x, num_groups, weight, bias, eps)
    return silu(normed) if activation else normed


EAGER: dict[str, Callable[..., Any]] = {
    "layer_norm_modulate": _layer_norm_modulate,
    "gated_residual": _gated_residual,
    "gated_residual_layer_norm_modulate": _gated_residual_layer_norm_modulate,
    "qk_norm_rope": _qk_norm_rope,
    "joint_qk_norm_rope": _joint_qk_norm_rope,
    "gelu_tanh": _gelu_tanh,
    "gelu_concat": _gelu_concat,
    "group_norm_silu": _group_norm_silu,
}
