"""HPSv3 against transformers' own Qwen2-VL: its processor and whole model, and a head written out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from reward_helpers import photographs, slope_error, tensor
from safetensors.torch import save_file
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from torch.nn.functional import relu
from transformers import Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl import modeling_qwen2_vl
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from srpo.errors import InputError
from srpo.objective import SRPOConfig
from srpo.rewards import HPSv3Reward, RewardConfig, hpsv3, load_reward
from srpo.rewards.hpsv3 import PIXELS, head
from srpo.rewards.hpsv3_prompt import question
from srpo.rewards.preprocess import CLIP_MEAN, CLIP_STD, stretch

_PROMPTS = ["Realistic photo of a cat, { braces }", "CG render of a cat"]
#: Qwen2-VL's, for one message of an image and a text.
_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}<|vision_start|><|image_pad|>"
    "<|vision_end|>{% else %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
#: Heads as wide as Qwen2-VL's, 128 and 80.
_TEXT = dict(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24]),
    bos_token_id=None,
    eos_token_id=None,
)
_VISION = dict(depth=2, embed_dim=160, num_heads=2, hidden_size=256)


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory like Qwen2-VL-7B-Instruct's, without weights."""
    path = tmp_path_factory.mktemp("qwen")
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([question("a photo of a cat")] * 2, vocab_size=600, show_progress=False)
    trained.save_model(str(path))
    tokenizer = Qwen2Tokenizer.from_pretrained(path, additional_special_tokens=_SPECIAL)
    tokenizer.save_pretrained(path)
    image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    # As published: more rows for tokens than there are tokens.
    text = dict(_TEXT, vocab_size=1024)
    Qwen2VLConfig(text_config=text, vision_config=_VISION, image_token_id=image).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(processor: Path) -> Any:
    """As the published scorer extends it."""
    tokenizer = Qwen2Tokenizer.from_pretrained(processor)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    return tokenizer


@pytest.fixture(scope="module")
def whole(processor: Path, tokenizer: Any) -> Any:
    """transformers' model, in float64: what differs from it is ours."""
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig.from_pretrained(processor))
    model.resize_token_embeddings(len(tokenizer))
    for name, weight in model.named_parameters():  # as drawn, attention hardly looks at anything
        weight.data.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.1)
    return model.double().requires_grad_(False).eval()


@pytest.fixture(scope="module")
def mlp() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    state = {}
    for place, out, size in ((0, 1024, 256), (3, 16, 1024), (5, 2, 16)):
        state[f"rm_head.{place}.weight"] = torch.randn(out, size, generator=generator) / size**0.5
        state[f"rm_head.{place}.bias"] = torch.randn(out, generator=generator) / 10
    return state


@pytest.fixture(scope="module")
def state(whole: Any, mlp: dict[str, Tensor]) -> dict[str, Tensor]:
    """As in ``HPSv3.safetensors``, under the names of the transformers that wrote it."""
    renamed = {}
    for name, value in whole.state_dict().items():
        old = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        renamed[old] = value.float().clone()
    return {**renamed, **mlp}


