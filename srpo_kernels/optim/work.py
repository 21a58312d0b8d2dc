"""What a step has to do: parameters with their storages and gradients, by group."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from srpo_kernels.optim.options import check_gradient
from srpo_kernels.optim.reference import DRAWN
from srpo_kernels.optim.storage import Storage

if TYPE_CHECKING:
    from srpo_kernels.optim.adamw import AdamW

__all__ = ["Places", "Work", "every_storage", "places", "stepped", "storages", "with_gradients", "work_for"]

#: Every parameter's group, index in it, and offset in the order that random bits are drawn by.
Places = dict[Tensor, tuple[int, int, int]]
#: Groups and, of each, the parameters to step with their gradients.
Work = list[tuple[dict[str, Any], list[tuple[Storage, Tensor]]]]


def places(optimizer: AdamW) -> Places:
    """Where the parameters are."""
    found, offset = {}, 0
    for number, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            found[parameter] = (number, index, offset)
            offset += -(-parameter.numel() // DRAWN) * DRAWN
    return found


def storages(
    optimizer: AdamW, parameters: Iterable[Tensor], where: Places | None = None
) -> Iterator[tuple[int, Storage]]:
    """The group numbers and storages of `parameters`, which are made if there are none."""
    where = where or places(optimizer)
    for parameter in parameters:
        number, _, offset = where[parameter]
        group, state = optimizer.param_groups[number], optimizer.state[parameter]
        yield (
            number,
            Storage.of(parameter, state, group, offset=offset, seed=optimizer.seed, offload=optimizer.offload),
        )


def every_storage(optimizer: AdamW) -> Iterator[tuple[Tensor, Storage | None]]:
    """Every parameter with its storage, None before its first step."""
    where = places(optimizer)
    known = storages(optimizer, [parameter for parameter in where if optimizer.state.get(parameter)], where)
    found = {storage.parameter: storage for _, storage in known}
    for parameter in where:
        yield parameter, found.get(parameter)


def with_gradients(optimizer: AdamW) -> list[Tensor]:
    """The parameters that have gradients."""
    return [parameter for parameter in places(optimizer) if parameter.grad is not None]


def work_for(optimizer: AdamW, parameters: Iterable[Tensor], where: Places | None = None) -> Work:
    """What is to do for `parameters`, which have gradients; raises as `check_gradient`."""
    where = where or places(optimizer)
    gradients = {parameter: check_gradient(parameter, *where[parameter][:2]) for parameter in parameters}
    found: dict[int, list[tuple[Storage, Tensor]]] = {}
    for number, storage in storages(optimizer, gradients, where):
        found.setdefault(number, []).append((storage, gradients[storage.parameter]))
    return [(optimizer.param_groups[number], members) for number, members in found.items()]


def stepped(work: Work) -> list[Tensor]:
    """The parameters in `work`."""
    return [storage.parameter for _, members in work for storage, _ in members]
