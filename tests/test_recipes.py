"""Shipped recipes load and fit the GPUs that they are named after; the launch examples launch."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from plan_helpers import each_size_once  # noqa: F401

from srpo.cli import _parser
from srpo.config import dump_config, load_config
from srpo.hardware import GPUS, Gpu, parse_gpu
from srpo.objective import SRPOConfig
from srpo.plan import Plan, make_plan

ROOT = Path(__file__).parent.parent
RECIPES = sorted(path.stem for path in (ROOT / "srpo/recipes").glob("*.yaml"))
#: The least that is sold as 24 GB; rates of an L4, which are of no matter here.
SMALL = parse_gpu("name=24GB,memory_gb=24,bf16_tflops=100,fp8_tflops=200,bandwidth_tb_s=0.27")


def plan(recipe: str, gpu: Gpu, *overrides: str, count: int = 1) -> Plan:
    return make_plan(recipe, load_config(recipe, overrides), gpu, count)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_loads_and_is_written_back(recipe: str, tmp_path: Path) -> None:
    config = load_config(recipe)
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    ("recipe", "gpu"),
    [
        ("flux-dev-hps-1gpu-h200", GPUS["H200"]),
        ("flux-dev-hps-1gpu-h20", GPUS["H20"]),
        ("flux-dev-hps-lora-24gb", SMALL),
    ],
)
def test_recipe_fits_its_gpu_and_needs_what_it_changes(recipe: str, gpu: Gpu) -> None:
    made = plan(recipe, gpu)
    assert made.memory.fits, str(made)
    assert not plan("flux-dev-hps", gpu).memory.fits
    assert f"GB of {gpu.name}'s" in str(made)


def test_one_gpu_recipes_change_what_they_say_and_no_more() -> None:
    official = load_config("flux-dev-hps").srpo
    assert official == SRPOConfig.preset("hps")
    for recipe in ("flux-dev-hps-1gpu-h200", "flux-dev-hps-1gpu-h20"):
        assert load_config(recipe).srpo == official
    assert not plan("flux-dev-hps-1gpu-h200", GPUS["H200"], "optimizer.gradients=fp32").memory.fits
    assert not plan("flux-dev-hps-1gpu-h20", GPUS["H20"], "optimizer.offload=none").memory.fits
    bf16, fp8 = (
        plan("flux-dev-hps-1gpu-h20", GPUS["H20"], f"model.precision={name}").phases[1].seconds
        for name in ("bf16", "fp8-rollout")
    )
    assert fp8 < 0.75 * bf16
    full = ("srpo.height=720", "srpo.width=720")
    assert not plan("flux-dev-hps-lora-24gb", SMALL, *full).memory.fits
    assert not plan("flux-dev-hps-lora-24gb", SMALL, "model.precision=bf16").memory.fits


@pytest.mark.parametrize("recipe", ["flux-dev-hps", "flux-dev-pickscore"])
@pytest.mark.parametrize(("gpu", "count"), [("H200", 8), ("H20", 8), ("H20", 32)])
def test_official_recipes_fit_many_gpus_that_share_the_model(recipe: str, gpu: str, count: int) -> None:
    made = plan(recipe, GPUS[gpu], "run.sharding=fsdp", "model.text_cache=x", count=count)
    assert made.memory.fits, str(made)


# --- examples -------------------------------------------------------------------------------


def run_block() -> str:
    return yaml.safe_load((ROOT / "examples/skypilot.yaml").read_text())["run"]


@pytest.mark.parametrize("name", ["torchrun.sh", "slurm.sbatch", "skypilot.yaml"])
def test_examples_are_sound_shell(name: str) -> None:
    text = run_block() if name.endswith(".yaml") else (ROOT / "examples" / name).read_text()
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    assert "torch" in text


def test_skypilot_example_names_what_it_uses() -> None:
    task = yaml.safe_load((ROOT / "examples/skypilot.yaml").read_text())
    assert {"resources", "num_nodes", "workdir", "setup", "run", "file_mounts"} <= set(task)
    assert load_config(task["envs"]["RECIPE"])
    for key in ("model.path", "reward.path", "data.prompts"):
        assert f"{key}=/data/" in task["run"]


def write_script(path: Path, text: str) -> Path:
    path.write_text(f"#!/usr/bin/env bash\n{text}")
    path.chmod(0o755)
    return path


@pytest.fixture
def launcher(tmp_path: Path) -> Path:
    """Stands for python: as torchrun does, it has a child, dies of SIGUSR1, and fails with 1 when its child fails."""
    return write_script(
        tmp_path / "python",
        f"""
printf '%s\\n' "$@" > {tmp_path}/arguments
(trap 'echo USR1 > {tmp_path}/got; exit 75' USR1
 trap 'echo TERM > {tmp_path}/got; exit 0' TERM
 touch {tmp_path}/ready
 [[ " $* " != *" fails "* ]] || exit 3
 while :; do sleep 0.05; done) &
