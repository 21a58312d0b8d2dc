"""Triton kernels of `srpo_kernels.ops.relative_reward`: one program per image, its embedding in registers.

The weights of both prompts are affine in kappa. Their numbers come as float64, so that float64 inputs lose nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from srpo_kernels._triton._common import accumulator, device_guard
from srpo_kernels.ops.relative_reward import EPS, embed

_EPS = tl.constexpr(EPS)


@triton.jit
def _norm(x):
    square = tl.sum(x * x, axis=0)
    # Rounded to nearest, as division below: fp32's default is approximate, and this is once a row.
    return tl.sqrt(square) if square.dtype == tl.float64 else tl.sqrt_rn(square)


@triton.jit
def _divide(a, b):
    return a / b if b.dtype == tl.float64 else tl.div_rn(a, b)


@triton.jit
def _weight(kappa_ptr, row, constant, slope, ACC: tl.constexpr):
    weight = tl.cast(constant, ACC)
    if kappa_ptr is not None:
        weight += tl.cast(slope, ACC) * tl.load(kappa_ptr + row).to(ACC)
    return weight


@triton.jit
def _direction(positive_ptr, negative_ptr, first, columns, mask, weight_positive, weight_negative, ACC: tl.constexpr):
    """What a unit embedding is multiplied with for the pair of prompts that starts at `first`."""
    positive = tl.load(positive_ptr + first + columns, mask=mask, other=0.0).to(ACC)
    negative = tl.load(negative_ptr + first + columns, mask=mask, other=0.0).to(ACC)
    return weight_positive * positive + weight_negative * negative


@triton.jit
def relative_reward_kernel(
    embedding_ptr,
    positive_ptr,
    negative_ptr,
    kappa_ptr,  # None: the slopes are not used
    scores_ptr,
    norm_ptr,
    loss_ptr,
    gradient_ptr,
    width,
    pairs,
    positive_constant: tl.float64,
    positive_slope: tl.float64,
    negative_constant: tl.float64,
    negative_slope: tl.float64,
    threshold: tl.float64,
    LOSS: tl.constexpr,  # None, "linear" (-score) or "hinge" (relu(threshold - score)): writes loss and gradient
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Scores of an image with all its pairs; then its norm, or losses and their gradients. Grid: (images,)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    x = tl.load(embedding_ptr + row * width + columns, mask=mask, other=0.0).to(ACC)
    weight_positive = _weight(kappa_ptr, row, positive_constant, positive_slope, ACC)
    weight_negative = _weight(kappa_ptr, row, negative_constant, negative_slope, ACC)
    norm = _norm(x)
    length = tl.maximum(norm, _EPS)
    for pair in range(pairs):
        one = row * pairs + pair
        direction = _direction(
            positive_ptr, negative_ptr, one * width, columns, mask, weight_positive, weight_negative, ACC
        )
        score = _divide(tl.sum(x * direction, axis=0), length)
        tl.store(scores_ptr + one, score)
        if LOSS is not None:
            if LOSS == "hinge":
                gap = tl.cast(threshold, ACC) - score
                loss = tl.where(gap <= 0, 0.0, gap)  # keeps NaN, as relu does
                slope = tl.where(gap <= 0, 0.0, -1.0)
            else:
                loss = -score
                slope = -1.0
            tl.store(loss_ptr + one, loss)
            # The score is the direction's radial part, which a longer embedding would not change.
            radial = tl.where(norm > _EPS, score, 0.0)
            inverse = _divide(tl.cast(1.0, ACC), length)
            gradient = slope * inverse * (direction - radial * (x * inverse))
            place = (tl.cast(pair, tl.int64) * tl.num_programs(0) + row) * width
            tl.store(gradient_ptr + place + columns, gradient, mask=mask)
    if LOSS is None:
        tl.store(norm_ptr + row, norm)


@triton.jit
def relative_reward_backward_kernel(
    upstream_ptr,
    embedding_ptr,
    positive_ptr,
    negative_ptr,
    kappa_ptr,
    norm_ptr,
    out_ptr,
    width,
    pairs,
    positive_constant: tl.float64,
    positive_slope: tl.float64,
    negative_constant: tl.float64,
    negative_slope: tl.float64,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Upstream gradients summed over pairs, in order, then through the normalisation. Grid: (images,)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    x = tl.load(embedding_ptr + row * width + columns, mask=mask, other=0.0).to(ACC)
    weight_positive = _weight(kappa_ptr, row, positive_constant, positive_slope, ACC)
    weight_negative = _weight(kappa_ptr, row, negative_constant, negative_slope, ACC)
    norm = tl.load(norm_ptr + row).to(ACC)
    total = tl.zeros((BLOCK,), ACC)
    for pair in range(pairs):
        one = row * pairs + pair
        direction = _direction(
            positive_ptr, negative_ptr, one * width, columns, mask, weight_positive, weight_negative, ACC
        )
        total += tl.load(upstream_ptr + one).to(ACC) * direction
    inverse = _divide(tl.cast(1.0, ACC), tl.maximum(norm, _EPS))
    unit = x * inverse
    radial = tl.where(norm > _EPS, tl.sum(total * unit, axis=0), 0.0)
    out = (total - radial * unit) * inverse
    tl.store(out_ptr + row * width + columns, out.to(out_ptr.dtype.element_ty), mask=mask)


def forward(
    image: Tensor,
    positive: Tensor,
    negative: Tensor,
    kappa: Tensor | None,
    projection: Tensor | None,
    weights: list[float],
) -> tuple[Tensor, Tensor]:
    scores, norm = _new(image, *positive.shape[:2]), _new(image, image.shape[0])
    _launch(image, positive, negative, kappa, projection, weights, scores=scores, norm=norm)
    return scores, norm


def loss_forward(
    image: Tensor,
    positive: Tensor,
    negative: Tensor,
    kappa: Tensor | None,
    projection: Tensor | None,
    weights: list[float],
    threshold: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, pairs, width = positive.shape
    loss, scores, gradient = _new(image, batch, pairs), _new(image, batch, pairs), _new(image, pairs, batch, width)
    kind = "linear" if threshold is None else "hinge"
    _launch(
        image,
        positive,
        negative,
        kappa,
        projection,
        weights,
        scores=scores,
        loss=loss,
        gradient=gradient,
        kind=kind,
        threshold=threshold or 0.0,
    )
    return loss, scores, gradient


def backward(
    gradient: Tensor,
    image: Tensor,
    positive: Tensor,
    negative: Tensor,
    kappa: Tensor | None,
    projection: Tensor | None,
    norm: Tensor,
    weights: list[float],
) -> Tensor:
    embedding = embed(image, projection)
    batch, pairs, width = positive.shape
    out = embedding.new_empty(batch, width)
    if out.numel():
        block, warps = _row(width)
        with device_guard(image):
            relative_reward_backward_kernel[(batch,)](
                gradient,
                embedding,
                positive,
                negative,
                kappa,
                norm,
                out,
                width,
                pairs,
                *weights,
                ACC=accumulator(image),
                BLOCK=block,
                num_warps=warps,
            )
    return out


def _launch(
    image: Tensor,
    positive: Tensor,
    negative: Tensor,
    kappa: Tensor | None,
    projection: Tensor | None,
    weights: list[float],
    *,
    scores: Tensor,
    norm: Tensor | None = None,
    loss: Tensor | None = None,
    gradient: Tensor | None = None,
    kind: str | None = None,
    threshold: float = 0.0,
) -> None:
    embedding = embed(image, projection)
    batch, pairs, width = positive.shape
    if batch:
        block, warps = _row(width)
        with device_guard(image):
            relative_reward_kernel[(batch,)](
                embedding,
                positive,
                negative,
                kappa,
                scores,
                norm,
                loss,
                gradient,
                width,
                pairs,
                *weights,
                threshold,
                LOSS=kind,
                ACC=accumulator(image),
                BLOCK=block,
                num_warps=warps,
            )


def _new(image: Tensor, *shape: int) -> Tensor:
    return image.new_empty(shape, dtype=torch.promote_types(image.dtype, torch.float32))


def _row(width: int) -> tuple[int, int]:
    """Block and warps for a row in one piece: 8 elements a thread, so that loads of bf16 and fp32 are 16 bytes."""
    block = max(triton.next_power_of_2(width), 32)
    return block, min(max(block // 256, 1), 32)
