"""The `srpo` command: its arguments, and what its exit status means."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

from srpo import commands
from srpo.errors import InputError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    0: done, or stopped by SIGINT or SIGTERM. 1: failed. 2: bad input. 3: stopped by a limit of validation.stop.
    75: stopped by SIGUSR1, to be started again.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes overrides only before or after all options; let them stand anywhere.
    if rest and (not hasattr(options, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    elif rest:
        options.overrides += rest
    _quiet_libraries()
    from srpo.checkpoint import SaveError
    from srpo.trainer import NonFiniteError

    try:
        return options.run(options)
    except InputError as error:
        print(f"srpo: {error}", file=sys.stderr)
        return 2
    except (NonFiniteError, SaveError) as error:
        print(f"srpo: stopped: {error}", file=sys.stderr)
        return 1


def _quiet_libraries() -> None:
    """One line for a warning, and no bars or hints from the libraries that load models."""
    warnings.formatwarning = lambda message, *_, **__: f"srpo: warning: {message}\n"
    warnings.simplefilter("ignore", FutureWarning)  # diffusers 0.42 renames `torch_dtype`, which 0.36 needs
    # Blocks return views of one tensor, and nothing writes to them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):  # read when they are imported
        os.environ.setdefault(name, "error")
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="srpo", description="SRPO reward fine-tuning of FLUX.")
    known = parser.add_subparsers(required=True, metavar="command")

    demo = known.add_parser("demo", help="steer the tiny model both ways, on this machine, in minutes")
    demo.add_argument("--control", default="stroke", help="what to steer: stroke (bold, thin) or colour (red, blue)")
    demo.add_argument("--out", help="new directory for pictures, runs and report (default runs/demo-N)")
    demo.set_defaults(run=commands.demo)

    train = known.add_parser("train", help="fine-tune a model by a recipe")
    train.add_argument("recipe", help="YAML file, or the name of a shipped recipe")
    train.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the recipe")
    train.add_argument("--model", help="pipeline directory, instead of the recipe's model.path")
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in run.dir")
    train.set_defaults(run=commands.train)

    sample = known.add_parser("sample", help="write images from a base model, a run's checkpoint or an export")
    sample.add_argument("source", help="run, exported directory or file, or a recipe for its base model")
    sample.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the recipe")
    sample.add_argument("--model", help="pipeline directory, instead of the recipe's model.path")
    sample.add_argument("--recipe", help="how to sample a pipeline or file that holds no recipe")
    which = sample.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="which checkpoint of the run (default the newest; 0: the base model)")
    which.add_argument("--best", action="store_true", help="the checkpoint that did best by validation.best")
    sample.add_argument("--ema", action="store_true", help="the averages of the run's weights (optimizer.ema_decay)")
    sample.add_argument("--prompt", action="append", default=[], help="a prompt; may be given several times")
    sample.add_argument("--prompts", help="prompt file (default: the prompts of the recipe)")
    sample.add_argument("--count", type=_positive, default=1, help="images for each prompt (default %(default)s)")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--out", required=True, help="new directory for the images")
    sample.set_defaults(run=commands.sample)

    data = known.add_parser("data", help="check prompts and images without training")
    data.add_argument("source", help="recipe, prompt file (txt, jsonl, csv, parquet), image folder or image list")
    data.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the recipe")
    data.add_argument("--model", help="pipeline directory whose tokenizers count tokens")
    data.set_defaults(run=commands.data)

    embed = known.add_parser("embed", help="precompute the text embeddings of a recipe's prompts")
    embed.add_argument("recipe", help="YAML file, or the name of a shipped recipe")
    embed.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the recipe")
    embed.add_argument("--model", help="pipeline directory, instead of the recipe's model.path")
    embed.add_argument("--out", help="directory of the cache (default: the recipe's model.text_cache)")
    embed.add_argument("--shard", type=_positive, default=64, help="prompts in a file (default %(default)s)")
    embed.set_defaults(run=commands.embed)

    experiment = known.add_parser("experiment", help="measure a claim of the paper, on the tiny model or another")
    experiment.add_argument("name", help="recovery, ... (docs/experiments.md)")
    experiment.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the recipe")
    experiment.add_argument("--recipe", default="tiny", help="what to run on (default %(default)s)")
    experiment.add_argument("--model", help="pipeline directory, instead of the recipe's model.path")
    experiment.add_argument("--seeds", type=_positive, help="default: the experiment's")
    experiment.add_argument("--workers", type=_positive, help="trainings at once (default: cores; on a GPU 1)")
    experiment.add_argument("--quick", action="store_true", help="fewer seeds: two minutes at most")
    experiment.add_argument("--out", help="new directory for results (default runs/experiments/NAME)")
    experiment.set_defaults(run=commands.experiment)

    export = known.add_parser("export", help="write a checkpoint for diffusers or ComfyUI")
    export.add_argument("run_directory", metavar="run", help="run directory")
    export.add_argument("--out", required=True, help="new directory; for (lora-)comfyui a new .safetensors file")
    formats = ("diffusers", "comfyui", "lora", "lora-comfyui")
    export.add_argument("--format", choices=formats, default="diffusers", help="default %(default)s")
    which = export.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="which checkpoint (default the newest)")
    which.add_argument("--best", action="store_true", help="the checkpoint that did best by validation.best")
    export.add_argument("--ema", action="store_true", help="the weights' averages (optimizer.ema_decay)")
    dtypes = ("fp32", "bf16", "fp8")
    export.add_argument("--dtype", choices=dtypes, help="of the transformer (default the run's); fp8: comfyui only")
    export.add_argument("--shard-size", type=float, metavar="GB", help="diffusers: files of at most this (default 10)")
    export.set_defaults(run=commands.export)

    report = known.add_parser("report", help="write report.html of a run, finished or in progress")
    report.add_argument("run_directory", metavar="run", help="run directory")
    report.set_defaults(run=commands.report)

    plan = known.add_parser("plan", help="memory and time that a recipe needs on given GPUs; runs without any")
    plan.add_argument("recipe", help="YAML file, or the name of a shipped recipe")
    plan.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the recipe")
    plan.add_argument("--model", help="pipeline directory, instead of the recipe's model.path")
    plan.add_argument("--gpu", required=True, help="H20, H100, H200, A100, B200, or memory_gb=..,bf16_tflops=..,...")
    plan.add_argument("--count", type=int, default=1, help="GPUs (default %(default)s)")
    plan.add_argument("--results", default="benchmarks/results", help="measurements (default %(default)s)")
    plan.add_argument("--collectives", action="store_true", help="also count what ranks exchange (about a minute)")
    plan.add_argument("--json", help="also write the plan to this file")
    plan.set_defaults(run=commands.plan)

    rewards = known.add_parser("rewards", help="list kinds of rewards, score images by one, convert its files")
    kinds = rewards.add_subparsers(required=True, metavar="what")
    kinds.add_parser("list", help="every type of reward and the keys of a recipe that it takes").set_defaults(
        run=commands.rewards_list
    )
    score = kinds.add_parser("score", help="score a folder of images by a recipe's reward")
    score.add_argument("folder", help="images; their prompts are in metadata.jsonl, or --prompt")
    score.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the recipe")
    score.add_argument("--reward-recipe", required=True, help="a recipe, or a YAML file with a reward section only")
    score.add_argument("--prompt", help="the prompt of every image, instead of the folder's")
    score.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU when there is one"
    )
    score.add_argument("--out", help="also write the scores to this new jsonl file")
    score.set_defaults(run=commands.rewards_score)
    convert = kinds.add_parser("convert", help="write a .pt file of weights as safetensors with a checksum")
    convert.add_argument("file", help="file that holds named tensors only")
    convert.add_argument("--out", required=True, help="new .safetensors file; FILE.sha256 is written beside it")
    convert.set_defaults(run=commands.rewards_convert)

    tiny = known.add_parser("tiny", help="the tiny world's own files").add_subparsers(required=True, metavar="what")
    build = tiny.add_parser("build", help="train the tiny pipeline and reward afresh, as shipped")
    build.add_argument("--out", required=True, help="new directory")
    build.add_argument("--seed", type=int, default=0)
    build.add_argument("--scale", type=float, default=1.0, help="factor of all training lengths (default %(default)s)")
    build.set_defaults(run=commands.tiny_build)
    epsilon = tiny.add_parser("epsilon", help="train the tiny world's noise-predicting model afresh, as shipped")
    epsilon.add_argument("--out", required=True, help="new directory")
    epsilon.add_argument("--world", help="what `srpo tiny build` wrote, default the tiny world shipped")
    epsilon.add_argument("--seed", type=int, default=0)
    epsilon.add_argument("--scale", type=float, default=1.0, help="factor of its length (default %(default)s)")
    epsilon.set_defaults(run=commands.tiny_epsilon)
    images = tiny.add_parser("images", help="write captioned real digits for offline training")
    images.add_argument("--out", required=True, help="new directory")
    images.add_argument("--count", type=_positive, default=200)
    images.add_argument("--seed", type=int, default=0)
    images.set_defaults(run=commands.tiny_images)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
