"""Semantic Relative Preference (SRPO, arXiv 2509.06942): one image scored against two prompts.

With f the image embedding at unit norm, a score is ``<f, w+ positive + w- negative>``. Whatever the form, both weights
are affine in kappa, so the kernels get four numbers (scale included) and know nothing of forms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from srpo_kernels.ops._checks import check_floating
from srpo_kernels.ops._register import define, describe
from srpo_kernels.ops.inject_noise import noise_gradient

__all__ = ["EPS", "RELATIVE_FORMS", "relative_reward", "relative_reward_loss"]

#: How kappa weighs the two prompts: name -> (weight of positive, weight of negative).
RELATIVE_FORMS = {
    "official": lambda kappa: (1 + kappa, -1.0),  # the published code
    "difference": lambda _kappa: (1.0, -1.0),  # the paper's relative reward; kappa is not used
    "cfg": lambda kappa: (kappa, 1 - kappa),  # the paper's classifier-free-guidance form
}
#: Shorter embeddings are divided by this instead of their norm, as `torch.nn.functional.normalize` does.
EPS = 1e-12

# --- reference --------------------------------------------------------------------------------


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a @ b`` in `dtype`, which autocast would undo. GPUs sum products of 16-bit numbers in fp32 as they are."""
    with torch.autocast(a.device.type, enabled=False):
        if a.device.type != "cpu" and a.dtype == b.dtype and a.dtype.itemsize == 2 and dtype == torch.float32:
            return torch.mm(a, b, out_dtype=dtype)
        return a.to(dtype) @ b.to(dtype)


def embed(image: Tensor, projection: Tensor | None) -> Tensor:
    """The embedding to normalise: the image's own, or its projection in fp32 or wider."""
    if projection is None:
        return image
    return matmul(image, projection.T, torch.promote_types(image.dtype, torch.float32))


def _direction(positive: Tensor, negative: Tensor, kappa: Tensor | None, weights: list[float], like: Tensor) -> Tensor:
    """What a unit embedding is multiplied with, [B, P, D]."""
    level = torch.zeros_like(like[:, :1]) if kappa is None else kappa.to(like.dtype)[:, None]
    weight_positive, weight_negative = weights[0] + weights[1] * level, weights[2] + weights[3] * level
    return weight_positive[..., None] * positive.to(like.dtype) + weight_negative[..., None] * negative.to(like.dtype)


def _through_norm(gradient: Tensor, embedding: Tensor, norm: Tensor) -> Tensor:
    """From the gradient of unit embeddings to that of the embeddings, [B, P, D] and norm [B]."""
    length = norm.clamp_min(EPS)[:, None, None]
    unit = embedding[:, None] / length
    radial = (gradient * unit).sum(-1, keepdim=True) * (norm > EPS)[:, None, None]
    return (gradient - radial * unit) / length


def relative_reward_reference(
    image: Tensor,
    positive: Tensor,
    negative: Tensor,
    kappa: Tensor | None,
    projection: Tensor | None,
    weights: list[float],
) -> tuple[Tensor, Tensor]:
    """image [B, E], texts [B, P, D], kappa [B], projection [D, E] -> scores [B, P], norm [B].

    ``weights`` are (c, s, c', s'): positive weighs ``c + s kappa``, negative ``c' + s' kappa``.
    """
    embedding = _accumulated(embed(image, projection))
    norm = embedding.norm(dim=-1)
    unit = embedding / norm.clamp_min(EPS)[:, None]
    return (unit[:, None] * _direction(positive, negative, kappa, weights, embedding)).sum(-1), norm


def _backward_reference(
    gradient: Tensor,
    image: Tensor,
    positive: Tensor,
    negative: Tensor,
    kappa: Tensor | None,
    projection: Tensor | None,
    norm: Tensor,
    weights: list[float],
) -> Tensor:
    """The gradient of `embed`'s result, in its dtype."""
    embedding = embed(image, projection)
    wide = _accumulated(embedding)
    total = (gradient[..., None] * _direction(positive, negative, kappa, weights, wide)).sum(1, keepdim=True)
    return _through_norm(total, wide, norm)[:, 0].to(embedding.dtype)


