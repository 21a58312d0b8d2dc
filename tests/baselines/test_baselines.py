"""Recipes of the baselines, and their runs: what is refused, resumed, learnt and counted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import environment, quick_config, state_of
from PIL import Image
from torch import Tensor

from srpo.algorithm import Seconds
from srpo.baselines.config import ALGORITHMS, BASELINES, DanceGRPOConfig
from srpo.config import TrainConfig, dump_config, load_config
from srpo.distributed import Ranks
from srpo.errors import InputError
from srpo.export import export_run
from srpo.hardware import GPUS
from srpo.plan import make_plan
from srpo.rewards import Reward
from srpo.runlog import read_log
from srpo.trainer import NonFiniteError, Trainer

#: A small update of each, towards bold digits.
RUNS = {
    "direct_align": ("direct_align.control=true",),
    "refl": ("refl.control=true",),
    "draft": ("draft.control=true", "draft.lv=2"),
    "dancegrpo": (
        "dancegrpo.control=true",
        "dancegrpo.generations=4",
        "dancegrpo.optimizer_steps=2",
        "srpo.rollout_steps=3",
    ),
}


def config(directory: Path, algorithm: str, *overrides: str) -> TrainConfig:
    return quick_config(directory, f"algorithm={algorithm}", *RUNS[algorithm], *overrides)


# --- recipes ----------------------------------------------------------------------------------


def test_every_algorithm_has_its_numbers_in_the_resolved_recipe(tmp_path: Path) -> None:
    assert {"srpo", *BASELINES} == set(ALGORITHMS)
    for algorithm in BASELINES:
        made = load_config("tiny", [f"algorithm={algorithm}"])
        assert made.baseline == BASELINES[algorithm]()
        (tmp_path / "again.yaml").write_text(dump_config(made))
        assert load_config(tmp_path / "again.yaml") == made
    plain = load_config("tiny")
    assert plain.baseline is None
    assert not any(f"\n{name}:" in dump_config(plain) for name in BASELINES)


def test_published_numbers() -> None:
    """Of DanceGRPO's script for FLUX, and of ReFL.py: late steps 30 to 39 of 40."""
    made = load_config("flux-dev-dancegrpo")
    assert made.dancegrpo == DanceGRPOConfig(False, 12, 3, 0.3, 0.6, 1e-4, 5.0)
    objective = made.srpo
    assert (objective.rollout_steps, objective.shift, objective.height, objective.guidance) == (16, 3.0, 720, 3.5)
    assert (objective.learning_rate, objective.weight_decay, objective.max_grad_norm) == (1e-5, 1e-4, 1.0)
    assert made.dancegrpo.trained_steps(16) == 9
    refl = load_config("flux-dev-refl")
    assert refl.refl is not None
    assert (refl.refl.threshold, refl.refl.weight, refl.srpo.rollout_steps) == (2.0, 1e-3, 40)
    assert 40 - round(40 * refl.refl.late) == 30
    draft = load_config("flux-dev-draft").draft
    assert draft is not None
    assert (draft.k, draft.lv) == (1, 2)
    assert load_config("flux-dev-direct-align").srpo == load_config("flux-dev-hps").srpo


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algorithm=dancegpro"], "algorithm must be one of srpo, .*, got 'dancegpro'; did you mean 'dancegrpo'?"),
        (["algorithm=7"], "algorithm must be one of srpo, .*, got 7"),
        (["algorithm=refl", "refl.wieght=1"], r"unknown key 'refl.wieght': did you mean 'refl.weight'\?"),
        (["refl.weight=1"], "section refl is for algorithm refl, but algorithm is srpo"),
        (["algorithm=draft", "refl.weight=1"], "section refl is for algorithm refl, but algorithm is draft"),
        (["algorithm=refl", "refl.late=0"], r"refl.late must be in \(0, 1\], got 0"),
        (["algorithm=refl", "refl.weight=-1"], "refl.weight must be positive and finite, got -1"),
        (["algorithm=refl", "refl.threshold=.inf"], "refl.threshold must be a finite number or null, got inf"),
        (["algorithm=draft", "draft.k=0"], "draft.k must be at least 1, got 0"),
        (["algorithm=draft", "draft.k=11"], "draft.k must be at most srpo.rollout_steps, 10, got 11"),
        (["algorithm=draft", "draft.k=2", "draft.lv=1"], "draft.lv must be 0 unless draft.k is 1, got 1"),
        (["algorithm=dancegrpo", "dancegrpo.generations=1"], "dancegrpo.generations must be at least 2, got 1"),
        (
            ["algorithm=dancegrpo", "dancegrpo.optimizer_steps=5"],
            "dancegrpo.optimizer_steps must be a divisor of dancegrpo.generations, 12, got 5",
        ),
        (["algorithm=dancegrpo", "srpo.rollout_steps=2"], "dancegrpo.timestep_fraction 0.6 .* is none"),
        (["algorithm=dancegrpo", "dancegrpo.eta=0"], "dancegrpo.eta must be positive and finite, got 0"),
        (["algorithm=refl", "run.draws_per_rollout=2"], "run.draws_per_rollout must be 1 for algorithm refl, got 2"),
        (
            ["algorithm=draft", "data.mode=offline", "data.images=images"],
            "data.mode must be online for algorithm draft, got offline",
        ),
    ],
)
def test_what_an_algorithm_does_not_take_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config("tiny", overrides)


