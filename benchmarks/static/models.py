"""FLUX.1-dev, its decoder and ViT-H-14 at full size, on shapes alone: sizes, FLOPs, and what a block costs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, get_args

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.static.step import materialise, models, step_figures
from benchmarks.static.unit import Unit, libraries
from srpo_kernels import patch
from srpo_kernels.checkpointing import Mode, flux_policy
from srpo_kernels.testing.record import Recorder

__all__ = ["FLOORS", "block_figures", "model_figures", "model_units"]

_TOKENS, _TEXT = 2537, 512  # of an image of 720 pixels and its text; the latter's alone
#: Elements that a block's forward moves at least beside products and attention, in units of tokens x width: modulated
#: norms, rotary, GELU, gated residuals.
FLOORS = {"double": 2 + 6 + 4 + 8 + 3, "single": 2 + 4 + 10 + 3}


def model_units() -> Iterator[Unit]:
    tools = libraries()
    for mode in get_args(Mode):
        yield Unit(f"training step, {mode}[720 px]", "model", tools, partial(step_figures, 720, mode))
        for kind in FLOORS:
            yield Unit(f"{kind} block, {mode}[1 x {_TOKENS}]", "model", tools, partial(block_figures, kind, mode))
    for side in (720, 1024):
        for part in ("transformer", "decoder", "reward"):
            yield Unit(f"{part}[1 x {side} px]", "model", tools, partial(model_figures, part, side))


def model_figures(part: str, side: int) -> dict[str, Any]:
    """Parameters, and FLOPs of forward for one image: products of matrices, convolutions and attention."""
    with models(side) as step, torch.no_grad(), FlopCounterMode(display=False) as counter:
        module: nn.Module
        if part == "transformer":
            module = step.flux.transformer
            step.velocity(1)(step.latents(1), torch.empty(1))
        elif part == "decoder":
            module = step.flux.vae.decoder
            step.flux.decode(torch.empty(1, 16, side // 8, side // 8))
        else:
            module = step.reward.model.visual
            step.reward.embed_images(torch.empty(1, 3, side, side))
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return {"parameters": parameters, "flops": counter.get_total_flops()}


def block_figures(kind: str, mode: Mode) -> dict[str, Any]:
    """Launches, and bytes that memory-bound ones move, of one patched block; what it keeps, its output included."""
    with torch.device("meta"):
        counts = dict(num_layers=int(kind == "double"), num_single_layers=int(kind == "single"))
        transformer = FluxTransformer2DModel(**counts).bfloat16()
    width = transformer.inner_dim
    with FakeTensorMode():
        materialise(transformer)
        blocks: Any = transformer.transformer_blocks if kind == "double" else transformer.single_transformer_blocks
        block = blocks[0]
        patch(block, strict=True)
        flux_policy(transformer, mode, batch=1, tokens=_TOKENS)
        run = partial(transformer._gradient_checkpointing_func, block) if mode != "none" else block

        def hidden(tokens: int) -> Tensor:
            return torch.empty(1, tokens, width, dtype=torch.bfloat16, requires_grad=True)

        text = _TEXT if kind == "double" else 0  # single blocks of a patched model take both streams joined
        rotary = tuple(torch.empty(_TOKENS, transformer.config.attention_head_dim) for _ in range(2))
        vector = torch.empty(1, width, dtype=torch.bfloat16, requires_grad=True)
        streams = hidden(_TOKENS - text), hidden(text)
        with Recorder() as forward:
            result = run(*streams, vector, rotary, None)
        kept = forward.kept()
        outputs = [tensor for tensor in result if tensor.requires_grad]
        upstream = [torch.empty_like(tensor) for tensor in outputs]
        with Recorder() as backward:
            torch.autograd.backward(outputs, upstream)
    return {
        "forward_launches": len(forward.launches),
        "backward_launches": len(backward.launches),
        "forward_bytes": forward.moved(),
        "backward_bytes": backward.moved(),
        "forward_floor_bytes": FLOORS[kind] * _TOKENS * width * 2,
        "saved_bytes": kept,
    }
