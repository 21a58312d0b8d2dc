"""A small FLUX transformer on the kernels themselves, in Triton's interpreter and on a GPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from srpo_kernels import patch
from srpo_kernels.testing.budget import SLACK

TEXT, IMAGE = 3, 6


def _outputs(network: Any, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    out = network(
        hidden_states=normal(2, IMAGE, 16),
        encoder_hidden_states=normal(2, TEXT, 24),
        pooled_projections=normal(2, 24),
        timestep=torch.tensor([0.25, 0.5], device=device, dtype=dtype),
        img_ids=torch.arange(3.0 * IMAGE, device=device).reshape(IMAGE, 3),
        txt_ids=torch.zeros(TEXT, 3, device=device),
        return_dict=False,
    )[0]
    gradients = torch.autograd.grad(out, list(network.parameters()), normal(*out.shape))
    names = (name for name, _ in network.named_parameters())
    return {"output": out.detach(), **dict(zip(names, gradients, strict=True))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_and_every_gradient(dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    network = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=24,
        axes_dims_rope=(8, 12, 12),
    ).to(device, dtype)
    exact = _outputs(copy.deepcopy(network).double(), torch.float64, device)
    plain = _outputs(network, dtype, device)
    with patch(network, strict=True):
        ours = _outputs(network, dtype, device)
    for name, expected in exact.items():
        error, theirs = ((x[name].double() - expected).norm() for x in (ours, plain))
        assert error <= SLACK * theirs, name
