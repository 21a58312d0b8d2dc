"""Triton kernel of `srpo_kernels.ops.resize_normalize`.

A separable resize with crop is ``left @ plane @ right``, with one banded matrix for each axis, and so is its backward,
with both transposed. One kernel does either: a program holds one tile of the result and walks over the blocks of the
two matrices that are not zero there. A channels_last image is a single plane whose columns are pixel-major channels;
its right matrix is the Kronecker product with the identity. So both layouts are read and written as they lie.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from srpo_kernels._triton._common import accumulator, device_guard


@dataclass(frozen=True)
class Config:
    """A tile of the result, and the block of the source that one step takes in."""

    tile_y: int
    tile_x: int
    step_y: int
    step_x: int
    warps: int


#: The result is the smaller image in the first and the larger in the second, when an image is reduced.
FORWARD = Config(tile_y=32, tile_x=16, step_y=64, step_x=32, warps=4)
BACKWARD = Config(tile_y=32, tile_x=32, step_y=16, step_x=16, warps=4)


@triton.jit
def resize_normalize_kernel(
    source_ptr,
    left_ptr,  # [rows of the result, rows of the source], zero padded to whole tiles and steps, like right
    right_ptr,  # [columns of the source, columns of the result]
    left_blocks_ptr,  # for each tile of rows: the first step that is not all zero, and one past the last
    right_blocks_ptr,
    constants_ptr,  # low, high, 1 / (high - low), then C times mean, then C times 1 / std
    image_ptr,
    out_ptr,
    source_height,
    source_width,
    height,
    width,
    left_width,
    right_width,
    BACKWARD: tl.constexpr,
    CLAMP: tl.constexpr,  # backward: no gradient where the image was clamped
    PLANES: tl.constexpr,  # planes of an image; PLANES * LANES is its number of channels
    LANES: tl.constexpr,  # channels in a plane
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    STEP_Y: tl.constexpr,
    STEP_X: tl.constexpr,
):
    """One tile of one plane. Grid: (tiles of a plane, planes)."""
    across = tl.cdiv(width, TILE_X)
    tile_y, tile_x = tl.program_id(0) // across, tl.program_id(0) % across
    plane = tl.program_id(1)
    rows = tile_y * TILE_Y + tl.arange(0, TILE_Y)
    columns = tile_x * TILE_X + tl.arange(0, TILE_X)
    source_ptr += plane.to(tl.int64) * source_height * source_width
    low, high, inverse_range = tl.load(constants_ptr), tl.load(constants_ptr + 1), tl.load(constants_ptr + 2)

    result = tl.zeros((TILE_Y, TILE_X), ACC)
    for block_y in range(tl.load(left_blocks_ptr + 2 * tile_y), tl.load(left_blocks_ptr + 2 * tile_y + 1)):
        source_rows = block_y * STEP_Y + tl.arange(0, STEP_Y)
        partial = tl.zeros((STEP_Y, TILE_X), ACC)
        for block_x in range(tl.load(right_blocks_ptr + 2 * tile_x), tl.load(right_blocks_ptr + 2 * tile_x + 1)):
            source_columns = block_x * STEP_X + tl.arange(0, STEP_X)
            inside = (source_rows < source_height)[:, None] & (source_columns < source_width)[None, :]
            offsets = source_rows[:, None] * source_width + source_columns[None, :]
            pixels = tl.load(source_ptr + offsets, mask=inside, other=0.0).to(ACC)
            if not BACKWARD:
                nan: tl.constexpr = tl.PropagateNan.ALL
                pixels = tl.minimum(tl.maximum(pixels, low, propagate_nan=nan), high, propagate_nan=nan)
                pixels = (pixels - low) * inverse_range
            right = tl.load(right_ptr + source_columns[:, None] * right_width + columns[None, :])
            partial = tl.dot(pixels, right, partial, input_precision=PRECISION, out_dtype=ACC)
        left = tl.load(left_ptr + rows[:, None] * left_width + source_rows[None, :])
        result = tl.dot(left, partial, result, input_precision=PRECISION, out_dtype=ACC)

    inside = (rows < height)[:, None] & (columns < width)[None, :]
    offsets = plane.to(tl.int64) * height * width + rows[:, None] * width + columns[None, :]
    channel = plane % PLANES * LANES + columns % LANES
    inverse_std = tl.load(constants_ptr + 3 + PLANES * LANES + channel)[None, :]
    if BACKWARD:
        result *= inverse_std * inverse_range
        if CLAMP:
            image = tl.load(image_ptr + offsets, mask=inside, other=0.0).to(ACC)
            result = tl.where((image >= low) & (image <= high), result, 0.0)
    else:
        result = (result - tl.load(constants_ptr + 3 + channel)[None, :]) * inverse_std
    tl.store(out_ptr + offsets, result.to(out_ptr.dtype.element_ty), mask=inside)


@lru_cache(maxsize=64)
def axis(
    length: int,
    resized: int,
    start: int,
    size: int,
    antialias: bool,
    lanes: int,
    backward: bool,
    left: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """The matrix of one axis and its blocks that are not zero, as the kernel takes them.

    `length` samples are resized to `resized`, of which `size` are kept from `start` on. The coefficients are torch's
    own: what it makes of unit vectors in float64. The cache leaves a training step none to compute.
    """
    config = BACKWARD if backward else FORWARD
    step, tile = (config.step_y, config.tile_y) if left else (config.step_x, config.tile_x)
    units = torch.eye(length, dtype=torch.float64, device="cpu")[:, None, None]
    matrix = functional.interpolate(units, size=(1, resized), mode="bicubic", antialias=antialias)
    matrix = torch.kron(matrix[:, 0, 0, start : start + size], torch.eye(lanes, dtype=torch.float64, device="cpu"))
    matrix = matrix.T if backward else matrix  # [source, result]
    matrix = functional.pad(matrix, (0, -matrix.shape[1] % tile, 0, -matrix.shape[0] % step))
    used = matrix.ne(0).unflatten(1, (-1, tile)).any(2).unflatten(0, (-1, step)).any(1)  # [steps, tiles]
    index = torch.arange(1, len(used) + 1, device="cpu")[:, None]
    end = (used * index).amax(0)  # 0 for a tile that uses nothing: no steps
    first = torch.where(used, index - 1, end).amin(0)
    blocks = torch.stack([first, end], dim=1).to(device, torch.int32)
    return (matrix.T if left else matrix).contiguous().to(device, dtype), blocks


@lru_cache(maxsize=64)
def constants(
    mean: tuple[float, ...],
    std: tuple[float, ...],
    value_range: tuple[float, float],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Every number the kernel needs, in the dtype it computes in (a float argument would be fp32)."""
    low, high = value_range
    values = [low, high, 1 / (high - low), *mean, *(1 / deviation for deviation in std)]
    return torch.tensor(values, dtype=torch.float64, device="cpu").to(device, dtype)


