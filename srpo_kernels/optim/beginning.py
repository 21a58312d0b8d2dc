"""What a step begins with, in one call of the extension: the norm, its coefficient, every parameter's numbers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from srpo_kernels.optim.compiled import takes, triton_takes
from srpo_kernels.optim.norm import GradientNorm
from srpo_kernels.optim.reference import BINS
from srpo_kernels.optim.sharding import local, shard_groups
from srpo_kernels.optim.work import Work

__all__ = ["begin", "begins"]


def begins(alike: Work) -> bool:
    """Whether `begin` can take these lists of parameters stored alike: on one device, whole, and by the extension."""
    kept = [members[0][0] for _, members in alike]
    devices = {storage.parameter.device for storage in kept}
    whole = all(takes(storage) and not storage.hosted and not shard_groups(storage.parameter) for storage in kept)
    return len(devices) == 1 and whole and not triton_takes(kept[0].parameter.device)


def begin(alike: Work, max_norm: float | None) -> tuple[GradientNorm, Tensor, list[tuple[Tensor, Tensor]]]:
    """The norm of all gradients, the clip's coefficient, and of every list the numbers of its steps and their scalars.

    One launch on a GPU, which also counts the steps.
    """
    groups: dict[int, dict[str, Any]] = {}
    gradients, counted, places = [], [], []
    for group, members in alike:
        groups.setdefault(id(group), group)
        place = list(groups).index(id(group))
        for storage, gradient in members:
            gradients.append(local(gradient).contiguous())
            counted.append(local(storage.state["step"]))
            places.append(place)
    rates = [torch.as_tensor(group["lr"], dtype=torch.float64).detach() for group in groups.values()]
    numbers = [number for group in groups.values() for number in (*group["betas"], group["eps"], group["weight_decay"])]
    found = torch.ops.srpo.adamw_begin(gradients, counted, places, rates, numbers, max_norm or math.inf)
    after, count = BINS + 2, len(gradients)
    norm, finite = found[after].view(torch.float64), found[after + 2 : after + 3].view(torch.bool)[0]
    coefficient = found[after + 1 : after + 2].view(torch.float32)[0]
    steps = found[after + 4 : after + 4 + count]
    scalars = found[after + 4 + count :].view(torch.float32)[: 7 * count].view(count, 7)
    sizes = [len(members) for _, members in alike]
    parts = list(zip(steps.split(sizes), scalars.split(sizes), strict=True))
    return GradientNorm(norm, finite, found[BINS + 1]), coefficient, parts
