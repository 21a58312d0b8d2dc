"""Validation in real runs: reproducible, resumable, with limits that warn and stop, and a best checkpoint."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from helpers import quick_config, quick_overrides
from PIL import Image
from safetensors.torch import load_file

import srpo.text_encoders
from srpo.best import best_step
from srpo.chart import line_chart
from srpo.checkpoint import Checkpoints
from srpo.cli import main
from srpo.embed import embed_prompts
from srpo.errors import InputError
from srpo.monitors.looker import Looker
from srpo.monitors.pixels import look
from srpo.monitors.reference import REFERENCE_NAME
from srpo.objective import with_control
from srpo.report import training_report
from srpo.runlog import read_events, read_log
from srpo.tiny.digits import load
from srpo.tiny.models import clip
from srpo.tiny.training import train_clip
from srpo.tiny.words import clip_tokenizer
from srpo.trainer import Trainer

_TINY = Path(srpo.text_encoders.__file__).parent / "tiny/assets"

#: Looks of a second: four images of two prompts through two steps.
_LOOKS = ("run.sample_every=1", "run.sample_count=2", "validation.noises=2", "run.sample_steps=2", "run.save_every=1")
_LOOKS += ("validation.sgp=[slanted, upright]",)


def _looks(directory: Path) -> list[dict]:
    return [{**look, "seconds": None} for look in read_log(directory, "validation")]


def _samples(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (directory / "samples").iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three updates, each looked at."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    Trainer(quick_config(directory, "srpo.updates=3", *_LOOKS)).fit()
    return directory


def test_measurements_are_bitwise_the_same_after_a_resume(whole: Path, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    Trainer(quick_config(parts, "srpo.updates=1", *_LOOKS)).fit()
    Trainer(quick_config(parts, "srpo.updates=3", *_LOOKS), resume=True).fit()
    assert _looks(parts) == _looks(whole)
    assert _samples(parts) == _samples(whole)
    assert [look["step"] for look in _looks(whole)] == [0, 1, 2, 3]
    start, first = (look["values"] for look in _looks(whole)[:2])
    # Clipped pixels are the least likely to move, and they are many: nothing here is a constant.
    assert {name for name, value in first.items() if value == start[name]} <= {"clipped"}
    assert {"reward", "swapped", "alignment", "sgp", "lab_a", "lab_b", "chroma", "clipped", "sharpness"} <= set(start)
    assert {"grid_vae", "grid_patch", "diversity", "diversity_pixels", "drift@0.9", "drift@0.3"} <= set(start)
    assert all(first[f"drift@{sigma}"] > 0 == start[f"drift@{sigma}"] for sigma in (0.9, 0.6, 0.3))


@pytest.mark.parametrize("damage", ["missing", "damaged", "another run's"])
def test_step_0_is_looked_at_again_when_its_file_is_no_good(damage: str, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints/step-000003")
    file = run / REFERENCE_NAME
    sound = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "damaged":
        file.write_bytes(sound[:-3] + b"abc")
    else:
        other = quick_config(tmp_path / "other", "srpo.updates=1", *_LOOKS, "run.seed=1")
        Trainer(other).fit()
        shutil.copy(tmp_path / "other" / REFERENCE_NAME, file)
    trainer = Trainer(quick_config(run, "srpo.updates=3", *_LOOKS), resume=True)
    assert trainer.start == 2
    assert file.read_bytes() == sound
    trainer.fit()
    assert _looks(run) == _looks(whole)


def test_a_look_that_was_cut_off_is_taken_on_resume(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if not (json.loads(line)["event"] == "validation" and json.loads(line)["step"] == 3)]
    (run / "log.jsonl").write_text("".join(kept))
    Trainer(quick_config(run, "srpo.updates=3", *_LOOKS), resume=True).fit()
    assert _looks(run) == _looks(whole)


def test_other_prompts_sizes_and_rewards(
    clip_shaped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With cached texts: `srpo embed` covers validation prompts, and no text encoder of the pipeline is loaded."""
    (tmp_path / "prompts.txt").write_text("digit three\nbold digit nine\n")
    changes = [*_LOOKS, f"validation.prompts={tmp_path}/prompts.txt", "validation.sizes=[[40, 48]]", "srpo.updates=1"]
    changes += [f"validation.held_out={{path: {clip_shaped}, logit_scale: true}}", f"model.text_cache={tmp_path}/texts"]
    assert embed_prompts(quick_config(tmp_path / "run", *changes)).prompts == 11  # one of them is the run's own, too
    monkeypatch.setattr(srpo.text_encoders.CachedTexts, "_load", None)
    Trainer(quick_config(tmp_path / "run", *changes)).fit()
    start = _looks(tmp_path / "run")[0]
    assert {"held_out", "held_out@40x48", "chroma@40x48", "diversity@40x48"} <= set(start["values"])
    assert start["values"]["chroma"] != start["values"]["chroma@40x48"]
    names = [f"step-{step:06d}{size}.png" for step in (0, 1) for size in ("", "-40x48")]
    assert sorted(_samples(tmp_path / "run")) == sorted(names)
    sizes = [Image.open(tmp_path / "run/samples" / name).size for name in names]
    # Two by two images of 48 x 40 pixels, shown twice as large; then as many pairs.
    assert sizes[1] == (2 * 96 + 4, 2 * 80 + 4)
    assert sizes[3] == (4 * 96 + 4, 2 * 80 + 4)
    page = training_report(tmp_path / "run").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "Held-out reward, 40x48" in page
    assert main(["data", "tiny", *quick_overrides(tmp_path / "run", *changes)]) == 0
    assert f"prompt file {tmp_path}/prompts.txt: 2 usable" in capsys.readouterr().out


