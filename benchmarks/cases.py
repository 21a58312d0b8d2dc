"""Operators at FLUX shapes, each beside the eager form it replaces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear, normalize
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as vision

import srpo_kernels as sk
from benchmarks.block_cases import block_cases
from benchmarks.case import Case
from benchmarks.vae_cases import norm_case
from srpo_kernels.latents import unpack
from srpo_kernels.patching.eager import EAGER

__all__ = ["cases"]

#: Batch, channels and sides of what the VAE's decoder norms, for images of 720 and at last of 1024 pixels.
_DECODER = [(1, 512, 90), (1, 512, 180), (1, 256, 360), (1, 256, 720), (1, 128, 720), (2, 128, 1024)]
#: There is no time to compile the eager form of all.
_COMPILED_FLOAT8 = ("quantize_fp8", "gated_residual_layer_norm_modulate_fp8")
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def cases(device: str = "cuda", *, small: bool = False) -> Iterator[Case]:
    """Every case, small and launch-bound ones first; with `small` one of every kind, for checking anywhere.

    Compiling the eager forms takes most of the time: about 5 s a case.
    """
    for batch, side in [(2, 8)] if small else [(1, 90), (4, 90), (4, 128), (256, 128)]:
        yield from _latent_cases(batch, side, device)
    for batch in [2] if small else [2, 8, 64]:
        yield from _reward_cases(batch, device)
    for batch, side in [(1, 256)] if small else [(2, 720), (2, 1024), (16, 720)]:
        yield _resize_case(batch, side, device)
    for batch, channels, side in [(2, 64, 8)] if small else _DECODER:
        yield norm_case(batch, channels, side, device)
    if small:
        yield from block_cases(2, 12, 4, device, heads=4, width=32)
        yield from _float8_cases(2, 12, 128, device)
    else:
        for batch, tokens in [(1, 2537), (4, 2537), (1, 4608), (4, 4608)]:  # images of 720 and 1024 pixels
            for case in block_cases(batch, tokens, 512, device):
                yield replace(case, compiled=tokens == 2537)
        for batch, tokens in [(1, 2537), (1, 4608), (4, 4608)]:
            for case in _float8_cases(batch, tokens, 3072, device):
                yield replace(case, compiled=tokens == 2537 and case.op in _COMPILED_FLOAT8)


def _latent_cases(batch: int, side: int, device: str) -> Iterator[Case]:
    """Two branches of FLUX latents of side x side x 16, packed."""
    random = partial(torch.randn, device=device, dtype=torch.bfloat16)
    tokens = (side // 2) ** 2
    image, shape = tokens * 64 * batch, f"{batch} x {tokens} x 64, K=2"
    size = (side, side)
    start = torch.tensor([0.9, 0.8], device=device).expand(batch, 2)
    end = torch.tensor([0.8, 0.9], device=device).expand(batch, 2)

    def inject_eager(x0: Tensor, noise: Tensor) -> Tensor:
        return torch.cat([(1 - s) * x0 + s * noise for s in (0.9, 0.8)])

    yield Case(
        "inject_noise",
        shape,
        lambda: {"x0": random(batch, tokens, 64), "noise": random(batch, tokens, 64)},
        lambda x0, noise: sk.inject_noise(x0, noise, start),
        inject_eager,
        ("x0",),
        4 * image,
        3 * image,
    )
    yield Case(
        "inject_noise, NoisePrior",
        shape,
        lambda: {"x0": random(batch, tokens, 64)},
        lambda x0: sk.inject_noise(x0, sk.NoisePrior(1), start),
        lambda x0: inject_eager(x0, torch.randn_like(x0)),
        ("x0",),
        3 * image,
        3 * image,
    )

    def recover_eager(x_t: Tensor, noise: Tensor, velocity: Tensor) -> Tensor:
        e = noise.repeat(2, 1, 1)
        s, t = (level.T.reshape(-1, 1, 1) for level in (start, end))
        x0_hat = ((x_t.float() + (t - s) * velocity.float() - t * e.float()) / (1 - t)).to(x_t.dtype)
        return (unpack(x0_hat, *size) / 0.3611 + 0.1159).contiguous(memory_format=torch.channels_last)

    yield Case(
        "recover, unpack",
        shape,
        lambda: {
            "x_t": random(2 * batch, tokens, 64),
            "noise": random(batch, tokens, 64),
            "velocity": random(2 * batch, tokens, 64),
        },
        lambda x_t, noise, velocity: sk.recover(
            x_t, noise, velocity, start, end, unpack=size, scaling_factor=0.3611, shift_factor=0.1159
        ),
        recover_eager,
        ("velocity",),
        7 * image,
        4 * image,
    )


def _reward_cases(batch: int, device: str) -> Iterator[Case]:
    """CLIP ViT-H: projection 1280 -> 1024, or embeddings already projected."""
    random = partial(torch.randn, device=device, dtype=torch.bfloat16)
    width, out = 1280, 1024
    kappa = torch.full((batch,), 0.2, device=device)

    def texts() -> dict[str, Tensor]:
        return {name: normalize(random(batch, out), dim=-1) for name in ("positive", "negative")}

    def score(embedding: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        unit = normalize(embedding.float(), dim=-1)
        return ((1 + kappa[:, None]) * positive.float() - negative.float()).mul(unit).sum(-1)

    yield Case(
        "relative_reward, projection",
        f"{batch} x {width} -> {out}",
        lambda: {"image": random(batch, width), "projection": random(out, width) * width**-0.5, **texts()},
        lambda image, projection, positive, negative: sk.relative_reward(
            image, positive, negative, kappa, projection=projection
        ),
        lambda image, projection, positive, negative: score(image @ projection.T, positive, negative),
        ("image",),
        batch * (width + 2 * out) + width * out,
        batch * (2 * width + 2 * out) + 2 * width * out,
    )
    yield Case(
        "relative_reward_loss",
        f"{batch} x {out}",
        lambda: {"image": random(batch, out), **texts()},
        lambda image, positive, negative: sk.relative_reward_loss(image, positive, negative, kappa, 0.7)[0],
        lambda image, positive, negative: torch.relu(0.7 - score(image, positive, negative)),
        ("image",),
        batch * 5 * out,  # the gradient is kept in fp32
        batch * 3 * out,
    )


def _resize_case(batch: int, side: int, device: str) -> Case:
    """The decoder's image to a ViT's input."""

    def make() -> dict[str, Tensor]:
        image = torch.rand(batch, 3, side, side, device=device, dtype=torch.bfloat16) * 1.9 - 0.95
        # Bounds of the range stay out: torch's gradient there depends on its version.
        return {"image": image.contiguous(memory_format=torch.channels_last)}

    def eager(image: Tensor) -> Tensor:
        unit = ((image.float() + 1) / 2).clamp(0, 1)
        resized = vision.resize(unit, [224], interpolation=InterpolationMode.BICUBIC, antialias=True)
        return vision.normalize(resized, list(_MEAN), list(_STD)).to(image.dtype)

    pixels, out = batch * 3 * side * side, batch * 3 * 224 * 224
    return Case(
        "resize_normalize",
        f"{batch} x 3 x {side} x {side} -> 224",
        make,
        lambda image: sk.resize_normalize(image, 224, _MEAN, _STD),
        eager,
        ("image",),
        pixels + out,
        2 * pixels + out,
    )


def _float8_cases(batch: int, tokens: int, dim: int, device: str) -> Iterator[Case]:
    """Forward only: e4m3, of half a bf16 element, with a scale for every token. Eager rounds to bf16 before."""
    random = partial(torch.randn, device=device, dtype=torch.bfloat16)
    hidden, shape = batch * tokens * dim, f"{batch} x {tokens}"

    def rows(*names: str, size: int = dim) -> dict[str, Tensor]:
        return {name: random(batch, tokens, size) for name in names}

    def vectors(*names: str) -> dict[str, Tensor]:
        return {name: random(batch, dim) for name in names}

    def case(name: str, size: int, make: Callable[[], dict[str, Tensor]], forward: float, **options: float) -> Case:
        """Forward moves so many tensors of `tokens` x `dim`; `size` is the width of the output."""

        def ours(**inputs: Tensor) -> tuple[Tensor, ...]:
            result = getattr(sk, name)(**inputs, **options)
            return result if isinstance(result, sk.Float8) else (result[0], *result[1])

        def eager(**inputs: Tensor) -> tuple[Tensor, ...]:
            plain = EAGER[name.removesuffix("_fp8")](**inputs, **options)
            return _quantize_eager(plain) if isinstance(plain, Tensor) else (plain[0], *_quantize_eager(plain[1]))

        return Case(name, f"{shape} x {size}", make, ours, eager, (), forward * hidden, 0)

    wide = 4 * dim
    quantized = f"{shape} x {wide}"
    yield Case(
        "quantize_fp8", quantized, lambda: rows("x", size=wide), sk.quantize_fp8, _quantize_eager, (), 6 * hidden, 0
    )
    yield case("layer_norm_modulate_fp8", dim, lambda: rows("x") | vectors("scale", "shift"), 1.5, eps=1e-6)
    yield case(
        "gated_residual_layer_norm_modulate_fp8",
        dim,
        lambda: rows("residual", "branch") | vectors("gate", "scale", "shift"),
        3.5,
        eps=1e-6,
    )
    yield case("gelu_tanh_fp8", wide, lambda: rows("x", size=wide), 6)
    yield case("gelu_concat_fp8", 5 * dim, lambda: rows("attn") | rows("mlp", size=wide), 7.5)

    def operands() -> dict[str, Tensor]:
        """In e4m3, and for eager in bf16."""
        x, weight = (sk.quantize_fp8(random(*size)) for size in ((batch, tokens, dim), (wide, dim)))
        made = {"x": x.values, "x_scale": x.scale, "weight": weight.values, "weight_scale": weight.scale}
        return made | {"plain_x": x.dequantize(torch.bfloat16), "plain_weight": weight.dequantize(torch.bfloat16)}

    yield Case(
        "fp8_linear",
        f"{shape} x {dim} -> {wide}",
        operands,
        lambda x, x_scale, weight, weight_scale, **_: sk.fp8_linear(
            sk.Float8(x, x_scale), sk.Float8(weight, weight_scale)
        ),
        lambda plain_x, plain_weight, **_: linear(plain_x, plain_weight),
        (),
        4.5 * hidden + wide * dim / 2,
        0,
    )


def _quantize_eager(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / 448
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale
