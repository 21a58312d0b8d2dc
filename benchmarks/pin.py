"""``python -m benchmarks pin --reason TEXT``: accept the static figures as they are."""

from benchmarks.static.command import pin as main

__all__ = ["main"]
