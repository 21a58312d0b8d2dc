"""`patch` on the VAE: its values, its layout, and what it keeps."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn.functional import conv2d

from srpo_kernels import checkpointed_reward, patch
from srpo_kernels.patching import VAE_OPS
from srpo_kernels.patching import vae as rules
from srpo_kernels.patching.frozen_conv import frozen_conv2d
from srpo_kernels.patching.handle import fingerprint
from srpo_kernels.testing.budget import SLACK
from srpo_kernels.testing.trace import Trace

#: FLUX.1's decoder.
FLUX = dict(
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    latent_channels=16,
    use_quant_conv=False,
    use_post_quant_conv=False,
)
SMALL = {**FLUX, "block_out_channels": (8, 16, 16, 24), "layers_per_block": 1, "norm_num_groups": 4}
GB = 1e9
PAGE = Path(__file__).parent.parent / "docs/patching.md"  # states what is counted here


def network(dtype: torch.dtype = torch.float32, **changes: Any) -> AutoencoderKL:
    torch.manual_seed(0)
    made = AutoencoderKL(**{**SMALL, **changes}).requires_grad_(False).eval()
    for module in made.modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return made.to(dtype)


def latents(dtype: torch.dtype = torch.float32, batch: int = 2, seed: int = 1) -> Tensor:
    drawn = torch.randn(batch, 16, 4, 6, generator=torch.Generator().manual_seed(seed))
    return drawn.to(dtype).contiguous(memory_format=torch.channels_last)


def outputs(vae: AutoencoderKL, z: Tensor) -> dict[str, Tensor]:
    """Image, gradient of the latents, and the image encoded again."""
    z = z.detach().requires_grad_()
    image = vae.decode(z, return_dict=False)[0]
    upstream = torch.randn(image.shape, generator=torch.Generator().manual_seed(2)).to(image.dtype)
    (gradient,) = torch.autograd.grad(image, z, upstream)
    pixels = image.detach().requires_grad_()
    encoded = vae.encode(pixels, return_dict=False)[0].mode()
    (dpixels,) = torch.autograd.grad(encoded.sum(), pixels)
    return {"image": image.detach(), "latents": gradient, "encoded": encoded.detach(), "pixels": dpixels}


def errors(got: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    return {name: ((got[name].double() - e).norm() / e.norm()).item() for name, e in exact.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_image_and_gradients_are_as_accurate(dtype: torch.dtype, batch: int) -> None:
    """bf16, with statistics in fp32, is on the mean over several latents no further from float64 than diffusers is."""
    vae, balance = network(dtype), 0.0
    for seed in range(4):
        z = latents(dtype, batch, seed)
        exact = outputs(copy.deepcopy(vae).double(), z.double())
        theirs = errors(outputs(vae, z), exact)
        with patch(vae, strict=True):
            ours = errors(outputs(vae, z), exact)
        assert all(ours[name] <= SLACK * theirs[name] for name in exact)
        balance += sum(math.log(ours[name] / theirs[name]) for name in exact)
    if dtype == torch.bfloat16:
        assert balance <= 0


def test_bf16_decode_against_fp32() -> None:
    """What precision bf16 costs: relative errors of the image and of the latents' gradient, which bf16 bounds."""
    vae, z = network(), latents()
    exact = outputs(copy.deepcopy(vae).double(), z.double())
    patch(vae)
    layers = sum(isinstance(module, nn.Conv2d) for module in vae.decoder.modules())
    bound = torch.finfo(torch.bfloat16).eps * math.sqrt(2 * layers)  # roundings are independent
    found = errors(outputs(vae.bfloat16(), z.bfloat16()), exact)
    assert found["image"] <= bound
    assert found["latents"] <= 2 * bound  # forward and backward
    assert found["image"] > torch.finfo(torch.float32).eps * 100  # it did run in bf16


@pytest.mark.parametrize("name", VAE_OPS)
def test_each_op_alone(name: str) -> None:
    vae, z = network(), latents()
    exact = outputs(copy.deepcopy(vae).double(), z.double())
    theirs = errors(outputs(vae, z), exact)
    handle = patch(vae, ops=[name])
    assert all(entry.uses == (name,) for entry in handle.replaced)
    ours = errors(outputs(vae, z), exact)
    assert all(ours[key] <= SLACK * theirs[key] for key in exact)


