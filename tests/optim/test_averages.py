"""Averages in the place of the weights, and the exact weights back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from adamw_cases import LR, MODES, assert_same, everything, parameters, take_steps

from srpo_kernels.optim import AdamW, step_in_backward

SHAPES = ((130, 200), (7,), (), (0, 3))


def _optimizer(weights: str = "split32", moments: str = "M4", **options: object) -> AdamW:
    made = [*parameters(weights, *SHAPES), *parameters(weights, (4, 4))]
    optimizer = AdamW(made, 1e-3, weights=weights, moments=moments, ema_decay=0.5, **options)  # type: ignore[arg-type]
    take_steps(optimizer)
    return optimizer


@pytest.mark.parametrize("offload", ["none", "ema", "states"])
@pytest.mark.parametrize(("weights", "moments"), MODES)
def test_averages_come_and_exact_weights_come_back(weights: str, moments: str, offload: str) -> None:
    optimizer = _optimizer(weights, moments, offload=offload)
    made = optimizer.param_groups[0]["params"]
    before, wanted = everything(optimizer), [x.to(made[0].dtype) for x in optimizer.ema_weights()]
    masters = optimizer.master_weights()
    version = made[0]._version
    with optimizer.average_parameters():
        assert_same([parameter.detach() for parameter in made], wanted)
        assert not torch.equal(made[0], masters[0].to(made[0].dtype))
        assert all(parameter.requires_grad for parameter in made)
    assert made[0]._version > version  # autograd notices
    assert_same(everything(optimizer), before)
    assert_same(optimizer.master_weights(), masters)
    with pytest.raises(KeyError), optimizer.average_parameters():
        raise KeyError("sampling failed")
    assert_same(everything(optimizer), before)
    take_steps(optimizer, 1)


def test_parameters_before_their_first_step_stay() -> None:
    made = parameters("split32", (5, 5), (3,))
    optimizer = AdamW(made, LR, ema_decay=0.9)
    made[0].grad = torch.ones_like(made[0])
    optimizer.step()
    before = made[1].detach().clone()
    with optimizer.average_parameters():
        assert torch.equal(made[1], before)


@pytest.mark.parametrize(
    ("what", "call"),
    [
        ("step", lambda o: o.step()),
        ("master_weights", lambda o: o.master_weights()),
        ("state_dict", lambda o: o.state_dict()),
        ("load_state_dict", lambda o: o.load_state_dict({})),
        ("canonical_state_dict", lambda o: o.canonical_state_dict()),
        ("load_canonical_state_dict", lambda o: o.load_canonical_state_dict({})),
        ("average_parameters", lambda o: o.average_parameters()),
    ],
)
def test_what_needs_the_exact_weights_is_refused_within(what: str, call: Callable[[AdamW], object]) -> None:
    optimizer = _optimizer()
    before = everything(optimizer)
    with optimizer.average_parameters():
        with pytest.raises(RuntimeError, match=f"AdamW: {what} within average_parameters"):
            call(optimizer)
        assert len(optimizer.ema_weights()) == 5
    assert_same(everything(optimizer), before)


def test_a_step_in_backward_is_refused_within() -> None:
    made = parameters("split32", (5, 5))
    optimizer = AdamW(made, LR, ema_decay=0.9)
    with (
        step_in_backward(optimizer),
        optimizer.average_parameters(),
        pytest.raises(RuntimeError, match="step within average_parameters"),
    ):
        made[0].float().sum().backward()


def test_averages_are_needed() -> None:
    optimizer = AdamW(parameters("split32", (3, 3)), LR)
    with (
        pytest.raises(ValueError, match="average_parameters needs ema_decay, which group 0"),
        optimizer.average_parameters(),
    ):
        pass
