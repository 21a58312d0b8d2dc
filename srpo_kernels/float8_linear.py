"""Linear layers that multiply in e4m3: trained with exact weights, or frozen in e4m3 below adapters."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from srpo_kernels.float8_weight import Float8Weight, in_float8
from srpo_kernels.ops.fp8_linear import fp8_linear, fp8_unsupported
from srpo_kernels.ops.quantize_fp8 import Float8, quantize_fp8

__all__ = [
    "Backward",
    "Float8Linear",
    "FrozenFloat8Linear",
    "convert_to_float8",
    "freeze_float8",
    "is_lora",
    "revert_float8",
    "select_layers",
]

#: What the gradient of a layer's input is computed in; that of its weight never is in e4m3.
Backward = Literal["bf16", "fp8"]


class Float8Linear(nn.Linear):
    """`nn.Linear` whose forward multiplies in e4m3: weight and input are quantised by row, each time.

    Parameters, their names and the state dict are those of `nn.Linear`, and so is what it keeps for backward: its input
    and the weight itself. Gradients are of the exact weight, not of the quantised one (straight through).

    The compute dtype is autocast's, and without autocast that of x and weight, bf16 in training. Gradients:

    - of the input, `backward` "bf16": ``g @ weight`` in the compute dtype, as `nn.Linear` has it; "fp8": the same in
      e4m3, g quantised by row and the weight by column;
    - of weight and bias: in the compute dtype, as `nn.Linear` has them.

    Where `fp8_unsupported` gives a reason, the quantised values are multiplied in bf16 (on the CPU in fp32).
    `gather_float8` says what changes where FSDP2 gathers the weight in e4m3.

    Args:
        in_features, out_features, bias, device, dtype: as for `nn.Linear`.
        backward: "bf16" or "fp8".

    Shapes:
        x [..., K], weight [N, K], bias [N] -> [..., N] in the compute dtype.

    Raises:
        ValueError: an unknown backward; in forward, shapes or devices do not fit. TypeError: in forward without
            autocast, x and weight differ in dtype.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        backward: Backward = "bf16",
    ) -> None:
        _check_backward("Float8Linear", backward)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.backward = backward

    def forward(self, x: Tensor) -> Tensor:
        dtype = _compute_dtype(x)
        if dtype != self.weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"Float8Linear: x must be {self.weight.dtype}, as weight is, got {x.dtype}")
        return _Multiply.apply(x.to(dtype), self.weight, None, self.bias, self.backward)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, backward={self.backward!r}"


