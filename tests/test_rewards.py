"""Rewards against the same models called by hand."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from reward_helpers import slope_error
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import interpolate, normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import v2
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from srpo.errors import InputError
from srpo.objective import SRPOConfig
from srpo.rewards import CLIPReward, CosineReward, OpenCLIPReward, RewardConfig, load_reward

_PROMPTS = ["digit three red", "a thin blue digit", "wide"]


def _images(count: int, height: int = 40, width: int = 56, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def _resize_crop_normalise(
    images: Tensor, size: int, mean: Any, std: Any, whole: Callable[[float], int] = math.floor
) -> Tensor:
    """What the reward should do to its images, by plain tensor operations. Half a pixel of margin is made `whole`."""
    height, width = images.shape[-2:]
    short = min(height, width)
    scaled = (size * height // short, size * width // short)
    resized = interpolate(images, scaled, mode="bicubic", antialias=True, align_corners=False)
    top, left = (whole((side - size) / 2) for side in scaled)
    cropped = resized[..., top : top + size, left : left + size]
    return (cropped - torch.tensor(mean).reshape(3, 1, 1)) / torch.tensor(std).reshape(3, 1, 1)


# --- CLIP ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(clip_shaped: Path) -> CLIPReward:
    return CLIPReward(clip_shaped)


@pytest.fixture(scope="module")
def clip_cosine(clip_shaped: Path) -> Any:
    """cos(image, prompt) [N, M] from the model's own towers and projections."""
    model = CLIPModel.from_pretrained(clip_shaped, local_files_only=True).eval()
    tokenizer = CLIPTokenizer.from_pretrained(clip_shaped, local_files_only=True)
    processor = CLIPImageProcessor.from_pretrained(clip_shaped, local_files_only=True)

    @torch.no_grad()
    def cosine(images: Tensor, prompts: list[str]) -> Tensor:
        pixels = _resize_crop_normalise(images, 32, processor.image_mean, processor.image_std)
        tokens = tokenizer(prompts, padding=True, truncation=True, return_tensors="pt")
        return model(pixel_values=pixels, **tokens).logits_per_image / model.logit_scale.exp()

    return cosine


_SIZES = [(32, 32), (40, 56), (70, 33), (33, 70), (50, 33), (20, 24)]  # the third to fifth with an odd margin


@pytest.mark.parametrize("size", _SIZES, ids=str)
def test_preprocessing_equals_transformers_and_plain_interpolation(
    clip: CLIPReward, clip_shaped: Path, size: tuple[int, int]
) -> None:
    images = _images(2, *size)
    got = clip.preprocess(images)
    processor = CLIPImageProcessor.from_pretrained(clip_shaped, do_rescale=False)
    expected = processor(list(images), return_tensors="pt")["pixel_values"]
    assert tuple(got.shape) == (2, 3, 32, 32)
    by_hand = _resize_crop_normalise(images, 32, clip.image_mean, clip.image_std)
    for other in (expected, by_hand):  # an odd margin is counted from the other end, where coordinates round otherwise
        torch.testing.assert_close(got, other, rtol=0, atol=3e-5)


def test_normalisation_is_the_processor_s(clip: CLIPReward) -> None:
    """OpenAI's published statistics."""
    assert list(clip.image_mean) == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    assert list(clip.image_std) == pytest.approx([0.26862954, 0.26130258, 0.27577711])