def test_removal_restores_bitwise() -> None:
    vae, z = network(), latents()
    before, state = outputs(vae, z), {name: t.clone() for name, t in vae.state_dict().items()}
    strides = {name: t.stride() for name, t in vae.state_dict().items()}
    with patch(vae, strict=True):
        ours = outputs(vae, z)
        assert not all(torch.equal(before[name], ours[name]) for name in before)
        assert {name: t.stride() for name, t in vae.state_dict().items()} == strides
    assert all(torch.equal(tensor, state[name]) for name, tensor in vae.state_dict().items())
    after = outputs(vae, z)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_channels_last_from_end_to_end_without_a_copy() -> None:
    vae = network()
    patch(vae, strict=True)
    z = latents().requires_grad_()
    with Trace() as trace:
        image = vae.decode(z, return_dict=False)[0]
        gradient = torch.autograd.grad(image, z, torch.ones_like(image))[0]
    assert image.is_contiguous(memory_format=torch.channels_last)
    assert gradient.is_contiguous(memory_format=torch.channels_last)
    copies = {"aten::clone", "aten::contiguous", "aten::copy_", "aten::_to_copy"}
    assert [launch for launch in trace.launches if launch.name in copies] == []


def test_no_weight_gradient_is_computed() -> None:
    vae, z = network(), latents().requires_grad_()
    patch(vae, strict=True)
    image = vae.decode(z, return_dict=False)[0]
    with Trace() as trace:
        image.sum().backward()
    names = [launch.name for launch in trace.launches]
    assert "aten::convolution" in names  # the adjoint, which gives the image's gradient alone
    assert "aten::convolution_backward" not in names
    assert all(parameter.grad is None for parameter in vae.parameters())


def test_trained_weights_get_their_gradients() -> None:
    vae, z = network().requires_grad_(True), latents()

    def gradients(vae: AutoencoderKL, z: Tensor) -> Tensor:
        found = torch.autograd.grad(vae.decode(z, return_dict=False)[0].square().sum(), list(vae.decoder.parameters()))
        return torch.cat([gradient.flatten() for gradient in found])

    exact, plain = gradients(copy.deepcopy(vae).double(), z.double()), gradients(vae, z)
    patch(vae, strict=True)
    ours = gradients(vae, z)
    assert (ours - exact).norm() <= SLACK * (plain - exact).norm()


