"""A step of a thousand parameters that is prepared once, and is three calls of the extension each time it is taken."""

from __future__ import annotations

import math
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from srpo_kernels.extension import module
from srpo_kernels.optim.compiled import lists_of, starts_of, takes, triton_takes
from srpo_kernels.optim.norm import GradientNorm
from srpo_kernels.optim.reference import BINS
from srpo_kernels.optim.telemetry import Sums, telemetry
from srpo_kernels.optim.work import Work

if TYPE_CHECKING:
    from srpo_kernels.optim.adamw import AdamW

__all__ = ["Prepared", "can_prepare"]


def can_prepare(alike: Work) -> bool:
    """Whether these lists of parameters stored alike are on one device, plain, and for the extension to step."""
    kept = [members[0][0] for _, members in alike]
    devices = {storage.parameter.device for storage in kept}
    plain = all(takes(storage) and not storage.hosted for storage in kept)
    sharded = any(isinstance(storage.parameter, DTensor) for _, members in alike for storage, _ in members)
    return len(devices) == 1 and plain and not sharded and not triton_takes(kept[0].parameter.device)


class Prepared:
    """The step of the parameters that have gradients, for as long as everything is where it was.

    Keeps states alive, so that no other tensor gets their memory: `AdamW.state` gives it up to whoever asks for them.
    """

    def __init__(self, optimizer: AdamW, alike: Work) -> None:
        self._stepped = [storage.parameter for _, members in alike for storage, _ in members]
        stepped = set(self._stepped)
        self._others = [parameter for parameter in _parameters(optimizer) if parameter not in stepped]
        self._module = module(self._stepped[0].device)
        self._lists: list[tuple[int, int, int]] = []  # group, and which parameters of the plan: the first, how many
        plans, states, first = [], [], 0
        for group, members in alike:
            storages = [storage for storage, _ in members]
            gradients = [gradient.contiguous() for _, gradient in members]
            weights, *lists = lists_of(storages)
            steps = [storage.state["step"] for storage in storages]
            number = next(i for i, other in enumerate(optimizer.param_groups) if other is group)
            where = starts_of(storages), number, storages[0].weights, storages[0].moments
            plans.append(torch.ops.srpo.adamw_plan(weights, *lists, gradients, steps, *where))
            states += [*chain.from_iterable(lists), *steps]
            self._lists.append((number, first, len(members)))
            first += len(members)
        self._plan, self._states = torch.cat(plans), torch.ops.srpo.adamw_watch(states)
        owned = chain.from_iterable((parameter, *state.values()) for parameter, state in optimizer.state.items())
        self._objects, self._modes = [*_parameters(optimizer), *owned], _modes(optimizer)

    def step(self, optimizer: AdamW, state: dict[Tensor, Any]) -> bool:
        """Take it; false, and nothing is done, if parameters, gradients, `state` or modes are not what this is for."""
        if not (
            self._module.same(self._objects, [group["params"] for group in optimizer.param_groups], state)
            and self._modes == _modes(optimizer)
            and all(parameter.grad is None for parameter in self._others)
            and self._module.locate(self._stepped, self._plan)
        ):
            return False
        begun = self._begin(optimizer)
        if not begun.numel():
            return False
        sums: list[Sums] = []
        for number, first, count in self._lists:
            group = optimizer.param_groups[number]
            numbers = optimizer.seed, group["ema_decay"] or 0.0, group["ema_every"]
            sums.append(((), torch.ops.srpo.adamw_advance.default(self._plan, begun, first, count, *numbers)))
        torch.autograd.graph.increment_version(self._stepped)
        # Its many small launches only if it is read.
        optimizer._telemetry = partial(_telemetry, begun, sums, self._stepped)
        return True

    def _begin(self, optimizer: AdamW) -> Tensor:
        groups = optimizer.param_groups
        rates = [torch.as_tensor(group["lr"], dtype=torch.float64).detach() for group in groups]
        numbers = [x for group in groups for x in (*group["betas"], group["eps"], group["weight_decay"])]
        limit = math.inf if optimizer.max_grad_norm is None else optimizer.max_grad_norm
        like = self._stepped[0]
        return torch.ops.srpo.adamw_begin.default(like, self._plan, self._states, rates, numbers, limit)


def _parameters(optimizer: AdamW) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _modes(optimizer: AdamW) -> list[Any]:
    """What decides how parameters are stepped, but for numbers that every step reads."""
    groups = optimizer.param_groups
    return [optimizer.offload, *((len(group["params"]), group["weights"], group["moments"]) for group in groups)]


def _telemetry(begun: Tensor, sums: list[Sums], stepped: list[Tensor]) -> dict[str, Tensor]:
    after = BINS + 2
    norm, finite = begun[after].view(torch.float64), begun[after + 2] != 0
    return telemetry(GradientNorm(norm, finite, begun[BINS + 1]), sums, stepped)
