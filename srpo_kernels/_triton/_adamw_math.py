"""Arithmetic of `srpo_kernels.optim.reference` on the 1024 slots of a unit, for the kernels of `adamw`.

Patterns of fp32 are int32. bf16 is int16 in memory and never a type, whose arithmetic Triton's interpreter lacks.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "BINS",
    "ROUNDS",
    "SECOND_STREAM",
    "WEIGHT_STREAM",
    "add_term",
    "add_terms",
    "advance",
    "bits_of",
    "block_fields",
    "decode_e4m3",
    "decode_root",
    "draw",
    "encode_e4m3",
    "encode_root",
    "fold",
    "nearest16",
    "nonfinite",
    "of_bits",
    "power_of_field",
    "round_down_bits",
    "spread",
]

_INFINITY = tl.constexpr(0x7F800000)
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
# As in `reference`, which is built on kernels and so not imported by them.
BINS = tl.constexpr(32)
ROUNDS = tl.constexpr(7)
WEIGHT_STREAM, SECOND_STREAM = tl.constexpr(0x41444157), tl.constexpr(0x41444158)


@triton.jit
def bits_of(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def of_bits(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def spread(x, EACH: tl.constexpr):
    """Every value of a vector, EACH times."""
    return tl.reshape(tl.broadcast_to(x[:, None], (x.shape[0], EACH)), (x.shape[0] * EACH,))


@triton.jit
def fold(x, log2, LEVELS: tl.constexpr, MAXIMUM: tl.constexpr):
    """The tree that adds neighbours, or takes their maximum, over groups of `1 << log2` slots: in all their slots."""
    for level in tl.static_range(LEVELS):
        pairs = tl.reshape(x, (x.shape[0] >> (level + 1), 2, 1 << level))
        folded = tl.max(pairs, 1) if MAXIMUM else tl.sum(pairs, 1)
        folded = tl.reshape(tl.broadcast_to(folded[:, None, :], pairs.shape), x.shape)
        x = tl.where(level < log2, folded, x)
    return x


@triton.jit
def advance(gradient, coefficient, weight, first, second, scalars_ptr):
    """New moments, and the update; `srpo_kernels.optim.reference.Scalars` are at `scalars_ptr`."""
    rate, decay, eps = tl.load(scalars_ptr), tl.load(scalars_ptr + 1), tl.load(scalars_ptr + 2)
    rate1, beta2, rate2 = tl.load(scalars_ptr + 3), tl.load(scalars_ptr + 4), tl.load(scalars_ptr + 5)
    root = tl.load(scalars_ptr + 6)
    scaled = gradient * coefficient
    first = first + (scaled - first) * rate1
    second = second * beta2 + (scaled * scaled) * rate2
    update = rate * tl.div_rn(first, tl.sqrt_rn(second) * root + eps) + decay * weight
    return first, second, update


# --- random bits -------------------------------------------------------------------------------


@triton.jit
def _words(element, step, seed, STREAM: tl.constexpr):
    """The two words that hold the halves of four elements, of which `element` (int64) is one."""
    counter = element >> 4
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = low * 0
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero + step.to(tl.uint32), zero + STREAM, ROUNDS)
    place = element.to(tl.int32)
    second = (place & 4) != 0
    a = tl.where(second, w2, w0)
    b = tl.where(second, w3, w1)
    c = tl.where(second, w0, w2)
    rotated = (place & 8) != 0
    return tl.where(rotated, (a >> 8) | (b << 24), a), tl.where(rotated, (b >> 8) | (c << 24), b)


@triton.jit
def draw(origin, place, step, seed, STREAM: tl.constexpr, WIDE: tl.constexpr):
    """The 16 bits (int32) of the elements `origin + place`, which are consecutive from a multiple of 16 if `WIDE`."""
    if WIDE:
        words = _words(origin + tl.arange(0, place.shape[0] // 4) * 4, step, seed, STREAM)
        word = tl.join(words[0], words[1])
        return tl.reshape(tl.join(word & 0xFFFF, word >> 16), place.shape).to(tl.int32)
    else:
        element = origin + place
        words = _words(element, step, seed, STREAM)
        word = tl.where((element & 2) != 0, words[1], words[0])
        return (tl.where((element & 1) != 0, word >> 16, word) & 0xFFFF).to(tl.int32)


# --- rounding ----------------------------------------------------------------------------------


@triton.jit
def round_down_bits(bits, random, DROPPED: tl.constexpr):
    """A pattern without its lowest bits, rounded up in magnitude with the probability of what is dropped."""
    mask: tl.constexpr = (1 << DROPPED) - 1
    magnitude = bits & _MAGNITUDE
    rounded = (bits + (random & mask)) & ~mask
    rounded = tl.where((rounded & _INFINITY) == _INFINITY, bits & ~mask, rounded)
    rounded = tl.where(magnitude >= _INFINITY, bits, rounded)
    return tl.where(magnitude > _INFINITY, 0x7FC00000, rounded)


@triton.jit
def nearest16(x):
    """fp32 to bf16, nearest even, as int16."""
    bits = bits_of(x)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & _MAGNITUDE) > _INFINITY, 0x7FC0, rounded).to(tl.int16)


# --- blocks of 128 -----------------------------------------------------------------------------


@triton.jit
def power_of_field(field):
    return of_bits(field << 23)


@triton.jit
def block_fields(x, log2, WIDE: tl.constexpr):
    """Exponent fields of the scales of blocks: one for each of eight if `WIDE`, otherwise one for every slot."""
    largest = bits_of(x) & _MAGNITUDE
    largest = tl.max(tl.reshape(largest, (x.shape[0] // 128, 128)), 1) if WIDE else fold(largest, log2, 7, True)
    return tl.minimum(tl.maximum((largest + 0x7FFFFF) >> 23, 9), 253)


@triton.jit
def encode_e4m3(x, CONVERTS: tl.constexpr):
    """fp32 to e4m3fn (uint8), nearest even, saturating; by the processor if it `CONVERTS`."""
    if CONVERTS:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    bits = bits_of(x)
    magnitude = bits & _MAGNITUDE
    # Adding 2^14 leaves multiples of 2^-9, the subnormal step, in the low bits.
    subnormal = bits_of(of_bits(magnitude) + 16384.0) - (141 << 23)
    normal = (magnitude + 0x7FFFF + ((magnitude >> 20) & 1) - (120 << 23)) >> 20
    code = tl.where(magnitude < (121 << 23), subnormal, tl.minimum(normal, 0x7E))
    code = tl.where(magnitude > _INFINITY, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def decode_e4m3(code, CONVERTS: tl.constexpr):
    """The inverse, for codes that `encode_e4m3` returns for finite numbers."""
    if CONVERTS:
        return code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    code = code.to(tl.int32)
    magnitude = code & 0x7F
    normal = of_bits((magnitude << 20) + (120 << 23))
    found = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, normal)
    return of_bits(bits_of(found) | ((code & 0x80) << 24))


@triton.jit
def decode_root(code):
    """``(code / 255)^8`` of a code in fp32."""
    x = code * (1.0 / 255.0)
    square = x * x
    fourth = square * square
    return fourth * fourth


@triton.jit
def encode_root(n, random):
    """Code (uint8) of the eighth root of n in [0, 1], up with the probability that keeps the mean."""
    # The roots may be approximate: near a code they are one off at most, which is then found.
    lower = tl.minimum(tl.floor(tl.sqrt(tl.sqrt(tl.sqrt(n))) * 255.0), 254.0)
    lower = tl.where(decode_root(lower) > n, lower - 1.0, lower)
    lower = tl.where(decode_root(lower + 1.0) <= n, tl.minimum(lower + 1.0, 254.0), lower)
    below = decode_root(lower)
    chance = (random.to(tl.float32) + 0.5) * 0.0000152587890625
    up = chance * (decode_root(lower + 1.0) - below) < n - below
    code = tl.where(up, lower + 1.0, lower)
    return tl.where((code == 0.0) & (n > 0.0), 1.0, code).to(tl.uint8)


# --- exact sums --------------------------------------------------------------------------------


@triton.jit
def nonfinite(x):
    """1 for what is NaN or infinite."""
    return ((bits_of(x) & _INFINITY) == _INFINITY).to(tl.int32)


@triton.jit
def _terms(sums):
    """What sums of chunks add, and to which bins; nothing if they are not finite."""
    bits = bits_of(sums)
    field = (bits >> 23) & 255
    significand = (bits & 0x7FFFFF) | tl.where(field > 0, 0x800000, 0)
    field = tl.maximum(field, 1)
    value = significand.to(tl.int64) << (field & 7).to(tl.int64)
    return tl.where(field == 255, 0, value), field >> 3


@triton.jit
def add_term(bins, sums, OFFSET: tl.constexpr):
    """`bins`, from OFFSET on, with the sum of a chunk or with those of a few."""
    value, place = _terms(sums)
    numbers = tl.arange(0, bins.shape[0])
    if len(sums.shape) == 0:
        return bins + tl.where(numbers == place + OFFSET, value, 0)
    else:
        return bins + tl.sum(tl.where(numbers[None, :] == place[:, None] + OFFSET, value[:, None], 0), 0)


@triton.jit
def add_terms(bins, sums, leads, OFFSET: tl.constexpr):
    """The same of the sums in the slots that `leads`."""
    value, place = _terms(sums)
    value = tl.where(leads, value, 0)
    # Sums are of a few magnitudes: one pass for each of their bins.
    used = value != 0
    last = tl.max(tl.where(used, place, -1), 0)
    for number in range(tl.min(tl.where(used, place, 32), 0), last + 1):
        added = tl.sum(tl.where(place == number, value, 0), 0)
        bins += tl.where(tl.arange(0, bins.shape[0]) == number + OFFSET, added, 0)
    return bins
