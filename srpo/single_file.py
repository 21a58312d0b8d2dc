"""A FLUX transformer as one .safetensors file, under the names and shapes of Black Forest Labs' own code.

ComfyUI and ``FluxTransformer2DModel.from_single_file`` read this layout. Against diffusers' it fuses query, key and
value, in single blocks also with the MLP's input, and the last modulation has its halves (shift, scale) exchanged.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from srpo.errors import InputError
from srpo_kernels import quantize_fp8

__all__ = [
    "BLOCK_LAYERS",
    "StoredDtype",
    "from_bfl",
    "quantize",
    "read_single_file",
    "single_file_metadata",
    "stored_bytes",
    "to_bfl",
    "write_single_file",
]

#: What weights are stored in. "fp8": the linear layers of blocks in e4m3 with one scale each, all else in bf16.
StoredDtype = Literal["fp32", "bf16", "fp8"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

#: Layers with weight and bias: BFL's name -> diffusers' names, whose rows it holds one after the other.
_OUTER = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}
_GUIDANCE = {
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
}
_DOUBLE = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
_SINGLE = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
}
#: Norms, which have a weight only: BFL's ``.scale`` -> diffusers' ``.weight``.
_DOUBLE_NORMS = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
_SINGLE_NORMS = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}

#: Blocks of a kind: BFL's name -> diffusers', and their linear layers.
BLOCK_LAYERS: dict[str, tuple[str, Mapping[str, tuple[str, ...]]]] = {
    "double_blocks": ("transformer_blocks", _DOUBLE),
    "single_blocks": ("single_transformer_blocks", _SINGLE),
}

_SWAPPED = "final_layer.adaLN_modulation.1."
_PREFIX = "model.diffusion_model."
_MARKER, _SCALE = "scaled_fp8", ".scale_weight"


def to_bfl(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a `FluxTransformer2DModel`, of any size, as Black Forest Labs name and shape it.

    Raises `ValueError` naming what is missing or has no place there.
    """
    count = _blocks(state, "transformer_blocks"), _blocks(state, "single_transformer_blocks")
    names = dict(_names(*count, guidance=any("guidance_embedder" in name for name in state)))
    _check_names(state, {part for parts in names.values() for part in parts})
    return {name: _swapped(name, _joined([state[part] for part in parts])) for name, parts in names.items()}


