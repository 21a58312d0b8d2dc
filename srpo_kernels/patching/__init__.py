"""Operators of this package in place of a diffusers model's own, and back. The only importer of diffusers here."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from srpo_kernels.patching.handle import PatchHandle, install

__all__ = ["PATCHABLE", "TRANSFORMER_OPS", "VAE_OPS", "PatchHandle", "patch"]

#: Operators of a FLUX transformer, and two things that are none: "position_cache" keeps rotary tables for the ids they
#: were made from, "joint_stream" joins text and image once instead of in every single block.
TRANSFORMER_OPS = (
    "layer_norm_modulate",
    "gated_residual",
    "gated_residual_layer_norm_modulate",
    "qk_norm_rope",
    "joint_qk_norm_rope",
    "gelu_tanh",
    "gelu_concat",
    "position_cache",
    "joint_stream",
)
#: Of a VAE; "frozen_conv" keeps no input of a convolution whose weight is a constant.
VAE_OPS = ("group_norm_silu", "frozen_conv")
#: What `ops` of `patch` may name.
PATCHABLE = (*TRANSFORMER_OPS, *VAE_OPS)


def patch(module: nn.Module, ops: Collection[str] | None = None, strict: bool = False) -> PatchHandle:
    """Make a diffusers FLUX transformer or VAE run on this package's operators, in training and in sampling.

    Only the ``forward`` of module instances is replaced: classes, parameters, buffers, state dict and hooks stay as
    they are, and a pickled or deep-copied state dict knows nothing of it. Patch before `torch.compile`; before or after
    FSDP2's ``fully_shard`` and PEFT.

    Args:
        module: a `FluxTransformer2DModel` or an `AutoencoderKL`, or a module that contains one or parts of one.
        ops: names to use, of `PATCHABLE`; None: all.
        strict: raise, before anything is replaced, if any module would be refused.

    Returns:
        A handle: ``report()`` tells what was replaced, and what not and why; ``remove()``, or leaving the ``with``
        block, restores.

    Raises:
        TypeError: `module` is not a module, or ops a string. ValueError: `ops` is empty or has an unknown name,
        there is nothing to patch, a module is patched already or (strict) cannot be.
    """
    from srpo_kernels.patching import flux, vae

    if not isinstance(module, nn.Module):
        raise TypeError(f"patch: module must be a torch.nn.Module, got {type(module).__name__}")
    if isinstance(ops, str):
        raise TypeError(f"patch: ops must be a collection of names, got the string {ops!r}")
    selected = set(PATCHABLE if ops is None else ops)
    if not selected or not selected <= set(PATCHABLE):
        raise ValueError(f"patch: ops must be names of {sorted(PATCHABLE)}, got {sorted(selected)}")
    return install(module, [*flux.rules(selected), *vae.rules(selected)], strict=strict)
