"""Weighted mixtures, and any open_clip model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import yaml
from reward_helpers import head, photographs, save, tensor
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from srpo.config import TrainConfig, dump_config, load_config
from srpo.errors import InputError
from srpo.objective import SRPOConfig
from srpo.rewards import MixtureReward, OpenCLIPReward, RewardConfig, RewardPart, load_reward
from srpo.rewards.aesthetic import LAION_LAYERS

_PROMPTS = ["digit three red", "a thin blue digit"]
_KAPPA = torch.tensor([0.1, 0.6])


@pytest.fixture(scope="module")
def head_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save(tmp_path_factory.mktemp("head") / "head.pth", head(LAION_LAYERS, 16)))


@pytest.fixture(scope="module")
def open_clip_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of an architecture "srpo-test-mixed"."""
    folder = tmp_path_factory.mktemp("open-clip")
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    config = folder / "srpo-test-mixed.json"
    config.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(config)
    torch.manual_seed(5)
    return str(save(folder / "reward.pt", open_clip.create_model("srpo-test-mixed").state_dict()))


def _images() -> Tensor:
    return torch.rand(2, 3, 40, 56, generator=torch.Generator().manual_seed(0))


def _load(config: RewardConfig, **objective: Any) -> Any:
    return load_reward(config, SRPOConfig(**objective), device="cpu", dtype=torch.float32)


def _text_parts(clip: Path, checkpoint: str) -> tuple[RewardPart, ...]:
    return (
        RewardPart(path=str(clip), weight=0.25, logit_scale=True),
        RewardPart(path=checkpoint, type="open_clip", architecture="srpo-test-mixed", weight=-2.0),
    )


def _with_gradient(score: Any) -> tuple[Tensor, Tensor]:
    images = _images().requires_grad_()
    scores = score(images)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    return scores.detach(), gradient


@pytest.mark.parametrize("form", ["official", "difference", "cfg"])
def test_mixture_is_the_weighted_sum_of_its_parts(clip_shaped: Path, open_clip_file: str, form: str) -> None:
    parts = _text_parts(clip_shaped, open_clip_file)
    mixture = _load(RewardConfig(type="mixture", parts=parts), form=form)
    alone = [
        _load(RewardConfig(path=parts[0].path), form=form, reward_logit_scale=True),
        _load(RewardConfig(path=parts[1].path, type="open_clip", architecture="srpo-test-mixed"), form=form),
    ]
    mixture.embed_prompts(_PROMPTS)
    for run in (
        lambda reward, images: reward.relative(images, _PROMPTS, _PROMPTS[::-1], _KAPPA),
        lambda reward, images: reward.score(images, _PROMPTS),
    ):
        scores, gradient = _with_gradient(lambda images: run(mixture, images))  # noqa: B023
        one_by_one = [_with_gradient(lambda images: run(reward, images)) for reward in alone]  # noqa: B023
        for got, index in ((scores, 0), (gradient, 1)):
            expected = 0.25 * one_by_one[0][index] - 2.0 * one_by_one[1][index]
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
    assert mixture.limit(0.3) == pytest.approx(0.25 * alone[0].limit(0.3) + 2 * alone[1].limit(0.3))
    named = mixture.score_parts(_images(), _PROMPTS)
    assert list(named) == ["clip 0", "open_clip 1"]
    torch.testing.assert_close(named["open_clip 1"], alone[1].score(_images(), _PROMPTS))


def test_parts_share_the_text_cache(clip_shaped: Path, open_clip_file: str, tmp_path: Path) -> None:
    config = RewardConfig(
        type="mixture", parts=_text_parts(clip_shaped, open_clip_file), text_cache=str(tmp_path / "cache")
    )
    plain = _load(RewardConfig(type="mixture", parts=config.parts)).score(_images(), _PROMPTS)
    _load(config).embed_prompts(_PROMPTS)
    files = sorted((tmp_path / "cache").iterdir())
    assert len(files) == 2 * len(_PROMPTS)
    again = _load(config)
    for part in again.parts:
        part.reward._text_features = None  # nothing is embedded again
    assert torch.equal(again.score(_images(), _PROMPTS), plain)
    assert sorted((tmp_path / "cache").iterdir()) == files


