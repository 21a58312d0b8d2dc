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
def _weights(
    row,
    sigma_from_ptr,
    sigma_to_ptr,
    alpha_from_ptr,  # None for a velocity
    alpha_to_ptr,
    scaling_factor,
    PREDICTION: tl.constexpr,
    ACC: tl.constexpr,
):
    """What x_t, the prediction and the noise are multiplied by in a row of the result."""
    sigma_from = tl.load(sigma_from_ptr + row).to(ACC)
    sigma_to = tl.load(sigma_to_ptr + row).to(ACC)
    scaling_factor = tl.cast(scaling_factor, ACC)
    if PREDICTION == "velocity":
        of_x_t = 1 / ((1 - sigma_to) * scaling_factor)
        of_predicted = (sigma_to - sigma_from) * of_x_t
        left = sigma_to * of_x_t
    else:
        alpha_from = tl.load(alpha_from_ptr + row).to(ACC)
        left = sigma_to / (tl.load(alpha_to_ptr + row).to(ACC) * scaling_factor)
        if PREDICTION == "epsilon":
            of_x_t = 1 / (alpha_from * scaling_factor)
            of_predicted = left - sigma_from * of_x_t
        else:
            of_x_t = alpha_from / scaling_factor + left * sigma_from
            of_predicted = left * alpha_from - sigma_from / scaling_factor
    return of_x_t, of_predicted, -left


@triton.jit
def recover_kernel(
    x_t_ptr,
    noise_ptr,
    predicted_ptr,
    sigma_from_ptr,
    sigma_to_ptr,
    alpha_from_ptr,
    alpha_to_ptr,
    out_ptr,
    count,  # elements of a row
    batch,  # rows that have noise of their own
    noise_stride,
    seed,
    offset,
    width,
    scaling_factor,
    shift_factor,
    PREDICTION: tl.constexpr,
    PRIOR: tl.constexpr,
    SHARED: tl.constexpr,
    UNPACK: tl.constexpr,
    CHANNELS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One read of x_t, noise and prediction, one write. Grid: (blocks of a row, rows)."""
    first = tl.program_id(0) * BLOCK
    row = tl.program_id(1)
    image = row % batch
    base = row.to(tl.int64) * count
    columns = first + tl.arange(0, BLOCK)
    mask = columns < count
    x_t = tl.load(x_t_ptr + base + columns, mask=mask, other=0.0).to(ACC)
    predicted = tl.load(predicted_ptr + base + columns, mask=mask, other=0.0).to(ACC)
    if PRIOR:
        noise = draw(first, image * (0 if SHARED else 1), seed, offset, BLOCK).to(ACC)
    else:
        noise = tl.load(noise_ptr + image.to(tl.int64) * noise_stride + columns, mask=mask, other=0.0).to(ACC)
    of_x_t, of_predicted, of_noise = _weights(
        row, sigma_from_ptr, sigma_to_ptr, alpha_from_ptr, alpha_to_ptr, scaling_factor, PREDICTION, ACC
    )
    out = of_x_t * x_t + of_predicted * predicted + of_noise * noise + tl.cast(shift_factor, ACC)
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
    alpha_from_ptr,
    alpha_to_ptr,
    out_ptr,
    count,
    width,
    scaling_factor,
    WRT: tl.constexpr,
    PREDICTION: tl.constexpr,
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
    of_x_t, of_predicted, _ = _weights(
        row, sigma_from_ptr, sigma_to_ptr, alpha_from_ptr, alpha_to_ptr, scaling_factor, PREDICTION, ACC
    )
    factor = of_predicted if WRT == "predicted" else of_x_t
    tl.store(out_ptr + base + columns, (gradient * factor).to(out_ptr.dtype.element_ty), mask=mask)


def forward(
    x_t: Tensor,
    noise: Tensor,
    predicted: Tensor,
    sigma_from: Tensor,
    sigma_to: Tensor,
    alpha_from: Tensor | None,
    alpha_to: Tensor | None,
    prediction: str,
    batch: int,
    size: list[int],
    scaling_factor: float,
    shift_factor: float,
) -> Tensor:
    shared = noise.shape[0] == 1 and batch > 1
    stride = 0 if shared else x_t[0].numel() if x_t.shape[0] else 0
    source = dict(noise_ptr=noise, noise_stride=stride, seed=0, offset=0, PRIOR=False, SHARED=False)
    levels = _named(sigma_from, sigma_to, alpha_from, alpha_to, prediction)
    return _launch(x_t, predicted, batch, size, scaling_factor, shift_factor, levels | source)


def forward_prior(
    x_t: Tensor,
    predicted: Tensor,
    sigma_from: Tensor,
    sigma_to: Tensor,
    alpha_from: Tensor | None,
    alpha_to: Tensor | None,
    prediction: str,
    batch: int,
    seed: int,
    offset: int,
    shared: bool,
    size: list[int],
    scaling_factor: float,
    shift_factor: float,
) -> Tensor:
    source = dict(noise_ptr=x_t, noise_stride=0, seed=seed, offset=offset, PRIOR=True, SHARED=shared)
    levels = _named(sigma_from, sigma_to, alpha_from, alpha_to, prediction)
    return _launch(x_t, predicted, batch, size, scaling_factor, shift_factor, levels | source)


def backward(
    gradient: Tensor,
    sigma_from: Tensor,
    sigma_to: Tensor,
    alpha_from: Tensor | None,
    alpha_to: Tensor | None,
    prediction: str,
    size: list[int],
    scaling_factor: float,
    wrt: str,
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
                gradient_ptr=gradient,
                out_ptr=out,
                count=count,
                width=size[1] if size else 0,
                scaling_factor=scaling_factor,
                WRT=wrt,
                UNPACK=bool(size),
                CHANNELS=channels,
                ACC=accumulator(gradient),
                BLOCK=block,
                num_warps=warps,
                **_named(sigma_from, sigma_to, alpha_from, alpha_to, prediction),
            )
    return out


def _named(
    sigma_from: Tensor, sigma_to: Tensor, alpha_from: Tensor | None, alpha_to: Tensor | None, prediction: str
) -> dict:
    return dict(
        sigma_from_ptr=sigma_from,
        sigma_to_ptr=sigma_to,
        alpha_from_ptr=alpha_from,
        alpha_to_ptr=alpha_to,
        PREDICTION=prediction,
    )


def _launch(
    x_t: Tensor,
    predicted: Tensor,
    batch: int,
    size: list[int],
    scaling_factor: float,
    shift_factor: float,
    source: dict,  # the kernel's arguments of levels and noise
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
                predicted_ptr=predicted,
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
