"""A patched FLUX under FSDP2, on two gloo processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

#: Whether `patch` comes before or after `fully_shard`, and what blocks keep for backward.
CASES = (("before", "none"), ("after", "selective"))


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for order, mode in CASES:
        found = _sharded(order, mode)
        if rank == 0:
            torch.save(found, f"{folder}/{order}.pt")
    dist.destroy_process_group()


def _sharded(order: str, mode: str) -> dict[str, Any]:
    from test_patching import IMAGE, TEXT, inputs, model, outputs
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    from srpo_kernels import FluxRollout, patch
    from srpo_kernels.checkpointing import flux_policy

    mesh = init_device_mesh("cpu", (2,))
    network = model()
    if order == "before":
        handle = patch(network, strict=True)
    for block in [*network.transformer_blocks, *network.single_transformer_blocks]:
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    if order == "after":
        handle = patch(network, strict=True)
    flux_policy(network, mode, batch=2, tokens=TEXT + IMAGE)

    def whole(found: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in found.items()}

    patched = whole(outputs(network, inputs()))
    unavailable = FluxRollout.unavailable(network)
    handle.remove()
    plain = whole(outputs(network, inputs()))
    return {"patched": patched, "plain": plain, "unavailable": unavailable}


def test_sharded_gradients_are_the_whole_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_patching import assert_as_accurate, exactly, inputs, model, outputs

    path = f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    monkeypatch.setenv("PYTHONPATH", path)  # the workers import this file
    torch.multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=2)
    network = model()  # both ranks saw the same batch, so that their mean is the gradient of one
    plain, exact = outputs(network, inputs()), exactly(network, inputs())
    for order, _ in CASES:
        found = torch.load(tmp_path / f"{order}.pt")
        assert_as_accurate(found["patched"], plain, exact)
        assert_as_accurate(found["plain"], plain, exact)
        assert found["unavailable"].startswith("transformer's parameters are sharded")
