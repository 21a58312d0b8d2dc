"""Randomness without state: every draw is a pure function of (seed, step, rank, purpose).

Nothing needs saving for a run to resume exactly, and no draw depends on how many came before it.
"""

from __future__ import annotations

import hashlib

import torch

__all__ = ["generator"]


def generator(seed: int, step: int, rank: int, purpose: str) -> torch.Generator:
    """A CPU generator seeded by the arguments alone. Draw on the CPU so that every device sees the same values."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}/{purpose}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