def test_scores_are_the_rewards_own(clip_shaped: Path, tmp_path: Path) -> None:
    held = f"validation.held_out={{path: {clip_shaped}, weight: 2}}"
    words = ["data.control_group=null", "srpo.positive_controls=[bold, wide]", "srpo.negative_controls=[thin]"]
    trainer = Trainer(quick_config(tmp_path, *_LOOKS, held, *words))
    scores, reward = trainer.validation._looker._scores, trainer.reward
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    prompts = ["digit one", "digit two"]
    found = scores.score(images, prompts)

    def told(word: str) -> torch.Tensor:
        return reward.score(images, [with_control(word, prompt) for prompt in prompts])

    kappa = sum(trainer.config.srpo.discount_denoise) / 2
    wanted = {
        "reward": (1 + kappa) * (told("bold") + told("wide")) / 2 - told("thin"),
        "swapped": (1 + kappa) * told("thin") - (told("bold") + told("wide")) / 2,
        "alignment": reward.score(images, prompts),
        "sgp": told("slanted") - told("upright"),
    }
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value)
    single = scores.held_out.parts[0].reward
    torch.testing.assert_close(found["held_out"], 2 * single.score(images, prompts))
    torch.testing.assert_close(scores.features(images), reward.embed_images(images))
    alone = replace(scores, alignment=None)
    torch.testing.assert_close(alone.features(images), single.embed_images(images))


def test_a_reward_without_prompts_has_no_words_to_swap(tmp_path: Path) -> None:
    Trainer(quick_config(tmp_path, "srpo.updates=1", *_LOOKS, "srpo.form=image_only", "run.sample_every=2")).fit()
    values = _looks(tmp_path)[0]["values"]
    assert values["reward"] == values["alignment"]
    assert "swapped" not in values


def test_measured_pixels_are_those_of_the_grid(whole: Path) -> None:
    grid = torch.from_numpy(np.array(Image.open(whole / "samples/step-000000.png"))).permute(2, 0, 1)
    # Four images in two columns, each pixel shown threefold by bicubic resizing with a gap of 4.
    kept = load_file(whole / REFERENCE_NAME)["images/32x32"]
    assert kept.shape == (4, 3, 32, 32)
    assert grid.shape == (3, 196, 196)
    measured = look(kept / 255, factor=4)
    means = {name: value.mean().item() for name, value in measured.items()}
    values = _looks(whole)[0]["values"]
    assert {name: values[name] for name in means} == pytest.approx(means, rel=1e-12)


