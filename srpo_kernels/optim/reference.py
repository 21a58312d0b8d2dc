"""The arithmetic of `srpo_kernels.optim.AdamW`: the specification that every implementation follows bit by bit.

Every operation below is one IEEE operation (round to nearest even, subnormals kept) in the order written. Nothing is
fused, nothing is reassociated, a division is a division. Values are fp32 unless said otherwise.

**Tensors.** A parameter [d0, d1, ...] is a matrix [d0, d1 * d2 * ...] in row-major order of its indices, whatever its
strides; one of one dimension is [d0, 1]. A shard is a run of whole rows.

**Scalars** (`scalars`), per parameter, in double and rounded to fp32 once: ``rate = lr / (1 - beta1^t)``,
``decay = lr * weight_decay``, eps, 1 - beta1, beta2, 1 - beta2 and ``root = 1 / sqrt(1 - beta2^t)``. t counts the steps
taken including this one; it lives on the device because a skipped step must not count. beta^t is by squaring: for bits
k = 0..23 of t, if the bit is set ``power = power * square``, then ``square = square * square``.

**Norm** (`sums_of_squares`, `total`). A row is cut into chunks of 1024 elements, the last one filled up with zeros. The
sum of squares of a chunk is fp32: ``x * x``, then the tree that adds neighbours, (0 + 1), (2 + 3), ..., ten times.
Chunk sums are added exactly, so in any order: a sum with exponent field f (0 counts as 1) and 24-bit significand s is
``s << (f & 7)`` in bin ``f >> 3`` of 32 int64 bins; 2^32 chunks cannot overflow one. The total is double: bin k times
2^(8 k - 150), and the tree of neighbours over the 32. A chunk whose sum is not finite makes the step be skipped.
``norm = sqrt(total)`` and ``coefficient = min(1, max_norm / (norm + 1e-6))`` are double; the coefficient is rounded to
fp32 once, and is 1 without clipping.

**Step** (`advance`), g being the gradient converted to fp32::

    g' = g * coefficient
    m' = m + (g' - m) * (1 - beta1)
    v' = v * beta2 + (g' * g') * (1 - beta2)
    update = rate * (m' / (sqrt(v') * root + eps)) + decay * w
    w' = w - update
    ema' = ema + (w' - ema) * (1 - decay)            when t is a multiple of ema_every

**Random bits** (`random_bits`). Element n draws 16 bits for its weight (stream 0x41444157) and 16 for its second
moment (stream 0x41444158). 16 elements share the Philox4x32-7 counter ``(low32(n // 16), high32(n // 16), t, stream)``
under the key ``(low32(seed), high32(seed))``. Its four words are eight halves, low halves first; element n % 16 < 8 has
half n % 16, the others, i = n % 16 - 8, those of the 128 bits rotated right by 8: ``half[i] >> 8 | half[i + 1] << 8``.
So an element's high byte is another's low byte, which correlates their roundings by 1/256 and biases none. n counts the
elements of the whole parameter list, every parameter beginning at a multiple of 16. (Seven rounds: the fewest that
pass all tests of Salmon et al. 2011.)

**Telemetry**: sums of squares of the updates, and of the weights as stored, as above but for the order in which the
squares of a chunk are added, which is free: these sums are exact to fp32's last bits, not the same bits everywhere.

**Stochastic rounding to fewer bits** (`round_down_bits`): ``(pattern + (random & mask)) & ~mask`` with a mask of 16
(bf16) or 8 bits, on the fp32 bit pattern; if that overflows to infinity, ``pattern & ~mask``. What is not finite is
left alone but for a NaN, which becomes 0x7FC00000. Values that need no rounding stay.

**Weights.** `split32`: pattern = (bf16 bits << 16) + signed int16 remainder, modulo 2^32: the bf16 half is the weight
rounded to nearest, ties away from zero (Transformer Engine's rule; round-half-even could not be inverted), and
becomes infinite at the same magnitudes as bf16 does. `split24`: the pattern rounded stochastically by 8 bits, then
split; the low byte of the remainder is zero and its high byte the int8. `bf16_sr`: rounded stochastically by 16 bits.

**Moments.** `M4`: m to bf16 (nearest even), v to bf16 (stochastically). `M3`: m as below, v as in M4. `M2`: m and v as
below. Blocks are 128 consecutive elements of a row, the last one shorter. The scale of a block is 2^c, the smallest
power of two not below the largest magnitude (c from the bit pattern: ``(bits + 0x7FFFFF) >> 23``, within
[9, 253] as an exponent field), so scaling is exact. m: ``m * 2^(8 - c)`` to e4m3fn, nearest even; the stored scale
is 2^(c - 8). v: ``n = v * 2^-c``; code q decodes to ``d(q) * 2^c`` with ``d(q) = x8``, ``x = q * fp32(1 / 255)``,
``x2 = x * x``, ``x4 = x2 * x2``, ``x8 = x4 * x4``. Encoding takes the largest q in [0, 254] with ``d(q) <= n``, found
in any way (three square roots, and one code up or down), and goes to q + 1 if
``((r + 0.5) * 2^-16) * (d(q + 1) - d(q)) < n - d(q)``, r being the 16 random bits: up with the probability that keeps
the mean. A v > 0 never gets code 0: a second moment of zero would make the next update up to 30 times too large.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from srpo_kernels.ops.noise_prior import philox

__all__ = [
    "BLOCK",
    "CHUNK",
    "SECOND_STREAM",
    "WEIGHT_STREAM",
    "Scalars",
    "advance",
    "decode_blocks",
    "decode_roots",
    "encode_blocks",
    "encode_roots",
    "join16",
    "join24",
    "random_bits",
    "round_down_bits",
    "scalars",
    "split16",
    "split24",
    "sums_of_squares",
    "total",
]

BLOCK = 128
CHUNK = 1024
BINS = 32
_MASK = 0xFFFFFFFF
WEIGHT_STREAM, SECOND_STREAM = 0x41444157, 0x41444158
ROUNDS = 7
#: Elements that share a counter: every parameter's place in the list is a multiple of it.
DRAWN = 16
_INFINITY = 0x7F800000


@dataclass(frozen=True)
class Scalars:
    """Everything that is one number per parameter and step: fp32 tensors without dimensions, on the device."""

    rate: Tensor  # lr / (1 - beta1^t)
    decay: Tensor  # lr * weight_decay
    eps: Tensor
    rate1: Tensor  # 1 - beta1
    beta2: Tensor
    rate2: Tensor  # 1 - beta2
    root: Tensor  # 1 / sqrt(1 - beta2^t)


def scalars(
    steps: Tensor, lr: float | Tensor, betas: tuple[float, float], eps: float, weight_decay: float
) -> list[Scalars]:
    """The `Scalars` of parameters whose step numbers, the coming one included, are `steps` (int64 [n])."""

    def number(value: float | Tensor) -> Tensor:
        if isinstance(value, Tensor):
            return value.detach().to(steps.device, torch.float64).reshape(())
        return torch.full((), value, dtype=torch.float64, device=steps.device)  # a fill: no copy from the host

    base = number(lr)
    rates = (base / (1 - _powers(betas[0], steps))).float().unbind()
    roots = (1 / torch.sqrt(1 - _powers(betas[1], steps))).float().unbind()
    shared = [base * number(weight_decay), number(eps), number(1 - betas[0]), number(betas[1]), number(1 - betas[1])]
    decay, eps32, rate1, beta2, rate2 = (value.float() for value in shared)
    return [Scalars(rate, decay, eps32, rate1, beta2, rate2, root) for rate, root in zip(rates, roots, strict=True)]


def _powers(base: float, exponents: Tensor) -> Tensor:
    """`base` to the powers `exponents` (int64, below 2^24) in double, by squaring: pow's bits differ by library."""
    power = torch.ones_like(exponents, dtype=torch.float64)
    square = base
    for bit in range(24):
        power = torch.where((exponents >> bit) & 1 == 1, power * square, power)
        square *= square
    return power


