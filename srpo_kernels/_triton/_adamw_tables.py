"""Tables that say where the tensors of a launch of `adamw` are, and how programs and slots find elements by them.

A unit is 1024 slots, as in csrc/planner.h: 1024 columns of one row, or several rows of narrower matrices, each filled
up to a power of two.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

UNIT = tl.constexpr(1024)
# A table is rows of 16 int64: a header, the items in the order of their units, and one row with the number of units.
WORDS = tl.constexpr(16)
_ITEMS, _UNITS, _EACH, EVERY = (tl.constexpr(n) for n in range(4))
_FIRST_UNIT, START, ROWS, COLUMNS, INDEX = (tl.constexpr(n) for n in range(5))
GRADIENT, WEIGHT, REMAINDER, FIRST, FIRST_SCALE, SECOND, SECOND_SCALE, AVERAGE = (tl.constexpr(n) for n in range(5, 13))


# --- where elements are ------------------------------------------------------------------------


@triton.jit
def _share(table_ptr):
    """First and last unit of this program."""
    each = tl.load(table_ptr + _EACH).to(tl.int32)
    begin = each * tl.program_id(0)
    return begin, tl.minimum(begin + each, tl.load(table_ptr + _UNITS).to(tl.int32))


@triton.jit
def first_entry(table_ptr):
    """Row of the item that this program's first unit is of."""
    begin, _ = _share(table_ptr)
    low = begin * 0
    high = tl.load(table_ptr + _ITEMS).to(tl.int32) - 1
    while low < high:
        middle = (low + high + 1) >> 1
        after = tl.load(table_ptr + (middle + 1) * WORDS + _FIRST_UNIT) > begin
        low = tl.where(after, low, middle)
        high = tl.where(after, middle - 1, high)
    return table_ptr + (low + 1) * WORDS


# Nothing but an entry's address lives from item to item, and registers are for elements.
@triton.jit
def remain(table_ptr, entry_ptr):
    """Whether this program has units of the item at `entry_ptr`, or has come to the end."""
    _, end = _share(table_ptr)
    return tl.load(entry_ptr + _FIRST_UNIT).to(tl.int32) < end


@triton.jit
def units(table_ptr, entry_ptr):
    """Those units, counted from the item's first."""
    begin, end = _share(table_ptr)
    first = tl.load(entry_ptr + _FIRST_UNIT).to(tl.int32)
    after = tl.load(entry_ptr + WORDS + _FIRST_UNIT).to(tl.int32)
    return tl.maximum(begin, first) - first, tl.minimum(end, after) - first


@triton.jit
def pointer(entry_ptr, SLOT: tl.constexpr, TYPE: tl.constexpr, origin, WIDE: tl.constexpr):
    pointer = tl.load(entry_ptr + SLOT).to(tl.pointer_type(TYPE)) + origin
    return tl.multiple_of(pointer, 16) if WIDE else pointer


@triton.jit
def log2_width(columns, WIDE: tl.constexpr):
    """log2 of the slots that a row takes in a unit."""
    if WIDE:
        return 10
    log2 = columns * 0
    for level in tl.static_range(10):
        log2 += (columns > (1 << level)).to(tl.int32)
    return log2


@triton.jit
def slots(rows, columns, left, finite, WIDE: tl.constexpr):
    """Where the slots of a unit are from its first element on, which are used, and which also if not `finite`."""
    slot = tl.arange(0, UNIT)
    writable = tl.where(finite, left, 0)
    if WIDE:
        return slot, slot < left, slot < writable
    else:
        log2 = log2_width(columns, WIDE)
        down = slot >> log2
        right = slot & ((1 << log2) - 1)
        here = down < rows
        return down.to(tl.int64) * columns + right, here & (right < left), here & (right < writable)


