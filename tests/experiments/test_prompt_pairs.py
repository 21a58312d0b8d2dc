"""Experiment prompts: the words of its arms, and what it concludes from rows."""

from __future__ import annotations

from itertools import chain

import pytest

from srpo.config import load_config
from srpo.errors import InputError
from srpo.experiments.experiment import Row, Setting
from srpo.experiments.prompts import RARE, WEIGHTS, WORDS, Prompts, _arms


def rows_with(moved: dict[tuple[str, str], float], *, digits: bool = True) -> list[Row]:
    """Two seeds of each (kind, arm); of digits the slant falls by 0.4."""
    rows: list[Row] = []
    for (kind, arm), far in moved.items():
        for seed in range(2):
            for update, part in ((0, 0.0), (8, 1.0)):
                moved_here = part * (far + 0.01 * seed)
                row = {"kind": kind, "arm": arm, "seed": seed, "update": update, "moved": moved_here}
                seen = {"stroke": 3.0 - moved_here, "slant": 1 - 0.4 * part, "colour": 0.0} if digits else {}
                rows.append(row | seen | {"kept": 1 - 0.1 * part, "diverse": 1.0})
    return rows


ARMS = {
    (WORDS, "thin"): 1.5,
    (WORDS, "red"): 0.0,
    (RARE, "a, not b"): 0.5,
    (RARE, "c, not d"): 1.5,
    (WEIGHTS, "k 1"): 1.0,
}


def test_conclusions_say_which_words_steer_and_which_fail() -> None:
    thin, red, rare, known, weights = Prompts().conclusions(rows_with(ARMS))
    assert (thin.agrees, red.agrees, rare.agrees, known.agrees, weights.agrees) == (True, False, True, False, None)
    assert "thin: moved 1.50 ± 0.06, other attributes 0.20 ± 0.00 either way" in thin.text
    assert "moved 0.51 ± 0.06, 0.34 ± 0.03 times as far as words thin" in rare.text
    assert "moved -0.50 ± 0.00 further than with the recipe's weights, kept 0.00 ± 0.00 more" in weights.text
    own, other, *_ = Prompts().conclusions(rows_with(ARMS, digits=False))
    assert (own.agrees, other.agrees) == (True, None)
    assert "other attributes" not in own.text


def test_table_has_other_attributes_of_digits_only() -> None:
    header, lines = Prompts().table(rows_with(ARMS))
    assert header == ["", "moved", "kept", "diversity", "others moved"]
    assert lines[2] == ["a, not b", "0.51 ± 0.06", "0.90 ± 0.00", "1.00 ± 0.00", "0.20 ± 0.00"]
    header, lines = Prompts().table(rows_with(ARMS, digits=False))
    assert header[-1] == "diversity"
    assert {len(line) for line in lines} == {4}
    assert len(Prompts().curves(rows_with(ARMS))) == 3


def test_arms_have_the_words_and_weights_that_they_are_named_after() -> None:
    arms = _arms(Setting("tiny", (), 2, False))
    made = {arm.name: (load_config("tiny", list(arm.overrides)).srpo, arm.towards) for arm in chain(*arms.values())}
    objective, towards = made["blue"]
    assert (objective.positive_controls, objective.negative_controls, towards) == (("blue",), ("red",), "blue")
    objective, towards = made["zxqv, not thin"]
    assert (objective.positive_controls, objective.negative_controls, towards) == (("zxqv",), ("thin",), "bold")
    objective, _ = made["kappa 0.5"]
    assert (objective.form, objective.discount_denoise, objective.discount_inversion) == (
        "official",
        (0.5, 0.5),
        (0.5, 0.5),
    )
    assert made["cfg, k 1"][0].form == "cfg"
    recipe = load_config("tiny").srpo
    assert made["bold"][0] == recipe, "what others are compared with"
    quick = [[arm.name for arm in some] for some in _arms(Setting("tiny", (), 2, True)).values()]
    assert quick == [["bold", "upright"], ["zxqv, not wkjp", "zxqv, not thin"], ["kappa 0", "cfg, k 0.5"]]


def test_other_models_have_the_recipe_s_own_words() -> None:
    groups = "data.control_groups={soft: {positive: [soft light], negative: [flash]}}"
    arms = _arms(Setting("flux-dev-hps", (groups,), 2, False))
    assert [arm.name for arm in arms[WORDS]] == ["the recipe's", "soft"]
    assert len(arms[RARE]) == 3
    own, soft = (load_config("flux-dev-hps", [*arm.overrides, groups]).srpo for arm in arms[WORDS])
    assert own == load_config("flux-dev-hps").srpo
    assert (soft.positive_controls, soft.negative_controls) == (("soft light",), ("flash",))


def test_words_of_an_override_are_refused() -> None:
    with pytest.raises(InputError, match=r"leave out data\.control_group=red$"):
        _arms(Setting("tiny", ("data.control_group=red", "srpo.updates=2"), 2, False))
