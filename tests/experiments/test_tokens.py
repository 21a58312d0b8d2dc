"""Control words learnt from images: what is learnt, what stays, what is concluded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from srpo.assets import resolve_asset
from srpo.errors import InputError
from srpo.experiments.experiment import Row, Setting, run
from srpo.experiments.tokens import ARMS, KNOWN, LEARNT, LETTERS, RARE, WORDS, Tokens
from srpo.experiments.words import Examples, learn_words, separated
from srpo.rewards import CLIPReward


def test_words_are_learnt_and_nothing_else_changes() -> None:
    reward, untouched = (CLIPReward(resolve_asset("tiny", "reward")) for _ in range(2))
    held_out, few = Examples.of_digits(None), Examples.of_digits(20, seed=1)
    assert set(few.wanted.tolist()) == {True, False}
    assert not torch.equal(few.images, Examples.of_digits(20, seed=2).images)
    assert separated(reward, KNOWN, held_out) == 1.0
    assert separated(reward, RARE, held_out) < 0.5
    learn_words(reward, RARE, few)
    assert separated(reward, RARE, held_out) > 0.9
    prompts = ["digit seven", "bold. digit seven", "thin. slanted digit two"]
    assert torch.equal(reward.embed_prompts(prompts), untouched.embed_prompts(prompts))
    changed = [
        name
        for (name, now), before in zip(reward.model.named_parameters(), untouched.model.parameters(), strict=True)
        if not torch.equal(now, before)
    ]
    assert changed == ["text_model.embeddings.token_embedding.weight"]
    assert not any(parameter.requires_grad for parameter in reward.model.parameters())


def rows_with(rare: float, learnt: float) -> list[Row]:
    """Known words move by 2 SD, nearly alike in both seeds."""
    moved = {WORDS: 2.0, LETTERS: rare, **dict.fromkeys(LEARNT, learnt)}
    rows: list[Row] = [{"arm": f"{arm}, examined", "seed": seed, "separated": 1.0} for arm in ARMS for seed in (0, 1)]
    end = {"update": 8, "kept": 0.9, "diverse": 1.0}
    return rows + [
        {"arm": arm, "seed": seed, "moved": moved[arm] + 0.01 * seed, **end} for arm in ARMS for seed in (0, 1)
    ]


def test_conclusions_compare_with_known_words() -> None:
    for rare, agrees in ((0.1, True), (2.0, False)):
        found = Tokens().conclusions(rows_with(rare, 1.0))
        assert [one.agrees for one in found] == [agrees, None, None]
        assert "tell 100 ± 0 % of held-out digits apart" in found[1].text
        assert "50 ± 2 % of what known words do" in found[1].text
    header, lines = Tokens().table(rows_with(0.1, 1.0))
    assert header[:3] == ["", "held-out digits told apart", "moved (SD)"]
    assert lines[0][:2] == [WORDS, "1.00 ± 0.00"]


def test_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="experiment tokens needs the tiny world"):
        run(Tokens(), Setting("flux-dev-hps", (), 2, True), tmp_path / "out")
