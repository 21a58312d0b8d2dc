"""The `srpo` command in processes of its own."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import termios
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from helpers import command, environment, quick_overrides, srpo, state_of
from PIL import Image
from safetensors.torch import load_file

from srpo.cli import main
from srpo.runlog import read_log
from srpo.signals import REQUEUE


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three updates, trained by the command."""
    directory = tmp_path_factory.mktemp("runs") / "trained"
    overrides = quick_overrides(directory, "srpo.updates=3", "run.save_every=1", "run.tensorboard=true")
    done = srpo("train", "tiny", *overrides, "run.sample_every=3")
    assert done.returncode == 0, done.stderr
    assert "3/3 updates, finished" in done.stdout
    assert "\r" not in done.stderr, "a progress bar, though the output is no terminal"
    return directory


def test_run_directory_holds_everything(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert names == {"config.yaml", "log.jsonl", "checkpoints", "samples", "validation", "report.html", "tensorboard"}
    assert {path.name for path in (trained / "samples").iterdir()} == {"step-000000.png", "step-000003.png"}
    assert [path.name for path in sorted((trained / "checkpoints").iterdir())] == ["step-000002", "step-000003"]
    assert any((trained / "tensorboard").iterdir())
    records = read_log(trained)
    assert [record["step"] for record in records] == [1, 2, 3]
    assert set(records[0]["losses"]) == {"total", "denoise", "inversion"}
    assert set(records[0]["seconds"]) == {"text", "rollout", "gradient", "optimizer"}
    page = (trained / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 1  # step 0 is in it, beside the last
    assert "<svg" in page
    assert "http" not in page


def test_sample_from_base_and_checkpoint(trained: Path, tmp_path: Path) -> None:
    options = ["--prompt", "digit three", "--prompt", "bold. digit seven", "--count", "2", "--seed", "5"]
    for name, arguments in {"base": ["tiny"], "step0": [trained, "--step", "0"], "tuned": [trained]}.items():
        assert main(["sample", *map(str, arguments), *options, "--out", str(tmp_path / name)]) == 0
    pixels = {
        name: np.stack([np.array(Image.open(tmp_path / name / f"{index:05d}.png")) for index in range(4)])
        for name in ("base", "step0", "tuned")
    }
    assert np.array_equal(pixels["base"], pixels["step0"])
    assert not np.array_equal(pixels["base"], pixels["tuned"])
    listed = [json.loads(line) for line in (tmp_path / "tuned/metadata.jsonl").read_text().splitlines()]
    assert listed[2] == {"file_name": "00002.png", "text": "bold. digit seven"}
    assert (tmp_path / "tuned/grid.png").is_file()


def test_export_reloads_in_plain_diffusers(trained: Path, tmp_path: Path) -> None:
    assert main(["export", str(trained), "--step", "2", "--out", str(tmp_path / "exported")]) == 0
    pipeline = FluxPipeline.from_pretrained(tmp_path / "exported")
    saved = load_file(trained / "checkpoints/step-000002/transformer.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in pipeline.transformer.state_dict().items())
    assert (
        "licence" in (tmp_path / "exported/README.md").read_text()
        or "Apache" in (tmp_path / "exported/README.md").read_text()
    )
    # An exported pipeline is a model like any other.
    assert main(["sample", "tiny", "--model", str(tmp_path / "exported"), "--out", str(tmp_path / "images")]) == 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGUSR1, REQUEUE)])
