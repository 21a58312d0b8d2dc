"""All that has static figures: FLUX's operators, kernels and models, or cases of one's own."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence

from benchmarks.case import Case
from benchmarks.schema import ResultError
from benchmarks.static.cuda import cuda_units
from benchmarks.static.kernels import kernel_units, op_units, record
from benchmarks.static.unit import Unit

__all__ = ["own_cases", "units"]


def units(modules: Sequence[str], architectures: Sequence[int]) -> Iterator[Unit]:
    """Of cases in `modules`, and where none are named of this package's own and of the models.

    Raises `ResultError` when a module cannot be used.
    """
    if modules:
        cases: list[Case] = [case for module in modules for case in own_cases(module)]
    else:
        # Much to import; first, as they take longest.
        from benchmarks.cases import cases as flux_cases
        from benchmarks.static.models import model_units
        from benchmarks.static.optimizer import optimizer_units

        yield from model_units()
        yield from optimizer_units(architectures)
        yield from cuda_units(architectures)
        cases = list(flux_cases("meta"))
    recordings = [record(case) for case in cases]
    yield from kernel_units(recordings, architectures)
    yield from op_units(recordings)


def own_cases(module: str) -> list[Case]:
    """``cases("meta")`` of an importable module."""
    try:
        return list(importlib.import_module(module).cases("meta"))
    except (ImportError, AttributeError) as error:
        raise ResultError(f"--cases {module}: must be a module with a function cases(device): {error}") from error
