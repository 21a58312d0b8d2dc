"""A step that is taken again as it was prepared: the bits of one prepared anew, whatever is changed in between."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from adamw_cases import assert_same, everything
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from srpo_kernels.extension import available
from srpo_kernels.optim import AdamW, step_in_backward
from srpo_kernels.optim.compiled import triton_takes

pytestmark = pytest.mark.skipif(
    not available("cpu") or triton_takes(torch.device("cpu")),
    reason="srpo_kernels._C is not built, or Triton interprets",
)
SHAPES = ((130, 128), (7,), (129, 130), (3, 5))


class Training:
    """A few parameters, in two groups, with the gradients of step number `number`."""

    def __init__(self, *, again: bool, **options: Any) -> None:
        self.again, self.number = again, 0
        generator = torch.Generator().manual_seed(0)
        values = [torch.randn(shape, generator=generator).bfloat16() for shape in SHAPES]
        self.network = nn.ParameterList(map(nn.Parameter, values))
        matrices = [parameter for parameter in self.network if parameter.ndim > 1]
        vectors = [parameter for parameter in self.network if parameter.ndim < 2]
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = AdamW(groups, 1e-3, **{"max_grad_norm": 0.1, "ema_decay": 0.9, **options})
        self.state = self.optimizer.state  # asked for now only, so that steps have to notice what happens to it

    @property
    def parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def gradients(self, *, without: int | None = None, dtype: torch.dtype = torch.bfloat16) -> None:
        generator = torch.Generator().manual_seed(self.number)
        for index, parameter in enumerate(self.parameters):
            gradient = torch.randn(parameter.shape, generator=generator).to(dtype)
            parameter.grad = None
            parameter.grad_dtype = dtype
            parameter.grad = None if index == without else gradient
        self.number += 1

    def step(self, **gradients: Any) -> None:
        self.gradients(**gradients)
        if not self.again:
            self.optimizer._prepared = None
        self.optimizer.step()


def add_a_group(training: Training) -> None:
    training.network.append(nn.Parameter(torch.ones(140, 150).bfloat16()))
    training.optimizer.add_param_group({"params": [training.network[-1]], "lr": 1e-2})


def load(training: Training) -> None:
    saved = copy.deepcopy(training.optimizer.state_dict())
    training.step()
    training.optimizer.load_state_dict(saved)


def load_canonical(training: Training) -> None:
    training.optimizer.load_canonical_state_dict(copy.deepcopy(training.optimizer.canonical_state_dict()))


def move(training: Training) -> None:
    training.network._apply(torch.clone)  # what `.to` does


def replace_a_parameter(training: Training) -> None:
    old = training.optimizer.param_groups[0]["params"][1]
    training.optimizer.param_groups[0]["params"][1] = nn.Parameter(old.detach().clone())


def replace_states(training: Training) -> None:
    for state in training.state.values():
        state.update({name: value.clone() for name, value in state.items()})


def replace_data_of_a_state(training: Training) -> None:
    state = training.state[training.parameters[0]]
    state["exp_avg"].data = state["exp_avg"] * 2


def ask_for_states(training: Training) -> None:
    assert training.optimizer.state is training.state


def forget_a_state(training: Training) -> None:
    del training.state[training.parameters[0]]


def swap_states(training: Training) -> None:
    """Of parameters of one shape."""
    one, other = nn.Parameter(torch.ones(5).bfloat16()), nn.Parameter(torch.zeros(5).bfloat16())
    training.optimizer.add_param_group({"params": [one, other]})
    training.step()
    states = training.state
    states[one], states[other] = states[other], states[one]


def other_numbers(training: Training) -> None:
    first, second = training.optimizer.param_groups
    first.update(lr=torch.tensor(2e-3), betas=(0.8, 0.99), eps=1e-5, weight_decay=0.3)
    second.update(lr=5e-4, ema_decay=0.5, ema_every=2)
    training.optimizer.max_grad_norm, training.optimizer.seed = None, 9


def replace_a_group(training: Training) -> None:
    group = training.optimizer.param_groups[1]
    training.optimizer.param_groups[1] = {**group, "lr": 3e-3, "ema_decay": 0.2}


def step_inside_backward(training: Training) -> None:
    training.optimizer.zero_grad()
    with step_in_backward(training.optimizer, "previous"):
        sum(parameter.float().square().sum() for parameter in training.parameters).backward()
        training.optimizer.step()


#: What is changed, and whether the step then has to be prepared again.
CHANGES: list[tuple[Callable[[Training], Any], bool]] = [
    (add_a_group, True),
    (load, True),
    (load_canonical, True),
    (move, True),
    (replace_a_parameter, True),
    (replace_states, True),
    (replace_data_of_a_state, True),
    (ask_for_states, True),
    (forget_a_state, True),
    (swap_states, True),
    (other_numbers, False),
    (replace_a_group, False),
    (step_inside_backward, True),
    (lambda training: training.step(without=0), True),
    (lambda training: training.step(dtype=torch.float32), True),
    (lambda training: training.optimizer.zero_grad(set_to_none=False), False),
]
NAMES = [change.__name__ for change, _ in CHANGES[:-3]] + ["no gradient", "wide gradients", "zeroed gradients"]


@pytest.mark.parametrize(("change", "anew"), CHANGES, ids=NAMES)
def test_a_change_is_noticed(change: Callable[[Training], Any], anew: bool) -> None:
    both = [Training(again=again) for again in (True, False)]
    for training in both:
        training.step()
        before = training.optimizer._prepared
        training.step()
        assert (training.optimizer._prepared is before) == training.again
        change(training)
        for _ in range(2):
            training.step()
        assert (training.optimizer._prepared is before) == (training.again and not anew)
        before = training.optimizer._prepared
        training.step()
        assert (training.optimizer._prepared is before) == training.again
    one, other = (training.optimizer for training in both)
    assert_same(everything(one), everything(other))
    assert_same(one.ema_weights(), other.ema_weights())
    assert all(torch.equal(one.telemetry[name], other.telemetry[name]) for name in one.telemetry)


def test_averages_may_be_in_place_between_steps() -> None:
    both = [Training(again=again) for again in (True, False)]
    for training in both:
        training.step()
        training.step()
        with training.optimizer.average_parameters(), pytest.raises(RuntimeError, match="within average_parameters"):
            training.step()
        training.step()
    assert_same(everything(both[0].optimizer), everything(both[1].optimizer))


def test_a_gradient_that_is_not_finite_is_skipped_again() -> None:
    training = Training(again=True)
    training.step()
    training.gradients()
    training.parameters[2].grad[0, 0] = torch.nan
    before = everything(training.optimizer)
    training.optimizer.step()
    assert_same(everything(training.optimizer), before)
    assert training.optimizer.telemetry["nonfinite"] == 1
    training.step()
    assert training.optimizer.state[training.parameters[2]]["step"] == 2


def test_states_in_host_memory_are_not_prepared() -> None:
    training = Training(again=True, offload="states")
    training.step()
    assert training.optimizer._prepared is None


def test_sharded_parameters_are_not_prepared(tmp_path: Path) -> None:
    """Nor those of one process; of two, test_adamw_sharded.py compares the bits."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        mesh, plain = init_device_mesh("cpu", (1,)), nn.Parameter(torch.ones(130, 128).bfloat16())
        sharded = nn.Parameter(distribute_tensor(plain.detach().clone(), mesh, [Shard(0)]))
        optimizers = [AdamW([parameter], 1e-3, max_grad_norm=0.1) for parameter in (plain, sharded)]
        for _ in range(2):
            plain.grad = torch.full_like(plain, 0.01)
            sharded.grad = distribute_tensor(plain.grad, mesh, [Shard(0)])
            for optimizer in optimizers:
                optimizer.step()
        assert [optimizer._prepared is None for optimizer in optimizers] == [False, True]
        assert_same([sharded.detach().to_local()], [plain.detach()])
    finally:
        dist.destroy_process_group()


