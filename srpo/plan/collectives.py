"""Collectives of one update, counted: the recipe's transformer at full size among pretended ranks, on empty tensors."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from srpo.distributed import Ranks
from srpo.errors import InputError
from srpo.lora import add_adapters
from srpo.models import Conditioning, Flux
from srpo.optimizer import set_gradient_dtype
from srpo.plan.memory import memory
from srpo.plan.setting import Setting
from srpo.sharding import mesh_of
from srpo_kernels.checkpointing import flux_policy

__all__ = ["Collective", "count_collectives", "pretended_ranks"]

#: How often each rank of a ring sends the tensor, less its own part.
_SENDS = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2}


@dataclass(frozen=True)
class Collective:
    """All operations of a kind among groups of `ranks` in one update."""

    kind: str  # all_gather, reduce_scatter, all_reduce
    ranks: int
    calls: int
    bytes: int  # of the whole tensors: gathered ones, or those that are scattered or summed

    @property
    def sent(self) -> float:
        """Bytes that each rank sends, by ring algorithms."""
        return _SENDS[self.kind] * self.bytes * (self.ranks - 1) / self.ranks


@contextmanager
def pretended_ranks(world: int, rank: int = 0) -> Iterator[None]:
    """This process as `rank` of `world`, with collectives that return at once and move nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("ranks cannot be pretended in a process that is one already")
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def count_collectives(setting: Setting) -> list[Collective]:
    """What FSDP2, and the trainer without it, exchange in one update of `setting`, beside scalars.

    Runs the trainer's calls of the transformer, forward and backward, without data: about a minute for FLUX.1-dev.

    Raises `InputError` for a single rank.
    """
    if setting.count < 2:
        raise InputError("collectives need more than one rank: give --count")
    total: Counter[tuple[str, int]] = Counter()
    calls: Counter[tuple[str, int]] = Counter()
    with pretended_ranks(setting.count):
        for recorder, times in _update(setting):
            for key, size in recorder.found:
                calls[key] += times
                total[key] += times * size
    return [Collective(*key, calls[key], total[key]) for key in sorted(total)]


def _update(setting: Setting) -> Iterator[tuple[_Recorder, int]]:
    """The distinct parts of an update, and how often each happens."""
    device = torch.device("cpu")
    mesh = mesh_of(setting.count, device, setting.shards) if setting.shards > 1 else None
    policy = memory(setting).policy.mode
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of addresses that empty tensors lack, and blocks that return views
        flux = _flux(setting)
        if mesh is not None:
            run = setting.config.run
            flux.shard(mesh, reshard_after_forward=run.reshard_after_forward, fp8_all_gather=run.fp8_all_gather)
        flux_policy(
            flux.transformer,
            policy,
            batch=setting.rows,
            tokens=setting.sizes.tokens,
            dtype=torch.bfloat16 if setting.item == 2 else torch.float32,
        )
        rollouts = setting.batches if setting.offline < 1 else 0
        with _Recorder() as rollout, torch.no_grad():
            if setting.gathers_whole:
                with flux.whole():
                    pass  # the forwards of a rollout exchange nothing then
            elif mesh is not None:
                _velocity(flux, setting)
                rollouts *= setting.config.srpo.rollout_steps
        yield rollout, rollouts
        for last in (False, True):
            with _Recorder() as draw:
                flux.reduce_gradients(last, every=setting.config.run.reduce == "backward")
                _velocity(flux, setting).sum().backward()
            yield draw, 1 if last else setting.draws - 1
        if mesh is None:
            with _Recorder() as average:
                gradients = (parameter.grad for parameter in flux.trainable().values())
                Ranks(0, setting.count, device).average(gradient for gradient in gradients if gradient is not None)
            yield average, 1


def _flux(setting: Setting) -> Flux:
    """The recipe's model, as the trainer has it before it is sharded."""
    config = setting.config
    with unset_fake_temporarily(), torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(setting.sizes.transformer.config)
        transformer.to(torch.float32 if setting.weight_item == 4 else torch.bfloat16)
        if config.model.lora is not None:
            add_adapters(transformer, config.model.lora, config.run.seed, float8=config.model.precision == "fp8")
    for module in transformer.modules():
        for held in (module._parameters, module._buffers):
            held.update({name: _emptied(tensor) for name, tensor in held.items() if tensor is not None})
    absent: dict[str, Any] = dict.fromkeys(("scheduler", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipeline = FluxPipeline(transformer=transformer, vae=setting.sizes.vae, **absent)
    flux = Flux(pipeline, precision=config.model.precision, max_sequence_length=config.model.max_sequence_length)
    flux.patch(config.model.kernels)
    set_gradient_dtype(config.optimizer, flux.trainable().values(), setting.draws)
    return flux


def _emptied(tensor: torch.Tensor) -> torch.Tensor:
    """As large, where the model computes, without data."""
    empty = torch.empty_like(tensor, device="cpu")
    return torch.nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else empty


def _velocity(flux: Flux, setting: Setting) -> torch.Tensor:
    """A gradient pass's call of the transformer."""
    shape, rows, sizes = flux.transformer.config, setting.rows, setting.sizes
    text = torch.zeros(rows, sizes.text_tokens, shape.joint_attention_dim)
    conditioning = Conditioning(text, torch.zeros(rows, shape.pooled_projection_dim))
    x_t = torch.zeros(rows, sizes.tokens - sizes.text_tokens, shape.in_channels)
    return flux.velocity(x_t, torch.zeros(rows), conditioning, setting.config.srpo.guidance, sizes.image)


class _Recorder(TorchDispatchMode):
    """Lists the collectives within: their kind, the ranks of their group, and the bytes of the whole tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[tuple[str, int], int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._opname
            kind = next(kind for kind in _SENDS if kind.replace("_", "") in name.replace("_", ""))
            tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            group = next(dist.ProcessGroup.unbox(leaf) for leaf in args if isinstance(leaf, torch.ScriptObject))
            self.found.append(((kind, group.size()), max(tensor.nbytes for tensor in tensors)))
        return func(*args, **(kwargs or {}))
