"""Triton kernels of `srpo_kernels.ops.gated_residual_layer_norm_modulate`: a row in the registers of one program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from srpo_kernels._triton._common import accumulator, device_guard
from srpo_kernels._triton._partials import rows_per_program, sum_partials
from srpo_kernels._triton.layer_norm_modulate import normalize, row_block, through_norm

#: Widest row whose gradients and three sums one launch of backward holds in registers.
ONE_LAUNCH = 4096


def backward_options(width: int, size: int) -> dict[str, int]:
    """Of a launch of backward, for elements of up to `size` bytes.

    The three sums leave room for 4 elements a thread; two rows to come wait in shared memory, where they fit. Blocks
    have at most 1024 threads, so that wider rows get 16 elements a thread, and more registers.
    """
    block = triton.next_power_of_2(max(width, 1))
    if width <= ONE_LAUNCH:
        stages = 3 if block * size <= 2**14 else 1
        return dict(BLOCK=block, STAGES=stages, num_warps=min(max(block // 128, 1), 32), maxnreg=64)
    return dict(BLOCK=block, STAGES=1, num_warps=16, maxnreg=128)


@triton.jit
def load_two(first_ptr, second_ptr, first_place, second_place, width, BLOCK: tl.constexpr):
    """The rows at two places, as one tile if their dtypes are the same.

    Of one row in half precision, 4 elements a thread are 8 bytes. Of the tile a thread loads 16 bytes from either row,
    and gets its 4 elements of both through shared memory, where rows to come are anyway.
    """
    columns = tl.arange(0, BLOCK)
    if first_ptr.dtype == second_ptr.dtype:
        top = tl.arange(0, 2)[:, None] == 0
        places = tl.where(top, first_ptr + first_place + columns[None, :], second_ptr + second_place + columns[None, :])
        first, second = tl.split(tl.trans(tl.load(places, mask=(columns < width)[None, :], other=0.0)))
    else:
        first = tl.load(first_ptr + first_place + columns, mask=columns < width, other=0.0)
        second = tl.load(second_ptr + second_place + columns, mask=columns < width, other=0.0)
    return first, second


@triton.jit
def store_two(first_ptr, second_ptr, place, first, second, width, BLOCK: tl.constexpr):
    """The way back of `load_two`, to one place in two tensors."""
    columns = tl.arange(0, BLOCK)
    first, second = first.to(first_ptr.dtype.element_ty), second.to(second_ptr.dtype.element_ty)
    if first_ptr.dtype == second_ptr.dtype:
        top = tl.arange(0, 2)[:, None] == 0
        places = tl.where(top, first_ptr + place + columns[None, :], second_ptr + place + columns[None, :])
        tl.store(places, tl.trans(tl.join(first, second)), mask=(columns < width)[None, :])
    else:
        tl.store(first_ptr + place + columns, first, mask=columns < width)
        tl.store(second_ptr + place + columns, second, mask=columns < width)


@triton.jit
def gated_residual_layer_norm_modulate_kernel(
    residual_ptr,
    gate_ptr,
    branch_ptr,
    scale_ptr,
    shift_ptr,
    new_ptr,
    modulated_ptr,
    statistics_ptr,  # every mean, then every 1 / deviation
    tokens,
    width,
    residual_image,  # elements from an image to the next; likewise below
    residual_token,
    gate_image,
    branch_image,
    branch_token,
    scale_image,
    shift_image,
    eps: tl.float64,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (images * tokens,)."""
    row = tl.program_id(0).to(tl.int64)
    image = (tl.program_id(0) // tokens).to(tl.int64)
    token = (tl.program_id(0) % tokens).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    place = image * residual_image + token * residual_token + columns
    residual = tl.load(residual_ptr + place, mask=mask, other=0.0).to(ACC)
    gate = tl.load(gate_ptr + image * gate_image + columns, mask=mask, other=0.0).to(ACC)
    branch = tl.load(branch_ptr + image * branch_image + token * branch_token + columns, mask=mask, other=0.0).to(ACC)
    scale = tl.load(scale_ptr + image * scale_image + columns, mask=mask, other=0.0).to(ACC)
    shift = tl.load(shift_ptr + image * shift_image + columns, mask=mask, other=0.0).to(ACC)
    new = residual + gate * branch
    tl.store(new_ptr + row * width + columns, new.to(new_ptr.dtype.element_ty), mask=mask)
    unit, mean, rstd = normalize(new, mask, width, eps, ACC)
    modulated = unit * (1 + scale) + shift
    tl.store(modulated_ptr + row * width + columns, modulated.to(modulated_ptr.dtype.element_ty), mask=mask)
    tl.store(statistics_ptr + row, mean)
    tl.store(statistics_ptr + tl.num_programs(0) + row, rstd)


@triton.jit
def gated_residual_layer_norm_modulate_backward_kernel(
    dnew_ptr,  # None: the sum was not used
    dmodulated_ptr,
    residual_ptr,
    gate_ptr,
    branch_ptr,
    scale_ptr,
    statistics_ptr,
    dresidual_ptr,  # None: not wanted
    dbranch_ptr,  # None: not wanted
    partials_ptr,  # every program's sum for gate, scale and shift in turn, of those that are wanted
    images,
    tokens,
    width,
    rows,  # tokens that a program walks
    dnew_image,
    dnew_token,
    dmodulated_image,
    dmodulated_token,
    residual_image,
    residual_token,
    gate_image,
    branch_image,
    branch_token,
    scale_image,
    DGATE: tl.constexpr,
    DSCALE: tl.constexpr,
    DSHIFT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid: (images * programs of an image,)."""
    programs = tl.cdiv(tokens, rows)
    image = (tl.program_id(0) // programs).to(tl.int64)
    first = tl.program_id(0) % programs * rows
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    # Loaded one by one, for the layout that rows are brought to: 4 elements side by side.
    gate = tl.load(gate_ptr + image * gate_image + columns, mask=mask, other=0.0).to(ACC)
    scale = tl.load(scale_ptr + image * scale_image + columns, mask=mask, other=0.0).to(ACC)
    dgate = tl.zeros((BLOCK,), ACC)
    dscale = tl.zeros((BLOCK,), ACC)
    dshift = tl.zeros((BLOCK,), ACC)
    # Stages: rows to come travel to shared memory while the sums over this one wait for all warps.
    for index in tl.range(first, tl.minimum(first + rows, tokens), num_stages=STAGES):
        token = tl.cast(index, tl.int64)
        row = image * tokens + token
        place = image * residual_image + token * residual_token
        other = image * branch_image + token * branch_token
        residual, branch = load_two(residual_ptr, branch_ptr, place, other, width, BLOCK)
        residual, branch = residual.to(ACC), branch.to(ACC)
        place = image * dmodulated_image + token * dmodulated_token
        if dnew_ptr is None:
            dmodulated = tl.load(dmodulated_ptr + place + columns, mask=mask, other=0.0).to(ACC)
        else:
            other = image * dnew_image + token * dnew_token
            dmodulated, dnew = load_two(dmodulated_ptr, dnew_ptr, place, other, width, BLOCK)
            dmodulated = dmodulated.to(ACC)
        mean = tl.load(statistics_ptr + row)
        rstd = tl.load(statistics_ptr + tl.cast(images, tl.int64) * tokens + row)
        unit = (residual + gate * branch - mean) * rstd
        if DSCALE:
            dscale += dmodulated * unit
        if DSHIFT:
            dshift += dmodulated
        if DGATE or dresidual_ptr is not None or dbranch_ptr is not None:
            total = through_norm(dmodulated * (1 + scale), unit, rstd, width)
            if dnew_ptr is not None:
                total += dnew.to(ACC)
            if DGATE:
                dgate += total * branch
            place = row * width
            if dresidual_ptr is None or dbranch_ptr is None:
                if dresidual_ptr is not None:
                    dresidual = total.to(dresidual_ptr.dtype.element_ty)
                    tl.store(dresidual_ptr + place + columns, dresidual, mask=mask)
                if dbranch_ptr is not None:
                    dbranch = (gate * total).to(dbranch_ptr.dtype.element_ty)
                    tl.store(dbranch_ptr + place + columns, dbranch, mask=mask)
            else:
                store_two(dresidual_ptr, dbranch_ptr, place, total, gate * total, width, BLOCK)
    partials_ptr += tl.program_id(0).to(tl.int64) * width
    if DGATE:
        tl.store(partials_ptr + columns, dgate, mask=mask)
        partials_ptr += tl.num_programs(0).to(tl.int64) * width
    if DSCALE:
        tl.store(partials_ptr + columns, dscale, mask=mask)
        partials_ptr += tl.num_programs(0).to(tl.int64) * width
    if DSHIFT:
        tl.store(partials_ptr + columns, dshift, mask=mask)


def forward(
    residual: Tensor, gate: Tensor, branch: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    images, tokens, width = residual.shape
    acc = accumulator(residual)
    new, modulated = residual.new_empty(residual.shape), residual.new_empty(residual.shape)
    statistics = residual.new_empty(2, images, tokens, dtype=torch.float64 if acc is tl.float64 else torch.float32)
    if new.numel():
        block, warps = row_block(width)
        with device_guard(residual):
            gated_residual_layer_norm_modulate_kernel[(images * tokens,)](
                residual,
                gate,
                branch,
                scale,
                shift,
                new,
                modulated,
                statistics,
                tokens,
                width,
                *residual.stride()[:2],
                gate.stride(0),
                *branch.stride()[:2],
                scale.stride(0),
                shift.stride(0),
                eps,
                ACC=acc,
                BLOCK=block,
                num_warps=warps,
            )
    return new, modulated, statistics


def backward(
    dnew: Tensor | None,
    dmodulated: Tensor,
    residual: Tensor,
    gate: Tensor,
    branch: Tensor,
    scale: Tensor,
    statistics: Tensor,
    wanted: list[bool],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    images, tokens, width = residual.shape
    vectors = wanted[1] + sum(wanted[3:])
    rows = rows_per_program(tokens, images) if vectors else 1
    programs = triton.cdiv(tokens, rows)
    dresidual = residual.new_empty(residual.shape if wanted[0] else 0)
    dbranch = branch.new_empty(branch.shape if wanted[2] else 0)
    partials = statistics.new_empty(vectors, images * programs, width)

    def launch(dresidual: Tensor | None, dgate: bool, dbranch: Tensor | None, dscale: bool, dshift: bool) -> None:
        upstream = dnew if dgate or dresidual is not None or dbranch is not None else None  # scale and shift: unused
        with device_guard(residual):
            gated_residual_layer_norm_modulate_backward_kernel[(images * programs,)](
                upstream,
                dmodulated,
                residual,
                gate,
                branch,
                scale,
                statistics,
                dresidual,
                dbranch,
                # Sums for scale and shift come after those for gate, also when a launch of their own makes them.
                partials if dgate or not wanted[1] else partials[1:],
                images,
                tokens,
                width,
                rows,
                *((0, 0) if upstream is None else upstream.stride()[:2]),
                *dmodulated.stride()[:2],
                *residual.stride()[:2],
                gate.stride(0),
                *branch.stride()[:2],
                scale.stride(0),
                DGATE=dgate,
                DSCALE=dscale,
                DSHIFT=dshift,
                ACC=accumulator(residual),
                **backward_options(width, max(residual.element_size(), branch.element_size())),
            )

    if residual.numel():
        first = dresidual if wanted[0] else None, wanted[1], dbranch if wanted[2] else None
        if width <= ONE_LAUNCH or not (wanted[3] or wanted[4]):
            launch(*first, wanted[3], wanted[4])
        else:  # registers do not hold three sums of a row this wide
            launch(None, False, None, wanted[3], wanted[4])
            if wanted[0] or wanted[1] or wanted[2]:
                launch(*first, False, False)
    sums = sum_partials(partials.view(vectors * images, programs, width), dtype)
    return dresidual, dbranch, sums.view(vectors, images, width)
