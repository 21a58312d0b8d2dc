"""What an export holds: a checkpoint's weights, and what is said about them."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from srpo.assets import resolve_asset
from srpo.base_model import check_base, read_base
from srpo.checkpoint import load_weights
from srpo.config import TrainConfig
from srpo.errors import InputError
from srpo.lora import merge
from srpo.model_card import export_title, licence_name, model_card, portable_recipe
from srpo.model_directory import check_model_directory, component_weights
from srpo.precision import compute_dtype
from srpo.single_file import StoredDtype

__all__ = ["BASE_KEY", "DTYPES", "RECIPE_KEY", "RECIPE_NAME", "Exported"]

#: Where an export keeps the run's recipe: a file of a directory, an entry in the header of a file.
RECIPE_NAME, RECIPE_KEY = "recipe.yaml", "srpo.recipe"
#: Where a file of adapters keeps the fingerprint of the base model.
BASE_KEY = "srpo.base"

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Exported:
    """The weights of a run's checkpoint, or with `ema` their averages, to be stored in `dtype`."""

    run: Path
    config: TrainConfig
    checkpoint: Path
    dtype: StoredDtype
    ema: bool = False

    @property
    def step(self) -> int:
        return int(self.checkpoint.name.removeprefix("step-"))

    @cached_property
    def base(self) -> Path:
        """The base model's directory. Raises `InputError`, also when a run's adapters are not for it."""
        base = check_model_directory(resolve_asset(self.config.model.path, "pipeline"))
        if self.config.model.lora:
            check_base(read_base(self.run), base, f"run {self.run}")
        return base

    def empty_transformer(self) -> FluxTransformer2DModel:
        """The base model's transformer on the meta device."""
        with torch.device("meta"):
            return FluxTransformer2DModel.from_config(FluxTransformer2DModel.load_config(self.base / "transformer"))

    def adapters(self) -> dict[str, Tensor]:
        """The adapters of a LoRA run. Raises `InputError`."""
        trained = load_weights(self.checkpoint, ema=self.ema)
        return {name: tensor.to(DTYPES[self.dtype]) for name, tensor in trained.items()}

    def transformer(self) -> dict[str, Tensor]:
        """The transformer's weights, with adapters merged in. Raises `InputError`."""
        trained, lora = load_weights(self.checkpoint, ema=self.ema), self.config.model.lora
        if lora is None:
            return trained
        base = component_weights(self.base / "transformer", compute_dtype(self.config.model.precision))
        kept = "fp32" if self.dtype == "fp32" else "bf16"  # fp8 is made of what a whole checkpoint would hold
        try:
            weights, rounding = merge(base, trained, lora.scale, DTYPES[kept])
        except ValueError as error:
            raise InputError(f"checkpoint {self.checkpoint} does not fit the base model {self.base}: {error}") from None
        if rounding >= 0.005:  # seen below
            warnings.warn(
                f"rounding merged weights to {kept} does {rounding:.0%} as much to them as the adapters do; --dtype "
                "fp32 or adapters alone (--format lora, lora-comfyui) lose nothing",
                stacklevel=2,
            )
        return weights

    def header(self, transformer: Mapping[str, Tensor], *, adapters: bool = False) -> dict[str, str]:
        """Keys of the Stability AI Model Metadata Standard 1.0.1, and our own, for weights of that transformer."""
        recipe = portable_recipe(self.config)
        width = len(transformer["x_embedder.bias"]) if "x_embedder.bias" in transformer else 0
        guided = any("guidance_embedder" in name for name in transformer)
        # Only models of this width are FLUX.1 to those who read the key.
        architecture = ("flux-1-dev" if guided else "flux-1-schnell") if width == 3072 else "flux-1-other"
        return {
            "format": "pt",
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": f"{architecture}/lora" if adapters else architecture,
            "modelspec.implementation": "https://github.com/black-forest-labs/flux",
            "modelspec.title": export_title(self.config),
            "modelspec.license": licence_name(self.config),
            "modelspec.resolution": f"{self.config.srpo.width}x{self.config.srpo.height}",
            "srpo.version": version("srpo-kernels"),
            "srpo.step": str(self.step),
            "srpo.dtype": self.dtype,
            RECIPE_KEY: recipe,
            "srpo.recipe_sha256": hashlib.sha256(recipe.encode()).hexdigest(),
            **({BASE_KEY: read_base(self.run)} if adapters else {}),
        }

    def card(self, usage: str, files: Sequence[Path], root: Path, *, adapters: bool = False) -> str:
        """The model card, in Markdown; see `model_card`."""
        lora = self.config.model.lora
        what = "The transformer"
        if adapters:
            what = f"LoRA adapters ({lora}) for the base model's transformer,"
        elif lora:
            what = f"The base model's transformer with LoRA adapters ({lora}) merged in,"
        return model_card(
            self.config,
            run=self.run,
            step=self.step,
            what=f"{what} after {self.step} updates{', averaged over them' if self.ema else ''}, in {self.dtype}.",
            usage=usage,
            files=files,
            root=root,
            adapters=adapters,
        )
