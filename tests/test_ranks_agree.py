"""One rank and two have the same gradient of the same global batch, however parameters are spread. In float64, in which
transformer and sums are, nothing but the order of additions differs.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from helpers import environment, quick_config
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from srpo.algorithm import Seconds
from srpo.models import Flux
from srpo.trainer import Trainer
from srpo_kernels.optim.sharding import local

BASE = ("srpo.batch_size=8", "run.micro_batch=1", "run.draws_per_rollout=2", "srpo.noise=independent")
LORA = ("model.lora.rank=2", "model.lora.targets=all")
VARIANTS = (
    (),
    ("run.sharding=fsdp",),
    ("run.sharding=fsdp", "run.reduce=update", "run.reshard_after_forward=false"),
    ("run.sharding=fsdp", "run.rollout_gather=blocks"),
    ("run.sharding=hsdp", "run.shard_size=1"),
    (*LORA, "run.sharding=fsdp"),
)


def gradients(directory: Path, *overrides: str) -> tuple[Flux, dict[str, Tensor]]:
    """Whole gradients of a first update, and the model."""
    load = Flux.load

    def double(*args: Any, **kwargs: Any) -> Flux:
        flux = load(*args, **kwargs)
        flux.transformer.double()
        for name, parameter in flux.trainable().items():
            if ".lora_B." in name:  # zero, below which the gradient of A is
                torch.nn.init.normal_(parameter.detach(), std=0.1, generator=torch.Generator().manual_seed(0))
        return flux

    # The optimizer and its gradients are of fp32.
    absent = [mock.patch(f"srpo.trainer.{name}") for name in ("load_optimizer", "set_gradient_dtype")]
    with mock.patch.object(Flux, "load", double), absent[0], absent[1]:
        trainer = Trainer(quick_config(directory, *BASE, *overrides))
    trainer.update.accumulate(0, lambda: None, Seconds(torch.device("cpu")))
    found = {name: parameter.grad for name, parameter in trainer.flux.transformer.named_parameters()}
    return trainer.flux, {name: whole(grad) for name, grad in found.items() if grad is not None}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def test_two_ranks_have_the_gradient_of_one(tmp_path: Path) -> None:
    for name, variant in (("whole", ()), ("lora", LORA)):
        save_file(gradients(tmp_path / name, *variant)[1], tmp_path / f"{name}.safetensors")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    done = subprocess.run([*launch, tmp_path], env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for number in range(len(VARIANTS)):
        assert all((tmp_path / f"{number}.rank{rank}").exists() for rank in (0, 1))


def compare(directory: Path) -> None:
    """What each of the two ranks does."""
    for number, variant in enumerate(VARIANTS):
        wanted = load_file(directory / f"{'lora' if {*LORA} <= {*variant} else 'whole'}.safetensors")
        flux, found = gradients(directory / str(number), *variant)
        assert torch.distributed.get_world_size() == 2
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert tensor.dtype == torch.float64
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-10 * tensor.abs().max().item())
        (directory / f"{number}.rank{torch.distributed.get_rank()}").touch()
    zeroed_weights_are_seen(flux)


def zeroed_weights_are_seen(flux: Flux) -> None:
    """A forward without backward leaves nothing gathered that the next one would take for the weights."""
    x_t, sigma = torch.ones(1, 16, flux.transformer.config.in_channels), torch.ones(1)

    def velocity() -> Tensor:
        with torch.no_grad():
            return flux.velocity(x_t, sigma, flux.encode_prompts(["digit seven"]), 1.0, (32, 32))

    assert velocity().abs().max() > 0
    for parameter in flux.transformer.parameters():
        local(parameter.detach()).zero_()
    assert velocity().abs().max() == 0


if __name__ == "__main__":
    compare(Path(sys.argv[1]))