@pytest.mark.parametrize("mode", ["checkpointed", "compiled", "autocast", "tiled"])
def test_modes(mode: str) -> None:
    vae, z = network(), latents()
    expected = outputs(vae, z)
    patch(vae, strict=True)
    if mode == "checkpointed":
        vae.enable_gradient_checkpointing()
        vae.train()
    elif mode == "tiled":
        vae.enable_slicing()
    elif mode == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            assert outputs(vae, z)["image"].dtype == torch.bfloat16
    decode = torch.compile(vae.decoder, fullgraph=True, backend="aot_eager") if mode == "compiled" else vae.decoder
    leaf = z.detach().requires_grad_()
    torch.testing.assert_close(decode(leaf), expected["image"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs(vae, z)["latents"], expected["latents"], rtol=1e-3, atol=1e-3)


def test_refusals() -> None:
    vae = network()
    decoder = vae.decoder
    decoder.conv_in.padding_mode = "circular"
    decoder.up_blocks[0].resnets[0].nonlinearity = nn.GELU()
    decoder.up_blocks[1].resnets[0].norm2.register_forward_hook(lambda *_: None)
    decoder.mid_block.attentions[0].group_norm = None
    decoder.conv_act = nn.ReLU()
    assert {entry.name: entry.reason for entry in patch(vae).refused} == {
        "decoder": "its activation is not SiLU",
        "decoder.conv_in": "its padding is not a number of zeros",
        "decoder.up_blocks.0.resnets.0": "its activation is not SiLU, or it drops out",
        "decoder.up_blocks.1.resnets.0": "norm2 has forward hooks",
        "decoder.mid_block.attentions.0": "group_norm is not a GroupNorm with weights",
    }


def test_convolutions_elsewhere_are_left_alone() -> None:
    both = nn.ModuleDict({"vae": network(), "other": nn.Conv2d(1, 1, 1)})
    assert all(entry.name.startswith("vae.") for entry in patch(both).entries)


def test_every_function_stood_in_for_is_one_that_was_checked() -> None:
    for rule in rules.rules(VAE_OPS):
        for function, known in rule.stands_for.items():
            assert fingerprint(function) in known, function.__qualname__


@pytest.mark.parametrize(
    ("size", "stride", "padding", "dilation", "groups", "taps"),
    [
        ((7, 8), 1, 1, 1, 1, 3),
        ((7, 8), 2, 0, 1, 1, 3),
        ((9, 6), 2, 1, 1, 2, 3),
        ((8, 8), 3, 2, 2, 1, 3),
        ((5, 5), 1, 0, 1, 4, 1),
    ],
)
def test_frozen_convolution(
    size: tuple[int, int], stride: int, padding: int, dilation: int, groups: int, taps: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, *size, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(8, 4 // groups, taps, taps, generator=generator, dtype=torch.float64)
    bias = torch.randn(8, generator=generator, dtype=torch.float64)
    geometry = ((stride,) * 2, (padding,) * 2, (dilation,) * 2, groups)
    out = frozen_conv2d(x, weight, bias, *geometry)
    assert torch.equal(out, conv2d(x, weight, bias, *geometry))
    assert torch.autograd.gradcheck(lambda x: frozen_conv2d(x, weight, bias, *geometry), x)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        frozen_conv2d(x, weight, bias, *geometry)
    assert [t.data_ptr() for t in kept] == [weight.data_ptr()]


def kept_by_decoder(size: int, monkeypatch: pytest.MonkeyPatch, *, patched: bool, batch: int = 1) -> int:
    """Bytes that FLUX.1's decoder in bf16 leaves behind for backward, the image included; counted on shapes."""

    def attend(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:  # as a fused kernel keeps it
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]

    monkeypatch.setattr(rules, "scaled_dot_product_attention", attend)
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", attend)
    with torch.device("meta"):
        vae = AutoencoderKL(**FLUX).requires_grad_(False).eval().bfloat16()
        z = torch.empty(batch, 16, size // 8, size // 8, dtype=torch.bfloat16)
    if patched:
        patch(vae, strict=True)
    z = z.contiguous(memory_format=torch.channels_last).requires_grad_()
    with Trace() as trace:
        image = vae.decode(z, return_dict=False)[0]
    assert image.requires_grad
    return trace.kept()


def test_decoder_at_720_pixels_keeps_less_than_two_gigabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    patched, plain = (kept_by_decoder(720, monkeypatch, patched=patched) for patched in (True, False))
    assert patched <= 2.0 * GB
    assert plain >= 4.0 * GB
    page = " ".join(PAGE.read_text().split())
    assert f"keeps {patched / GB:.1f} GB of a 720 pixel image for backward, {plain / GB:.1f} GB unpatched" in page


def test_two_images_of_1024_pixels_fit_beside_the_transformer(monkeypatch: pytest.MonkeyPatch) -> None:
    """On 141 GB: 12 B parameters in bf16 with bf16 gradients and two 8-bit moments, and what blocks keep."""
    decoder = kept_by_decoder(1024, monkeypatch, patched=True, batch=2)
    transformer = 11.9e9 * (2 + 2 + 2)
    blocks = 2 * (4096 + 512) * 3072 * 2 * (19 * 1.0 + 38 * 1.0)  # checkpointing: block
    assert decoder + transformer + blocks <= 100 * GB


def test_nothing_is_kept_within_checkpointed_reward() -> None:
    vae = network()
    patch(vae, strict=True)
    x_t, noise, velocity = (latents(seed=seed) for seed in range(3))
    with Trace() as trace:
        scores = checkpointed_reward(
            x_t,
            noise,
            velocity.requires_grad_(),
            0.75,
            0.5,
            decode=lambda z: vae.decode(z, return_dict=False)[0],
            score=lambda images, _: images.square().mean((1, 2, 3)),
        )
    assert trace.kept() <= scores.nbytes + 6 * x_t.nbytes  # inputs, made contiguous, and noise levels
    plain = vae.decode(velocity, return_dict=False)[0]
    assert plain.nbytes > 6 * x_t.nbytes  # a single image would already be more
    (gradient,) = torch.autograd.grad(scores.sum(), velocity)
    assert gradient.abs().sum() > 0
