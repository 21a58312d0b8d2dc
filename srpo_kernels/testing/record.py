"""Every kernel that code launches, down to the Triton kernels inside operators: without a GPU, and running none."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor

from srpo_kernels.testing.specialization import Specialization, specialize
from srpo_kernels.testing.trace import Launch, Trace

__all__ = ["KernelLaunch", "Recorder"]

_CUDA = torch._C.DispatchKey.CUDA
#: Ask the device which library to call; one launch on a GPU.
_OPAQUE = frozenset({"srpo::fp8_linear"})


_AUTOCAST = torch.autocast


@dataclass(frozen=True)
class KernelLaunch(Launch):
    """One launch of a Triton kernel."""

    code: Specialization


class Recorder(Trace):
    """Within the block, operators with a CUDA kernel of their own run it on shapes alone; launches are recorded.

    For meta and fake tensors. Operators of any library are looked into; Triton kernels launched outside operators are
    recorded, too. A Triton launch moves the bytes of its distinct tensor arguments: what a kernel reads twice counts
    once. Not for several threads at once, as Triton's launcher is replaced for all of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._patches = [
            patch.object(triton.JITFunction, "run", self._recording()),
            patch.object(torch, "autocast", _autocast),
        ]
        self._depth = 0

    def __enter__(self) -> Recorder:
        if not self._depth:
            for each in self._patches:
                each.start()
        self._depth += 1
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._depth -= 1
        if not self._depth:
            for each in self._patches:
                each.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.startswith(("aten::", "prim::")) or name in _OPAQUE or not func.has_kernel_for_dispatch_key(_CUDA):
            return super().__torch_dispatch__(func, types, args, kwargs)
        with self:
            return func._op_dk(_CUDA, *args, **(kwargs or {}))

    def _recording(self) -> Any:
        def run(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
            del grid, warmup
            code = specialize(kernel, args, kwargs)
            tensors = {
                (t.untyped_storage()._cdata, t.storage_offset(), t.shape): t.nbytes
                for t in (*args, *kwargs.values())
                if isinstance(t, Tensor)
            }
            self.launches.append(KernelLaunch(code.name, sum(tensors.values()), code))

        return run


def _autocast(device_type: str, *args: Any, **kwargs: Any) -> AbstractContextManager[Any]:
    """PyTorch's, which knows no meta device."""
    return nullcontext() if device_type == "meta" else _AUTOCAST(device_type, *args, **kwargs)
