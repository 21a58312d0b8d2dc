"""What other libraries have of an operator, composed to the same result where it needs eager around it."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from benchmarks.case import Case, Output

__all__ = ["liger"]


def liger(case: Case) -> Callable[..., Output] | None:
    """Liger's form of `case`, or None: it is not installed, or has nothing of it.

    Its GroupNorm cannot take images with their channels last.
    """
    if find_spec("liger_kernel") is None:
        return None
    return _FORMS.get(case.op)


def _layer_norm_modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Its LayerNorm, then the modulation, which differs from image to image and cannot be its weight."""
    from liger_kernel.transformers.functional import liger_layer_norm

    one, zero = torch.ones_like(x[0, 0]), torch.zeros_like(x[0, 0])
    return torch.addcmul(shift[:, None], liger_layer_norm(x, one, zero, 1e-6), 1 + scale[:, None])


def _qk_norm_rope(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> Any:
    """Its RMSNorm, then diffusers' rotation: Liger's rotates halves, FLUX pairs."""
    from liger_kernel.transformers.functional import liger_rms_norm

    normed = (liger_rms_norm(x, weight, 1e-6, in_place=False) for x, weight in ((q, q_weight), (k, k_weight)))
    return tuple(apply_rotary_emb(x, (cos, sin), sequence_dim=1) for x in normed)


_FORMS: dict[str, Callable[..., Output]] = {
    "layer_norm_modulate": _layer_norm_modulate,
    "qk_norm_rope": _qk_norm_rope,
}
