"""Files shipped with the package."""

from __future__ import annotations

from pathlib import Path

__all__ = ["TINY", "resolve_asset"]

#: In a recipe's paths, the tiny world shipped with this package.
TINY = "tiny"


def resolve_asset(path: str | Path, kind: str) -> Path:
    """`path` itself, or for "tiny" the tiny world's "pipeline", "reward", "epsilon" or "prompts.txt"."""
    return Path(__file__).parent / "tiny/assets" / kind if str(path) == TINY else Path(path)
