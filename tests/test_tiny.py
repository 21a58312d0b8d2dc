"""The tiny world: its data, its judge, its shipped models and its build."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

import srpo.tiny
from srpo.tiny.build import Steps, build, sample
from srpo.tiny.digits import (
    HOLES,
    NAMES,
    Digits,
    attribute_words,
    caption,
    export_images,
    ink,
    load,
    random_caption,
    tint,
    topology,
)
from srpo.tiny.judge import Judge
from srpo.tiny.words import WORDS

ASSETS = Path(srpo.tiny.__file__).parent / "assets"


@pytest.fixture(scope="module")
def data() -> Digits:
    return load(copies=2)


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load()


@pytest.fixture(scope="module")
def pipeline() -> FluxPipeline:
    return FluxPipeline.from_pretrained(ASSETS / "pipeline")


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two shortened builds with the same seed."""
    root, messages = tmp_path_factory.mktemp("build"), list[str]()
    for name in ("one", "two"):
        build(root / name, seed=3, steps=Steps(vae=15, clip=60, flow=30), progress=messages.append)
    assert len(messages) >= 6, "each training reports its end"
    return root / "one", root / "two"


def shear(images: Tensor, amount: float) -> Tensor:
    """Move the top of white-paper `images` to the right by `amount` of their height."""
    matrix = torch.tensor([[1.0, amount, 0.0], [0.0, 1.0, 0.0]]).expand(len(images), 2, 3)
    return 1 - F.grid_sample(1 - images, F.affine_grid(matrix, list(images.shape), align_corners=False))


def well_formed(images: Tensor, labels: Tensor) -> float:
    """The share of `images` whose ink is in one piece and has as many holes as the digit should."""
    written = (F.interpolate(ink(images)[:, None], scale_factor=2, mode="bicubic")[:, 0] > 0.5).numpy()
    return float(np.mean([topology(x) == (1, HOLES[c]) for x, c in zip(written, labels.tolist(), strict=True)]))


def scores(reward: Path, images: Tensor, prompts: list[str]) -> Tensor:
    """Cosine similarity [images, prompts] by the CLIP reward in `reward`."""
    clip, tokenizer = CLIPModel.from_pretrained(reward), AutoTokenizer.from_pretrained(reward)
    processor = CLIPImageProcessor.from_pretrained(reward)
    ids = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    pixels = processor(images, do_rescale=False, return_tensors="pt").pixel_values
    with torch.no_grad():
        text = F.normalize(clip.get_text_features(input_ids=ids).pooler_output, dim=-1)
        return F.normalize(clip.get_image_features(pixel_values=pixels).pooler_output, dim=-1) @ text.T


def test_ink_does_not_depend_on_colour(data: Digits) -> None:
    coverage = ink(data.images[:50])
    for colour in (-1.0, -0.3, 0.0, 0.5, 1.0):
        assert torch.allclose(ink(tint(coverage, torch.full((50,), colour))), coverage, atol=1e-5)


def test_digits_are_legible(data: Digits) -> None:
    assert well_formed(data.images, data.labels) > 0.98
    assert well_formed(data.held_out_images, data.held_out_labels) > 0.98
    assert data.labels.tolist() == [*range(10)] * (len(data.labels) // 10)


def test_measurements_follow_known_changes(data: Digits) -> None:
    images, labels = data.images[:200], data.labels[:200]
    z = data.stats.z_scores(images, labels)
    bolder = data.stats.z_scores(tint(F.max_pool2d(ink(images)[:, None], 3, 1, 1)[:, 0], torch.zeros(200)), labels)
    assert ((bolder["stroke"] - z["stroke"]) > 0.5).float().mean() > 0.98
    sheared = data.stats.z_scores(shear(images, 0.2), labels)
    assert ((sheared["slant"] - z["slant"]) > 1).float().mean() > 0.95
    for colour, sign in ((1.0, 1), (-1.0, -1)):
        tinted = data.stats.z_scores(tint(ink(images), torch.full((200,), colour)), labels)
        assert (sign * tinted["colour"] > 1.5).all()
        assert torch.allclose(tinted["stroke"], z["stroke"], atol=1e-3)


def test_captions_say_what_is_true(data: Digits) -> None:
    z = data.stats.z_scores(data.images, data.labels)
    words, rng = attribute_words(z), np.random.default_rng(0)
    texts = [
        random_caption(label, true, rng, plain=0.5) for label, true in zip(data.labels.tolist(), words, strict=True)
    ]
    bold = torch.tensor(["bold" in text for text in texts])
    assert 0.05 < bold.float().mean() < 0.3
    assert (z["stroke"][bold] > 0).all()
    assert 0.5 < np.mean([text.split()[0] == "digit" for text in texts]) < 0.8
    assert any(text.split()[0] == "bold." for text in texts)
    assert all(text.endswith(f"digit {NAMES[label]}") for text, label in zip(texts, data.labels.tolist(), strict=True))


def test_exported_images_are_an_image_folder(tmp_path: Path) -> None:
    export_images(tmp_path / "digits", 12, seed=1)
    lines = [json.loads(line) for line in (tmp_path / "digits/metadata.jsonl").read_text().splitlines()]
    assert len(lines) == 12
    assert all(line["text"] in {caption(i) for i in range(10)} for line in lines)
    pixels = np.asarray(Image.open(tmp_path / "digits" / lines[3]["file_name"]))
    expected = load(seed=1, copies=1).images[3].permute(1, 2, 0) * 255
    assert pixels.shape == (32, 32, 3)
    assert np.abs(pixels - expected.numpy()).max() <= 0.51
    with pytest.raises(ValueError, match="count"):
        export_images(tmp_path / "more", 0, seed=1)


def test_judge_recognises_held_out_digits(judge: Judge, data: Digits) -> None:
    report = judge.measure(data.held_out_images, data.held_out_labels)
    assert report["accuracy"] >= 0.98
    assert abs(report["stroke"]) < 0.2
    assert abs(report["colour"]) < 0.2
    assert abs(report["slant"]) < 0.2
    assert judge.measure(data.held_out_images, data.held_out_labels.roll(1))["accuracy"] < 0.3
    repeated = data.held_out_images[:10].repeat(5, 1, 1, 1), data.held_out_labels[:10].repeat(5)
    assert judge.measure(*repeated)["diversity"] < 0.8 * report["diversity"]
    with pytest.raises(ValueError, match="labels"):
        judge.measure(data.held_out_images, data.held_out_labels[:-1])


def test_assets_are_small() -> None:
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= 12e6
    assert (ASSETS / "prompts.txt").read_text().splitlines() == [caption(i) for i in range(10)]


def test_every_word_is_one_token_and_other_text_is_accepted(pipeline: FluxPipeline) -> None:
    for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2, AutoTokenizer.from_pretrained(ASSETS / "reward")):
        for word in WORDS:
            assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1, word
        assert len(tokenizer("Größe 漢字, {x}!", add_special_tokens=False).input_ids) > 3
        assert tokenizer.model_max_length == 16


