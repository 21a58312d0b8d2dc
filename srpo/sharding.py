"""The transformer's parameters, gradients and optimizer states over several processes, by FSDP2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from srpo_kernels import gather_float8

__all__ = ["free", "gathered", "mesh_of", "shard"]


def mesh_of(world: int, device: torch.device, shard_size: int | None = None) -> DeviceMesh:
    """All processes in groups of `shard_size` (all of them by default) that share one copy of the parameters: FSDP for
    one group, HSDP for several, which hold replicas.
    """
    size = shard_size or world
    if size == world:
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (world // size, size), mesh_dim_names=("replicate", "shard"))


def shard(
    transformer: Any, mesh: DeviceMesh, *, reshard_after_forward: bool = True, fp8_all_gather: bool = False
) -> None:
    """Shard every block's parameters, and all others, over `mesh`; each is gathered when it is used, and freed again.

    Gradients are averaged over all processes as they are made. Optimizers must be made afterwards. Without
    `reshard_after_forward` what a forward gathered stays until its backward: call `free` after one that has none, or
    the next will not see what the weights have become. `fp8_all_gather`: weights that train in e4m3 are gathered in it
    (`gather_float8`).
    """
    for module in (*transformer.transformer_blocks, *transformer.single_transformer_blocks, transformer):
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard_after_forward)
    if fp8_all_gather:
        gather_float8(transformer)


@contextmanager
def gathered(transformer: nn.Module) -> Iterator[None]:
    """All parameters whole within: gathered once, for a rollout's many forwards, and freed at its end.

    Within, use a `srpo_kernels.patching.view` of the transformer, or what is built on one: its own forward would free
    them. A collective operation; does nothing for a transformer that is not sharded.
    """
    handles = [unit.unshard(async_op=True) for unit in _units(transformer)]
    try:
        for handle in handles:
            if handle is not None:
                handle.wait()
        yield
    finally:
        free(transformer)


def free(transformer: nn.Module) -> None:
    """Let go of all that is gathered."""
    for unit in _units(transformer):
        unit.reshard()


def _units(transformer: nn.Module) -> list[FSDPModule]:
    return [module for module in transformer.modules() if isinstance(module, FSDPModule)]
