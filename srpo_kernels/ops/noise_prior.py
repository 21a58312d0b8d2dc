"""Gaussian noise as a pure function of (seed, offset, image, element): Philox4x32-10 and Box-Muller.

Philox: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011). A counter-based generator needs no
state, so the same noise can be drawn again wherever it is needed instead of being stored. The Triton kernels draw the
same words (`srpo_kernels._triton.noise_prior`); the normals differ by the last bits of log and square root at most.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["NoisePrior", "philox", "standard_normal"]

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
#: sin(x) = x + x^3 P(x^2) and cos(x) = 1 - x^2/2 + x^4 Q(x^2) on [-pi/4, pi/4], highest power first (Cephes).
SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int], rounds: int = _ROUNDS
) -> tuple[Tensor, ...]:
    """Four uint32 words per counter; words are uint32 values held in int64 tensors of one shape."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # The int64 product wraps modulo 2^64, so its bits are those of the unsigned product.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def standard_normal(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Two fp32 normals from two uint32 words (Box-Muller), in the operations and the order the kernels use."""
    # Into (0, 1]: the conversion rounds, the scaling is exact.
    u, v = (word.float() * 2.0**-32 + 2.0**-33 for word in (u, v))
    radius = torch.sqrt(-2.0 * torch.log(u))
    # cos and sin of 2 pi v by quadrant: no argument reduction, no slow path, the same bits everywhere.
    quadrant = torch.floor(v * 4.0 + 0.5)
    x = (v - quadrant * 0.25) * (2.0 * math.pi)
    square = x * x
    sine = x + x * square * ((SIN[0] * square + SIN[1]) * square + SIN[2])
    cosine = 1.0 - 0.5 * square + square * square * ((COS[0] * square + COS[1]) * square + COS[2])
    odd = (quadrant.int() & 1) == 1
    flip_cosine = (quadrant == 1.0) | (quadrant == 2.0)
    flip_sine = (quadrant == 2.0) | (quadrant == 3.0)
    cos, sin = torch.where(odd, sine, cosine), torch.where(odd, cosine, sine)
    return radius * torch.where(flip_cosine, -cos, cos), radius * torch.where(flip_sine, -sin, sin)


@dataclass(frozen=True)
class NoisePrior:
    """Standard normal noise named by two integers instead of stored.

    Element n (row-major) of image b is lane ``n % 4`` of the Philox counter ``(n // 4, b, offset)`` under key `seed`:
    it depends neither on the batch nor on how a kernel divides its work. With `shared`, every image has the noise of
    image 0.

    Raises `ValueError` unless ``0 <= seed, offset < 2**63``.
    """

    seed: int
    offset: int = 0
    shared: bool = False

    def __post_init__(self) -> None:
        for name in ("seed", "offset"):
            value = getattr(self, name)
            if not isinstance(value, int) or not 0 <= value < 2**63:
                raise ValueError(f"NoisePrior: {name} must be an integer in [0, 2**63), got {value!r}")

    def sample(self, shape: tuple[int, ...], *, device: torch.device | str = "cpu") -> Tensor:
        """The noise as an fp32 tensor of `shape`, whose first dimension counts images."""
        images, count = shape[0], math.prod(shape[1:])
        block = torch.arange((count + 3) // 4, dtype=torch.int64, device=device).expand(images, -1)
        image = torch.arange(images, dtype=torch.int64, device=device)[:, None].expand_as(block)
        if self.shared:
            image = torch.zeros_like(image)
        stream = torch.full_like(block, self.offset)
        u0, u1, u2, u3 = philox((block, image, stream & _MASK, stream >> 32), (self.seed & _MASK, self.seed >> 32))
        lanes = torch.stack([*standard_normal(u0, u1), *standard_normal(u2, u3)], -1)
        return lanes.flatten(1)[:, :count].reshape(shape)
