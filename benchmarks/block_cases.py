"""What surrounds attention and matrix products in FLUX's blocks. The eager forms are what diffusers writes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, rms_norm

import srpo_kernels as sk
from benchmarks.case import Case, Output

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
        make: Callable[[], dict[str, Tensor]],
        ours: Callable[..., Output],
        eager: Callable[..., Output],
        forward: int,
        backward: int,
        size: int = dim,
    ) -> Case:
        """Forward and backward move so many tensors of `tokens` x `dim`; `size` is the width of the output."""
        wanted = tuple(name for name in inspect.signature(eager).parameters if name not in ("cos", "sin"))
        hidden, shape = batch * tokens * dim, f"{batch} x {tokens} x {size}"
        name = eager.__name__.strip("_")
        return Case(name, shape, make, ours, eager, wanted, forward * hidden, backward * hidden)

    yield case(
        lambda: rows("x") | vectors("scale", "shift"),
        lambda **given: sk.layer_norm_modulate(**given),
        _layer_norm_modulate,
        2,
        3,
    )
    yield case(
        lambda: rows("residual", "branch") | vectors("gate"),
        lambda **given: sk.gated_residual(**given),
        _gated_residual,
        3,
        3,
    )
    yield case(
        lambda: rows("residual", "branch") | vectors("gate", "scale", "shift"),
        lambda **given: sk.gated_residual_layer_norm_modulate(**given),
        _gated_residual_layer_norm_modulate,
        4,
        6,
    )
    yield case(
        lambda: split("q", "k") | weights("q_weight", "k_weight") | rotation(),
        lambda **given: sk.qk_norm_rope(**given),
        _qk_norm_rope,
        4,
        6,
    )
    yield case(
        lambda: (
            split("text_q", "text_k", "text_v", length=text)
            | split("image_q", "image_k", "image_v", length=tokens - text)
            | weights("text_q_weight", "text_k_weight", "image_q_weight", "image_k_weight")
            | rotation()
        ),
        lambda **given: sk.joint_qk_norm_rope(**given),
        _joint_qk_norm_rope,
        6,
        8,
    )
    yield case(lambda: rows("x", size=4 * dim), lambda x: sk.gelu_tanh(x), _gelu_tanh, 8, 12, 4 * dim)
    yield case(
        lambda: rows("attn") | rows("mlp", size=4 * dim),
        lambda attn, mlp: sk.gelu_concat(attn, mlp),
        _gelu_concat,
        10,
        12,
        5 * dim,
    )


def _layer_norm_modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return layer_norm(x, x.shape[-1:], eps=_EPS) * (1 + scale)[:, None] + shift[:, None]


def _gated_residual(residual: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    return residual + gate[:, None] * branch


def _gated_residual_layer_norm_modulate(
    residual: Tensor, gate: Tensor, branch: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    residual = _gated_residual(residual, gate, branch)
    return residual, _layer_norm_modulate(residual, scale, shift)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`diffusers.models.embeddings.apply_rotary_emb`."""
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], -1).flatten(-2)
    return (x.float() * cos[:, None] + turned.float() * sin[:, None]).to(x.dtype)


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, x.shape[-1:], weight, _EPS)


def _qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    return _rotate(_norm(q, q_weight), cos, sin), _rotate(_norm(k, k_weight), cos, sin)


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
) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.cat([_norm(text_q, text_q_weight), _norm(image_q, image_q_weight)], 1)
    k = torch.cat([_norm(text_k, text_k_weight), _norm(image_k, image_k_weight)], 1)
    return _rotate(q, cos, sin), _rotate(k, cos, sin), torch.cat([text_v, image_v], 1)


def _gelu_tanh(x: Tensor) -> Tensor:
    return gelu(x, approximate="tanh")


def _gelu_concat(attn: Tensor, mlp: Tensor) -> Tensor:
    return torch.cat([attn, gelu(mlp, approximate="tanh")], -1)
