"""Operators on shapes alone, and every kernel they launch compiled for GPUs that are not there."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

import srpo_kernels.ops.fp8_linear  # noqa: F401  (defines torch.ops.srpo.fp8_linear)
from benchmarks.case import Case
from benchmarks.static.unit import Unit, libraries, triton_tools
from srpo_kernels.testing.compile_only import Compiled, compile_specialization
from srpo_kernels.testing.record import KernelLaunch, Recorder
from srpo_kernels.testing.specialization import Specialization
from srpo_kernels.testing.trace import Launch

__all__ = ["Recording", "kernel_figures", "kernel_units", "op_figures", "op_units", "record"]


@register_flop_formula(torch.ops.srpo.fp8_linear)
def _fp8_linear(x: list[int], _scale: Any, weight: list[int], *_: Any, **__: Any) -> int:
    return 2 * x[0] * x[1] * weight[0]


@dataclass(frozen=True)
class Recording:
    """What one case does, by phase."""

    case: Case
    launches: dict[str, list[Launch]]
    flops: dict[str, int]  # of matrix products
    saved: int  # bytes that backward needs, inputs among them

    def codes(self) -> Iterator[tuple[str, Specialization]]:
        """Kernels, each with its name here."""
        for phase, launches in self.launches.items():
            numbers: Counter[str] = Counter()
            for code in dict.fromkeys(launch.code for launch in launches if isinstance(launch, KernelLaunch)):
                numbers[code.name] += 1
                again = f" #{numbers[code.name]}" if numbers[code.name] > 1 else ""
                yield f"{self.case.op}.{phase}[{self.case.shape}] {code.name}{again}", code


def record(case: Case) -> Recording:
    """Runs a case whose inputs are on the meta device twice, so that launches which fill caches do not count."""
    _run(case)
    return _run(case)


def _run(case: Case) -> Recording:
    inputs = {name: tensor.detach().requires_grad_(name in case.differentiable) for name, tensor in case.make().items()}
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    launches, flops = {}, {}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with FlopCounterMode(display=False) as counter, Recorder() as recorder:
            result = case.ours(**inputs)
        launches["forward"], flops["forward"] = recorder.launches, counter.get_total_flops()
    if case.differentiable:
        outputs = (result,) if isinstance(result, Tensor) else result
        upstream = [torch.empty_like(output) for output in outputs]
        with FlopCounterMode(display=False) as counter, Recorder() as recorder:
            torch.autograd.grad(outputs, [inputs[name] for name in case.differentiable], upstream)
        launches["backward"], flops["backward"] = recorder.launches, counter.get_total_flops()
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in saved}
    return Recording(case, launches, flops, sum(storages.values()))


def op_units(recordings: Iterable[Recording]) -> Iterator[Unit]:
    for recording in recordings:
        name = f"{recording.case.op}[{recording.case.shape}]"
        yield Unit(name, "model", libraries(), partial(op_figures, recording))


def op_figures(recording: Recording) -> dict[str, Any]:
    case, figures = recording.case, {"saved_bytes": recording.saved}
    floors = {"forward": case.forward_elements, "backward": case.backward_elements}
    for phase, launches in recording.launches.items():
        figures[f"{phase}_launches"] = len(launches)
        figures[f"{phase}_bytes"] = sum(launch.nbytes for launch in launches)
        figures[f"{phase}_flops"] = recording.flops[phase]
        figures[f"{phase}_floor_bytes"] = int(floors[phase] * case.dtype.itemsize)
    return figures


def kernel_units(recordings: Iterable[Recording], architectures: Iterable[int]) -> Iterator[Unit]:
    """Every kernel once, named by the first case that launches it so."""
    codes: dict[Specialization, str] = {}
    for recording in recordings:
        for name, code in recording.codes():
            codes.setdefault(code, name)
    for architecture in architectures:
        for code, name in codes.items():
            measure = partial(kernel_figures, code, architecture)
            yield Unit(name, f"sm{architecture}", triton_tools(architecture), measure)


def kernel_figures(code: Specialization, architecture: int) -> dict[str, Any]:
    began = time.perf_counter()
    made = compile_specialization(code, architecture)
    return {**code_figures(made), "compile_s": round(time.perf_counter() - began, 2)}


def code_figures(made: Compiled) -> dict[str, Any]:
    """Of a compiled kernel. The time to compile, and the size, are told and not pinned."""
    stores, loads = made.spills
    return {
        "regs": made.registers,
        "stack": made.stack,
        "spill_st": stores,
        "spill_ld": loads,
        "smem": made.shared,
        "occupancy": made.occupancy,
        "ctas_per_sm": made.blocks,
        "load_width": made.widest_load(),
        "store_width": made.widest_store(),
        "narrow_loads": made.narrow_loads(),
        "narrow_stores": made.narrow_stores(),
        "warnings": len(made.warnings),
        "sass": made.instructions.total(),
        **_mix(made.instructions),
        "cubin_bytes": made.cubin_size,
        **({"messages": list(made.warnings)} if made.warnings else {}),
    }


def _mix(instructions: Counter[str]) -> dict[str, int]:
    """Instructions that cost most or tell most, by kind: global accesses by bits, products of tensor cores as MMA."""
    mix: Counter[str] = Counter()
    for name, count in instructions.items():
        kind = name.split(".")[0]
        if kind in ("LDG", "STG"):
            bits = re.search(r"\.[US]?(8|16|64|128|256)\b", name)
            kind = f"{kind}.{bits[1] if bits else 32}"
        elif "MMA" in kind:
            kind = "MMA"
        elif kind in ("ATOMG", "RED", "REDG"):
            kind = "ATOM"
        elif kind not in ("LDGSTS", "LDL", "STL", "LDS", "STS", "BAR", "MUFU", "SHFL", "ATOM"):
            if not kind.startswith("FFMA"):
                continue
            kind = "FFMA"
        mix[kind] += count
    return dict(sorted(mix.items()))
