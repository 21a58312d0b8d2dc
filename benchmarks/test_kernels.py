"""Operators at FLUX shapes for ``pytest benchmarks``; on the CPU tiny ones, once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from benchmarks.accuracy import accuracy
from benchmarks.case import Case
from benchmarks.cases import cases
from benchmarks.kernels import Plan, call_of, planned_of
from benchmarks.schema import Measurement
from benchmarks.timing import Timed, has_clock, rotation

_PLAN = Plan(device="cuda" if has_clock() else "cpu", small=not has_clock())
_ALL = [(case, planned) for case in cases(_PLAN.device, small=_PLAN.small) for planned in planned_of(case, _PLAN)]


@pytest.mark.parametrize(("case", "planned"), _ALL, ids=[planned.id for _, planned in _ALL])
def test_kernel(case: Case, planned: Measurement, gpu_benchmark: Callable[..., Timed]) -> None:
    torch.manual_seed(0)
    first = case.make()
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in first.values())
    copies = rotation(nbytes).copies if has_clock() else 1
    inputs = [first, *(case.make() for _ in range(copies - 1))]
    timed = gpu_benchmark(call_of(case, planned), inputs, planned.bytes, planned.flops)
    if planned.form == "ours":
        errors = accuracy(case, call_of(case, replace(planned, form="eager")), timed)
        assert errors is None or errors["error"] <= errors["allowed"]
