"""Steps inside backward: the bits of a step after it, few gradients alive, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from adamw_cases import LR, MODES, assert_same, everything
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from srpo_kernels.optim import AdamW, StepInBackward, step_in_backward


class Network(nn.Module):
    """A tied layer, a frozen one, dropout, and three checkpointed blocks of two layers."""

    def __init__(self, weights: str = "split32") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tied = nn.Linear(130, 130)
        self.frozen = nn.Linear(130, 130).requires_grad_(False)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(130, 140), nn.GELU(), nn.Dropout(0.2), nn.Linear(140, 130)) for _ in range(3)
        )
        self.unused = nn.Linear(3, 3)
        self.to(torch.float32 if weights == "fp32" else torch.bfloat16)

    def forward(self, x: Tensor, reentrant: bool = False) -> Tensor:
        x = self.frozen(self.tied(x))
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=reentrant)
        return self.tied(x)


def optimizer_of(network: nn.Module, weights: str = "split32", moments: str = "M4", **options: object) -> AdamW:
    first, *rest = network.parameters()
    groups = [{"params": rest}, {"params": [first], "lr": 1e-3}]
    return AdamW(groups, LR, weights=weights, moments=moments, ema_decay=0.9, seed=3, **options)  # type: ignore[arg-type]


def loss_of(network: nn.Module, number: int, scale: float = 1.0) -> Tensor:
    x = torch.randn(8, 130, generator=torch.Generator().manual_seed(number))
    return scale * network(x.to(next(network.parameters()).dtype)).float().square().mean()


def twins(weights: str = "split32", moments: str = "M4", **options: object) -> tuple[Network, AdamW, Network, AdamW]:
    """A network and optimizer to step in backward, and such to step afterwards."""
    networks = Network(weights), Network(weights)
    one, other = (optimizer_of(network, weights, moments, **options) for network in networks)
    return networks[0], one, networks[1], other


def plain_step(network: nn.Module, optimizer: AdamW, number: int, scale: float = 1.0) -> Tensor:
    torch.manual_seed(number)
    loss = loss_of(network, number, scale)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def assert_alike(one: AdamW, other: AdamW) -> None:
    assert_same(everything(one), everything(other))
    assert one.telemetry.keys() == other.telemetry.keys()
    assert_same(list(one.telemetry.values()), list(other.telemetry.values()))


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("weights", "moments"), MODES)
def test_release_has_the_bits_of_a_step(weights: str, moments: str, grouped: bool) -> None:
    network, optimizer, alone, plain = twins(weights, moments)
    schedulers = [torch.optim.lr_scheduler.StepLR(each, 1, 0.5) for each in (optimizer, plain)]
    with step_in_backward(optimizer, blocks=network.blocks if grouped else ()):
        for number in range(3):
            torch.manual_seed(number)
            loss = loss_of(network, number)
            loss.backward()
            optimizer.step()
            assert torch.equal(loss, plain_step(alone, plain, number))
            assert_alike(optimizer, plain)
            for scheduler in schedulers:
                scheduler.step()
    plain_step(network, optimizer, 3)  # the handle is gone
    plain_step(alone, plain, 3)
    assert_alike(optimizer, plain)
    assert len(optimizer.state) == 14  # not the frozen and the unused ones


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("weights", "moments"), MODES)
def test_two_passes_have_the_bits_of_a_clipped_step(weights: str, moments: str, grouped: bool) -> None:
    network, optimizer, alone, plain = twins(weights, moments, max_grad_norm=1e-3)
    handle = step_in_backward(optimizer, "two_pass", blocks=network.blocks if grouped else ())
    for number in range(3):
        torch.manual_seed(number)
        loss = handle.backward(lambda number=number: loss_of(network, number))
        state = torch.get_rng_state()
        optimizer.step()
        assert torch.equal(loss, plain_step(alone, plain, number))
        assert torch.equal(state, torch.get_rng_state())  # as after one pass
        assert not loss.requires_grad
        assert optimizer.telemetry["grad_norm"] > 1e-3  # clipped
        assert_alike(optimizer, plain)
    handle.remove()


def live_gradients(network: nn.Module) -> tuple[list[int], list[torch.utils.hooks.RemovableHandle]]:
    """How many gradients were alive whenever one came; to be called before the handle is made."""
    counts: list[int] = []
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]

    def count(_: Tensor) -> None:
        counts.append(sum(parameter.grad is not None for parameter in trained))

    return counts, [parameter.register_post_accumulate_grad_hook(count) for parameter in trained]


@pytest.mark.parametrize("clip", ["none", "previous", "two_pass"])
def test_gradients_of_one_block_are_alive(clip: str) -> None:
    network = Network()
    optimizer = optimizer_of(network, max_grad_norm=None if clip == "none" else 1.0)
    counts, _ = live_gradients(network)
    loss_of(network, 0).backward()
    assert max(counts) == 14
    optimizer.zero_grad()
    for blocks, most in (((), 1), (network.blocks, 4)):
        counts.clear()
        with step_in_backward(optimizer, clip, blocks=blocks) as handle:  # type: ignore[arg-type]
            if clip == "two_pass":
                handle.backward(lambda: loss_of(network, 0))
            else:
                loss_of(network, 0).backward()
            optimizer.step()
        assert len(counts) == (28 if clip == "two_pass" else 14)
        assert max(counts) == most


def test_a_block_takes_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network()
    optimizer = optimizer_of(network)
    calls: list[int] = []
    advance = optimizer._advance
    monkeypatch.setattr(
        optimizer, "_advance", lambda work, *rest: calls.append(len(work[0][1])) or advance(work, *rest)
    )
    with step_in_backward(optimizer, blocks=network.blocks):
        loss_of(network, 0).backward()
        optimizer.step()
    assert sorted(calls) == [1, 1, 4, 4, 4]


def test_parameters_without_all_of_their_blocks_gradients_are_stepped_at_the_end() -> None:
    network, optimizer, alone, plain = twins()
    with step_in_backward(optimizer, blocks=[[*network.parameters()]]):  # the unused layer gets none
        network.frozen.requires_grad_(True)  # not hooked
        alone.frozen.requires_grad_(True)
        torch.manual_seed(0)
        loss_of(network, 0).backward()
        optimizer.step()
        plain_step(alone, plain, 0)
        assert_alike(optimizer, plain)
        network.blocks[0][0].weight.grad = torch.ones_like(network.blocks[0][0].weight)  # set by hand
        alone.blocks[0][0].weight.grad = torch.ones_like(network.blocks[0][0].weight)
        optimizer.step()
        plain.step()
        assert_alike(optimizer, plain)


def test_gradients_outside_the_hooks_count_in_two_passes() -> None:
    network, optimizer, alone, plain = twins(max_grad_norm=1e-3)
    with step_in_backward(optimizer, "two_pass", blocks=[[*network.parameters()]]) as handle:
        for each in (network, alone):
            each.frozen.requires_grad_(True)
        torch.manual_seed(0)
        handle.backward(lambda: loss_of(network, 0))
        optimizer.step()
        plain_step(alone, plain, 0)
        assert_alike(optimizer, plain)


# --- clip="previous" --------------------------------------------------------------------------


def steps_with_previous(optimizer: AdamW, network: nn.Module, scales: list[float]) -> Iterator[Tensor]:
    """Norms of the gradients as they entered the moments, of every step: m = 0.1 g' with betas (0.9, ...) reset."""
    for number, scale in enumerate(scales):
        for state in optimizer.state.values():
            state["exp_avg"].zero_()
        torch.manual_seed(number)
        loss_of(network, number, scale).backward()
        optimizer.step()
        yield torch.stack([state["exp_avg"].double().norm() / 0.1 for state in optimizer.state.values()]).norm()


