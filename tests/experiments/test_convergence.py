"""The experiment convergence: what is trained, which rate is taken, what is concluded from costs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from srpo.config import load_config
from srpo.experiments import convergence
from srpo.experiments.algorithms import ALGORITHMS, algorithm_arm
from srpo.experiments.convergence import HOURS, RECIPE, Convergence
from srpo.experiments.experiment import Row, Setting, run

SMALL = ("srpo.batch_size=4", "run.micro_batch=4", "run.sample_steps=2", "srpo.rollout_steps=3", "srpo.updates=2")


def looked(arm: str, seed: int, moved: list[float], cost: float, kept: float = 1.0) -> list[Row]:
    """Looks after every update of `cost` forwards, of which the first shows what it should."""
    return [
        {
            "arm": arm,
            "seed": seed,
            "update": n,
            "forwards": cost * n,
            "seconds": 2 * cost * n,
            "moved": to,
            "kept": kept if n else 1.0,
            "diverse": 1.0,
        }
        for n, to in enumerate(moved)
    ]


def rows_with(costs: dict[str, float]) -> list[Row]:
    """Of a target of 2, reached in two updates; what costs nothing never gets there."""
    rows = looked(RECIPE, 0, [0.0, 2.0], 1.0)
    for name in ALGORITHMS:
        cost = costs.get(name, 10.0)
        for seed in (0, 1):
            spread = 1.02**seed if name != "srpo" else 1.0
            rows += looked(name, seed, [0.0, 1.0, 2.0] if cost else [0.0, 0.5, 1.0], (cost or 50.0) * spread)
    return rows


def test_conclusions_are_of_costs_and_of_the_paper_s_ratios() -> None:
    found = Convergence().conclusions(rows_with({"direct_align": 5.01, "refl": 30.0, "dancegrpo": 0.0}))
    said = {name: [one for one in found if one.text.startswith(f"{name}:")] for name in ALGORITHMS}
    assert [one.agrees for one in said["direct_align"]] == [False, False]
    assert (
        "direct_align: 0.51 ± 0.06 times SRPO's forwards until moved by 2.00, 0.51 ± 0.06"
        in said["direct_align"][0].text
    )
    assert [one.agrees for one in said["refl"]] == [True, True]
    assert "3.0 times SRPO's hours in the paper" in said["refl"][1].text
    assert [one.agrees for one in said["draft"]] == [None]
    assert [one.agrees for one in said["dancegrpo"]] == [True, False]
    assert "dancegrpo: more than 5.05 ± 0.64" in said["dancegrpo"][0].text


def test_table_has_every_algorithm() -> None:
    header, lines = Convergence().table(rows_with({}))
    assert [line[0] for line in lines] == [*ALGORITHMS]
    assert {len(line) for line in lines} == {len(header)}
    assert lines[-1][-1] == f"{HOURS['dancegrpo'] / HOURS['srpo']:.1f}"


def test_rate_is_the_cheapest_that_breaks_nothing() -> None:
    slow, fast, broken = (
        looked(f"refl x {rate:g}", 0, [0.0, 3.0], cost, kept)
        for rate, cost, kept in ((2.0, 30.0, 1.0), (4.0, 20.0, 0.95), (8.0, 10.0, 0.85))
    )
    recipe = looked(RECIPE, 0, [0.0, 2.0], 1.0)
    rate = convergence._rate
    assert rate(recipe + slow + fast + broken, "refl") == 4
    assert rate(recipe + slow + broken, "refl") == 2
    assert rate(recipe + broken, "refl") == 8
    assert rate(recipe, "refl") == convergence.USUAL


def test_every_algorithm_takes_as_many_images_a_step() -> None:
    for name in ALGORITHMS:
        arm = algorithm_arm(name, Setting("tiny", ("srpo.updates=7", "srpo.eps=1e-6"), 2, True), name, 3, rate=2.0)
        config = load_config("tiny", arm.overrides)
        group = config.dancegrpo
        images = config.srpo.batch_size * (group.generations // group.optimizer_steps if group else 1)
        assert images == load_config("tiny").srpo.batch_size == 32
        assert config.srpo.learning_rate == pytest.approx(1.8e-4)
        assert (config.srpo.updates, config.srpo.eps) == (3, 1e-6)


def test_algorithms_are_tried_and_then_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convergence, "ALGORITHMS", {name: ALGORITHMS[name] for name in ("srpo", "dancegrpo")})
    monkeypatch.setattr(convergence, "OTHERS", ["dancegrpo"])
    monkeypatch.setattr(convergence, "RATES", (4.0,))
    monkeypatch.setattr(convergence, "_IMAGES", 20)
    report = run(Convergence(), Setting("tiny", SMALL, 2, False), tmp_path / "out", lambda _: None)
    rows = [json.loads(line) for line in (tmp_path / "out/convergence.jsonl").read_text().splitlines()][1:]
    tried = {row["arm"]: row["update"] for row in rows if " x " in row["arm"]}
    assert tried == {"srpo x 4": 1, "dancegrpo x 4": 1}  # ROOM * 2 / 4
    assert json.loads((tmp_path / "out/convergence.jsonl").read_text().partition("\n")[0])["overrides"] == [*SMALL]
    assert {(row["arm"], row["seed"]) for row in rows if row["arm"] in ALGORITHMS} == {
        (name, seed) for name in ("srpo", "dancegrpo") for seed in (0, 1)
    }
    assert (tmp_path / "out/convergence.png").is_file()
    assert "SRPO&#x27;s forwards until moved by" in report.read_text()
