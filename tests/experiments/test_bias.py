"""Experiment bias: what it concludes from rows, and whom its taste pulls."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from srpo.errors import InputError
from srpo.experiments import bias
from srpo.experiments.arms import Arm
from srpo.experiments.bias import ALGORITHMS, RELATIVE, Bias, _arm
from srpo.experiments.experiment import Row, Setting
from srpo.experiments.taste import slanted, warm


def rows_with(pull: float, moved: float = 2.0, key: str = "slant") -> list[Row]:
    """Two seeds, in which all drift by 0.1; a taste of 1 pulls relative rewards by `pull`, others by about 0.4."""
    rows: list[Row] = []
    for strength in (0, 1):
        for name in ALGORITHMS:
            for seed in range(2):
                pulled = pull if name in RELATIVE else 0.4 + 0.01 * seed
                arm = {"arm": f"{name}, taste {strength}", "seed": seed}
                rows.append({**arm, "update": 0, key: 1.0 + seed, "moved": 0.0, "kept": 1.0})
                far = moved if name in RELATIVE else 2.0
                rows.append({**arm, "update": 8, key: 1.1 + seed + strength * pulled, "moved": far, "kept": 0.9})
    return rows


def test_conclusions_say_when_the_paper_is_wrong() -> None:
    for pull, agrees in ((0.02, True), (-0.02, True), (0.4, False), (-0.6, False)):
        found = Bias().conclusions(rows_with(pull))
        assert [one.agrees for one in found] == [agrees] * len(RELATIVE)
        assert f"taste 1 pulls srpo by {pull:.2f} ± 0.00 along slant" in found[0].text
        assert f"({pull / 2:.2f} ± 0.00 per moved)" in found[0].text
        assert "draft 0.41 ± 0.06 (0.20 ± 0.03)" in found[0].text
    # What has moved less must be pulled less, too.
    assert not any(one.agrees for one in Bias().conclusions(rows_with(0.2, moved=0.2)))


def test_table_has_the_drift_and_what_of_it_is_the_taste_s() -> None:
    _, lines = Bias().table(rows_with(0.3, key="lab_b"))
    assert lines[0] == ["srpo", "0", "2.00 ± 0.00", "0.90 ± 0.00", "0.10 ± 0.00", "", ""]
    assert lines[1][:2] == ["srpo", "1"]
    assert lines[1][4:] == ["0.40 ± 0.00", "0.30 ± 0.00", "0.15 ± 0.00"]
    assert len(lines) == 2 * len(ALGORITHMS)
    assert len(Bias().curves(rows_with(0.3))) == 2


def test_reward_has_the_taste_in_the_recipe_s_form() -> None:
    """Of the arm's own form, where it has one; and a taste for the model's images."""
    setting = Setting("tiny", (), 2, False)
    form = {name: _arm(setting, name, 1.0).reward.keywords["form"] for name in ALGORITHMS}
    assert form.pop("srpo, plain difference") == "difference"
    assert set(form.values()) == {"official"}
    assert _arm(setting, "srpo", 1.0).reward.keywords["taste"] is slanted
    photographs = _arm(Setting("flux-dev-hps", ("srpo.form=cfg",), 2, False), "srpo", 1.0)
    assert photographs.reward.keywords == {"taste": warm, "strength": 1.0, "form": "cfg"}
    with pytest.raises(InputError, match=r"srpo\.form to be one of official, difference, cfg, got image_only"):
        _arm(Setting("tiny", ("srpo.form=image_only",), 2, False), "srpo", 1.0)


def test_picture_is_of_the_strongest_taste(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    called: list[list[str]] = []

    def trained(arms: list[Arm], *_: object, images: int) -> list[Row]:
        called.append([arm.name for arm in arms])
        return [{"arm": arm.name, "seed": 0, "images": images} for arm in arms]

    def shown(arms: list[Arm], _: Path, count: int) -> list[tuple[str, torch.Tensor]]:
        called.append([arm.name for arm in arms])
        return [(arm.name, torch.zeros(count, 3, 8, 8)) for arm in arms]

    monkeypatch.setattr(bias, "trained", trained)
    monkeypatch.setattr(bias, "shown", shown)
    for quick, strengths in ((False, (0, 0.25, 1)), (True, (0, 1))):
        rows = list(Bias().measure(Setting("tiny", (), 2, quick), tmp_path, print))
        assert {row["images"] for row in rows} == {50 if quick else 100}
        assert called.pop() == [f"{name}, taste 1" for name in ALGORITHMS]
        assert called.pop() == [f"{name}, taste {strength}" for strength in strengths for name in ALGORITHMS]
    assert (tmp_path / "bias.png").is_file()
