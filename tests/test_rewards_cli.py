"""`srpo rewards`: scores of folders, converted and checked files."""

from __future__ import annotations

import hashlib
import json
import pickle
from argparse import Namespace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
import yaml
from PIL import Image
from reward_helpers import head, photographs, save, tensor
from safetensors.torch import load_file

from srpo.cli import main
from srpo.errors import InputError
from srpo.objective import SRPOConfig
from srpo.rewards import CLIPReward, RewardConfig, load_reward
from srpo.rewards.aesthetic import LAION_LAYERS
from srpo.rewards.config import RewardModel
from srpo.rewards.weights import checksum, read_state


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- convert ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("container", [None, "state_dict", "model"])
def test_convert_writes_the_tensors_and_their_checksum(
    tmp_path: Path, container: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = torch.arange(6.0).reshape(2, 3)
    state = {"a.weight": whole, "b.view": whole.T, "c.half": torch.ones(2, dtype=torch.bfloat16)}
    source = save(tmp_path / "in.pt", state if container is None else {container: state, "epoch": 3})
    out = tmp_path / "new" / "out.safetensors"
    assert main(["rewards", "convert", str(source), "--out", str(out)]) == 0
    read = load_file(out)
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], value) and read[name].dtype == value.dtype for name, value in state.items())
    assert (out.parent / "out.safetensors.sha256").read_text() == f"{_digest(out)}  out.safetensors\n"
    told = capsys.readouterr().out
    assert f"{source}: SHA-256 {_digest(source)}\n" in told
    assert f"{out}: SHA-256 {_digest(out)}, 3 tensors of 14 numbers\n" in told
    assert sorted(path.name for path in out.parent.iterdir()) == ["out.safetensors", "out.safetensors.sha256"]
    assert checksum(out) == _digest(out)


