"""ImageReward against timm's vision transformer (BLIP's is made of it) and BERT with cross-attention written out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from reward_helpers import PIL_BOUND, head, photographs, plain_head, save, slope_error, tensor
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear
from torchvision import transforms
from transformers import BertTokenizer

from srpo.errors import InputError
from srpo.objective import SRPOConfig
from srpo.rewards import ImageReward, RewardConfig, load_reward

_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "digit", "three", "thin", "##ner", "photo"]
_PROMPTS = ["A red digit three", "thinner photo, thin digit"]
_WIDTH, _SEEN, _LAYERS = 768, 1024, 2


def _vision() -> Any:
    torch.manual_seed(0)
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=224, patch_size=16, embed_dim=_SEEN, depth=1, num_heads=16, num_classes=0, global_pool=""
    )
    nn.init.normal_(model.cls_token, std=0.1)
    for name, weight in model.named_parameters():
        if "attn" in name:
            weight.data *= 4
    return model.requires_grad_(False).eval()


def _text() -> dict[str, Tensor]:
    """Random weights of BLIP's text tower, under its names."""
    generator = torch.Generator().manual_seed(1)
    state = {}

    def add(name: str, *shape: int, scale: float = 1.0, middle: float = 0.0) -> None:
        state[name] = middle + scale * torch.randn(shape, generator=generator)

    def add_linear(name: str, out: int, size: int) -> None:
        add(f"{name}.weight", out, size, scale=1.5 * size**-0.5)
        add(f"{name}.bias", out, scale=0.1)

    def add_norm(name: str) -> None:
        add(f"{name}.weight", _WIDTH, scale=0.1, middle=1.0)
        add(f"{name}.bias", _WIDTH, scale=0.1)

    add("embeddings.word_embeddings.weight", len(_WORDS) + 2, _WIDTH)
    add("embeddings.position_embeddings.weight", 64, _WIDTH)
    add_norm("embeddings.LayerNorm")
    for layer in (f"encoder.layer.{index}" for index in range(_LAYERS)):
        for kind, seen in (("attention", _WIDTH), ("crossattention", _SEEN)):
            for name, size in (("query", _WIDTH), ("key", seen), ("value", seen)):
                add_linear(f"{layer}.{kind}.self.{name}", _WIDTH, size)
            add_linear(f"{layer}.{kind}.output.dense", _WIDTH, _WIDTH)
            add_norm(f"{layer}.{kind}.output.LayerNorm")
        add_linear(f"{layer}.intermediate.dense", 3072, _WIDTH)
        add_linear(f"{layer}.output.dense", _WIDTH, 3072)
        add_norm(f"{layer}.output.LayerNorm")
    return state


