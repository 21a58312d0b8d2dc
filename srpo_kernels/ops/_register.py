"""Registration of operators: schema, fake kernel, one implementation per dispatch key, and their description."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["DTYPES", "OPS", "OpInfo", "define", "describe"]

#: What every operator takes; float64 also runs, for checking.
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class OpInfo:
    """What `docs/ops.md` and ``python -m srpo_kernels`` say about a public operator."""

    function: Callable
    formula: str
    shapes: str
    saved: str  # kept for backward beyond the caller's own tensors
    floor: str  # elements moved by forward and backward, at least
    schemas: tuple[str, ...]  # names under torch.ops.srpo


#: Public operators by name.
OPS: dict[str, OpInfo] = {}


def define(schema: str, *, fake: Callable, cpu: Callable, cuda: str) -> torch._ops.OpOverload:
    """Define ``srpo::<schema>`` and return its overload.

    `cpu` is the eager reference. `cuda` is "module:function"; the module, and so Triton, is imported the first time the
    CUDA kernel runs. With TRITON_INTERPRET=1 the CPU key runs the Triton launcher too, so that the kernels themselves
    are tested without a GPU.
    """
    name, arguments = schema[: schema.index("(")], schema[schema.index("(") :]
    launch = _lazy(cuda)
    torch.library.define(f"srpo::{name}", arguments)
    torch.library.impl(f"srpo::{name}", "CUDA", launch)
    torch.library.impl(f"srpo::{name}", "CPU", launch if interpreting() else cpu)
    torch.library.register_fake(f"srpo::{name}", fake)
    return getattr(torch.ops.srpo, name).default


def describe(function: Callable, **description: Any) -> None:
    """Enter a public operator into `OPS`."""
    OPS[function.__name__] = OpInfo(function, **description)


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, which is decided when they are imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _lazy(target: str) -> Callable:
    module, function = target.split(":")
    launcher: Callable | None = None

    def launch(*arguments: Any) -> Any:
        nonlocal launcher
        if launcher is None:
            launcher = getattr(importlib.import_module(module), function)
        return launcher(*arguments)

    return launch