def from_bfl(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_bfl`.

    Raises `ValueError` naming what is missing or has no place there.
    """
    count = _blocks(state, "double_blocks"), _blocks(state, "single_blocks")
    names = dict(_names(*count, guidance=any(name.startswith("guidance_in.") for name in state)))
    _check_names(state, names)
    width = state["img_in.weight"].shape[0]
    converted: dict[str, Tensor] = {}
    for name, parts in names.items():
        tensor = _swapped(name, state[name])
        sizes = [width] * 3 + [tensor.shape[0] - 3 * width] * (len(parts) - 3)
        pieces = tensor.split(sizes) if len(parts) > 1 else [tensor]
        converted.update((part, piece.contiguous()) for part, piece in zip(parts, pieces, strict=True))
    return converted


def quantize(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """BFL-named weights as "scaled fp8": the blocks' linear layers in e4m3, all else in bf16.

    A quantised layer's ``weight`` times its ``scale_weight`` (fp32, no dimensions) stands for the exact one. The entry
    ``scaled_fp8`` marks the file; that it has two elements asks for products in full precision.
    """
    stored: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if _in_block(name) and name.endswith(".weight"):
            stored[name], scale = quantize_fp8(tensor, "tensor")
            stored[name.removesuffix(".weight") + _SCALE] = scale.reshape(())
        else:
            stored[name] = tensor.to(torch.bfloat16)
    return {**stored, _MARKER: torch.zeros(2, dtype=torch.float8_e4m3fn)}


def stored_bytes(state: Mapping[str, Tensor], dtype: StoredDtype) -> int:
    """Bytes of a transformer's tensors, by diffusers' names, when stored in `dtype`, to within a few."""
    if dtype != "fp8":
        return sum(tensor.numel() for tensor in state.values()) * _DTYPES[dtype].itemsize
    return sum(
        tensor.numel() * (1 if "transformer_blocks." in name and tensor.ndim == 2 else 2)
        for name, tensor in state.items()
    )


def write_single_file(path: Path, state: Mapping[str, Tensor], dtype: StoredDtype, metadata: Mapping[str, str]) -> None:
    """Write the state dict of a `FluxTransformer2DModel` to `path`, with `metadata` in the header.

    Raises `ValueError` as `to_bfl` does; what safetensors raises when the file cannot be written.
    """
    if dtype == "fp8":
        stored = quantize(to_bfl(state))
    else:
        stored = {name: tensor.contiguous() for name, tensor in to_bfl(_Cast(state, _DTYPES[dtype])).items()}
    save_file(stored, path, metadata=dict(metadata))


def read_single_file(path: Path) -> dict[str, Tensor]:
    """The state dict, in diffusers' names, of a single file in any dtype; e4m3 weights are dequantised to fp32.

    Raises `InputError` when the file is not one, or is damaged.
    """
    state = _load(path)
    if all(name.startswith(_PREFIX) for name in state):
        state = {name.removeprefix(_PREFIX): tensor for name, tensor in state.items()}
    state.pop(_MARKER, None)
    for name in [name for name in state if name.endswith(_SCALE)]:
        scale, weight = state.pop(name), name.removesuffix(_SCALE) + ".weight"
        if weight not in state:
            raise InputError(f"single file {path} has {name}, but no {weight}")
        state[weight] = state[weight].float() * scale.float()
    try:
        return from_bfl(state)
    except ValueError as error:
        raise InputError(f"{path} is not a FLUX transformer as one file: {error}") from None


def single_file_metadata(path: Path) -> dict[str, str]:
    """What the header of a safetensors file says besides names and shapes. Raises `InputError`."""
    try:
        with safe_open(path, framework="pt") as opened:
            return opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is not a readable safetensors file: {error}") from None


class _Cast(Mapping[str, Tensor]):
    """A state dict in another dtype, cast tensor by tensor when read: never all of it twice."""

    def __init__(self, state: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self._state, self._dtype = state, dtype

    def __getitem__(self, name: str) -> Tensor:
        return self._state[name].to(self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def _names(double: int, single: int, *, guidance: bool) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every tensor of the layout, with the tensors of diffusers that it holds."""
    layers: dict[str, tuple[str, ...]] = {**_OUTER, **(_GUIDANCE if guidance else {})}
    norms: dict[str, str] = {}
    for theirs, count, of_norms in (("double_blocks", double, _DOUBLE_NORMS), ("single_blocks", single, _SINGLE_NORMS)):
        ours, of_layers = BLOCK_LAYERS[theirs]
        for index in range(count):
            here, there = f"{theirs}.{index}.", f"{ours}.{index}."
            layers |= {here + name: tuple(there + part for part in parts) for name, parts in of_layers.items()}
            norms |= {here + name: there + part for name, part in of_norms.items()}
    for name, parts in layers.items():
        for kind in ("weight", "bias"):
            yield f"{name}.{kind}", tuple(f"{part}.{kind}" for part in parts)
    for name, part in norms.items():
        yield f"{name}.scale", (f"{part}.weight",)


def _blocks(names: Collection[str], kind: str) -> int:
    return 1 + max((int(match[1]) for name in names if (match := re.match(rf"{kind}\.(\d+)\.", name))), default=-1)


def _check_names(found: Collection[str], wanted: Collection[str]) -> None:
    for what, names in (("is missing", set(wanted) - set(found)), ("has no place", set(found) - set(wanted))):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise ValueError(f"{min(names)}{more} {what}")


def _in_block(name: str) -> bool:
    return name.startswith(("double_blocks.", "single_blocks."))


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _swapped(name: str, tensor: Tensor) -> Tensor:
    """The last modulation with its halves exchanged; anything else as it is."""
    return torch.cat(tensor.chunk(2)[::-1]) if name.startswith(_SWAPPED) else tensor


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is not a readable safetensors file: {error}") from None
