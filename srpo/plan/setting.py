"""What is planned: a recipe, its models, GPUs, and how weights are spread over them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

import torch

from srpo.batches import clean_batches
from srpo.config import TrainConfig
from srpo.errors import InputError
from srpo.hardware import GPUS_PER_NODE, Gpu
from srpo.lora import LoraConfig
from srpo.plan.sizes import Sizes
from srpo.precision import compute_dtype

__all__ = ["Setting", "Sharding"]

#: none: every GPU holds the whole model; fsdp: all share one; hsdp: those of a node do.
Sharding = Literal["none", "fsdp", "hsdp"]


@dataclass(frozen=True)
class Setting:
    """`count` GPUs that run `config`. Raises `InputError` when its batch cannot be dealt out to them."""

    config: TrainConfig
    gpu: Gpu
    count: int
    sharding: Sharding
    sizes: Sizes

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InputError(f"--count must be at least 1, got {self.count}")
        if self.sharding not in get_args(Sharding):
            raise InputError(f"run.sharding must be one of {', '.join(get_args(Sharding))}, got {self.sharding!r}")
        if self.sharding == "hsdp" and self.count > GPUS_PER_NODE and self.count % GPUS_PER_NODE:
            raise InputError(f"run.sharding hsdp needs whole nodes of {GPUS_PER_NODE} GPUs, got {self.count}")
        clean_batches(self.config, self.count)

    @property
    def batches(self) -> int:
        """Clean batches of each rank in an update."""
        return clean_batches(self.config, self.count)

    @property
    def draws(self) -> int:
        """Gradient passes of each rank in an update."""
        return self.batches * self.config.run.draws_per_rollout

    @property
    def rows(self) -> int:
        """Images in a gradient pass: all branches go through the models together."""
        return (1 + self.config.srpo.inversion) * self.config.run.micro_batch

    @property
    def shards(self) -> int:
        """GPUs that share one copy of weights, gradients and states."""
        return {"none": 1, "fsdp": self.count, "hsdp": min(self.count, GPUS_PER_NODE)}[self.sharding]

    @property
    def item(self) -> int:
        """Bytes of an activation's element."""
        return compute_dtype(self.config.model.precision).itemsize

    @property
    def float8(self) -> bool:
        """Whether rollouts multiply in e4m3."""
        return self.config.model.precision in ("fp8-rollout", "fp8")

    @property
    def float8_copy(self) -> int:
        """Bytes of the e4m3 copy that rollouts multiply with."""
        is_one = self.frozen_float8 or (self.config.run.fp8_all_gather and self.shards > 1)
        return self.sizes.float8 if self.float8 and not is_one else 0

    @property
    def lora(self) -> LoraConfig | None:
        return self.config.model.lora

    @cached_property
    def trained(self) -> int:
        """Parameters that are trained: the transformer's, or its adapters'."""
        return self.sizes.parameters if self.lora is None else self.sizes.adapters(self.lora)

    @property
    def weight_item(self) -> int:
        """Bytes of a trained weight as the model holds it."""
        if self.lora is not None:
            return self.item
        return 4 if self.config.optimizer.model_weights(self.config.model.precision) == "fp32" else 2

    @property
    def frozen_float8(self) -> bool:
        """Whether blocks hold their linear weights in e4m3, below adapters, and nothing else."""
        return self.lora is not None and self.config.model.precision == "fp8"

    @property
    def weight_bytes(self) -> int:
        """Of the transformer as it is held, whole."""
        frozen = self.sizes.float8 if self.frozen_float8 else 0
        adapters = 0 if self.lora is None else self.trained
        return (self.sizes.parameters - frozen + adapters) * self.weight_item + frozen

    @property
    def gathered_bytes(self) -> int:
        """Of the transformer as ranks that share it gather it, whole."""
        saved = self.sizes.float8 * (self.weight_item - 1) if self.config.run.fp8_all_gather else 0
        return self.weight_bytes - saved

    @property
    def block_bytes(self) -> float:
        """Of its largest block, gathered."""
        return self.sizes.largest_block * self.gathered_bytes / self.sizes.parameters

    @property
    def autocast(self) -> bool:
        """Whether every forward pass casts fp32 weights to bf16."""
        return self.weight_item > self.item

    @property
    def gradient_item(self) -> int:
        """Bytes of a gradient's element; as `srpo.optimizer.load_optimizer` decides."""
        summed = self.config.optimizer.gradients
        wide = summed == "fp32" or (summed == "auto" and self.draws > 1)
        return 4 if wide or self.weight_item == 4 else 2

    @cached_property
    def state_bytes(self) -> int:
        """Bytes of remainders and moments of all trained parameters, wherever they are."""
        optimizer = replace(self.config.optimizer, gradients="fp32", offload="none", ema_decay=None)
        whole = optimizer.reserved_bytes([torch.empty(self.trained, device="meta")], self.config.model.precision)
        return whole - 4 * self.trained

    @property
    def average_bytes(self) -> int:
        """Bytes of their averages, wherever they are."""
        return 0 if self.config.optimizer.ema_decay is None else 4 * self.trained

    @property
    def gathers_whole(self) -> bool:
        """Whether sharded weights are gathered whole for a rollout."""
        return self.shards > 1 and self.offline < 1 and self.config.run.rollout_gather == "whole"

    @property
    def keeps_whole_gradients(self) -> bool:
        """Whether ranks that share parameters hold whole gradients until an update's last backward."""
        return self.shards > 1 and self.config.run.reduce == "update" and self.draws > 1

    @property
    def offloaded(self) -> int:
        """Bytes of states and averages that are in host memory."""
        kind = self.config.optimizer.offload
        return {"none": 0, "ema": self.average_bytes, "states": self.state_bytes + self.average_bytes}[kind]

    @property
    def recomputes_images(self) -> bool:
        """Whether backward makes images and scores again, as the trainer has it."""
        return self.config.model.checkpointing != "none"

    @property
    def offline(self) -> float:
        """The part of clean batches that are real images."""
        data = self.config.data
        return {"online": 0.0, "offline": 1.0, "mixed": data.offline_fraction}[data.mode]

    @property
    def twins(self) -> int:
        """Images scored for one of a gradient pass."""
        return 2 if self.config.srpo.form == "image_only" else 1