@pytest.fixture(scope="module")
def file(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hpsv3") / "HPSv3.safetensors"
    save_file(state, path)
    return path


@pytest.fixture(scope="module")
def exact(file: Path, processor: Path) -> HPSv3Reward:
    return HPSv3Reward(file, processor, dtype=torch.float64)


@pytest.fixture(scope="module")
def published(whole: Any, mlp: dict[str, Tensor], tokenizer: Any) -> Callable[[Image.Image, str], Tensor]:
    """The score of a picture and a prompt as MizzenAI/HPSv3 computes it: mean and deviation at the special token."""
    images = Qwen2VLImageProcessorPil(min_pixels=PIXELS, max_pixels=PIXELS)
    reward = tokenizer.convert_tokens_to_ids("<|Reward|>")
    layers = [(mlp[f"rm_head.{at}.weight"].double(), mlp[f"rm_head.{at}.bias"].double()) for at in (0, 3, 5)]

    def score(picture: Image.Image, prompt: str) -> Tensor:
        asked = question(prompt).partition("<|vision_end|>")[2] + "\n\nEND\n"
        content = [{"type": "image"}, {"type": "text", "text": asked}]
        messages = [{"role": "user", "content": content}]
        text = tokenizer.apply_chat_template(
            messages, chat_template=_TEMPLATE, tokenize=False, add_generation_prompt=True
        )
        seen = images(picture, return_tensors="pt")
        tokens = int(seen["image_grid_thw"].prod()) // 4
        ids = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * tokens), return_tensors="pt")["input_ids"]
        kinds = (ids == whole.config.image_token_id).int()
        made = whole(input_ids=ids, mm_token_type_ids=kinds, output_hidden_states=True, **seen)
        x = made.hidden_states[-1][ids == reward]
        for number, (weight, bias) in enumerate(layers):
            x = (relu(x) if number else x) @ weight.T + bias
        return x[0]

    return score


@torch.no_grad()
def test_scores_are_the_published_pipeline_s(exact: HPSv3Reward, published: Any) -> None:
    """Where nothing is resized they agree to the last bits."""
    square = photographs()[0].crop((0, 0, 448, 448))
    wide = photographs()[1].resize((896, 224))
    for picture, prompt in ((square, _PROMPTS[0]), (square, _PROMPTS[1]), (wide, "cat " * 60)):
        expected = published(picture, prompt)[0].item()
        assert exact.score(tensor(picture), [prompt]).item() == pytest.approx(expected, rel=1e-9)
    told = exact.score(tensor(square).repeat(2, 1, 1, 1), _PROMPTS)
    assert told.diff().abs() > 1e-2, "prompts are told apart"


