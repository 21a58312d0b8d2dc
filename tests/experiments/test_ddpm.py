"""The noise-predicting model: its build, its schedule, the objective on it, and what the experiment concludes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from srpo.assets import TINY, resolve_asset
from srpo.config import load_config
from srpo.errors import InputError
from srpo.experiments import ddpm
from srpo.experiments.ddpm import DDPM, MODELS, SHARES, WORDS, nearest, train, translated
from srpo.experiments.experiment import Row, Setting, run
from srpo.experiments.recovery import ALIGNED, STEPS
from srpo.objective import Branch, SRPOOutput, srpo_loss
from srpo.randomness import generator
from srpo.rewards import CLIPReward
from srpo.tiny import epsilon
from srpo.tiny.digits import load
from srpo.tiny.epsilon import EpsilonModel, build_epsilon
from srpo.tiny.judge import Judge

PIPELINE = resolve_asset(TINY, "pipeline")


@cache
def shipped() -> EpsilonModel:
    return EpsilonModel.load(resolve_asset(TINY, "epsilon"), PIPELINE)


def test_shipped_model_draws_the_digits() -> None:
    found = Judge.load().measure(*shipped().pictures(100, seed=5, steps=10))
    assert found["accuracy"] >= 0.95
    assert all(abs(found[key]) < 0.6 for key in ("stroke", "slant", "colour"))
    assert sum(path.stat().st_size for path in resolve_asset(TINY, "epsilon").rglob("*") if path.is_file()) < 4e6


def test_build_is_reproducible_and_refuses_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged = SimpleNamespace(measure=lambda *_: {"accuracy": 0.5})
    monkeypatch.setattr(epsilon, "load", partial(load, copies=1))
    monkeypatch.setattr(epsilon, "Judge", SimpleNamespace(load=lambda: judged))
    monkeypatch.setattr(EpsilonModel, "pictures", lambda *_: (torch.zeros(1), torch.zeros(1)))
    said: list[str] = []
    for name in ("one", "two"):
        build_epsilon(tmp_path / name, PIPELINE, seed=3, steps=2, progress=said.append)
    names = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    wanted = resolve_asset(TINY, "epsilon")
    assert names == sorted(path.relative_to(wanted) for path in wanted.rglob("*") if path.is_file())
    for name in names:
        if name.name != "build.json":
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    report = json.loads((tmp_path / "one/build.json").read_text())
    assert (report["seed"], report["steps"], report["quality"]) == (3, 2, {"accuracy": 0.5})
    assert "epsilon 2/2" in said[0]
    with pytest.raises(InputError, match="already exists"):
        build_epsilon(tmp_path / "one", PIPELINE)
    with pytest.raises(InputError, match="does not exist"):
        build_epsilon(tmp_path / "three", tmp_path / "nothing")


def test_noise_shares_name_timesteps() -> None:
    model = shipped()
    assert nearest(model, 0.0) == -1
    assert [nearest(model, share) for share in SHARES] == sorted(nearest(model, share) for share in SHARES)
    signal = model.scheduler.alphas_cumprod
    for share in SHARES:
        alpha, sigma = signal[nearest(model, share)].sqrt(), (1 - signal[nearest(model, share)]).sqrt()
        assert (sigma / (alpha + sigma)).item() == pytest.approx(share, abs=5e-3)
    branch, start = translated(model, Branch("inversion", 0.5, 0.7, 0.3, swap_prompts=True))
    alpha, sigma = model.levels(torch.tensor(start))
    assert (branch.alpha_from, branch.sigma_from) == (alpha.item(), sigma.item())
    assert branch.alpha_from == pytest.approx(branch.sigma_from, rel=0.01)  # half noise, half image
    assert branch.sigma_to / branch.alpha_to == pytest.approx(0.7 / 0.3, rel=0.02)
    assert (branch.name, branch.kappa, branch.swap_prompts) == ("inversion", 0.3, True)


class Sum:
    """A reward whose score is an image's sum."""

    def relative(self, images: Tensor, *_: Any) -> Tensor:
        return images.flatten(1).sum(1)

    score = relative


def test_objective_of_a_predicted_noise_is_the_formula() -> None:
    torch.manual_seed(0)
    x0, noise = torch.randn(2, 2, 3, dtype=torch.float64)
    predicted = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    levels = [(0.6, 0.8, 0.8, 0.6), (0.8, 0.6, 0.6, 0.8)]  # alpha and sigma from, alpha and sigma to
    made = [
        Branch("denoise", s_f, s_t, 0.1, swap_prompts=False, alpha_from=a_f, alpha_to=a_t)
        for a_f, s_f, a_t, s_t in levels
    ]
    seen: list[Tensor] = []

    def predict(x_t: Tensor, sigma: Tensor) -> Tensor:
        seen.extend((x_t, sigma))
        return predicted

    words = dict(controls=("bold", "thin"), velocity=predict, decode=lambda x: x, reward=Sum())
    output = srpo_loss(x0, noise, ["a", "b"], branches=made, threshold=None, prediction="epsilon", **words)
    output.loss.backward()
    assert seen[1].tolist() == [0.8, 0.8, 0.6, 0.6]
    for branch, (a_f, s_f, a_t, s_t) in enumerate(levels):
        rows = slice(2 * branch, 2 * branch + 2)
        x_t = a_f * x0 + s_f * noise
        torch.testing.assert_close(seen[0][rows], x_t, rtol=1e-12, atol=1e-12)
        clean = (x_t - s_f * predicted[rows]) / a_f
        expected = (a_t * clean + s_t * predicted[rows] - s_t * noise) / a_t
        torch.testing.assert_close(output.x0_hat[rows], expected.detach(), rtol=1e-12, atol=1e-12)
        slope = torch.full((2, 3), -(s_t / a_t - s_f / a_f) / 4, dtype=torch.float64)  # of -score, over 2 x 2 images
        torch.testing.assert_close(predicted.grad[rows], slope, rtol=1e-12, atol=1e-12)
    for problem, arguments in (
        ("must have alphas with prediction='epsilon'", dict(branches=[Branch("denoise", 0.5, 0.4, 0.1, False)])),
        ("must not have alphas with prediction='velocity'", dict(branches=made, prediction="velocity")),
        ("checkpoint needs prediction='velocity'", dict(branches=made, checkpoint=True)),
    ):
        with pytest.raises(ValueError, match=problem):
            srpo_loss(x0, noise, ["a", "b"], **words, **{"prediction": "epsilon", **arguments})


