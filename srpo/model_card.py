"""What an export says about itself: licence, recipe, metrics, versions, checksums."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from srpo.assets import TINY
from srpo.config import TrainConfig, dump_config
from srpo.runlog import read_log

__all__ = ["export_title", "licence_name", "model_card", "portable_recipe"]

_PACKAGES = ("srpo-kernels", "torch", "diffusers", "transformers", "safetensors")


def portable_recipe(config: TrainConfig) -> str:
    """The resolved recipe as an export keeps it: without the caches, which stay on the machine of the run."""
    parts = dict(
        model=dataclasses.replace(config.model, text_cache=None),
        reward=dataclasses.replace(config.reward, text_cache=None),
        data=dataclasses.replace(config.data, latent_cache=None),
    )
    return dump_config(dataclasses.replace(config, **parts))  # type: ignore[arg-type]


def export_title(config: TrainConfig) -> str:
    title = "SRPO" if config.baseline is None else config.baseline.title
    return f"{title} fine-tuning of {config.model.path}"


def licence_name(config: TrainConfig) -> str:
    """The licence in a word or two, for the header of a file."""
    if config.model.path == TINY:
        return "Apache-2.0"
    return f"that of the base model {config.model.path}; of FLUX.1-dev: FLUX.1 [dev] Non-Commercial License"


def model_card(
    config: TrainConfig,
    *,
    run: Path,
    step: int,
    what: str,
    usage: str,
    files: Sequence[Path],
    root: Path,
    adapters: bool = False,
) -> str:
    """Markdown for the weights after update `step` of the run in `run`.

    Args:
        what: a sentence that says what they are. usage: Python or shell that loads them.
        files: what has been written, to be listed with sizes and SHA-256 under names relative to `root`.
        adapters: they are LoRA adapters for the base model.
    """
    front: dict[str, Any] = {"library_name": "diffusers", "base_model": config.model.path}
    front["base_model_relation"] = "adapter" if adapters else "finetune"
    front["tags"] = [config.algorithm, "lora"] if adapters else [config.algorithm]
    front["license"] = "apache-2.0" if config.model.path == TINY else "other"
    trained = f"{config.data.mode.capitalize()} mode"
    if config.baseline is None:
        words = (", ".join(words) for words in (config.srpo.positive_controls, config.srpo.negative_controls))
        trained += f", control words: {' against '.join(words)}"
    recipe = portable_recipe(config)
    return "\n\n".join(
        [
            f"---\n{yaml.safe_dump(front)}---",
            f"# {export_title(config)}",
            f"{what} {trained}.",
            f"```\n{usage}\n```",
            f"## Licence\n\n{_licence(config)}",
            f"## Recipe\n\n{_summary(config)}\n\nSHA-256 of the exported recipe: `{_sha256(recipe.encode())}`.",
            f"## Metrics\n\n{_metrics(run, step)}",
            "## Made with\n\n" + ", ".join(f"{name} {version(name)}" for name in _PACKAGES),
            "## Files\n\n" + _table(["file", "bytes"], [(_name(file, root), file.stat().st_size) for file in files]),
            "SHA-256, in the form that `sha256sum --check` reads:",
            "```\n" + "\n".join(f"{_file_sha256(file)}  {_name(file, root)}" for file in files) + "\n```\n",
        ]
    )


def _licence(config: TrainConfig) -> str:
    if config.model.path == TINY:
        return (
            "The base model ships with srpo-kernels (Apache-2.0); it was trained on scikit-learn's digits "
            "(UCI, CC BY 4.0)."
        )
    return (
        "These weights are derived from the base model and stay under its licence. For FLUX.1-dev that is the "
        "FLUX.1 [dev] Non-Commercial License."
    )


def _summary(config: TrainConfig) -> str:
    objective = config.srpo
    rows: list[tuple[str, object]] = [
        ("base model", config.model.path),
        ("precision", config.model.precision),
        ("trained", f"LoRA adapters, {config.model.lora}" if config.model.lora else "the whole transformer"),
        ("reward", _reward(config)),
        ("images", f"{objective.width} x {objective.height}, guidance {objective.guidance}, shift {objective.shift}"),
        ("updates planned", objective.updates),
        ("batch", objective.batch_size),
        ("learning rate", objective.learning_rate),
    ]
    if config.baseline is None:
        rows += [("form", objective.form), ("window", list(objective.window))]
        rows += [("rollout", f"{objective.rollout_steps} steps, guidance {objective.rollout_guidance}")]
    else:
        rows += [("rollout", f"{objective.rollout_steps} steps")]
        rows += [(name, value) for name, value in dataclasses.asdict(config.baseline).items()]
    rows += [("seed", config.run.seed)]
    return _table(["", ""], rows)


def _reward(config: TrainConfig) -> str:
    parts = [f"{part.weight:g} x {part.type}, {part.path}" for part in config.reward.parts]
    return "; ".join(parts) or f"{config.reward.type}, {config.reward.path}"


def _metrics(run: Path, step: int) -> str:
    try:
        records = [record for record in read_log(run) if record["step"] <= step]
    except OSError:
        records = []
    if not records:
        return "The run has no log."
    first, last = records[0], records[-1]
    rows: list[tuple[object, ...]] = [
        (f"{group[:-1] if group == 'scores' else 'loss'}, {name}", _number(first[group].get(name)), _number(value))
        for group in ("scores", "losses")
        for name, value in last[group].items()
    ]
    rows.append(("gradient norm", _number(first.get("grad_norm")), _number(last.get("grad_norm"))))
    table = _table(["mean over the images of", f"update {first['step']}", f"update {last['step']}"], rows)
    return f"{table}\n\nScores are the reward's, on the training prompts: what was optimised, not a test."


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.5g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _name(file: Path, root: Path) -> str:
    return file.relative_to(root).as_posix()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _file_sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
