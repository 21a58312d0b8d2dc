"""The training loop: exact resumption, modes, faults, frozen parts."""

from __future__ import annotations

import json
import random
import shutil
from collections import namedtuple
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import quick_config, state_of
from torch.utils._python_dispatch import TorchDispatchMode

import srpo.batches
from srpo.checkpoint import Checkpoints, SaveError
from srpo.distributed import Ranks
from srpo.errors import InputError
from srpo.models import Flux
from srpo.runlog import read_log
from srpo.sealed import content_digest
from srpo.tiny.digits import export_images
from srpo.trainer import NonFiniteError, Trainer


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    export_images(folder, 12, 0)
    return folder


def modes(images: Path) -> dict[str, list[str]]:
    source = f"data.images={json.dumps(str(images))}"
    return {
        "online": [],
        "online-reuse": ["run.draws_per_rollout=2"],
        "online-shared": ["srpo.noise=shared"],
        "offline": ["data.mode=offline", source],
        "mixed": ["data.mode=mixed", source],
        "image-only": ["srpo.form=image_only"],
    }


@pytest.mark.parametrize("mode", ["online", "online-reuse", "online-shared", "offline", "mixed", "image-only"])
def test_resumed_run_is_bitwise_the_uninterrupted_one(mode: str, images: Path, tmp_path: Path) -> None:
    changes = modes(images)[mode]
    Trainer(quick_config(tmp_path / "whole", "srpo.updates=3", *changes)).fit()
    part = random.Random(mode).randint(1, 2)
    Trainer(quick_config(tmp_path / "parts", f"srpo.updates={part}", *changes)).fit()
    resumed = Trainer(quick_config(tmp_path / "parts", "srpo.updates=3", *changes), resume=True)
    assert resumed.start == part
    resumed.fit()
    assert state_of(tmp_path / "whole", 3) == state_of(tmp_path / "parts", 3)
    without_times = [
        [{key: value for key, value in record.items() if key != "seconds"} for record in read_log(tmp_path / run)]
        for run in ("whole", "parts")
    ]
    assert without_times[0] == without_times[1]


def test_seed_changes_the_run(tmp_path: Path) -> None:
    for seed in (0, 1):
        Trainer(quick_config(tmp_path / str(seed), "srpo.updates=1", f"run.seed={seed}")).fit()
    assert state_of(tmp_path / "0", 1) != state_of(tmp_path / "1", 1)


@pytest.mark.parametrize("form", ["difference", "cfg"])
def test_relative_forms_train(form: str, tmp_path: Path) -> None:
    Trainer(quick_config(tmp_path / "official", "srpo.updates=1")).fit()
    Trainer(quick_config(tmp_path / form, "srpo.updates=1", f"srpo.form={form}")).fit()
    assert read_log(tmp_path / form)[0]["scores"] != read_log(tmp_path / "official")[0]["scores"]