def forward(
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
    shape = [*image.shape[:2], size, size]
    table = constants(tuple(mean), tuple(std), (value_range[0], value_range[1]), _dtype(image), image.device)
    return _launch(
        image, image, table, shape, list(image.shape[2:]), resized, crop, size, antialias, channels_last, False
    )


def backward(
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
    mean = (0.0,) * len(std)
    table = constants(mean, tuple(std), (value_range[0], value_range[1]), _dtype(gradient), gradient.device)
    return _launch(gradient, image, table, shape, shape[2:], resized, crop, size, antialias, channels_last, True)


def precision(dtype: torch.dtype) -> str:
    """Of products: on tensor cores, exact to about 2^-21, where the result has 11 bits or fewer."""
    return "tf32x3" if dtype.itemsize == 2 else "ieee"


def _dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _launch(
    source: Tensor,
    image: Tensor | None,
    table: Tensor,
    shape: list[int],  # of the result
    original: list[int],  # [height, width] before the resize
    resized: list[int],
    crop: list[int],
    size: int,
    antialias: bool,
    channels_last: bool,
    backward: bool,
) -> Tensor:
    batch, channels, height, width = shape
    if channels_last:
        out = source.new_empty(batch, height, width, channels).permute(0, 3, 1, 2)
    else:
        out = source.new_empty(shape)
    if not out.numel():
        return out
    layout = torch.channels_last if channels_last else torch.contiguous_format
    source = source.contiguous(memory_format=layout)
    planes, lanes = (1, channels) if channels_last else (channels, 1)
    config = BACKWARD if backward else FORWARD
    left, right = (
        axis(
            original[dim],
            resized[dim],
            crop[dim],
            size,
            antialias,
            lanes if dim else 1,
            backward,
            dim == 0,
            table.dtype,
            source.device,
        )
        for dim in (0, 1)
    )
    tiles = triton.cdiv(height, config.tile_y) * triton.cdiv(width * lanes, config.tile_x)
    with device_guard(source):
        resize_normalize_kernel[(tiles, batch * planes)](
            source,
            left[0],
            right[0],
            left[1],
            right[1],
            table,
            source if image is None else image.contiguous(memory_format=layout),
            out,
            source.shape[2],
            source.shape[3] * lanes,
            height,
            width * lanes,
            left[0].shape[1],
            right[0].shape[1],
            BACKWARD=backward,
            CLAMP=image is not None,
            PLANES=planes,
            LANES=lanes,
            ACC=accumulator(source),
            PRECISION=precision(source.dtype),
            TILE_Y=config.tile_y,
            TILE_X=config.tile_x,
            STEP_Y=config.step_y,
            STEP_X=config.step_x,
            num_warps=config.warps,
        )
    return out