def test_previous_clips_by_the_last_norm() -> None:
    network = Network("fp32")
    optimizer = optimizer_of(network, "fp32", "fp32", max_grad_norm=1e-3)
    with step_in_backward(optimizer, "previous", blocks=network.blocks):
        norms, entered = [], []
        for norm in steps_with_previous(optimizer, network, [1.0, 0.1, 1.0, 1e-6]):
            norms.append(optimizer.telemetry["grad_norm"].item())
            entered.append(norm.item())
    assert norms[0] > 5 * norms[1] > 1e-3
    assert 1e-3 <= entered[0] < 2e-3  # the first step by what has come so far
    assert entered[1] == pytest.approx(1e-3 * norms[1] / norms[0], rel=1e-3)  # by the last norm
    assert 1e-3 <= entered[2] < 2e-3  # a peak: by what has come so far
    assert entered[3] == pytest.approx(norms[3] * 1e-3 / norms[2], rel=1e-3)


@pytest.mark.parametrize("clip", ["none", "previous", "two_pass"])
def test_gradients_that_are_not_finite(clip: str) -> None:
    """A block keeps its bytes and its count; with two passes everything does."""
    network = Network()
    optimizer = optimizer_of(network, max_grad_norm=None if clip == "none" else 1.0)

    def loss(number: int) -> Tensor:
        # The first block's output weight gets a NaN, and nothing before it.
        broken = network.blocks[0][3].weight
        return loss_of(network, number) + (broken[0, 0].float() * torch.tensor(torch.nan if number == 1 else 0.0))

    with step_in_backward(optimizer, clip, blocks=network.blocks) as handle:  # type: ignore[arg-type]
        for number in range(3):
            before = {parameter: parameter.detach().clone() for parameter in network.parameters()}
            torch.manual_seed(number)
            if clip == "two_pass":
                handle.backward(lambda number=number: loss(number))
            else:
                loss(number).backward()
            optimizer.step()
            assert optimizer.telemetry["grad_norm"].isnan() == (number == 1)
            assert optimizer.telemetry["nonfinite"] == (number == 1)
            if number == 1:
                for name, parameter in network.named_parameters():
                    broken = name.startswith("blocks.0") or clip == "two_pass"
                    if parameter in optimizer.state:
                        assert optimizer.state[parameter]["step"] == (1 if broken else 2)
                        assert not broken or torch.equal(parameter, before[parameter])
        assert optimizer.state[network.blocks[0][3].weight]["step"] == 2
        assert all(parameter.isfinite().all() for parameter in network.parameters())