def test_score_is_the_cosine_of_the_model_s_features(clip: CLIPReward, clip_cosine: Any) -> None:
    images = _images(3)
    expected = clip_cosine(images, _PROMPTS)
    assert expected.std() > 1e-3, "the pairs differ enough to tell them apart"
    torch.testing.assert_close(clip.score(images, _PROMPTS), expected.diagonal(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", ["official", "difference", "cfg"])
def test_relative_score_in_every_form(clip_shaped: Path, clip_cosine: Any, form: str) -> None:
    images, kappa = _images(3), torch.tensor([0.1, 0.5, 0.25])
    positive, negative = _PROMPTS, _PROMPTS[::-1]
    p, n = clip_cosine(images, positive).diagonal(), clip_cosine(images, negative).diagonal()
    expected = {"official": (1 + kappa) * p - n, "difference": p - n, "cfg": kappa * p + (1 - kappa) * n}[form]
    got = CLIPReward(clip_shaped, form=form).relative(images, positive, negative, kappa)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("logit_scale", "divisor"), [(False, 1.0), (True, 1.0), (True, 20.0), (False, 4.0)])
def test_scale_is_the_model_s_over_the_divisor(
    clip_shaped: Path, clip_cosine: Any, logit_scale: bool, divisor: float
) -> None:
    images, kappa = _images(2), torch.tensor([0.3, 0.3])
    reward = CLIPReward(clip_shaped, logit_scale=logit_scale, divisor=divisor)
    # CLIPConfig starts logit_scale at ln(1 / 0.07), rounded to 2.6592.
    scale = (math.exp(2.6592) if logit_scale else 1.0) / divisor
    expected = scale * clip_cosine(images, _PROMPTS[:2]).diagonal()
    torch.testing.assert_close(reward.score(images, _PROMPTS[:2]), expected, rtol=1e-5, atol=1e-5)
    both = reward.relative(images, _PROMPTS[:2], _PROMPTS[1::-1], kappa)
    plain = CLIPReward(clip_shaped).relative(images, _PROMPTS[:2], _PROMPTS[1::-1], kappa)
    torch.testing.assert_close(both, scale * plain, rtol=1e-5, atol=1e-5)


def _most_extreme(reward: CosineReward, kappa: float) -> float:
    """The largest relative score over image embeddings, found by aligning the embedding with the direction."""
    positive, negative = reward.embed_prompts(_PROMPTS[:1]), reward.embed_prompts(_PROMPTS[1:2])
    weights = {"official": (1 + kappa, -1.0), "difference": (1.0, -1.0), "cfg": (kappa, 1 - kappa)}[reward.form]
    return reward.scale * (weights[0] * positive + weights[1] * negative).norm().item()


@pytest.mark.parametrize("kappa", [0.0, 0.25, 0.6, 1.0])
@pytest.mark.parametrize("form", ["official", "difference", "cfg"])
def test_limit_bounds_every_score_and_is_reached_by_opposite_prompts(
    clip_shaped: Path, form: str, kappa: float
) -> None:
    reward = CLIPReward(clip_shaped, form=form, logit_scale=True)
    limit = reward.limit(kappa)
    images = _images(16)
    scores = reward.relative(images, _PROMPTS[:1] * 16, _PROMPTS[1:2] * 16, torch.full((16,), kappa))
    assert scores.abs().max() <= limit
    assert _most_extreme(reward, kappa) <= limit * (1 + 1e-6)
    weights = {"official": 2 + kappa, "difference": 2.0, "cfg": 1.0}
    assert limit == pytest.approx(weights[form] * math.exp(2.6592), rel=1e-5)


def test_gradient_reaches_every_image_and_no_weight(clip: CLIPReward) -> None:
    images = _images(2, 40, 40).requires_grad_()
    clip.relative(images, _PROMPTS[:2], _PROMPTS[1:], torch.tensor([0.1, 0.2])).sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()
    assert (images.grad.abs().flatten(1).amax(1) > 0).all()
    assert not any(p.requires_grad for p in clip.model.parameters())
    assert not clip.model.training


def _count_text_passes(reward: CosineReward) -> list[Any]:
    """A list that grows by what each pass of the text tower is given."""
    calls: list[Any] = []
    original = reward._text_features

    def counted(tokens: Any) -> Tensor:
        calls.append(tokens)
        return original(tokens)

    reward._text_features = counted  # type: ignore[method-assign]
    return calls


def test_prompt_embedding_is_cached_and_does_not_depend_on_its_batch(clip_shaped: Path) -> None:
    together = CLIPReward(clip_shaped).embed_prompts(_PROMPTS)
    reward = CLIPReward(clip_shaped)
    calls = _count_text_passes(reward)
    alone = torch.cat([reward.embed_prompts([prompt]) for prompt in reversed(_PROMPTS)]).flip(0)
    assert torch.equal(together, alone)
    torch.testing.assert_close(alone.norm(dim=-1), torch.ones(3))
    assert not alone.requires_grad
    assert torch.equal(reward.embed_prompts(_PROMPTS * 2), together.repeat(2, 1))
    assert len(calls) == len(_PROMPTS)


def test_cached_embedding_is_safe_from_its_user(clip_shaped: Path) -> None:
    reward = CLIPReward(clip_shaped)
    first = reward.embed_prompts(_PROMPTS[:1])
    kept = first.clone()
    first.zero_()
    assert torch.equal(reward.embed_prompts(_PROMPTS[:1]), kept)


def test_long_prompt_is_truncated(clip: CLIPReward) -> None:
    long = clip.embed_prompts(["red " * 500])
    assert torch.equal(long, clip.embed_prompts(["red " * 600]))


@pytest.mark.parametrize("missing", ["config.json", "preprocessor_config.json", "tokenizer_config.json"])
def test_missing_file_of_a_reward_directory_is_named(clip_shaped: Path, tmp_path: Path, missing: str) -> None:
    copy = tmp_path / "reward"
    shutil.copytree(clip_shaped, copy)
    (copy / missing).unlink()
    with pytest.raises(InputError, match=rf"reward directory .* is incomplete: .*{missing} is missing$"):
        CLIPReward(copy)


@pytest.mark.parametrize("pattern", ["model.safetensors", "tokenizer.json"])
def test_reward_directory_without_weights_or_vocabulary_is_refused(
    clip_shaped: Path, tmp_path: Path, pattern: str
) -> None:
    copy = tmp_path / "reward"
    shutil.copytree(clip_shaped, copy)
    (copy / pattern).unlink()
    with pytest.raises(InputError, match="reward directory"):
        CLIPReward(copy)


def test_truncated_weights_of_a_reward_are_refused(clip_shaped: Path, tmp_path: Path) -> None:
    copy = tmp_path / "reward"
    shutil.copytree(clip_shaped, copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match="reward directory"):
        CLIPReward(copy)


def test_missing_reward_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"reward directory .*nowhere"):
        CLIPReward(tmp_path / "nowhere")


