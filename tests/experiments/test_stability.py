"""Experiment stability: what it looks at, and what it says of rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from srpo.config import load_config
from srpo.experiments import stability
from srpo.experiments.experiment import Row
from srpo.experiments.stability import ARMS, SAMPLERS, Stability, _seen
from srpo.latents import shifted_sigmas
from srpo.trainer import Trainer


class _Eye:
    """Keeps what it is shown."""

    prompts = ("digit one", "digit two", "digit three")

    def __init__(self) -> None:
        self.images: list[Tensor] = []

    def judged(self, images: Tensor) -> dict[str, float]:
        self.images.append(images)
        return {"at": images.mean().item(), "kept": 1.0}


def test_levels_of_a_rollout_end_in_its_image(tmp_path: Path) -> None:
    """The last prediction of x0 is what Euler's last step comes to; the first knows nothing but noise."""
    small = ("run.sample_steps=8", "srpo.batch_size=2", "run.micro_batch=2", f"run.dir={tmp_path / 'run'}")
    trainer = Trainer(load_config("tiny", small))
    eye = _Eye()
    seen = _seen(trainer, eye, 0)["seen"]  # type: ignore[arg-type]
    images = dict(zip(seen, eye.images, strict=True))
    levels = [f"sigma {sigma:.3g}" for sigma in shifted_sigmas(8, 1.0)[:-1]]
    assert list(images) == [*levels, *SAMPLERS]
    assert {tuple(of.shape) for of in images.values()} == {(3, 3, 32, 32)}
    torch.testing.assert_close(images["sigma 0.125"], images["8 steps"], rtol=0, atol=1e-4)
    fine = images["50 steps"]
    assert (images["20 steps"] - fine).abs().mean() < (images["sigma 1"] - fine).abs().mean()
    assert not images["10 steps"].equal(images["10 steps of adams2"])
    strip = torch.from_numpy(np.load(tmp_path / "run/levels-0.npy"))
    assert strip.shape == (2 * 8, 3, 32, 32)
    assert strip[8].equal(images["sigma 1"][1])
    assert strip[7].equal(images["sigma 0.125"][0])


def rows_with(moved: dict[str, float]) -> list[Row]:
    """Two seeds of four levels; each place has moved as given, or by 1."""
    places = ["sigma 1", "sigma 0.7", "sigma 0.4", "sigma 0.1", *SAMPLERS]
    return [
        {
            "arm": arm,
            "seed": seed,
            "update": update,
            "seen": {place: {"at": 5.0 + seed + update * moved.get(place, 1.0), "kept": 0.9} for place in places},
        }
        for arm in ARMS
        for seed in range(2)
        for update in (0, 1)
    ]


def test_conclusions_count_levels_and_name_samplers() -> None:
    rows = rows_with({"sigma 1": 0.0, "sigma 0.1": -0.5, "4 steps": 0.25})
    found = [one.text for one in Stability().conclusions(rows)]
    assert len(found) == 2 * len(ARMS)
    assert found[0].startswith(
        "srpo: predictions of x0 have moved at 2 of 4 levels of a rollout: 0.00 ± 0.00 at sigma 1,"
    )
    assert "1.00 ± 0.00 at sigma 0.4, -0.50 ± 0.00 at sigma 0.1; at the first level 0.00 ± 0.00 of" in found[0]
    assert found[3].startswith("srpo: images have moved 0.25 ± 0.00 with 4 steps, 1.00 ± 0.00 with 8 steps")
    assert found[3].endswith("; with 4 steps 0.25 ± 0.00 of what it is with 50 steps.")
    _, lines = Stability().table(rows)
    assert [line[0] for line in lines] == ["sigma 1", "sigma 0.7", "sigma 0.4", "sigma 0.1", *SAMPLERS]
    assert lines[0][1:] == ["0.00 ± 0.00"] * 3 + ["0.90 ± 0.00"] * 2
    assert len(Stability().curves(rows)) == 2


def test_a_failed_training_is_not_counted() -> None:
    rows = rows_with({})
    rows[1] = {"arm": "srpo", "seed": 0, "update": 1, "failed": "NaN"}
    assert "at 0 of 4 levels" in Stability().conclusions(rows)[0].text
    assert "at 4 of 4 levels" in (text := Stability().conclusions(rows)[1].text)
    assert text.endswith("at the first level 1.00 ± 0.00 of what it is at the last.")


def test_ten_levels_at_most_are_shown() -> None:
    for count, shown in ((4, 4), (20, 10), (25, 9)):
        assert len(stability._spread([str(n) for n in range(count)])) == shown