def _loss_reference(
    image: Tensor,
    positive: Tensor,
    negative: Tensor,
    kappa: Tensor | None,
    projection: Tensor | None,
    weights: list[float],
    threshold: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses and scores [B, P], and the gradient of every loss with respect to `embed`'s result, [P, B, D]."""
    scores, norm = relative_reward_reference(image, positive, negative, kappa, projection, weights)
    embedding = _accumulated(embed(image, projection))
    loss = -scores if threshold is None else torch.relu(threshold - scores)
    slope = -torch.ones_like(loss) if threshold is None else -(loss > 0).to(loss.dtype)
    direction = slope[..., None] * _direction(positive, negative, kappa, weights, embedding)
    return loss, scores, _through_norm(direction, embedding, norm).transpose(0, 1).contiguous()


def _accumulated(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


# --- contract ---------------------------------------------------------------------------------

_INPUTS = "Tensor image, Tensor positive, Tensor negative, Tensor? kappa, Tensor? projection"


def _fake_forward(image: Tensor, positive: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(image.dtype, torch.float32)
    return image.new_empty(positive.shape[:2], dtype=dtype), image.new_empty(image.shape[0], dtype=dtype)


def _fake_backward(
    _gradient: Tensor, image: Tensor, positive: Tensor, _negative: Tensor, _kappa: Any, projection: Any, *_: Any
) -> Tensor:
    dtype = image.dtype if projection is None else torch.promote_types(image.dtype, torch.float32)
    return image.new_empty(positive.shape[0], positive.shape[2], dtype=dtype)


def _fake_loss(image: Tensor, positive: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(image.dtype, torch.float32)
    batch, pairs, width = positive.shape
    loss, scores = (image.new_empty(batch, pairs, dtype=dtype) for _ in range(2))
    return loss, scores, image.new_empty(pairs, batch, width, dtype=dtype)


_forward = define(
    f"relative_reward_fwd({_INPUTS}, float[] weights) -> (Tensor scores, Tensor norm)",
    fake=_fake_forward,
    cpu=relative_reward_reference,
    cuda="srpo_kernels._triton.relative_reward:forward",
)
_backward = define(
    f"relative_reward_bwd(Tensor gradient, {_INPUTS}, Tensor norm, float[] weights) -> Tensor",
    fake=_fake_backward,
    cpu=_backward_reference,
    cuda="srpo_kernels._triton.relative_reward:backward",
)
_loss_forward = define(
    f"relative_reward_loss_fwd({_INPUTS}, float[] weights, float? threshold) "
    "-> (Tensor loss, Tensor scores, Tensor gradient)",
    fake=_fake_loss,
    cpu=_loss_reference,
    cuda="srpo_kernels._triton.relative_reward:loss_forward",
)

# --- autograd ---------------------------------------------------------------------------------


def _through_projection(
    ctx: Any, gradient: Tensor, image: Any, projection: Tensor | None
) -> tuple[Tensor | None, None, None, None, Tensor | None, None]:
    """From the gradient of `embed`'s result to the gradients of the operator's first six arguments."""
    if projection is None:
        return gradient.to(ctx.image_dtype), None, None, None, None, None
    dimage = dprojection = None
    if ctx.needs_input_grad[0]:
        dimage = matmul(gradient, projection, gradient.dtype).to(ctx.image_dtype)
    if ctx.needs_input_grad[4]:
        dprojection = matmul(gradient.T, image, gradient.dtype).to(projection.dtype)
    return dimage, None, None, None, dprojection, None


class _RelativeReward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        positive: Tensor,
        negative: Tensor,
        kappa: Tensor | None,
        projection: Tensor | None,
        weights: list[float],
    ) -> Tensor:
        scores, norm = _forward(image, positive, negative, kappa, projection, weights)
        ctx.save_for_backward(image, positive, negative, kappa, projection, norm)
        ctx.image_dtype, ctx.weights = image.dtype, weights
        return scores

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: checkpointing recomputes on the first access and refuses a second
        gradient = gradient.contiguous()  # its strides are unspecified
        dembedding = _backward(gradient, *saved, ctx.weights)
        return _through_projection(ctx, dembedding, saved[0], saved[4])


class _RelativeRewardLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        positive: Tensor,
        negative: Tensor,
        kappa: Tensor | None,
        projection: Tensor | None,
        weights: list[float],
        threshold: float | None,
    ) -> tuple[Tensor, Tensor]:
        loss, scores, gradient = _loss_forward(image, positive, negative, kappa, projection, weights, threshold)
        ctx.save_for_backward(gradient, image if ctx.needs_input_grad[4] else None, projection)
        ctx.image_dtype = image.dtype
        ctx.mark_non_differentiable(scores)
        ctx.set_materialize_grads(False)  # of the scores
        return loss, scores

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 7
        gradient, image, projection = ctx.saved_tensors
        dembedding = noise_gradient(gradient, upstream, shared=False)  # pairs are its branches
        return *_through_projection(ctx, dembedding, image, projection), None


# --- public functions -------------------------------------------------------------------------


def relative_reward(
    image: Tensor,
    positive: Tensor,
    negative: Tensor,
    kappa: float | Tensor,
    *,
    projection: Tensor | None = None,
    scale: float = 1.0,
    form: str = "official",
) -> Tensor:
    """``scale * <f, (1 + kappa) positive - negative>`` with f the image embedding at unit norm.

    Args:
        image: image embeddings [B, D] (or [B, E] with `projection`), any norm.
        positive, negative: unit-norm text embeddings [B, D], or [B, P, D] for P prompt pairs an image.
        kappa: weight of the positive prompt: a float or [B].
        projection: weight [D, E] applied first, ``image @ projection.T``, in fp32.
        scale: factor of the cosine.
        form: a name in `RELATIVE_FORMS`: "official" as above, "difference" (kappa = 0), or "cfg",
            ``kappa positive + (1 - kappa) negative``.

    Returns:
        Scores [B] (or [B, P]), fp32 (float64 for float64 images). Differentiable in image and projection only; backward
        needs the inputs and one norm per image, and computes the projection again.

    Raises:
        TypeError: an embedding is not floating. ValueError: shapes or devices do not fit, or an unknown form.
    """
    arguments = _prepare("relative_reward", image, positive, negative, kappa, projection, scale, form)
    return _RelativeReward.apply(*arguments).reshape(positive.shape[:-1])


def relative_reward_loss(
    image: Tensor,
    positive: Tensor,
    negative: Tensor,
    kappa: float | Tensor,
    threshold: float | None,
    *,
    projection: Tensor | None = None,
    scale: float = 1.0,
    form: str = "official",
) -> tuple[Tensor, Tensor]:
    """``relu(threshold - relative_reward(...))`` and its gradient in one pass over the embeddings.

    Args:
        threshold: scores from here on cost nothing; None: the loss is ``-score``. The rest as in `relative_reward`.

    Returns:
        (loss, scores), each [B] (or [B, P]), fp32 (float64 for float64 images). The loss is differentiable in image and
        projection; the scores are detached. The forward pass computes the gradient of every loss with respect to the
        (projected) embedding and saves it, [P, B, D] in fp32; backward multiplies it by the upstream gradient. With
        `projection` the projection is saved too (and the image, when the projection needs a gradient), and backward
        goes on to the image.

    Raises:
        TypeError: an embedding is not floating, or threshold not a number. ValueError: as `relative_reward`.
    """
    if threshold is not None and not isinstance(threshold, (int, float)):
        got = type(threshold).__name__
        raise TypeError(f"relative_reward_loss: threshold must be a float or None, got {got}")
    arguments = _prepare("relative_reward_loss", image, positive, negative, kappa, projection, scale, form)
    loss, scores = _RelativeRewardLoss.apply(*arguments, threshold)
    return loss.reshape(positive.shape[:-1]), scores.reshape(positive.shape[:-1])


def _prepare(
    op: str,
    image: Tensor,
    positive: Tensor,
    negative: Tensor,
    kappa: float | Tensor,
    projection: Tensor | None,
    scale: float,
    form: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, list[float]]:
    """The arguments, checked, as the operators take them."""
    check_floating(op, image=image, positive=positive, negative=negative)
    if form not in RELATIVE_FORMS:
        raise ValueError(f"{op}: form must be one of {sorted(RELATIVE_FORMS)}, got {form!r}")
    if image.ndim != 2:
        raise ValueError(f"{op}: image must be [B, D], got {list(image.shape)}")
    batch, width = image.shape
    if projection is not None:
        check_floating(op, image=image, projection=projection)
        if projection.ndim != 2 or projection.shape[1] != width:
            raise ValueError(f"{op}: projection must be [D, {width}], got {list(projection.shape)}")
        projection, width = projection.contiguous(), projection.shape[0]
    for name, text in (("positive", positive), ("negative", negative)):
        if text.ndim not in (2, 3) or text.shape[0] != batch or text.shape[-1] != width:
            wanted = f"[{batch}, {width}] or [{batch}, P, {width}]"
            raise ValueError(f"{op}: {name} must be {wanted}, got {list(text.shape)}")
    if positive.shape != negative.shape:
        shapes = f"{list(positive.shape)} and {list(negative.shape)}"
        raise ValueError(f"{op}: positive and negative must have one shape, got {shapes}")
    if isinstance(kappa, Tensor) and kappa.shape != image.shape[:1]:
        raise ValueError(f"{op}: kappa must be a float or [{batch}], got {list(kappa.shape)}")

    weigh = RELATIVE_FORMS[form]
    if isinstance(kappa, Tensor):
        levels = kappa.detach().to(image.device, torch.promote_types(image.dtype, torch.float32)).contiguous()
        starts, ends = weigh(0.0), weigh(1.0)
    else:
        levels = None
        starts = ends = weigh(float(kappa))
    weights = [scale * value for start, end in zip(starts, ends, strict=True) for value in (start, end - start)]
    positive, negative = (
        (text if text.ndim == 3 else text[:, None]).detach().contiguous() for text in (positive, negative)
    )
    return image.contiguous(), positive, negative, levels, projection, weights


describe(
    relative_reward,
    formula="scale <normalize(image @ projection.T), (1 + kappa) positive - negative>",
    shapes="image [B, E], positive and negative [B, D] or [B, P, D], projection [D, E] -> [B] or [B, P]",
    saved="one number per image: its norm",
    floor="forward: read 1 + 2P, write 0; backward: read 1 + 2P, write 1 (of image's D elements a row)",
    schemas=("relative_reward_fwd", "relative_reward_bwd"),
)
describe(
    relative_reward_loss,
    formula="relu(threshold - relative_reward(...)), and the scores",
    shapes="image [B, E], positive and negative [B, D] or [B, P, D], projection [D, E] -> [B] or [B, P], twice",
    saved="the gradient of every loss, [P, B, D]",
    floor="forward: read 1 + 2P, write P; backward: read P, write 1 (of image's D elements a row)",
    schemas=("relative_reward_loss_fwd", "branch_sum"),
)