def test_tokenizer_and_processor_may_live_elsewhere(clip_shaped: Path, tmp_path: Path, clip: CLIPReward) -> None:
    """PickScore's own repository has none; its processor is CLIP's."""
    model, processor = tmp_path / "model", tmp_path / "processor"
    for target in (model, processor):
        target.mkdir()
    for file in clip_shaped.iterdir():
        shutil.copy(file, model if file.name in ("config.json", "model.safetensors") else processor)
    images = _images(2)
    moved = CLIPReward(model, processor=processor).score(images, _PROMPTS[:2])
    assert torch.equal(moved, clip.score(images, _PROMPTS[:2]))
    with pytest.raises(InputError, match=r"preprocessor_config\.json is missing"):
        CLIPReward(model)


# --- open_clip -------------------------------------------------------------------------------------------------------

_ARCHITECTURE = "srpo-test-small"


@pytest.fixture(scope="module")
def open_clip_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint in fp16 under "state_dict", as HPSv2.1 is, of a small architecture made known here."""
    folder = tmp_path_factory.mktemp("open-clip")
    config = folder / f"{_ARCHITECTURE}.json"
    config.write_text(
        json.dumps(
            {
                "embed_dim": 16,
                "quick_gelu": True,
                "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
                "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
            }
        )
    )
    open_clip.add_model_config(config)
    torch.manual_seed(5)
    model = open_clip.create_model(_ARCHITECTURE)
    path = folder / "reward.pt"
    torch.save({"state_dict": {name: tensor.half() for name, tensor in model.state_dict().items()}}, path)
    return path


@pytest.fixture(scope="module")
def open_clip_reward(open_clip_file: Path) -> OpenCLIPReward:
    return OpenCLIPReward(open_clip_file, architecture=_ARCHITECTURE)


def test_open_clip_scores_are_its_own_cosines(open_clip_file: Path, open_clip_reward: OpenCLIPReward) -> None:
    model = open_clip.create_model(_ARCHITECTURE).eval()
    state = torch.load(open_clip_file, weights_only=True)["state_dict"]
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    tokenizer = open_clip.get_tokenizer(_ARCHITECTURE)
    images, kappa = _images(3), torch.tensor([0.1, 0.5, 0.25])
    with torch.no_grad():
        pixels = _resize_crop_normalise(images, 32, model.visual.image_mean, model.visual.image_std, round)
        features = normalize(model.encode_image(pixels), dim=-1)
        texts = normalize(model.encode_text(tokenizer(_PROMPTS)), dim=-1)
        cosine = features @ texts.T
    assert cosine.std() > 1e-3
    torch.testing.assert_close(open_clip_reward.score(images, _PROMPTS), cosine.diagonal(), rtol=0, atol=1e-5)
    expected = (1 + kappa) * cosine.diagonal() - cosine.flip(1).diagonal()
    got = open_clip_reward.relative(images, _PROMPTS, _PROMPTS[::-1], kappa)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", _SIZES, ids=str)
def test_open_clip_preprocessing_equals_torchvision(open_clip_reward: OpenCLIPReward, size: tuple[int, int]) -> None:
    images = _images(2, *size)
    mean, std = open_clip_reward.image_mean, open_clip_reward.image_std
    resize = v2.Resize(32, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    chain = v2.Compose([resize, v2.CenterCrop(32), v2.Normalize(list(mean), list(std))])
    got = open_clip_reward.preprocess(images)
    torch.testing.assert_close(got, chain(images), rtol=0, atol=0)
    torch.testing.assert_close(got, _resize_crop_normalise(images, 32, mean, std, round), rtol=0, atol=1e-5)


def test_open_clip_checkpoint_is_held_in_fp32_and_frozen(open_clip_reward: OpenCLIPReward) -> None:
    parameters = list(open_clip_reward.model.parameters())
    assert {p.dtype for p in parameters} == {torch.float32}
    assert not any(p.requires_grad for p in parameters)
    assert not open_clip_reward.model.training


def test_open_clip_normalises_with_openai_s_statistics(open_clip_reward: OpenCLIPReward) -> None:
    assert list(open_clip_reward.image_mean) == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    assert list(open_clip_reward.image_std) == pytest.approx([0.26862954, 0.26130258, 0.27577711])


def test_open_clip_gradient_reaches_every_image(open_clip_reward: OpenCLIPReward) -> None:
    images = _images(2).requires_grad_()
    open_clip_reward.relative(images, _PROMPTS[:2], _PROMPTS[1:], torch.tensor([0.1, 0.2])).sum().backward()
    assert images.grad is not None
    assert (images.grad.abs().flatten(1).amax(1) > 0).all()


@pytest.mark.parametrize("form", ["official", "difference", "cfg"])
@pytest.mark.parametrize("kind", ["clip", "open_clip"])
def test_gradient_is_the_slope_of_the_score(
    kind: str, form: str, clip_shaped: Path, open_clip_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, embeddings too, which rewards otherwise round to fp32."""
    options: dict[str, Any] = dict(dtype=torch.float64, form=form)
    if kind == "clip":
        reward: CosineReward = CLIPReward(clip_shaped, **options)
    else:
        reward = OpenCLIPReward(open_clip_file, architecture=_ARCHITECTURE, **options)
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    kappa = torch.tensor([0.5], dtype=torch.float64)
    assert slope_error(lambda x: reward.relative(x, _PROMPTS[:1], _PROMPTS[1:2], kappa), _images(1)) < 1e-5
    assert slope_error(lambda x: reward.score(x, _PROMPTS[:1]), _images(1)) < 1e-5


def test_open_clip_scale(open_clip_file: Path, open_clip_reward: OpenCLIPReward) -> None:
    scaled = OpenCLIPReward(open_clip_file, architecture=_ARCHITECTURE, logit_scale=True, divisor=2.0)
    factor = math.exp(torch.tensor(math.log(1 / 0.07)).half().item()) / 2
    images = _images(2)
    expected = factor * open_clip_reward.score(images, _PROMPTS[:2])
    torch.testing.assert_close(scaled.score(images, _PROMPTS[:2]), expected, rtol=1e-5, atol=1e-6)


def test_missing_open_clip_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^reward checkpoint .*none\.pt does not exist$"):
        OpenCLIPReward(tmp_path / "none.pt", architecture=_ARCHITECTURE)


def test_unknown_architecture_is_refused(open_clip_file: Path) -> None:
    with pytest.raises(InputError, match=r"^reward architecture 'ViT-Z' is not an open_clip model name$"):
        OpenCLIPReward(open_clip_file, architecture="ViT-Z")


@pytest.mark.parametrize("kind", ["other shapes", "missing keys", "surplus keys", "no state", "garbage", "truncated"])
def test_wrong_open_clip_checkpoint_is_refused(open_clip_file: Path, tmp_path: Path, kind: str) -> None:
    state = torch.load(open_clip_file, weights_only=True)["state_dict"]
    name = "visual.proj"
    path = tmp_path / "wrong.pt"
    if kind == "garbage":
        path.write_bytes(b"not a checkpoint")
    elif kind == "truncated":
        content = open_clip_file.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    else:
        if kind == "other shapes":
            state[name] = state[name][:, :-1].clone()
        elif kind == "missing keys":
            del state[name]
        elif kind == "surplus keys":
            state["extra.weight"] = torch.zeros(1)
        else:
            state = {}
        torch.save({"state_dict": state}, path)
    with pytest.raises(InputError, match=rf"^reward checkpoint .*wrong\.pt does not fit {_ARCHITECTURE}: "):
        OpenCLIPReward(path, architecture=_ARCHITECTURE)


