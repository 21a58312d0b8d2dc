"""What the transformer keeps for backward, chosen for a run."""

from __future__ import annotations

import torch

from srpo.config import TrainConfig
from srpo.models import Flux
from srpo.plan.memory import activation_room
from srpo.precision import compute_dtype
from srpo_kernels.checkpointing import FluxPolicy, flux_policy, free_memory

__all__ = ["keep_activations"]


def keep_activations(config: TrainConfig, flux: Flux, ranks: int = 1) -> FluxPolicy:
    """Have the blocks of `flux` keep what ``model.checkpointing`` says.

    "auto" is as much as fits beside all that each of `ranks` ranks will make, as `srpo plan` reckons it: to be called
    when all models are loaded, and gradients and optimizer states are not there yet.
    """
    height, width = flux.latent_size(config.srpo.height, config.srpo.width)
    free = None
    if config.model.checkpointing == "auto":
        free = free_memory(flux.device)
        cuda = flux.device.type == "cuda"
        capacity = torch.cuda.get_device_properties(flux.device).total_memory if cuda else free
        free = activation_room(config, ranks, capacity=capacity, free=free)
    return flux_policy(
        flux.transformer,
        config.model.checkpointing,
        batch=2 * config.run.micro_batch,  # both branches go through the model together
        tokens=height * width // 4 + config.model.max_sequence_length,
        dtype=compute_dtype(config.model.precision),
        free=free,
    )
