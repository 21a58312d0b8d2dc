"""Triton kernels of `srpo_kernels.ops.group_norm_silu`: one pass over x for its statistics, one for the result.

A program walks some pixels of one image, in all channels or a block of them, and sums by channel, whatever the groups
are. A small kernel adds what programs and channels found for a group. So the same kernels serve any size of group and
both layouts, which differ in strides and in the shape of a tile, and the sums are already the gradients of weight and
bias.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from srpo_kernels._triton._common import accumulator, device_guard
from srpo_kernels._triton._partials import rows_per_program, sum_partials

#: Elements of the largest tile, 8 a thread: one 16-byte access in half precision.
_TILE = 4096
_LOG2_E = tl.constexpr(math.log2(math.e))


def plan(images: int, channels: int, pixels: int, channels_last: bool, size: int) -> tuple[int, int, dict[str, int]]:
    """Pixels of a program, programs of an image and block of channels, and options, for elements of `size` bytes.

    With channels last, a thread has 8 pixels of one channel: its tile comes in 16-byte pieces by way of shared memory,
    and what a channel needs fits in few registers.
    """
    if channels_last:
        whole = channels & -channels  # the largest block without idle threads
        width = min(whole if whole >= 32 else triton.next_power_of_2(channels), _TILE // 8)
        tile = 8
    else:
        tile = min(triton.next_power_of_2(pixels), _TILE)
        width = min(triton.next_power_of_2(channels), _TILE // tile)
    # Programs for two times 512 threads on every multiprocessor, which have 64 registers each.
    rows = tile * triton.cdiv(rows_per_program(pixels, images * triton.cdiv(channels, width)) * width, _TILE)
    stages = 3 if size <= 4 else 1  # tiles to come wait in shared memory
    options = dict(PIXELS=tile, WIDTH=width, STAGES=stages, num_warps=max(tile * width // 256, 1), maxnreg=64)
    return rows, triton.cdiv(pixels, rows), options


# --- what kernels share -------------------------------------------------------------------------


@triton.jit
def _program(channels, pixels, rows, WIDTH: tl.constexpr):
    """What a program has: the image, the chunk of its pixels, from the first to the last, and channels [1, WIDTH]."""
    chunks = tl.cdiv(pixels, rows)
    blocks = tl.cdiv(channels, WIDTH)
    index = tl.program_id(0)
    chunk = index % chunks
    channel = index // chunks % blocks * WIDTH + tl.arange(0, WIDTH)
    image = (index // chunks // blocks).to(tl.int64)
    return image, chunk, chunk * rows, tl.minimum((chunk + 1) * rows, pixels), channel[None, :]


@triton.jit
def _tile(start, last, channel, pixel_stride, channel_stride, PIXELS: tl.constexpr):
    """Offsets of a tile, in 64 bits, and which of its pixels exist [PIXELS, 1]."""
    pixel = tl.cast(start, tl.int32) + tl.arange(0, PIXELS)[:, None]
    return pixel.to(tl.int64) * pixel_stride + channel.to(tl.int64) * channel_stride, pixel < last


@triton.jit
def _merge(count, mean, m2, other_count, other_mean, other_m2):
    """Chan's rule: statistics of two sets together, element by element; m2 sums squared distances from the mean."""
    total = count + other_count
    rate = other_count / tl.maximum(total, 1)
    away = other_mean - mean
    return total, mean + away * rate, m2 + other_m2 + away * away * (count * rate)


@triton.jit
def _pool(count, mean, m2):
    """The same for all elements along dimension 0, which stays. A first guess leaves only what rounding lost to add."""
    total = tl.maximum(tl.sum(count, 0, keep_dims=True), 1)
    guess = tl.sum(count * mean, 0, keep_dims=True) / total
    away = mean - guess
    shift = tl.sum(count * away, 0, keep_dims=True) / total
    return total, guess + shift, tl.sum(m2 + count * away * away, 0, keep_dims=True) - total * shift * shift


@triton.jit
def _sigmoid(y):
    """The power does not overflow: from y = -87 on, the result stays near 1e-38."""
    return 1 / (1 + tl.exp2(tl.minimum(-y * _LOG2_E, 126.0)))


