"""Registration of operators: schema, fake kernel, one implementation per dispatch key, and their description."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["DTYPES", "OPS", "OpInfo", "define", "describe", "triton_problem"]

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
    CUDA kernel runs; where Triton cannot be used (`triton_problem`) `cpu` runs instead. With TRITON_INTERPRET=1 the CPU
    key runs the Triton launcher too, so that the kernels themselves are tested without a GPU.
    """
    name, arguments = schema[: schema.index("(")], schema[schema.index("(") :]
    launch = _lazy(cuda, cpu)
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


@functools.cache
def triton_problem() -> str | None:
    """Why kernels cannot run here, whatever the GPU: Triton is missing or too old. None: they can."""
    try:
        importlib.import_module("srpo_kernels._triton")
    except ImportError as error:
        return f"Triton cannot be used ({error})"
    return None


@functools.cache
def _warn(problem: str) -> None:
    warnings.warn(f"srpo_kernels: {problem}: operators run as plain PyTorch, slower and with more memory", stacklevel=4)


def _lazy(target: str, reference: Callable) -> Callable:
    module, function = target.split(":")
    launcher: Callable | None = None

    def launch(*arguments: Any) -> Any:
        nonlocal launcher
        if launcher is None:
            if problem := triton_problem():
                _warn(problem)
                launcher = reference
            else:
                launcher = getattr(importlib.import_module(module), function)
        return launcher(*arguments)

    return launch
