"""AdamW under accelerate, and with the parameters of a LoRA."""

from __future__ import annotations

import io

import pytest
import torch
from adamw_cases import assert_same, everything
from torch import Tensor, nn

from srpo_kernels.extension import available
from srpo_kernels.optim import AdamW, adamw

LAYERS = 120
needs_extension = pytest.mark.skipif(not available("cpu"), reason="srpo_kernels._C is not built")


class LoRA(nn.Module):
    """Frozen layers with two trained matrices each, as peft adds them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(24, 24).requires_grad_(False) for _ in range(LAYERS))
        self.down = nn.ModuleList(nn.Linear(24, 4, bias=False) for _ in range(LAYERS))
        self.up = nn.ModuleList(nn.Linear(4, 24, bias=False) for _ in range(LAYERS))
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        for layer, down, up in zip(self.layers, self.down, self.up, strict=True):
            x = torch.tanh(layer(x) + up(down(x)))
        return x


@pytest.mark.parametrize("weights", ["fp32", "split32"])
@pytest.mark.parametrize("prepared", [False, pytest.param(True, marks=needs_extension)])
def test_hundreds_of_small_parameters_take_one_call(
    weights: str, prepared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = LoRA(torch.float32 if weights == "fp32" else torch.bfloat16)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = AdamW(trained, 3e-4, weights=weights, moments="M2", max_grad_norm=1.0)
    calls = []
    plain = adamw.advance

    def counted(group, members, *rest):
        calls.append(len(members))
        return plain(group, members, *rest)

    if not prepared:
        monkeypatch.setattr(adamw, "advance", counted)
        monkeypatch.setattr(adamw, "takes", lambda _: False)
        monkeypatch.setattr(adamw, "can_prepare", lambda _: False)
    before = [parameter.detach().clone() for parameter in trained]
    for _ in range(2):
        x = network(torch.ones(2, 24, dtype=trained[0].dtype))
        x.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    if prepared:
        assert optimizer._prepared is not None
        assert [count for _, _, count in optimizer._prepared._lists] == [2 * LAYERS]
    else:
        assert calls == [2 * LAYERS] * 2
    masters = optimizer.master_weights()
    assert all(not torch.equal(master, old.float()) for master, old in zip(masters, before, strict=True))
    assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {torch.float32}


@pytest.mark.parametrize("rate", ["float", "tensor"])
def test_accelerate_trains(rate: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(0)

    def made() -> tuple[nn.Module, AdamW, torch.optim.lr_scheduler.LRScheduler]:
        network = nn.Linear(130, 140).bfloat16()
        optimizer = AdamW(network.parameters(), torch.tensor(1e-3) if rate == "tensor" else 1e-3, max_grad_norm=0.1)
        return network, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    network, optimizer, scheduler = made()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    network, wrapped, scheduler = accelerator.prepare(network, optimizer, scheduler)
    assert wrapped.optimizer is optimizer
    for number in range(4):
        x = torch.randn(8, 130, generator=torch.Generator().manual_seed(number)).bfloat16()
        with accelerator.accumulate(network):
            accelerator.backward(network(x).float().square().mean())
            wrapped.step()
            scheduler.step()
            wrapped.zero_grad()
    parameter = optimizer.param_groups[0]["params"][0]
    assert optimizer.state[parameter]["step"] == 2  # two batches to a step
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(1e-3 / 3)
    assert optimizer.telemetry["grad_norm"] > 0

    stream = io.BytesIO()
    torch.save({"model": network.state_dict(), "optimizer": wrapped.state_dict()}, stream)
    stream.seek(0)
    saved = torch.load(stream, weights_only=True)
    other, again, _ = made()
    other, again = accelerator.prepare(other, again)
    other.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    assert_same(everything(again.optimizer), everything(optimizer))
