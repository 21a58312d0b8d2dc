"""Sampling a FLUX transformer with e4m3 linear layers, while its own weights go on being trained."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from srpo_kernels.float8_linear import FrozenFloat8Linear, is_lora, select_layers
from srpo_kernels.float8_weight import Float8Weight
from srpo_kernels.ops.fp8_linear import fp8_linear
from srpo_kernels.ops.quantize_fp8 import Float8, quantize_fp8
from srpo_kernels.patching import TRANSFORMER_OPS
from srpo_kernels.patching.handle import install
from srpo_kernels.patching.view import view

__all__ = ["Float8Rollout"]


class Float8Rollout:
    """A view of a live `FluxTransformer2DModel` for sampling: the linear layers of its blocks multiply in e4m3.

    Weights are quantised by row, once for every time they change; activations by row, in the kernel that makes them.
    The view holds 1 byte a weight and a scale a row, and shares everything else with the model: norms, biases, and the
    layers that stay as they are: modulations, embeddings, the final layer and what `keep` names. PEFT's LoRA layers
    are quantised with their active adapters added.

    Args:
        transformer: the model, patched or not, with whole parameters (FSDP2 may shard it later, and must have gathered
            them whenever this is used). It stays as it is; its forward hooks do not run.
        keep: layers left out; the start of a name is enough ("transformer_blocks.0", "single_transformer_blocks.37").

    Attributes:
        transformer: the view, a module tree of the model's own classes; `FluxRollout` takes this object in its place.
        names: the layers that multiply in e4m3.

    Raises:
        TypeError: transformer is not a `FluxTransformer2DModel`. ValueError: `keep` names no layer, a module cannot run
            on this package's operators, or parameters are sharded or frozen in e4m3.
    """

    def __init__(self, transformer: Any, *, keep: Collection[str] = ()) -> None:
        from diffusers import FluxTransformer2DModel  # these take a while to import
        from torch.distributed.tensor import DTensor

        from srpo_kernels.patching import flux

        if not isinstance(transformer, FluxTransformer2DModel):
            raise TypeError(
                f"Float8Rollout: transformer must be a FluxTransformer2DModel, got {type(transformer).__name__}"
            )
        if any(isinstance(parameter, DTensor) for parameter in transformer.parameters()):
            raise ValueError("Float8Rollout: transformer's parameters are sharded")
        layers = select_layers("Float8Rollout", transformer, keep)
        if any(isinstance(module, FrozenFloat8Linear) for module in transformer.modules()):
            raise ValueError("Float8Rollout: transformer is frozen in e4m3 (freeze_float8); sample with it as it is")
        self._weights = {name: _Float8Layer(layer) for name, layer in layers.items()}
        self.names = tuple(self._weights)
        self.transformer: Any = view(transformer, partial(_exchange, self._weights))
        for module in self.transformer.modules():
            module.__dict__.pop("forward", None)  # a patch's, in bf16
        install(self.transformer, flux.rules(TRANSFORMER_OPS, float8=True), strict=True)

    @torch.no_grad()
    def refresh(self, *, force: bool = False) -> int:
        """Quantise the weights that changed since the last time, or all; returns how many layers that were.

        A change is seen by the tensors' version counters, which optimizers and `load_state_dict` advance; writing
        through ``.data`` does not: use `force`.
        """
        return sum(layer.refresh(force) for layer in self._weights.values())

    @torch.no_grad()
    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """The model's forward, without gradients, with the weights of now."""
        self.refresh()
        return self.transformer(*arguments, **keywords)


def _exchange(layers: dict[str, _Float8Layer], name: str, module: nn.Module) -> nn.Module | None:
    if name in layers:
        return layers[name]
    if isinstance(module, nn.Linear) or is_lora(module):
        return _Wide(module)
    return nn.Identity() if isinstance(module, nn.Dropout) else None


class _Wide(nn.Module):
    """A layer that stays as it is, also where what comes in is e4m3."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple: not a child, so that the view has no second name for its parameters

    @property
    def weight(self) -> Tensor:
        return self._layer[0].weight

    def forward(self, x: Tensor | Float8) -> Tensor:
        return self._layer[0](x.dequantize(self.weight.dtype) if isinstance(x, Float8) else x)


class _Float8Layer(nn.Module):
    """A layer's weight in e4m3; its bias is the layer's own."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self._layer = (layer,)
        self._quantized: Float8 | None = None
        self._seen: list[tuple[int, int]] = []

    def refresh(self, force: bool) -> bool:
        (layer,) = self._layer
        if isinstance(layer, nn.Linear) and isinstance(layer.weight, Float8Weight):
            self._quantized = layer.weight.quantized  # as FSDP2 has gathered it
            return False
        now = [(parameter.data_ptr(), parameter._version) for parameter in layer.parameters()]
        if self._quantized is not None and now == self._seen and not force:
            return False
        self._quantized, self._seen = quantize_fp8(_merged(layer)), now
        return True

    def forward(self, x: Tensor | Float8) -> Tensor:
        if self._quantized is None:
            self.refresh(True)
        assert self._quantized is not None
        base = getattr(self._layer[0], "base_layer", self._layer[0])
        device = self._quantized.values.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else base.weight.dtype
        return fp8_linear(x, self._quantized, base.bias, dtype=dtype)


def _merged(layer: Any) -> Tensor:
    """The layer's weight [out, in] with what its active adapters add."""
    if isinstance(layer, nn.Linear):
        return layer.weight.detach()
    weight = layer.base_layer.weight.detach()
    if layer.merged or layer.disable_adapters:
        return weight
    for adapter in layer.active_adapters:
        if adapter in layer.lora_A:
            weight = weight + layer.get_delta_weight(adapter).to(weight.dtype)
    return weight