class FrozenFloat8Linear(nn.Linear):
    """A linear layer that holds its weight in e4m3 with a scale a row, and nothing else; made by `freeze_float8`.

    Parameters, none of which wants a gradient:

    - weight: uint8 [N, 1, K], the bits of e4m3 values;
    - weight_scale: uint8 [N, 4], those of an fp32 scale a row;
    - bias: [N], as it was.

    Bytes, because what is floating would be cast: by ``module.to(dtype)``, by FSDP2's mixed precision, and by PEFT,
    which gives new adapters the dtype of the weight (here `compute_dtype`, which the weight had). And of three
    dimensions, so that a weight that is not quantised does not fit: loading a checkpoint of one, or merging an adapter,
    raises.

    Both are sharded by rows under FSDP2, which then gathers 1 byte a weight.
    """

    compute_dtype: torch.dtype
    weight_scale: nn.Parameter
    backward: Backward

    def quantized(self) -> Float8:
        """The weight: values [N, K] and scale [N, 1], views of the parameters."""
        return Float8(self.weight[:, 0].view(torch.float8_e4m3fn), self.weight_scale.view(torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return _Multiply.apply(x.to(_compute_dtype(x)), *self.quantized(), self.bias, self.backward)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, backward={self.backward!r}"


class _Multiply(torch.autograd.Function):
    """x [..., K] and a weight [N, K], or e4m3 values [N, K] and their scale [N, 1] -> [..., N] in the dtype of x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, backward: Backward
    ) -> Tensor:
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if wants_weight else None, weight if wants_x else None, scale)
        ctx.backward_in, ctx.inputs, ctx.dtypes = backward, x.shape[-1], (weight.dtype, bias is not None and bias.dtype)
        quantized = in_float8(weight) if scale is None else Float8(weight, scale)
        out = fp8_linear(x, quantized, bias, dtype=x.dtype)
        return torch.ops.aten._unsafe_view(out, out.shape)  # no view any more, which nobody could write to

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        if isinstance(weight, Float8Weight):
            weight, scale = weight.quantized
        wants_x, wants_weight, _, wants_bias, _ = ctx.needs_input_grad
        rows = gradient.reshape(-1, gradient.shape[-1])
        dx = dweight = dbias = None
        if wants_x:
            of_rows = _input_gradient_fp8 if ctx.backward_in == "fp8" else _input_gradient
            dx = of_rows(rows, weight, scale).view(*gradient.shape[:-1], ctx.inputs)
        if wants_weight:
            dweight = (rows.T @ x.reshape(-1, ctx.inputs)).to(ctx.dtypes[0])
        if wants_bias:
            dbias = rows.sum(0).to(ctx.dtypes[1])
        return dx, dweight, None, dbias, None


def _input_gradient(gradient: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """``gradient @ weight`` in the gradient's dtype; an e4m3 weight is dequantised for as long as it takes."""
    dtype = gradient.dtype
    return gradient @ (weight.to(dtype) if scale is None else Float8(weight, scale).dequantize(dtype))


def _input_gradient_fp8(gradient: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """The same in e4m3. The sum runs over the weight's rows now, so that its transpose is what is quantised by row."""
    if scale is None:
        return fp8_linear(gradient, quantize_fp8(weight.T), dtype=gradient.dtype)
    # What is e4m3 already is not rounded again: its scales, constants of the sum's terms, go into the gradient.
    ones = scale.new_ones(weight.shape[1], 1)
    return fp8_linear(gradient * scale.T, Float8(weight.T.contiguous(), ones), dtype=gradient.dtype)


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


# --- of a whole transformer -------------------------------------------------------------------


def convert_to_float8(module: nn.Module, *, keep: Collection[str] = (), backward: Backward = "bf16") -> list[str]:
    """Make the linear layers of a FLUX transformer's blocks `Float8Linear`, in place.

    Modulations, embeddings and the final layer stay as they are. Modules and parameters remain the very same objects:
    optimizers, hooks, patches and PEFT's wrappers (whose base layers they are) stay valid. Before or after FSDP2's
    ``fully_shard``. Called again, layers that are converted take on the new `backward`.

    Args:
        module: a `FluxTransformer2DModel`, patched or not, or a module with its ``transformer_blocks`` or
            ``single_transformer_blocks``.
        keep: layers left as they are; the start of a name is enough ("transformer_blocks.0.").
        backward: see `Float8Linear`.

    Returns:
        The names of the layers that are `Float8Linear` now. One warning names those that cannot be, and why: their GPU
        or shape has no e4m3 GEMM, or their class or forward is another library's.

    Raises:
        TypeError: module is not a module, or keep is a string. ValueError: an unknown backward, keep names no layer, or
            module has none.
    """
    converted = _exchangeable("convert_to_float8", module, keep, backward, (nn.Linear, Float8Linear))
    for layer in converted.values():
        layer.__class__ = Float8Linear
        layer.backward = backward
    return list(converted)


def revert_float8(module: nn.Module) -> list[str]:
    """Make every `Float8Linear` within `module` an `nn.Linear` again, in place; returns their names."""
    found: dict[str, Any] = {name: layer for name, layer in module.named_modules() if type(layer) is Float8Linear}
    for layer in found.values():
        del layer.backward
        layer.__class__ = nn.Linear
    return list(found)


@torch.no_grad()
def freeze_float8(module: nn.Module, *, keep: Collection[str] = (), backward: Backward = "bf16") -> list[str]:
    """Exchange the weights of a FLUX transformer's blocks for e4m3 ones, half as large: a frozen base for adapters.

    The layers are those of `convert_to_float8`. Each holds 1 byte a weight and an fp32 scale a row, with no other copy
    (see `FrozenFloat8Linear`), and gives gradients to its input only: "bf16" dequantises one layer at a time for that,
    "fp8" multiplies in e4m3, in which only the gradient is rounded. The other parameters stay as they are.

    Load a bf16 checkpoint before; a frozen model's own state dict loads into a frozen model, of whatever weights, also
    on the meta device with ``assign=True``. Add adapters before or after; freeze before ``fully_shard`` and before an
    optimizer is made. Called again, layers that are frozen take on the new `backward`.

    Args:
        module, keep: as for `convert_to_float8`. backward: of what the input's gradient is computed in.

    Returns:
        The names of the layers that are frozen in e4m3 now; one warning names those that cannot be, and why.

    Raises:
        As `convert_to_float8`. ValueError: parameters are sharded.
    """
    from torch.distributed.tensor import DTensor  # takes a while to import

    if isinstance(module, nn.Module) and any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        raise ValueError("freeze_float8: module's parameters are sharded; freeze before fully_shard")
    frozen = _exchangeable("freeze_float8", module, keep, backward, (nn.Linear, Float8Linear, FrozenFloat8Linear))
    for layer in frozen.values():
        layer.backward = backward
        if type(layer) is FrozenFloat8Linear:
            continue
        values, scale = quantize_fp8(layer.weight)
        layer.compute_dtype = layer.weight.dtype
        layer.__class__ = FrozenFloat8Linear
        layer.weight = nn.Parameter(values.view(torch.uint8).unsqueeze(1), requires_grad=False)
        layer.weight_scale = nn.Parameter(scale.view(torch.uint8), requires_grad=False)
        if layer.bias is not None:
            layer.bias.requires_grad_(False)
    return list(frozen)


def select_layers(caller: str, transformer: nn.Module, keep: Collection[str]) -> dict[str, nn.Module]:
    """By name, the linear layers of blocks, or PEFT's wrappers of them, but for adaptive norms' and those of `keep`."""
    if not isinstance(transformer, nn.Module):
        raise TypeError(f"{caller}: module must be a torch.nn.Module, got {type(transformer).__name__}")
    if isinstance(keep, str):
        raise TypeError(f"{caller}: keep must be a collection of names, got the string {keep!r}")
    found: dict[str, nn.Module] = {}
    for name, module in transformer.named_modules():
        inside = name.startswith(("transformer_blocks.", "single_transformer_blocks."))
        norm = any(part.startswith("norm") for part in name.split("."))
        covered = name.startswith(tuple(f"{outer}." for outer in found))
        if inside and not norm and not covered and (isinstance(module, nn.Linear) or is_lora(module)):
            found[name] = module
    if not found:
        raise ValueError(f"{caller}: module has no linear layers in transformer_blocks or single_transformer_blocks")
    unknown = [start for start in keep if not any(name.startswith(start) for name in found)]
    if unknown:
        raise ValueError(f"{caller}: keep names no linear layer of a block: {', '.join(unknown)}")
    return {name: layer for name, layer in found.items() if not name.startswith(tuple(keep))}


def is_lora(module: nn.Module) -> bool:
    """Whether this is PEFT's wrapper of a linear layer, which is told by what it has: PEFT need not be installed."""
    return hasattr(module, "get_delta_weight") and isinstance(getattr(module, "base_layer", None), nn.Linear)


def _exchangeable(
    caller: str, module: nn.Module, keep: Collection[str], backward: Backward, classes: tuple[type[nn.Linear], ...]
) -> dict[str, Any]:
    """The layers, of `classes` exactly, that may change their class; a warning names the others."""
    _check_backward(caller, backward)
    chosen = select_layers(caller, module, keep)
    layers: dict[str, Any] = {name: getattr(layer, "base_layer", layer) for name, layer in chosen.items()}
    refused = {name: reason for name, layer in layers.items() if (reason := _refusal(layer, classes))}
    if refused:
        named = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        warnings.warn(f"{caller}: left as they are: {named}", stacklevel=3)
    return {name: layer for name, layer in layers.items() if name not in refused}


def _refusal(layer: nn.Linear, classes: tuple[type[nn.Linear], ...]) -> str | None:
    """Why a layer's class is not to be exchanged."""
    if type(layer) not in classes:
        return f"it is a {type(layer).__name__}"
    if "forward" in layer.__dict__:
        return "another library has replaced its forward"
    device = layer.weight.device
    # Elsewhere, e4m3 is emulated: in tests, or before the model moves to its GPU.
    return fp8_unsupported(layer.weight.shape, device) if device.type == "cuda" else None


def _check_backward(caller: str, backward: Backward) -> None:
    if backward not in get_args(Backward):
        raise ValueError(f"{caller}: backward must be bf16 or fp8, got {backward!r}")