def test_offline_mode_never_rolls_out(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("rollout called")

    monkeypatch.setattr(srpo.batches, "rollout", forbidden)
    trainer = Trainer(quick_config(tmp_path, "srpo.updates=1", *modes(images)["offline"]))
    x0, noise, captions, forwards = trainer.batches.load(0, 0, lambda: None)
    assert forwards == 0
    assert x0.shape == noise.shape == (2, 16, 16)
    assert all(caption.text.startswith("digit ") for caption in captions)
    trainer.fit()


def test_reuse_halves_the_rollouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = srpo.batches.rollout
    monkeypatch.setattr(srpo.batches, "rollout", lambda *a, **k: calls.append(1) or original(*a, **k))
    Trainer(quick_config(tmp_path / "a", "srpo.updates=1")).fit()
    Trainer(quick_config(tmp_path / "b", "srpo.updates=1", "run.draws_per_rollout=2")).fit()
    assert len(calls) == 2 + 1
    assert len(read_log(tmp_path / "b")[0]["timesteps"]) == 2


def test_noise_is_shared_or_independent(tmp_path: Path) -> None:
    def noises(kind: str) -> list[torch.Tensor]:
        trainer = Trainer(quick_config(tmp_path / kind, f"srpo.noise={kind}"))
        drawn = []
        for rank in (0, 1):
            trainer.batches._ranks = Ranks(rank, 1, torch.device("cpu"))
            drawn += [trainer.batches.load(0, index, lambda: None)[1] for index in (0, 1)]
        return drawn

    shared, independent = noises("shared"), noises("independent")
    assert all(torch.equal(noise, shared[0]) for noise in shared)
    assert shared[0].shape[0] == 1
    rows = torch.cat(independent).flatten(1)
    assert len(rows.unique(dim=0)) == len(rows) == 8


def test_any_number_of_ranks_draws_the_same(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts, noises and timesteps of an update; and so of one after a resumption on another number of ranks."""
    changes = ["srpo.batch_size=8", "run.micro_batch=1", "run.draws_per_rollout=2", *modes(images)["mixed"]]
    trainer = Trainer(quick_config(tmp_path, *changes))
    monkeypatch.setattr(srpo.batches, "rollout", lambda _, noise, *__, **___: noise)
    batches, update = trainer.batches, trainer.update

    def draws(step: int, world: int) -> set[tuple[object, ...]]:
        batches.count = srpo.batches.clean_batches(trainer.config, world)
        found = set()
        for rank in range(world):
            batches._ranks = Ranks(rank, world, torch.device("cpu"))
            for index in range(batches.count):
                batch = batches.load(step, index, lambda: None)
                contents = (content_digest({"x0": batch.x0, "noise": batch.noise}), batch.captions[0].text)
                for number in range(2):
                    draw = update.draw(step, f"{batches.number(index)}/{number}", batch)
                    found.add((*contents, draw.timestep, draw.loss.item()))
        return found

    for step in random.Random(0).sample(range(1000), 2):
        one = draws(step, 1)
        assert len({contents for contents, *_ in one}) == 4, "batches of one image, two draws of each"
        assert draws(step, 2) == draws(step, 4) == one


def test_prompts_of_ranks_and_steps_do_not_repeat_within_an_epoch(tmp_path: Path) -> None:
    trainer = Trainer(quick_config(tmp_path, "srpo.batch_size=2", "run.micro_batch=1"))
    seen = []
    for step in range(5):
        for rank in (0, 1):
            trainer.batches._ranks = Ranks(rank, 2, torch.device("cpu"))
            trainer.batches.count = 1
            seen += trainer.batches.load(step, 0, lambda: None)[2]
    assert len(set(seen)) == len(seen) == 10  # all ten prompts of the tiny world, once


def test_only_the_transformer_learns(tmp_path: Path) -> None:
    trainer = Trainer(quick_config(tmp_path, "srpo.updates=1"))
    frozen = [trainer.flux.vae, trainer.flux.pipeline.text_encoder, trainer.flux.pipeline.text_encoder_2]
    frozen.append(trainer.reward.model)
    before = [parameter.clone() for module in frozen for parameter in module.parameters()]
    trainer.fit()
    after = [parameter for module in frozen for parameter in module.parameters()]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert all(parameter.grad is None for parameter in after)
    assert all(parameter.grad is not None for parameter in trainer.parameters)


class _WeightGradients(TorchDispatchMode):
    """Counts convolutions asked for the gradient of a weight or bias."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if func is torch.ops.aten.convolution_backward.default:
            self.count += any(args[-1][1:])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kernels", ["auto", "off"])
def test_frozen_image_path_gets_no_weight_gradient(kernels: str, tmp_path: Path) -> None:
    trainer = Trainer(quick_config(tmp_path, "srpo.updates=1", f"model.kernels={kernels}"))
    loss = trainer.update.draw(0, "0/0", trainer.batches.load(0, 0, lambda: None)).loss
    with _WeightGradients() as found:
        loss.backward()
    assert found.count == 0


def test_checkpointing_changes_nothing(tmp_path: Path) -> None:
    for mode in ("none", "selective", "block", "auto"):
        Trainer(quick_config(tmp_path / mode, "srpo.updates=1", f"model.checkpointing={mode}")).fit()
    for mode in ("selective", "block", "auto"):
        assert state_of(tmp_path / "none", 1) == state_of(tmp_path / mode, 1)


def _start_event(directory: Path) -> dict:
    return json.loads((directory / "log.jsonl").read_text().splitlines()[0])


def test_patched_by_default_and_logged(tmp_path: Path) -> None:
    for name, kernels in (("auto", "auto"), ("off", "off"), ("some", "[gelu_tanh, gelu_concat]")):
        Trainer(quick_config(tmp_path / name, "srpo.updates=2", f"model.kernels={kernels}")).fit()
    events = {name: _start_event(tmp_path / name) for name in ("auto", "off", "some")}
    assert events["off"]["kernels"] == "off"
    assert "modules patched, 0 refused" in events["auto"]["kernels"]
    assert "joint_qk_norm_rope" in events["auto"]["kernels"]
    assert "joint_qk_norm_rope" not in events["some"]["kernels"]
    assert events["auto"]["checkpointing"].startswith("activation checkpointing: none")
    for name in ("auto", "some"):
        for ours, plain in zip(read_log(tmp_path / name), read_log(tmp_path / "off"), strict=True):
            assert ours["losses"]["total"] == pytest.approx(plain["losses"]["total"], rel=1e-5)
            assert ours["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("form", ["official", "image_only"])
def test_text_towers_run_in_their_own_phase_once_a_prompt(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(quick_config(tmp_path, "srpo.updates=3", "run.draws_per_rollout=2", f"srpo.form={form}"))
    towers = [trainer.flux.pipeline.text_encoder, trainer.flux.pipeline.text_encoder_2, trainer.reward.model.text_model]
    calls, allowed = [], []

    def called(tower: torch.nn.Module, *_: object) -> None:
        assert allowed, "a text tower ran outside its phase"
        calls.append(tower)

    for tower in towers:
        tower.register_forward_pre_hook(called)
    embed = trainer.batches.embed_texts

    def phase(*batch: Any) -> None:
        allowed.append(True)
        embed(*batch)
        allowed.clear()

    monkeypatch.setattr(trainer.batches, "embed_texts", phase)
    trainer.fit()
    captions = {caption for step in range(3) for caption in trainer.batches.chosen(step, 0)[0]}
    words = 1 if form == "image_only" else 2
    assert [calls.count(tower) for tower in towers] == [len(captions), len(captions), words * len(captions)]
    for record in read_log(tmp_path):
        assert list(record["seconds"]) == ["text", "rollout", "gradient", "optimizer"]


def test_text_cache_changes_nothing_and_may_move(tmp_path: Path) -> None:
    cached = f"reward.text_cache={tmp_path / 'texts'}"
    Trainer(quick_config(tmp_path / "plain", "srpo.updates=2")).fit()
    Trainer(quick_config(tmp_path / "cached", "srpo.updates=1", cached)).fit()
    written = set((tmp_path / "texts").iterdir())
    assert written
    Trainer(quick_config(tmp_path / "again", "srpo.updates=1", cached)).fit()
    assert set((tmp_path / "texts").iterdir()) == written
    moved = quick_config(tmp_path / "cached", "srpo.updates=2", f"reward.text_cache={tmp_path / 'elsewhere'}")
    trainer = Trainer(moved, resume=True)
    trainer.reward.release_text_tower("meta")  # where it could embed nothing: all has been
    trainer.fit()
    assert state_of(tmp_path / "plain", 2) == state_of(tmp_path / "cached", 2)


def test_gradient_is_the_mean_over_draws_and_clipped(tmp_path: Path) -> None:
    trainer = Trainer(quick_config(tmp_path, "srpo.updates=1", "srpo.max_grad_norm=1e-3"))
    gradients = [torch.zeros_like(parameter) for parameter in trainer.parameters]
    for index in range(2):
        batch = trainer.batches.load(0, index, lambda: None)
        trainer.update.draw(0, f"{index}/0", batch).loss.backward()
    for total, parameter in zip(gradients, trainer.parameters, strict=True):
        total += parameter.grad / 2
    trainer._step(0, lambda: None)
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    assert norm > 1e-3
    moments = trainer.optimizer.canonical_state_dict()["state"]
    for index, total in enumerate(gradients):
        clipped = moments[index]["exp_avg"] / (1 - trainer.config.srpo.betas[0])
        torch.testing.assert_close(clipped, total * (1e-3 / norm), rtol=1e-4, atol=1e-9)


def test_controls_cycle_with_the_step(tmp_path: Path) -> None:
    words = ["data.control_group=null", "srpo.positive_controls=[bold, wide]", "srpo.negative_controls=[thin]"]
    Trainer(quick_config(tmp_path, "srpo.updates=3", *words)).fit()
    assert [record["controls"] for record in read_log(tmp_path)] == [
        ["bold", "thin"],
        ["wide", "thin"],
        ["bold", "thin"],
    ]


# --- faults -----------------------------------------------------------------------------------


class _Poisoned:
    """A reward that goes bad for one prompt from the second update on."""

    def __init__(self, reward: object, poison: float) -> None:
        self.reward, self.poison, self.calls = reward, poison, 0

    def embed_prompts(self, prompts: list[str]) -> torch.Tensor:
        return self.reward.embed_prompts(prompts)

    def relative(self, images: torch.Tensor, positive: list[str], *rest: object) -> torch.Tensor:
        self.calls += 1
        scores = self.reward.relative(images, positive, *rest)
        factor = torch.ones_like(scores)
        if self.calls > 2:
            factor[-1] = self.poison
        return scores * factor


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_non_finite_score_names_step_branch_and_prompt(poison: float, tmp_path: Path) -> None:
    trainer = Trainer(quick_config(tmp_path, "srpo.updates=3", "run.save_every=1"))
    trainer.update._reward = _Poisoned(trainer.reward, poison)
    with pytest.raises(
        NonFiniteError, match=r"update 2: the inversion branch scored -?(nan|inf) for prompt 'digit \w+'"
    ):
        trainer.fit()
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2)
    assert checkpoints.latest() == 1
    saved = checkpoints.load(1)
    for name, parameter in trainer.flux.transformer.state_dict().items():
        assert torch.equal(saved[name], parameter)


def test_non_finite_gradient_does_not_reach_the_weights(tmp_path: Path) -> None:
    trainer = Trainer(quick_config(tmp_path, "srpo.updates=2"))
    before = [parameter.clone() for parameter in trainer.parameters]
    trainer.parameters[3].register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(NonFiniteError, match=r"update 1: the gradient norm is nan \(prompts: digit"):
        trainer.fit()
    assert all(torch.equal(old, new) for old, new in zip(before, trainer.parameters, strict=True))


def test_full_disk_keeps_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(quick_config(tmp_path, "srpo.updates=3", "run.save_every=1"))
    usage = namedtuple("usage", "total used free")

    def fill(step: int) -> None:
        if step == 1:
            trainer.saver.finish()
            monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))

    with pytest.raises(SaveError, match=r"checkpoint of step 2 could not be saved .*disk full.*step 1 is untouched"):
        trainer.fit(fill)
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2)
    assert checkpoints.latest() == 1
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


