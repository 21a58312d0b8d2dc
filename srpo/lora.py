"""LoRA adapters, by PEFT: which layers have one, how they start, and the base weights with them merged in.

Adapters are named as diffusers names them, ``LAYER.lora_A.weight`` [rank, in] and ``LAYER.lora_B.weight`` [out, rank]:
a layer's weight W stands for ``W + alpha / rank * B @ A``.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import ConfigDict
from torch import Tensor, nn

from srpo.errors import InputError
from srpo.randomness import generator
from srpo_kernels import freeze_float8

__all__ = ["LoraConfig", "Merged", "adapters", "add_adapters", "merge"]

_ATTENTION = (
    *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
)
#: proj_out of a single block takes what attention and MLP make together.
_MLP = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out")
_MODULATION = ("norm1.linear", "norm1_context.linear", "norm.linear")
_LAYERS = (*_ATTENTION, *_MLP, *_MODULATION)
_PRESETS = {"attention": _ATTENTION, "attention+mlp": (*_ATTENTION, *_MLP), "all": _LAYERS}
_BLOCK = re.compile(r"(?:single_)?transformer_blocks\.\d+\.")


@dataclass(frozen=True)
class LoraConfig:
    """Adapters to train instead of the transformer, whose own weights stay as they are."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    rank: int = 16
    alpha: float | None = None  # adapters count alpha / rank; null: rank
    # Linear layers of blocks: attention, attention+mlp, all (with the modulations), or the ends of layers' names.
    targets: str | tuple[str, ...] = "attention"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"model.lora.rank must be at least 1, got {self.rank}")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"model.lora.alpha must be positive or null (rank), got {self.alpha}")
        if isinstance(self.targets, str) and self.targets not in _PRESETS:
            raise ValueError(
                f"model.lora.targets must be {', '.join(_PRESETS)} or a list of the ends of layers' names, got "
                f"{self.targets!r}{_suggestion(self.targets, _PRESETS)}"
            )
        if not self.targets:
            raise ValueError("model.lora.targets must name at least one layer, got an empty list")
        unknown = [target for target in self._ends() if not any(_ends(layer, target) for layer in _LAYERS)]
        if unknown:
            raise ValueError(
                f"model.lora.targets: {unknown[0]!r} is the end of no layer's name"
                f"{_suggestion(unknown[0], _LAYERS)}; a block's layers are {', '.join(_LAYERS)}"
            )

    @property
    def scale(self) -> float:
        """Factor of ``B @ A``."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def layers(self, transformer: nn.Module) -> list[str]:
        """Names of the layers of `transformer` that have an adapter. Raises `InputError` when a target is not there."""
        names = [
            name for name, module in transformer.named_modules() if isinstance(module, nn.Linear) and _BLOCK.match(name)
        ]
        targets = _PRESETS[self.targets] if isinstance(self.targets, str) else self.targets
        missing = [target for target in targets if not any(_ends(name, target) for name in names)]
        if missing and not isinstance(self.targets, str):
            raise InputError(f"model.lora.targets: the model has no layer whose name ends in {missing[0]}")
        return [name for name in names if any(_ends(name, target) for target in targets)]

    def _ends(self) -> Iterable[str]:
        """Targets that are not a preset, without the block that they may name."""
        return () if isinstance(self.targets, str) else (_BLOCK.sub("", target, count=1) for target in self.targets)

    def __str__(self) -> str:
        targets = self.targets if isinstance(self.targets, str) else ", ".join(self.targets)
        return f"rank {self.rank}, alpha {self.alpha or self.rank:g}, on {targets}"


def add_adapters(transformer: Any, config: LoraConfig, seed: int, *, float8: bool = False) -> None:
    """Put adapters into a diffusers `FluxTransformer2DModel` and freeze all else; they change nothing yet.

    B is zero and A uniform in +-1 / sqrt(in), as PEFT has it, but drawn from `seed` and the layer's name alone. Both
    are of the dtype that the layer had. With `float8`, blocks hold their own weights in e4m3 from now on.

    Raises `InputError`: peft is not installed, or a target is not there.
    """
    try:
        import peft
    except ImportError:
        raise InputError("model.lora needs peft (pip install 'srpo-kernels[lora]')") from None
    names = config.layers(transformer)
    transformer.requires_grad_(False)
    if float8:
        freeze_float8(transformer)
    transformer.add_adapter(
        peft.LoraConfig(r=config.rank, lora_alpha=config.scale * config.rank, target_modules=names)  # type: ignore[arg-type]
    )
    with torch.no_grad():
        for name, parameter in adapters(transformer).items():
            if name.endswith(".lora_A.weight"):
                bound = parameter.shape[1] ** -0.5
                drawn = torch.rand(parameter.shape, generator=generator(seed, 0, 0, f"lora/{name}"))
                parameter.copy_((2 * drawn - 1) * bound)


def adapters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of adapters, by name."""
    named = transformer.named_parameters()
    return {name.replace(".default.", "."): parameter for name, parameter in named if ".lora_" in name}


class Merged(NamedTuple):
    """Weights with adapters merged in, and the norm of what rounding did to them over that of what adapters did."""

    weights: dict[str, Tensor]
    rounding: float


def merge(base: Mapping[str, Tensor], found: Mapping[str, Tensor], scale: float, dtype: torch.dtype) -> Merged:
    """The weights `base` of a transformer with adapters merged in, in `dtype`: computed in fp32, rounded once.

    Raises `ValueError` when an adapter has no layer, or does not fit it.
    """
    merged = {name: tensor.to(dtype) for name, tensor in base.items()}
    change, error = 0.0, 0.0
    for layer in dict.fromkeys(name.partition(".lora_")[0] for name in found):
        weight = base.get(f"{layer}.weight")
        down, up = (found.get(f"{layer}.lora_{which}.weight") for which in "AB")
        if weight is None or down is None or up is None or weight.shape != (up.shape[0], down.shape[1]):
            raise ValueError(f"the adapter of {layer} does not fit")
        added = scale * (up.float() @ down.float())
        exact = weight.float() + added
        merged[f"{layer}.weight"] = rounded = exact.to(dtype)
        change += added.norm().item() ** 2
        error += (rounded.float() - exact).norm().item() ** 2
    return Merged(merged, math.sqrt(error / change) if change else 0.0)


def _ends(name: str, end: str) -> bool:
    return f".{name}".endswith(f".{end}")


def _suggestion(given: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(given, known, 1, 0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