class _Bert:
    """[CLS]'s last state, from weights by name: post-norm layers of self-attention, cross-attention and MLP."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return layer_norm(x, (_WIDTH,), self.state[f"{name}.weight"], self.state[f"{name}.bias"], 1e-12)

    def _attend(self, name: str, x: Tensor, seen: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (
            self._linear(f"{name}.self.{part}", source).unflatten(-1, (12, 64)).transpose(1, 2)
            for part, source in (("query", x), ("key", seen), ("value", seen))
        )
        weights = (q @ k.mT / 8 + (1 - mask[:, None, None, :]) * -10000.0).softmax(-1)
        mixed = self._linear(f"{name}.output.dense", (weights @ v).transpose(1, 2).flatten(2))
        return self._norm(f"{name}.output.LayerNorm", mixed + x)

    def __call__(self, tokens: Tensor, mask: Tensor, seen: Tensor) -> Tensor:
        words, places = (self.state[f"embeddings.{kind}_embeddings.weight"] for kind in ("word", "position"))
        x = self._norm("embeddings.LayerNorm", words[tokens] + places[: tokens.shape[1]])
        for layer in (f"encoder.layer.{index}" for index in range(_LAYERS)):
            x = self._attend(f"{layer}.attention", x, x, mask)
            x = self._attend(f"{layer}.crossattention", x, seen, torch.ones(seen.shape[:2]))
            inner = gelu(self._linear(f"{layer}.intermediate.dense", x))
            x = self._norm(f"{layer}.output.LayerNorm", self._linear(f"{layer}.output.dense", inner) + x)
        return x[:, 0]


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """As in ``ImageReward.pt``, with what it has and does not use."""
    mlp = head(tuple(f"layers.{place}" for place in (0, 2, 4, 6, 7)), _WIDTH)
    return {
        **{f"blip.visual_encoder.{name}": value for name, value in _vision().state_dict().items()},
        **{f"blip.text_encoder.{name}": value for name, value in _text().items()},
        "blip.text_encoder.embeddings.position_ids": torch.arange(64)[None],
        **{f"mlp.{name}": value for name, value in mlp.items()},
        **{f"blip.{kind}_proj.{part}": torch.zeros(1) for kind in ("vision", "text") for part in ("weight", "bias")},
    }


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bert")
    (path / "vocab.txt").write_text("\n".join(_WORDS))
    return path


@pytest.fixture(scope="module")
def file(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("image-reward") / "ImageReward.pt", state)


@pytest.fixture(scope="module")
def reward(file: Path, tokenizer: Path) -> ImageReward:
    return ImageReward(file, tokenizer)


@pytest.fixture(scope="module")
def published(state: dict[str, Tensor], tokenizer: Path) -> Any:
    """The score of a picture and a prompt as THUDM/ImageReward computes it."""
    vision, bert = _vision(), _Bert(_text())
    mlp = plain_head({n.removeprefix("mlp."): v for n, v in state.items() if n.startswith("mlp.")}, (0.2, 0.2, 0.1))
    words = BertTokenizer.from_pretrained(tokenizer)
    crop = [transforms.Resize(224, interpolation=transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224)]
    normalise = transforms.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    preprocess = transforms.Compose([*crop, transforms.ToTensor(), normalise])

    @torch.no_grad()
    def score(picture: Image.Image, prompt: str) -> float:
        text = words(prompt, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        seen = vision.forward_features(preprocess(picture)[None])
        states = bert(text.input_ids, text.attention_mask, seen)
        return ((mlp(states) - 0.16717362830052426) / 1.0333394966054072).item()

    return score


@torch.no_grad()
def test_scores_are_the_published_pipeline_s(reward: ImageReward, published: Any) -> None:
    pictures = photographs()[:4]
    ours = torch.stack([reward.score(tensor(picture).repeat(2, 1, 1, 1), _PROMPTS) for picture in pictures])
    expected = torch.tensor([[published(picture, prompt) for prompt in _PROMPTS] for picture in pictures])
    spread = reward.limit(0.0) / 2
    assert expected.std(0).min() > 5 * PIL_BOUND * spread, "pictures are told apart"
    assert expected.diff(dim=1).abs().max() > 5 * PIL_BOUND * spread, "and prompts"
    assert (ours - expected).abs().max() <= PIL_BOUND * spread
    whole = pictures[0].resize((224, 224))
    for prompt in (_PROMPTS[0], "thin red digit three " * 20):  # the second is cut
        assert reward.score(tensor(whole), [prompt]).item() == pytest.approx(published(whole, prompt), abs=1e-4)


@torch.no_grad()
def test_relative_forms_weigh_the_scores(reward: ImageReward, monkeypatch: pytest.MonkeyPatch) -> None:
    images, kappa = torch.rand(2, 3, 40, 50, generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, 0.7])
    p, n = reward.score(images, _PROMPTS), reward.score(images, _PROMPTS[::-1])
    expected = {"official": (1 + kappa) * p - n, "difference": p - n, "cfg": kappa * p + (1 - kappa) * n}
    for form, values in expected.items():
        monkeypatch.setattr(reward, "form", form)
        torch.testing.assert_close(reward.relative(images, _PROMPTS, _PROMPTS[::-1], kappa), values)
        assert all(abs(v) <= reward.limit(k) for v, k in zip(values.tolist(), kappa.tolist(), strict=True))


@torch.no_grad()
def test_limit_is_what_the_last_norm_can_reach(reward: ImageReward, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best and the worst state, put in front of the text tower's last LayerNorm."""
    norm = reward.text.encoder.layer[-1].output.LayerNorm
    spread = reward.weight.float() * norm.weight
    best, worst = norm(100 * torch.stack([spread, -spread]))
    value = [(state @ reward.weight.float() + reward.bias.float()).item() for state in (best, worst)]
    monkeypatch.setattr(reward, "form", "difference")
    assert reward.limit(0.3) == pytest.approx(value[0] - value[1], rel=1e-4)
    monkeypatch.setattr(reward, "form", "official")
    extreme = max(abs(1.3 * a - b) for a in value for b in value)
    assert reward.limit(0.3) == pytest.approx(extreme, rel=1e-4)