# --- what the towers run ---------------------------------------------------------------------------------------------


class _Dispatched(TorchDispatchMode):
    """Records the operators run within the block, and what they were given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        self.calls.append((func._schema.name, args))
        return func(*args, **(kwargs or {}))

    def given(self, *names: str) -> list[tuple]:
        """What operators whose names start like this were given, in order."""
        return [args for name, args in self.calls if name.startswith(names)]


@pytest.fixture(scope="module", params=["clip", "open_clip"])
def make_reward(request: pytest.FixtureRequest, clip_shaped: Path, open_clip_file: Path) -> Callable[..., CosineReward]:
    """Makes either kind of reward, of one or two layers a tower, with the options given."""
    if request.param == "clip":
        return partial(CLIPReward, clip_shaped)
    return partial(OpenCLIPReward, open_clip_file, architecture=_ARCHITECTURE)


def _vision(reward: CosineReward) -> dict[str, Tensor]:
    named = reward.model.named_parameters()
    return {name: weight for name, weight in named if name.startswith("vis")}


def _trace(reward: CosineReward) -> tuple[_Dispatched, _Dispatched]:
    """A relative score's forward and backward."""
    images = _images(2).requires_grad_()
    reward.embed_prompts(_PROMPTS)
    with _Dispatched() as forward:
        scores = reward.relative(images, _PROMPTS[:2], _PROMPTS[1:], torch.tensor([0.1, 0.2]))
    with _Dispatched() as backward:
        scores.sum().backward()
    assert (images.grad.abs().flatten(1).amax(1) > 0).all()
    return forward, backward


def test_bf16_vision_tower_scores_near_the_fp32_one(make_reward: Callable) -> None:
    images, exact, low = _images(3), make_reward(), make_reward(dtype=torch.bfloat16)
    vision = _vision(low)
    assert len(vision) > 10
    assert {weight.dtype for weight in vision.values()} == {torch.bfloat16}
    others = (weight for name, weight in low.model.named_parameters() if name not in vision)
    assert {weight.dtype for weight in others} == {torch.float32}
    assert low.embed_images(images).dtype == torch.float32
    assert torch.equal(low.embed_prompts(_PROMPTS), exact.embed_prompts(_PROMPTS))
    scores = low.score(images, _PROMPTS)
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, exact.score(images, _PROMPTS))
    torch.testing.assert_close(scores, exact.score(images, _PROMPTS), rtol=0, atol=0.01)


