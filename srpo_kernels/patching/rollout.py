"""Sampling with a patched FLUX transformer: what no step changes is made once, before the loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from srpo_kernels.patching.float8_rollout import Float8Rollout
from srpo_kernels.patching.handle import is_patched

__all__ = ["FluxRollout", "Modulations", "run_blocks"]


class Modulations:
    """Stands in for the time embedding: every adaptive norm's modulation vectors [B, k D], already computed."""

    def __init__(self, vectors: Mapping[nn.Module, Tensor]) -> None:
        self._vectors = vectors

    def __getitem__(self, norm: nn.Module) -> Tensor:
        return self._vectors[norm]


def run_blocks(
    transformer: Any, hidden: Tensor, encoder: Tensor, temb: Tensor | Modulations, rotary: tuple[Tensor, Tensor]
) -> Tensor:
    """Image tokens [B, S, D] after all blocks.

    A single block treats text and image alike, so it gets both as its image, joined once, and an empty text.
    """

    def run(block: nn.Module, *streams: Tensor) -> tuple[Tensor, Tensor]:
        if transformer.gradient_checkpointing and torch.is_grad_enabled():
            return transformer._gradient_checkpointing_func(block, *streams, temb, rotary, None)
        return block(*streams, temb, rotary, None)

    for block in transformer.transformer_blocks:
        encoder, hidden = run(block, hidden, encoder)
    text = encoder.shape[1]
    joint, none = torch.cat([encoder, hidden], dim=1), encoder.new_empty(encoder.shape[0], 0, encoder.shape[2])
    for block in transformer.single_transformer_blocks:
        _, joint = run(block, joint, none)
    return joint[:, text:]


class FluxRollout:
    """Velocities of one batch along a fixed schedule, without gradients.

    Time and guidance embeddings and the modulation vectors of every block for every step come out of one batched GEMM a
    layer; the text stream's input, position ids and rotary tables are made once. No step waits for the device. The
    weights must not change while it is in use.

    Args:
        transformer: a patched `FluxTransformer2DModel` (see `srpo_kernels.patch`) whose parameters are not sharded, or
            a `Float8Rollout`, whose weights are quantised anew where they changed.
        prompt_embeds: T5 embeddings [B, L, D_text]. pooled: CLIP's pooled embeddings [B, P].
        timesteps: noise level of every step, in [0, 1]. guidance: its scale, for a guidance-distilled model.
        txt_ids [L, 3], img_ids [S, 3]: positions.
        graph: capture one step as a CUDA graph and replay it (CUDA only).

    Raises:
        ValueError: the transformer is not patched or is sharded, or graph without CUDA.
    """

    @torch.no_grad()
    def __init__(
        self,
        transformer: Any,
        prompt_embeds: Tensor,
        pooled: Tensor,
        timesteps: Sequence[float],
        *,
        txt_ids: Tensor,
        img_ids: Tensor,
        guidance: float | None = None,
        graph: bool = False,
    ) -> None:
        if isinstance(transformer, Float8Rollout):
            transformer.refresh()
            transformer = transformer.transformer
        if reason := self.unavailable(transformer):
            raise ValueError(f"FluxRollout: {reason}")
        if graph and prompt_embeds.device.type != "cuda":
            raise ValueError(f"FluxRollout: graph=True needs CUDA tensors, got {prompt_embeds.device.type}")
        self._transformer = transformer
        self._encoder = transformer.context_embedder(prompt_embeds)
        self._rotary = transformer.pos_embed(torch.cat([txt_ids, img_ids]))
        batch, steps = prompt_embeds.shape[0], len(timesteps)
        dtype, device = self._encoder.dtype, prompt_embeds.device
        levels = [torch.tensor(timesteps, device=device).repeat_interleave(batch).to(dtype) * 1000]
        if guidance is not None:
            levels.append(torch.full_like(levels[0], guidance) * 1000)
        temb = transformer.time_text_embed(*levels, pooled.repeat(steps, 1))
        self._modulations = [
            Modulations(step)
            for step in _unstack({norm: _vectors(norm, temb) for norm in _adaptive_norms(transformer)}, batch)
        ]
        self._graph: _Graph | None = None
        self._wants_graph = graph

    @staticmethod
    def unavailable(transformer: Any) -> str | None:
        """Why `transformer` cannot be used, or None."""
        if not all(map(is_patched, _adaptive_norms(transformer))):
            return "transformer's adaptive norms are not patched; call srpo_kernels.patch(transformer) first"
        from torch.distributed.tensor import DTensor  # takes a while to import

        if any(isinstance(parameter, DTensor) for parameter in transformer.parameters()):
            return "transformer's parameters are sharded; call the transformer itself instead"
        return None

    @torch.no_grad()
    def velocity(self, latents: Tensor, step: int) -> Tensor:
        """The model's output [B, S, C] for `latents` [B, S, C] at ``timesteps[step]``."""
        if not self._wants_graph:
            return self._run(latents, self._modulations[step])
        if self._graph is None:
            self._graph = _Graph(self._run, latents, self._modulations[step])
        return self._graph(latents, self._modulations[step])

    def _run(self, latents: Tensor, modulations: Modulations) -> Tensor:
        model = self._transformer
        hidden = run_blocks(model, model.x_embedder(latents), self._encoder, modulations, self._rotary)
        return model.proj_out(model.norm_out(hidden, modulations))


class _Graph:
    """One step recorded on fixed buffers. Replays overwrite the result of the last one."""

    def __init__(self, run: Any, latents: Tensor, modulations: Modulations) -> None:
        self._latents = latents.clone()
        self._modulations = Modulations({norm: vectors.clone() for norm, vectors in modulations._vectors.items()})
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries and kernels initialise themselves outside the recording
            run(self._latents, self._modulations)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._out = run(self._latents, self._modulations)

    def __call__(self, latents: Tensor, modulations: Modulations) -> Tensor:
        self._latents.copy_(latents)
        torch._foreach_copy_(list(self._modulations._vectors.values()), list(modulations._vectors.values()))
        self._graph.replay()
        return self._out.clone()


def _adaptive_norms(transformer: Any) -> list[Any]:
    blocks = transformer.transformer_blocks
    doubles = [norm for block in blocks for norm in (block.norm1, block.norm1_context)]
    return [*doubles, *(block.norm for block in transformer.single_transformer_blocks), transformer.norm_out]


def _vectors(norm: Any, temb: Tensor) -> Tensor:
    return norm.linear(norm.silu(temb))


def _unstack(vectors: Mapping[Any, Tensor], batch: int) -> list[dict[Any, Tensor]]:
    """From all steps' vectors of every norm to every norm's vectors of each step."""
    norms, stacked = zip(*vectors.items(), strict=True)
    steps = zip(*(rows.split(batch) for rows in stacked), strict=True)
    return [dict(zip(norms, step, strict=True)) for step in steps]