def test_what_cannot_be_written_is_a_warning(whole: Path, tmp_path: Path) -> None:
    trainer = Trainer(quick_config(tmp_path, "srpo.updates=1", *_LOOKS, "validation.best=alignment"))
    for name in ("samples", "validation"):
        (tmp_path / name).write_text("a file in the place of a folder")
    (tmp_path / "best.json").mkdir()
    with pytest.warns(UserWarning, match="could not be written") as caught:
        trainer.fit()
    told = {str(one.message).split(" could")[0] for one in caught}
    assert told == {"samples", "what step 0 showed", "the name of the best checkpoint"}
    assert [look["values"] for look in _looks(tmp_path)] == [look["values"] for look in _looks(whole)[:2]]


# --- what they are for ----------------------------------------------------------------------------------------------


def _hacked(directory: Path, *changes: str) -> tuple[dict[str, float], dict[str, float], dict[int, set[str]]]:
    """Measurements of the first and last look of a run, and the monitors that warned, by update."""
    with pytest.warns(UserWarning, match="more than"):
        Trainer(quick_config(directory, *changes)).fit()
    looks = _looks(directory)
    warned = {look["step"]: {one["monitor"].partition("@")[0] for one in look["warnings"]} for look in looks}
    return looks[0]["values"], looks[-1]["values"], warned


def test_a_hacked_reward_is_noticed(tmp_path: Path) -> None:
    """Ten times the learning rate: the score that is trained rises, and what it stands for is lost."""
    changes = (
        "srpo.updates=4",
        "srpo.batch_size=8",
        "srpo.learning_rate=1e-3",
        "run.sample_every=4",
        "run.micro_batch=8",
    )
    start, last, warned = _hacked(tmp_path, *changes, "run.sample_count=20", "run.sample_steps=4")
    assert last["reward"] > start["reward"] + 0.2
    assert last["alignment"] < 0.9 * start["alignment"]
    assert last["diversity"] < 0.75 * start["diversity"]
    assert warned[0] == set()
    assert {"alignment", "diversity", "drift"} <= warned[4]


@pytest.mark.slow
def test_training_too_long_is_noticed_before_it_shows(tmp_path: Path) -> None:
    """Three times the recipe's updates, judged by a reward of the same kind that was trained on other batches."""
    _train_held_out(tmp_path / "held-out")
    changes = ("srpo.updates=24", "srpo.batch_size=32", "run.micro_batch=32", "srpo.rollout_steps=10")
    looks = ("run.sample_every=4", "run.save_every=4", "run.sample_count=40", "run.sample_steps=20")
    held_out = (f"validation.held_out={{path: {tmp_path}/held-out}}", "validation.best=held_out")
    start, last, warned = _hacked(tmp_path / "run", *changes, *looks, *held_out)
    values = {look["step"]: look["values"] for look in _looks(tmp_path / "run")}
    rewards = [values[step]["reward"] for step in sorted(values)]
    assert rewards == sorted(rewards)
    assert last["reward"] > 4 * start["reward"]
    assert warned[4] == set()
    assert "held_out" in warned[12]
    assert {"held_out", "alignment", "diversity", "drift"} <= warned[24]
    assert best_step(tmp_path / "run") <= 8
    assert last["held_out"] < values[8]["held_out"] - 0.1


def _train_held_out(directory: Path) -> None:
    """A tiny CLIP from another seed."""
    tokenizer, vae = clip_tokenizer(), AutoencoderKL.from_pretrained(_TINY / "pipeline/vae")
    torch.manual_seed(1)
    digits = load(seed=1)
    with torch.no_grad():
        latents = torch.cat([vae.encode(2 * images - 1).latent_dist.mean for images in digits.images.split(256)])
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    model = clip(tokenizer)
    train_clip(model, tokenizer, vae, digits, latents, 400, np.random.default_rng(1), lambda _: None)
    shutil.copytree(_TINY / "reward", directory)
    model.save_pretrained(directory)


# --- limits ---------------------------------------------------------------------------------------------------------