def test_base_samples_look_like_the_digits(pipeline: FluxPipeline, judge: Judge, data: Digits) -> None:
    images, labels = sample(pipeline, 300)
    report = judge.measure(images, labels)
    real = judge.measure(data.images[:1000], data.labels[:1000])
    assert report["accuracy"] >= 0.97
    assert well_formed(images, labels) > 0.93
    assert abs(report["stroke"]) < 0.4
    assert abs(report["colour"]) < 0.4
    assert abs(report["slant"]) < 0.4
    assert report["diversity"] > 0.8 * real["diversity"]
    spread = data.stats.z_scores(images, labels)
    assert 0.6 < spread["stroke"].std() < 1.4
    assert 0.6 < spread["colour"].std() < 1.4
    assert (images[:, :, 0] > 0.95).float().mean() > 0.95  # white paper


def test_prompted_attributes_appear(pipeline: FluxPipeline, judge: Judge) -> None:
    noise = torch.randn(20, 16, 16, generator=torch.Generator().manual_seed(1))

    def mean(word: str, attribute: str) -> float:
        prompts = [caption(i % 10, [word + "."]) for i in range(20)]
        images = pipeline(
            prompts,
            height=32,
            width=32,
            latents=noise,
            num_inference_steps=10,
            max_sequence_length=16,
            output_type="pt",
        ).images
        return judge.measure(images, torch.arange(20) % 10)[attribute]

    assert mean("bold", "stroke") > mean("thin", "stroke") + 1
    assert mean("red", "colour") > mean("blue", "colour") + 1


def test_reward_ranks_real_images(data: Digits) -> None:
    images, labels = data.held_out_images, data.held_out_labels
    digits = scores(ASSETS / "reward", images, [caption(i) for i in range(10)])
    assert (digits.argmax(1) == labels).float().mean() > 0.85
    z = data.stats.z_scores(images, labels)
    rows = torch.arange(len(labels))
    for high, low, key in (("bold", "thin", "stroke"), ("red", "blue", "colour")):
        table = scores(ASSETS / "reward", images, [caption(i, [f"{word}."]) for word in (high, low) for i in range(10)])
        difference = table[rows, labels] - table[rows, labels + 10]
        assert np.corrcoef(difference, z[key])[0, 1] > 0.8


def test_build_is_reproducible(rebuilt: tuple[Path, Path]) -> None:
    one, two = rebuilt
    names = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    shipped = (path.relative_to(ASSETS) for path in ASSETS.rglob("*") if path.is_file())
    assert names == sorted(name for name in shipped if name.parts[0] != "epsilon")  # which has a build of its own
    assert sum(name.suffix == ".safetensors" for name in names) == 5
    for name in names:
        if name.name != "build.json":
            assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_short_build_learns(rebuilt: tuple[Path, Path], data: Digits) -> None:
    losses = json.loads((rebuilt[0] / "build.json").read_text())["losses"]
    assert losses["vae"]["last"] < 0.5 * losses["vae"]["first"]
    assert losses["flow"]["last"] < 0.7 * losses["flow"]["first"]
    rows = torch.arange(len(data.held_out_labels))
    prompts = [caption(i, [f"{word}."]) for word in ("red", "blue") for i in range(10)]
    table = scores(rebuilt[0] / "reward", data.held_out_images, prompts)
    red = data.stats.z_scores(data.held_out_images, data.held_out_labels)["colour"] > 0
    labels = data.held_out_labels
    assert ((table[rows, labels] > table[rows, labels + 10]) == red).float().mean() > 0.65  # chance is 0.5


def test_build_leaves_the_callers_torch_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state(), torch.get_num_threads()
    with pytest.raises(RuntimeError, match="stop"):
        build(tmp_path / "out", steps=Steps().scaled(1e-6), progress=_stop)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.get_num_threads() == before[1]
    assert not list(tmp_path.iterdir())


def _stop(message: str) -> None:
    raise RuntimeError(f"stop at {message}")


def test_steps_are_scaled() -> None:
    assert Steps(vae=400, clip=500, flow=3600).scaled(0.05) == Steps(vae=20, clip=25, flow=180)
    assert Steps(vae=4, clip=5, flow=36).scaled(0.05) == Steps(vae=1, clip=1, flow=2)


def test_build_refuses_bad_arguments(tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(ValueError, match="already exists"):
        build(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
    for factor in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="factor"):
            Steps().scaled(factor)
