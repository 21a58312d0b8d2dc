"""Attention for patched blocks: diffusers' backends, with what backward needs of the queries and keys made again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from torch import Tensor

__all__ = ["attend", "remade_in_backward"]

#: Backends (by the start of their name) whose kernels have no backward in diffusers 0.36 to 0.42.
_FORWARD_ONLY = ("sage", "_sage", "_flash_3", "_flash_varlen_3", "aiter")
_WITH_BACKWARD = ("native", "_native_cudnn", "_native_flash", "_native_efficient", "flash", "flex", "xformers")


def attend(processor: Any, make: Callable[[], tuple[Tensor, ...]], mask: Tensor | None) -> Tensor:
    """Attention of ``query, key, value = make()``, all [B, S, H, D], on the processor's backend.

    Backward calls `make` again instead of keeping the three, so `make` should be cheap and need only what is kept
    anyway. Raises `ValueError` when a gradient is wanted and the backend has no backward.
    """
    query, key, value = make()
    backend = processor._attention_backend or _AttentionBackendRegistry.get_active_backend()[0]
    name = AttentionBackendName(backend).value
    wanted = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if wanted and name.startswith(_FORWARD_ONLY):
        raise _without_backward(name)
    plain = name == "native" and mask is None and processor._parallel_config is None
    flash = _flash_attention_3(query.device, query.dtype) if plain and not torch.compiler.is_compiling() else None
    with remade_in_backward((query, key, value), make) if wanted else nullcontext():
        if flash is not None:
            out = flash(query, key, value)
        else:
            out = dispatch_attention_fn(
                query,
                key,
                value,
                attn_mask=mask,
                backend=processor._attention_backend,
                parallel_config=processor._parallel_config,
            )
    if wanted and not out.requires_grad:
        raise _without_backward(name)
    return out.to(query.dtype)


@cache
def _flash_attention_3(device: torch.device, dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """flash-attn 3, where it is installed and `device` is the Hopper GPU it was written for.

    diffusers' own backend for it has no backward. flash-attn 2 is no faster than what PyTorch brings.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    if torch.cuda.get_device_capability(device)[0] != 9 or find_spec("flash_attn_interface") is None:
        return None
    function = import_module("flash_attn_interface").flash_attn_func

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = function(query, key, value)
        return out[0] if isinstance(out, tuple) else out  # some releases return the log-sum-exp too

    return attention


def _without_backward(name: str) -> ValueError:
    return ValueError(
        f"patch: attention backend {name!r} has no backward; choose one of {', '.join(_WITH_BACKWARD)} with "
        "set_attention_backend, or turn gradients off"
    )


def remade_in_backward(
    tensors: tuple[Tensor, ...], make: Callable[[], tuple[Tensor, ...]]
) -> AbstractContextManager[Any]:
    """Within the block, autograd does not keep `tensors`; backward gets them from ``make()``, bitwise the same.

    Does nothing where someone else looks after saved tensors: under `torch.compile`, and within activation
    checkpointing or offloading, whose own hooks these would shadow.
    """
    if torch.compiler.is_compiling() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return nullcontext()
    storages = {tensor.untyped_storage()._cdata: index for index, tensor in enumerate(tensors)}
    made: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Any:
        index = storages.get(tensor.untyped_storage()._cdata)
        if index is None:
            return tensor
        return index, tensor.size(), tensor.stride(), tensor.storage_offset()

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        index, *geometry = packed
        if index not in made:
            with torch.no_grad():
                made.update(enumerate(make()))
        return made.pop(index).as_strided(*geometry)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
