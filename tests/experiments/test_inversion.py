"""Experiment inversion: its arms, and what it says of rows."""

from __future__ import annotations

from srpo.config import load_config
from srpo.experiments.experiment import Row, Setting
from srpo.experiments.inversion import FORMS, IMAGE_ONLY, WORDED, Inversion, _arms


def test_every_form_is_trained_three_times_as_long_and_scored_by_its_own_weights() -> None:
    for quick, updates in ((False, 8), (True, 2)):
        found = {}
        for arm in _arms(Setting("tiny", (), 2, quick)):
            config = load_config("tiny", arm.overrides).srpo
            assert (arm.every, config.updates) == (updates, 3 * updates)
            found[arm.name] = (config.form, config.inversion, arm.reward.keywords["form"])  # type: ignore[attr-defined]
        assert found == {
            "both branches": ("official", True, "official"),
            "denoise only": ("official", False, "official"),
            "both, difference": ("difference", True, "difference"),
            "denoise only, difference": ("difference", False, "difference"),
            IMAGE_ONLY: ("image_only", True, "official"),
        }


def rows_with(speed: float, drift: float) -> list[Row]:
    """Two seeds; what is not SRPO moves `speed` times as fast, and drifts by `drift` per moved; SRPO by 0.1."""
    rows: list[Row] = []
    for arm in FORMS:
        own = arm != "both branches"
        for seed in range(2):
            for update in (0, 8, 16, 24):
                moved = (speed if own else 1.0) * update / 8
                row = {"arm": arm, "seed": seed, "update": update, "forwards": update * (8 if own else 10)}
                row |= {"moved": moved, "slant": 3.0 + moved * (drift if own else 0.1)}
                rows.append(row | {"kept": 1 - moved / 10, "diverse": 1.0, "changed": moved / 100})
    return rows


def test_forms_are_compared_at_the_same_updates_and_where_both_have_moved_as_far() -> None:
    found = Inversion().conclusions(rows_with(2.0, 0.4))
    assert len(found) == len(WORDED)
    assert {one.agrees for one in found} == {None}
    text = found[0].text
    assert text.startswith("denoise only: moved 2.00 ± 0.00 and 6.00 ± 0.00 in 8 and 24 updates, both branches 1.00 ")
    assert "at 0.80 times the forwards" in text
    assert "both have moved 2.70" in text
    assert "slant 0.81 ± 0.00, kept 0.00 ± 0.00" in text
    assert "image only: moved 6.00 ± 0.00 and slant 2.40 ± 0.00 in 24 updates" in found[-1].text
    still = Inversion().conclusions(rows_with(0.0, 0.4))
    assert "both have moved" not in still[0].text


def test_table_has_the_recipe_s_length_and_the_end() -> None:
    header, lines = Inversion().table(rows_with(2.0, 0.4))
    assert header[:4] == ["", "updates", "moved", "slant"]
    assert [line[:4] for line in lines[2:4]] == [
        ["denoise only", "8", "2.00 ± 0.00", "0.80 ± 0.00"],
        ["denoise only", "24", "6.00 ± 0.00", "2.40 ± 0.00"],
    ]
    assert len(lines) == 2 * len(FORMS)
    assert len(Inversion().curves(rows_with(2.0, 0.4))) == 5
