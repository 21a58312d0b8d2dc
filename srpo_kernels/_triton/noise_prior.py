"""The noise of `srpo_kernels.ops.noise_prior`, drawn where it is used."""

from __future__ import annotations

import triton
import triton.language as tl

from srpo_kernels.ops.noise_prior import COS, SIN

_S0, _S1, _S2 = (tl.constexpr(value) for value in SIN)
_C0, _C1, _C2 = (tl.constexpr(value) for value in COS)
_TWO_PI = tl.constexpr(6.283185307179586)
_SCALE, _HALF = tl.constexpr(2.0**-32), tl.constexpr(2.0**-33)


@triton.jit
def standard_normal(u, v):
    """Two fp32 normals from two uint32 words; mirrors `srpo_kernels.ops.noise_prior.standard_normal`."""
    u = u.to(tl.float32) * _SCALE + _HALF
    v = v.to(tl.float32) * _SCALE + _HALF
    radius = tl.sqrt(-2.0 * tl.log(u))
    quadrant = tl.floor(v * 4.0 + 0.5)
    x = (v - quadrant * 0.25) * _TWO_PI
    square = x * x
    sine = x + x * square * ((_S0 * square + _S1) * square + _S2)
    cosine = 1.0 - 0.5 * square + square * square * ((_C0 * square + _C1) * square + _C2)
    odd = (quadrant.to(tl.int32) & 1) == 1
    flip_cosine = (quadrant == 1.0) | (quadrant == 2.0)
    flip_sine = (quadrant == 2.0) | (quadrant == 3.0)
    cos = tl.where(odd, sine, cosine)
    sin = tl.where(odd, cosine, sine)
    return radius * tl.where(flip_cosine, -cos, cos), radius * tl.where(flip_sine, -sin, sin)


@triton.jit
def draw(first, image, seed, offset, BLOCK: tl.constexpr):
    """Noise of elements [first, first + BLOCK) of an image, fp32 [BLOCK]. `first` and BLOCK are multiples of 4."""
    counter = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = counter * 0
    stream = tl.cast(offset, tl.uint64)
    low = (stream & 0xFFFFFFFF).to(tl.uint32)
    high = (stream >> 32).to(tl.uint32)
    u0, u1, u2, u3 = tl.philox(seed, counter, zero + tl.cast(image, tl.uint32), zero + low, zero + high)
    n0, n1 = standard_normal(u0, u1)
    n2, n3 = standard_normal(u2, u3)
    # join puts its arguments last: [.., i, j] of the result is element 2 i + j of the four.
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (BLOCK,))
