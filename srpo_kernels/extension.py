"""Operators over lists of tensors that csrc/ implements: their schemas, and loading the libraries if they were built.

The libraries are optional. `_C` has the kernels for the CPU, `_C_cuda` those for CUDA; an operator called without its
library raises `NotImplementedError`. Nothing is loaded before `available` or `extension_status` is called.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["available", "extension_status", "module"]

_HERE = Path(__file__).parent
_LIBRARIES = {"cpu": "_C", "cuda": "_C_cuda"}


def available(device: torch.device | str) -> bool:
    """Whether the operators run on tensors on `device`; loads the library the first time."""
    return torch.device(device).type in _LIBRARIES and _load(torch.device(device).type) == "loaded"


def module(device: torch.device) -> Any:
    """The library itself, which is `available`: its functions `same` and `locate` look at Python's objects."""
    return importlib.import_module(f"srpo_kernels.{_LIBRARIES[device.type]}")


def extension_status() -> dict[str, str]:
    """For each library: "loaded", or why it is not; and the torch that it was loaded into."""
    found = {library: _load(device) for device, library in _LIBRARIES.items()}
    return {**found, "torch": f"{torch.__version__}, CUDA {torch.version.cuda}"}


@functools.cache
def _load(device: str) -> str:
    path = _HERE / f"{_LIBRARIES[device]}.abi3.so"
    if not path.exists():
        return "not built: python setup.py build_ext --inplace"
    if device == "cuda" and torch.version.cuda is None:
        return "not loaded: torch is not a CUDA build"
    try:
        importlib.import_module(f"srpo_kernels.{_LIBRARIES[device]}")
    except ImportError as error:  # another torch, or another processor
        return f"not loaded: {error}"
    return "loaded"


# --- schemas ----------------------------------------------------------------------------------
# Lists have one tensor per parameter, contiguous, of its shape (scales: a number per row and 128 columns), or none
# where a mode stores nothing; `srpo_kernels.optim.reference` says what all of it means. What is one number, and whether
# gradients are finite, is read where it is: nothing waits for the device.

# One step of parameters that are stored alike. `scalars` [n, 7] is what adamw_scalars returns, `steps` int64 [n] counts
# the coming step, `coefficient` fp32 and `finite` bool have one element, `starts` are the places of the first elements.
# Returns int64 [65], to be summed: 32 bins of the updates, 32 of the stored weights, and how many bf16 weights changed.
_STEP = (
    "(Tensor(a!)[] weights, Tensor(b!)[] remainders, Tensor(c!)[] first, Tensor(d!)[] first_scales, "
    "Tensor(e!)[] second, Tensor(f!)[] second_scales, Tensor(g!)[] averages, Tensor[] gradients, Tensor scalars, "
    "Tensor steps, Tensor coefficient, Tensor finite, int[] starts, int seed, float ema_decay, int ema_every, "
    "str weights_mode, str moments_mode) -> Tensor"
)
# int64 [34]: 32 bins, the chunks whose sum is not finite, the elements that are not finite.
_SQUARES = "(Tensor[] gradients) -> Tensor"
# The step again and again, without a thousand tensors for arguments: a plan, int64 [n, 15] in host memory, has where
# everything is, so that a schema cannot say what changes, and the caller must know that all of it is still there. Plans
# of several lists are one after the other; `steps` (fp32, one element each) count those taken.
_PLAN = (
    "(Tensor[] weights, Tensor[] remainders, Tensor[] first, Tensor[] first_scales, Tensor[] second, "
    "Tensor[] second_scales, Tensor[] averages, Tensor[] gradients, Tensor[] steps, int[] starts, int group, "
    "str weights_mode, str moments_mode) -> Tensor"
)
# Keeps tensors alive, for as long as what it returns, bytes in host memory, is: so that adamw_begin can tell whether
# they are where they were.
_WATCH = "(Tensor[] tensors) -> Tensor"
# What the steps of all parameters begin with, in int64 words: the 34 above, the norm (double), the coefficient (fp32),
# whether it is finite (bool), one word for the kernel; then the numbers of the coming steps [n] and, as fp32, their
# `reference.Scalars` [n, 7]. Steps are counted unless the norm is not finite. A parameter takes the `lr` (a double,
# read now if it is on the CPU) and the four `numbers` (beta1, beta2, eps, weight_decay) of its group. Empty, and
# nothing is done, if any of `watched` has moved. Where gradients are, `locate` of the library's module has written in
# the plan. `like` is any tensor on their device.
_BEGIN = "(Tensor like, Tensor(a!) plan, Tensor watched, Tensor[] lr, float[] numbers, float max_norm) -> Tensor"
# adamw_step for parameters [first, first + count) of the plan, after adamw_begin.
_ADVANCE = "(Tensor plan, Tensor begun, int first, int count, int seed, float ema_decay, int ema_every) -> Tensor"
# fp32 [n, 7]: `reference.Scalars` for every step number; lr is a double on the same device.
_SCALARS = "(Tensor steps, Tensor lr, float beta1, float beta2, float eps, float weight_decay) -> Tensor"


def _step_fake(weights: list[Tensor], *_: object) -> Tensor:
    return weights[0].new_empty(65, dtype=torch.int64)


def _squares_fake(gradients: list[Tensor]) -> Tensor:
    return gradients[0].new_empty(34, dtype=torch.int64)


def _plan_fake(weights: list[Tensor], *_: object) -> Tensor:
    return torch.empty(len(weights), 15, dtype=torch.int64, device="cpu")


def _watch_fake(tensors: list[Tensor]) -> Tensor:  # noqa: ARG001
    return torch.empty(48, dtype=torch.uint8, device="cpu")


def _begin_fake(like: Tensor, plan: Tensor, *_: object) -> Tensor:
    count = plan.shape[0]
    return like.new_empty(38 + count + (7 * count + 1) // 2, dtype=torch.int64)


def _advance_fake(plan: Tensor, begun: Tensor, *_: object) -> Tensor:  # noqa: ARG001
    return begun.new_empty(65)


def _scalars_fake(steps: Tensor, *_: object) -> Tensor:
    return steps.new_empty(steps.numel(), 7, dtype=torch.float32)


for _name, _schema, _fake in (
    ("adamw_step", _STEP, _step_fake),
    ("sums_of_squares", _SQUARES, _squares_fake),
    ("adamw_plan", _PLAN, _plan_fake),
    ("adamw_watch", _WATCH, _watch_fake),
    ("adamw_begin", _BEGIN, _begin_fake),
    ("adamw_advance", _ADVANCE, _advance_fake),
    ("adamw_scalars", _SCALARS, _scalars_fake),
):
    torch.library.define(f"srpo::{_name}", _schema)
    torch.library.register_fake(f"srpo::{_name}", _fake)
