"""Triton kernels of `srpo_kernels.ops.qk_norm_rope` and `srpo_kernels.ops.joint_qk_norm_rope`.

A row is one head of one token. Programs take tiles of rows, counted token by token and head by head: the first ones of
the text stream, the others of the image stream. Without a text stream, q and k are the image's. A thread holds 16
bytes of a row, so that the rotation stays in its registers and a row's sum in its warp.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from srpo_kernels._triton._common import accumulator, device_guard
from srpo_kernels._triton._partials import rows_per_program, sum_partials
from srpo_kernels.ops.qk_norm_rope import weight_dtype


@triton.jit
def _rows(tile, length, batch, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """Of a tile's rows, each [ROWS, 1]: number, whether it exists, image, position in its stream, head."""
    row = tile * ROWS + tl.arange(0, ROWS)[:, None]
    token = row // HEADS
    image, position = (token // length).to(tl.int64), (token % length).to(tl.int64)
    return row.to(tl.int64), token < batch * length, image, position, row % HEADS


@triton.jit
def _offset(image, position, head, strides):
    return image * strides[0] + position * strides[1] + head.to(tl.int64) * strides[2]


@triton.jit
def _turn(x, minus):
    """(x0, x1) -> (x1, -x0) for every pair of neighbours.

    `minus` is -1 in an argument: LLVM, which pairs instructions for Blackwell, makes of a negation both a sum and a
    difference of all elements, and throws away half of each.
    """
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    one = tl.full(even.shape, 1, x.dtype)
    return tl.reshape(tl.join(odd, even), x.shape) * tl.reshape(tl.join(one, one * tl.cast(minus, x.dtype)), x.shape)


@triton.jit
def _rstd(x, eps, WIDTH: tl.constexpr):
    """One over the root mean square of every row."""
    return tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / WIDTH + tl.cast(eps, x.dtype))


