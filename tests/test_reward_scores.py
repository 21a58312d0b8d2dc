"""Rewards of the real architectures, at reduced depth, score photographs as the libraries' own pipelines do."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle
from pathlib import Path

import open_clip
import pytest
import skimage.data
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torchvision.transforms import v2
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from srpo.rewards import CLIPReward, CosineReward, OpenCLIPReward
from srpo.tiny.words import clip_tokenizer

_PROMPTS = ["digit three red", "a thin blue digit"]


@dataclass(frozen=True)
class _Library:
    """A model as its library runs it, and the reward made of the same files."""

    cosine: Callable[[Tensor], Tensor]  # preprocessed images [N, 3, 224, 224] -> [N, prompts]
    preprocess: Callable[[Image.Image], Tensor]  # the library's own, from PIL
    make: Callable[..., CosineReward]

    @cached_property
    def reward(self) -> CosineReward:
        """In fp32."""
        return self.make()


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    """Square and wide, from 300 to 640 pixels; all are inside the wheels."""
    arrays = [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea(), *load_sample_images().images]
    return [Image.fromarray(array) for array in arrays]


def _lively(model: nn.Module) -> nn.Module:
    """Random weights whose scores depend on the picture: as they are drawn, attention hardly looks at it."""
    for name, weight in model.named_parameters():
        if "attn" in name:
            weight.data *= 2
    return model


def _open_clip(name: str, folder: Path) -> _Library:
    config = open_clip.get_model_config(name)
    for tower in ("vision_cfg", "text_cfg"):
        config[tower]["layers"] = 1
    (folder / f"srpo-test-{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"srpo-test-{name}.json")
    torch.manual_seed(0)
    torch.save(_lively(open_clip.create_model(f"srpo-test-{name}")).half().state_dict(), folder / "model.pt")
    model, _, preprocess = open_clip.create_model_and_transforms(f"srpo-test-{name}", pretrained=folder / "model.pt")
    model.requires_grad_(False).eval()
    texts = model.encode_text(open_clip.get_tokenizer(f"srpo-test-{name}")(_PROMPTS), normalize=True)
    return _Library(
        lambda pixels: model.encode_image(pixels, normalize=True) @ texts.T,
        preprocess,
        lambda **options: OpenCLIPReward(folder / "model.pt", architecture=f"srpo-test-{name}", **options),
    )


def _transformers(name: str, folder: Path) -> _Library:
    tokenizer = clip_tokenizer()
    width, activation, heads = {"ViT-H-14": (1280, "gelu", 16), "ViT-L-14": (1024, "quick_gelu", 16)}[name]
    text = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12, max_position_embeddings=16)
    vision = dict(hidden_size=width, intermediate_size=4 * width, num_attention_heads=heads, patch_size=14)
    shared = dict(num_hidden_layers=1, hidden_act=activation)
    config = CLIPConfig(
        text_config=dict(text, **shared, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id),
        vision_config=dict(vision, **shared, image_size=224),
        projection_dim=768,
    )
    torch.manual_seed(0)
    _lively(CLIPModel(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    model = CLIPModel.from_pretrained(folder).requires_grad_(False).eval()
    tokens = CLIPTokenizer.from_pretrained(folder)(_PROMPTS, padding=True, return_tensors="pt")
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    return _Library(
        lambda pixels: model(pixel_values=pixels, **tokens).logits_per_image / model.logit_scale.exp(),
        lambda image: processor(image, return_tensors="pt")["pixel_values"][0],
        lambda **options: CLIPReward(folder, **options),
    )


@pytest.fixture(
    scope="module",
    params=[
        (_open_clip, "ViT-H-14"),
        (_transformers, "ViT-H-14"),
        (_transformers, "ViT-L-14"),
    ],
    ids=lambda param: f"{param[0].__name__.strip('_')} {param[1]}",
)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> _Library:
    make, name = request.param
    return make(name, tmp_path_factory.mktemp("model"))


def _tensor(image: Image.Image) -> Tensor:
    """[1, 3, H, W] in [0, 1]."""
    return v2.functional.pil_to_tensor(image)[None] / 255


def _preprocess_tensor(reward: CosineReward, image: Tensor) -> Tensor:
    """In float, by torchvision; halves of a pixel are cropped as the library does it."""
    resized = v2.functional.resize(image, [224], interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    whole = round if isinstance(reward, OpenCLIPReward) else math.floor
    top, left = (whole((side - 224) / 2) for side in resized.shape[-2:])
    return v2.functional.normalize(
        resized[..., top : top + 224, left : left + 224], list(reward.image_mean), list(reward.image_std)
    )


def _scores(reward: CosineReward, images: list[Tensor]) -> Tensor:
    """[N], each photograph with one of the prompts."""
    return torch.cat([reward.score(image, [prompt]) for image, prompt in zip(images, cycle(_PROMPTS), strict=False)])


def _of_its_prompt(cosine: Tensor) -> Tensor:
    """[N, prompts] -> [N]"""
    return torch.stack([row[index % len(_PROMPTS)] for index, row in enumerate(cosine)])


@torch.no_grad()
def test_scores_are_the_library_s(library: _Library, photographs: list[Image.Image]) -> None:
    images = [_tensor(photograph) for photograph in photographs]
    ours = _scores(library.reward, images)
    preprocessed = {
        "PIL": [library.preprocess(photograph)[None] for photograph in photographs],
        "tensor": [_preprocess_tensor(library.reward, image) for image in images],
    }
    expected = {name: library.cosine(torch.cat(pixels)) for name, pixels in preprocessed.items()}
    assert expected["PIL"].std(0).min() > 1e-2, "photographs are told apart"
    differences = {name: (ours - _of_its_prompt(cosine)).abs().max().item() for name, cosine in expected.items()}
    assert differences["PIL"] <= 2e-3
    assert differences["tensor"] <= 1e-6


@torch.no_grad()
def test_bf16_vision_tower_scores_as_fp32(library: _Library, photographs: list[Image.Image]) -> None:
    images = [_tensor(photograph) for photograph in photographs[-2:]]
    low = library.make(dtype=torch.bfloat16)
    assert (_scores(low, images) - _scores(library.reward, images)).abs().max() <= 2e-3


def test_gradient_is_the_library_s(library: _Library, photographs: list[Image.Image]) -> None:
    ours, theirs = (_tensor(photographs[-1]).requires_grad_() for _ in range(2))
    library.reward.score(ours, _PROMPTS[:1]).sum().backward()
    library.cosine(_preprocess_tensor(library.reward, theirs))[:, 0].sum().backward()
    assert (ours.grad - theirs.grad).norm() <= 1e-4 * theirs.grad.norm()
