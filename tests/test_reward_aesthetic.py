"""Aesthetic predictors against their published pipelines: PIL preprocessing, the library's tower, a plain head."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from reward_helpers import PIL_BOUND, head, photographs, plain_head, save, slope_error, tensor
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision import transforms
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from srpo.errors import InputError
from srpo.objective import SRPOConfig
from srpo.rewards import AestheticReward, RewardConfig, SiglipAestheticReward, load_reward
from srpo.rewards.aesthetic import LAION_LAYERS, SIGLIP_LAYERS, affine_head

_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class _Published:
    """A predictor as it was published, and the reward made of the same files."""

    score: Callable[[Image.Image], float]
    make: Callable[..., Any]
    squash: int | None  # edge of a square input, if the picture is squashed to it
    options: dict[str, Any]  # of a recipe


def _scorer(preprocess: Callable, features: Callable[[Tensor], Tensor], state: Any, dropouts: Any) -> Callable:
    mlp = plain_head(state, dropouts)

    @torch.no_grad()
    def score(image: Image.Image) -> float:
        embedding = features(preprocess(image)[None])
        return mlp(embedding / embedding.norm(dim=-1, keepdim=True)).item()

    return score


def _lively(model: Any) -> Any:
    for name, weight in model.named_parameters():
        if "attn" in name or "attention" in name:
            weight.data *= 4
    return model.requires_grad_(False).eval()


def _clip_directory(folder: Path) -> _Published:
    tower = dict(num_hidden_layers=1, num_attention_heads=16, hidden_act="quick_gelu")
    vision = dict(tower, hidden_size=1024, intermediate_size=4096, patch_size=14, image_size=224)
    text = dict(tower, hidden_size=32, intermediate_size=32, vocab_size=20, bos_token_id=0, eos_token_id=1)
    torch.manual_seed(0)
    model = _lively(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=768)))
    model.save_pretrained(folder / "clip")
    crop = [transforms.Resize(224, interpolation=transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224)]
    preprocess = transforms.Compose([*crop, transforms.ToTensor(), transforms.Normalize(_MEAN, _STD)])
    state = head(LAION_LAYERS, 768)
    file = save(folder / "sac.pth", state)
    return _Published(
        _scorer(preprocess, lambda x: model.get_image_features(x).pooler_output, state, (0.2, 0.2, 0.1)),
        lambda **options: AestheticReward(folder / "clip", file, **options),
        None,
        dict(type="aesthetic", path=str(folder / "clip"), head=str(file)),
    )


def _open_clip_file(folder: Path) -> _Published:
    config = open_clip.get_model_config("ViT-L-14-quickgelu")
    config["vision_cfg"]["layers"] = 1
    config["text_cfg"].update(layers=1, width=64, heads=1)
    (folder / "srpo-test-aesthetic.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "srpo-test-aesthetic.json")
    torch.manual_seed(0)
    path = save(folder / "tower.pt", _lively(open_clip.create_model("srpo-test-aesthetic")).state_dict())
    model, _, preprocess = open_clip.create_model_and_transforms("srpo-test-aesthetic", pretrained=path)
    state = head(LAION_LAYERS, 768)
    save_file(state, folder / "sac.safetensors")
    return _Published(
        _scorer(preprocess, model.eval().encode_image, state, (0.2, 0.2, 0.1)),
        lambda **options: AestheticReward(
            path, folder / "sac.safetensors", architecture="srpo-test-aesthetic", **options
        ),
        None,
        dict(
            type="aesthetic",
            path=str(path),
            head=str(folder / "sac.safetensors"),
            architecture="srpo-test-aesthetic",
        ),
    )


def _siglip(folder: Path) -> _Published:
    vision = dict(hidden_size=1152, intermediate_size=4304, num_attention_heads=16, num_hidden_layers=1)
    text = dict(hidden_size=32, intermediate_size=32, num_attention_heads=1, num_hidden_layers=1, vocab_size=20)
    config = SiglipConfig(text_config=text, vision_config=dict(vision, image_size=224, patch_size=14))
    torch.manual_seed(0)
    model = _lively(SiglipModel(config))
    model.save_pretrained(folder / "siglip")
    processor = SiglipImageProcessorPil(size={"height": 224, "width": 224})
    state = head(SIGLIP_LAYERS, 1152)
    file = save(folder / "v2_5.pth", {name: weight.bfloat16() for name, weight in state.items()})
    rounded = {name: weight.bfloat16().float() for name, weight in state.items()}
    return _Published(
        _scorer(
            lambda image: processor(image, return_tensors="pt")["pixel_values"][0],
            lambda x: model.get_image_features(x).pooler_output,
            rounded,
            (0.5, 0.5, 0.5, 0.2),
        ),
        lambda **options: SiglipAestheticReward(folder / "siglip", file, **options),
        224,
        dict(type="siglip_aesthetic", path=str(folder / "siglip"), head=str(file)),
    )


@pytest.fixture(scope="module", params=[_clip_directory, _open_clip_file, _siglip], ids=lambda make: make.__name__)
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> _Published:
    return request.param(tmp_path_factory.mktemp("aesthetic"))


@pytest.fixture(scope="module")
def reward(published: _Published) -> Any:
    return published.make()


@torch.no_grad()
def test_scores_are_the_published_pipeline_s(published: _Published, reward: Any) -> None:
    pictures = photographs()
    ours = torch.cat([reward.score(tensor(picture), ["unread"]) for picture in pictures])
    expected = torch.tensor([published.score(picture) for picture in pictures])
    span = reward.limit(0.0) / 2
    assert expected.std() > 5 * PIL_BOUND * span, "photographs are told apart"
    assert (ours - expected).abs().max() <= PIL_BOUND * span


@torch.no_grad()
def test_score_of_an_image_of_the_tower_s_size_is_the_published_one(published: _Published, reward: Any) -> None:
    """Nothing is resized: what is left is rounding of fp32."""
    picture = photographs()[0].resize((reward.image_size, reward.image_size))
    ours = reward.score(tensor(picture), [""]).item()
    assert ours == pytest.approx(published.score(picture), abs=1e-5 * reward.limit(0.0))


def test_squashed_input_is_a_plain_resize(published: _Published, reward: Any) -> None:
    image = tensor(photographs()[1])
    if published.squash is None:
        assert tuple(reward.preprocess(image).shape) == (1, 3, 224, 224)
        return
    whole = interpolate(image, (224, 224), mode="bicubic", antialias=True, align_corners=False)
    torch.testing.assert_close(reward.preprocess(image), (whole - 0.5) / 0.5, rtol=0, atol=1e-6)


def test_gradient_is_the_slope_of_the_score(published: _Published) -> None:
    exact = published.make(dtype=torch.float64)
    image = tensor(photographs()[4].resize((48, 40)))
    assert slope_error(lambda x: exact.score(x, [""]), image) < 1e-5


def test_gradient_ends_at_pixels_outside_the_range(reward: Any) -> None:
    image = torch.rand(1, 3, 30, 40, generator=torch.Generator().manual_seed(0))
    image[..., :15, :] += 2
    image[..., 15, 20] = 1.0
    image.requires_grad_()
    reward.score(image, [""]).sum().backward()
    assert (image.grad[..., :15, :] == 0).all()
    assert (image.grad[..., 15:, 15:25] != 0).all()


def test_tower_is_frozen_and_bf16_scores_near_fp32(published: _Published, reward: Any) -> None:
    low = published.make(dtype=torch.bfloat16, divisor=4.0)
    assert {weight.dtype for weight in low.model.parameters() if weight.ndim > 0} == {torch.bfloat16}
    assert not any(weight.requires_grad for weight in low.model.parameters())
    with torch.no_grad():
        image = tensor(photographs()[2])
        score = low.score(image, [""])
        assert score.dtype == torch.float32
        assert (4 * score - reward.score(image, [""])).abs() <= 0.02 * reward.limit(0.0)
    assert low.limit(0.3) == pytest.approx(reward.limit(0.3) / 4)


def test_limit_is_the_difference_between_the_best_and_the_worst_embedding(
    reward: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = torch.stack([reward.weight, -reward.weight]).float()
    monkeypatch.setattr(reward, "_image_features", lambda _pixels: 3 * ends)
    best, worst = reward.score(torch.rand(2, 3, 32, 32), [""] * 2).tolist()
    assert reward.limit(0.5) == pytest.approx(best - worst, rel=1e-5)


def test_recipe_loads_it_for_the_image_only_form_alone(published: _Published, reward: Any) -> None:
    config = RewardConfig(**published.options)
    objective = SRPOConfig(form="image_only", reward_divisor=2.0)
    loaded = load_reward(config, objective, device="cpu", dtype=torch.float32)
    image = tensor(photographs()[3])
    with torch.no_grad():
        assert loaded.score(image, [""]).item() == pytest.approx(reward.score(image, [""]).item() / 2, rel=1e-5)
    assert loaded.embed_prompts(["any"]) is None
    with pytest.raises(
        InputError, match=rf"^reward of type {config.type} reads no prompt and needs srpo.form image_on"
    ):
        load_reward(config, SRPOConfig(), device="cpu", dtype=torch.float32)
    with pytest.raises(InputError, match=r"reads no prompt: it needs srpo\.form image_only"):
        loaded.relative(image, ["a"], ["b"], torch.ones(1))
    scaled = SRPOConfig(form="image_only", reward_logit_scale=True)
    with pytest.raises(InputError, match=rf"reward_logit_scale must be false: reward type {config.type} has no logit"):
        load_reward(config, scaled, device="cpu", dtype=torch.float32)


# --- heads and files that do not fit ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [LAION_LAYERS, SIGLIP_LAYERS], ids=["laion", "siglip"])
def test_affine_head_is_the_stack_of_layers(layers: tuple[str, ...]) -> None:
    state = head(layers, 24, seed=3)
    weight, bias = affine_head(state, layers, 24, "head")
    x = torch.randn(5, 24, dtype=torch.float64)
    expected = plain_head(state, (0.2,) * (3 if layers == LAION_LAYERS else 4)).double()(x)[:, 0]
    torch.testing.assert_close(x @ weight + bias, expected)


def test_head_that_does_not_fit_is_refused_by_name() -> None:
    def refuse(state: dict[str, Tensor], match: str) -> None:
        with pytest.raises(InputError, match=match):
            affine_head(state, LAION_LAYERS, 24, "head x")

    state = head(LAION_LAYERS, 24)
    lacking = {name: value for name, value in state.items() if name != "layers.4.bias"}
    refuse(lacking, r"^head x, on embeddings of 24, does not fit: missing layers\.4\.bias$")
    refuse({**state, "extra": torch.zeros(1)}, "unexpected extra$")
    refuse(head(LAION_LAYERS, 25), r"layers\.0\.weight is \[1024, 25\] instead of \[1024, 24\]$")
    with_activations = {name.replace("layers.2", "layers.3"): value for name, value in state.items()}
    refuse(with_activations, r"missing layers\.2\.bias, layers\.2\.weight; unexpected layers\.3\.bias")


@pytest.mark.parametrize("missing", ["path", "head"])
def test_missing_files_are_named(published: _Published, tmp_path: Path, missing: str) -> None:
    config = RewardConfig(**{**published.options, missing: str(tmp_path / "none.pth")})
    with pytest.raises(InputError, match=r"none\.pth.* (does not exist|is missing)"):
        load_reward(config, SRPOConfig(form="image_only"), device="cpu", dtype=torch.float32)


def test_tower_without_a_weight_is_refused_by_name(tmp_path: Path) -> None:
    vision = dict(hidden_size=16, intermediate_size=16, num_attention_heads=1, num_hidden_layers=1, image_size=32)
    text = dict(hidden_size=16, intermediate_size=16, num_attention_heads=1, num_hidden_layers=1, vocab_size=20)
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=dict(vision, patch_size=16)))
    state = model.state_dict()
    del state["vision_model.head.probe"]
    model.save_pretrained(tmp_path, state_dict={**state, "vision_model.strange": torch.zeros(1)})
    with pytest.raises(InputError, match=r"does not fit SiglipVisionModel: missing weights head\.probe$"):
        SiglipAestheticReward(tmp_path, tmp_path / "head.pth")
    model.save_pretrained(tmp_path, state_dict={**model.state_dict(), "vision_model.strange": torch.zeros(1)})
    with pytest.raises(InputError, match=r"unexpected weights .*strange$"):
        SiglipAestheticReward(tmp_path, tmp_path / "head.pth")
    model.save_pretrained(tmp_path)
    save(tmp_path / "head.pth", head(SIGLIP_LAYERS, 1152))
    with pytest.raises(
        InputError, match=r"on embeddings of 16, does not fit: scoring_head\.0\.weight is \[1024, 1152\]"
    ):
        SiglipAestheticReward(tmp_path, tmp_path / "head.pth")