def test_limits_warn_and_stop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = ("srpo.updates=3", *_LOOKS, "validation.best=alignment")
    overrides = quick_overrides(
        tmp_path / "run", *changes, "validation.stop={drift: 0}", "validation.warn={drift: 1e-6}"
    )
    with pytest.warns(UserWarning, match=r"update 1: drift@0.9 \(velocity drift, relative\) went from 0 to .*'digit"):
        assert main(["train", "tiny", *overrides]) == 3
    printed = capsys.readouterr()
    assert "1/3 updates, stopped by validation.stop; its best checkpoint is of update 1" in printed.out
    assert "srpo: stopped: drift@0.9 (velocity drift, relative) went from 0 to" in printed.err
    run = tmp_path / "run"
    assert Checkpoints(run / "checkpoints", 2).latest() == 1
    last = read_events(run)[-1]
    assert (last["event"], last["step"], last["signal"]) == ("stop", 1, None)
    assert last["limits"] == ["drift@0.9", "drift@0.6", "drift@0.3"]
    page = (run / "report.html").read_text()
    assert "stopped at update 1 by the limit of drift@0.9, drift@0.6, drift@0.3" in page
    assert main(["train", "tiny", *overrides, "--resume"]) == 2
    assert "the run stopped at update 1: drift@0.9 went from 0 to" in capsys.readouterr().err
    raised = quick_overrides(run, *changes, "validation.stop={drift: 10}", "validation.warn={drift: null}")
    assert main(["train", "tiny", *raised, "--resume"]) == 0
    assert not any(one["monitor"].startswith("drift") for one in _looks(run)[-1]["warnings"])


def test_the_best_checkpoint_is_kept_and_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    changes = ("srpo.updates=4", *_LOOKS, "validation.best=reward", "srpo.learning_rate=1e-3")
    config = quick_config(run, *changes)
    trainer = Trainer(config)
    values = iter([0.0, 3.0, 1.0, 2.0, 0.0])  # of steps 0 to 4
    original = Looker.look

    def told(looker: Looker, start: object) -> object:
        seen = original(looker, start)  # type: ignore[arg-type]
        return replace(seen, measured={**seen.measured, "reward": {"a": next(values)}})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Looker, "look", told)
        trainer.fit()
    assert best_step(run) == 1
    assert Checkpoints(run / "checkpoints", 2).steps() == [1, 3, 4]
    assert main(["export", str(run), "--best", "--out", f"{tmp_path}/exported"]) == 0
    saved = load_file(next((tmp_path / "exported/transformer").glob("*.safetensors")))
    wanted = trainer.checkpoints.load(1)
    assert all(torch.equal(wanted[name], tensor) for name, tensor in saved.items())
    assert main(["sample", str(run), "--best", "--prompt", "digit one", "--out", f"{tmp_path}/images"]) == 0
    # What is best is found again in the log, among the checkpoints that are there.
    (run / "best.json").unlink()
    shutil.rmtree(run / "checkpoints/step-000001")
    Trainer(quick_config(run, *changes), resume=True)
    assert best_step(run) == 3
    (run / "best.json").unlink()
    capsys.readouterr()
    assert main(["export", str(run), "--best", "--out", f"{tmp_path}/no"]) == 2
    assert "--best: no best checkpoint is named (validation.best)" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["best=diversity", "stop={diversity: 1}", "stop={grid_patch: 1, diversity: 1}"])
def test_a_limit_that_could_never_be_passed_is_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"diversity cannot be measured in this run .* two images of a prompt"):
        Trainer(quick_config(tmp_path, *_LOOKS, "validation.noises=1", f"validation.{key}")).fit()
    assert read_log(tmp_path) == []


# --- reports --------------------------------------------------------------------------------------------------------