def test_bf16_gradient_points_where_the_fp32_one_does(make_reward: Callable) -> None:
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        images = _images(2).requires_grad_()
        make_reward(dtype=dtype).score(images, _PROMPTS[:2]).sum().backward()
        gradients.append(images.grad.flatten())
    assert torch.cosine_similarity(*gradients, dim=0) > 0.999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_weight_is_cast_in_a_forward_pass(make_reward: Callable, dtype: torch.dtype) -> None:
    reward = make_reward(dtype=dtype)
    forward, backward = _trace(reward)
    weights = {weight.data_ptr() for weight in reward.model.parameters()}
    for args in (*forward.given("aten::_to_copy"), *backward.given("aten::_to_copy")):
        assert args[0].data_ptr() not in weights


def test_attention_is_fused_and_quick_gelu_one_kernel(make_reward: Callable) -> None:
    reward = make_reward(dtype=torch.bfloat16)
    forward, backward = _trace(reward)
    layers = len(reward.model.vision_model.encoder.layers) if isinstance(reward, CLIPReward) else 1
    for names in (
        ("aten::_scaled_dot_product_flash", "aten::_scaled_dot_product_efficient", "aten::_scaled_dot_product_cudnn"),
        ("srpo::quick_gelu",),
    ):
        assert len(forward.given(*names)) == len(backward.given(*names)) == layers
    for trace in (forward, backward):
        assert not trace.given("aten::_softmax", "aten::softmax", "aten::bmm", "aten::baddbmm", "aten::sigmoid")


def test_score_has_the_same_bits_without_gradients(make_reward: Callable) -> None:
    """What is recomputed for backward is what was scored."""
    reward, images = make_reward(dtype=torch.bfloat16), _images(2)
    with torch.no_grad(), _Dispatched() as trace:
        scores = reward.score(images, _PROMPTS[:2])
    assert torch.equal(scores, reward.score(images.requires_grad_(), _PROMPTS[:2]))
    assert not trace.given("aten::_native_multi_head_attention", "aten::_softmax", "aten::bmm")


def test_no_gradient_of_a_weight_is_computed(make_reward: Callable) -> None:
    reward = make_reward(dtype=torch.bfloat16)
    _, backward = _trace(reward)
    assert not any(weight.requires_grad for weight in reward.model.parameters())
    assert all(weight.grad is None for weight in reward.model.parameters())
    weights = {weight.untyped_storage().data_ptr() for weight in _vision(reward).values()}
    products = backward.given("aten::mm", "aten::addmm", "aten::bmm")
    assert len(products) >= 5 * (2 if isinstance(reward, CLIPReward) else 1)
    for args in products:  # of a gradient with a weight; a weight's own is of a gradient with an input
        assert any(isinstance(arg, Tensor) and arg.untyped_storage().data_ptr() in weights for arg in args)
    norms, convolutions = backward.given("aten::native_layer_norm_backward"), backward.given("aten::convolution_bac")
    assert len(norms) >= 4
    assert len(convolutions) == 1
    for args in (*norms, *convolutions):
        assert args[-1] == [True, False, False]


# --- text embeddings on disk -----------------------------------------------------------------------------------------


def test_text_cache_is_read_by_the_next_reward(make_reward: Callable, tmp_path: Path) -> None:
    plain = make_reward().embed_prompts(_PROMPTS)
    cache = tmp_path / "made" / "here"
    first = make_reward(text_cache=cache)
    assert torch.equal(first.embed_prompts(_PROMPTS), plain)
    files = sorted(cache.iterdir())
    assert len(files) == len(_PROMPTS)
    assert all(len(file.stem) == 64 and file.suffix == ".safetensors" for file in files)
    second = make_reward(text_cache=cache, dtype=torch.bfloat16, form="cfg", divisor=3.0)
    calls = _count_text_passes(second)
    assert torch.equal(second.embed_prompts(_PROMPTS), plain)
    assert calls == []
    assert sorted(cache.iterdir()) == files