# --- refused before any work ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["srpo.threshold=5"], r"srpo.threshold 5.0 has no meaning for this reward, .* within \+-2.3"),
        (["srpo.threshold=-9"], "srpo.threshold -9.0 has no meaning"),
        (["srpo.batch_size=5"], r"srpo.batch_size \(5\) must be a multiple of .* = 2"),
        (["srpo.height=36"], "height must be a positive multiple of 8 for this model, got 36"),
        (["model.path=nowhere"], "model directory nowhere does not exist"),
        (["reward.path=nowhere"], "reward directory nowhere is incomplete"),
        (["data.prompts=nowhere.txt"], "prompt file nowhere.txt cannot be read"),
        (["data.mode=offline", "data.images=nowhere"], "image folder nowhere does not exist"),
    ],
)
def test_bad_input_leaves_no_run_directory(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        Trainer(quick_config(tmp_path / "run", *overrides))
    assert not (tmp_path / "run").exists()


def test_run_directory_belongs_to_one_run(tmp_path: Path) -> None:
    make = partial(quick_config, tmp_path / "run", "srpo.updates=1")
    with pytest.raises(InputError, match="holds no run to resume"):
        Trainer(make(), resume=True)
    Trainer(make()).fit()
    with pytest.raises(InputError, match="already holds a run; give --resume"):
        Trainer(make())
    with pytest.raises(InputError, match=r"another config: srpo.learning_rate was 9e-05, is 0.1"):
        Trainer(make("srpo.learning_rate=0.1"), resume=True)
    state = tmp_path / "run/checkpoints/step-000001/state.json"
    forged = json.loads(state.read_text())
    forged["config"] = forged["config"].replace("seed: 0", "seed: 7")
    state.write_text(json.dumps(forged))
    with pytest.warns(UserWarning, match="is damaged"):  # the hash no longer fits: not used at all
        assert Trainer(make("srpo.updates=2"), resume=True).start == 0


def test_checkpoint_of_another_config_is_refused(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 7)):
        Trainer(quick_config(tmp_path / name, "srpo.updates=1", f"run.seed={seed}")).fit()
    shutil.rmtree(tmp_path / "a/checkpoints")
    shutil.copytree(tmp_path / "b/checkpoints", tmp_path / "a/checkpoints")
    with pytest.raises(
        InputError, match=r"checkpoint .*step-000001 was made with another config: run.seed was 7, is 0"
    ):
        Trainer(quick_config(tmp_path / "a", "srpo.updates=2"), resume=True)


