"""Experiment timesteps: the parts of a schedule, and what it concludes from rows."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor

from srpo.config import load_config
from srpo.errors import InputError
from srpo.experiments.experiment import Row, Setting
from srpo.experiments.taste import slanted, warm
from srpo.experiments.timesteps import ALGORITHMS, PARTS, Timesteps, _arm
from srpo.objective import branches
from srpo.rewards import Reward


class _Ones(Reward):
    """Scores 1, and kappa of two prompts."""

    def relative(self, images: Tensor, positive: list[str], negative: list[str], kappa: Tensor) -> Tensor:
        del images, positive, negative
        return kappa

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        del images
        return torch.ones(len(prompts))

    def limit(self, kappa: float) -> float:
        return kappa


@pytest.mark.parametrize("recipe", ["tiny", "flux-dev-hps"])
def test_parts_are_quarters_and_all_of_the_schedule_in_steps_of_the_recipe_s_length(recipe: str) -> None:
    base = load_config(recipe).srpo

    def configured(algorithm: str, part: str):
        return load_config(recipe, _arm(Setting(recipe, (), 2, False), algorithm, part).overrides)

    early, late, whole = (configured("srpo", part).srpo for part in PARTS)
    steps = base.schedule_steps
    assert (early.window, late.window, whole.window) == ((1, steps // 4), (steps - steps // 4, steps), (1, steps))
    assert late.sigmas()[-1] == 0
    levels = base.sigmas()
    length = (1 - base.groundtruth_ratio) * (levels[0] - levels[-1])
    for objective in (early, late, whole):
        step = branches(objective, objective.timesteps // 2)[0]
        spacing = objective.sigmas()[0] - objective.sigmas()[1]
        assert step.sigma_from - step.sigma_to == pytest.approx(length, abs=2 * spacing)
    single = configured("direct_align", "late")
    assert (single.algorithm, single.direct_align.control) == ("direct_align", True)


def test_tastes_are_those_of_the_model_s_images() -> None:
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for recipe, taste in (("tiny", slanted(images) + warm(images)), ("flux-dev-hps", warm(images))):
        make = pickle.loads(pickle.dumps(_arm(Setting(recipe, (), 2, False), "srpo", "all").reward))
        reward = make(_Ones())
        torch.testing.assert_close(reward.score(images, [""] * 4), 1 + taste)
        kappa = torch.full((4,), 0.5)
        torch.testing.assert_close(reward.relative(images, [""] * 4, [""] * 4, kappa), kappa + kappa * taste)


def test_refusals() -> None:
    for override, problem in (("srpo.form=image_only", "srpo.form to be one of"), ("srpo.schedule_steps=7", "got 7")):
        with pytest.raises(InputError, match=problem):
            _arm(Setting("tiny", (override, "srpo.window=[1,6]"), 2, False), "srpo", "all")


def rows_with(late: float, moved: float = 1.0, tastes: tuple[str, ...] = ("slant", "lab_b")) -> list[Row]:
    """Three seeds; per moved, all drift by 1 but the last quarter by `late`, which moves twice as far as the others."""
    rows: list[Row] = []
    for arm, part in ((f"{algorithm}, {part}", part) for algorithm in ALGORITHMS for part in PARTS):
        for seed in range(3):
            for update in (0, 4, 8):
                way = moved * update / 8 * (2 if part == "late" else 1)
                drift = way * (late if part == "late" else 1 + 0.01 * seed)
                row = {"arm": arm, "seed": seed, "update": update, "moved": way, "kept": 1.0, "diverse": 1.0}
                row |= {"alignment": 2.0 + drift, "sharpness": 10.0 + update}
                rows.append(row | dict.fromkeys(tastes, 5.0 - drift))
    return rows


def test_conclusions_compare_at_equal_moved_and_say_when_the_paper_is_wrong() -> None:
    for late, share, agrees in ((1.5, "1.00", True), (0.7, "0.00", False)):
        whole, *each = Timesteps().conclusions(rows_with(late))
        assert whole.agrees is agrees
        assert f"drifted most in {share} ± 0.00 of the comparisons (4 a seed" in whole.text
        assert len(each) == 4
        assert f"early 0.91 ± 0.02, late {0.9 * late:.2f} ± 0.00, all 0.91 ± 0.02" in each[0].text
        assert {one.agrees for one in each} == {None}
    assert len(Timesteps().conclusions(rows_with(1.5, tastes=("lab_b",)))) == 3
    assert Timesteps().conclusions(rows_with(1.5, moved=-1.0)) == []


def test_table_and_figures() -> None:
    header, lines = Timesteps().table(rows_with(1.5))
    late = dict(zip(header, lines[1], strict=True))
    assert late.pop("") == "direct_align, late"
    assert late["slant, SD: per moved"] == "-1.50 ± 0.00"
    assert (late["moved"], late["score, plain prompt: gained"], late["sharpness"]) == (
        "2.00 ± 0.00",
        "3.00 ± 0.00",
        "1.80 ± 0.00",
    )
    assert len(lines) == len(ALGORITHMS) * len(PARTS)
    assert len(Timesteps().curves(rows_with(1.5))) == 2 * 4