def test_text_cache_is_the_tower_s_own(clip_shaped: Path, open_clip_file: Path, tmp_path: Path) -> None:
    """Another weight, another architecture and another tokenizer each have files of their own; a copy has the same."""
    cache, prompt = tmp_path / "cache", _PROMPTS[:1]
    CLIPReward(clip_shaped, text_cache=cache).embed_prompts(prompt)
    copies = [tmp_path / name for name in ("same", "weights", "architecture", "tokenizer")]
    for copy in copies:
        shutil.copytree(clip_shaped, copy)
    model = CLIPModel.from_pretrained(copies[1])
    model.text_projection.weight.data[0, 0] += 1
    model.save_pretrained(copies[1])
    config = json.loads((copies[2] / "config.json").read_text())
    config["text_config"]["hidden_act"] = "gelu"
    (copies[2] / "config.json").write_text(json.dumps(config))
    tokenizer = CLIPTokenizer.from_pretrained(copies[3])
    tokenizer.model_max_length = 12
    tokenizer.save_pretrained(copies[3])
    counts = []
    for copy in copies:
        expected = CLIPReward(copy).embed_prompts(prompt)
        assert torch.equal(CLIPReward(copy, text_cache=cache).embed_prompts(prompt), expected)
        counts.append(len(list(cache.iterdir())))
    assert counts == [1, 2, 3, 4]
    OpenCLIPReward(open_clip_file, architecture=_ARCHITECTURE, text_cache=cache).embed_prompts(prompt)
    assert len(list(cache.iterdir())) == 5


@pytest.mark.parametrize("damage", ["empty", "truncated", "garbage", "bit", "foreign", "other prompt", "directory"])
def test_unsound_cache_file_is_computed_again(damage: str, clip_shaped: Path, tmp_path: Path) -> None:
    plain = CLIPReward(clip_shaped, text_cache=tmp_path).embed_prompts(_PROMPTS[:1])
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    if damage == "empty":
        file.write_bytes(b"")
    elif damage == "truncated":
        file.write_bytes(content[:-1])
    elif damage == "garbage":
        file.write_bytes(b"garbage" * 40)
    elif damage == "bit":
        file.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    elif damage == "foreign":
        save_file({"embedding": torch.zeros_like(plain)}, file)
    elif damage == "other prompt":
        CLIPReward(clip_shaped, text_cache=tmp_path).embed_prompts(_PROMPTS[1:2])
        (other,) = set(tmp_path.iterdir()) - {file}
        other.replace(file)
    else:
        file.unlink()
        file.mkdir()
    expected = pytest.warns(UserWarning, match="cannot be written") if damage == "directory" else nullcontext()
    reward = CLIPReward(clip_shaped, text_cache=tmp_path)
    calls = _count_text_passes(reward)
    with expected:
        assert torch.equal(reward.embed_prompts(_PROMPTS[:1]), plain)
    assert len(calls) == 1
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    if damage != "directory":
        assert file.read_bytes() == content


def test_text_cache_that_cannot_be_made_is_refused(clip_shaped: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"^reward\.text_cache .*file cannot be made: "):
        CLIPReward(clip_shaped, text_cache=tmp_path / "file")


# --- from a recipe ---------------------------------------------------------------------------------------------------


def test_recipe_s_objective_sets_scale_and_form(clip_shaped: Path) -> None:
    config = RewardConfig(path=str(clip_shaped))
    pickscore = load_reward(config, SRPOConfig.preset("pickscore"), device="cpu", dtype=torch.float32)
    assert isinstance(pickscore, CLIPReward)
    assert (pickscore.form, pickscore.scale) == ("official", pytest.approx(math.exp(2.6592) / 20, rel=1e-5))
    for form, used in (("cfg", "cfg"), ("difference", "difference"), ("image_only", "official")):
        reward = load_reward(config, SRPOConfig(form=form), device="cpu", dtype=torch.bfloat16)
        assert (reward.form, reward.scale, reward.dtype) == (used, 1.0, torch.bfloat16)


def test_recipe_s_open_clip_reward(open_clip_file: Path, tmp_path: Path) -> None:
    config = RewardConfig(
        path=str(open_clip_file), type="open_clip", architecture=_ARCHITECTURE, text_cache=str(tmp_path)
    )
    reward = load_reward(config, SRPOConfig(), device="cpu", dtype=torch.float32)
    assert isinstance(reward, OpenCLIPReward)
    reward.embed_prompts(_PROMPTS)
    assert len(list(tmp_path.iterdir())) == len(_PROMPTS)