def test_states_of_others_are_left_alone() -> None:
    training, plain = Training(again=True), Training(again=False)
    for number in range(3):
        for each in (training, plain):
            each.step()
        training.optimizer.state[training.parameters[0]]["note"] = number
    del training.optimizer.state[training.parameters[0]]["note"]
    assert_same(everything(training.optimizer), everything(plain.optimizer))


@pytest.mark.parametrize("asked", [True, False])
def test_states_are_let_go(asked: bool) -> None:
    """To whoever asks for them, so that they can be moved away between steps; otherwise by the next step."""
    training = Training(again=True)
    training.step()
    training.step()
    assert training.optimizer._prepared is not None
    state = (training.optimizer.state if asked else training.state)[training.parameters[0]]
    kept = [weakref.ref(value) for value in state.values()]
    state.update({name: value.clone() for name, value in state.items()})
    gc.collect()
    assert {reference() is None for reference in kept} == {asked}
    training.step()
    gc.collect()
    assert {reference() is None for reference in kept} == {True}


def test_gradients_and_moved_data_are_let_go() -> None:
    training = Training(again=True)
    training.step()
    training.step()
    parameter = training.parameters[0]
    state = training.state[parameter]["exp_avg"]
    kept = [weakref.ref(parameter.grad), weakref.ref(state.untyped_storage()), weakref.ref(parameter.untyped_storage())]
    training.optimizer.zero_grad()
    state.data, parameter.data = state.clone(), parameter.detach().clone()
    assert not any(reference() is not None for reference in kept)
    assert training.optimizer._prepared is not None


def test_the_optimizer_goes_with_its_parameters() -> None:
    """Also where they know of it: what C++ holds is not seen by the garbage collector."""
    training = Training(again=True)
    for parameter in training.parameters:
        parameter.owner = training.optimizer
    training.step()
    training.step()
    assert training.optimizer._prepared is not None
    kept = weakref.ref(training.optimizer)
    del training, parameter
    gc.collect()
    assert kept() is None


def test_copies_prepare_their_own() -> None:
    training = Training(again=True)
    training.step()
    twin = copy.deepcopy(training)
    assert twin.optimizer._prepared is None
    for each in (training, twin):
        each.step()
    assert_same(everything(training.optimizer), everything(twin.optimizer))


def test_gradients_are_checked_again() -> None:
    """With the errors of the first step, and nothing changed."""
    training = Training(again=True)
    training.step()
    training.step()
    before, parameter = everything(training.optimizer), training.parameters[0]
    training.gradients()
    parameter.grad = parameter.grad.to_sparse()
    with pytest.raises(TypeError, match=r"group 0: the gradient of parameter 0 is torch\.sparse_coo; only dense"):
        training.optimizer.step()
    training.gradients()
    parameter.grad = None
    parameter.grad_dtype = torch.float64
    parameter.grad = torch.ones(parameter.shape, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"group 0: the gradient of parameter 0 is torch\.float64"):
        training.optimizer.step()
    assert_same(everything(training.optimizer), before)


def test_strided_gradients_are_taken_too() -> None:
    both = [Training(again=again) for again in (True, False)]
    for number in range(3):
        for training in both:
            training.gradients()
            gradient = training.parameters[0].grad
            if number and training.again:
                training.parameters[0].grad = gradient.T.contiguous().T
            training.optimizer.step()
    assert_same(everything(both[0].optimizer), everything(both[1].optimizer))
