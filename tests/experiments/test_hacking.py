"""The experiment hacking: where limits are passed, and who goes furthest before images break."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from srpo.experiments import hacking
from srpo.experiments.experiment import Row, Setting, run
from srpo.experiments.hacking import RATES, Hacking

SMALL = ("srpo.batch_size=4", "run.micro_batch=4", "run.sample_steps=2", "srpo.rollout_steps=3", "srpo.updates=1")


def rows_with(losses: dict[str, float]) -> list[Row]:
    """Ten looks, two updates and a standard deviation apart, at images that lose a share each time."""
    return [
        {
            "arm": arm,
            "seed": seed,
            "update": 2 * n,
            "score": 0.0,
            "moved": float(n) * (1 + 0.01 * seed),
            "kept": 0.5 * (1 - losses.get(arm, 0.04) * n),
            "diverse": 1.0,
            "alignment": -1.0 - 0.02 * n,
            "drift@0.9": 0.0,
            "reward": -9.0 * n,  # has no limit of its own
        }
        for arm in RATES
        for seed in (0, 1)
        for n in range(10)
    ]


def test_limits_are_passed_between_looks() -> None:
    header, lines = Hacking().table(rows_with({"srpo": 0.05, "refl": 0.0}))
    table = {line[0]: dict(zip(header, line, strict=True)) for line in lines}
    assert [*table] == ["kept", "diverse", "alignment", "drift@0.9"]
    assert table["kept"]["srpo: update"] == "4.0 ± 0.0"  # a tenth, at two looks
    assert table["kept"]["draft: update"] == "5.0 ± 0.0"
    assert table["kept"]["draft: moved"].startswith("2.5 ±")
    assert table["kept"]["refl: moved"] == table["drift@0.9"]["srpo: moved"] == ""
    assert table["alignment"]["srpo: update"] == "5.0 ± 0.0"  # 5 % of -1 is two looks and a half


def test_conclusions_are_of_the_way_with_images_whole() -> None:
    for loss, agrees in ((0.02, True), (0.04, False), (0.08, False)):
        found = Hacking().conclusions(rows_with({"srpo": loss, "refl": 0.0}))
        assert len(found) == 3 * len(RATES) - 2
        assert [one.agrees for one in found[: len(RATES)]] == [None] * len(RATES)
        assert "refl: images are whole to the end, moved by 9.04" in found[2].text
        assert [one.agrees for one in found if "than refl" in one.text] == [False, False]
        assert [one.agrees for one in found if "than draft" in one.text] == [agrees, agrees]
    whole = Hacking().conclusions(rows_with({"srpo": 0.02}))
    assert "break at update 10 ± 0, moved by 5.03" in whole[0].text
    assert whole[0].text.endswith("before that warned alignment.")
    early = Hacking().conclusions(rows_with({"srpo": 0.08}))
    assert early[0].text.endswith("before that warned nothing.")


def test_algorithms_are_trained_on_and_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hacking, "RATES", {"srpo": 2.0, "dancegrpo": 4.0})
    monkeypatch.setattr(hacking, "OTHERS", ["dancegrpo"])
    monkeypatch.setattr(hacking, "LENGTH", 16)
    monkeypatch.setattr(hacking, "_IMAGES", 20)
    report = run(Hacking(), Setting("tiny", SMALL, 2, True), tmp_path / "out", lambda _: None)
    header, *rows = map(json.loads, (tmp_path / "out/hacking.jsonl").read_text().splitlines())
    assert header["overrides"] == [*SMALL]
    for arm, updates in (("srpo", 2), ("dancegrpo", 1)):  # 16 / 4 / rate
        assert [row["update"] for row in rows if row["arm"] == arm and row["seed"] == 1] == [*range(updates + 1)]
    assert {"kept", "reward", "swapped", "chroma", "grid_patch", "drift@0.9"} < rows[0].keys()
    assert rows[0]["drift@0.9"] == 0 < rows[1]["drift@0.9"]
    assert "before they break or training ends" in report.read_text()
