"""What surrounds attention and matrix products in FLUX's blocks, and QuickGELU in CLIP's, at the same sizes.

The eager forms are what diffusers and transformers write.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import srpo_kernels as sk
from benchmarks.case import Case
from srpo_kernels.patching.eager import EAGER

__all__ = ["block_cases"]

_EPS = 1e-6


def block_cases(
    batch: int, tokens: int, text: int, device: str, *, heads: int = 24, width: int = 128
) -> Iterator[Case]:
    """`tokens`, the first `text` of them text, of `heads` x `width`. Gradients of everything but the rotation."""
    dim = heads * width
    random = partial(torch.randn, device=device, dtype=torch.bfloat16)

    def rows(*names: str, size: int = dim) -> dict[str, Tensor]:
        return {name: random(batch, tokens, size) for name in names}

    def split(*names: str, length: int = tokens) -> dict[str, Tensor]:
        return {name: random(batch, length, heads, width) for name in names}

    def vectors(*names: str) -> dict[str, Tensor]:
        return {name: random(batch, dim) for name in names}

    def weights(*names: str) -> dict[str, Tensor]:
        return {name: 1 + random(width) / 8 for name in names}

    def rotation() -> dict[str, Tensor]:
        angle = torch.rand(tokens, width // 2, device=device).mul(6.3).repeat_interleave(2, -1)
        return {"cos": angle.cos(), "sin": angle.sin()}

    def case(
        name: str, make: Callable[[], dict[str, Tensor]], forward: int, backward: int, size: int = dim, **options: float
    ) -> Case:
        """Forward and backward move so many tensors of `tokens` x `dim`; `size` is the width of the output."""
        ours, eager = (partial(form, **options) for form in (getattr(sk, name), EAGER[name]))
        wanted = tuple(name for name in inspect.signature(EAGER[name]).parameters if name not in ("cos", "sin", "eps"))
        hidden, shape = batch * tokens * dim, f"{batch} x {tokens} x {size}"
        return Case(name, shape, make, ours, eager, wanted, forward * hidden, backward * hidden)

    yield case("layer_norm_modulate", lambda: rows("x") | vectors("scale", "shift"), 2, 3, eps=_EPS)
    yield case("gated_residual", lambda: rows("residual", "branch") | vectors("gate"), 3, 3)
    yield case(
        "gated_residual_layer_norm_modulate",
        lambda: rows("residual", "branch") | vectors("gate", "scale", "shift"),
        4,
        6,
        eps=_EPS,
    )
    yield case(
        "qk_norm_rope",
        lambda: split("q", "k") | weights("q_weight", "k_weight") | rotation(),
        4,
        6,
        eps=_EPS,
    )
    yield case(
        "joint_qk_norm_rope",
        lambda: (
            split("text_q", "text_k", "text_v", length=text)
            | split("image_q", "image_k", "image_v", length=tokens - text)
            | weights("text_q_weight", "text_k_weight", "image_q_weight", "image_k_weight")
            | rotation()
        ),
        6,
        8 if batch > 1 else 6,  # of one image the gradients of v are v's
        eps=_EPS,
    )
    yield case("gelu_tanh", lambda: rows("x", size=4 * dim), 8, 12, 4 * dim)
    yield case("gelu_concat", lambda: rows("attn") | rows("mlp", size=4 * dim), 10, 12, 5 * dim)
    yield Case(
        "quick_gelu",
        f"{batch} x {tokens} x {4 * dim}",
        lambda: rows("x", size=4 * dim),
        sk.quick_gelu,
        lambda x: x * torch.sigmoid(1.702 * x),
        ("x",),
        8 * batch * tokens * dim,
        12 * batch * tokens * dim,
    )
