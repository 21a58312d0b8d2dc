"""A text tower whose embeddings are all kept leaves the device, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch

from srpo.assets import resolve_asset
from srpo.rewards import CLIPReward, Reward
from srpo.rewards.cosine import OpenCLIPReward
from srpo.rewards.mixture import MixtureReward, Part

WORDS = ["digit seven", "bold. digit seven"]


def load(kind: str, directory: Path) -> Reward:
    if kind == "open_clip":
        model = open_clip.create_model("ViT-S-32-alt")
        torch.save(model.state_dict(), directory / "model.pt")
        return OpenCLIPReward(directory / "model.pt", architecture="ViT-S-32-alt", text_cache=directory / "texts")
    clip = CLIPReward(resolve_asset("tiny", "reward"), text_cache=directory / "texts")
    return clip if kind == "clip" else MixtureReward([Part("clip", clip, 0.5)])


@pytest.mark.parametrize("kind", ["clip", "open_clip", "mixture"])
def test_scores_of_known_texts_need_no_text_tower(kind: str, tmp_path: Path) -> None:
    """Where nothing can be computed, a tower computes nothing."""
    reward, images = load(kind, tmp_path), torch.rand(2, 3, 40, 40)
    before = reward.score(images, WORDS)
    reward.release_text_tower("meta")
    assert torch.equal(reward.score(images, WORDS), before)
    assert torch.equal(reward.relative(images, WORDS, WORDS[::-1], torch.zeros(2)) != 0, torch.ones(2) == 1)
    with pytest.raises((RuntimeError, NotImplementedError)):
        reward.score(images, ["never seen", "digit one"])


def test_released_tower_embeds_new_texts_where_it_is(tmp_path: Path) -> None:
    kept, released = load("clip", tmp_path / "a"), load("clip", tmp_path / "b")
    released.release_text_tower("cpu")
    images = torch.rand(2, 3, 40, 40)
    assert torch.equal(released.score(images, WORDS), kept.score(images, WORDS))
