"""Preprocessing against torchvision, and rewards of every kind in training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import quick_config
from reward_helpers import head, save
from torchvision.transforms import v2
from transformers import CLIPModel

from srpo.assets import TINY, resolve_asset
from srpo.config import TrainConfig
from srpo.errors import InputError
from srpo.rewards import CLIPReward, SiglipAestheticReward
from srpo.rewards.aesthetic import LAION_LAYERS
from srpo.rewards.preprocess import CLIP_MEAN, CLIP_STD, prepare
from srpo.trainer import Trainer

_SIZES = [(32, 32), (40, 57), (70, 33), (20, 24), (200, 90)]


@pytest.mark.parametrize("size", _SIZES, ids=str)
@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_preprocessing_equals_torchvision(size: tuple[int, int], squash: bool, interpolation: str) -> None:
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    edges = (32, 32) if squash else 32
    resize = v2.Resize(edges, interpolation=v2.InterpolationMode(interpolation), antialias=True)
    chain = v2.Compose([resize, v2.CenterCrop(32), v2.Normalize(list(CLIP_MEAN), list(CLIP_STD))])
    ours, theirs = (images.clone().requires_grad_() for _ in range(2))
    got = prepare(ours, 32, CLIP_MEAN, CLIP_STD, squash=squash, interpolation=interpolation)
    expected = chain(theirs)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    weights = torch.linspace(-1, 1, got.numel()).reshape(got.shape)
    (got * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize("squash", [False, True])
def test_clamp_is_the_same_whatever_the_resize(squash: bool) -> None:
    """Outside the range nothing, on its bounds and inside everything."""
    images = torch.tensor([-0.1, 0.0, 0.5, 1.0, 1.1]).repeat(3, 5, 1)[None].requires_grad_()
    prepare(images, 5, (0.0,) * 3, (0.5,) * 3, squash=squash).sum().backward()
    assert torch.equal(images.grad[0, :, 0], torch.tensor([0.0, 2.0, 2.0, 2.0, 0.0]).repeat(3, 1))


def _config(tmp_path: Path, parts: list, *overrides: str) -> TrainConfig:
    changes = ("reward.path=''", "reward.type=mixture", f"reward.parts={json.dumps(parts)}", "srpo.updates=1")
    return quick_config(tmp_path / "run", *changes, "run.device=cpu", *overrides)


@pytest.fixture
def parts(tmp_path: Path) -> list:
    """The tiny reward, and an aesthetic predictor on its image tower."""
    tower = str(resolve_asset(TINY, "reward"))
    width = CLIPModel.from_pretrained(tower).config.projection_dim
    file = save(tmp_path / "head.pth", head(LAION_LAYERS, width))
    return [{"path": TINY, "weight": 3.0}, {"type": "aesthetic", "path": tower, "head": str(file), "weight": 0.1}]


def test_run_learns_from_a_mixture_with_a_part_that_reads_no_prompt(parts: list, tmp_path: Path) -> None:
    config = _config(tmp_path, parts, "srpo.form=image_only", "srpo.threshold=null")
    assert Trainer(config).fit() == 1
    update = next(row for row in map(json.loads, _log(tmp_path)) if "losses" in row)
    assert update["grad_norm"] > 0
    with pytest.raises(InputError, match=r"reward\.parts\[1\] of type aesthetic reads no prompt"):
        _config(tmp_path, parts)


def test_threshold_beyond_a_mixture_is_refused(parts: list, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"srpo\.threshold 50.* has no meaning for this reward"):
        Trainer(_config(tmp_path, parts, "srpo.form=image_only", "srpo.threshold=50"))


def _log(tmp_path: Path) -> list[str]:
    (file,) = (tmp_path / "run").glob("*.jsonl")
    return file.read_text().splitlines()


def test_directory_of_another_model_is_refused(clip_shaped: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"^reward directory .* does not fit SiglipVisionModel: missing weights embeddings\.patch"
    ):
        SiglipAestheticReward(clip_shaped, tmp_path / "head.pth")
    copy = tmp_path / "copy"
    shutil.copytree(clip_shaped, copy)
    config = json.loads((copy / "config.json").read_text())
    config["projection_dim"] = 24
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        InputError, match=r"mismatched weights .*visual_projection\.weight \[16, 32\] instead of \[24, 32\]"
    ):
        CLIPReward(copy)