@triton.jit
def scale_slots(columns, left, valid, WIDE: tl.constexpr):
    """Where scales are loaded from, by four slots if `WIDE`, and which; where they are stored, by 128, and which."""
    if WIDE:
        four = tl.arange(0, UNIT // 4)
        block = tl.arange(0, UNIT // 128)
        return four // 32, four * 4 < left, block, block * 128 < left
    else:
        log2 = log2_width(columns, WIDE)
        slot = tl.arange(0, UNIT)
        right = slot & ((1 << log2) - 1)
        place = (slot >> log2).to(tl.int64) * tl.cdiv(columns, 128) + right // 128
        return place, valid, place, valid & (right % 128 == 0)


# --- tables ------------------------------------------------------------------------------------

#: Tables that are kept: gradients are in few places in turn, and a step in backward takes many small ones.
_KEPT = 256
_LIMIT = 2**31


class Table(NamedTuple):
    """The items of one launch."""

    entries: Tensor
    programs: int
    gradient: torch.dtype
    wide: bool

    def types(self) -> dict[str, Any]:
        kinds = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.int16}
        return dict(KIND=kinds[self.gradient], WIDE=self.wide)


_tables: OrderedDict[Any, list[Table]] = OrderedDict()


def tables_of(
    gradients: list[Tensor], stored: Sequence[list[Tensor]], starts: Sequence[int], every: int, programs: int
) -> list[Table]:
    """The launches that take all tensors; `stored` are lists in the order of an item's pointers, or empty."""
    device = gradients[0].device
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    pointers = [tuple([tensor.data_ptr() for tensor in tensors]) for tensors in (gradients, *stored)]
    kinds = tuple([(gradient.shape, gradient.dtype) for gradient in gradients])
    key = (device, stream, every, programs, tuple(starts), kinds, *pointers)
    found = _tables.get(key)
    if found is not None:
        _tables.move_to_end(key)
        return found
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("adamw: without csrc/, a graph can only capture a step whose tensors were stepped before")
    found = _tables[key] = _build(device, kinds, pointers, starts, every, programs)
    if len(_tables) > _KEPT:
        _tables.popitem(last=False)
    return found


def _build(
    device: torch.device,
    kinds: Sequence[tuple[torch.Size, torch.dtype]],
    pointers: list[tuple[int, ...]],
    starts: Sequence[int],
    every: int,
    programs: int,
) -> list[Table]:
    launches: dict[tuple[torch.dtype, bool], list[list[int]]] = {}
    units: dict[tuple[torch.dtype, bool], int] = {}
    for index, (shape, dtype) in enumerate(kinds):
        if shape.numel() == 0:
            continue
        rows = shape[0] if shape else 1
        columns = shape.numel() // rows
        places = [column[index] if column else 0 for column in pointers]
        aligned = columns % 16 == 0 and starts[index] % 16 == 0 and not any(place % 16 for place in places)
        launch = dtype, aligned and columns > 512
        first = units.get(launch, 0)
        together = 1024 // min(1024, triton.next_power_of_2(columns))  # rows of a unit
        units[launch] = first + -(-rows // together) * -(-columns // 1024)
        if columns >= _LIMIT or rows * -(-columns // 128) >= _LIMIT or units[launch] >= _LIMIT:
            raise ValueError(f"adamw: tensors too large for 32-bit numbers of units, of which the last is {shape}")
        launches.setdefault(launch, []).append([first, starts[index], rows, columns, index, *places])
    if device.type == "cuda":
        programs *= torch.cuda.get_device_properties(device).multi_processor_count
    found = []
    for (dtype, wide), items in launches.items():
        count = units[dtype, wide]
        each = -(-count // programs)
        entries = torch.zeros(len(items) + 2, WORDS.value, dtype=torch.int64)
        entries[0, :4] = torch.tensor([len(items), count, each, every])
        entries[1:-1, : len(items[0])] = torch.tensor(items)
        entries[-1, 0] = count
        if device.type == "cuda":
            entries = entries.pin_memory().to(device, non_blocking=True)
        found.append(Table(entries, -(-count // each), dtype, wide))
    return found
