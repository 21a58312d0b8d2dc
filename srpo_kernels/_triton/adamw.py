"""Triton kernels of `srpo_kernels.optim.AdamW`: the operators of csrc/ for GPUs without the compiled extension.

The bits are those of `srpo_kernels.optim.reference`, so nothing may be fused: kernels are launched with
``enable_fp_fusion=False``, and divisions and roots are rounded. One launch takes all tensors that are accessed alike.
Programs take units of 1024 slots from its table.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from srpo_kernels._triton._adamw_math import (
    BINS,
    SECOND_STREAM,
    WEIGHT_STREAM,
    add_term,
    add_terms,
    advance,
    bits_of,
    block_fields,
    decode_e4m3,
    decode_root,
    draw,
    encode_e4m3,
    encode_root,
    fold,
    nearest16,
    nonfinite,
    of_bits,
    power_of_field,
    round_down_bits,
    spread,
)
from srpo_kernels._triton._adamw_tables import (
    AVERAGE,
    COLUMNS,
    EVERY,
    FIRST,
    FIRST_SCALE,
    GRADIENT,
    INDEX,
    REMAINDER,
    ROWS,
    SECOND,
    SECOND_SCALE,
    START,
    UNIT,
    WEIGHT,
    WORDS,
    first_entry,
    log2_width,
    pointer,
    remain,
    scale_slots,
    slots,
    tables_of,
    units,
)
from srpo_kernels._triton._common import device_guard

__all__ = [
    "OPTIONS",
    "SQUARES_OPTIONS",
    "adamw_scalars",
    "adamw_step",
    "squares_kernel",
    "step_kernel",
    "sums_of_squares",
]

#: Of a launch of `step_kernel`, by whether matrices are wide: at four elements a thread, half of all threads of a
#: multiprocessor find registers.
OPTIONS: dict[bool, dict[str, Any]] = {
    True: dict(num_warps=8, maxnreg=64, enable_fp_fusion=False),
    False: dict(num_warps=16, enable_fp_fusion=False),
}
#: Of a launch of `squares_kernel`.
SQUARES_OPTIONS: dict[str, Any] = dict(num_warps=4, enable_fp_fusion=False)
#: Programs of a launch for each multiprocessor: as many as it holds, which is half of its threads.
_PROGRAMS, _SQUARES_PROGRAMS = 4, 8


@triton.jit
def _load_half(pointer, mask):
    """bf16 as fp32."""
    return of_bits(tl.load(pointer, mask=mask, other=0).to(tl.int32) << 16)


@triton.jit
def _load_gradient(pointer, mask):
    if pointer.dtype.element_ty == tl.int16:  # bf16
        return _load_half(pointer, mask)
    else:
        return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _add_squares(bins, x, log2, OFFSET: tl.constexpr, WIDE: tl.constexpr):
    """`bins` with the sums of squares of the rows of a unit."""
    if WIDE:
        return add_term(bins, tl.sum(x * x, 0), OFFSET)
    else:
        return add_terms(bins, fold(x * x, log2, 10, False), (tl.arange(0, UNIT) & ((1 << log2) - 1)) == 0, OFFSET)


# --- kernels -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["seed"])
def step_kernel(
    table_ptr,
    scalars_ptr,
    steps_ptr,
    coefficient_ptr,
    finite_ptr,
    sums_ptr,
    seed: tl.int64,
    average_rate,
    WEIGHTS: tl.constexpr,
    MOMENTS: tl.constexpr,
    KIND: tl.constexpr,  # type of gradients, int16 standing for bf16
    AVERAGES: tl.constexpr,
    WIDE: tl.constexpr,  # rows of over 512 elements, a multiple of 16, that begin at multiples of 16 bytes
    CONVERTS: tl.constexpr,  # the processor converts e4m3
):
    """One step of a table's tensors. Grid: (programs,), each with units that follow one another."""
    exact: tl.constexpr = MOMENTS == "FP32"
    codes: tl.constexpr = MOMENTS == "M3" or MOMENTS == "M2"
    roots: tl.constexpr = MOMENTS == "M2"
    WEIGHT_TYPE: tl.constexpr = tl.float32 if WEIGHTS == "FP32" else tl.int16
    REST_TYPE: tl.constexpr = tl.int16 if WEIGHTS == "SPLIT32" else tl.int8
    FIRST_TYPE: tl.constexpr = tl.float32 if exact else tl.uint8 if codes else tl.int16
    SECOND_TYPE: tl.constexpr = tl.float32 if exact else tl.uint8 if roots else tl.int16
    finite = tl.load(finite_ptr).to(tl.int32) != 0
    bins = tl.zeros((2 * BINS,), tl.int64)
    changed = tl.zeros((UNIT // 4,), tl.int32)
    entry_ptr = first_entry(table_ptr)
    while remain(table_ptr, entry_ptr):
        here, stop = units(table_ptr, entry_ptr)
        rows = tl.load(entry_ptr + ROWS).to(tl.int32)
        columns = tl.load(entry_ptr + COLUMNS).to(tl.int32)
        if WIDE:
            columns = tl.multiple_of(columns, 16)
        step = tl.load(steps_ptr + tl.load(entry_ptr + INDEX)).to(tl.int32)
        averaging = finite & (step % tl.load(table_ptr + EVERY).to(tl.int32) == 0)
        log2 = log2_width(columns, WIDE)
        across = tl.cdiv(columns, UNIT)
        row = (here // across) << (10 - log2)
        column = (here % across) * UNIT
        origin = row.to(tl.int64) * columns + column
        scales = row * tl.cdiv(columns, 128) + column // 128
        for _ in range(here, stop):
            left = columns - column
            place, valid, written = slots(rows - row, columns, left, finite, WIDE)
            scale_from, scale_loaded, scale_to, scale_stored = scale_slots(columns, left, valid, WIDE)

            gradient_ptr = pointer(entry_ptr, GRADIENT, KIND, origin, WIDE)
            weight_ptr = pointer(entry_ptr, WEIGHT, WEIGHT_TYPE, origin, WIDE)
            if WEIGHTS == "SPLIT32" or WEIGHTS == "SPLIT24":
                remainder_ptr = pointer(entry_ptr, REMAINDER, REST_TYPE, origin, WIDE)
            first_ptr = pointer(entry_ptr, FIRST, FIRST_TYPE, origin, WIDE)
            second_ptr = pointer(entry_ptr, SECOND, SECOND_TYPE, origin, WIDE)
            gradient = _load_gradient(gradient_ptr + place, valid)
            if WEIGHTS == "FP32":
                weight = tl.load(weight_ptr + place, mask=valid, other=0.0)
            else:
                weight = _load_half(weight_ptr + place, valid)
            if WEIGHTS == "SPLIT32" or WEIGHTS == "SPLIT24":
                rest = tl.load(remainder_ptr + place, mask=valid, other=0).to(tl.int32)
                weight = of_bits(bits_of(weight) + (rest if WEIGHTS == "SPLIT32" else rest << 8))
            if exact:
                first = tl.load(first_ptr + place, mask=valid, other=0.0)
                second = tl.load(second_ptr + place, mask=valid, other=0.0)
            else:
                if codes:
                    first = decode_e4m3(tl.load(first_ptr + place, mask=valid, other=0), CONVERTS)
                    first_scale_ptr = pointer(entry_ptr, FIRST_SCALE, tl.float32, scales, False)
                    scale = tl.load(first_scale_ptr + scale_from, mask=scale_loaded, other=0.0)
                    first *= spread(scale, 4) if WIDE else scale
                else:
                    first = _load_half(first_ptr + place, valid)
                if roots:
                    second = tl.load(second_ptr + place, mask=valid, other=0)
                    second_scale_ptr = pointer(entry_ptr, SECOND_SCALE, tl.float32, scales, False)
                    scale = tl.load(second_scale_ptr + scale_from, mask=scale_loaded, other=0.0)
                    second = decode_root(second.to(tl.float32)) * (spread(scale, 4) if WIDE else scale)
                else:
                    second = _load_half(second_ptr + place, valid)

            index = tl.load(entry_ptr + INDEX)
            coefficient = tl.load(coefficient_ptr)
            first, second, update = advance(gradient, coefficient, weight, first, second, scalars_ptr + index * 7)
            # Without an update, what is stored stays: no bit of it needs rounding.
            update = tl.where(written, update, 0.0)
            new = weight - update
            if AVERAGES:  # noqa: SIM102 - known when compiling
                if averaging:
                    average_ptr = pointer(entry_ptr, AVERAGE, tl.float32, origin, WIDE)
                    average = tl.load(average_ptr + place, mask=valid, other=0.0)
                    tl.store(average_ptr + place, average + (new - average) * average_rate, mask=valid)

            if WEIGHTS == "FP32":
                tl.store(weight_ptr + place, new, mask=written)
            else:
                bits = bits_of(new)
                if WEIGHTS != "SPLIT32":
                    random = draw(tl.load(entry_ptr + START) + origin, place, step, seed, WEIGHT_STREAM, WIDE)
                    bits = round_down_bits(bits, random, 8 if WEIGHTS == "SPLIT24" else 16)
                    new = of_bits(bits)
                upper = ((bits + 0x8000) >> 16).to(tl.int16)
                tl.store(weight_ptr + place, upper, mask=written)
                if WEIGHTS == "SPLIT32":
                    tl.store(remainder_ptr + place, bits.to(tl.int16), mask=written)
                if WEIGHTS == "SPLIT24":
                    tl.store(remainder_ptr + place, (bits >> 8).to(tl.int8), mask=written)
                before = ((bits_of(weight) + 0x8000) >> 16).to(tl.int16)
                changes = (upper != before).to(tl.int32)
                changed += tl.sum(tl.reshape(changes, (UNIT // 4, 4)), 1)
            bins = _add_squares(bins, update, log2, 0, WIDE)
            bins = _add_squares(bins, new, log2, BINS, WIDE)

            if finite:
                first_ptr = pointer(entry_ptr, FIRST, FIRST_TYPE, origin, WIDE)
                second_ptr = pointer(entry_ptr, SECOND, SECOND_TYPE, origin, WIDE)
                if exact:
                    tl.store(first_ptr + place, first, mask=valid)
                    tl.store(second_ptr + place, second, mask=valid)
                else:
                    if codes:
                        field = block_fields(first, log2, WIDE)
                        power = power_of_field(262 - field)
                        code = encode_e4m3(first * (spread(power, 128) if WIDE else power), CONVERTS)
                        tl.store(first_ptr + place, code, mask=valid)
                        first_scale_ptr = pointer(entry_ptr, FIRST_SCALE, tl.float32, scales, False)
                        tl.store(first_scale_ptr + scale_to, power_of_field(field - 8), mask=scale_stored)
                    else:
                        tl.store(first_ptr + place, nearest16(first), mask=valid)
                    random = draw(tl.load(entry_ptr + START) + origin, place, step, seed, SECOND_STREAM, WIDE)
                    if roots:
                        field = block_fields(second, log2, WIDE)
                        power = power_of_field(254 - field)
                        code = encode_root(second * (spread(power, 128) if WIDE else power), random)
                        tl.store(second_ptr + place, code, mask=valid)
                        second_scale_ptr = pointer(entry_ptr, SECOND_SCALE, tl.float32, scales, False)
                        tl.store(second_scale_ptr + scale_to, power_of_field(field), mask=scale_stored)
                    else:
                        bits = round_down_bits(bits_of(second), random, 16)
                        tl.store(second_ptr + place, (bits >> 16).to(tl.int16), mask=valid)

            taken = tl.minimum(left, UNIT)
            origin += taken << (10 - log2)
            scales += tl.cdiv(taken, 128) << (10 - log2)
            column = tl.where(left > UNIT, column + UNIT, 0)
            row += tl.where(left > UNIT, 0, 1) << (10 - log2)
        entry_ptr += WORDS
    tl.atomic_add(sums_ptr + tl.arange(0, 2 * BINS), bins, mask=bins != 0, sem="relaxed")
    if WEIGHTS != "FP32":
        tl.atomic_add(sums_ptr + 2 * BINS, tl.sum(changed, 0).to(tl.int64), sem="relaxed")


@triton.jit
def _squares(entry_ptr, number, stop, rows, columns, beyond, KIND: tl.constexpr, WIDE: tl.constexpr):
    """Squares of a unit's gradients, zero from unit `stop` on; and how many are not finite, added to `beyond`."""
    log2 = log2_width(columns, WIDE)
    across = tl.cdiv(columns, UNIT)
    row = (number // across) << (10 - log2)
    column = (number % across) * UNIT
    place, valid, _ = slots(rows - row, columns, tl.where(number < stop, columns - column, 0), True, WIDE)
    gradient_ptr = pointer(entry_ptr, GRADIENT, KIND, row.to(tl.int64) * columns + column, WIDE)
    gradient = _load_gradient(gradient_ptr + place, valid)
    beyond += tl.sum(tl.reshape(nonfinite(gradient), (UNIT // 8, 8)), 1)
    return gradient * gradient, beyond


@triton.jit
def squares_kernel(table_ptr, sums_ptr, KIND: tl.constexpr, WIDE: tl.constexpr):
    """Exact sums of squares of a table's gradients. Grid: (programs,), each with units that follow one another."""
    bins = tl.zeros((BINS,), tl.int64)
    lost = tl.program_id(0) * 0
    beyond = tl.zeros((UNIT // 8,), tl.int32)
    entry_ptr = first_entry(table_ptr)
    while remain(table_ptr, entry_ptr):
        here, stop = units(table_ptr, entry_ptr)
        rows = tl.load(entry_ptr + ROWS).to(tl.int32)
        columns = tl.load(entry_ptr + COLUMNS).to(tl.int32)
        if WIDE:  # four units at once, so that enough loads are under way
            columns = tl.multiple_of(columns, 16)
            for number in range(here, stop, 4):
                a, beyond = _squares(entry_ptr, number, stop, rows, columns, beyond, KIND, WIDE)
                b, beyond = _squares(entry_ptr, number + 1, stop, rows, columns, beyond, KIND, WIDE)
                c, beyond = _squares(entry_ptr, number + 2, stop, rows, columns, beyond, KIND, WIDE)
                d, beyond = _squares(entry_ptr, number + 3, stop, rows, columns, beyond, KIND, WIDE)
                sums = tl.join(tl.join(a, b), tl.join(c, d))
                for level in tl.static_range(10):
                    sums = tl.sum(tl.reshape(sums, (UNIT >> (level + 1), 2, 2, 2)), 1)
                sums = tl.reshape(sums, (4,))
                bins = add_term(bins, sums, 0)
                lost += tl.sum(nonfinite(sums), 0)
        else:
            log2 = log2_width(columns, WIDE)
            leads = (tl.arange(0, UNIT) & ((1 << log2) - 1)) == 0
            for number in range(here, stop):
                squares, beyond = _squares(entry_ptr, number, stop, rows, columns, beyond, KIND, WIDE)
                sums = fold(squares, log2, 10, False)
                bins = add_terms(bins, sums, leads, 0)
                lost += tl.sum(tl.where(leads, nonfinite(sums), 0), 0)
        entry_ptr += WORDS
    tl.atomic_add(sums_ptr + tl.arange(0, BINS), bins, mask=bins != 0, sem="relaxed")
    tl.atomic_add(sums_ptr + BINS, lost.to(tl.int64), sem="relaxed")
    tl.atomic_add(sums_ptr + BINS + 1, tl.sum(beyond, 0).to(tl.int64), sem="relaxed")


@triton.jit
def _double(bits):
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def _power_of(base, exponent):
    """`base` to the power `exponent`, below 2^24, in double, by squaring."""
    power = base * 0.0 + 1.0
    for bit in tl.static_range(24):
        power = tl.where(((exponent >> bit) & 1) == 1, power * base, power)
        base = base * base
    return power


@triton.jit(do_not_specialize=["beta1", "beta2", "eps", "weight_decay"])
def scalars_kernel(steps_ptr, lr_ptr, out_ptr, beta1: tl.int64, beta2: tl.int64, eps: tl.int64, weight_decay: tl.int64):
    """`srpo_kernels.optim.reference.scalars` of a parameter. Grid: (parameters,). Integers are the bits of doubles."""
    beta1, beta2 = _double(beta1), _double(beta2)
    step = tl.load(steps_ptr + tl.program_id(0))
    lr = tl.load(lr_ptr)
    out_ptr += tl.program_id(0) * 7
    tl.store(out_ptr, (lr / (1.0 - _power_of(beta1, step))).to(tl.float32))
    tl.store(out_ptr + 1, (lr * _double(weight_decay)).to(tl.float32))
    tl.store(out_ptr + 2, _double(eps).to(tl.float32))
    tl.store(out_ptr + 3, (1.0 - beta1).to(tl.float32))
    tl.store(out_ptr + 4, beta2.to(tl.float32))
    tl.store(out_ptr + 5, (1.0 - beta2).to(tl.float32))
    tl.store(out_ptr + 6, (1.0 / tl.sqrt(1.0 - _power_of(beta2, step))).to(tl.float32))


# --- operators ---------------------------------------------------------------------------------
# As srpo_kernels.extension declares them.


def adamw_scalars(steps: Tensor, lr: Tensor, beta1: float, beta2: float, eps: float, weight_decay: float) -> Tensor:
    out = steps.new_empty((steps.numel(), 7), dtype=torch.float32)
    # A float argument of a kernel would be fp32 in the interpreter.
    numbers = struct.unpack("<4q", struct.pack("<4d", beta1, beta2, eps, weight_decay))
    if steps.numel():
        with device_guard(steps):
            scalars_kernel[(steps.numel(),)](steps, lr, out, *numbers, num_warps=1, enable_fp_fusion=False)
    return out


def sums_of_squares(gradients: list[Tensor]) -> Tensor:
    sums = gradients[0].new_zeros(BINS.value + 2, dtype=torch.int64)
    with device_guard(sums):
        for table in tables_of(gradients, (), [0] * len(gradients), 1, _SQUARES_PROGRAMS):
            squares_kernel[(table.programs,)](table.entries, sums, **table.types(), **SQUARES_OPTIONS)
    return sums


def adamw_step(
    weights: list[Tensor],
    remainders: list[Tensor],
    first: list[Tensor],
    first_scales: list[Tensor],
    second: list[Tensor],
    second_scales: list[Tensor],
    averages: list[Tensor],
    gradients: list[Tensor],
    scalars: Tensor,
    steps: Tensor,
    coefficient: Tensor,
    finite: Tensor,
    starts: Sequence[int],
    seed: int,
    ema_decay: float,
    ema_every: int,
    weights_mode: str,
    moments_mode: str,
) -> Tensor:
    sums = weights[0].new_zeros(2 * BINS.value + 1, dtype=torch.int64)
    stored = weights, remainders, first, first_scales, second, second_scales, averages
    with device_guard(sums):
        for table in tables_of(gradients, stored, starts, ema_every, _PROGRAMS):
            step_kernel[(table.programs,)](
                table.entries,
                scalars,
                steps,
                coefficient,
                finite,
                sums,
                seed,
                1 - ema_decay,
                WEIGHTS=weights_mode.upper(),
                MOMENTS=moments_mode.upper(),
                AVERAGES=bool(averages),
                CONVERTS=sums.is_cuda and torch.cuda.get_device_capability(sums.device) >= (8, 9),
                **table.types(),
                **OPTIONS[table.wide],
            )
    return sums
