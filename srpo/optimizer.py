"""From a recipe's `optimizer` section to an optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from srpo.objective import SRPOConfig
from srpo.precision import Precision
from srpo_kernels.optim import AdamW
from srpo_kernels.optim.streaming import DEVICE_BYTES

__all__ = ["OptimizerConfig", "load_optimizer", "set_gradient_dtype", "take_step"]

#: Bytes a parameter beside itself and its gradient.
_REMAINDER = {"fp32": 0.0, "split32": 2.0, "split24": 1.0, "bf16_sr": 0.0}
_MOMENTS = {"fp32": 8.0, "M4": 4.0, "M3": 3.1, "M2": 2.1}


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW: srpo_kernels' own, or torch's to compare with. Its numbers are the objective's.

    "auto" stores fp32 weights and moments for precision fp32, and split32 with M4 otherwise.
    """

    name: Literal["srpo", "torch"] = "srpo"
    weights: Literal["auto", "fp32", "split32", "split24", "bf16_sr"] = "auto"
    moments: Literal["auto", "fp32", "M4", "M3", "M2"] = "auto"
    # What gradients are summed in over the batches of an update; auto: fp32 when there are several.
    gradients: Literal["auto", "fp32", "bf16"] = "auto"
    # states: moments, remainders and averages stay in host memory, through which a step takes about a second for 12 B
    # parameters; ema: averages do.
    offload: Literal["none", "ema", "states"] = "none"
    # Also keep an fp32 exponential moving average of the weights, taken every `ema_every` updates; it is what sample
    # grids show, and what `srpo export --ema` and `srpo sample --ema` use.
    ema_decay: float | None = None
    ema_every: int = 1

    def __post_init__(self) -> None:
        if self.name == "torch" and not {self.weights, self.moments} <= {"auto", "fp32"}:
            raise ValueError("optimizer.weights and optimizer.moments must be auto or fp32 with optimizer.name torch")
        if self.name == "torch" and self.offload != "none":
            raise ValueError(f"optimizer.offload {self.offload} needs optimizer.name srpo")
        if self.name == "torch" and self.ema_decay is not None:
            raise ValueError("optimizer.ema_decay needs optimizer.name srpo")
        if self.offload == "ema" and self.ema_decay is None:
            raise ValueError("optimizer.offload ema needs optimizer.ema_decay")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"optimizer.ema_decay must be in [0, 1) or null, got {self.ema_decay}")
        if self.ema_every < 1:
            raise ValueError(f"optimizer.ema_every must be at least 1, got {self.ema_every}")

    def modes(self, precision: Precision) -> tuple[str, str]:
        """How weights and moments are stored."""
        low = precision != "fp32" and self.name == "srpo"
        weights = ("split32" if low else "fp32") if self.weights == "auto" else self.weights
        return weights, ("M4" if low else "fp32") if self.moments == "auto" else self.moments

    def model_weights(self, precision: Precision) -> Literal["fp32", "bf16"]:
        """What the model holds while it is trained."""
        return "fp32" if self.modes(precision)[0] == "fp32" else "bf16"

    def reserved_bytes(self, parameters: Sequence[Tensor], precision: Precision) -> int:
        """Bytes on the device of gradients and optimizer state for `parameters`."""
        weights, moments = self.modes(precision)
        gradient = 2 if self.gradients == "bf16" and weights != "fp32" else 4
        count = sum(parameter.numel() for parameter in parameters)
        if self.offload == "states":
            return count * gradient + DEVICE_BYTES
        averages = 4 if self.ema_decay is not None and self.offload == "none" else 0
        return int(count * (gradient + _REMAINDER[weights] + _MOMENTS[moments] + averages))


def set_gradient_dtype(config: OptimizerConfig, parameters: Iterable[nn.Parameter], backwards: int) -> None:
    """Have gradients summed in fp32 where the recipe wants it, given updates of so many backwards; before sharding."""
    if config.name == "srpo" and (config.gradients == "fp32" or (config.gradients == "auto" and backwards > 1)):
        for parameter in parameters:
            parameter.grad_dtype = torch.float32


def load_optimizer(
    config: OptimizerConfig,
    objective: SRPOConfig,
    parameters: Sequence[nn.Parameter],
    *,
    precision: Precision,
    seed: int,
) -> torch.optim.Optimizer:
    """The optimizer of `parameters`."""
    numbers: dict[str, Any] = dict(
        lr=objective.learning_rate,
        betas=objective.betas,
        eps=objective.eps,
        weight_decay=objective.weight_decay,
    )
    if config.name == "torch":
        return torch.optim.AdamW(parameters, **numbers)
    weights, moments = config.modes(precision)
    return AdamW(
        parameters,
        **numbers,
        weights=weights,
        moments=moments,
        max_grad_norm=objective.max_grad_norm,
        seed=seed,
        offload=config.offload,
        ema_decay=config.ema_decay,
        ema_every=config.ema_every,
    )


def take_step(optimizer: torch.optim.Optimizer, max_grad_norm: float) -> dict[str, float]:
    """Clip and step, unless a gradient is not finite; returns `grad_norm` before the clip, and what else is known.

    srpo_kernels' optimizer also tells `changed`, the fraction of bf16 weights that the update moved, `update_ratio`,
    its norm over that of the weights, and `nonfinite`, the gradient elements that were not finite.
    """
    if isinstance(optimizer, AdamW):
        optimizer.step()
        found = {name: value.item() for name, value in optimizer.telemetry.items()}
        ratio = found["update_norm"] / found["weight_norm"] if found["weight_norm"] else 0.0
        return {"update_ratio": ratio, **{name: found[name] for name in ("grad_norm", "changed", "nonfinite")}}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    if norm.isfinite():
        optimizer.step()
    return {"grad_norm": norm.item()}