def test_training_makes_its_own_loss_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same clean latents with the same noise, at the same timesteps."""
    config = load_config("tiny", ["srpo.batch_size=10", "srpo.updates=2", "srpo.learning_rate=1e-5"]).srpo
    x0 = shipped().encode_images(load(copies=1).images[:10])
    monkeypatch.setattr(EpsilonModel, "sample", lambda *_: x0)
    monkeypatch.setattr(ddpm, "generator", lambda seed, _step, rank, purpose: generator(seed, 0, rank, purpose))
    losses: list[float] = []

    def noted(*arguments: Any, **options: Any) -> SRPOOutput:
        output = srpo_loss(*arguments, **options)
        losses.append(output.loss.item())
        return output

    monkeypatch.setattr(ddpm, "srpo_loss", noted)
    for _ in range(2):
        model = EpsilonModel.load(resolve_asset(TINY, "epsilon"), PIPELINE)
        train(model, config, CLIPReward(resolve_asset(TINY, "reward")), WORDS, 0)
    assert losses[:2] == losses[2:]
    assert losses[1] < losses[0]


def rows_with(gain: float, moved: float) -> list[Row]:
    """Two seeds, a dB and a hundredth of an SD apart, in which Direct-Align is `gain` nearer."""
    rows: list[Row] = [
        {"arm": name, "seed": seed, "share": share, "psnr": 20.0 + seed + gain * (name in ALIGNED)}
        for seed in range(2)
        for share in SHARES
        for name in STEPS
    ]
    for model in MODELS:
        for word in WORDS:
            for seed in range(2):
                start = {
                    "arm": f"{model}, {word}",
                    "seed": seed,
                    "update": 0,
                    "moved": 0.0,
                    "kept": 1.0,
                    "diverse": 1.0,
                }
                rows += [start, {**start, "update": 8, "moved": moved + 0.01 * seed, "kept": 0.9, "diverse": 0.8}]
    return rows


def test_conclusions_say_what_the_rows_do() -> None:
    for gain, moved, levels, verdict in (
        (1.0, 1.0, "at 9 of 9 noise levels", "move strokes towards bold"),
        (-1.0, -1.0, "at 0 of 9 noise levels", "move strokes away from bold"),
        (0.0, 0.0, "at 0 of 9 noise levels", "do not surely move strokes towards bold"),
    ):
        found = DDPM().conclusions(rows_with(gain, moved))
        assert [one.agrees for one in found] == [None] * (len(ALIGNED) + len(MODELS) * len(WORDS))
        assert levels in found[2].text
        assert verdict in found[3].text
        assert "accuracy 1.000 ± 0.000 before and 0.900 ± 0.000 after, diversity 0.80 ± 0.00" in found[3].text
    header, lines = DDPM().table(rows_with(1.0, 1.0))
    assert len(header) == 1 + len(STEPS)
    assert lines[0] == ["0.1", "20.50 ± 6.35", *["21.50 ± 6.35"] * 3]


def test_experiment_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rectified flow's trainings apart, which are `trained`'s."""
    for name, value in (
        ("SHARES", (0.2, 0.8)),
        ("_IMAGES", 20),
        ("_SHOWN", 5),
        ("_DIGITS", 4),
        ("RATES", {"epsilon": 1.0}),
    ):
        monkeypatch.setattr(ddpm, name, value)

    def flow(arms: Any, *_: Any) -> Iterator[Row]:
        yield from (row for row in rows_with(0.0, 1.0) if row["arm"] in {arm.name for arm in arms})

    monkeypatch.setattr(ddpm, "trained", flow)
    overrides = ("srpo.batch_size=4", "srpo.updates=1", "srpo.rollout_steps=2")
    report = run(DDPM(), Setting("tiny", overrides, 2, True), tmp_path / "out", lambda _: None)
    _, *rows = map(json.loads, (tmp_path / "out/ddpm.jsonl").read_text().splitlines())
    psnr = {(row["seed"], row["share"], row["arm"]): row["psnr"] for row in rows if "psnr" in row}
    assert len(psnr) == 2 * 2 * len(STEPS)
    assert psnr[0, 0.2, "Direct-Align, step 0.3"] == psnr[0, 0.2, "prediction of x0"]  # both end at the clean image
    assert psnr[0, 0.8, "Direct-Align, step 0.02"] > psnr[0, 0.8, "prediction of x0"] + 3
    ends = [row for row in rows if row["arm"].startswith("epsilon") and row["update"] == 1]
    assert len(ends) == 2
    assert all(row["moved"] != 0 for row in ends)
    assert "data:image/png" in report.read_text()


def test_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="experiment ddpm needs the tiny world"):
        run(DDPM(), Setting("flux-dev-hps", (), 2, True), tmp_path / "out")
