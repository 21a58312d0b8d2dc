"""What has figures of its own, and the tools that these depend on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any

__all__ = ["Unit", "libraries", "triton_tools"]


@dataclass(frozen=True)
class Unit:
    """`measure` returns figures by name: those of `benchmarks.static.figures` are pinned, the others are only told."""

    id: str
    pins: str  # their file, without its suffix
    tools: str  # that the figures depend on, with versions; its first word is the kind
    measure: Callable[[], dict[str, Any]]


@cache
def triton_tools(architecture: int) -> str:
    """Triton and the assembler that it calls for an architecture."""
    from triton.backends.nvidia.compiler import get_ptxas

    return f"triton {version('triton')}, ptxas {get_ptxas(architecture).version}"


@cache
def libraries() -> str:
    """What decides about launches, bytes and sizes of models."""
    minor = {name: ".".join(version(name).split(".")[:2]) for name in ("torch", "diffusers", "open_clip_torch")}
    return ", ".join(f"{name} {number}" for name, number in minor.items())
