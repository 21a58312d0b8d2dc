"""Gradients of an update in float64, as one rank or many have them. Run by torchrun, this file compares its ranks'."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from helpers import quick_config
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from srpo.models import Flux
from srpo.trainer import Trainer
from srpo.update import Seconds

BASE = ("srpo.batch_size=8", "run.micro_batch=1", "run.draws_per_rollout=2", "srpo.noise=independent")
#: Ways to spread an update over two ranks. Rollouts without gathered weights are computed in another order.
VARIANTS = {
    "none": (),
    "fsdp": ("run.sharding=fsdp",),
    "fsdp once": ("run.sharding=fsdp", "run.reduce=update"),
    "fsdp blocks": ("run.sharding=fsdp", "run.rollout_gather=blocks"),
    "hsdp": ("run.sharding=hsdp", "run.shard_size=1"),
}


def gradients(directory: Path, *overrides: str) -> dict[str, Tensor]:
    """Gradients of the first update with everything in float64, whole."""
    load = Flux.load

    def double(*args: Any, **kwargs: Any) -> Flux:
        flux = load(*args, **kwargs)
        flux.transformer.double()
        return flux

    fp32_only = (mock.patch(f"srpo.trainer.{name}") for name in ("load_optimizer", "set_gradient_dtype"))
    with mock.patch.object(Flux, "load", double), next(fp32_only), next(fp32_only):
        trainer = Trainer(quick_config(directory, *BASE, *overrides))
    trainer.update.accumulate(0, lambda: None, Seconds(torch.device("cpu")))
    found = {name: parameter.grad for name, parameter in trainer.flux.transformer.named_parameters()}
    return {name: _whole(gradient) for name, gradient in found.items() if gradient is not None}


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def main(directory: Path) -> None:
    wanted = load_file(directory / "one.safetensors")
    for name, overrides in VARIANTS.items():
        found = gradients(directory / name.replace(" ", "-"), *overrides)
        assert found.keys() == wanted.keys(), name
        for key, tensor in wanted.items():
            assert tensor.dtype == torch.float64
            worst = (found[key] - tensor).abs().max() / tensor.abs().max()
            print(name, key, worst.item(), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
