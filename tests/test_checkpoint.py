"""Checkpoints are whole or not there."""

from __future__ import annotations

import copy
import json
import os
import resource
import shutil
import signal
import warnings
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import forked
from torch import Tensor, nn

from srpo.best import write_best
from srpo.checkpoint import Checkpoints, SaveError, load_weights
from srpo.errors import InputError
from srpo.saving import load_optimizer_tensors, optimizer_tensors

_FILES = ["transformer.safetensors", "optimizer.safetensors", "state.json", "COMMIT"]


def _state(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 3, generator=generator)
    model = {"a.weight": weight, "a.bias": torch.randn(4, generator=generator).bfloat16()}
    return {**model, "a.weight/exp_avg": weight * 2, "a.weight/step": torch.tensor(float(seed))}


def _save(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        checkpoints.save(step, _state(step), f"config of {step}")


def _assert_holds(checkpoints: Checkpoints, step: int) -> None:
    got, expected = checkpoints.load(step), _state(step)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor)
    assert checkpoints.config(step) == f"config of {step}"


def _entries(checkpoints: Checkpoints) -> set[str]:
    return {path.name for path in checkpoints.directory.iterdir()}


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", keep=2)


def test_load_gives_back_what_was_saved(checkpoints: Checkpoints) -> None:
    path = checkpoints.save(3, _state(3), "config of 3")
    assert path == checkpoints.path(3)
    assert {file.name for file in path.iterdir()} == set(_FILES)
    _assert_holds(checkpoints, 3)
    weights = load_weights(path)
    assert weights.keys() == {"a.weight", "a.bias"}
    assert all(torch.equal(tensor, _state(3)[name]) for name, tensor in weights.items())


def test_no_checkpoint_is_no_step(checkpoints: Checkpoints) -> None:
    assert checkpoints.latest() is None
    assert checkpoints.steps() == []


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_newest_checkpoints_are_kept(tmp_path: Path, keep: int) -> None:
    checkpoints = Checkpoints(tmp_path, keep)
    _save(checkpoints, 5, 10, 15, 100)
    kept = [5, 10, 15, 100][-keep:]
    assert checkpoints.steps() == kept
    assert _entries(checkpoints) == {f"step-{step:06d}" for step in kept}
    assert checkpoints.latest() == 100
    for step in kept:
        _assert_holds(checkpoints, step)


def test_best_checkpoint_and_those_of_every_so_many_updates_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2, keep_every=20)
    _save(checkpoints, 5, 10)
    write_best(tmp_path, 10, "held_out", 0.5)
    _save(checkpoints, 15, 20, 25, 30, 35, 40, 45)
    assert checkpoints.steps() == [10, 20, 40, 45]


