"""A FLUX pipeline as the trainer uses it: loaded, encoding, predicting, decoding.

The tiny model and FLUX.1-dev go through the same code; only the path differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import FluxPipeline
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from srpo.errors import InputError
from srpo.latents import image_ids, pack, unpack
from srpo.lora import LoraConfig, adapters, add_adapters
from srpo.model_directory import check_model_directory
from srpo.objective import LatentLayout
from srpo.precision import Precision, compute_dtype
from srpo.sharding import free, gathered, shard
from srpo.text_encoders import CachedTexts
from srpo_kernels import Float8Rollout, FluxRollout, PatchHandle, convert_to_float8, patch
from srpo_kernels.patching.view import view

__all__ = ["Conditioning", "Flux"]


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts: T5 tokens `prompt_embeds` [B, L, D] and CLIP's pooled vector `pooled` [B, P]."""

    prompt_embeds: Tensor
    pooled: Tensor

    def repeat(self, count: int) -> Conditioning:
        """The batch `count` times over, branch-major."""
        return Conditioning(self.prompt_embeds.repeat(count, 1, 1), self.pooled.repeat(count, 1))


class Flux:
    """A loaded FLUX pipeline. Latents are packed tokens [B, S, 4C] in fp32, images [B, 3, H, W] in [0, 1]."""

    def __init__(
        self,
        pipeline: FluxPipeline,
        *,
        precision: Precision,
        max_sequence_length: int,
        texts: CachedTexts | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.texts = texts  # where embeddings come from when the pipeline has no text encoders
        self.precision = precision
        self.max_sequence_length = max_sequence_length
        self.transformer = pipeline.transformer
        self.vae = pipeline.vae
        self.patched: PatchHandle | None = None
        self._view: Any = None  # of a sharded transformer, to call while it is
        self._gathered = False
        # Below adapters, what is in e4m3 is frozen, and multiplies in it as it is.
        trained_in_fp8 = precision == "fp8" and not adapters(self.transformer)
        if trained_in_fp8:
            convert_to_float8(self.transformer)
        self.quantized = Float8Rollout(self.transformer) if trained_in_fp8 or precision == "fp8-rollout" else None
        for frozen in filter(None, (self.vae, pipeline.text_encoder, pipeline.text_encoder_2)):
            frozen.requires_grad_(False).eval()
        # One prompt at a time: an embedding must not depend on which prompts shared its batch,
        # or a resumed run would differ in the last bit.
        kept = 2048 if texts is None else 128  # on the device: 4 MB a prompt for FLUX.1-dev
        self._encode_prompt = lru_cache(maxsize=kept)(self._encode_prompt)  # type: ignore[method-assign]
        self._position_ids = lru_cache(maxsize=8)(self._make_position_ids)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str | torch.device = "cpu",
        precision: Precision = "fp32",
        max_sequence_length: int = 512,
        trainable: bool = False,
        weights: Literal["fp32", "bf16"] = "fp32",
        text_cache: str | Path | None = None,
        lora: LoraConfig | None = None,
        seed: int = 0,
    ) -> Flux:
        """Load the diffusers directory `path`; nothing is downloaded.

        All precisions but fp32 store and compute in bf16. A trainable transformer holds `weights`: fp32 (under autocast
        to bf16), as an update at SRPO's learning rate is smaller than bf16 can add, or bf16 where the optimizer keeps
        the rest. With `lora` only adapters, drawn from `seed`, are trainable: the transformer's own weights are stored
        as if it were not, with precision fp8 in e4m3 before they move to `device`.

        Raises:
            InputError: `path` is not a complete FLUX pipeline directory, or `text_cache` or `lora` cannot be used.
        """
        path = check_model_directory(path, text=text_cache is None)
        dtype = compute_dtype(precision)
        dtypes = {"default": dtype, "transformer": dtype}
        if trainable and lora is None:
            dtypes["transformer"] = torch.bfloat16 if weights == "bf16" else torch.float32
        texts, without = None, {}
        if text_cache is not None:
            texts = CachedTexts(text_cache, path, device=device, dtype=dtype, max_sequence_length=max_sequence_length)
            without = dict.fromkeys(("text_encoder", "text_encoder_2"))
        try:
            pipeline = FluxPipeline.from_pretrained(path, torch_dtype=dtypes, local_files_only=True, **without)
        except (OSError, SafetensorError, ValueError) as error:
            raise InputError(f"model directory {path} cannot be loaded: {error}") from None
        if lora is not None:
            add_adapters(pipeline.transformer, lora, seed, float8=precision == "fp8")
        pipeline.to(device)
        pipeline.set_progress_bar_config(disable=True)
        flux = cls(pipeline, precision=precision, max_sequence_length=max_sequence_length, texts=texts)
        for parameter in flux.trainable().values():
            parameter.requires_grad_(trainable)
        return flux

    def trainable(self) -> dict[str, nn.Parameter]:
        """What training changes and a checkpoint holds, by name: the transformer's parameters, or its adapters'."""
        return adapters(self.transformer) or dict(self.transformer.named_parameters())

    def patch(self, kernels: Literal["auto", "off"] | Sequence[str]) -> None:
        """Run transformer and VAE on srpo_kernels' operators: all that fit, none, or those named."""
        if kernels != "off":
            parts = nn.ModuleDict({"transformer": self.transformer, "vae": self.vae})
            self.patched = patch(parts, None if kernels == "auto" else kernels)

    def unpatch(self) -> None:
        """Run transformer and VAE as diffusers wrote them."""
        if self.patched is not None:
            self.patched.remove()
            self.patched = None

    def shard(self, mesh: DeviceMesh, **how: bool) -> None:
        """Share out the transformer's parameters by `srpo.sharding.shard`: patched, and before an optimizer is made."""
        self._view = view(self.transformer, lambda *_: None)
        shard(self.transformer, mesh, **how)

    def reduce_gradients(self, last: bool, *, every: bool) -> None:
        """Before a backward: whether ranks average sharded gradients in it, as they must in an update's `last` one.

        Those that share parameters do so in `every` one, or hold them whole until the last; replicas in the last.
        """
        if self._view is not None:
            self.transformer.set_requires_gradient_sync(last or every)
            self.transformer.set_requires_all_reduce(last)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """All parameters of a sharded transformer in this process, for calls without gradients; by all ranks together.

        Within another such context, or of a transformer that is not sharded, nothing happens.
        """
        if self._view is None or self._gathered:
            yield
            return
        with gathered(self.transformer):
            if self.quantized is not None:
                self.quantized.refresh(force=True)  # gathered tensors do not tell that they changed
            self._gathered = True
            try:
                yield
            finally:
                self._gathered = False

    @property
    def _called(self) -> Any:
        """What `velocity` and `trajectory` call."""
        return self._view if self._gathered else self.transformer

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """The VAE latent's (h, w) for an image of height x width pixels."""
        factor = self.pipeline.vae_scale_factor
        return height // factor, width // factor

    def noise(self, count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Standard normal packed latents for `count` images, [count, S, 4C]."""
        h, w = self.latent_size(height, width)
        shape = (count, self.vae.config.latent_channels, h, w)
        return pack(torch.randn(shape, generator=generator)).to(self.device)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Text embeddings of `prompts`, cached by prompt."""
        encoded = [self._encode_prompt(prompt) for prompt in prompts]
        embeds, pooled = zip(*encoded, strict=True)
        return Conditioning(torch.cat(embeds), torch.cat(pooled))

    @torch.no_grad()
    def _encode_prompt(self, prompt: str) -> tuple[Tensor, Tensor]:
        if self.texts is not None:
            return self.texts.embed(prompt)
        embeds, pooled, _ = self.pipeline.encode_prompt(
            prompt, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return embeds, pooled

    def velocity(
        self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning, guidance: float, size: tuple[int, int]
    ) -> Tensor:
        """The model's velocity at x_t [B, S, 4C] and noise levels sigma [B], for an image of `size` (height, width)."""
        batch = x_t.shape[0]
        text = conditioning.prompt_embeds
        levels = torch.full((batch,), guidance, device=x_t.device) if self.transformer.config.guidance_embeds else None
        text_ids, image_ids = self._position_ids(text.shape[1], size)
        with self._autocast():
            predicted = self._called(
                hidden_states=x_t.to(self.transformer.dtype),
                timestep=sigma.to(x_t.dtype),
                guidance=levels,
                pooled_projections=conditioning.pooled.to(self.transformer.dtype),
                encoder_hidden_states=text.to(self.transformer.dtype),
                txt_ids=text_ids,
                img_ids=image_ids,
                return_dict=False,
            )[0]
        if self._view is not None and not (self._gathered or torch.is_grad_enabled()):
            free(self.transformer)
        return predicted.to(x_t.dtype)

    def trajectory(
        self,
        sigmas: Sequence[float],
        conditioning: Conditioning,
        guidance: float,
        size: tuple[int, int],
        *,
        quantized: bool = False,
    ) -> Callable[[Tensor, int], Tensor]:
        """``(x_t, step) -> velocity`` along noise levels `sigmas`, without gradients, for as long as the weights stay.

        What no step changes is made once when the transformer is patched and whole; otherwise this is `velocity`. With
        `quantized`, linear layers multiply in e4m3 if that is the precision.
        """
        whole = self._view is None or self._gathered
        model = (self.quantized if quantized and whole else None) or self._called
        if model is not self.quantized and FluxRollout.unavailable(model):
            levels = torch.tensor(sigmas, device=self.device)
            batch = len(conditioning.pooled)
            return lambda x_t, step: self.velocity(x_t, levels[step].expand(batch), conditioning, guidance, size)
        text_ids, image_ids = self._position_ids(conditioning.prompt_embeds.shape[1], size)
        dtype = self.transformer.dtype
        with self._autocast():
            rollout = FluxRollout(
                model,
                conditioning.prompt_embeds.to(dtype),
                conditioning.pooled.to(dtype),
                sigmas,
                guidance=guidance if self.transformer.config.guidance_embeds else None,
                txt_ids=text_ids,
                img_ids=image_ids,
            )

        def velocity(x_t: Tensor, step: int) -> Tensor:
            with self._autocast():
                return rollout.velocity(x_t.to(dtype), step).to(x_t.dtype)

        return velocity

    def _autocast(self) -> torch.autocast:
        """Casts to what the transformer computes in, where that is not what it holds."""
        enabled = self.precision != "fp32" and self.transformer.dtype == torch.float32
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def _make_position_ids(self, text: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Ids of `text` text tokens and of the image's: the same tensors every time, which patched models look at."""
        return torch.zeros(text, 3, device=self.device), image_ids(*self.latent_size(*size)).to(self.device)

    def layout(self, size: tuple[int, int]) -> LatentLayout:
        """How packed latents of a `size` image become what `decode` takes."""
        config = self.vae.config
        return LatentLayout(self.latent_size(*size), config.scaling_factor, config.shift_factor)

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] from VAE latents [B, C, h, w] in the VAE's own scale; differentiable."""
        decoded = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        return (decoded.float() / 2 + 0.5).clamp(0, 1)

    def decode_packed(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] from packed latents [B, S, 4C]."""
        layout = self.layout(size)
        return self.decode(unpack(tokens, *layout.size) / layout.scaling_factor + layout.shift_factor)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Packed latents [B, S, 4C] (the posterior's mean) of images [B, 3, H, W] in [0, 1]."""
        config = self.vae.config
        pixels = (images * 2 - 1).to(self.device, self.vae.dtype)
        latents = self.vae.encode(pixels, return_dict=False)[0].mode().float()
        return pack((latents - config.shift_factor) * config.scaling_factor)
