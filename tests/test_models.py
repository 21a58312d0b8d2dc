"""The FLUX pipeline as the trainer uses it, against diffusers called directly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from srpo.errors import InputError
from srpo.latents import image_ids
from srpo.model_directory import check_image_size, check_model_directory
from srpo.models import Conditioning, Flux
from srpo.sampling import rollout, sample_images, to_uint8

_SIZE = (32, 48)
_TINY = (16, 16)  # one token
_PROMPTS = ["digit three red bold", "wide thin digit"]


@pytest.fixture(scope="module")
def flux(flux_shaped: Path) -> Flux:
    return Flux.load(flux_shaped, max_sequence_length=16)


@pytest.fixture
def copy(flux_shaped: Path, tmp_path: Path) -> Path:
    """A pipeline directory that a test may spoil; weights are linked, not copied."""
    path = tmp_path / "pipeline"
    shutil.copytree(flux_shaped, path, copy_function=_link_weights)
    return path


def _link_weights(source: str, target: str) -> None:
    if source.endswith(".safetensors"):
        Path(target).symlink_to(source)
    else:
        shutil.copy(source, target)


def _noise(count: int, tokens: int = 6) -> Tensor:
    return torch.randn(count, tokens, 64, generator=torch.Generator().manual_seed(0))


# --- the directory ---------------------------------------------------------------------------------------------------

_WEIGHTS = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
}


def _edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _shard(path: Path) -> list[Path]:
    """Split the transformer's weights into two files with an index."""
    single = path / "transformer" / _WEIGHTS["transformer"]
    state = load_file(single)
    single.unlink()
    names = sorted(state)
    shards = [names[: len(names) // 2], names[len(names) // 2 :]]
    files = [single.with_name(f"diffusion_pytorch_model-0000{i}-of-00002.safetensors") for i in (1, 2)]
    for file, part in zip(files, shards, strict=True):
        save_file({name: state[name] for name in part}, file)
    weight_map = {name: file.name for file, part in zip(files, shards, strict=True) for name in part}
    index = single.with_name("diffusion_pytorch_model.safetensors.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return files


def test_complete_directory_passes(flux_shaped: Path) -> None:
    assert check_model_directory(str(flux_shaped), (720, 720)) == flux_shaped


def test_sharded_weights_pass(copy: Path) -> None:
    _shard(copy)
    assert check_model_directory(copy) == copy


def test_missing_directory_is_refused(tmp_path: Path) -> None:
    for check in (check_model_directory, Flux.load):
        with pytest.raises(InputError, match=r"^model directory .*nowhere does not exist$"):
            check(tmp_path / "nowhere")


@pytest.mark.parametrize("component", [*_WEIGHTS, "tokenizer", "tokenizer_2", "scheduler"])
def test_missing_component_is_named(copy: Path, component: str) -> None:
    shutil.rmtree(copy / component)
    for check in (check_model_directory, Flux.load):
        with pytest.raises(InputError, match=rf"^model directory .* is incomplete: {component}/ is missing$"):
            check(copy)


@pytest.mark.parametrize("file", ["model_index.json", *(f"{component}/config.json" for component in _WEIGHTS)])
def test_missing_or_broken_json_file_is_named(copy: Path, file: str) -> None:
    (copy / file).write_text("{")
    with pytest.raises(InputError, match=rf"^model directory .*: {file} is not valid JSON \("):
        check_model_directory(copy)
    (copy / file).unlink()
    with pytest.raises(InputError, match=rf"^model directory .* is incomplete: {file} is missing$"):
        check_model_directory(copy)


@pytest.mark.parametrize(("component", "file"), _WEIGHTS.items())
def test_missing_and_empty_weights_are_named(copy: Path, component: str, file: str) -> None:
    weights = copy / component / file
    weights.unlink()
    with pytest.raises(InputError, match=rf"is incomplete: {component}/\*\.safetensors is missing or empty$"):
        check_model_directory(copy)
    weights.write_bytes(b"")
    with pytest.raises(InputError, match=rf"is incomplete: {component}/{file} is missing or empty$"):
        check_model_directory(copy)


@pytest.mark.parametrize("spoil", [Path.unlink, lambda file: file.write_bytes(b"")], ids=["missing", "empty"])
def test_missing_and_empty_shard_is_named(copy: Path, spoil: Callable[[Path], Any]) -> None:
    _, second = _shard(copy)
    spoil(second)
    with pytest.raises(InputError, match=rf"is incomplete: transformer/{second.name} is missing or empty$"):
        check_model_directory(copy)


@pytest.mark.parametrize(
    "file", ["scheduler/scheduler_config.json", "tokenizer/tokenizer.json", "tokenizer_2/tokenizer.json"]
)
def test_component_without_its_file_is_refused(copy: Path, file: str) -> None:
    """An empty component folder must not end in a traceback, or worse, in an empty vocabulary."""
    assert (copy / file).is_file()
    component = (copy / file).parent
    shutil.rmtree(component)
    component.mkdir()
    with pytest.raises(InputError, match=rf"model directory .*{component.name}"):
        Flux.load(copy)


def test_truncated_weights_are_refused(copy: Path) -> None:
    """What an interrupted download leaves."""
    weights = copy / "vae" / _WEIGHTS["vae"]
    content = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(content[:-100])
    with pytest.raises(InputError, match=r"model directory .*vae"):
        Flux.load(copy)


def test_other_pipeline_is_refused(copy: Path) -> None:
    _edit_json(copy / "model_index.json", _class_name="FluxFillPipeline")
    with pytest.raises(InputError, match=r"^model directory .* holds a FluxFillPipeline, expected a FluxPipeline$"):
        check_model_directory(copy)


def test_latent_channels_that_do_not_fit_are_refused(copy: Path) -> None:
    _edit_json(copy / "vae/config.json", latent_channels=4)
    with pytest.raises(
        InputError, match="the transformer takes 64 channels, but the VAE's 4 latent channels pack into 16"
    ):
        check_model_directory(copy)


@pytest.mark.parametrize(
    ("size", "name", "value"), [((728, 720), "height", 728), ((720, 8), "width", 8), ((0, 720), "height", 0)]
)
def test_image_size_that_does_not_fit_is_refused(
    flux_shaped: Path, size: tuple[int, int], name: str, value: int
) -> None:
    message = rf"^{name} must be a positive multiple of 16 for this model, got {value}$"
    with pytest.raises(InputError, match=message):
        check_model_directory(flux_shaped, size)
    with pytest.raises(InputError, match=message):
        check_image_size(*size, multiple=16)


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "trainable", "stored", "of_transformer"),
    [
        ("fp32", False, torch.float32, torch.float32),
        ("fp32", True, torch.float32, torch.float32),
        ("bf16", False, torch.bfloat16, torch.bfloat16),
        ("bf16", True, torch.bfloat16, torch.float32),
    ],
)
def test_precision_and_what_is_trained(
    flux_shaped: Path, precision: Any, trainable: bool, stored: torch.dtype, of_transformer: torch.dtype
) -> None:
    flux = Flux.load(flux_shaped, precision=precision, trainable=trainable, max_sequence_length=16)
    assert {p.dtype for p in flux.transformer.parameters()} == {of_transformer}
    assert {p.requires_grad for p in flux.transformer.parameters()} == {trainable}
    for module in (flux.vae, flux.pipeline.text_encoder, flux.pipeline.text_encoder_2):
        assert {p.dtype for p in module.parameters()} == {stored}
        assert not any(p.requires_grad for p in module.parameters())
        assert not module.training
    # The interface stays in fp32 whatever the precision.
    text = flux.encode_prompts(_PROMPTS)
    v = flux.velocity(_noise(2, 1), torch.tensor([0.9, 0.4]), text, 3.5, _TINY)
    images = flux.decode_packed(_noise(2, 1), _TINY)
    assert (v.dtype, images.dtype, flux.encode_images(images).dtype) == (torch.float32,) * 3
    assert v.isfinite().all()
    assert v.requires_grad == trainable


def test_bf16_is_near_fp32(flux_shaped: Path, flux: Flux) -> None:
    low = Flux.load(flux_shaped, precision="bf16", max_sequence_length=16)
    sigma = torch.tensor([0.9])
    exact = flux.velocity(_noise(1), sigma, flux.encode_prompts(_PROMPTS[:1]), 3.5, _SIZE)
    rounded = low.velocity(_noise(1), sigma, low.encode_prompts(_PROMPTS[:1]), 3.5, _SIZE)
    assert 0 < (rounded - exact).norm() < 0.05 * exact.norm()


def test_noise_is_packed_normal_and_from_the_generator(flux: Flux) -> None:
    def drawn(seed: int) -> Tensor:
        return flux.noise(3, 320, 480, torch.Generator().manual_seed(seed))

    noise = drawn(1)
    assert tuple(noise.shape) == (3, 600, 64)
    assert torch.equal(noise, drawn(1))
    assert not torch.equal(noise, drawn(2))
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    latents = torch.randn(3, 16, 40, 60, generator=torch.Generator().manual_seed(1))
    assert torch.equal(noise, FluxPipeline._pack_latents(latents, 3, 16, 40, 60))


# --- text ------------------------------------------------------------------------------------------------------------


def test_prompt_embedding_equals_the_pipeline_s_and_does_not_depend_on_its_batch(flux_shaped: Path, flux: Flux) -> None:
    text = flux.encode_prompts(_PROMPTS)
    for i, prompt in enumerate(_PROMPTS):
        embeds, pooled, _ = flux.pipeline.encode_prompt(prompt, None, device="cpu", max_sequence_length=16)
        assert torch.equal(text.prompt_embeds[i : i + 1], embeds)
        assert torch.equal(text.pooled[i : i + 1], pooled)
    fresh = Flux.load(flux_shaped, max_sequence_length=16)
    backwards = fresh.encode_prompts(_PROMPTS[::-1])
    assert torch.equal(backwards.prompt_embeds.flip(0), text.prompt_embeds)
    assert torch.equal(backwards.pooled.flip(0), text.pooled)
    assert tuple(text.prompt_embeds.shape) == (2, 16, 32)
    assert not torch.equal(text.pooled[0], text.pooled[1])
    assert not text.prompt_embeds.requires_grad


def test_conditioning_repeats_branch_major() -> None:
    text = Conditioning(torch.arange(6.0).reshape(2, 3, 1), torch.tensor([[1.0], [2.0]]))
    twice = text.repeat(2)
    assert twice.pooled.flatten().tolist() == [1, 2, 1, 2]
    assert torch.equal(twice.prompt_embeds, torch.cat([text.prompt_embeds] * 2))


# --- velocity, decoding, encoding ------------------------------------------------------------------------------------


@torch.no_grad()
def test_velocity_is_the_transformer_s(flux: Flux) -> None:
    text, x_t, sigma = flux.encode_prompts(_PROMPTS), _noise(2), torch.tensor([0.9, 0.25])
    got = flux.velocity(x_t, sigma, text, 3.5, _SIZE)
    for i in range(2):
        expected = flux.transformer(
            hidden_states=x_t[i : i + 1],
            timestep=sigma[i : i + 1],
            guidance=torch.tensor([3.5]),
            pooled_projections=text.pooled[i : i + 1],
            encoder_hidden_states=text.prompt_embeds[i : i + 1],
            txt_ids=torch.zeros(16, 3),
            img_ids=FluxPipeline._prepare_latent_image_ids(1, 2, 3, "cpu", torch.float32),
        ).sample
        torch.testing.assert_close(got[i : i + 1], expected, rtol=1e-4, atol=1e-5)
    other_guidance = flux.velocity(x_t, sigma, text, 1.0, _SIZE)
    other_level = flux.velocity(x_t, sigma / 2, text, 3.5, _SIZE)
    for other in (other_guidance, other_level):
        assert (other - got).abs().max() > 1e-4, "guidance and noise level reach the model"


@torch.no_grad()
def test_model_without_embedded_guidance_is_not_given_any(flux: Flux, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Stub(torch.nn.Module):
        config = type("Config", (), {"guidance_embeds": False})
        dtype = torch.float32
        device = torch.device("cpu")

        def forward(self, **arguments: Any) -> tuple[Tensor]:
            seen.append(arguments)
            return (arguments["hidden_states"],)

    monkeypatch.setattr(flux, "transformer", Stub())
    x_t = _noise(1)
    assert torch.equal(flux.velocity(x_t, torch.tensor([0.5]), flux.encode_prompts(["digit"]), 3.5, _SIZE), x_t)
    assert seen[0]["guidance"] is None
    assert torch.equal(seen[0]["img_ids"], image_ids(4, 6))


def test_gradient_flows_through_velocity_and_decoder(flux_shaped: Path) -> None:
    flux = Flux.load(flux_shaped, trainable=True, max_sequence_length=16)
    text, x_t = flux.encode_prompts(_PROMPTS[:1]), _noise(1, 1).requires_grad_()

    def gradients() -> list[Tensor]:
        v = flux.velocity(x_t, torch.tensor([0.5]), text, 3.5, _TINY)
        loss = flux.decode_packed(v, _TINY).square().mean()
        return list(torch.autograd.grad(loss, [x_t, *flux.transformer.parameters()], allow_unused=True))

    plain = gradients()
    assert all(gradient is not None and gradient.isfinite().all() for gradient in plain)
    assert plain[0].abs().max() > 0
    flux.transformer.enable_gradient_checkpointing()
    flux.transformer.train()
    assert flux.transformer.is_gradient_checkpointing
    for got, expected in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)


@torch.no_grad()
def test_decoding_is_the_vae_of_scaled_and_shifted_latents(flux: Flux) -> None:
    latents = _noise(2)
    images = flux.decode_packed(latents, _SIZE)
    assert tuple(images.shape) == (2, 3, *_SIZE)
    unpacked = FluxPipeline._unpack_latents(latents, *_SIZE, 8)
    expected = (flux.vae.decode(unpacked / 0.3611 + 0.1159).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_encoding_is_the_mean_of_the_vae_s_posterior(flux: Flux) -> None:
    images = torch.rand(2, 3, *_SIZE, generator=torch.Generator().manual_seed(0))
    latents = flux.encode_images(images)
    assert tuple(latents.shape) == tuple(flux.noise(2, *_SIZE, torch.Generator()).shape)
    mean = flux.vae.encode(images * 2 - 1).latent_dist.mean
    expected = FluxPipeline._pack_latents((mean - 0.1159) * 0.3611, 2, 16, 4, 6)
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-6)
    again = flux.decode_packed(latents, _SIZE)
    assert again.shape == images.shape
    torch.testing.assert_close(again, (flux.vae.decode(mean).sample / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)


# --- sampling --------------------------------------------------------------------------------------------------------


def test_sampled_images_equal_diffusers(flux_shaped: Path, flux: Flux) -> None:
    noise = _noise(2)
    got = sample_images(flux, noise, _PROMPTS, size=_SIZE, steps=3, shift=3.0, guidance=2.5)
    assert (got.dtype, tuple(got.shape)) == (torch.float32, (2, 3, *_SIZE))

    pipeline = FluxPipeline.from_pretrained(flux_shaped, local_files_only=True)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=False)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        _PROMPTS, height=_SIZE[0], width=_SIZE[1], num_inference_steps=3, guidance_scale=2.5, latents=noise,
        max_sequence_length=16, output_type="pil",
    ).images  # fmt: skip
    pixels = np.stack([np.asarray(image) for image in expected]).astype(int)
    assert pixels.std() > 1
    # Batching may round a value on the edge between two levels the other way.
    difference = np.abs(to_uint8(got).astype(int) - pixels)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


