"""Semantic Relative Preference (SRPO, arXiv 2509.06942): one image scored against two prompts."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from srpo_kernels.ops._checks import check_floating

__all__ = ["RELATIVE_FORMS", "relative_reward"]

#: How kappa weighs the two prompts: name -> (weight of positive, weight of negative).
RELATIVE_FORMS = {
    "official": lambda kappa: (1 + kappa, -1.0),  # the published code
    "difference": lambda _kappa: (1.0, -1.0),  # the paper's relative reward; kappa is not used
    "cfg": lambda kappa: (kappa, 1 - kappa),  # the paper's classifier-free-guidance form
}


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
        projection: weight [D, E] applied first, ``image @ projection.T``.
        scale: factor of the cosine.
        form: a name in `RELATIVE_FORMS`: "official" as above, "difference" (kappa = 0), or "cfg",
            ``kappa positive + (1 - kappa) negative``.

    Returns:
        Scores [B] (or [B, P]), fp32 (float64 for float64 inputs). Differentiable in image and projection only.

    Raises:
        TypeError: an embedding is not floating. ValueError: shapes or devices do not fit, or an unknown form.
    """
    check_floating("relative_reward", image=image, positive=positive, negative=negative)
    if form not in RELATIVE_FORMS:
        raise ValueError(f"relative_reward: form must be one of {sorted(RELATIVE_FORMS)}, got {form!r}")
    if image.ndim != 2:
        raise ValueError(f"relative_reward: image must be [B, D], got {list(image.shape)}")
    width = image.shape[1]
    if projection is not None:
        check_floating("relative_reward", image=image, projection=projection)
        if projection.ndim != 2 or projection.shape[1] != width:
            raise ValueError(f"relative_reward: projection must be [D, {width}], got {list(projection.shape)}")
        width = projection.shape[0]
    for name, text in (("positive", positive), ("negative", negative)):
        if text.ndim not in (2, 3) or text.shape[0] != image.shape[0] or text.shape[-1] != width:
            wanted = f"[{image.shape[0]}, {width}] or [{image.shape[0]}, P, {width}]"
            raise ValueError(f"relative_reward: {name} must be {wanted}, got {list(text.shape)}")
    if positive.shape != negative.shape:
        shapes = f"{list(positive.shape)} and {list(negative.shape)}"
        raise ValueError(f"relative_reward: positive and negative must have one shape, got {shapes}")
    if isinstance(kappa, Tensor) and kappa.shape != image.shape[:1]:
        raise ValueError(f"relative_reward: kappa must be a float or [{image.shape[0]}], got {list(kappa.shape)}")

    accumulate = torch.promote_types(image.dtype, torch.float32)
    embedding = image.to(accumulate)
    if projection is not None:
        embedding = embedding @ projection.to(accumulate).T
    if isinstance(kappa, Tensor):
        kappa = kappa.to(image.device, accumulate).reshape(-1, *[1] * (positive.ndim - 1))
    weight_positive, weight_negative = RELATIVE_FORMS[form](kappa)
    direction = weight_positive * positive.detach().to(accumulate) + weight_negative * negative.detach().to(accumulate)
    return scale * torch.einsum("bd,b...d->b...", normalize(embedding, dim=-1), direction)
