"""How large the models of a recipe are: read from their configurations, built without weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from srpo.assets import resolve_asset
from srpo.config import TrainConfig
from srpo.lora import LoraConfig
from srpo.model_directory import check_image_size
from srpo.plan.rewards import RewardSizes, count, read_json, reward_sizes
from srpo_kernels.float8_linear import select_layers

__all__ = ["Flops", "Sizes"]

#: FLUX.1-dev where no model directory is at hand; everything else of it is its library's default.
_FLUX_DEV: dict[str, dict[str, Any]] = {
    "transformer": dict(guidance_embeds=True),
    "vae": dict(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ),
    "text_encoder": dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
    "text_encoder_2": dict(
        d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
    ),
}


@dataclass(frozen=True)
class Flops:
    """Of one forward pass: products of linear layers outside (`linear`) and inside blocks (`blocks`), attention."""

    linear: float
    blocks: float  # those that are multiplied in e4m3 in an fp8 precision
    attention: float

    @property
    def total(self) -> float:
        return self.linear + self.blocks + self.attention


@dataclass(frozen=True)
class Decoder:
    """One image through the VAE's decoder."""

    flops: float
    kept: int  # elements kept for backward, patched
    largest: int  # elements of its largest tensor


@dataclass(frozen=True)
class Sizes:
    """The models of a recipe at its image size. Modules are on the meta device."""

    transformer: Any  # FluxTransformer2DModel
    vae: Any
    t5: int  # parameters; none where `model.text_cache` stands in
    clip: int
    reward: RewardSizes
    validation: tuple[RewardSizes, ...]  # rewards that look on
    image: tuple[int, int]  # height, width in pixels
    text_tokens: int
    assumed: tuple[str, ...]  # what was not found and stands in

    @classmethod
    def of(cls, config: TrainConfig) -> Sizes:
        """From the files that `config` names where they exist, and otherwise from FLUX.1-dev and published rewards.

        Raises `InputError` when a file is there but cannot be used, or the image size does not fit the model.
        """
        from diffusers import AutoencoderKL, FluxTransformer2DModel
        from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

        assumed = []
        model = resolve_asset(config.model.path, "pipeline")
        cached = config.model.text_cache is not None  # the directory may then be without text encoders
        parts = {name: shape for name, shape in _FLUX_DEV.items() if not (cached and name.startswith("text"))}
        if model.is_dir():
            parts = {name: read_json(model / name / "config.json") for name in parts}
        else:
            assumed.append(f"model {model} does not exist: reckoned with the sizes of FLUX.1-dev")
        image = config.srpo.height, config.srpo.width
        with torch.device("meta"):
            transformer = FluxTransformer2DModel.from_config(parts["transformer"])
            vae = AutoencoderKL.from_config(parts["vae"]).requires_grad_(False).eval()
            t5 = 0 if cached else count(T5EncoderModel(T5Config(**parts["text_encoder_2"])))
            clip = 0 if cached else count(CLIPTextModel(CLIPTextConfig(**parts["text_encoder"])))
        check_image_size(*image, multiple=2 ** len(vae.config.block_out_channels))
        reward = reward_sizes(config.reward, 1 if config.srpo.form == "image_only" else 2)
        tokens = config.model.max_sequence_length
        extra = (config.validation.held_out, config.validation.alignment)
        looking = tuple(reward_sizes(part, 1) for part in extra if part is not None)
        assumed += dict.fromkeys(note for each in (reward, *looking) for note in each.missing)
        return cls(transformer, vae, t5, clip, reward, looking, image, tokens, tuple(assumed))

    @cached_property
    def parameters(self) -> int:
        """Of the transformer."""
        return count(self.transformer)

    @cached_property
    def float8(self) -> int:
        """Weights of the layers that multiply in e4m3 in an fp8 precision."""
        layers: Iterable[Any] = select_layers("plan", self.transformer, ()).values()
        return sum(layer.weight.numel() for layer in layers)

    def adapters(self, lora: LoraConfig) -> int:
        """Parameters of LoRA adapters."""
        modules = dict(self.transformer.named_modules())
        layers = (modules[name] for name in lora.layers(self.transformer))
        return sum(lora.rank * (layer.in_features + layer.out_features) for layer in layers)

    @cached_property
    def largest_block(self) -> int:
        """Parameters of the largest block, which sharding gathers at once."""
        blocks = (*self.transformer.transformer_blocks[:1], *self.transformer.single_transformer_blocks[:1])
        return max(map(count, blocks), default=0)

    @property
    def blocks(self) -> tuple[int, int]:
        """Numbers of double and of single blocks."""
        return len(self.transformer.transformer_blocks), len(self.transformer.single_transformer_blocks)

    @property
    def latent(self) -> tuple[int, int]:
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        return self.image[0] // factor, self.image[1] // factor

    @property
    def tokens(self) -> int:
        """Of one image: its own and the text's."""
        return self.latent[0] * self.latent[1] // 4 + self.text_tokens

    @property
    def modulations(self) -> int:
        """Elements of all modulation vectors of one image at one step."""
        double, single = self.blocks
        return self.transformer.inner_dim * (12 * double + 3 * single + 2)

    @cached_property
    def forward(self) -> Flops:
        """FLOPs of the transformer for one image."""
        config, width, (double, single) = self.transformer.config, self.transformer.inner_dim, self.blocks
        tokens, text = self.tokens, self.text_tokens
        image, channels = tokens - text, config.in_channels
        out = config.out_channels or channels
        time = (1 + bool(config.guidance_embeds)) * (256 * width + width**2)
        time += config.pooled_projection_dim * width + width**2
        ends = image * channels * width + text * config.joint_attention_dim * width + image * width * out
        modulation = width * self.modulations
        return Flops(
            linear=2 * (ends + time + modulation),
            blocks=2 * tokens * 12 * width**2 * (double + single),
            attention=4 * tokens**2 * width * (double + single),
        )

    @cached_property
    def decode(self) -> Decoder:
        """The VAE's decoder for one image."""
        seen: list[int] = []
        norms: list[int] = []

        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            seen.extend((inputs[0].numel(), output.numel()))
            if isinstance(module, nn.GroupNorm):
                norms.append(inputs[0].numel())

        kinds = (nn.GroupNorm, nn.Conv2d)
        hooks = [module.register_forward_hook(look) for module in self.vae.modules() if isinstance(module, kinds)]
        latents = torch.empty(1, self.vae.config.latent_channels, *self.latent, device="meta")
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.vae.decode(latents, return_dict=False)
        for hook in hooks:
            hook.remove()
        return Decoder(counter.get_total_flops(), sum(norms), max(seen))

    @cached_property
    def encode_flops(self) -> float:
        """Of the VAE's encoder for one image."""
        pixels = torch.empty(1, 3, *self.image, device="meta")
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.vae.encode(pixels, return_dict=False)
        return counter.get_total_flops()

    @cached_property
    def vae_parameters(self) -> int:
        return count(self.vae)
