"""Recomputation instead of storage: the image path from the velocity to the reward, and the transformer's blocks."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from srpo_kernels.ops._checks import row_sigma
from srpo_kernels.ops.inject_noise import inject_noise
from srpo_kernels.ops.noise_prior import NoisePrior
from srpo_kernels.ops.recover import recover

__all__ = ["FluxPolicy", "Mode", "checkpointed_reward", "flux_policy", "free_memory"]

Mode = Literal["none", "selective", "block"]
#: Kept for backward by a double and a single block, in units of tokens x D elements, patched; tests count them.
_UNITS: dict[Mode, tuple[float, float]] = {"none": (17.1, 16.1), "selective": (11.1, 10.1), "block": (1.0, 1.0)}
#: Outputs that selective checkpointing keeps: what GEMMs and attention made. Everything else is cheap to make again.
_KEPT = frozenset(
    {
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::_scaled_mm",
        "srpo::fp8_linear",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "flash_attn::_flash_attn_forward",
        "flash_attn_3::fwd",
    }
)


def checkpointed_reward(
    x_t: Tensor,
    noise: Tensor | NoisePrior,
    velocity: Tensor,
    sigma_from: float | Tensor,
    sigma_to: float | Tensor,
    *,
    decode: Callable[[Tensor], Tensor],
    score: Callable[[Tensor, slice], Tensor],
    unpack: tuple[int, int] | None = None,
    scaling_factor: float = 1.0,
    shift_factor: float = 0.0,
    chunk: int | None = None,
) -> Tensor:
    """Scores of the recovered images, keeping nothing of the path that leads to them.

    ``recover -> decode -> score`` runs once without storing activations and again in backward. Randomness inside is
    repeated, autocast restored; gradients are those of the plain path.

    Args:
        x_t, noise, velocity, sigma_from, sigma_to, unpack, scaling_factor, shift_factor: as for `recover`; x_t has N
            rows.
        decode: recovered latents of n rows -> images [n, ...].
        score: (images [n, ...], the rows they are) -> scores [n, ...]; resizing, embedding, projection and loss belong
            here.
        chunk: rows decoded and scored at a time, forward and backward: the graph of one chunk is freed before the next
            is built. Default all.

    Returns:
        What `score` returned, for all N rows.

    Raises:
        ValueError: chunk is below 1, or as `recover`.
    """
    rows = x_t.shape[0]
    if chunk is not None and chunk < 1:
        raise ValueError(f"checkpointed_reward: chunk must be at least 1, got {chunk}")
    start, branches = row_sigma("checkpointed_reward", "sigma_from", sigma_from, x_t)
    end, others = row_sigma("checkpointed_reward", "sigma_to", sigma_to, x_t)
    branches = max(branches, others)
    batch = rows // branches

    def region(
        x_t: Tensor, noise: Tensor | NoisePrior, velocity: Tensor, start: Tensor, end: Tensor, at: slice
    ) -> Tensor:
        latents = recover(
            x_t,
            noise,
            velocity,
            start,
            end,
            unpack=unpack,
            scaling_factor=scaling_factor,
            shift_factor=shift_factor,
        )
        return score(decode(latents), at)

    if chunk is None:
        levels = (level.reshape(branches, batch).T for level in (start, end))
        return checkpoint(region, x_t, noise, velocity, *levels, slice(0, rows), use_reentrant=False)
    if isinstance(noise, NoisePrior):
        # It numbers images from the first of the batch, not of a chunk: draw it once, by the kernel that injected it.
        blank = torch.zeros((batch, *x_t.shape[1:]), device=x_t.device)
        noise = inject_noise(blank, noise, 1.0)
    image = torch.arange(rows, device=x_t.device) % (batch if noise.shape[0] > 1 else 1)
    scores = []
    for first in range(0, max(rows, 1), chunk):
        at = slice(first, first + chunk)
        parts = (x_t[at], noise[image[at]], velocity[at], start[at], end[at])
        scores.append(checkpoint(region, *parts, at, use_reentrant=False))
    return torch.cat(scores)


@dataclass(frozen=True)
class FluxPolicy:
    """A policy in force and the memory it was chosen from; `str()` reports it."""

    mode: Mode
    bytes: dict[Mode, int]  # kept by all blocks at the given shape
    free: int | None  # bytes that "auto" had to fit into

    def __str__(self) -> str:
        kept = ", ".join(f"{mode} {size / 1e9:.2f} GB" for mode, size in self.bytes.items())
        room = "" if self.free is None else f", {self.free / 1e9:.2f} GB free"
        return f"activation checkpointing: {self.mode} ({kept} kept by the blocks{room})"


def flux_policy(
    transformer: Any,
    mode: Mode | Literal["auto"] = "auto",
    *,
    batch: int,
    tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    free: int | None = None,
) -> FluxPolicy:
    """Set what the blocks of a diffusers `FluxTransformer2DModel` keep for backward, through its own switch.

    - "none": everything backward needs;
    - "selective": the outputs of GEMMs and attention; norms, rotary and activations are computed again;
    - "block": the input of every block, all of which runs again;
    - "auto": the first of these that fits.

    Args:
        transformer: patched by `srpo_kernels.patch` or not; the estimates are those of a patched one.
        batch, tokens: of one forward pass, text and image tokens together.
        dtype: what activations are computed in.
        free: bytes that activations may take, for "auto"; default: what is free now where the transformer is.

    Returns:
        The policy, for the log. Decided here, once, from shapes; nothing is measured later.

    Raises:
        ValueError: an unknown mode, or sizes below 1.
    """
    if mode not in (*get_args(Mode), "auto"):
        raise ValueError(f"flux_policy: mode must be none, selective, block or auto, got {mode!r}")
    if batch < 1 or tokens < 1:
        raise ValueError(f"flux_policy: batch and tokens must be at least 1, got {batch} and {tokens}")
    unit = batch * tokens * transformer.inner_dim * dtype.itemsize
    counts = len(transformer.transformer_blocks), len(transformer.single_transformer_blocks)
    kept = {m: int(unit * sum(n * u for n, u in zip(counts, units, strict=True))) for m, units in _UNITS.items()}
    chosen: Mode
    if mode == "auto":
        free = free_memory(next(transformer.parameters()).device) if free is None else free
        # One block at a time is computed again in backward, and its gradients are as large as what it keeps.
        room = free - 2 * int(unit * max(_UNITS["none"]))
        chosen = next((m for m in _UNITS if kept[m] <= room), "block")
    else:
        chosen = mode
    if chosen == "none":
        transformer.disable_gradient_checkpointing()
    else:
        context = {"context_fn": _keep_expensive} if chosen == "selective" else {}
        transformer.enable_gradient_checkpointing(partial(_checkpoint, context))
    return FluxPolicy(chosen, kept, free)


def free_memory(device: torch.device) -> int:
    """Bytes that new tensors on `device` can take: a GPU's, with what PyTorch holds back, or the machine's."""
    if device.type != "cuda":
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _checkpoint(context: dict[str, Any], block: nn.Module, *args: Any) -> tuple[Tensor, Tensor]:
    return checkpoint(block, *args, use_reentrant=False, **context)


def _keep_expensive() -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts(_decide)


def _decide(_context: Any, op: Callable, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    kept = isinstance(op, torch._ops.OpOverload) and op._schema.name in _KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
