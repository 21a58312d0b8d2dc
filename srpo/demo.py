"""The main job on this machine: SRPO steers the tiny model both ways, is killed and resumed, exported and reloaded.

What is measured comes from `srpo.tiny.judge`, which knows neither the reward nor the prompts' control words.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from diffusers import FluxPipeline
from torch import Tensor

from srpo import page, report
from srpo.assets import TINY, resolve_asset
from srpo.checkpoint import Checkpoints
from srpo.config import TrainConfig, load_config
from srpo.errors import InputError
from srpo.export import export_run
from srpo.images import panels
from srpo.models import Flux
from srpo.randomness import generator
from srpo.runlog import read_log
from srpo.sampling import sample_images
from srpo.tiny.digits import NAMES
from srpo.tiny.judge import Judge
from srpo.trainer import Trainer

__all__ = ["GATES", "STEERABLE", "run_demo"]

#: What `--control` accepts: attribute -> the two words it is steered towards, and the updates that takes. A model this
#: small loses what a digit is when it is pushed further, so each direction stops when it has moved far enough.
STEERABLE = {"stroke": {"bold": 9, "thin": 11}, "colour": {"red": 13, "blue": 16}}
#: What a run must reach for the demo to succeed.
GATES = {"shift": 1.5, "accuracy": 0.90, "diversity": 0.80}

_EVALUATED = 300  # images; 30 of each digit
_SHOWN = 40
_CURVE = 100  # images measured after every second update


@dataclass
class _Run:
    """One direction: its training run, its measurements and its pictures."""

    word: str
    config: TrainConfig
    seconds: float = 0.0
    measured: dict[str, float] = field(default_factory=dict)
    images: Tensor = field(default_factory=lambda: torch.empty(0))
    curve: dict[int, dict[str, float]] = field(default_factory=dict)


def run_demo(out: Path, control: str) -> int:
    """Run the demo into the new directory `out`; 0 when every gate holds, 1 otherwise.

    Raises `InputError` for an unknown control or when `out` is not empty.
    """
    if control not in STEERABLE:
        raise InputError(f"unknown control group {control!r}; the demo steers {' or '.join(STEERABLE)}")
    if out.exists() and any(out.iterdir()):
        raise InputError(f"demo directory {out} is not empty; choose another --out")
    steered = STEERABLE[control]
    started = time.perf_counter()
    torch.set_num_threads(1)  # a second thread costs more than it brings, much more when the other core is busy
    say = partial(_say, started)
    say("loading the tiny world")
    judge = Judge.load()
    runs = [_Run(word, load_config("tiny", _overrides(out / word, word, count))) for word, count in steered.items()]

    say(f"sampling {_EVALUATED} images before training")
    base_flux = Flux.load(resolve_asset(TINY, "pipeline"), max_sequence_length=runs[0].config.model.max_sequence_length)
    evaluate = partial(_evaluate, judge, runs[0].config)
    base_images, base = evaluate(base_flux, _EVALUATED)
    start = evaluate(base_flux, _CURVE)[1]

    for run in runs:
        say(f"SRPO towards {run.word!r}: {run.config.srpo.updates} updates of {run.config.srpo.batch_size} images")
        trainer = _train(run, start, evaluate)
        run.images, run.measured = evaluate(trainer.flux, _EVALUATED)

    first, last = runs[0], runs[-1]
    say(f"the run towards {first.word!r} again, killed half-way and resumed")
    resumed = _kill_and_resume(out / "killed", first, say)
    say(f"exporting the run towards {last.word!r} and reloading it with plain diffusers")
    reloaded = _export_and_reload(out / "exported", last, trainer.flux)

    rows = [_row(control, "start", base, base), *(_row(control, run.word, run.measured, base) for run in runs)]
    checks = _checks(control, runs, base, resumed=resumed, reloaded=reloaded)
    results = {
        "control": control,
        "base": base,
        "runs": {run.word: run.measured for run in runs},
        "training_seconds": {run.word: round(run.seconds, 1) for run in runs},
        "updates": {run.word: run.config.srpo.updates for run in runs},
        "checks": checks,
        "table": [_header(control), *rows],
        "srpo": asdict(first.config.srpo),
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    written = _write_report(out, control, runs, base_images, rows, checks)
    _print_table([_header(control), *rows])
    for claim, holds in checks.items():
        print(f"[{'ok' if holds else 'FAILED'}] {claim}")
    say(f"done; pictures and curves: {written}")
    return 0 if all(checks.values()) else 1


def _say(started: float, text: str) -> None:
    print(f"[{time.perf_counter() - started:5.1f} s] {text}", flush=True)


def _overrides(directory: Path, word: str, updates: int) -> list[str]:
    return [f"run.dir={json.dumps(str(directory))}", f"data.control_group={word}", f"srpo.updates={updates}"]


def _labels(count: int) -> Tensor:
    return torch.arange(count) % 10


def _evaluate(judge: Judge, config: TrainConfig, flux: Flux, count: int) -> tuple[Tensor, dict[str, float]]:
    """Images of plain prompts from fixed noise, and what the judge measures on them."""
    objective = config.srpo
    size, labels = (objective.height, objective.width), _labels(count)
    images = sample_images(
        flux,
        flux.noise(count, *size, generator(1, 0, 0, "evaluation")),
        [f"digit {NAMES[int(label)]}" for label in labels],
        size=size,
        steps=config.run.sample_steps,
        shift=objective.shift,
        guidance=objective.guidance,
        batch=100,
    )
    return images, judge.measure(images, labels)


def _train(run: _Run, start: dict[str, float], evaluate: Callable[[Flux, int], tuple[Tensor, dict]]) -> Trainer:
    """Train one direction, measuring as it goes; measuring does not count as training time."""
    trainer = Trainer(run.config)
    run.curve[0] = start
    measuring = 0.0

    def on_update(step: int) -> None:
        nonlocal measuring
        if step % 2 == 0:
            began = time.perf_counter()
            run.curve[step] = evaluate(trainer.flux, _CURVE)[1]
            measuring += time.perf_counter() - began

    began = time.perf_counter()
    trainer.fit(on_update)
    run.seconds = time.perf_counter() - began - measuring
    report.training_report(trainer.directory)
    return trainer


def _kill_and_resume(directory: Path, twin: _Run, say: Callable[[str], None]) -> bool:
    """SIGKILL a second process in mid-run, resume it in a third, compare the last checkpoint with `twin`'s."""
    # In processes of their own: a process that killed itself could not go on to compare.
    command = [sys.executable, "-m", "srpo", "train", "tiny", "run.sample_every=0"]
    command += _overrides(directory, twin.word, twin.config.srpo.updates)
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums depend on the thread count
    half, total = twin.config.srpo.updates // 2, twin.config.srpo.updates
    checkpoints = Checkpoints(directory / "checkpoints", twin.config.run.keep)

    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and max(checkpoints.steps(), default=0) < half:
            time.sleep(0.01)
        process.kill()
    done = len(read_log(directory))
    say(f"killed after {done} of {total} updates; resuming")
    subprocess.run([*command, "--resume"], env=environment, stdout=subprocess.DEVNULL, check=True)
    files = ("transformer.safetensors", "optimizer.safetensors")
    original = Checkpoints(Path(twin.config.run.dir) / "checkpoints", twin.config.run.keep).path(total)
    same = [(checkpoints.path(total) / name).read_bytes() == (original / name).read_bytes() for name in files]
    return done < total and all(same)