wait $! || exit 1
""",
    )


def until(holds: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("number", "status", "got"), [(signal.SIGUSR1, 75, "USR1\n"), (signal.SIGTERM, 0, "TERM\n"), (None, 1, None)]
)
def test_signals_reach_the_ranks_and_usr1_asks_for_another_start(
    launcher: Path, tmp_path: Path, number: signal.Signals | None, status: int, got: str | None
) -> None:
    recipe = "tiny" if number else "fails"
    environment = {**os.environ, "PYTHON": str(launcher), "GPUS": "2", "NODES": "3", "RENDEZVOUS": "first:1234"}
    command = [ROOT / "examples/torchrun.sh", recipe, "run.dir=x", "--resume"]
    with subprocess.Popen(command, env=environment) as running:
        until((tmp_path / "ready").exists)
        if number:
            running.send_signal(number)
        assert running.wait(60) == status
    assert ((tmp_path / "got").read_text() if got else None) == got
    arguments = (tmp_path / "arguments").read_text().split()
    assert arguments[-6:] == ["-m", "srpo", "train", recipe, "run.dir=x", "--resume"]
    given = dict(zip(arguments[2:-6:2], arguments[3:-6:2], strict=True))
    expected = {"--nnodes": "3", "--nproc-per-node": "2", "--rdzv-backend": "c10d", "--rdzv-endpoint": "first:1234"}
    assert given == {**expected, "--rdzv-id": "srpo"}


@pytest.mark.parametrize(("status", "requeued"), [(75, True), (1, False), (0, False)])
def test_slurm_queues_again_on_75_alone(tmp_path: Path, status: int, requeued: bool) -> None:
    write_script(
        tmp_path / "scontrol", f'[[ $1 != requeue ]] || echo "$2" > {tmp_path}/again\necho node-a\necho node-b'
    )
    write_script(
        tmp_path / "srun",
        f'echo "$RENDEZVOUS $NODES $*" > {tmp_path}/srun.txt\ntrap "exit {status}" USR1\ntouch {tmp_path}/ready\n'
        "while :; do sleep 0.05; done",
    )
    (tmp_path / "first").mkdir()
    (tmp_path / "first/config.yaml").touch()
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_NUM_NODES": "2"}
    environment = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", ROOT / "examples/slurm.sbatch", "tiny", f"run.dir={tmp_path}/first"]
    with subprocess.Popen(command, env=environment) as running:
        until((tmp_path / "ready").exists)
        running.send_signal(signal.SIGUSR1)
        assert running.wait(60) == status
    assert (tmp_path / "again").exists() == requeued
    words = (tmp_path / "srun.txt").read_text().split()
    assert words[:3] == ["node-a:20007", "2", "examples/torchrun.sh"]
    assert words[-1] == "--resume", "there is a run to go on with"


@pytest.mark.slow
def test_two_ranks_save_on_usr1_and_go_on(tmp_path: Path) -> None:
    """torchrun for real, on the tiny recipe."""
    run = tmp_path / "run"
    options = [f"run.dir={run}", "run.device=cpu", "run.micro_batch=2", "srpo.batch_size=4", "srpo.rollout_steps=2"]
    command = [ROOT / "examples/torchrun.sh", "tiny", *options, "run.sample_every=0", "run.save_every=100"]
    environment = {**os.environ, "PYTHON": sys.executable, "GPUS": "2", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*command, "srpo.updates=100000"], env=environment) as running:
        until(lambda: (run / "log.jsonl").is_file() and '"update"' in (run / "log.jsonl").read_text(), 240)
        running.send_signal(signal.SIGUSR1)
        assert running.wait(120) == 75
    steps = [int(path.name.rpartition("-")[2]) for path in (run / "checkpoints").iterdir() if path.is_dir()]
    assert steps
    total = max(steps) + 1
    done = subprocess.run([*command, f"srpo.updates={total}", "--resume"], env=environment, timeout=240, check=False)
    assert done.returncode == 0
    assert f'"step": {total}' in (run / "log.jsonl").read_text()


# --- docs/training.md -----------------------------------------------------------------------


def commands(page: str) -> list[list[str]]:
    """The shell commands in a page's blocks, as words."""
    found, inside = [], False
    for line in page.replace("\\\n", " ").splitlines():
        if line.startswith("```"):
            inside = line == "```bash"
        elif inside and (words := shlex.split(line, comments=True)):
            found.append(words)
    return found


def test_commands_of_the_training_page_are_ones() -> None:
    """Options as the command line has them, overrides as recipes have them; scripts that exist."""
    seen = set()
    for words in commands((ROOT / "docs/training.md").read_text()):
        while "=" in words[0]:  # environment
            words = words[1:]
        if words[0] == "sbatch":
            assert (ROOT / words[3]).is_file()
            words = ["srpo", "train", *words[4:]]
        elif words[0] == "examples/torchrun.sh":
            assert (ROOT / words[0]).is_file()
            words = ["srpo", "train", *words[1:]]
        assert words[0] == "srpo"
        options, rest = _parser().parse_known_args(words[1:])
        assert all("=" in word for word in rest), words
        recipe = getattr(options, "recipe", None) or (options.source if words[1] == "data" else None)
        if recipe:
            assert load_config(recipe, [*options.overrides, *rest])
        seen.add(words[1])
    assert seen == {"data", "plan", "embed", "train", "sample", "export"}


@pytest.mark.parametrize(
    ("recipe", "gpu", "count"),
    [("flux-dev-hps-1gpu-h200", "H200", 1), ("flux-dev-hps-1gpu-h20", "H20", 1), ("flux-dev-hps", "H20", 32)],
)
def test_times_of_the_training_page_are_the_plan_s(recipe: str, gpu: str, count: int) -> None:
    row = next(
        line
        for line in (ROOT / "docs/training.md").read_text().splitlines()
        if line.startswith(f"| {count} x {gpu} | `{recipe}")
    )
    words = shlex.split(row.split("`")[1])[1:]
    made = plan(recipe, GPUS[gpu], *words, "model.text_cache=x", count=count)
    seconds, total = (cell.strip() for cell in row.split("|")[4:6])
    assert seconds == f"{made.seconds:.0f}"
    assert total == f"{20 * made.seconds / 60:.0f} min"