def test_plans_are_for_srpo() -> None:
    with pytest.raises(InputError, match="plans are reckoned for algorithm srpo only, got refl"):
        make_plan("tiny", load_config("tiny", ["algorithm=refl"]), GPUS["H200"])


# --- runs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", RUNS)
def test_resumed_run_is_bitwise_the_uninterrupted_one(algorithm: str, tmp_path: Path) -> None:
    Trainer(config(tmp_path / "whole", algorithm, "srpo.updates=2")).fit()
    Trainer(config(tmp_path / "parts", algorithm, "srpo.updates=1")).fit()
    Trainer(config(tmp_path / "parts", algorithm, "srpo.updates=2"), resume=True).fit()
    assert state_of(tmp_path / "whole", 2) == state_of(tmp_path / "parts", 2)
    records = [read_log(tmp_path / run) for run in ("whole", "parts")]
    for ours, theirs in zip(*records, strict=True):
        assert ours | {"seconds": None} == theirs | {"seconds": None}
        assert list(ours["seconds"]) == ["text", "rollout", "gradient", "optimizer"]
    with pytest.raises(InputError, match="another config: algorithm was"):
        Trainer(quick_config(tmp_path / "whole", "srpo.updates=3"), resume=True)


@pytest.mark.parametrize("algorithm", RUNS)
def test_a_few_updates_raise_the_reward(algorithm: str, tmp_path: Path) -> None:
    """On the prompts and noise of the first update."""
    changes = ["srpo.batch_size=8", "run.micro_batch=8", "srpo.rollout_steps=4", "srpo.learning_rate=1e-4"]
    if algorithm == "dancegrpo":
        changes += ["dancegrpo.eta=0.7", "dancegrpo.clip_range=0.01", "dancegrpo.generations=8"]
        changes += ["srpo.batch_size=4", "run.micro_batch=4"]
    trainer = Trainer(config(tmp_path, algorithm, *changes, "srpo.updates=3"))
    trainer.fit()
    draws = trainer.update.accumulate(0, lambda: None, Seconds(torch.device("cpu")))
    (before, *_), after = read_log(tmp_path), trainer.update.record(0, draws)
    (name,) = before["scores"]
    # With the same noise, weights that have not moved score the same.
    assert after["scores"][name] > before["scores"][name] + 0.005


