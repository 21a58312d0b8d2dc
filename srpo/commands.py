"""What each `srpo` command does. Libraries are imported when they are needed: `srpo --help` is quick."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from pathlib import Path

from srpo.errors import InputError

__all__ = [
    "data",
    "demo",
    "embed",
    "experiment",
    "export",
    "plan",
    "report",
    "rewards_convert",
    "rewards_list",
    "rewards_score",
    "sample",
    "tiny_build",
    "tiny_epsilon",
    "tiny_images",
    "train",
]


def train(options: argparse.Namespace) -> int:
    from srpo.best import best_of
    from srpo.config import load_config
    from srpo.report import training_report
    from srpo.signals import REQUEUE
    from srpo.trainer import Trainer

    overrides = options.overrides + ([f"model.path={options.model}"] if options.model else [])
    config = load_config(options.recipe, overrides)
    trainer = Trainer(config, resume=options.resume)
    if trainer.start:
        print(f"resuming {config.run.dir} after update {trainer.start}")
    done = trainer.fit()
    if trainer.ranks.is_main:
        report = training_report(trainer.directory)
        state = "finished" if done == config.srpo.updates else "stopped; go on with --resume"
        if limits := trainer.validation.stopped:
            state = f"stopped by validation.stop; {best_of(trainer.directory)}"
            print("\n".join(f"srpo: stopped: {limit}" for limit in limits), file=sys.stderr)
        print(f"{config.run.dir}: {done}/{config.srpo.updates} updates, {state}. Report: {report}")
    trainer.ranks.barrier()  # torchrun ends all ranks as soon as one has ended with a status
    if trainer.validation.stopped:
        return 3
    return REQUEUE if trainer.stopped_by == "SIGUSR1" else 0


def sample(options: argparse.Namespace) -> int:
    from srpo.prompts import read_prompts
    from srpo.samples import open_source, write_samples

    source = open_source(
        options.source,
        step=_step(options, options.source),
        model=options.model,
        recipe=options.recipe,
        overrides=options.overrides,
        ema=options.ema,
    )
    prompts = list(options.prompt)
    if options.prompts:
        prompts += [prompt.text for prompt in read_prompts(options.prompts, source.config.data.control_groups)]
    out = Path(options.out)
    written = write_samples(source, prompts, out, count=options.count, seed=options.seed)
    print(f"{written} images in {out}")
    return 0


def export(options: argparse.Namespace) -> int:
    from srpo.export import export_run

    out = export_run(
        Path(options.run_directory),
        Path(options.out),
        step=_step(options, options.run_directory),
        dtype=options.dtype,
        layout=options.format,
        shard_gb=options.shard_size,
        ema=options.ema,
    )
    print(f"exported to {out}; its model card says how to load it")
    return 0


def _step(options: argparse.Namespace, directory: str) -> int | None:
    """The step that --step or --best names."""
    from srpo.best import best_of, best_step

    if options.best and best_step(Path(directory)) is None:
        raise InputError(f"--best: {best_of(Path(directory))} in {directory}")
    return best_step(Path(directory)) if options.best else options.step


def report(options: argparse.Namespace) -> int:
    from srpo.report import training_report

    print(training_report(Path(options.run_directory)))
    return 0


def data(options: argparse.Namespace) -> int:
    from srpo.data_report import data_report

    text, usable = data_report(options.source, options.overrides, options.model)
    print(text)
    return 0 if usable else 2


def embed(options: argparse.Namespace) -> int:
    from srpo.config import load_config
    from srpo.embed import embed_prompts

    overrides = options.overrides + ([f"model.path={options.model}"] if options.model else [])
    config = load_config(options.recipe, overrides)
    done = embed_prompts(config, options.out, shard=options.shard, report=lambda line: print(line, flush=True))
    redone = f", {done.damaged} damaged shards deleted" if done.damaged else ""
    print(f"{done.prompts} prompts in {done.directory}: {done.computed} computed by this process{redone}")
    return 0


def demo(options: argparse.Namespace) -> int:
    from srpo.demo import run_demo

    free = (Path(f"runs/demo-{number}") for number in itertools.count(1))
    out = Path(options.out) if options.out else next(path for path in free if not path.exists())
    return run_demo(out, options.control)


def experiment(options: argparse.Namespace) -> int:
    import torch

    from srpo.experiments.experiment import Setting, run
    from srpo.experiments.registry import EXPERIMENTS

    if options.name not in EXPERIMENTS:
        raise InputError(f"unknown experiment {options.name!r}; there are {', '.join(EXPERIMENTS)}")
    chosen = EXPERIMENTS[options.name]
    overrides = options.overrides + ([f"model.path={options.model}"] if options.model else [])
    seeds = chosen.seeds[options.quick] if options.seeds is None else options.seeds
    workers = options.workers or (1 if torch.cuda.is_available() else os.cpu_count() or 1)
    out = Path(options.out or f"runs/experiments/{options.name}")
    print(run(chosen, Setting(options.recipe, tuple(overrides), seeds, options.quick, workers), out))
    return 0


def plan(options: argparse.Namespace) -> int:
    from srpo.config import load_config
    from srpo.hardware import parse_gpu
    from srpo.plan import make_plan

    overrides = options.overrides + ([f"model.path={options.model}"] if options.model else [])
    config, gpu = load_config(options.recipe, overrides), parse_gpu(options.gpu)
    plan = make_plan(
        options.recipe, config, gpu, options.count, results=Path(options.results), collectives=options.collectives
    )
    if options.json:
        try:
            Path(options.json).write_text(json.dumps(plan.as_dict(), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{options.json} cannot be written: {error}") from None
    print(plan)
    return 0


def rewards_list(options: argparse.Namespace) -> int:
    from srpo.rewards.config import describe_types

    del options
    print(describe_types())
    return 0


def rewards_score(options: argparse.Namespace) -> int:
    from srpo.rewards.scoring import as_table, score_folder, write_scores

    overrides, device = options.overrides, options.device
    if options.out and Path(options.out).exists():
        raise InputError(f"output {options.out} already exists; choose another or remove it")
    recipe, folder = options.reward_recipe, Path(options.folder)
    scores, files = score_folder(folder, recipe, overrides, prompt=options.prompt, device=device)
    for file, digest in files.items():
        print(f"{file}: SHA-256 {digest}")
    print(as_table(scores))
    if options.out:
        write_scores(Path(options.out), scores)
    return 0


def rewards_convert(options: argparse.Namespace) -> int:
    from srpo.rewards.convert import convert

    source, out = Path(options.file), Path(options.out)
    done = convert(source, out)
    print(f"{source}: SHA-256 {done.source}")
    print(f"{out}: SHA-256 {done.written}, {done.tensors} tensors of {done.parameters} numbers")
    return 0


def tiny_build(options: argparse.Namespace) -> int:
    from srpo.tiny.build import Steps, build

    try:
        build(Path(options.out), seed=options.seed, steps=Steps().scaled(options.scale))
    except ValueError as error:
        raise InputError(str(error)) from None
    return 0


def tiny_epsilon(options: argparse.Namespace) -> int:
    from srpo.assets import TINY, resolve_asset
    from srpo.tiny.epsilon import STEPS, build_epsilon

    if not options.scale > 0:
        raise InputError(f"--scale must be positive, got {options.scale}")
    pipeline = Path(options.world) / "pipeline" if options.world else resolve_asset(TINY, "pipeline")
    build_epsilon(Path(options.out), pipeline, seed=options.seed, steps=max(1, round(STEPS * options.scale)))
    return 0


def tiny_images(options: argparse.Namespace) -> int:
    from srpo.files import new_directory
    from srpo.tiny.digits import export_images

    with new_directory(Path(options.out)) as temporary:
        export_images(temporary, options.count, options.seed)
    print(f"{options.count} captioned digits in {options.out}")
    return 0
