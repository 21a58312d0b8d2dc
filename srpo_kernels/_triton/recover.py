"""Triton kernels of `srpo_kernels.ops.recover`.

With UNPACK a block of flat elements is TOKENS whole tokens of CHANNELS x 2 x 2 features. It is read as it lies, and
permuted in registers so that the channels_last image is written (or its gradient read) in runs of channels.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from srpo_kernels._triton._common import accumulator, device_guard, elementwise
from srpo_kernels._triton.noise_prior import draw


@triton.jit
def _pixel_offsets(first_token, tokens, width, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    """Offsets [TOKENS, 2, 2, CHANNELS] of the tokens' pixels in a channels_last image of `width` pixels, and a mask."""
    token = first_token + tl.arange(0, TOKENS)[:, None, None, None]
    down = tl.arange(0, 2)[None, :, None, None]
    right = tl.arange(0, 2)[None, None, :, None]
    channel = tl.arange(0, CHANNELS)[None, None, None, :]
    columns = width // 2
    y = 2 * (token // columns) + down
    x = 2 * (token % columns) + right
    return (y * width + x) * CHANNELS + channel, (token < tokens) & (channel < CHANNELS)


@triton.jit
def recover_kernel(
    x_t_ptr,
    noise_ptr,
    velocity_ptr,
    sigma_from_ptr,
    sigma_to_ptr,
    out_ptr,
    count,  # elements of a row
    batch,  # rows that have noise of their own
    noise_stride,
    seed,
    offset,
    width,
    scaling_factor,
    shift_factor,
    PRIOR: tl.constexpr,
    SHARED: tl.constexpr,
    UNPACK: tl.constexpr,
    CHANNELS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One read of x_t, noise and velocity, one write. Grid: (blocks of a row, rows)."""
    first = tl.program_id(0) * BLOCK
    row = tl.program_id(1)
    image = row % batch
    base = row.to(tl.int64) * count
    columns = first + tl.arange(0, BLOCK)
    mask = columns < count
    x_t = tl.load(x_t_ptr + base + columns, mask=mask, other=0.0).to(ACC)
    velocity = tl.load(velocity_ptr + base + columns, mask=mask, other=0.0).to(ACC)
    if PRIOR:
        noise = draw(first, image * (0 if SHARED else 1), seed, offset, BLOCK).to(ACC)
    else:
        noise = tl.load(noise_ptr + image.to(tl.int64) * noise_stride + columns, mask=mask, other=0.0).to(ACC)
    start = tl.load(sigma_from_ptr + row).to(ACC)
    end = tl.load(sigma_to_ptr + row).to(ACC)
    factor = 1 / ((1 - end) * tl.cast(scaling_factor, ACC))
    out = (x_t + (end - start) * velocity - end * noise) * factor + tl.cast(shift_factor, ACC)
    out = out.to(out_ptr.dtype.element_ty)
    if UNPACK:
        features: tl.constexpr = 4 * CHANNELS
        tokens: tl.constexpr = BLOCK // features
        pixels = tl.permute(tl.reshape(out, (tokens, CHANNELS, 2, 2)), (0, 2, 3, 1))
        offsets, inside = _pixel_offsets(first // features, count // features, width, tokens, CHANNELS)
        tl.store(out_ptr + base + offsets, pixels, mask=inside)
    else:
        tl.store(out_ptr + base + columns, out, mask=mask)


@triton.jit
def recover_backward_kernel(
    gradient_ptr,
    sigma_from_ptr,
    sigma_to_ptr,
    out_ptr,
    count,
    width,
    scaling_factor,
    WRT: tl.constexpr,
    UNPACK: tl.constexpr,
    CHANNELS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of every row times one number, packed back into tokens. Grid as above."""
    first = tl.program_id(0) * BLOCK
    row = tl.program_id(1)
    base = row.to(tl.int64) * count
    columns = first + tl.arange(0, BLOCK)
    mask = columns < count
    if UNPACK:
        features: tl.constexpr = 4 * CHANNELS
        tokens: tl.constexpr = BLOCK // features
        offsets, inside = _pixel_offsets(first // features, count // features, width, tokens, CHANNELS)
        pixels = tl.load(gradient_ptr + base + offsets, mask=inside, other=0.0)
        gradient = tl.reshape(tl.permute(pixels, (0, 3, 1, 2)), (BLOCK,)).to(ACC)
    else:
        gradient = tl.load(gradient_ptr + base + columns, mask=mask, other=0.0).to(ACC)
    start = tl.load(sigma_from_ptr + row).to(ACC)
    end = tl.load(sigma_to_ptr + row).to(ACC)
    factor = 1 / ((1 - end) * tl.cast(scaling_factor, ACC))
    if WRT == "velocity":
        factor *= end - start
    tl.store(out_ptr + base + columns, (gradient * factor).to(out_ptr.dtype.element_ty), mask=mask)


def forward(
    x_t: Tensor,
    noise: Tensor,
    velocity: Tensor,
    sigma_from: Tensor,
    sigma_to: Tensor,
    batch: int,
    size: list[int],
    scaling_factor: float,
    shift_factor: float,
) -> Tensor:
    shared = noise.shape[0] == 1 and batch > 1
    stride = 0 if shared else x_t[0].numel() if x_t.shape[0] else 0
    source = dict(noise_ptr=noise, noise_stride=stride, seed=0, offset=0, PRIOR=False, SHARED=False)
    return _launch(x_t, velocity, sigma_from, sigma_to, batch, size, scaling_factor, shift_factor, source)


def forward_prior(
    x_t: Tensor,
    velocity: Tensor,
    sigma_from: Tensor,
    sigma_to: Tensor,
    batch: int,
    seed: int,
    offset: int,
    shared: bool,
    size: list[int],
    scaling_factor: float,
    shift_factor: float,
) -> Tensor:
    source = dict(noise_ptr=x_t, noise_stride=0, seed=seed, offset=offset, PRIOR=True, SHARED=shared)
    return _launch(x_t, velocity, sigma_from, sigma_to, batch, size, scaling_factor, shift_factor, source)


def backward(
    gradient: Tensor, sigma_from: Tensor, sigma_to: Tensor, size: list[int], scaling_factor: float, wrt: str
) -> Tensor:
    rows = gradient.shape[0]
    channels = gradient.shape[1] if size else 1
    shape = (rows, size[0] * size[1] // 4, 4 * channels) if size else gradient.shape
    out = gradient.new_empty(shape)
    if out.numel():
        count = out[0].numel()
        block, warps = elementwise(count, gradient, multiple=4 * channels)
        with device_guard(gradient):
            recover_backward_kernel[(triton.cdiv(count, block), rows)](
                gradient,
                sigma_from,
                sigma_to,
                out,
                count,
                size[1] if size else 0,
                scaling_factor,
                WRT=wrt,
                UNPACK=bool(size),
                CHANNELS=channels,
                ACC=accumulator(gradient),
                BLOCK=block,
                num_warps=warps,
            )
    return out


def _launch(
    x_t: Tensor,
    velocity: Tensor,
    sigma_from: Tensor,
    sigma_to: Tensor,
    batch: int,
    size: list[int],
    scaling_factor: float,
    shift_factor: float,
    source: dict,
) -> Tensor:
    rows = x_t.shape[0]
    channels = x_t.shape[2] // 4 if size else 1
    shape = (rows, *size, channels) if size else x_t.shape
    out = x_t.new_empty(shape)
    if out.numel():
        count = x_t[0].numel()
        block, warps = elementwise(count, x_t, multiple=4 * channels)
        with device_guard(x_t):
            recover_kernel[(triton.cdiv(count, block), rows)](
                x_t_ptr=x_t,
                velocity_ptr=velocity,
                sigma_from_ptr=sigma_from,
                sigma_to_ptr=sigma_to,
                out_ptr=out,
                count=count,
                batch=batch,
                width=size[1] if size else 0,
                scaling_factor=scaling_factor,
                shift_factor=shift_factor,
                UNPACK=bool(size),
                CHANNELS=channels,
                ACC=accumulator(x_t),
                BLOCK=block,
                num_warps=warps,
                **source,
            )
    return out.permute(0, 3, 1, 2) if size else out