def test_deletion_that_fails_is_made_good_by_the_next_save(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    _save(checkpoints, 1, 2)
    rename = Path.rename

    def refused(self: Path, target: Path) -> Path:
        if self == checkpoints.path(1):
            raise PermissionError(13, "Permission denied")
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", refused)
        _save(checkpoints, 3)
        assert checkpoints.steps() == [1, 2, 3]
    _save(checkpoints, 4)
    assert _entries(checkpoints) == {"step-000003", "step-000004"}


def test_step_of_a_million_updates_still_sorts_last(checkpoints: Checkpoints) -> None:
    _save(checkpoints, 999_999, 1_000_000)
    assert checkpoints.latest() == 1_000_000


# --- damage ----------------------------------------------------------------------------------------------------------


def _truncate(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x80
    file.write_bytes(content)


def _empty(file: Path) -> None:
    file.write_bytes(b"")


def _other_json(file: Path) -> None:
    file.write_text("[]")


@pytest.mark.parametrize("damage", [_truncate, _flip, _empty, _other_json, Path.unlink])
@pytest.mark.parametrize("name", _FILES)
def test_damaged_checkpoint_is_passed_over(checkpoints: Checkpoints, name: str, damage: Callable[[Path], None]) -> None:
    _save(checkpoints, 1, 2)
    file = checkpoints.path(2) / name
    damage(file)
    if name == "COMMIT" and damage is Path.unlink:  # then it was never a checkpoint
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert checkpoints.latest() == 1
        message = "is not a checkpoint"
    else:
        with pytest.warns(UserWarning, match=rf"^checkpoint .*step-000002 is damaged \({name}.*trying an older one$"):
            assert checkpoints.latest() == 1
        message = f"is damaged: {name}"
    _assert_holds(checkpoints, 1)
    with pytest.raises(InputError, match=message):
        load_weights(checkpoints.path(2))


def test_a_run_with_only_damaged_checkpoints_has_none(checkpoints: Checkpoints) -> None:
    _save(checkpoints, 1, 2)
    for step in (1, 2):
        _flip(checkpoints.path(step) / "transformer.safetensors")
    with pytest.warns(UserWarning, match="is damaged") as caught:
        assert checkpoints.latest() is None
    assert len(caught) == 2


def test_damaged_checkpoint_is_replaced_by_the_same_step(checkpoints: Checkpoints) -> None:
    _save(checkpoints, 1, 2)
    _flip(checkpoints.path(2) / "transformer.safetensors")
    _save(checkpoints, 2)
    assert checkpoints.latest() == 2
    _assert_holds(checkpoints, 2)


def test_new_checkpoint_outlives_newer_damaged_ones(checkpoints: Checkpoints) -> None:
    """Both checkpoints of a run are damaged, it starts again: what it saves now must not be deleted as the oldest."""
    _save(checkpoints, 10, 15)
    for step in (10, 15):
        _flip(checkpoints.path(step) / "transformer.safetensors")
    _save(checkpoints, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert checkpoints.latest() == 5


def test_other_directories_beside_the_checkpoints_are_ignored(checkpoints: Checkpoints) -> None:
    """A copy that a user put aside."""
    _save(checkpoints, 1)
    shutil.copytree(checkpoints.path(1), checkpoints.directory / "step-000001-good")
    shutil.copytree(checkpoints.path(1), checkpoints.directory / "mine")
    assert checkpoints.steps() == [1]
    assert checkpoints.latest() == 1


def test_missing_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none is not a checkpoint \(no COMMIT file\)$"):
        load_weights(tmp_path / "none")


# --- interrupted and failing saves -----------------------------------------------------------------------------------


def test_interrupted_save_is_ignored_and_does_not_hinder_the_next(checkpoints: Checkpoints) -> None:
    _save(checkpoints, 1)
    left = checkpoints.directory / ".step-000002.tmp"
    shutil.copytree(checkpoints.path(1), left)
    (left / "surplus").write_text("left over")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoints.latest() == 1
    _save(checkpoints, 2)
    assert _entries(checkpoints) == {"step-000001", "step-000002"}
    assert not (checkpoints.path(2) / "surplus").exists()
    _assert_holds(checkpoints, 2)


def test_directory_without_its_list_is_ignored(checkpoints: Checkpoints) -> None:
    _save(checkpoints, 1)
    checkpoints.path(2).mkdir()
    assert checkpoints.latest() == 1


_Usage = namedtuple("_Usage", "total used free")


def test_full_disk_is_found_before_writing(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    _save(checkpoints, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: _Usage(1000, 990, 10))
    with pytest.raises(
        SaveError,
        match=r"^checkpoint of step 2 could not be saved \(disk full: .* needed, .* free in .*\); "
        r"the checkpoint of step 1 is untouched$",
    ):
        checkpoints.save(2, _state(2), "config")
    assert _entries(checkpoints) == {"step-000001"}
    assert checkpoints.latest() == 1
    _assert_holds(checkpoints, 1)


def test_full_disk_at_the_first_save(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: _Usage(1000, 990, 10))
    with pytest.raises(SaveError, match=r"; there is no earlier checkpoint$"):
        checkpoints.save(1, _state(1), "config")
    assert _entries(checkpoints) == set()


def test_write_that_fails_half_way_leaves_the_earlier_checkpoint(checkpoints: Checkpoints) -> None:
    """A limit on file size makes the system refuse the larger weights while they are written."""
    _save(checkpoints, 1)

    def save() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with pytest.raises(
            SaveError, match=r"^checkpoint of step 2 could not be saved \(.*the checkpoint of step 1 is untouched$"
        ):
            checkpoints.save(2, {"w": torch.ones(100_000)}, "config")
        return 7

    _, status = os.waitpid(forked(save), 0)
    assert os.waitstatus_to_exitcode(status) == 7
    assert _entries(checkpoints) == {"step-000001"}
    assert checkpoints.latest() == 1
    _assert_holds(checkpoints, 1)


@pytest.mark.parametrize("name", ["COMMIT", "state.json"])
def test_failure_of_a_late_write_leaves_nothing(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    _save(checkpoints, 1)
    write = Path.write_text

    def failing(self: Path, *arguments: str, **options: str) -> int:
        if self.name == name:
            raise OSError(28, "No space left on device")
        return write(self, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", failing)
    with pytest.raises(SaveError, match="No space left on device"):
        _save(checkpoints, 2)
    assert _entries(checkpoints) == {"step-000001"}
    _assert_holds(checkpoints, 1)


def test_list_names_every_file_with_its_size(checkpoints: Checkpoints) -> None:
    _save(checkpoints, 1)
    path = checkpoints.path(1)
    listed = json.loads((path / "COMMIT").read_text())
    assert {name: entry["bytes"] for name, entry in listed.items()} == {
        name: (path / name).stat().st_size for name in _FILES if name != "COMMIT"
    }


# --- optimizer state -------------------------------------------------------------------------------------------------


def _model_and_optimizer() -> tuple[nn.Module, torch.optim.AdamW, list[str]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    names = [name for name, _ in model.named_parameters()]
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1e-2), names


def _train(model: nn.Module, optimizer: torch.optim.AdamW, steps: range) -> None:
    for step in steps:
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def test_adamw_goes_on_bitwise_from_a_checkpoint(checkpoints: Checkpoints) -> None:
    straight, optimizer, names = _model_and_optimizer()
    _train(straight, optimizer, range(6))

    first, optimizer, names = _model_and_optimizer()
    _train(first, optimizer, range(3))
    tensors = optimizer_tensors(optimizer, names)
    assert tensors.keys() == {f"{name}/{key}" for name in names for key in ("step", "exp_avg", "exp_avg_sq")}
    checkpoints.save(3, {**first.state_dict(), **tensors}, "config")

    resumed, optimizer, names = _model_and_optimizer()
    weights, saved = load_weights(checkpoints.path(3)), checkpoints.load(3)
    resumed.load_state_dict(weights)
    load_optimizer_tensors(optimizer, names, {name: saved[name] for name in tensors})
    _train(resumed, optimizer, range(3, 6))
    for got, expected in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(got, expected)

    fresh, optimizer, _ = _model_and_optimizer()
    fresh.load_state_dict(weights)
    _train(fresh, optimizer, range(3, 6))
    assert not torch.equal(next(fresh.parameters()), next(straight.parameters())), "the state mattered"


def test_loading_optimizer_state_keeps_the_optimizer_s_own_hyperparameters() -> None:
    model, optimizer, names = _model_and_optimizer()
    _train(model, optimizer, range(2))
    tensors = copy.deepcopy(optimizer_tensors(optimizer, names))
    other = torch.optim.AdamW(model.parameters(), lr=0.5, weight_decay=0.25)
    load_optimizer_tensors(other, names, tensors)
    assert (other.param_groups[0]["lr"], other.param_groups[0]["weight_decay"]) == (0.5, 0.25)
    again = optimizer_tensors(other, names)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)
