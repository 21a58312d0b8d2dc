"""Prompts, captioned images and control words, and the order in which a run sees them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from srpo.errors import InputError
from srpo.objective import SRPOConfig
from srpo.randomness import generator
from srpo.tiny import ATTRIBUTES

__all__ = ["CONTROL_GROUPS", "CaptionedImage", "control_group", "load_image", "order", "read_images", "read_prompts"]

_OFFICIAL = SRPOConfig()

#: Named control words: group -> (positive words, negative words).
CONTROL_GROUPS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "realism": (_OFFICIAL.positive_controls, _OFFICIAL.negative_controls),
    **{towards: ((towards,), (away,)) for pair in ATTRIBUTES.values() for towards, away in (pair, pair[::-1])},
}


def control_group(name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The words of a named group. Raises `InputError` for an unknown name."""
    if not isinstance(name, str) or name not in CONTROL_GROUPS:
        raise InputError(f"unknown control group {name!r}; known groups: {', '.join(sorted(CONTROL_GROUPS))}")
    return CONTROL_GROUPS[name]


def read_prompts(path: str | Path) -> list[str]:
    """One prompt a line, UTF-8. Raises `InputError` with the line numbers of what cannot be used."""
    lines = _read_lines(path, "prompt file")
    empty = [number for number, line in enumerate(lines, 1) if not line.strip()]
    if empty:
        raise InputError(f"prompt file {path}: no prompt on line{_numbers(empty)}")
    return [line.strip() for line in lines]


@dataclass(frozen=True)
class CaptionedImage:
    """A real image for offline training."""

    path: Path
    caption: str


def read_images(folder: str | Path) -> list[CaptionedImage]:
    """Images listed in ``metadata.jsonl`` of `folder`: lines ``{"file_name": ..., "text": ...}``.

    Every file is decoded once, so that a damaged one is found before training starts. Raises `InputError`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"image folder {folder} does not exist")
    metadata = folder / "metadata.jsonl"
    images = []
    for number, line in enumerate(_read_lines(metadata, "image list"), 1):
        try:
            record = json.loads(line)
            image = CaptionedImage(folder / record["file_name"], record["text"].strip())
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            raise InputError(f'{metadata}: line {number} must be {{"file_name": ..., "text": ...}}') from None
        if not image.caption:
            raise InputError(f"{metadata}: line {number} has an empty text")
        try:
            with Image.open(image.path) as opened:
                opened.load()  # `verify` would let a truncated JPEG pass
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(f"{metadata}: line {number}: {image.path} cannot be read as an image ({error})") from None
        images.append(image)
    return images


def load_image(path: Path, size: tuple[int, int]) -> Tensor:
    """The image [3, H, W] in [0, 1], scaled to cover `size` (height, width) and cropped to its centre."""
    with Image.open(path) as opened:
        upright = ImageOps.exif_transpose(opened).convert("RGB")
        fitted = ImageOps.fit(upright, (size[1], size[0]), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 255


def order(count: int, positions: Sequence[int], seed: int) -> list[int]:
    """Items seen at `positions` of an endless shuffled pass over `count` items: each pass is a new permutation."""
    chosen = []
    for position in positions:
        epoch, place = divmod(position, count)
        chosen.append(int(torch.randperm(count, generator=generator(seed, epoch, 0, "order"))[place]))
    return chosen


def _read_lines(path: str | Path, what: str) -> list[str]:
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{what} {path} cannot be read: {error.strerror}") from None
    lines, undecodable = [], []
    for number, line in enumerate(raw.splitlines(), 1):
        try:
            lines.append(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError:
            undecodable.append(number)
    if undecodable:
        raise InputError(f"{what} {path} is not UTF-8 on line{_numbers(undecodable)}")
    if not any(line.strip() for line in lines):
        raise InputError(f"{what} {path} is empty")
    return lines


def _numbers(numbers: list[int], most: int = 10) -> str:
    shown = ", ".join(map(str, numbers[:most]))
    return f"{'s' if len(numbers) > 1 else ''} {shown}" + (
        f" and {len(numbers) - most} more" if len(numbers) > most else ""
    )
