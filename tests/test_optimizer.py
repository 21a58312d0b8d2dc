"""The `optimizer` section's offload: same bits, less reserved on the device, checkpoints that either kind loads."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from srpo.objective import SRPOConfig
from srpo.optimizer import OptimizerConfig, load_optimizer, take_step
from srpo.saving import load_optimizer_tensors, optimizer_tensors


def _train(offload: str, steps: int = 2) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    parameter = nn.Parameter(torch.full((130, 200), 0.5, dtype=torch.bfloat16))
    config = OptimizerConfig(offload=offload)  # type: ignore[arg-type]
    optimizer = load_optimizer(config, SRPOConfig(), [parameter], precision="bf16", seed=0)
    for number in range(steps):
        parameter.grad = torch.randn(130, 200, generator=torch.Generator().manual_seed(number)).bfloat16()
        take_step(optimizer, 0.1)
    return parameter, optimizer


def test_offloaded_states_have_the_same_bits_and_checkpoints() -> None:
    (weight, optimizer), (other, hosted) = _train("none"), _train("states")
    assert torch.equal(weight, other)
    saved = optimizer_tensors(hosted, ["weight"])
    for name, tensor in optimizer_tensors(optimizer, ["weight"]).items():
        assert torch.equal(tensor.view(-1).view(torch.uint8), saved[name].view(-1).view(torch.uint8))
    resumed, again = _train("states", 0)
    load_optimizer_tensors(again, ["weight"], saved)
    with torch.no_grad():
        resumed.copy_(weight)
    for parameter, each in ((weight, optimizer), (resumed, again)):
        parameter.grad = torch.ones_like(parameter)
        take_step(each, 0.1)
    assert torch.equal(weight, resumed)


def test_offloaded_states_are_not_reserved_on_the_device() -> None:
    parameters = [torch.empty(10**6, 10**3, device="meta")]
    plain, hosted = (OptimizerConfig(offload=kind).reserved_bytes(parameters, "bf16") for kind in ("none", "states"))
    assert plain == 10e9
    assert hosted == 4e9 + 256 * 2**20


def test_offload_needs_our_optimizer() -> None:
    with pytest.raises(ValueError, match=r"optimizer\.offload states needs optimizer\.name srpo"):
        OptimizerConfig(name="torch", offload="states")
