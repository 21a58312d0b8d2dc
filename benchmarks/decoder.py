"""FLUX.1's VAE decoder, random weights: unpatched and patched, eager and compiled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from benchmarks.timing import measured
from srpo_kernels import patch

__all__ = ["decoder_results"]

_CONFIG = dict(
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    latent_channels=16,
    use_quant_conv=False,
    use_post_quant_conv=False,
)
_FORMS = (("unpatched eager", False, False), ("patched eager", True, False), ("unpatched compiled", False, True))


_SIZES = ((720, 1), (720, 2), (1024, 1), (1024, 2))  # pixels a side, batch


def decoder_results(
    device: str = "cuda", sizes: Sequence[tuple[int, int]] = _SIZES, **changes: Any
) -> Iterator[dict[str, Any]]:
    """Decoding, and decoding with backward into the latents, of frozen bf16 weights; median ms and peak memory."""
    for form, patched, compiled in _FORMS:
        torch.compiler.reset()
        vae = _vae(device, **changes)
        if patched:
            patch(vae, strict=True)
        if compiled:
            vae.decoder.compile()
        for pixels, batch in sizes:
            z = _latents(pixels, batch, device)
            shape = f"decoder, {form}, {batch} x {pixels} px"
            yield measured(shape, "forward", partial(_decode, vae, z), peer=not patched)
            yield measured(shape, "forward+backward", partial(_gradient, vae, z), peer=not patched)
        del vae
        torch.cuda.empty_cache()


def _vae(device: str, **changes: Any) -> AutoencoderKL:
    with torch.device(device):
        return AutoencoderKL(**{**_CONFIG, **changes}).requires_grad_(False).eval().bfloat16()


def _latents(pixels: int, batch: int, device: str) -> Tensor:
    z = torch.randn(batch, 16, pixels // 8, pixels // 8, device=device, dtype=torch.bfloat16)
    return z.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def _decode(vae: AutoencoderKL, z: Tensor) -> Tensor:
    return vae.decode(z, return_dict=False)[0]


def _gradient(vae: AutoencoderKL, z: Tensor) -> Tensor:
    z = z.detach().requires_grad_()
    image = vae.decode(z, return_dict=False)[0]
    return torch.autograd.grad(image, z, torch.ones_like(image))[0]
