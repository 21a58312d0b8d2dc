"""The extension's step inside `AdamW` has the bits of the Python path, which machines without it take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from srpo_kernels.extension import available
from srpo_kernels.optim import AdamW, adamw, norm

needs_extension = pytest.mark.skipif(not available("cpu"), reason="srpo_kernels._C is not built")


def run(weights: str, moments: str, strided: bool) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Parameters, states and telemetry after three steps, the second of which has a NaN."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if weights == "fp32" else torch.bfloat16
    shapes = [(160, 130), (7,), (130, 3, 50), (1, 20000), (0, 4), (2, 3)]
    parameters = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    if strided:
        parameters.append(nn.Parameter(torch.randn(150, 120, generator=generator).to(dtype).T))
    optimizer = AdamW(
        parameters, lr=1e-3, weights=weights, moments=moments, max_grad_norm=0.1, ema_decay=0.9, ema_every=2, seed=5
    )
    for number in range(3):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype) * 1e-3
        if number == 1:
            parameters[0].grad[0, 0] = torch.nan
        optimizer.step()
    states = [optimizer.state[parameter] for parameter in parameters]
    found = [parameter.detach() for parameter in parameters] + [t for state in states for t in state.values()]
    return found, optimizer.telemetry


@needs_extension
@pytest.mark.parametrize("strided", [False, True], ids=["prepared", "strided"])
@pytest.mark.parametrize("weights", ["fp32", "split32", "split24", "bf16_sr"])
@pytest.mark.parametrize("moments", ["fp32", "M4", "M3", "M2"])
def test_with_and_without_the_extension(
    weights: str, moments: str, strided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, telemetry = run(weights, moments, strided)
    monkeypatch.setattr(adamw, "takes", lambda _: False)
    monkeypatch.setattr(adamw, "can_prepare", lambda _: False)
    monkeypatch.setattr(norm, "available", lambda _: False)
    plain, expected = run(weights, moments, strided)
    assert len(compiled) == len(plain)
    for a, b in zip(compiled, plain, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    assert telemetry.keys() == expected.keys()
    for name in ("update_norm", "weight_norm"):  # whose chunks are added in any order
        torch.testing.assert_close(telemetry.pop(name), expected.pop(name), rtol=1e-5, atol=0)
    assert all(torch.equal(telemetry[name], expected[name]) for name in expected)


@needs_extension
def test_the_extension_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw, "advance", lambda *_: pytest.fail("stepped in Python"))
    parameter = nn.Parameter(torch.ones(3, 4, dtype=torch.bfloat16))
    parameter.grad = torch.ones_like(parameter)
    version = parameter._version
    AdamW([parameter], lr=0.1).step()
    assert parameter._version > version  # autograd notices
    assert (parameter != 1).any()
