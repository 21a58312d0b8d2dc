"""A step of FLUX.1-dev's 1160 parameters is three launches on a GPU, whatever else it does; counted without one."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.optimizer_gpu import shapes
from srpo_kernels.extension import available
from srpo_kernels.optim import AdamW, adamw, step_in_backward
from srpo_kernels.optim.adamw import _alike
from srpo_kernels.optim.work import with_gradients, work_for

CSRC = Path(__file__).parents[2] / "csrc"
#: Operators that launch nothing: views, and memory.
SILENT = {
    "_record_function_enter_new",
    "_record_function_exit",
    "alias",
    "as_strided",
    "detach",
    "empty",
    "lift_fresh",
    "new_empty",
    "select",
    "slice",
    "split",
    "split_with_sizes",
    "view",
}


def groups(count: int, parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    """One group, or one that decays and one that does not."""
    if count == 1:
        return [{"params": parameters}]
    return [
        {"params": [parameter for parameter in parameters if parameter.ndim > 1]},
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
    ]


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
@pytest.mark.parametrize("count", [1, 2])
def test_flux_takes_three_launches(count: int, tmp_path: Path) -> None:
    """Lists as `AdamW` makes them, launches as the planner packs them."""
    parameters = [nn.Parameter(torch.empty(shape, dtype=torch.bfloat16, device="meta")) for shape in shapes()]
    assert len(parameters) == 1160
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer = AdamW(groups(count, parameters), lr=5e-6, max_grad_norm=0.1)
    work = work_for(optimizer, with_gradients(optimizer))
    lists = [members for _, group in work for members in _alike(group)]
    lines = [
        f"{gradient.shape[0]} {math.prod(gradient.shape[1:])} {number}"
        for number, members in enumerate(lists)
        for _, gradient in members
    ]
    binary = tmp_path / "launches"
    subprocess.run(["g++", "-std=c++17", "-O1", CSRC / "tests/launches.cpp", "-o", binary], check=True)
    run = subprocess.run([binary], input="\n".join(lines), capture_output=True, text=True, check=True)
    launches = [int(found) for found in run.stdout.split()]
    assert len(launches) == 1 + len(lists)
    assert sum(launches) <= 3


class Called(TorchDispatchMode):
    """Collects the names of the operators that are called, and counts the tensors that they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.tensors = 0  # among their arguments

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function.overloadpacket.__name__)
        self.tensors += sum(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs)))
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif(not available("cpu"), reason="srpo_kernels._C is not built")
@pytest.mark.parametrize("count", [1, 2])
def test_a_step_launches_nothing_else(count: int) -> None:
    """The extension's operators are called once to begin and once for every list, and no other one computes."""
    parameters = [
        nn.Parameter(torch.ones(shape, dtype=torch.bfloat16)) for shape in [(130, 128), (5,), (256, 64), (9,)]
    ]
    optimizer = AdamW(groups(count, parameters), lr=1e-3, max_grad_norm=0.1, ema_decay=0.9)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with Called() as called:
        optimizer.step()
    computing = [name for name in called.names if name not in SILENT]
    assert computing == ["adamw_begin", "adamw_advance", "adamw_advance"]
    assert [int(optimizer.state[parameter]["step"]) for parameter in parameters] == [2] * 4


@pytest.mark.skipif(not available("cpu"), reason="srpo_kernels._C is not built")
@pytest.mark.parametrize("set_to_none", [True, False])
def test_what_the_host_does_is_one_for_all_tensors(set_to_none: bool) -> None:
    """A step calls as many functions and passes operators as many tensors for 4 parameters as for 400."""
    counts = []
    for number in (4, 400):
        parameters = [nn.Parameter(torch.ones(3, dtype=torch.bfloat16)) for _ in range(number)]
        optimizer = AdamW(parameters, lr=1e-3, max_grad_norm=0.1)
        calls: list[str] = []
        for _ in range(3):
            optimizer.zero_grad(set_to_none)
            sum(parameter.float().sum() for parameter in parameters).backward()
            calls.clear()
            with Called() as called:
                sys.setprofile(lambda _, event, __, calls=calls: calls.append(event))
                optimizer.step()
                sys.setprofile(None)
        counts.append((calls.count("call"), calls.count("c_call"), called.tensors))
    assert counts[0] == counts[1]
    assert counts[0][2] <= 8


@pytest.mark.parametrize("path", ["prepared", "lists", "plain", "hosted", "in backward"])
def test_nothing_waits_for_the_device(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On no path is a number read on the host."""
    if path in ("lists", "plain"):
        monkeypatch.setattr(adamw, "can_prepare", lambda _: False)
    if path == "plain":
        monkeypatch.setattr(adamw, "takes", lambda _: False)
    parameters = [nn.Parameter(torch.ones(shape, dtype=torch.bfloat16)) for shape in [(130, 128), (5,), (9,)]]
    optimizer = AdamW(
        parameters,
        lr=torch.tensor(1e-3),
        max_grad_norm=0.1,
        ema_decay=0.9,
        offload="states" if path == "hosted" else "none",
    )
    if path == "in backward":
        step_in_backward(optimizer, "previous")
    for _ in range(2):
        with Called() as called:
            sum(parameter.float().square().sum() for parameter in parameters).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert optimizer.telemetry.keys() >= {"grad_norm", "changed"}
        assert "sum" in called.names
        assert "_local_scalar_dense" not in called.names
