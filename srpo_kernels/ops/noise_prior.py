"""Gaussian noise as a pure function of (seed, offset, element index): Philox4x32-10 and Box-Muller.

Philox: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011). A counter-based
generator needs no state, so the same noise can be drawn again wherever it is needed instead of
being stored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["NoisePrior", "philox"]

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four uint32 words per counter; words are uint32 values held in int64 tensors of one shape."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The int64 product wraps modulo 2^64, so its bits are those of the unsigned product.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


@dataclass(frozen=True)
class NoisePrior:
    """Standard normal noise named by two integers instead of stored.

    Element i (row-major) of a draw uses lane ``i % 4`` of Philox counter ``i // 4`` on stream
    `offset` under key `seed`, whatever the shape, device or block size.

    Raises `ValueError` unless ``0 <= seed, offset < 2**63``.
    """

    seed: int
    offset: int = 0

    def __post_init__(self) -> None:
        for name in ("seed", "offset"):
            value = getattr(self, name)
            if not isinstance(value, int) or not 0 <= value < 2**63:
                raise ValueError(f"NoisePrior: {name} must be an integer in [0, 2**63), got {value!r}")

    def sample(self, shape: tuple[int, ...], *, device: torch.device | str = "cpu") -> Tensor:
        """The noise as an fp32 tensor of `shape`."""
        count = math.prod(shape)
        block = torch.arange((count + 3) // 4, dtype=torch.int64, device=device)
        stream = torch.full_like(block, self.offset)
        words = philox((block & _MASK, block >> 32, stream & _MASK, stream >> 32), (self.seed & _MASK, self.seed >> 32))
        # (word + 1/2) / 2^32 lies strictly inside (0, 1); float64 keeps log and angle exact to fp32.
        u0, u1, u2, u3 = ((word.double() + 0.5) * 2.0**-32 for word in words)
        lanes = []
        for u, v in ((u0, u1), (u2, u3)):
            radius, angle = torch.sqrt(-2 * torch.log(u)), 2 * math.pi * v
            lanes += [radius * torch.cos(angle), radius * torch.sin(angle)]
        return torch.stack(lanes, -1).flatten()[:count].float().reshape(shape)
