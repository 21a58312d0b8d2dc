"""``python -m benchmarks optim``: the optimizer part of the quick profile alone, with its options."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import gpu

__all__ = ["main"]


def main(arguments: Sequence[str]) -> int:
    return gpu.main(["--parts", "optim", *arguments])
