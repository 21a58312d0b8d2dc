"""Operator tests run three ways: on the CPU reference, on the kernels in Triton's interpreter, on the kernels on a GPU.

``TRITON_INTERPRET=1 pytest tests/ops`` is the second; `make gpu` runs the third.
"""

from __future__ import annotations

import pytest
import torch

from srpo_kernels.ops._register import interpreting


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        gpu = pytest.param("cuda", marks=pytest.mark.gpu)
        metafunc.parametrize("device", ["cpu", gpu] if torch.cuda.is_available() else ["cpu"])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if interpreting():  # what is interpreted cannot be compiled
        items[:] = [item for item in items if item.get_closest_marker("compile_only") is None]