def advance(
    gradient: Tensor, coefficient: Tensor, weight: Tensor, first: Tensor, second: Tensor, s: Scalars
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """New weight, moments and the update, all fp32: section "Step" above."""
    scaled = gradient.float() * coefficient
    first = first + (scaled - first) * s.rate1
    second = second * s.beta2 + (scaled * scaled) * s.rate2
    update = s.rate * (first / (_root(second) * s.root + s.eps)) + s.decay * weight
    return weight - update, first, second, update


def _root(x: Tensor) -> Tensor:
    """The fp32 square root that IEEE defines, by way of double: on the CPU PyTorch's own may be an ulp off (MKL's)."""
    return torch.sqrt(x.double()).float()


# --- norms ------------------------------------------------------------------------------------


def sums_of_squares(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of squares of a matrix as int64 bins [32], and the number of chunks (int64) whose sum is not finite."""
    if x.numel() == 0:
        return x.new_zeros(BINS, dtype=torch.int64), x.new_zeros((), dtype=torch.int64)
    squares = x.float()
    squares = squares * squares
    columns = x.shape[1]
    # Zeros change no sum, so a row shorter than a chunk is only filled up to a power of two.
    chunk = min(CHUNK, 1 << (columns - 1).bit_length())
    squares = _padded(squares, chunk)
    sums = _tree(squares.view(-1, chunk))
    bits = sums.view(torch.int32).long()
    field = bits >> 23
    significand = (bits & 0x7FFFFF) | ((field > 0).long() << 23)
    field = field.clamp(min=1)
    lost = ~sums.isfinite()
    bins = torch.zeros(BINS, dtype=torch.int64, device=x.device)
    bins.scatter_add_(0, (field >> 3) & 31, torch.where(lost, 0, significand << (field & 7)))
    return bins, lost.sum()


def total(bins: Tensor) -> Tensor:
    """What int64 bins [..., 32] add up to, in double."""
    exponents = torch.arange(BINS, dtype=torch.int64, device=bins.device) * 8 - 150
    powers = ((exponents + 1023) << 52).view(torch.float64)
    return _tree(bins.double() * powers)


def _tree(x: Tensor) -> Tensor:
    """Sum over the last dimension, a power of two, by adding neighbours."""
    while x.shape[-1] > 1:
        x = x[..., 0::2] + x[..., 1::2]
    return x.squeeze(-1)


def _padded(x: Tensor, multiple: int) -> Tensor:
    """`x` with zero columns appended until their number is a multiple."""
    missing = -x.shape[1] % multiple
    return torch.nn.functional.pad(x, (0, missing)) if missing else x.contiguous()


# --- rounding ---------------------------------------------------------------------------------


def random_bits(seed: int, stream: int, step: Tensor, start: int, count: int) -> Tensor:
    """The 16 bits (int32 [count]) of the elements from `start` on at `step`, a tensor without dimensions."""
    block = torch.arange(start // DRAWN, -(-(start + count) // DRAWN), dtype=torch.int64, device=step.device)
    counter = (block & _MASK, block >> 32, step.long().expand_as(block), torch.full_like(block, stream))
    words = torch.stack(philox(counter, (seed & _MASK, seed >> 32), ROUNDS), 1)
    halves = torch.stack([words & 0xFFFF, words >> 16], 2).flatten(1)
    rotated = (halves >> 8) | ((halves.roll(-1, 1) << 8) & 0xFFFF)
    drawn = torch.cat([halves, rotated], 1).flatten().int()
    return drawn[start % DRAWN : start % DRAWN + count]


def round_down_bits(x: Tensor, random: Tensor, dropped: int) -> Tensor:
    """fp32 `x` without its `dropped` lowest bits, rounded up in magnitude with the probability of what is dropped.

    `random` are int32 values of which the lowest `dropped` bits are taken.
    """
    mask = (1 << dropped) - 1
    bits = x.view(torch.int32)
    rounded = (bits + (random & mask)) & ~mask
    rounded = torch.where(rounded & _INFINITY == _INFINITY, bits & ~mask, rounded)
    rounded = torch.where(x.isfinite(), rounded, torch.where(x.isnan(), 0x7FC00000, bits))
    return rounded.view(torch.float32)


def split16(x: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 as bf16 and an int16 remainder."""
    bits = x.view(torch.int32)
    remainder = bits.to(torch.int16)  # the low half, two's complement
    upper = ((bits - remainder) >> 16).to(torch.int16)
    return upper.view(torch.bfloat16), remainder


def join16(weight: Tensor, remainder: Tensor) -> Tensor:
    """The inverse of `split16`."""
    return ((weight.view(torch.int16).int() << 16) + remainder).view(torch.float32)


def split24(x: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 as bf16 and an int8 remainder, rounded stochastically by the lowest 8 bits of `random` (int32)."""
    weight, remainder = split16(round_down_bits(x, random, 8))
    return weight, (remainder >> 8).to(torch.int8)


def join24(weight: Tensor, remainder: Tensor) -> Tensor:
    """The weight that `split24` kept."""
    return join16(weight, remainder.short() << 8)


# --- blocks -----------------------------------------------------------------------------------


def _exponents(x: Tensor) -> tuple[Tensor, Tensor]:
    """Matrix as blocks [rows, blocks, 128], and the exponent fields [rows, blocks, 1] of their scales."""
    blocks = _padded(x, BLOCK)
    blocks = blocks.view(x.shape[0], blocks.shape[1] // BLOCK, BLOCK)
    largest = blocks.abs().amax(-1, keepdim=True)
    return blocks, ((largest.view(torch.int32) + 0x7FFFFF) >> 23).clamp(9, 253)


def _power(field: Tensor) -> Tensor:
    """The power of two with this exponent field."""
    return (field << 23).view(torch.float32)


def _times_scale(x: Tensor, scale: Tensor) -> Tensor:
    columns = x.shape[1]
    return x * scale.repeat_interleave(BLOCK, 1)[:, :columns]


def encode_blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 matrix [rows, columns] as e4m3fn codes (uint8) and fp32 scales [rows, ceil(columns / 128)]."""
    blocks, field = _exponents(x)
    codes = (blocks * _power(254 + 8 - field)).to(torch.float8_e4m3fn).view(torch.uint8)
    return codes.flatten(1)[:, : x.shape[1]].contiguous(), _power(field - 8).squeeze(-1)


def decode_blocks(codes: Tensor, scale: Tensor) -> Tensor:
    """The values that `encode_blocks` kept."""
    return _times_scale(codes.view(torch.float8_e4m3fn).float(), scale)


def encode_roots(x: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 matrix of non-negative values as codes of their eighth roots (uint8) and fp32 scales, unbiased.

    `random` is an int32 matrix of 16-bit values.
    """
    blocks, field = _exponents(x)
    n = (blocks * _power(254 - field)).flatten(1)[:, : x.shape[1]]
    lower = torch.floor(n.sqrt().sqrt().sqrt() * 255.0).clamp(0, 254)
    # The roots are rounded: near a code they may be one off.
    lower = lower - (_eighth(lower) > n).float()
    lower = torch.where(_eighth(lower + 1) <= n, (lower + 1).clamp(max=254), lower)
    below = _eighth(lower)
    chance = (random.float() + 0.5) * 2.0**-16
    up = chance * (_eighth(lower + 1) - below) < n - below
    code = (lower + up).clamp(min=(n > 0).float())
    return code.to(torch.uint8), _power(field).squeeze(-1)


def decode_roots(codes: Tensor, scale: Tensor) -> Tensor:
    """The values that `encode_roots` kept."""
    return _times_scale(_eighth(codes.float()), scale)


def _eighth(code: Tensor) -> Tensor:
    """``(code / 255)^8``."""
    x = code * (1.0 / 255.0)  # the factor is rounded to fp32; 255 gives exactly 1
    square = x * x
    fourth = square * square
    return fourth * fourth