def test_gradient_is_the_slope_of_the_score(file: Path, tokenizer: Path) -> None:
    exact = ImageReward(file, tokenizer, dtype=torch.float64)
    image = tensor(photographs()[4].resize((48, 40)))
    kappa = torch.tensor([0.5], dtype=torch.float64)
    assert slope_error(lambda x: exact.relative(x, _PROMPTS[:1], _PROMPTS[1:], kappa), image) < 1e-5


def test_prompts_do_not_depend_on_their_batch_and_bf16_is_near(
    reward: ImageReward, file: Path, tokenizer: Path
) -> None:
    images = torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(1))
    config = RewardConfig(type="image_reward", path=str(file), processor=str(tokenizer))
    low = load_reward(config, SRPOConfig(reward_divisor=2.0), device="cpu", dtype=torch.bfloat16)
    with torch.no_grad():
        together = reward.score(images, [_PROMPTS[0] + " three" * 60, _PROMPTS[0]])
        alone = reward.score(images[1:], _PROMPTS[:1])
        assert (together[1:] - alone).abs() < 1e-4
        again = low.score(images, [_PROMPTS[0] + " three" * 99, _PROMPTS[0]])
    assert (2 * again - together).abs().max() <= 0.02 * reward.limit(0.0)
    assert low.limit(0.2) == pytest.approx(reward.limit(0.2) / 2)
    assert low.embed_prompts(_PROMPTS) is None
    parameters = [*low.vision.parameters(), *low.text.parameters()]
    assert not any(weight.requires_grad for weight in parameters)
    assert math.isfinite(again.sum())


def test_files_that_do_not_fit_are_refused_by_name(
    state: dict[str, Tensor], file: Path, tokenizer: Path, tmp_path: Path
) -> None:
    def refuse(changed: dict[str, Tensor], match: str) -> None:
        with pytest.raises(InputError, match=match):
            ImageReward(save(tmp_path / "changed.pt", changed), tokenizer)

    key = "blip.text_encoder.encoder.layer.1.crossattention.self.key.bias"
    refuse({name: value for name, value in state.items() if name != key}, rf"changed\.pt does not fit: missing {key}$")
    refuse({**state, "blip.extra": torch.zeros(1)}, r"does not fit: unexpected blip\.extra$")
    refuse({**state, key: torch.zeros(5)}, rf"does not fit: {key} is \[5\] instead of \[768\]$")
    refuse({"blip.visual_encoder.cls_token": torch.zeros(1)}, r"does not fit: missing blip\.visual_encoder\.pos_embed$")
    refuse({**state, "mlp.layers.7.bias": torch.zeros(2)}, r"layers\.7\.bias is \[2\] instead of \[1\]$")
    with pytest.raises(InputError, match=r"^reward checkpoint .*none\.pt does not exist$"):
        ImageReward(tmp_path / "none.pt", tokenizer)
    with pytest.raises(InputError, match=r"^reward\.processor .* holds no BERT tokenizer: vocab\.txt is missing$"):
        ImageReward(file, tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join([*_WORDS, "one", "two", "four"]))
    with pytest.raises(InputError, match=r"has 15 tokens, the checkpoint embeds 14$"):
        ImageReward(file, tmp_path)
