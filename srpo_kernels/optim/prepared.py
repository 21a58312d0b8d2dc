"""A step of a thousand parameters that is prepared once, and is three calls of the extension each time it is taken."""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import partial
from itertools import chain
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

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

    Keeps addresses, and no state or gradient alive, so that whoever moves them elsewhere gets their memory back.
    """

    def __init__(self, optimizer: AdamW, alike: Work) -> None:
        self._parameters = _parameters(optimizer)
        self._stepped = [storage.parameter for _, members in alike for storage, _ in members]
        stepped = set(self._stepped)
        self._others = [parameter for parameter in self._parameters if parameter not in stepped]
        self._owners = list(optimizer.state)
        self._addresses, self._modes = _addresses(optimizer, self._parameters), _modes(optimizer)
        self._lists: list[tuple[int, int, int]] = []  # group, and which parameters of the plan: the first, how many
        plans, first = [], 0
        for group, members in alike:
            storages = [storage for storage, _ in members]
            gradients = [gradient.contiguous() for _, gradient in members]
            steps = [storage.state["step"] for storage in storages]
            number = next(i for i, other in enumerate(optimizer.param_groups) if other is group)
            where = starts_of(storages), number, storages[0].weights, storages[0].moments
            plans.append(torch.ops.srpo.adamw_plan(*lists_of(storages), gradients, steps, *where))
            self._lists.append((number, first, len(members)))
            first += len(members)
        self._plan = torch.cat(plans)

    def fits(self, optimizer: AdamW) -> bool:
        """Whether parameters, their states and their groups are those that this was made for, where they were."""
        return (
            _same(_parameters(optimizer), self._parameters)
            and _same(optimizer.state, self._owners)
            and _addresses(optimizer, self._parameters) == self._addresses
            and _modes(optimizer) == self._modes
        )

    def step(self, optimizer: AdamW) -> bool:
        """Take it; false, and nothing is done, if gradients are not those of the parameters it was made for."""
        gradients = [parameter.grad for parameter in self._stepped]
        if {*map(type, gradients)} != {Tensor} or any(parameter.grad is not None for parameter in self._others):
            return False
        begun = self._begin(optimizer, gradients)
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

    def _begin(self, optimizer: AdamW, gradients: list[Any]) -> Tensor:
        groups = optimizer.param_groups
        rates = [torch.as_tensor(group["lr"], dtype=torch.float64).detach() for group in groups]
        numbers = [x for group in groups for x in (*group["betas"], group["eps"], group["weight_decay"])]
        limit = math.inf if optimizer.max_grad_norm is None else optimizer.max_grad_norm
        try:
            return torch.ops.srpo.adamw_begin.default(gradients, self._plan, rates, numbers, limit)
        except NotImplementedError:  # there is no kernel for a sparse gradient
            return gradients[0].new_empty(0)


def _parameters(optimizer: AdamW) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _addresses(optimizer: AdamW, parameters: list[Tensor]) -> list[Any]:
    """Where parameters and all states are; never the same twice if something else is among these."""
    states = chain.from_iterable(map(dict.values, optimizer.state.values()))
    try:
        return [*map(Tensor.data_ptr, chain(parameters, states))]
    except TypeError:
        return [object()]


def _modes(optimizer: AdamW) -> list[Any]:
    """What decides how parameters are stepped, but for numbers that every step reads."""
    groups = optimizer.param_groups
    return [optimizer.offload, *((len(group["params"]), group["weights"], group["moments"]) for group in groups)]


def _same(these: Collection[Tensor], those: Collection[Tensor]) -> bool:
    return len(these) == len(those) and all(map(is_, these, those))


def _telemetry(begun: Tensor, sums: list[Sums], stepped: list[Tensor]) -> dict[str, Tensor]:
    after = BINS + 2
    norm, finite = begun[after].view(torch.float64), begun[after + 2] != 0
    return telemetry(GradientNorm(norm, finite, begun[BINS + 1]), sums, stepped)
