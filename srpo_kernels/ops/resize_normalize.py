"""What an image reward does before its tower: clamp, bicubic resize of the shorter edge, centre crop, normalise.

    t   = clamp((image - low) / (high - low), 0, 1)
    out = (crop(resize(t)) - mean) / std

Equal to torchvision's float `resize`, `center_crop` and `normalize`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from srpo_kernels.ops._checks import check_floating
from srpo_kernels.ops._register import define, describe

__all__ = ["resize_normalize", "resize_normalize_reference"]

# --- reference --------------------------------------------------------------------------------


def resize_normalize_reference(
    image: Tensor,
    size: int,
    resized: list[int],
    crop: list[int],
    mean: list[float],
    std: list[float],
    value_range: list[float],
    antialias: bool,
    channels_last: bool,
) -> Tensor:
    """`resized` is the [height, width] of the whole resized image, `crop` the [top, left] of its window."""
    low, high = value_range
    unit = (_wide(image).clamp(low, high) - low) / (high - low)
    options: dict = dict(mode="bicubic", align_corners=False, antialias=antialias)
    whole = functional.interpolate(unit, size=tuple(resized), **options)
    window = whole[..., crop[0] : crop[0] + size, crop[1] : crop[1] + size]
    out = _allocate(image, [*image.shape[:2], size, size], channels_last)
    return out.copy_((window - _column(mean, window)) / _column(std, window))


def _backward_reference(
    gradient: Tensor,
    image: Tensor | None,
    shape: list[int],
    size: int,
    resized: list[int],
    crop: list[int],
    std: list[float],
    value_range: list[float],
    antialias: bool,
    channels_last: bool,
) -> Tensor:
    low, high = value_range
    top, left = crop
    scaled = _wide(gradient) / (_column(std, _wide(gradient)) * (high - low))
    whole = functional.pad(scaled, (left, resized[1] - left - size, top, resized[0] - top - size))
    aten = torch.ops.aten
    transposed = aten._upsample_bicubic2d_aa_backward if antialias else aten.upsample_bicubic2d_backward
    result = transposed(whole, resized, shape, False, None, None)
    if image is not None:
        result = result.where((image >= low) & (image <= high), 0)
    return _allocate(gradient, shape, channels_last).copy_(result)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]


# --- contract ---------------------------------------------------------------------------------

_WINDOW = "int size, int[] resized, int[] crop"


def _allocate(like: Tensor, shape: list[int], channels_last: bool) -> Tensor:
    batch, channels, height, width = shape
    if channels_last:
        return like.new_empty(batch, height, width, channels).permute(0, 3, 1, 2)
    return like.new_empty(shape)


def _fake(image: Tensor, size: int, *rest: Any) -> Tensor:
    return _allocate(image, [*image.shape[:2], size, size], rest[-1])


def _fake_backward(gradient: Tensor, _image: Tensor | None, shape: list[int], *rest: Any) -> Tensor:
    return _allocate(gradient, shape, rest[-1])


_forward = define(
    f"resize_normalize_fwd(Tensor image, {_WINDOW}, float[] mean, float[] std, float[] value_range, bool antialias, "
    "bool channels_last) -> Tensor",
    fake=_fake,
    cpu=resize_normalize_reference,
    cuda="srpo_kernels._triton.resize_normalize:forward",
)
# `image` is given when the clamp takes part in the gradient.
_backward = define(
    f"resize_normalize_bwd(Tensor gradient, Tensor? image, int[] shape, {_WINDOW}, float[] std, float[] value_range, "
    "bool antialias, bool channels_last) -> Tensor",
    fake=_fake_backward,
    cpu=_backward_reference,
    cuda="srpo_kernels._triton.resize_normalize:backward",
)

# --- autograd ---------------------------------------------------------------------------------


class _ResizeNormalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        size: int,
        resized: list[int],
        crop: list[int],
        mean: list[float],
        std: list[float],
        value_range: list[float],
        antialias: bool,
        channels_last: bool,
        hard: bool,
    ) -> Tensor:
        # The image as it came, whatever its strides: the op brings it into order again, so that no copy is kept.
        ctx.save_for_backward(*[image] if hard else [])
        ctx.shape, ctx.window = list(image.shape), (size, resized, crop)
        ctx.rest = (std, value_range, antialias, channels_last)
        return _forward(image, size, resized, crop, mean, std, value_range, antialias, channels_last)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        image = next(iter(ctx.saved_tensors), None)  # one access: checkpointing refuses a second
        return _backward(gradient, image, ctx.shape, *ctx.window, *ctx.rest), *[None] * 9


# --- public function --------------------------------------------------------------------------


def resize_normalize(
    image: Tensor,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    value_range: tuple[float, float] = (-1.0, 1.0),
    antialias: bool = True,
    clamp_gradient: str = "hard",
) -> Tensor:
    """Decoded images as the vision tower of a reward model takes them, in one pass.

    Args:
        image: [B, C, H, W] with values in `value_range`, contiguous or channels_last; fp32, fp16 or bf16 (float64 for
            checking). Values outside are clamped.
        size: edge of the result. The shorter edge of the image is resized to it (bicubic), the longer one is cropped.
        mean, std: C numbers each, for images in [0, 1].
        value_range: what maps to 0 and to 1.
        antialias: widen the filter when the image is reduced, as torchvision does.
        clamp_gradient: "hard" is the clamp's own gradient, 0 outside the range and 1 on its bounds (where torch.clamp
            gives 1, and 0 from torch 2.15 on); "straight_through" ignores the clamp in backward, so that a saturated
            pixel can come back.

    Returns:
        [B, C, size, size] in the dtype and memory format of the image; computed in fp32. Not clamped again: a bicubic
        filter overshoots. Backward keeps the image for "hard", nothing for "straight_through", and is deterministic.

    Raises:
        TypeError: the image has another dtype. ValueError: shapes or options do not fit.
    """
    check_floating("resize_normalize", image=image)
    if image.ndim != 4 or 0 in image.shape[1:]:
        raise ValueError(f"resize_normalize: image must be [B, C, H, W] with C, H, W >= 1, got {list(image.shape)}")
    if size < 1:
        raise ValueError(f"resize_normalize: size must be at least 1, got {size}")
    channels, height, width = image.shape[1:]
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise ValueError(f"resize_normalize: {name} must hold {channels} numbers (channels), got {len(values)}")
    if 0 in std:
        raise ValueError(f"resize_normalize: std must not be 0, got {list(std)}")
    if len(value_range) != 2 or not value_range[0] < value_range[1]:
        raise ValueError(f"resize_normalize: value_range must be (low, high) with low < high, got {value_range}")
    if clamp_gradient not in ("hard", "straight_through"):
        raise ValueError(
            f'resize_normalize: clamp_gradient must be "hard" or "straight_through", got {clamp_gradient!r}'
        )
    short = min(height, width)
    resized = [int(size * edge / short) for edge in (height, width)]  # torchvision's; exactly `size` for the shorter
    return _ResizeNormalize.apply(
        image,
        size,
        resized,
        [round((edge - size) / 2) for edge in resized],  # torchvision's, to even
        [float(value) for value in mean],
        [float(value) for value in std],
        [float(value) for value in value_range],
        antialias,
        image.stride(1) == 1 and not image.is_contiguous(),
        clamp_gradient == "hard",
    )


describe(
    resize_normalize,
    formula="(crop(resize(clamp((image - low) / (high - low), 0, 1))) - mean) / std",
    shapes="image [B, C, H, W] -> [B, C, size, size]",
    saved="image (clamp_gradient='hard') or none",
    floor="forward: read the image, write the result; backward: read the result's gradient and, if 'hard', the image, "
    "write the image's gradient",
    schemas=("resize_normalize_fwd", "resize_normalize_bwd"),
)