def _export_and_reload(out: Path, run: _Run, tuned: Flux) -> bool:
    """Whether diffusers alone makes, from the exported directory, exactly the pixels of the model in memory."""
    export_run(Path(run.config.run.dir), out)
    objective, count = run.config.srpo, 10
    options = dict(
        prompt=[f"digit {name}" for name in NAMES],
        height=objective.height,
        width=objective.width,
        num_inference_steps=run.config.run.sample_steps,
        guidance_scale=objective.guidance,
        max_sequence_length=run.config.model.max_sequence_length,
        latents=tuned.noise(count, objective.height, objective.width, generator(0, 0, 0, "export")),
        output_type="pt",
    )
    tuned.unpatch()  # the exported model is diffusers' own
    reloaded = FluxPipeline.from_pretrained(out, local_files_only=True)
    reloaded.set_progress_bar_config(disable=True)
    return torch.equal(tuned.pipeline(**options).images, reloaded(**options).images)


def _unrelated(control: str) -> str:
    return "slant" if control == "stroke" else "stroke"


def _header(control: str) -> list[str]:
    return ["towards", f"{control} (SD)", "shift (SD)", "class accuracy", "diversity", f"{_unrelated(control)} (SD)"]


def _row(control: str, name: str, measured: dict[str, float], base: dict[str, float]) -> list[str]:
    return [
        name,
        f"{measured[control]:+.2f}",
        "" if measured is base else f"{measured[control] - base[control]:+.2f}",
        f"{measured['accuracy']:.3f}",
        f"{measured['diversity'] / base['diversity']:.0%}",
        f"{measured[_unrelated(control)]:+.2f}",
    ]