class _Evil:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("/tmp/srpo-was-run"),))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"a": torch.ones(1), "b": _Evil()}, r"in\.pt cannot be loaded as weights only, without running code from it"),
        ({"a": torch.ones(1), "b": Namespace()}, r"in\.pt cannot be loaded as weights only"),
        ({"a": torch.ones(1), "b": 3}, r"in\.pt must hold named tensors only, but 'b' is of type int"),
        ({1: torch.ones(1)}, r"in\.pt must hold named tensors only, but 1 is of type Tensor"),
        ([torch.ones(1)], r"in\.pt must hold named tensors, holds list"),
        ({}, r"in\.pt must hold named tensors, holds dict"),
    ],
    ids=["code", "object", "number", "unnamed", "list", "empty"],
)
def test_convert_refuses_anything_but_tensors(
    tmp_path: Path, content: Any, match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(content, tmp_path / "in.pt")
    assert main(["rewards", "convert", str(tmp_path / "in.pt"), "--out", str(tmp_path / "out.safetensors")]) == 2
    assert not Path("/tmp/srpo-was-run").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["in.pt"]
    capsys.readouterr()
    with pytest.raises(InputError, match=match):
        read_state(tmp_path / "in.pt", "file")


def test_convert_refuses_what_is_there_and_what_is_not(tmp_path: Path) -> None:
    from srpo.rewards.convert import convert

    source, out = save(tmp_path / "in.pt", {"a": torch.ones(1)}), tmp_path / "out.safetensors"
    with pytest.raises(InputError, match=r"none\.pt does not exist$"):
        convert(tmp_path / "none.pt", out)
    with pytest.raises(InputError, match=r"out\.pt must end in \.safetensors$"):
        convert(source, tmp_path / "out.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"a": 1})[:-3])
    with pytest.raises(InputError, match="cannot be loaded as weights only"):
        convert(tmp_path / "plain.pt", out)
    for name in ("out.safetensors", "out.safetensors.sha256"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(InputError, match=rf"{name} already exists"):
            convert(source, out)
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()


# --- loading ---------------------------------------------------------------------------------------------------------


def test_reward_file_that_differs_from_its_checksum_is_refused(
    clip_shaped: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for file in clip_shaped.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    listed = tmp_path / "model.safetensors.sha256"
    listed.write_text(f"{_digest(weights)}  model.safetensors\n")
    config = RewardConfig(path=str(tmp_path))
    with caplog.at_level("INFO", logger="srpo"):
        load_reward(config, SRPOConfig(), device="cpu", dtype=torch.float32)
    assert f"reward file {weights}: SHA-256 {_digest(weights)}" in caplog.text
    listed.write_text(f"{'0' * 64}  model.safetensors\n")
    with pytest.raises(
        InputError, match=rf"^reward file .*model\.safetensors has SHA-256 {_digest(weights)}, but .* 000"
    ):
        load_reward(config, SRPOConfig(), device="cpu", dtype=torch.float32)


def test_clip_directory_without_a_weight_is_refused_by_name(clip_shaped: Path, tmp_path: Path) -> None:
    """transformers would draw it at random."""
    from safetensors.torch import save_file

    for file in clip_shaped.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(clip_shaped / "model.safetensors")
    lacking = {name: value for name, value in state.items() if name != "visual_projection.weight"}
    save_file(lacking, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"does not fit CLIPModel: missing weights visual_projection\.weight$"):
        CLIPReward(tmp_path)
    position = {"vision_model.embeddings.position_ids": torch.arange(17)[None]}
    save_file(
        {**state, **position, "strange": torch.ones(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(InputError, match=r"does not fit CLIPModel: unexpected weights strange$"):
        CLIPReward(tmp_path)
    save_file({**state, **position}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert CLIPReward(tmp_path).scale == 1.0


# --- score -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images and their prompts."""
    path = tmp_path / "images"
    path.mkdir()
    lines = []
    for index, picture in enumerate(photographs()[:3]):
        picture.resize((60, 40 + index)).save(path / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": f"digit {'abc'[index]} {'red ' * 20}"}))
    (path / "metadata.jsonl").write_text("\n".join(lines))
    return path


def _recipe(path: Path, reward: Any, **sections: Any) -> str:
    path.write_text(yaml.safe_dump({"reward": reward, **sections}))
    return str(path)


def test_folder_is_scored_by_its_prompts(
    folder: Path, clip_shaped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = _recipe(tmp_path / "r.yaml", {"path": str(clip_shaped)}, srpo={"reward_divisor": 0.5})
    out = tmp_path / "scores.jsonl"
    arguments = ["rewards", "score", str(folder), "--reward-recipe", recipe, "--out", str(out), "--device", "cpu"]
    assert main([*arguments, "srpo.reward_logit_scale=true"]) == 0
    reward = CLIPReward(clip_shaped, logit_scale=True, divisor=0.5)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["file_name"] for row in rows] == ["0.png", "1.png", "2.png"]
    for row in rows:
        assert row["prompt"].startswith("digit")
        expected = reward.score(tensor(Image.open(folder / row["file_name"])), [row["prompt"]]).item()
        assert row["score"] == pytest.approx(expected, rel=1e-6)
        assert row["parts"] == {}
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"{clip_shaped / 'model.safetensors'}: SHA-256 {_digest(clip_shaped / 'model.safetensors')}"
    assert told[1].split() == ["image", "score", "prompt"]
    assert told[2].split()[:3] == ["0.png", f"{rows[0]['score']:.4f}", "digit"]
    assert told[2].endswith("…")
    assert told[5].split() == ["mean", "of", "3", f"{sum(row['score'] for row in rows) / 3:.4f}"]
    assert main(arguments) == 2
    assert "scores.jsonl already exists" in capsys.readouterr().err


def test_mixture_is_scored_part_by_part_and_one_prompt_serves_all(
    folder: Path, clip_shaped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = save(tmp_path / "head.pth", head(LAION_LAYERS, 16))
    tower = str(clip_shaped)
    parts = [{"path": tower, "weight": 2.0}, {"type": "aesthetic", "path": tower, "head": str(file), "weight": 0.5}]
    recipe = _recipe(tmp_path / "r.yaml", {"type": "mixture", "parts": parts})
    (folder / "metadata.jsonl").unlink()
    arguments = ["rewards", "score", str(folder), "--reward-recipe", recipe, "--out", str(tmp_path / "s.jsonl")]
    assert main(arguments) == 2
    assert "no prompts: give --prompt" in capsys.readouterr().err
    assert main([*arguments, "--prompt", "digit"]) == 0
    for row in map(json.loads, (tmp_path / "s.jsonl").read_text().splitlines()):
        assert row["prompt"] == "digit"
        assert row["score"] == pytest.approx(2 * row["parts"]["clip 0"] + 0.5 * row["parts"]["aesthetic 1"], rel=1e-5)
    assert capsys.readouterr().out.splitlines()[2].split() == [
        "image",
        "score",
        "clip",
        "0",
        "aesthetic",
        "1",
        "prompt",
    ]


def test_reward_that_reads_no_prompt_needs_none(folder: Path, clip_shaped: Path, tmp_path: Path) -> None:
    file = save(tmp_path / "head.pth", head(LAION_LAYERS, 16))
    recipe = _recipe(tmp_path / "r.yaml", {"type": "aesthetic", "path": str(clip_shaped), "head": str(file)})
    (folder / "metadata.jsonl").unlink()
    assert main(["rewards", "score", str(folder), "--reward-recipe", recipe]) == 0


@pytest.mark.parametrize("fault", ["missing", "empty", "damaged"])
def test_folder_that_cannot_be_scored_is_refused(
    clip_shaped: Path, tmp_path: Path, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    if fault != "missing":
        folder.mkdir()
    if fault == "damaged":
        (folder / "0.png").write_bytes(b"no image")
    recipe = _recipe(tmp_path / "r.yaml", {"path": str(clip_shaped)})
    assert main(["rewards", "score", str(folder), "--reward-recipe", recipe, "--prompt", "red"]) == 2
    told = {
        "missing": "does not exist",
        "empty": "holds no images (.png",
        "damaged": "0.png cannot be read as an image",
    }
    assert told[fault] in capsys.readouterr().err


def test_list_names_every_type_and_its_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rewards", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    types = get_args(get_type_hints(RewardModel)["type"])
    assert [line.split()[0] for line in lines] == list(types)
    assert lines[types.index("clip")].endswith("reward.path, [processor]")