@triton.jit
def _forward_rows(x, weight_ptr, cos, sin, out_ptr, columns, mask, minus, eps, WIDTH: tl.constexpr):
    weight = tl.load(weight_ptr + columns, mask=columns < WIDTH, other=0.0).to(cos.dtype)
    x = x.to(cos.dtype)
    y = x * _rstd(x, eps, WIDTH) * weight
    out = y * cos - _turn(y, minus) * sin
    tl.store(out_ptr, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _forward_tile(
    tile,
    ptrs,
    weights,
    strides,
    length,  # tokens of the stream
    start,  # where they begin in the whole sequence
    total,  # and how long that is
    batch,
    cos_ptr,
    sin_ptr,
    outs,
    minus,
    eps,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # As wide as the tile, so that weights are loaded in its layout: [1, BLOCK] would pass through shared memory.
    columns = tl.broadcast_to(tl.arange(0, BLOCK)[None, :], (ROWS, BLOCK))
    _, exists, image, position, head = _rows(tile, length, batch, HEADS, ROWS)
    mask = exists & (columns < WIDTH)
    source = _offset(image, position, head, strides) + columns
    position += start
    target = ((image * total + position) * HEADS + head) * WIDTH + columns
    angle = position * WIDTH + columns
    q = tl.load(ptrs[0] + source, mask=mask, other=0.0)
    k = tl.load(ptrs[1] + source, mask=mask, other=0.0)
    cos = tl.load(cos_ptr + angle, mask=mask, other=0.0).to(ACC)
    sin = tl.load(sin_ptr + angle, mask=mask, other=0.0).to(ACC)
    if ptrs[2] is not None:
        v = tl.load(ptrs[2] + source, mask=mask, other=0.0)
        tl.store(outs[2] + target, v.to(outs[2].dtype.element_ty), mask=mask)
    _forward_rows(q, weights[0], cos, sin, outs[0] + target, columns, mask, minus, eps, WIDTH)
    _forward_rows(k, weights[1], cos, sin, outs[1] + target, columns, mask, minus, eps, WIDTH)


@triton.jit
def qk_norm_rope_kernel(
    text_q_ptr,  # None, with all of text: there is none
    text_k_ptr,
    text_v_ptr,
    text_q_weight_ptr,
    text_k_weight_ptr,
    text_batch_stride,
    text_token_stride,
    text_head_stride,
    image_q_ptr,
    image_k_ptr,
    image_v_ptr,  # None: q and k only
    image_q_weight_ptr,
    image_k_weight_ptr,
    image_batch_stride,
    image_token_stride,
    image_head_stride,
    cos_ptr,
    sin_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    batch,
    text_length,
    image_length,
    minus: tl.float64,
    eps: tl.float64,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (tiles of text + tiles of image,)."""
    tile = tl.program_id(0)
    tiles = tl.cdiv(batch * text_length * HEADS, ROWS)
    total = text_length + image_length
    outs = (q_ptr, k_ptr, v_ptr)
    if tile >= tiles:
        ptrs = (image_q_ptr, image_k_ptr, image_v_ptr)
        weights = (image_q_weight_ptr, image_k_weight_ptr)
        strides = (image_batch_stride, image_token_stride, image_head_stride)
        _forward_tile(
            tile - tiles, ptrs, weights, strides, image_length, text_length, total, batch,
            cos_ptr, sin_ptr, outs, minus, eps, HEADS, WIDTH, ACC, ROWS, BLOCK,
        )  # fmt: skip
    elif text_q_ptr is not None:
        ptrs = (text_q_ptr, text_k_ptr, text_v_ptr)
        weights = (text_q_weight_ptr, text_k_weight_ptr)
        strides = (text_batch_stride, text_token_stride, text_head_stride)
        _forward_tile(
            tile, ptrs, weights, strides, text_length, 0, total, batch,
            cos_ptr, sin_ptr, outs, minus, eps, HEADS, WIDTH, ACC, ROWS, BLOCK,
        )  # fmt: skip


@triton.jit
def _backward_tiles(
    program,
    ptrs,
    weights,
    strides,
    outs,  # None: not wanted
    length,
    start,
    batch,
    douts,
    dout_strides,
    cos_ptr,
    sin_ptr,
    partials_ptr,  # None: not wanted
    tiles,  # that a program walks
    minus,
    eps,
    GROUP: tl.constexpr,  # of partial sums: this stream's q
    GROUPS: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """q, then k: sums for both at once would leave registers for a quarter of an SM's warps, not half. v is copied."""
    column = tl.arange(0, BLOCK)
    columns = tl.broadcast_to(column[None, :], (ROWS, BLOCK))
    first = program * tiles
    last = min(first + tiles, tl.cdiv(batch * length * HEADS, ROWS))
    for index in tl.static_range(2):
        weight = tl.load(weights[index] + columns, mask=columns < WIDTH, other=0.0).to(ACC)
        sums = tl.zeros((ROWS, BLOCK), ACC)
        for tile in range(first, last):
            row, exists, image, position, head = _rows(tile, length, batch, HEADS, ROWS)
            mask = exists & (columns < WIDTH)
            source = _offset(image, position, head, strides) + columns
            x = tl.load(ptrs[index] + source, mask=mask, other=0.0).to(ACC)
            position += start
            source = _offset(image, position, head, dout_strides) + columns
            dout = tl.load(douts[index] + source, mask=mask, other=0.0).to(ACC)
            angle = position * WIDTH + columns
            cos = tl.load(cos_ptr + angle, mask=mask, other=0.0).to(ACC)
            sin = tl.load(sin_ptr + angle, mask=mask, other=0.0).to(ACC)
            rstd = _rstd(x, eps, WIDTH)
            unit = x * rstd
            dy = dout * cos + _turn(dout * sin, minus)
            sums += dy * unit
            if outs[index] is not None:
                dunit = dy * weight
                dx = (dunit - unit * (tl.sum(dunit * unit, 1, keep_dims=True) / WIDTH)) * rstd
                target = outs[index] + row * WIDTH + columns
                tl.store(target, dx.to(target.dtype.element_ty), mask=mask)
        if partials_ptr is not None:
            partial = partials_ptr + tl.program_id(0) * WIDTH + column
            size = tl.num_programs(0) * WIDTH
            tl.store(partial + (GROUP + index) * size, tl.sum(sums, 0), mask=column < WIDTH)
            if GROUPS == 4:  # nothing for the other stream
                tl.store(partial + (GROUP + 2 + index) % 4 * size, tl.zeros((BLOCK,), ACC), mask=column < WIDTH)
    if outs[2] is not None:
        for tile in range(first, last):
            row, exists, image, position, head = _rows(tile, length, batch, HEADS, ROWS)
            mask = exists & (columns < WIDTH)
            source = _offset(image, position + start, head, dout_strides) + columns
            tl.store(outs[2] + row * WIDTH + columns, tl.load(douts[2] + source, mask=mask), mask=mask)


@triton.jit
def qk_norm_rope_backward_kernel(
    text_q_ptr,  # None, with all of text: there is none
    text_k_ptr,
    text_q_weight_ptr,
    text_k_weight_ptr,
    text_batch_stride,
    text_token_stride,
    text_head_stride,
    text_dq_ptr,  # None, like those below: not wanted
    text_dk_ptr,
    text_dv_ptr,
    image_q_ptr,
    image_k_ptr,
    image_q_weight_ptr,
    image_k_weight_ptr,
    image_batch_stride,
    image_token_stride,
    image_head_stride,
    image_dq_ptr,
    image_dk_ptr,
    image_dv_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    batch_stride,
    token_stride,
    head_stride,
    cos_ptr,
    sin_ptr,
    partials_ptr,
    batch,
    text_length,
    image_length,
    tiles,
    minus: tl.float64,
    eps: tl.float64,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (programs of text + programs of image,)."""
    program = tl.program_id(0)
    programs = tl.cdiv(tl.cdiv(batch * text_length * HEADS, ROWS), tiles)
    douts = (dq_ptr, dk_ptr, dv_ptr)
    dout_strides = (batch_stride, token_stride, head_stride)
    if program >= programs:
        ptrs = (image_q_ptr, image_k_ptr)
        weights = (image_q_weight_ptr, image_k_weight_ptr)
        strides = (image_batch_stride, image_token_stride, image_head_stride)
        outs = (image_dq_ptr, image_dk_ptr, image_dv_ptr)
        group: tl.constexpr = 0 if text_q_ptr is None else 2
        _backward_tiles(
            program - programs, ptrs, weights, strides, outs, image_length, text_length, batch, douts, dout_strides,
            cos_ptr, sin_ptr, partials_ptr, tiles, minus, eps, group, group + 2, HEADS, WIDTH, ACC, ROWS, BLOCK,
        )  # fmt: skip
    elif text_q_ptr is not None:
        ptrs = (text_q_ptr, text_k_ptr)
        weights = (text_q_weight_ptr, text_k_weight_ptr)
        strides = (text_batch_stride, text_token_stride, text_head_stride)
        outs = (text_dq_ptr, text_dk_ptr, text_dv_ptr)
        _backward_tiles(
            program, ptrs, weights, strides, outs, text_length, 0, batch, douts, dout_strides,
            cos_ptr, sin_ptr, partials_ptr, tiles, minus, eps, 0, 4, HEADS, WIDTH, ACC, ROWS, BLOCK,
        )  # fmt: skip


def forward(
    inputs: list[Tensor], values: list[Tensor], weights: list[Tensor], cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, ...]:
    batch, _, heads, width = inputs[0].shape
    lengths = [x.shape[1] for x in inputs[::2]]
    outs = [x.new_empty(batch, sum(lengths), heads, width) for x in (*inputs[:2], *values[:1])]
    tile = _tile(inputs[0], warps=4)
    tiles = sum(triton.cdiv(batch * length * heads, tile["ROWS"]) for length in lengths)
    streams: list[Any] = []
    for index in range(len(lengths)):
        pair = slice(2 * index, 2 * index + 2)
        qkv, strides = _one_layout(*inputs[pair], *values[index : index + 1])
        streams += [*qkv, *[None] * (3 - len(qkv)), *weights[pair], *strides]
    if tiles:
        with device_guard(cos):
            qk_norm_rope_kernel[(tiles,)](
                *[*[None] * 8, *streams][-16:],  # no text: None
                cos,
                sin,
                *outs,
                *[None] * (3 - len(outs)),
                batch,
                *[0, *lengths][-2:],
                -1.0,
                eps,
                HEADS=heads,
                WIDTH=width,
                ACC=accumulator(inputs[0]),
                **tile,
            )
    return *outs, *(cos.new_empty(0) for _ in range(3 - len(outs)))


def backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor | None,
    inputs: list[Tensor],
    weights: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    eps: float,
    wanted: list[bool],
    weights_wanted: bool,
) -> tuple[Tensor, ...]:
    batch, _, heads, width = inputs[0].shape
    lengths = [x.shape[1] for x in inputs[::2]]
    tile = _tile(inputs[0], warps=16 if weights_wanted else 4)
    tiles = [triton.cdiv(batch * length * heads, tile["ROWS"]) for length in lengths]
    walk = rows_per_program(sum(tiles), 1) if weights_wanted else 1
    programs = sum(triton.cdiv(count, walk) for count in tiles)
    outs = [x.new_empty(x.shape if want else 0) for x, want in zip(inputs, wanted, strict=True)]
    parts = [None] * len(lengths) if dv is None else [dv.new_empty(x.shape) for x in inputs[::2]]
    accumulate = torch.promote_types(inputs[0].dtype, torch.float32)
    partials = cos.new_empty(len(weights), programs, width, dtype=accumulate) if weights_wanted else None
    streams: list[Any] = []
    for index in range(len(lengths)):
        pair = slice(2 * index, 2 * index + 2)
        qk, strides = _one_layout(*inputs[pair])
        douts = [out if want else None for out, want in zip(outs[pair], wanted[pair], strict=True)]
        streams += [*qk, *weights[pair], *strides, *douts, parts[index]]
    upstream, strides = _one_layout(dq, dk, *([] if dv is None else [dv]))
    if programs:
        with device_guard(cos):
            qk_norm_rope_backward_kernel[(programs,)](
                *[*[None] * 10, *streams][-20:],
                *[*upstream, None][:3],
                *strides,
                cos,
                sin,
                partials,
                batch,
                *[0, *lengths][-2:],
                walk,
                -1.0,
                eps,
                HEADS=heads,
                WIDTH=width,
                ACC=accumulator(inputs[0]),
                maxnreg=64 if weights_wanted else None,  # for two programs an SM
                **tile,
            )
    outs += [cos.new_empty(0) for _ in range(4 - len(outs))]
    outs += [cos.new_empty(0) if part is None else part for part in [*parts, None][:2]]
    dtype = weight_dtype(weights)
    return *outs, cos.new_empty(0, dtype=dtype) if partials is None else sum_partials(partials, dtype)


def _tile(like: Tensor, warps: int) -> dict[str, int]:
    """A load of 16 bytes a thread."""
    block = triton.next_power_of_2(like.shape[-1])
    return {"ROWS": warps * 32 * 16 // like.element_size() // block, "BLOCK": block, "num_warps": warps}


def _one_layout(*tensors: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The tensors, or copies where they do not share strides that end in 1; and these strides, but the last."""
    strides = tensors[0].stride()
    if strides[-1] != 1 or any(tensor.stride() != strides for tensor in tensors):
        tensors = tuple(tensor.contiguous() for tensor in tensors)
    return tensors, tensors[0].stride()[:-1]