def test_photographs_are_resized_as_by_pil(exact: HPSv3Reward, published: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixels differ by PIL's rounding, and scores by what noise of that size does to them: 4 of its deviations."""
    scores, budgets = [], []
    for picture in photographs()[1:4]:
        ours = exact.preprocess(tensor(picture).double()).requires_grad_()
        width, height = ours.shape[3], ours.shape[2]
        by_pil = tensor(picture.resize((width, height), Image.Resampling.BICUBIC)).double()
        noise = stretch(by_pil, (height, width), CLIP_MEAN, CLIP_STD) - ours.detach()
        steps = 255 * noise * torch.tensor(CLIP_STD)[:, None, None]
        assert steps.abs().mean() < 0.5, "on average less than one rounding to 8 bits can do"
        with monkeypatch.context() as patched:
            patched.setattr(exact, "preprocess", lambda _images, ours=ours: ours)
            score = exact.score(tensor(picture), _PROMPTS[:1])
        (slope,) = torch.autograd.grad(score.sum(), ours)
        budgets.append(4 * (slope.norm() * noise.square().mean().sqrt()).item())
        with torch.no_grad():
            scores.append(published(picture, _PROMPTS[0])[0].item())
        assert abs(score.item() - scores[-1]) <= budgets[-1]
    told = min(abs(a - b) for a, b in combinations(scores, 2))
    assert told > 3 * max(budgets), "photographs are told apart"


@pytest.fixture
def no_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers rounds to fp32 within norms and rotations, of any dtype: with this they stay in float64. On images
    of 16 tokens, for speed."""
    monkeypatch.setattr(hpsv3, "PIXELS", 16 * 28 * 28)
    monkeypatch.setattr(modeling_qwen2_vl.torch, "float32", torch.float64)
    monkeypatch.setattr(Tensor, "float", Tensor.double)


@torch.no_grad()
@pytest.mark.usefixtures("no_fp32")
@pytest.mark.parametrize(
    ("form", "negative"),
    [
        ("official", [_PROMPTS[1], "a cat and a dog"]),
        ("difference", ["", "a cat"]),  # one prompt begins with the other, or is the same
        ("cfg", ["CG", "another cat " * 9]),
    ],
)
def test_relative_scores_come_from_one_pass(
    exact: HPSv3Reward, form: str, negative: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.rand(2, 3, 56, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kappa = torch.tensor([0.1, 0.7], dtype=torch.float64)
    positive = [_PROMPTS[0], "a cat"]
    p, n = exact.score(images, positive), exact.score(images, negative)
    expected = {"official": (1 + kappa) * p - n, "difference": p - n, "cfg": kappa * p + (1 - kappa) * n}[form]
    monkeypatch.setattr(exact, "form", form)
    passes = []
    with exact.model.language_model.register_forward_hook(lambda *_: passes.append(1)):
        found = exact.relative(images, positive, negative, kappa)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert len(passes) == 1
    assert all(abs(v) <= exact.limit(k) for v, k in zip(expected.tolist(), kappa.tolist(), strict=True))


@torch.no_grad()
@pytest.mark.usefixtures("no_fp32")
def test_images_and_prompts_do_not_depend_on_their_batch(exact: HPSv3Reward) -> None:
    images = torch.rand(2, 3, 40, 56, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    prompts = [_PROMPTS[0] + " and a dog" * 9, _PROMPTS[0]]
    together = exact.score(images, prompts)
    alone = [exact.score(image[None], [prompt]).item() for image, prompt in zip(images, prompts, strict=True)]
    assert together.tolist() == pytest.approx(alone, rel=0, abs=1e-12)
    assert abs(alone[0] - exact.score(images[:1], prompts[1:]).item()) > 1e-3


@torch.no_grad()
def test_limit_is_reached_by_a_head_of_one_path(exact: HPSv3Reward, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = head(256).double().eval()
    for layer in (chain[0], chain[3], chain[5]):
        layer.weight[1:], layer.weight[0, 1:], layer.bias[:] = 0, 0, 0
    chain[0].weight[0] = torch.linspace(-1, 1, 256)
    chain[3].weight[0, 0], chain[5].weight[0, 0], chain[5].bias[0] = 2, 3, 0.25
    monkeypatch.setattr(exact, "head", chain)
    norm = exact.model.language_model.norm
    best = chain(norm((chain[0].weight * norm.weight)[:1] * 1e6))[0, 0].item()
    monkeypatch.setattr(exact, "form", "official")
    assert (best - 0.25) * 2.3 + 0.3 * 0.25 == pytest.approx(exact.limit(0.3), rel=1e-6)


@pytest.mark.usefixtures("no_fp32")
def test_gradient_is_the_slope_of_the_score(exact: HPSv3Reward) -> None:
    image = tensor(photographs()[4].resize((60, 60)))
    kappa = torch.tensor([0.5], dtype=torch.float64)
    assert slope_error(lambda x: exact.relative(x, _PROMPTS[:1], _PROMPTS[1:], kappa), image) < 1e-5


@torch.no_grad()
def test_bf16_from_a_recipe_is_near_and_frozen(
    exact: HPSv3Reward, state: dict[str, Tensor], processor: Path, tmp_path: Path
) -> None:
    """From a file with the names of newer transformers, in the run's precision, its divisor and its form."""
    newer = {
        name.replace("visual.", "model.visual.", 1)
        if name.startswith("visual.")
        else name.replace("model.", "model.language_model.", 1): value
        for name, value in state.items()
    }
    save_file(newer, tmp_path / "HPSv3.safetensors")
    config = RewardConfig(type="hpsv3", path=str(tmp_path / "HPSv3.safetensors"), processor=str(processor))
    low = load_reward(config, SRPOConfig(reward_divisor=2.0), device="cpu", dtype=torch.bfloat16)
    assert isinstance(low, HPSv3Reward)
    assert [path.name for path in low.files] == ["HPSv3.safetensors"]
    assert low.embed_prompts(_PROMPTS) is None
    image = tensor(photographs()[0].crop((0, 0, 448, 448)))
    expected = [exact.score(image, [prompt]).item() for prompt in _PROMPTS]
    again = low.score(image.repeat(2, 1, 1, 1), _PROMPTS)
    assert again.dtype == torch.float32
    assert (2 * again).tolist() == pytest.approx(expected, abs=0.02 * exact.limit(0.0))
    assert low.limit(0.2) == pytest.approx(exact.limit(0.2) / 2, rel=0.02)
    parts = [*low.model.parameters(), *low.head.parameters()]
    assert not any(weight.requires_grad for weight in parts)
    assert {weight.dtype for weight in low.model.parameters()} == {torch.bfloat16}
    assert all(buffer.dtype == torch.float32 for buffer in low.model.buffers()), "angles are not rounded to bf16"


def test_what_does_not_fit_is_refused_by_name(
    exact: HPSv3Reward, state: dict[str, Tensor], file: Path, processor: Path, tmp_path: Path
) -> None:
    def refuse(changed: dict[str, Tensor], match: str) -> None:
        save_file(changed, tmp_path / "changed.safetensors")
        with pytest.raises(InputError, match=match):
            HPSv3Reward(tmp_path / "changed.safetensors", processor)

    key = "language_model.layers.1.mlp.up_proj.weight"
    lost = {name: value for name, value in state.items() if not name.endswith("layers.1.mlp.up_proj.weight")}
    refuse(lost, rf"^reward checkpoint .*changed\.safetensors does not fit: missing {key}$")
    refuse({**state, "extra": torch.zeros(1)}, r"does not fit: unexpected extra$")
    refuse({**state, "visual.merger.mlp.2.bias": torch.zeros(5)}, r"merger\.mlp\.2\.bias is \[5\] instead of \[256\]$")
    refuse({**state, "rm_head.5.bias": torch.zeros(1)}, r"rm_head does not fit: 5\.bias is \[1\] instead of \[2\]$")
    rows = state["model.embed_tokens.weight"]
    refuse(
        {**state, "model.embed_tokens.weight": torch.cat([rows, rows[:1]])},
        rf"has {len(rows)} tokens; .* {len(rows) + 1}$",
    )
    with pytest.raises(InputError, match=r"^reward\.processor .* is incomplete: config\.json of Qwen2-VL is missing$"):
        HPSv3Reward(file, tmp_path)
    (tmp_path / "config.json").write_text((processor / "config.json").read_text())
    with pytest.raises(InputError, match=r"^reward\.processor .* holds no tokenizer: tokenizer\.json is missing$"):
        HPSv3Reward(file, tmp_path)
    with pytest.raises(InputError, match=r"must not hold <\|Reward\|>: 'a <\|Reward\|>'$"):
        exact.embed_prompts(["a <|Reward|>"])
    with pytest.raises(InputError, match=r"^an image of 900 x 4 px cannot be scored: absolute aspect ratio"):
        exact.score(torch.zeros(1, 3, 4, 900), ["a cat"])


def test_liger_kernel_changes_this_model_only(exact: HPSv3Reward, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is installed; here stands one that does as it does: rebinds classes and marks the model."""
    given: dict[str, Any] = {}

    def apply(**options: Any) -> None:
        given.update(options)
        modeling_qwen2_vl.Qwen2VLRMSNorm = nn.Identity

    fake = ModuleType("liger_kernel.transformers")
    fake.apply_liger_kernel_to_qwen2_vl = apply  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", fake)
    before = modeling_qwen2_vl.Qwen2VLRMSNorm
    hpsv3._apply_liger(exact.model)
    assert modeling_qwen2_vl.Qwen2VLRMSNorm is before
    assert given == {"rope": False, "fused_linear_cross_entropy": False, "model": exact.model}
