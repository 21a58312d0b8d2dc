"""A FLUX transformer of a few thousand parameters, and what it takes."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

TEXT, IMAGE = 5, 12


def model(dtype: torch.dtype = torch.float32, **changes: Any) -> FluxTransformer2DModel:
    torch.manual_seed(0)
    config = dict(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=24,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    made = FluxTransformer2DModel(**{**config, **changes})
    for name, parameter in made.named_parameters():
        if "norm_" in name and name.endswith("weight"):  # query and key norms start at one, which hides mistakes
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    made.time_text_embed = _TimeEmbedding(made.inner_dim)
    return made.to(dtype)


class _TimeEmbedding(torch.nn.Module):
    """A learned vector: rounding a sinusoid's argument to bf16 would drown every error but its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.vector = torch.nn.Parameter(torch.randn(width))

    def forward(self, timestep: Tensor, *_: Tensor) -> Tensor:
        return self.vector * (1 + timestep[:, None] / 1024)


def inputs(dtype: torch.dtype = torch.float32, batch: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    ids = torch.stack([torch.zeros(IMAGE), torch.arange(IMAGE) // 4, torch.arange(IMAGE) % 4], -1)
    return dict(
        hidden_states=normal(batch, IMAGE, 16),
        encoder_hidden_states=normal(batch, TEXT, 24),
        pooled_projections=normal(batch, 24),
        timestep=torch.linspace(0.25, 0.75, batch).to(dtype),  # exact in every dtype
        guidance=torch.full((batch,), 3.5, dtype=dtype),
        img_ids=ids,
        txt_ids=torch.zeros(TEXT, 3),
        return_dict=False,
    )
