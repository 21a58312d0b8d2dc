"""Experiment grpo: its reward without a gradient, and what it concludes from rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from srpo.experiments.arms import trained
from srpo.experiments.experiment import Row, Setting
from srpo.experiments.grpo import GRPO, RELATIVE, SINGLE, STEP, TASTED, Rounded, _arms
from srpo.rewards import Reward


class Red(Reward):
    """A prompt's length times the red in an image."""

    def relative(self, images: Tensor, positive: list[str], negative: list[str], kappa: Tensor) -> Tensor:
        raise AssertionError(f"a rating is asked for one prompt at a time: {images, positive, negative, kappa}")

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return images[:, 0].mean((1, 2)) * torch.tensor([float(len(prompt)) for prompt in prompts])

    def limit(self, kappa: float) -> float:
        return 3 * (2 + kappa)


def test_rounded_scores_have_steps_and_no_gradient() -> None:
    images = torch.full((2, 3, 2, 2), 0.1234, requires_grad=True)
    reward = Rounded(Red())
    found = reward.score(images, ["a", "abc"])
    assert found.tolist() == pytest.approx([0.12, 0.37])
    relative = reward.relative(images, ["abc", "a"], ["a", "abc"], torch.tensor([0.1, 0.5]))
    assert relative.tolist() == pytest.approx([1.1 * 0.37 - 0.12, 1.5 * 0.12 - 0.37])
    assert not found.requires_grad
    assert not relative.requires_grad


def rows_with(drifts: dict[str, float]) -> list[Row]:
    """Two seeds that move by 2, by 1 where scores are relative."""
    return [
        {
            "arm": arm,
            "seed": seed,
            "update": update,
            "slant": 0.5 + (drift + 0.01 * seed) * (update > 0),
            "moved": float(update > 0) * (1 if arm in (RELATIVE, TASTED[RELATIVE]) else 2),
            "kept": 1.0 if update == 0 or arm.startswith(RELATIVE) else 0.8,
            "diverse": 0.9,
        }
        for arm, drift in drifts.items()
        for seed in range(2)
        for update in (0, 4)
    ]


def test_conclusions_have_what_the_taste_adds() -> None:
    rows = rows_with({SINGLE: 0.1, RELATIVE: 0.2, TASTED[SINGLE]: 0.7, TASTED[RELATIVE]: 0.3})
    single, relative, compared = GRPO().conclusions(rows)
    assert {one.agrees for one in (single, relative, compared)} == {None}
    assert "2.00 ± 0.00 with one that pulls it by 0.60 ± 0.00 along slant (0.30 ± 0.00 per moved)" in single.text
    assert "kept 0.80 ± 0.00" in single.text
    assert "pulls it by 0.10 ± 0.00 along slant (0.10 ± 0.00 per moved)" in relative.text
    assert "moved -1.00 ± 0.00, kept 0.20 ± 0.00, pulled -0.50 ± 0.00 (-0.20 ± 0.00 per moved)" in compared.text
    header, lines = GRPO().table(rows)
    assert header[-1] == "drift"
    assert [line[0] for line in lines] == [SINGLE, RELATIVE, TASTED[SINGLE], TASTED[RELATIVE]]
    assert lines[2][-1].startswith("0.70 ± ")
    assert len(GRPO().curves(rows)) == 3


def test_both_scores_train_on_what_is_rounded(tmp_path: Path) -> None:
    small = (
        "srpo.batch_size=2",
        "run.micro_batch=2",
        "dancegrpo.generations=2",
        "dancegrpo.optimizer_steps=1",
        "srpo.rollout_steps=3",
    )
    setting = Setting("tiny", (*small, "srpo.updates=1"), 1, False)
    *_, single, relative = _arms(setting)
    rows = list(trained([single, relative], setting, tmp_path, lambda _: None, images=20))
    assert [(row["arm"], row["update"]) for row in rows] == [
        (arm.name, update) for arm in (single, relative) for update in (0, 1)
    ]
    # The mean of four multiples of 0.01; of four sums of 1.1 such and -1 such.
    for row, step in ((rows[1], STEP / 4), (rows[3], STEP / 40)):
        assert row["score"] / step == pytest.approx(round(row["score"] / step), abs=0.01)
    assert rows[1]["score"] != pytest.approx(rows[3]["score"], abs=0.05)