@triton.jit
def _affine(statistics_ptr, weight_ptr, bias_ptr, images, groups, group, channel, known, ACC: tl.constexpr):
    """Of each channel: the mean of its group, what then multiplies it, and its bias."""
    mean = tl.load(statistics_ptr + group, mask=known, other=0.0)
    rstd = tl.load(statistics_ptr + tl.cast(images, tl.int64) * groups + group, mask=known, other=0.0)
    weight = tl.load(weight_ptr + channel, mask=known, other=0.0).to(ACC)
    bias = tl.load(bias_ptr + channel, mask=known, other=0.0).to(ACC)
    return mean, rstd * weight, bias


@triton.jit
def _partial(start, images, channels, pixels, groups, rows, BLOCK: tl.constexpr):
    """A block of what programs found for a group: program_id(0) of images * groups.

    Returns the chunk, the channel, the place, the mask, and the distance from one kind of sum to the next.
    """
    size = channels // groups
    chunks = tl.cdiv(pixels, rows)
    image = (tl.program_id(0) // groups).to(tl.int64)
    index = tl.cast(start, tl.int32) + tl.arange(0, BLOCK)
    chunk = index // size
    channel = tl.program_id(0) % groups * size + index % size
    place = (image * chunks + chunk) * channels + channel
    return chunk, channel, place, chunk < chunks, tl.cast(images, tl.int64) * chunks * channels


# --- forward ------------------------------------------------------------------------------------


@triton.jit
def group_norm_partials_kernel(
    x_ptr,
    partials_ptr,  # mean, then m2: [2, B, chunks, C]
    images,
    channels,
    pixels,
    rows,  # pixels of a program
    pixel_stride,
    channel_stride,
    ACC: tl.constexpr,
    PIXELS: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Every lane of a tile has a mean of its own (Welford's) until the end. Grid: images * blocks * chunks."""
    image, chunk, first, last, channel = _program(channels, pixels, rows, WIDTH)
    known = channel < channels
    x_ptr += image * channels * pixels
    count = tl.zeros((PIXELS, 1), ACC)
    mean = tl.zeros((PIXELS, WIDTH), ACC)
    m2 = tl.zeros((PIXELS, WIDTH), ACC)
    for start in tl.range(first, last, PIXELS, num_stages=STAGES):
        offsets, inside = _tile(start, last, channel, pixel_stride, channel_stride, PIXELS)
        x = tl.load(x_ptr + offsets, mask=inside & known, other=0.0).to(ACC)
        count, mean, m2 = _merge(count, mean, m2, inside.to(ACC), x, 0.0)
    _, mean, m2 = _pool(count, mean, m2)
    chunks = tl.cdiv(pixels, rows)
    partials_ptr += (image * chunks + chunk) * channels
    tl.store(partials_ptr + channel, mean, mask=known)
    partials_ptr += tl.cast(images, tl.int64) * chunks * channels
    tl.store(partials_ptr + channel, m2, mask=known)


@triton.jit
def group_norm_statistics_kernel(
    partials_ptr,
    statistics_ptr,
    images,
    channels,
    pixels,
    groups,
    rows,
    eps: tl.float64,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (images * groups,)."""
    count = tl.zeros((BLOCK,), ACC)
    mean = tl.zeros((BLOCK,), ACC)
    m2 = tl.zeros((BLOCK,), ACC)
    for start in range(0, tl.cdiv(pixels, rows) * (channels // groups), BLOCK):
        chunk, _, place, mask, kind = _partial(start, images, channels, pixels, groups, rows, BLOCK)
        found = tl.where(mask, tl.minimum(pixels - chunk * rows, rows), 0).to(ACC)
        other = tl.load(partials_ptr + place, mask=mask, other=0.0)
        other_m2 = tl.load(partials_ptr + kind + place, mask=mask, other=0.0)
        count, mean, m2 = _merge(count, mean, m2, found, other, other_m2)
    total, mean, m2 = _pool(count, mean, m2)
    place = tl.program_id(0) + tl.arange(0, 1)
    tl.store(statistics_ptr + place, mean)
    tl.store(statistics_ptr + tl.num_programs(0) + place, 1 / tl.sqrt(m2 / total + tl.cast(eps, ACC)))


@triton.jit
def group_norm_silu_kernel(
    x_ptr,
    statistics_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    images,
    channels,
    pixels,
    groups,
    rows,
    pixel_stride,
    channel_stride,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    PIXELS: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid: images * blocks * chunks."""
    image, _, first, last, channel = _program(channels, pixels, rows, WIDTH)
    known = channel < channels
    group = image * groups + channel // (channels // groups)
    mean, scale, bias = _affine(statistics_ptr, weight_ptr, bias_ptr, images, groups, group, channel, known, ACC)
    x_ptr += image * channels * pixels
    out_ptr += image * channels * pixels
    final = first + (last - 1 - first) // PIXELS * PIXELS
    for back in tl.range(0, last - first, PIXELS, num_stages=STAGES):  # what was read last may still be in the cache
        offsets, inside = _tile(final - back, last, channel, pixel_stride, channel_stride, PIXELS)
        mask = inside & known
        y = (tl.load(x_ptr + offsets, mask=mask, other=0.0).to(ACC) - mean) * scale + bias
        if ACTIVATION:
            y *= _sigmoid(y)
        tl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask=mask)


# --- backward -----------------------------------------------------------------------------------


@triton.jit
def _inner(gradient_ptr, x_ptr, offsets, mask, mean, scale, bias, ACTIVATION: tl.constexpr, ACC: tl.constexpr):
    """The gradient of what the norm gave, and the distance of x from its mean."""
    gradient = tl.load(gradient_ptr + offsets, mask=mask, other=0.0).to(ACC)
    centred = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(ACC) - mean
    if ACTIVATION:
        y = centred * scale + bias
        gate = _sigmoid(y)
        gradient *= gate * (1 + y * (1 - gate))
    return gradient, centred


@triton.jit
def group_norm_silu_sums_kernel(
    gradient_ptr,
    x_ptr,
    statistics_ptr,
    weight_ptr,
    bias_ptr,
    partials_ptr,  # parts of the gradients of weight, then of bias: [2, B, chunks, C]
    images,
    channels,
    pixels,
    groups,
    rows,
    pixel_stride,
    channel_stride,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    PIXELS: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid: images * blocks * chunks."""
    image, chunk, first, last, channel = _program(channels, pixels, rows, WIDTH)
    known = channel < channels
    group = image * groups + channel // (channels // groups)
    mean, scale, bias = _affine(statistics_ptr, weight_ptr, bias_ptr, images, groups, group, channel, known, ACC)
    gradient_ptr += image * channels * pixels
    x_ptr += image * channels * pixels
    products = tl.zeros((PIXELS, WIDTH), ACC)
    sums = tl.zeros((PIXELS, WIDTH), ACC)
    for start in tl.range(first, last, PIXELS, num_stages=STAGES):
        offsets, inside = _tile(start, last, channel, pixel_stride, channel_stride, PIXELS)
        mask = inside & known
        inner, centred = _inner(gradient_ptr, x_ptr, offsets, mask, mean, scale, bias, ACTIVATION, ACC)
        products += inner * centred
        sums += inner
    chunks = tl.cdiv(pixels, rows)
    partials_ptr += (image * chunks + chunk) * channels
    rstd = tl.load(statistics_ptr + tl.cast(images, tl.int64) * groups + group, mask=known, other=0.0)
    tl.store(partials_ptr + channel, rstd * tl.sum(products, 0, keep_dims=True), mask=known)
    partials_ptr += tl.cast(images, tl.int64) * chunks * channels
    tl.store(partials_ptr + channel, tl.sum(sums, 0, keep_dims=True), mask=known)


@triton.jit
def group_norm_slopes_kernel(
    partials_ptr,
    statistics_ptr,
    weight_ptr,
    slopes_ptr,
    images,
    channels,
    pixels,
    groups,
    rows,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What dx loses for x's distance from the mean, and at any distance: [2, B, G]. Grid: (images * groups,)."""
    products = tl.zeros((BLOCK,), ACC)
    sums = tl.zeros((BLOCK,), ACC)
    for start in range(0, tl.cdiv(pixels, rows) * (channels // groups), BLOCK):
        _, channel, place, mask, kind = _partial(start, images, channels, pixels, groups, rows, BLOCK)
        weight = tl.load(weight_ptr + channel, mask=mask, other=0.0).to(ACC)
        products += weight * tl.load(partials_ptr + place, mask=mask, other=0.0)
        sums += weight * tl.load(partials_ptr + kind + place, mask=mask, other=0.0)
    elements = tl.cast(pixels, ACC) * (channels // groups)
    rstd = tl.load(statistics_ptr + tl.num_programs(0) + tl.program_id(0))
    tl.store(slopes_ptr + tl.program_id(0), rstd * rstd * (tl.sum(products, 0) / elements))
    tl.store(slopes_ptr + tl.num_programs(0) + tl.program_id(0), rstd * (tl.sum(sums, 0) / elements))


@triton.jit
def group_norm_silu_backward_kernel(
    gradient_ptr,
    x_ptr,
    statistics_ptr,
    slopes_ptr,
    weight_ptr,
    bias_ptr,
    dx_ptr,
    images,
    channels,
    pixels,
    groups,
    rows,
    pixel_stride,
    channel_stride,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    PIXELS: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid: images * blocks * chunks."""
    image, _, first, last, channel = _program(channels, pixels, rows, WIDTH)
    known = channel < channels
    group = image * groups + channel // (channels // groups)
    mean, scale, bias = _affine(statistics_ptr, weight_ptr, bias_ptr, images, groups, group, channel, known, ACC)
    slope = tl.load(slopes_ptr + group, mask=known, other=0.0)
    level = tl.load(slopes_ptr + tl.cast(images, tl.int64) * groups + group, mask=known, other=0.0)
    gradient_ptr += image * channels * pixels
    x_ptr += image * channels * pixels
    dx_ptr += image * channels * pixels
    final = first + (last - 1 - first) // PIXELS * PIXELS
    for back in tl.range(0, last - first, PIXELS, num_stages=STAGES):  # what was read last may still be in the cache
        offsets, inside = _tile(final - back, last, channel, pixel_stride, channel_stride, PIXELS)
        mask = inside & known
        inner, centred = _inner(gradient_ptr, x_ptr, offsets, mask, mean, scale, bias, ACTIVATION, ACC)
        dx = inner * scale - level - centred * slope
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)


# --- launchers ----------------------------------------------------------------------------------


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, activation: bool
) -> tuple[Tensor, Tensor]:
    images, channels, _ = x.shape
    out = torch.empty_like(x)
    statistics = x.new_empty(2, images, groups, dtype=torch.promote_types(x.dtype, torch.float32))
    if out.numel():
        rows, chunks, grid, options = _launch(x)
        partials = statistics.new_empty(2, images, chunks, channels)
        with device_guard(x):
            group_norm_partials_kernel[grid](x, partials, *x.shape, rows, **options)
            group_norm_statistics_kernel[(images * groups,)](
                partials, statistics, *x.shape, groups, rows, eps, **_combine_options(x, chunks, groups)
            )
            group_norm_silu_kernel[grid](
                x, statistics, weight, bias, out, *x.shape, groups, rows, ACTIVATION=activation, **options
            )
    return out, statistics


def backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    activation: bool,
    wanted: list[bool],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    images, channels, _ = x.shape
    groups = statistics.shape[2]
    dx = torch.empty_like(x) if wanted[0] else x.new_empty(0)
    if not x.numel():
        return dx, x.new_zeros(sum(wanted[1:]), channels, dtype=dtype)
    rows, chunks, grid, options = _launch(x)
    options["ACTIVATION"] = activation
    partials = statistics.new_empty(2, images, chunks, channels)
    with device_guard(x):
        group_norm_silu_sums_kernel[grid](
            gradient, x, statistics, weight, bias, partials, *x.shape, groups, rows, **options
        )
        if wanted[0]:
            slopes = torch.empty_like(statistics)
            group_norm_slopes_kernel[(images * groups,)](
                partials, statistics, weight, slopes, *x.shape, groups, rows, **_combine_options(x, chunks, groups)
            )
            group_norm_silu_backward_kernel[grid](
                gradient, x, statistics, slopes, weight, bias, dx, *x.shape, groups, rows, **options
            )
    vectors = partials[0 if wanted[1] else 1 : 2 if wanted[2] else 1]
    return dx, sum_partials(vectors.flatten(1, 2), dtype)


def _launch(x: Tensor) -> tuple[int, int, tuple[int], dict[str, Any]]:
    """Pixels of a program, programs of an image and block of channels, the grid, and what passes over x share."""
    images, channels, pixels = x.shape
    contiguous = x.is_contiguous()
    rows, chunks, constants = plan(images, channels, pixels, not contiguous, x.element_size())
    pixel_stride, channel_stride = (1, pixels) if contiguous else (channels, 1)
    grid = (images * triton.cdiv(channels, constants["WIDTH"]) * chunks,)
    strides = dict(pixel_stride=pixel_stride, channel_stride=channel_stride)
    return rows, chunks, grid, dict(strides, ACC=accumulator(x), **constants)


def _combine_options(x: Tensor, chunks: int, groups: int) -> dict[str, Any]:
    """Of the kernels that add what `chunks` programs found for the channels of a group."""
    block = min(triton.next_power_of_2(chunks * x.shape[1] // groups), _TILE // 2)
    return dict(ACC=accumulator(x), BLOCK=block, num_warps=max(block // 128, 1))