def test_part_that_reads_no_prompt_mixes_in_the_image_only_form(
    clip_shaped: Path, open_clip_file: str, head_file: str
) -> None:
    parts = (
        RewardPart(path=str(clip_shaped), weight=2.0),
        RewardPart(path=open_clip_file, type="aesthetic", architecture="srpo-test-mixed", head=head_file, weight=0.1),
    )
    config = RewardConfig(type="mixture", parts=parts)
    mixture = _load(config, form="image_only")
    named = mixture.score_parts(_images(), _PROMPTS)
    expected = 2 * named["clip 0"] + 0.1 * named["aesthetic 1"]
    torch.testing.assert_close(mixture.score(_images(), _PROMPTS), expected)
    with pytest.raises(InputError, match=r"^reward\.parts\[1\] of type aesthetic reads no prompt and needs"):
        _load(config, form="difference")
    with pytest.raises(InputError, match=r"^part aesthetic 1 of a mixture reads no prompt"):
        mixture.relative(_images(), _PROMPTS, _PROMPTS, _KAPPA)
    with pytest.raises(InputError, match="a mixture of rewards needs at least one part"):
        MixtureReward([])


# --- recipes ---------------------------------------------------------------------------------------------------------


def _recipe(tmp_path: Path, reward: Any, *overrides: str) -> TrainConfig:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"model": {"path": "m"}, "data": {"prompts": "p"}, "reward": reward}))
    return load_config(file, overrides)