def test_report_of_a_run_in_progress_and_without_validation(whole: Path, tmp_path: Path) -> None:
    page = training_report(whole).read_text()
    for heading in ("Samples", "Monitors", "Training", "Time", "Data", "Config"):
        assert f"<h2>{heading}</h2>" in page
    assert "finished: 3 of 3 updates" in page
    assert 'name="viewport"' in page
    assert page.count("<svg") == 4 + 14  # drift of three noise levels is one picture
    started = tmp_path / "started"
    started.mkdir()
    shutil.copy(whole / "config.yaml", started)
    assert "0 of 3 updates so far" in training_report(started).read_text()
    events = (whole / "log.jsonl").read_text().splitlines(keepends=True)
    (started / "log.jsonl").write_text("".join(events[:5]) + '{"event": "upd')
    assert main(["report", str(started)]) == 0
    page = (started / "report.html").read_text()
    assert "1 of 3 updates so far" in page
    plain = "".join(line for line in events if '"validation"' not in line)
    (started / "log.jsonl").write_text(plain)
    page = training_report(started).read_text()
    assert "<h2>Monitors</h2>" not in page
    assert "<h2>Training</h2>" in page
    with pytest.raises(InputError, match="is not a run directory"):
        training_report(tmp_path)


def test_charts_place_what_they_are_given() -> None:
    points = [0, 1, 2, 3, 4], [1.0, 3.0, math.nan, 2.0, None]
    page = line_chart(
        "A < B", "update", {"one & only": points}, {"step 0": [1.0], "warn": [0.0, 4.0], "stop": [math.nan]}
    )
    chart = ET.fromstring(page)
    lines = [line.get("points").split() for line in chart.iter("polyline")]
    assert [len(line) for line in lines] == [2, 1]  # gaps where there is no number
    (first, second), (third,) = ([tuple(map(float, point.split(","))) for point in line] for line in lines)
    assert (second[0] - first[0]) * 2 == pytest.approx(third[0] - second[0], abs=0.2)
    assert first[1] - third[1] == pytest.approx(third[1] - second[1], abs=0.2)  # up is less
    texts = ["".join(text.itertext()) for text in chart.iter("text")]
    assert texts[0] == "A < B"
    assert {"0", "1", "2", "3", "4", "update"} <= set(texts)
    assert len([path for path in chart.iter("path") if path.get("stroke-dasharray")]) == 3
    for values in ([5.0], [0.0, 0.0], [1e-9, 2e-9], [-3e7, 4e7], [math.nan]):
        ET.fromstring(line_chart("x", "update", {"y": (range(len(values)), values)}))


# --- refused before any work ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["validation.noises=0"], "validation.noises must be at least 1, got 0"),
        (["validation.drift_sigmas=[]"], "validation.drift_sigmas must be levels between 0 and 1"),
        (["validation.drift_sigmas=[1.0]"], "validation.drift_sigmas must be levels between 0 and 1"),
        (["validation.warn={cromha: 1}"], "validation.warn: unknown monitor 'cromha': did you mean 'chroma'"),
        (["validation.stop={zzz: 1}"], "validation.stop: unknown monitor 'zzz': monitors are reward, swapped"),
        (["validation.stop={chroma: lots}"], "validation.stop.chroma must be a number in the monitor's unit"),
        (["validation.best=lab_a"], "validation.best lab_a has no best value"),
        (["validation.best=drift"], "validation.best drift has no best value but step 0's"),
        (["validation.best=held_out"], "asks for validation.held_out, which names no reward"),
        (
            ["validation.best=reward", "run.save_every=2", "run.sample_every=3"],
            r"run.sample_every \(3\) must be a mult",
        ),
        (["validation.stop={chroma: 1}", "run.sample_every=0"], "need run.sample_every: with 0 nothing is measured"),
        (["validation.held_out={path: x, wieght: 2}"], "validation.held_out.*wieght"),
        (["validation.held_out={path: tiny}"], "validation.held_out must not be what the run trains on: tiny"),
        (["validation.alignment={path: nowhere}"], "reward directory nowhere is incomplete"),
        (["validation.sizes=[[36, 32]]"], "height must be a positive multiple of 8 for this model, got 36"),
        (["validation.prompts=nowhere.txt"], "prompt file nowhere.txt cannot be read"),
        (["run.wandb={mode: sometimes}"], "run.wandb.mode"),
    ],
)
def test_bad_input_leaves_no_run_directory(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        Trainer(quick_config(tmp_path / "run", "run.sample_every=1", "run.save_every=1", *overrides))
    assert not (tmp_path / "run").exists()
