"""A full-size FLUX.1-dev transformer, random weights: unpatched and patched, eager and compiled."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import measured
from srpo.latents import image_ids, shifted_sigmas
from srpo.sampling import integrate
from srpo_kernels import Float8Rollout, FluxRollout, convert_to_float8, patch

__all__ = ["float8_results", "transformer_results"]

_TEXT = 512
_STEPS = 25  # of a rollout, as in SRPO's recipe
_CONFIG = dict(guidance_embeds=True)  # everything else of FLUX.1-dev is diffusers' default


def transformer_results(
    side: int = 90, batch: int = 1, device: str = "cuda", **changes: Any
) -> Iterator[dict[str, Any]]:
    """Forward, and forward with backward into every parameter, of latents side x side (90: 720 px).

    Milliseconds (median), achieved TFLOP/s and peak memory of each form; then a rollout step and attention backends.
    """
    flops, inputs = _flops(side, batch, changes), _inputs(side, batch, torch.device(device))

    def both(form: str, model: Any, peer: bool = False) -> Iterator[dict[str, Any]]:
        name = f"transformer, {form}"
        yield measured(name, "forward", partial(_forward, model, inputs), flops, peer=peer)
        yield measured(name, "forward+backward", partial(_train, model, inputs), 3 * flops, peer=peer)

    for form, patched, compiled in (
        ("unpatched eager", False, False),
        ("patched eager", True, False),
        ("unpatched compiled", False, True),
        ("patched compiled", True, True),
    ):
        torch.compiler.reset()
        model = _model(changes, device)
        if patched:
            patch(model, strict=True)
        if compiled:
            model.compile_repeated_blocks(fullgraph=True)
        yield from both(form, model, peer=not patched)
        for graph in _graphs(device) if patched and not compiled else ():
            step = partial(_rollout(model, inputs, graph=graph).velocity, inputs["hidden_states"], 1)
            name = f"transformer, {form}, rollout{' as a CUDA graph' if graph else ''}"
            yield measured(name, "forward", step, flops)
        for backend in _backends(device) if patched and not compiled else ():
            model.set_attention_backend(backend)
            yield from both(f"{form}, {backend}", model)
        del model
        torch.cuda.empty_cache()


def float8_results(side: int = 90, batch: int = 1, device: str = "cuda", **changes: Any) -> Iterator[dict[str, Any]]:
    """bf16 against e4m3 on one model: forward, a rollout of 25 steps, quantising all weights, a training pass."""
    flops, inputs, calls = _flops(side, batch, changes), _inputs(side, batch, torch.device(device)), _STEPS
    model = _model(changes, device)
    patch(model, strict=True)
    quantized = Float8Rollout(model)
    yield measured("quantising all weights", "refresh", partial(quantized.refresh, force=True))
    view: Any
    for compiled in (False, True):
        if compiled:
            torch.compiler.reset()
            model.compile_repeated_blocks(fullgraph=True)
            quantized.transformer.compile_repeated_blocks(fullgraph=True)
        for precision, view in (("bf16", model), ("fp8", quantized)):
            form = f"{precision}, patched {'compiled' if compiled else 'eager'}"
            yield measured(form, "forward", partial(_forward, view, inputs), flops)
            for graph in () if compiled else _graphs(device):
                run = partial(_sample, _rollout(view, inputs, graph=graph, steps=calls), inputs["hidden_states"])
                yield measured(f"{form}{', CUDA graph' if graph else ''}", f"rollout of {calls}", run, calls * flops)
    del quantized, view, run
    model = _model(changes, device)
    patch(model, strict=True)
    convert_to_float8(model)
    yield measured("fp8, patched eager", "forward+backward", partial(_train, model, inputs), 3 * flops)


def _graphs(device: str) -> tuple[bool, ...]:
    """Whether to capture a rollout, which only CUDA can."""
    return (False, True) if device == "cuda" else (False,)


def _backends(device: str) -> tuple[str, ...]:
    """Of attention, beside the default."""
    return ("_native_cudnn", "_native_flash") if device == "cuda" else ("_native_math",)


def _sample(rollout: FluxRollout, noise: Tensor) -> Tensor:
    return integrate(rollout.velocity, noise, shifted_sigmas(_STEPS, 3.0).tolist())


def _model(changes: dict[str, Any], device: str) -> Any:
    with torch.device("meta"):
        model = FluxTransformer2DModel(**{**_CONFIG, **changes}).bfloat16()
    model.to_empty(device=device)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model


def _inputs(side: int, batch: int, device: torch.device) -> dict[str, Any]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    return dict(
        hidden_states=normal(batch, (side // 2) ** 2, 64),
        encoder_hidden_states=normal(batch, _TEXT, 4096),
        pooled_projections=normal(batch, 768),
        timestep=torch.full((batch,), 0.5, device=device),
        guidance=torch.full((batch,), 3.5, device=device),
        img_ids=image_ids(side, side).to(device),
        txt_ids=torch.zeros(_TEXT, 3, device=device),
        return_dict=False,
    )


def _flops(side: int, batch: int, changes: dict[str, Any]) -> int:
    """Of one forward pass, counted on shapes."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(**{**_CONFIG, **changes}).bfloat16()
    with FlopCounterMode(display=False) as counter:
        model(**_inputs(side, batch, torch.device("meta")))
    return counter.get_total_flops()


@torch.no_grad()
def _forward(model: Any, inputs: dict[str, Any]) -> Tensor:
    return model(**inputs)[0]


def _train(model: Any, inputs: dict[str, Any]) -> None:
    for parameter in model.parameters():
        parameter.grad = None
    out = model(**inputs)[0]
    out.backward(torch.ones_like(out))


def _rollout(model: Any, inputs: dict[str, Any], *, graph: bool, steps: int = 2) -> FluxRollout:
    return FluxRollout(
        model,
        inputs["encoder_hidden_states"],
        inputs["pooled_projections"],
        shifted_sigmas(steps, 3.0).tolist()[:-1],
        guidance=3.5,
        txt_ids=inputs["txt_ids"],
        img_ids=inputs["img_ids"],
        graph=graph,
    )