def test_recipe_holds_a_mixture_and_is_written_back(tmp_path: Path) -> None:
    parts = [{"path": "a", "weight": 2}, {"type": "image_reward", "path": "b", "processor": "c"}]
    config = _recipe(tmp_path, {"type": "mixture", "parts": parts, "text_cache": "t"})
    expected = (RewardPart(path="a", weight=2.0), RewardPart(type="image_reward", path="b", processor="c"))
    assert config.reward == RewardConfig(type="mixture", parts=expected, text_cache="t")
    (tmp_path / "written.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "written.yaml") == config


@pytest.mark.parametrize(
    ("reward", "match"),
    [
        ({"type": "mixture"}, r"reward type mixture lacks parts: it needs parts$"),
        ({"type": "mixture", "parts": [{"path": "a"}], "path": "b"}, r"reward type mixture has no path"),
        ({"type": "clip"}, r"reward type clip lacks path: it needs path and may have processor"),
        ({"path": "a", "parts": [{"path": "b"}]}, r"reward type clip has no parts"),
        ({"path": "a", "head": "b"}, r"reward type clip has no head"),
        ({"type": "aesthetic", "path": "a"}, r"reward type aesthetic lacks head: it needs path and head"),
        ({"type": "image_reward", "path": "a"}, r"reward type image_reward lacks processor"),
        ({"type": "hps", "path": "a"}, r"reward\.type: Input should be 'clip', 'open_clip', 'aesthetic', .*got 'hps'"),
        (
            {"type": "aesthetic", "path": "a", "head": "b"},
            r"reward of type aesthetic reads no prompt and needs srpo\.f",
        ),
        ({"type": "mixture", "parts": [{"path": "a", "wieght": 1}]}, r"reward\.parts\.0\.wieght: Unexpected keyword"),
        ({"type": "mixture", "parts": [{"path": "a", "weight": 0}]}, r"weight must be finite and not 0, got 0\.0"),
        ({"type": "mixture", "parts": [{"type": "mixture"}]}, r"type mixture lacks parts|cannot be a mixture"),
        (
            {
                "type": "mixture",
                "parts": [{"type": "image_reward", "path": "a", "processor": "b", "logit_scale": True}],
            },
            r"logit_scale is for clip and open_clip; reward type image_reward has none",
        ),
    ],
)
def test_reward_sections_that_make_no_sense_are_refused(tmp_path: Path, reward: Any, match: str) -> None:
    with pytest.raises(InputError, match=match):
        _recipe(tmp_path, reward)


def test_scale_of_a_mixture_is_its_parts_own(tmp_path: Path) -> None:
    reward = {"type": "mixture", "parts": [{"path": "a"}]}
    for override in ("srpo.reward_logit_scale=true", "srpo.reward_divisor=20", "srpo.preset=pickscore"):
        with pytest.raises(InputError, match=r"srpo\.reward_logit_scale and srpo\.reward_divisor are for a single rew"):
            _recipe(tmp_path, reward, override)
    assert _recipe(tmp_path, reward, "srpo.form=image_only").reward.parts[0].path == "a"


# --- any open_clip model ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint of "srpo-test-siglip", a small SigLIP, and the directory of its tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("siglip")
    config = open_clip.get_model_config("ViT-B-16-SigLIP-256")
    config["vision_cfg"]["timm_model_name"] = "vit_tiny_patch16_224"
    config["vision_cfg"].update(timm_pool="avg", image_size=224)
    config["embed_dim"] = 192
    config["text_cfg"].update(layers=1, width=192, heads=3, vocab_size=40)
    (folder / "srpo-test-siglip.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "srpo-test-siglip.json")
    torch.manual_seed(2)
    save(folder / "siglip.pt", open_clip.create_model("srpo-test-siglip").state_dict())
    words = {word: index for index, word in enumerate(["<pad>", "<unk>", "digit", "three", "red", "a", "thin"])}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", unk_token="<unk>")
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder / "siglip.pt", folder / "tokenizer"


@torch.no_grad()
def test_siglip_of_open_clip_scores_as_the_library(siglip: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Squashed, with statistics and a tokenizer of its own."""
    file, directory = siglip
    registered = open_clip.get_pretrained_cfg("ViT-B-16-SigLIP-256", "webli")
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda _name: ["webli"])
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda _name, _tag: registered)
    reward = OpenCLIPReward(file, architecture="srpo-test-siglip", processor=directory)
    model, _, preprocess = open_clip.create_model_and_transforms(
        "srpo-test-siglip",
        pretrained=file,
        image_mean=registered["mean"],
        image_std=registered["std"],
        image_interpolation=registered["interpolation"],
        image_resize_mode=registered["resize_mode"],
    )
    model.eval()
    tokenizer = open_clip.tokenizer.HFTokenizer(str(directory), context_length=64, clean="canonicalize")
    texts = model.encode_text(tokenizer(_PROMPTS[:1]), normalize=True)
    for picture in photographs()[1:4]:
        assert picture.width != picture.height
        expected = model.encode_image(preprocess(picture)[None], normalize=True) @ texts.T
        assert (reward.score(tensor(picture), _PROMPTS[:1]) - expected[0]).abs() <= 2e-3
    with pytest.raises(InputError, match=r"^reward\.processor is needed for architecture srpo-test-siglip: the direct"):
        OpenCLIPReward(file, architecture="srpo-test-siglip")
    with pytest.raises(InputError, match=r"^reward\.processor .* holds no tokenizer"):
        OpenCLIPReward(file, architecture="srpo-test-siglip", processor=file.parent / "none")


def test_registered_preprocessing_is_used_where_it_is_one_or_named(open_clip_file: str) -> None:
    from srpo.rewards.cosine import _preprocessing

    assert _preprocessing("ViT-SO400M-14-SigLIP-384", None)["resize_mode"] == "squash"
    assert _preprocessing("MobileCLIP-S1", None)["interpolation"] == "bilinear"
    assert _preprocessing("ViT-H-14", None) == {}, "HPSv2.1: OpenAI's"
    assert _preprocessing("ViT-H-14", "dfn5b")["resize_mode"] == "squash"
    assert _preprocessing("srpo-test-mixed", None) == {}
    with pytest.raises(
        InputError, match=r"^reward\.tag 'webli' is no open_clip weights of ViT-H-14; there are laion2b"
    ):
        _preprocessing("ViT-H-14", "webli")
    config = RewardConfig(path=open_clip_file, type="open_clip", architecture="srpo-test-mixed", tag="none")
    with pytest.raises(InputError, match=r"^reward\.tag 'none' is no open_clip weights of srpo-test-mixed"):
        _load(config)
