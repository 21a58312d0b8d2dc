"""``srpo data``: what is wrong with prompts and images, found without training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from srpo.assets import resolve_asset
from srpo.config import load_config
from srpo.data import IMAGE_KEYS, read_images
from srpo.errors import InputError
from srpo.prompts import FileReport, scan_prompts
from srpo.records import FORMATS, read_rows
from srpo.sources import control_schedule, read_sources, read_validation
from srpo.tokens import TokenLimits

__all__ = ["data_report"]


def data_report(source: str, overrides: Sequence[str] = (), model: str | None = None) -> tuple[str, bool]:
    """A report for people on a recipe's data, a prompt file, image folder or image list, and whether it will do.

    Token counts need the tokenizers of the recipe's model, or of `model`, and are left out without.

    Raises `InputError` when there is nothing to report on.
    """
    path = Path(source)
    if path.is_dir() or (path.suffix and path.suffix.lower() in FORMATS):
        if overrides:
            raise InputError(f"{source} is no recipe and has no keys to override: {overrides[0]}")
        limits, note = _limits(model, 512)
        reports, bad = _file(path, limits)
    else:
        config = load_config(source, [*overrides, *([f"model.path={model}"] if model else [])])
        words = control_schedule(config).words()
        limits, note = _limits(config.model.path, config.model.max_sequence_length, words)
        _, images, reports = read_sources(config, limits)
        reports += read_validation(config, limits)[1]
        bad = images.bad_images() if images else []
    lines = [report.summary() for report in reports]
    lines += ["images that cannot be used:", *(f"  {image}" for image in bad)] if bad else []
    return "\n".join([*lines, *note]), not any(report.fatal() for report in reports)


def _limits(
    model: str | None, max_sequence_length: int, words: Sequence[str] = ()
) -> tuple[TokenLimits | None, list[str]]:
    """What counts tokens, or lines that say why nothing does."""
    if model is None:
        return None, ["tokens were not counted: give --model for its tokenizers"]
    try:
        return TokenLimits(resolve_asset(model, "pipeline"), max_sequence_length, words), []
    except InputError as error:
        return None, [f"tokens were not counted: {error}"]


def _file(path: Path, limits: TokenLimits | None) -> tuple[list[FileReport], list[str]]:
    if path.is_dir() or _lists_images(path):
        images = read_images(path, max_bad_fraction=1.0)
        if limits is not None:
            limits.measure(images.report, [(image.line, image.prompt.text) for image in images.images])
        return [images.report], images.bad_images()
    return [scan_prompts(path, measure=limits.measure if limits else None)[1]], []


def _lists_images(path: Path) -> bool:
    if path.suffix.lower() != ".jsonl":
        return False
    first = next((row.values for row in read_rows(path, "file") if row.values), {})
    return any(key in first for key in IMAGE_KEYS)