# --- what is refused --------------------------------------------------------------------------


def test_a_second_gradient_in_a_step_is_refused() -> None:
    network = Network()
    optimizer = optimizer_of(network)
    with step_in_backward(optimizer):
        loss_of(network, 0).backward()
        with pytest.raises(RuntimeError, match=r"parameter \d+ of group \d got a second gradient before optimizer"):
            loss_of(network, 1).backward()
        optimizer.step()
        loss_of(network, 1).backward()
        optimizer.step()
        with pytest.raises(RuntimeError, match="without a gradient since the last step"):
            optimizer.step()


def test_reentrant_checkpointing_of_a_tied_layer_is_refused() -> None:
    network = Network()
    optimizer = optimizer_of(network)
    x = torch.ones(2, 130, dtype=torch.bfloat16, requires_grad=True)
    with step_in_backward(optimizer):
        network(x, reentrant=True).float().sum().backward()  # each of its layers is used once
        optimizer.step()
        twice = checkpoint(network.tied, checkpoint(network.tied, x, use_reentrant=True), use_reentrant=True)
        with pytest.raises(RuntimeError, match="second gradient"):
            twice.float().sum().backward()


def test_backward_and_the_closure() -> None:
    network = Network()
    optimizer = optimizer_of(network, max_grad_norm=1.0)
    with step_in_backward(optimizer, "previous") as handle, pytest.raises(RuntimeError, match='not "previous"'):
        handle.backward(lambda: loss_of(network, 0))
    with step_in_backward(optimizer, "two_pass") as handle:
        with pytest.raises(RuntimeError, match=r"call handle\.backward\(closure\), not backward"):
            loss_of(network, 0).backward()
        with pytest.raises(RuntimeError, match="gradients are left of before"):
            handle.backward(lambda: loss_of(network, 0))
        optimizer.zero_grad()
        with pytest.raises(TypeError, match="closure must return a loss"):
            handle.backward(lambda: 1.0)  # type: ignore[arg-type,return-value]

        def broken() -> Tensor:
            raise KeyError("data")

        with pytest.raises(KeyError):
            handle.backward(broken)
        before = everything(optimizer)
        handle.backward(lambda: loss_of(network, 0))
        with pytest.raises(RuntimeError, match="gradients are left of before"):
            handle.backward(lambda: loss_of(network, 0))
        optimizer.step()
        assert len(everything(optimizer)) > len(before)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda _: step_in_backward(torch.optim.SGD([nn.Parameter(torch.ones(1))])), TypeError, "optimizer must be"),
        (
            lambda o: step_in_backward(o, "exact"),
            ValueError,
            "clip must be one of none, previous, two_pass, got 'exact'",
        ),
        (lambda o: step_in_backward(o, "previous"), ValueError, "clip='previous' does not go with max_grad_norm=None"),
        (
            lambda o: step_in_backward(o, blocks=[[1]]),
            TypeError,
            r"blocks\[0\] must be a module or a list of parameters",
        ),
        (
            lambda o: step_in_backward(o, blocks=[torch.ones(2, 2)]),
            TypeError,
            r"blocks\[0\] must be a module or a list",
        ),
        (lambda o: step_in_backward(o, blocks=[3]), TypeError, r"blocks\[0\] must be a module or a list of parameters"),
    ],
)
def test_arguments_are_checked(call: Callable[[AdamW], StepInBackward], error: type, message: str) -> None:
    optimizer = optimizer_of(Network())
    with pytest.raises(error, match=message):
        call(optimizer)
    step_in_backward(optimizer).remove()  # nothing was left behind
    optimizer.max_grad_norm = 1.0
    with pytest.raises(ValueError, match=r"clip='none' does not go with max_grad_norm=1\.0"):
        step_in_backward(optimizer)


def test_one_handle_at_a_time_and_copies_have_none() -> None:
    optimizer = optimizer_of(Network())
    handle = step_in_backward(optimizer)
    with pytest.raises(RuntimeError, match="steps in backward already"):
        step_in_backward(optimizer)
    twin = copy.deepcopy(optimizer)
    assert twin.step() is None  # no gradients, nothing to do
    handle.remove()
    handle.remove()
    step_in_backward(optimizer).remove()