@pytest.mark.parametrize(
    ("algorithm", "overrides", "forwards"),
    [
        ("srpo", [], 4 * 2 + 8 * 3),
        ("srpo", ["run.draws_per_rollout=2", "model.checkpointing=block"], 2 * 2 + 8 * 4),
        ("direct_align", [], 4 * 2 + 4 * 3),
        ("refl", ["srpo.rollout_steps=4"], 4 * 3 + 4 * 3),
        ("draft", [], 4 * 1 + 12 * 3),
        ("draft", ["draft.lv=0", "draft.k=2", "srpo.rollout_steps=5"], 4 * 3 + 4 * 3 + 4 * 4),
        ("dancegrpo", ["model.checkpointing=selective"], 16 * 3 + 16 * 3),
    ],
)
def test_log_counts_forward_passes(algorithm: str, overrides: list[str], forwards: int, tmp_path: Path) -> None:
    made = quick_config(tmp_path, f"algorithm={algorithm}", *RUNS.get(algorithm, ()), *overrides, "srpo.updates=1")
    trainer = Trainer(made)
    calls = []

    def called(_: torch.nn.Module, __: tuple[()], given: dict[str, torch.Tensor]) -> None:
        calls.append((len(given["hidden_states"]), torch.is_grad_enabled()))

    trainer.flux.unpatch()  # rollouts of a patched model do not call it as a whole
    trainer.flux.transformer.register_forward_pre_hook(called, with_kwargs=True)
    trainer.fit()
    (record,) = read_log(tmp_path)
    assert record["forwards"] == forwards
    repeats = 2 if made.model.checkpointing == "block" else 1
    assert sum(rows * (2 + repeats if grad else 1) for rows, grad in calls) == forwards + (
        # A step that is computed again is called with gradients twice, and goes backward once.
        2 * 4 * (made.draft.k - 1) if made.draft else 0
    )


def test_images_of_a_prompt_differ_from_one_noise(tmp_path: Path) -> None:
    trainer = Trainer(config(tmp_path, "dancegrpo"))
    group = trainer.update.load(0, 1, lambda: None)
    assert len(group) == 4
    assert all(torch.equal(image.states[0], trainer.batches.noise(0, 1)) for image in group)
    ends = torch.stack([image.states[-1] for image in group])
    assert len(ends.flatten(1).unique(dim=0)) == 4


@pytest.mark.parametrize("algorithm", ["refl", "dancegrpo"])
def test_non_finite_score_ends_the_run_before_it_reaches_the_weights(algorithm: str, tmp_path: Path) -> None:
    trainer = Trainer(config(tmp_path, algorithm, "srpo.updates=1"))
    before = [parameter.clone() for parameter in trainer.parameters]
    score = trainer.reward.score
    trainer.reward.score = lambda images, prompts: score(images, prompts) * float("nan")  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError, match=r"update 1: the \w+ branch scored nan for prompt 'digit \w+'"):
        trainer.fit()
    assert all(torch.equal(old, new) for old, new in zip(before, trainer.parameters, strict=True))


def test_direct_align_learns_from_real_images(tmp_path: Path) -> None:
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "0.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "digit one"}')
    offline = ["data.mode=offline", f"data.images={json.dumps(str(tmp_path))}", "srpo.updates=1"]
    Trainer(config(tmp_path / "run", "direct_align", *offline)).fit()
    assert read_log(tmp_path / "run")[0]["forwards"] == 4 * 3


def test_export_says_what_the_algorithm_was(tmp_path: Path) -> None:
    Trainer(config(tmp_path / "run", "draft", "srpo.updates=1")).fit()
    card = (export_run(tmp_path / "run", tmp_path / "out") / "README.md").read_text()
    assert "# DRaFT fine-tuning of tiny" in card
    assert "| lv | 2 |" in card
    assert "control words" not in card


# --- ranks ------------------------------------------------------------------------------------

RANKS = ("srpo.batch_size=4", "run.micro_batch=1", "srpo.noise=independent", "run.seed=1")