def test_signal_saves_and_exits_and_the_rest_is_bitwise_the_same(
    number: int, status: int, trained: Path, tmp_path: Path
) -> None:
    overrides = quick_overrides(tmp_path / "run", "srpo.updates=3", "run.save_every=3", "run.tensorboard=true")
    overrides += ["run.sample_every=3", "srpo.rollout_steps=2"]
    process = subprocess.Popen(
        command("train", "tiny", *overrides),
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    line = process.stdout.readline()  # printed after the first update
    assert line.startswith("update 1/3"), line
    process.send_signal(number)
    output, errors = process.communicate(timeout=120)
    done = len(read_log(tmp_path / "run"))
    assert process.returncode == (status if done < 3 else 0), errors
    if done < 3:
        assert f"{done}/3 updates, stopped; go on with --resume" in output
    assert (tmp_path / f"run/checkpoints/step-{done:06d}/COMMIT").is_file()
    assert main(["train", "tiny", *overrides, "--resume"]) == 0
    assert state_of(tmp_path / "run", 3) == state_of(trained, 3)


def test_killed_run_resumes_bitwise(trained: Path, tmp_path: Path) -> None:
    overrides = quick_overrides(tmp_path / "run", "srpo.updates=3", "run.save_every=1", "run.tensorboard=true")
    overrides.append("run.sample_every=3")
    with subprocess.Popen(
        command("train", "tiny", *overrides), env=environment(), stdout=subprocess.DEVNULL
    ) as process:
        while process.poll() is None and not (tmp_path / "run/checkpoints/step-000001/COMMIT").is_file():
            time.sleep(0.005)
        process.kill()
    (tmp_path / "run/log.jsonl").open("a").write('{"event": "upd')  # a line cut off
    assert main(["train", "tiny", *overrides, "--resume"]) == 0
    assert state_of(tmp_path / "run", 3) == state_of(trained, 3)
    assert [record["step"] for record in read_log(tmp_path / "run")] == [1, 2, 3]


def test_progress_bar_on_a_terminal_shows_true_step(tmp_path: Path) -> None:
    overrides = quick_overrides(tmp_path / "run", "run.sample_every=0")
    assert main(["train", "tiny", *overrides, "srpo.updates=1"]) == 0
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))
    process = subprocess.Popen(
        command("train", "tiny", *overrides, "srpo.updates=2", "--resume"),
        env=environment(TERM="xterm"),
        stdout=subprocess.DEVNULL,
        stderr=follower,
    )
    os.close(follower)
    shown = b""
    while True:
        try:
            chunk = os.read(leader, 4096)
        except OSError:  # the terminal closes with the process
            break
        if not chunk:
            break
        shown += chunk
    assert process.wait(timeout=60) == 0
    text = shown.decode()
    assert "1/2 [" in text
    assert "2/2 [" in text
    assert all(word in text for word in ("loss total", "denoise", "inversion", "score", "rollout", "gradient"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_flux_dev_recipe_runs_on_a_flux_shaped_model(
    precision: str, flux_shaped: Path, clip_shaped: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a photo of a dog\na red car\n")
    changes = [f"reward.path={clip_shaped}", f"data.prompts={tmp_path}/prompts.txt", f"run.dir={tmp_path}/run"]
    changes += [f"model.precision={precision}", "model.max_sequence_length=16", "srpo.height=32", "srpo.width=48"]
    changes += ["srpo.batch_size=4", "run.micro_batch=2", "srpo.updates=2", "srpo.rollout_steps=2"]
    changes += ["run.sample_steps=2", "run.sample_count=2", "run.sample_every=2"]
    done = srpo("train", "flux-dev-pickscore", "--model", flux_shaped, *changes)
    assert done.returncode == 0, done.stderr
    assert main(["sample", f"{tmp_path}/run", "--out", f"{tmp_path}/images"]) == 0
    assert Image.open(tmp_path / "images/00000.png").size == (48, 32)
    assert main(["export", f"{tmp_path}/run", "--out", f"{tmp_path}/exported"]) == 0
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert all(t.dtype == wanted for t in load_file(next(tmp_path.glob("exported/transformer/*.safetensors"))).values())
    card = (tmp_path / "exported/README.md").read_text()
    assert "Non-Commercial" in card


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nothing"], "recipe 'nothing' is neither a file nor a shipped recipe"),
        (["train", "tiny", "srpo.leanring_rate=1"], "did you mean 'srpo.learning_rate'?"),
        (["train", "tiny", "srpo.window=[30, 5]"], "window must be 0 < a < b <= 50, got (30, 5)"),
        (["train", "tiny", "srpo.discount_denoise=[0.1, 3]"], "discount_denoise must be two numbers in [0, 1]"),
        (["train", "tiny", "data.control_group=sparkly"], "unknown control group 'sparkly'; known groups: blue, bold"),
        (["demo", "--control", "sparkly"], "unknown control group 'sparkly'; the demo steers stroke or colour"),
        (["sample", "tiny", "--out", "."], "output . already exists"),
        (["export", "nowhere", "--out", "x"], "nowhere is not a run directory"),
        (["tiny", "build", "--out", "."], "."),
        (["tiny", "epsilon", "--out", "."], "output . already exists"),
        (["tiny", "epsilon", "--out", "x", "--scale", "0"], "--scale must be positive, got 0.0"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("srpo: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_bad_input_in_a_process(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(b"fine\n\xff\xfe\nfine\n\xff\n")
    done = srpo("train", "tiny", f"data.prompts={tmp_path}/prompts.txt", f"run.dir={tmp_path}/run")
    assert done.returncode == 2
    assert done.stderr == f"srpo: prompt file {tmp_path}/prompts.txt is not UTF-8 on lines 2, 4\n"
    assert not (tmp_path / "run").exists()
