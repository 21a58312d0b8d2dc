"""Trainings that experiments compare, and the numbers made of what was seen of them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from srpo.errors import InputError
from srpo.experiments import arms, looks, witness
from srpo.experiments.arms import Arm, shown, trained
from srpo.experiments.experiment import Row, Setting, run
from srpo.experiments.offline import ARMS, Offline
from srpo.rewards import Reward
from srpo.runlog import read_log
from srpo.tiny.judge import Judge

SETTING = Setting(
    "tiny", ("srpo.batch_size=4", "run.micro_batch=4", "run.sample_steps=2", "srpo.rollout_steps=2"), 2, True
)


class _Broken(Reward):
    """Gives NaN after some scores."""

    def __init__(self, given: Reward, scores: int) -> None:
        self._given, self._left = given, scores

    def relative(self, images: Tensor, positive: list[str], negative: list[str], kappa: Tensor) -> Tensor:
        self._left -= images.requires_grad  # looks score, too
        return self._given.relative(images, positive, negative, kappa) * (1 if self._left >= 0 else math.nan)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self._given.score(images, prompts)

    def limit(self, kappa: float) -> float:
        return self._given.limit(kappa)


def test_every_arm_is_trained_from_every_seed_and_looked_at(tmp_path: Path) -> None:
    chosen = [
        Arm("bold", ("srpo.updates=3",), every=2),
        Arm("thin", ("srpo.updates=2", "data.control_group=thin")),
        Arm("broken", ("srpo.updates=3",), every=1, reward=partial(_Broken, scores=2)),
    ]
    said: list[str] = []
    rows = list(trained(chosen, SETTING, tmp_path, said.append, images=20))
    assert said == [
        f"{arm}, seed {seed}: {n} updates" for arm, n in (("bold", 3), ("thin", 2), ("broken", 2)) for seed in (0, 1)
    ]
    seen = {
        (arm.name, seed): [row for row in rows if (row["arm"], row["seed"]) == (arm.name, seed)]
        for arm in chosen
        for seed in (0, 1)
    }
    assert [row["update"] for row in seen["bold", 0]] == [0, 2, 3]
    assert [row["update"] for row in seen["thin", 1]] == [0, 2]
    for (name, seed), looked in seen.items():
        first, end = looked[0], looked[-1]
        assert (first["moved"], first["diverse"], first["forwards"], first["score"]) == (0.0, 1.0, 0, None)
        log = read_log(tmp_path / name / str(seed))
        assert [row["forwards"] for row in looked] == [
            sum(one["forwards"] for one in log[: row["update"]]) for row in looked
        ]
        assert end["seconds"] > 0
    bold, thin = seen["bold", 0], seen["thin", 0]
    assert bold[0]["stroke"] == thin[0]["stroke"] != seen["bold", 1][0]["stroke"], "noise is the seed's"
    assert bold[-1]["moved"] == pytest.approx(bold[-1]["stroke"] - bold[0]["stroke"])
    assert thin[-1]["moved"] == pytest.approx(thin[0]["stroke"] - thin[-1]["stroke"])
    assert "scored nan" in seen["broken", 0][-1]["failed"]
    assert [row["update"] for row in seen["broken", 0]] == [0, 1, 2, 2]
    assert math.isnan(looks.last(rows, "broken", "moved")[0])
    assert [name for name, _ in shown(chosen, tmp_path, 7)] == ["bold", "thin", "broken"]
    assert shown(chosen, tmp_path, 7)[0][1].shape == (7, 3, 32, 32)
    assert np.load(tmp_path / "thin/1.npy").max() <= 1


def test_work_in_processes_keeps_its_order() -> None:
    assert list(arms._each(math.sqrt, [4.0, 1.0, 9.0], 2)) == [2.0, 1.0, 3.0]  # type: ignore[arg-type,list-item]


@pytest.mark.slow
def test_processes_measure_what_one_does(tmp_path: Path) -> None:
    chosen = [Arm("bold", ("srpo.updates=1",))]
    found = [
        [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
        for rows in (
            list(trained(chosen, replace(SETTING, workers=workers), tmp_path / str(workers), lambda _: None, images=20))
            for workers in (1, 2)
        )
    ]
    assert found[0] == found[1]


def test_arms_are_told_apart_and_words_are_known(tmp_path: Path) -> None:
    for names in (("same", "same"), ("a/b",)):
        with pytest.raises(ValueError, match="arms must have different names"):
            list(trained([Arm(name) for name in names], SETTING, tmp_path, print))
    with pytest.raises(InputError, match="judge measures nothing of 'heavy'; it knows bold, thin, slanted"):
        list(trained([Arm("rare", ("srpo.updates=1",), towards="heavy")], SETTING, tmp_path, print))


def looked(arm: str, seed: int, moved: list[float]) -> list[Row]:
    """A look after every update, of ten forwards each."""
    return [
        {
            "arm": arm,
            "seed": seed,
            "update": n,
            "forwards": 10 * n,
            "seconds": n,
            "moved": m,
            "kept": 0.9,
            "diverse": 1.0,
        }
        for n, m in enumerate(moved)
    ]


def test_numbers_of_looks() -> None:
    rows = looked("a", 0, [0.0, 1.0, 0.5, 2.0]) + looked("a", 1, [0.5, 0.6, 0.7, 0.8]) + looked("b", 0, [0.0, 4.0])
    assert looks.last(rows, "a", "moved") == [2.0, 0.8]
    assert looks.gained(rows, "a", "moved") == pytest.approx([2.0, 0.3])
    assert looks.cost_to_reach(rows, "a", 1.5) == [pytest.approx(20 + 10 * 2 / 3), math.inf]
    assert looks.cost_to_reach(rows, "a", 0.75, "seconds") == [0.75, pytest.approx(2.5)]
    assert [looks.surely(values) for values in ([1.0, 1.1, 0.9], [-1.0, -1.1, -0.9], [1.0, -1.0, 0.5])] == [1, -1, 0]
    assert looks.ends_table(rows, ["a"], {"moved": "how far"}) == (["", "how far"], [["a", "1.40 ± 7.62"]])
    assert ">how far<" in looks.curve_figure(rows, ["a", "b"], "moved", "how far")


def offline_rows(gain: float, updates: int = 4) -> list[Row]:
    """Of two seeds: whatever is not online moves `gain` times as far, and costs a tenth."""
    rows = []
    for arm, seed in ((arm, seed) for arm in ARMS for seed in (0, 1)):
        speed = (1 + 0.01 * seed) * (1 if arm == "online" else gain)
        found = looked(arm, seed, [speed * n for n in range(updates)])
        rows += [row | {"forwards": row["forwards"] / (1 if arm == "online" else 10)} for row in found]
    return rows


def test_offline_concludes_from_rows() -> None:
    for gain, agrees in ((1.5, [True, True, None]), (0.5, [True, False, None]), (-1.0, [False, False])):
        found = [one for one in Offline().conclusions(offline_rows(gain)) if one.text.startswith("offline")]
        assert [one.agrees for one in found] == agrees
    again = Offline().conclusions(offline_rows(1.0))
    assert "10.00 ± 0.00 times fewer forwards than online" in again[2].text


def test_offline_takes_the_recipe_s_images_or_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srpo.experiments.offline.IMAGES", 8)
    few = replace(SETTING, overrides=(*SETTING.overrides, "srpo.updates=1"))
    run(Offline(), few, tmp_path / "out", lambda _: None)
    rows = [json.loads(line) for line in (tmp_path / "out/offline.jsonl").read_text().splitlines()][1:]
    assert {row["arm"] for row in rows} == set(ARMS)
    forwards = {row["arm"]: row["forwards"] for row in rows if row["seed"] == 0 and row["update"] == 1}
    assert forwards["offline"] == 2 * 4 * 3 < forwards["online"] == 2 * 4 * 3 + 2 * 4
    assert len(list((tmp_path / "out/images").glob("*.png"))) == 8
    assert (tmp_path / "out/offline.png").is_file()
    with pytest.raises(InputError, match=r"needs data\.images"):
        run(Offline(), replace(few, recipe="flux-dev-hps"), tmp_path / "flux")


def test_the_judge_is_made_once_a_process() -> None:
    assert isinstance(witness.judge(), Judge)
    assert witness.judge() is witness.judge()
