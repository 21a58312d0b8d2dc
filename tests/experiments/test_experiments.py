"""Experiments: what they write, what they conclude from rows, what they refuse."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from srpo.cli import main
from srpo.errors import InputError
from srpo.experiments import recovery
from srpo.experiments.experiment import Row, Setting, interval, measured, run
from srpo.experiments.recovery import SIGMAS, STEPS, Recovery
from srpo.experiments.registry import EXPERIMENTS
from srpo_kernels import inject_noise, recover

SMALL = ("srpo.batch_size=4", "run.micro_batch=2")


def test_interval_is_student_s() -> None:
    middle, half = interval([1.0, 2.0, 3.0])
    assert middle == 2.0
    quantile = 0.95 * (2 / (1 - 0.95**2)) ** 0.5  # of two degrees of freedom, in closed form
    assert half == pytest.approx(quantile / 3**0.5, rel=1e-9)
    assert all(map(math.isnan, interval([1.0, math.inf])))
    assert measured([1.0, math.inf, math.nan]) == "in 1 of 3 seeds"


def test_recovery_measures_real_digits_the_same_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digits that it writes, and those very digits as a recipe's images."""
    sigmas = (0.1, 0.2, 0.9)
    monkeypatch.setattr(recovery, "SIGMAS", sigmas)
    images = tmp_path / "once/images"
    offline = ("data.mode=offline", f"data.images={json.dumps(str(images))}")
    said: list[str] = []
    lines = []
    for name, overrides in (("once", SMALL), ("again", (*SMALL, *offline))):
        report = run(Recovery(), Setting("tiny", overrides, 2, True), tmp_path / name, said.append)
        header, *rows = map(json.loads, (tmp_path / name / "recovery.jsonl").read_text().splitlines())
        assert (header["experiment"], header["recipe"], header["seeds"]) == ("recovery", "tiny", 2)
        lines.append(rows)
    assert len(list(images.glob("*.png"))) == 8
    assert not (tmp_path / "again/images").exists()
    assert lines[0] == lines[1]
    assert len(rows) == 2 * len(sigmas) * len(STEPS)
    assert len({(row["seed"], row["sigma"], row["method"]) for row in rows}) == len(rows)
    assert all(0 <= row["distance"] < 2 and 5 < row["psnr"] < 80 for row in rows)
    # At a level below the step, Direct-Align is the prediction of x0; above, the known noise tells more.
    psnr = {(row["seed"], row["sigma"], row["method"]): row["psnr"] for row in rows}
    assert psnr[0, 0.2, "Direct-Align, step 0.3"] == psnr[0, 0.2, "prediction of x0"]
    assert psnr[0, 0.9, "Direct-Align, step 0.1"] > psnr[0, 0.9, "prediction of x0"]
    assert psnr[0, 0.1, "prediction of x0"] > psnr[0, 0.9, "prediction of x0"]
    page = report.read_text()
    assert said[-1] in page.replace("&#x27;", "'")
    assert "data:image/png" in page
    assert page.count("<svg") == 2


def rows_with(gain: float) -> list[Row]:
    """Two seeds, a dB apart, in which Direct-Align is `gain` nearer."""
    return [
        {"seed": seed, "sigma": sigma, "method": name, "psnr": 20.0 + seed + gain * (name != "prediction of x0")}
        for seed in range(2)
        for sigma in SIGMAS
        for name in STEPS
    ]


def test_conclusions_say_when_the_paper_is_wrong() -> None:
    for gain, agrees in ((1.5, True), (0.0, False), (-1.5, False)):
        found = Recovery().conclusions(rows_with(gain))
        assert [one.agrees for one in found] == [agrees] * 3
        assert f"by {gain:.2f} ± 0.00 dB at sigma 0.4" in found[0].text
    assert "DISAGREES" in str(found[0])
    assert "at 0 of 7 noise levels" in found[0].text


def test_table_has_means_over_seeds_and_their_intervals() -> None:
    header, lines = Recovery().table(rows_with(1.0))
    assert len(header) == 1 + len(STEPS)
    assert lines[0] == ["0.1", "20.50 ± 6.35", *["21.50 ± 6.35"] * 3]  # t(0.975, 1) = 12.71, standard error 1/2


def test_gain_in_latents_is_as_docs_say() -> None:
    torch.manual_seed(0)
    x0, noise, wrong = torch.randn(3, 2, 8, dtype=torch.float64)
    for sigma, step in ((0.9, 0.1), (0.5, 0.02), (0.3, 0.3)):
        x_t = inject_noise(x0, noise, sigma)
        error = recover(x_t, noise, noise - x0 + wrong, sigma, sigma - step) - x0
        torch.testing.assert_close(error, -wrong * step / (1 - sigma + step), rtol=1e-6, atol=1e-7)


def test_refusals_come_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("do not touch")
    with pytest.raises(InputError, match="is not empty"):
        run(Recovery(), Setting("tiny", SMALL, 2, True), tmp_path)
    with pytest.raises(InputError, match="--seeds must be at least 2"):
        run(Recovery(), Setting("tiny", SMALL, 1, True), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert main(["experiment", "recovrey"]) == 2
    assert "unknown experiment 'recovrey'" in capsys.readouterr().err
    assert next(iter(EXPERIMENTS)) == "recovery"
