"""Operators of this package in place of a diffusers model's own, and back. The only importer of diffusers here."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from srpo_kernels.patching.handle import PatchHandle, install

__all__ = ["PatchHandle", "patch"]


def patch(module: nn.Module, ops: Collection[str] | None = None, strict: bool = False) -> PatchHandle:
    """Make a diffusers FLUX transformer run on this package's operators, in training and in sampling.

    Only the ``forward`` of module instances is replaced: classes, parameters, buffers, state dict and hooks stay as
    they are, and a pickled or deep-copied state dict knows nothing of it. Patch before `torch.compile`; before or after
    FSDP2's ``fully_shard`` and PEFT.

    Args:
        module: a `FluxTransformer2DModel`, or a module that contains one or any of its blocks.
        ops: names to use, of `srpo_kernels.patching.flux.OPS`; None: all of them.
        strict: raise, before anything is replaced, if any module would be refused.

    Returns:
        A handle: ``report()`` tells what was replaced, and what not and why; ``remove()``, or leaving the ``with``
        block, restores.

    Raises:
        TypeError: `module` is not a module, or ops a string. ValueError: `ops` is empty or has an unknown name,
        there is nothing to patch, a module is patched already or (strict) cannot be.
    """
    from srpo_kernels.patching import flux

    if not isinstance(module, nn.Module):
        raise TypeError(f"patch: module must be a torch.nn.Module, got {type(module).__name__}")
    if isinstance(ops, str):
        raise TypeError(f"patch: ops must be a collection of names, got the string {ops!r}")
    selected = set(flux.OPS if ops is None else ops)
    if unknown := sorted(selected - set(flux.OPS)):
        raise ValueError(f"patch: ops has unknown names {unknown}, accepted are {sorted(flux.OPS)}")
    if not selected:
        raise ValueError(f"patch: ops names none; accepted are {sorted(flux.OPS)}")
    return install(module, flux.rules(selected), strict=strict)