def test_foreign_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.txt").write_text("do not touch")
    with pytest.raises(InputError, match="is not empty and holds no run"):
        Trainer(quick_config(tmp_path / "run"))


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_trainable_weights_are_what_the_optimizer_wants(weights: str, flux_shaped: Path) -> None:
    flux = Flux.load(flux_shaped, precision="bf16", trainable=True, weights=weights)
    assert flux.transformer.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[weights]
    assert flux.vae.dtype == torch.bfloat16


@pytest.fixture
def low_precision(flux_shaped: Path, clip_shaped: Path, tmp_path: Path) -> list[str]:
    """Overrides for a bf16 run on a FLUX-shaped model."""
    (tmp_path / "prompts.txt").write_text("a photo of a dog\na red car\n")
    changes = [f"model.path={flux_shaped}", f"reward.path={clip_shaped}", f"data.prompts={tmp_path}/prompts.txt"]
    return [*changes, "model.precision=bf16", "srpo.learning_rate=1e-5", "srpo.batch_size=2", "run.micro_batch=1"]


def test_split_weights_resume_bitwise_and_keep_what_bf16_drops(low_precision: list[str], tmp_path: Path) -> None:
    whole = Trainer(quick_config(tmp_path / "whole", *low_precision, "srpo.updates=2"))
    start = {name: parameter.detach().float() for name, parameter in zip(whole.names, whole.parameters, strict=True)}
    whole.fit()
    Trainer(quick_config(tmp_path / "parts", *low_precision, "srpo.updates=1")).fit()
    Trainer(quick_config(tmp_path / "parts", *low_precision, "srpo.updates=2"), resume=True).fit()
    assert state_of(tmp_path / "whole", 2) == state_of(tmp_path / "parts", 2)
    assert all(parameter.dtype == torch.bfloat16 for parameter in whole.parameters)
    moved = sum(
        (master != start[name]).sum()
        for name, master in zip(whole.names, whole.optimizer.master_weights(), strict=True)
    )
    (first, last) = read_log(tmp_path / "whole")
    count = sum(parameter.numel() for parameter in whole.parameters)
    assert moved > 0.5 * count  # weights moved that bf16 shows as standing still
    assert 0 < last["changed"] < 0.5
    assert last["nonfinite"] == 0
    assert first["update_ratio"] > 0


def test_torch_s_optimizer_trains_the_same(tmp_path: Path) -> None:
    for name in ("srpo", "torch"):
        Trainer(quick_config(tmp_path / name, "srpo.updates=2", f"optimizer.name={name}")).fit()
    for ours, theirs in zip(read_log(tmp_path / "srpo"), read_log(tmp_path / "torch"), strict=True):
        assert ours["losses"]["total"] == pytest.approx(theirs["losses"]["total"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_groups_that_share_parameters_divide_the_ranks(tmp_path: Path) -> None:
    config = quick_config(tmp_path, "srpo.batch_size=8", "run.micro_batch=1", "run.sharding=hsdp", "run.shard_size=3")
    with pytest.raises(InputError, match=r"run\.shard_size \(3\) must divide the number of ranks, 4"):
        srpo.batches.clean_batches(config, 4)
    assert srpo.batches.clean_batches(config, 1) == 8
