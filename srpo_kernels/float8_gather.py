"""FSDP2's all-gather of trained weights in e4m3: half the bytes of bf16, sent and held."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from srpo_kernels.float8_linear import Float8Linear
from srpo_kernels.float8_weight import Float8Weight
from srpo_kernels.ops.quantize_fp8 import quantize_fp8

__all__ = ["gather_float8"]


def gather_float8(module: nn.Module) -> list[str]:
    """Have FSDP2 gather the weights of every `Float8Linear` within `module` in e4m3, with a scale a row.

    Each process quantises its own rows, whose scales need nobody else's: outputs are, bit for bit, those of gathering
    whole weights and quantising them then. Sent, and held while it is gathered, is 1 byte a weight and 4 a row. The
    shards, their gradients, optimizers and state dicts stay as they are.

    Gradients of inputs are of the e4m3 weight, there being no other: `backward` "bf16" multiplies with its values
    dequantised, "fp8" with the values themselves.

    Call it after `convert_to_float8` and ``fully_shard``, before the first forward; nothing undoes it. Parameters may
    be replaced later (``module.to``, ``load_state_dict(assign=True)``): the next forward notices; call this again
    where ``unshard`` comes first.

    Args:
        module: holds the modules that ``fully_shard`` was called with. Not with an integer as its
            ``reshard_after_forward``, nor with its ``CPUOffloadPolicy``.

    Returns:
        The names of the layers. None where parameters are shared out over one process only, which gathers nothing.

    Raises:
        TypeError: module is not a module. ValueError: it holds no `Float8Linear`, or the weight of one is not sharded
            by rows or is offloaded.
    """
    from torch.distributed.fsdp import FSDPModule  # takes a while to import

    if not isinstance(module, nn.Module):
        raise TypeError(f"gather_float8: module must be a torch.nn.Module, got {type(module).__name__}")
    layers = _layers(module)
    if not layers:
        raise ValueError("gather_float8: module has no Float8Linear; see convert_to_float8")
    shards = {name: _shards(name, layer.weight) for name, layer in layers.items()}
    gathered = {name: layer for name, layer in layers.items() if shards[name] > 1}
    chosen = set(gathered.values())
    for unit in module.modules():
        inside = [layer for layer in _layers(unit).values() if layer in chosen]
        if inside and isinstance(unit, FSDPModule):
            # Prepended after FSDP2's own hook was, it runs before that.
            unit.register_forward_pre_hook(partial(_before_forward, inside), prepend=True)
    _attach(chosen)
    return list(gathered)


def _layers(module: nn.Module) -> dict[str, Float8Linear]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, Float8Linear)}


def _shards(name: str, weight: Tensor) -> int:
    """How many processes share out the rows of `weight`. Raises `ValueError` unless FSDP2 can gather it in e4m3."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    what = f"gather_float8: the weight of {name or 'module'}"
    if not isinstance(weight, DTensor):
        raise ValueError(f"{what} is not sharded; call fully_shard before")
    mesh, shards = weight.device_mesh, 1
    for dimension, placement in enumerate(weight.placements):
        if placement == Shard(0):
            shards *= mesh.size(dimension)
        elif placement != Replicate():
            raise ValueError(f"{what} has placements {weight.placements}: only Shard(0) and Replicate() are supported")
    held = weight.to_local().device.type
    if held not in (mesh.device_type, "meta"):
        raise ValueError(f"{what} is held on {held} and gathered on {mesh.device_type}; offloading is not supported")
    return shards


def _before_forward(layers: list[Float8Linear], _module: nn.Module, _arguments: Any) -> None:
    if not torch.compiler.is_compiling():
        _attach(layers)


def _attach(layers: Iterable[Float8Linear]) -> None:
    """Give shards the methods that FSDP2 looks for on them. One that has replaced another has none yet."""
    for layer in layers:
        shard: Any = getattr(layer.weight, "_local_tensor", None)  # None of a weight that is gathered now
        if shard is not None and not hasattr(shard, "fsdp_pre_all_gather"):
            shard.fsdp_pre_all_gather = partial(_pre_all_gather, layer)
            shard.fsdp_post_all_gather = partial(_post_all_gather, layer.out_features)


# FSDP2 calls it with the mesh only where its signature has one entry. With more, it would refuse scales, which have
# another shape than the shard, where shards are uneven.
def _pre_all_gather(layer: Float8Linear, *arguments: Any) -> tuple[tuple[Tensor, Tensor], None]:
    """The e4m3 values and scales of this process's rows, and of as many after them as other processes have more."""
    mesh = arguments[0]
    values, scale = quantize_fp8(layer.weight.to_local())  # type: ignore[attr-defined]
    missing = -(-layer.out_features // mesh.size()) - values.shape[0]
    if missing:
        values = pad(values.view(torch.uint8), (0, 0, 0, missing)).view(torch.float8_e4m3fn)
        scale = pad(scale, (0, 0, 0, missing))
    return (values, scale), None


def _post_all_gather(
    rows: int, gathered: tuple[Tensor, ...], _: None, dtype: torch.dtype, *, out: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, ...]] | None:
    """The weight, a view of what was gathered; the second time (`out`) it is there already."""
    if out is not None:
        return None
    values, scale = (part[:rows] for part in gathered)
    return Float8Weight(values, scale, dtype), ()