@pytest.mark.parametrize("algorithm", RUNS)
def test_ranks_share_out_the_gradient_of_one(algorithm: str, tmp_path: Path) -> None:
    """The mean of what two ranks have, in one process, is what one has: the same draws, dealt out."""
    trainer = Trainer(config(tmp_path, algorithm, *RANKS))
    found = []
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        trainer.batches._ranks = Ranks(rank, world, torch.device("cpu"))
        trainer.batches.count = 4 // world
        trainer.optimizer.zero_grad()
        trainer.update.accumulate(0, lambda: None, Seconds(torch.device("cpu")))
        found.append(torch.cat([parameter.grad.flatten() for parameter in trainer.parameters]))
    one, first, second = found
    # All are sums of four terms, added in another order.
    terms = 4 * torch.finfo(torch.float32).eps * (first.norm() + second.norm())
    assert (one - (first + second) / 2).norm() < terms
    assert (first - second).norm() > 0.1 * one.norm()


def first_update(directory: Path, algorithm: str, *overrides: str) -> Trainer:
    trainer = Trainer(config(directory, algorithm, *RANKS, *overrides, "srpo.updates=1"))
    trainer.fit()
    return trainer


@pytest.mark.slow
def test_two_ranks_do_what_one_does(tmp_path: Path) -> None:
    """Sharded or not: the same scores of the same draws, and the same gradient."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    paths = environment(PYTHONPATH=str(Path(__file__).parent.parent))  # of helpers
    done = subprocess.run([*launch, tmp_path], env=paths, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for algorithm in RUNS:
        first_update(tmp_path / f"{algorithm}-one", algorithm)
        (one,) = read_log(tmp_path / f"{algorithm}-one")
        for kind in ("none", "fsdp"):
            (two,) = read_log(tmp_path / f"{algorithm}-{kind}")
            assert two["forwards"] == one["forwards"]
            assert two["scores"] == pytest.approx(one["scores"], rel=1e-5)
            assert two["losses"] == pytest.approx(one["losses"], rel=1e-4, abs=1e-6)
            assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


if __name__ == "__main__":
    for name in RUNS:
        for sharding in ("none", "fsdp"):
            first_update(Path(sys.argv[1]) / f"{name}-{sharding}", name, f"run.sharding={sharding}")


# --- relative scores --------------------------------------------------------------------------


def test_dancegrpo_s_rewards_may_be_relative_scores(tmp_path: Path) -> None:
    """Of a reward that cannot be differentiated: what it says of both prompts, by the cleanest level's kappa."""
    asked: list[tuple[list[str], list[str], list[float]]] = []

    class Rounded(Reward):
        def relative(self, images: Tensor, positive: list[str], negative: list[str], kappa: Tensor) -> Tensor:
            asked.append((positive, negative, kappa.tolist()))
            return (images.mean((1, 2, 3)) * 10).round()

        def score(self, images: Tensor, prompts: list[str]) -> Tensor:
            raise AssertionError(f"the plain score is not asked for: {len(images)} images, {prompts}")

        def limit(self, kappa: float) -> float:
            return 10 * (2 + kappa)

    relative = ("dancegrpo.control=false", "dancegrpo.relative=true", "srpo.discount_denoise=[0.2,0.9]")
    made = config(tmp_path / "run", "dancegrpo", *relative, "srpo.updates=1")
    Trainer(made, reward=lambda _: Rounded()).fit()
    [record] = read_log(tmp_path / "run")
    assert record["scores"]["policy"] > 1.0, "what the reward said, and no cosine"
    for positive, negative, kappa in asked:
        assert [text.partition(". ")[2] for text in positive] == [text.partition(". ")[2] for text in negative]
        assert all(text.startswith("bold. ") for text in positive)
        assert all(text.startswith("thin. ") for text in negative)
        assert kappa == pytest.approx([0.2] * len(positive))
    with pytest.raises(InputError, match=r"dancegrpo\.control must be false when relative is true, got True"):
        config(tmp_path, "dancegrpo", "dancegrpo.relative=true")
