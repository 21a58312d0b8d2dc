"""Scores of a folder of images."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from srpo.config import load_config
from srpo.data import read_images
from srpo.errors import InputError
from srpo.rewards.config import IMAGE_ONLY, RewardConfig
from srpo.rewards.load import load_reward
from srpo.rewards.mixture import MixtureReward
from srpo.sealed import replace_file

__all__ = ["Scored", "as_table", "score_folder", "write_scores"]

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
#: What a recipe may lack when only its reward is used.
_UNUSED = ("model.path=unused", "data.prompts=unused", "srpo.form=image_only")


@dataclass(frozen=True)
class Scored:
    """An image's scores."""

    file_name: str
    prompt: str
    score: float
    parts: dict[str, float]  # of a mixture, not weighted


def score_folder(
    folder: Path, recipe: str, overrides: Sequence[str] = (), *, prompt: str | None = None, device: str = "auto"
) -> tuple[list[Scored], Mapping[Path, str]]:
    """Scores of all images of `folder` by a recipe's reward, in fp32, each at its own size; and checksums of the
    reward's files.

    Args:
        folder: images with ``metadata.jsonl``, whose texts are the prompts; without it all image files, by name.
        recipe: a whole recipe, or a YAML file with no more than a `reward` section. overrides: changes to it.
        prompt: the prompt of every image, instead of the folder's. A reward that reads no prompt needs none.

    Raises `InputError` when the reward, the folder or an image cannot be used, or prompts are missing.
    """
    config = load_config(recipe, [*overrides, *_UNUSED])
    images = list(_images(folder, prompt, needed=_reads_prompts(config.reward)))
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda: there is no GPU")
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    objective = replace(config.srpo, form="image_only")
    reward = load_reward(config.reward, objective, device=where, dtype=torch.float32)
    found = []
    for path, text in images:
        pixels = _pixels(path).to(where)
        with torch.no_grad():
            if isinstance(reward, MixtureReward):
                parts = reward.score_parts(pixels, [text])
                score = torch.stack([part.weight * parts[part.name] for part in reward.parts]).sum(0)
            else:
                parts, score = {}, reward.score(pixels, [text])
        named = {name: value.item() for name, value in parts.items()}
        found.append(Scored(path.relative_to(folder).as_posix(), text, score.item(), named))
    return found, reward.files


def write_scores(path: Path, scores: Sequence[Scored]) -> None:
    """One JSON object a line. Raises `InputError` when the file is there or cannot be written."""
    if path.exists():
        raise InputError(f"output {path} already exists; choose another or remove it")
    lines = [json.dumps(asdict(scored), ensure_ascii=False) for scored in scores]
    try:
        replace_file(path, ("\n".join(lines) + "\n").encode())
    except OSError as error:
        raise InputError(f"output {path} cannot be written: {error}") from None


def as_table(scores: Sequence[Scored]) -> str:
    """Image, score, a mixture's parts and prompt in columns, and the mean of the numbers below."""
    names = list(scores[0].parts)
    rows = [["image", "score", *names, "prompt"]]
    numbers = [[scored.score, *scored.parts.values()] for scored in scores]
    for scored, values in zip(scores, numbers, strict=True):
        text = scored.prompt if len(scored.prompt) <= 48 else f"{scored.prompt[:47]}…"
        rows.append([scored.file_name, *(f"{value:.4f}" for value in values), text])
    rows.append([f"mean of {len(scores)}", *(f"{value:.4f}" for value in np.mean(numbers, axis=0)), ""])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    lines = []
    for first, *middle, last in rows:
        cells = [cell.rjust(width) for cell, width in zip(middle, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells, last]).rstrip())
    return "\n".join(lines)


def _reads_prompts(config: RewardConfig) -> bool:
    return any(part.type not in IMAGE_ONLY for part in (config.parts or (config,)))


def _images(folder: Path, prompt: str | None, *, needed: bool) -> Iterator[tuple[Path, str]]:
    """Each image with its prompt."""
    if not folder.is_dir():
        raise InputError(f"image folder {folder} does not exist")
    if (folder / "metadata.jsonl").is_file():
        for image in read_images(folder).images:
            yield image.path, image.prompt.text if prompt is None else prompt
        return
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in _SUFFIXES)
    if not files:
        raise InputError(f"image folder {folder} holds no images ({', '.join(_SUFFIXES)})")
    if prompt is None and needed:
        raise InputError(f"no prompts: give --prompt, or name them in {folder / 'metadata.jsonl'}")
    yield from ((file, prompt or "") for file in files)


def _pixels(path: Path) -> Tensor:
    """[1, 3, H, W] in [0, 1]"""
    try:
        with Image.open(path) as opened:
            array = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"), dtype=np.float32)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as an image ({error})") from None
    return torch.from_numpy(array).permute(2, 0, 1)[None] / 255