def _checks(
    control: str, runs: list[_Run], base: dict[str, float], *, resumed: bool, reloaded: bool
) -> dict[str, bool]:
    """Every claim of the demo, and whether it holds."""
    checks = {}
    for run, sign in zip(runs, (1, -1), strict=True):
        shift = sign * (run.measured[control] - base[control])
        accuracy, diversity = run.measured["accuracy"], run.measured["diversity"] / base["diversity"]
        checks[f"{run.word}: {control} moved by at least {GATES['shift']} SD"] = shift >= GATES["shift"]
        checks[f"{run.word}: class accuracy at least {GATES['accuracy']:.2f}"] = accuracy >= GATES["accuracy"]
        checks[f"{run.word}: diversity at least {GATES['diversity']:.0%} of the start"] = (
            diversity >= GATES["diversity"]
        )
    checks["a run killed half-way and resumed ends bitwise as the uninterrupted one"] = resumed
    checks["the exported pipeline gives the same pixels in plain diffusers"] = reloaded
    return checks


def _print_table(rows: list[list[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(f"{value:>{width}}" for value, width in zip(row, widths, strict=True)))


def _points(curve: dict[int, dict[str, float]], key: str) -> tuple[list[int], list[float]]:
    return list(curve), [measured[key] for measured in curve.values()]


def _write_report(
    out: Path, control: str, runs: list[_Run], base: Tensor, rows: list[list[str]], checks: dict[str, bool]
) -> Path:
    middle = ("step 0", base[:_SHOWN])
    high, low = ((f"{run.word}: step {run.config.srpo.updates}", run.images[:_SHOWN]) for run in runs)
    overview = panels([(title, images[:20]) for title, images in (low, middle, high)], 10, stacked=True)
    overview.save(out / "overview.png")
    for run, panel in zip(runs, (high, low), strict=True):
        panels([middle, panel], 10).save(out / f"{run.word}.png")
    listed = [[claim, "yes" if holds else "NO"] for claim, holds in checks.items()]
    pictures = page.picture(overview, "Plain captions, digit zero to nine; the same noise in all three.")
    plots = {control: "standard deviations", "accuracy": "of the class", "diversity": "", _unrelated(control): "SD"}
    steered = [
        page.curves(f"{key} {unit}", "update", {run.word: _points(run.curve, key) for run in runs})
        for key, unit in plots.items()
    ]
    sections = [
        page.section("Before and after", pictures),
        page.section("Measured, not by the reward", page.table(_header(control), rows), page.side_by_side(steered)),
        page.section("Checks", page.table(["claim", "holds"], listed)),
        *(
            page.section(
                f"Training towards {run.word}",
                page.side_by_side(report.training_curves(read_log(Path(run.config.run.dir)))),
            )
            for run in runs
        ),
    ]
    return page.write_page(out / "report.html", f"SRPO steers {control}", sections)