def test_images_do_not_depend_on_how_they_are_batched(flux: Flux) -> None:
    noise, options = _noise(3, 1), dict(size=_TINY, steps=1, shift=3.0, guidance=1.0)
    prompts = [*_PROMPTS, "digit"]
    together = sample_images(flux, noise, prompts, **options)
    parts = sample_images(flux, noise, prompts, **options, batch=2)
    torch.testing.assert_close(parts, together, rtol=0, atol=1e-4)


def test_rollout_can_be_abandoned_before_every_model_call(flux: Flux) -> None:
    calls, stop_at = [], 2

    def on_step() -> None:
        calls.append(None)
        if len(calls) == stop_at:
            raise KeyboardInterrupt

    options: dict[str, Any] = dict(size=_TINY, steps=3, shift=3.0, guidance=1.0, on_step=on_step)
    with pytest.raises(KeyboardInterrupt):
        rollout(flux, _noise(1, 1), ["digit"], **options)
    assert len(calls) == 2
    calls, stop_at = [], 99
    assert not rollout(flux, _noise(1, 1), ["digit"], **options).requires_grad
    assert len(calls) == 3


def test_pixels_are_rounded_to_eight_bits() -> None:
    images = torch.tensor([0.0, 1.0, 0.5, 100.4 / 255, 100.6 / 255, 254.7 / 255]).reshape(1, 1, 2, 3).expand(1, 3, 2, 3)
    pixels = to_uint8(images)
    assert (pixels.dtype, pixels.shape) == (np.uint8, (1, 2, 3, 3))
    assert pixels[0, ..., 0].flatten().tolist() == [0, 255, 128, 100, 101, 255]
