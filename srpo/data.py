"""Captioned images, and the order in which a run sees its data."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from srpo.controls import ControlGroup
from srpo.errors import InputError
from srpo.prompts import FileReport, Prompt, parse_prompt
from srpo.randomness import generator
from srpo.records import read_rows

__all__ = ["IMAGE_KEYS", "BadImageError", "CaptionedImage", "ImageSet", "load_image", "order", "read_images"]

_SHAPE = '{"file_name": ..., "text": ...}'
#: Keys that name the file of an image.
IMAGE_KEYS = ("file_name", "image")


class BadImageError(Exception):
    """An image cannot be used; the message says why."""


@dataclass(frozen=True)
class CaptionedImage:
    """A real image for offline training."""

    path: Path
    prompt: Prompt
    line: int = 0  # in the list it comes from
    digest: str = field(default="", compare=False)  # SHA-256 of the file when it was checked

    def pixels(self, size: tuple[int, int]) -> Tensor:
        """`load_image` of the very file that was checked. Raises `BadImageError`."""
        try:
            content = self.path.read_bytes()
            if self.digest and hashlib.sha256(content).hexdigest() != self.digest:
                raise BadImageError("has changed since the run started")
            return load_image(io.BytesIO(content), size)
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise BadImageError(f"cannot be read as an image ({error})") from None


@dataclass
class ImageSet:
    """The images of a list. Each keeps its place when others turn out bad, so that a resumed run sees the same ones."""

    images: list[CaptionedImage]
    max_bad_fraction: float
    report: FileReport
    bad: dict[int, str] = field(default_factory=dict)  # place -> why it cannot be used

    def at(self, place: int) -> CaptionedImage:
        """The image at a place, or, where it is bad, the next good one of the list."""
        while place % len(self.images) in self.bad:
            place += 1
        return self.images[place % len(self.images)]

    def reject(self, image: CaptionedImage, reason: str) -> None:
        """Have another image take the place of `image`. Raises `InputError` when too many are bad."""
        self.bad[self.images.index(image)] = reason
        self.check()

    def check(self) -> None:
        """Raises `InputError` when more images are bad than `max_bad_fraction` allows, or all are."""
        if len(self.bad) > self.max_bad_fraction * len(self.images) or len(self.bad) == len(self.images):
            told = self.bad_images()
            more = f"; and {len(told) - 3} more" if len(told) > 3 else ""
            raise InputError(
                f"{self.report.name}: {len(told)} of {len(self.images)} images cannot be used, more than "
                f"data.max_bad_fraction {self.max_bad_fraction} allows: {'; '.join(told[:3])}{more}"
            )

    def bad_images(self) -> list[str]:
        """Line, path and reason of every image that is not used."""
        found = ((self.images[place], reason) for place, reason in sorted(self.bad.items()))
        return [f"line {image.line}: {image.path} {reason}" for image, reason in found]


def read_images(
    source: str | Path,
    size: tuple[int, int] | None = None,
    *,
    groups: Mapping[str, ControlGroup] | None = None,
    max_bad_fraction: float = 0.0,
    max_upscale: float = 1.0,
    known: Callable[[str], bool] = lambda _digest: False,
) -> ImageSet:
    """The images of a folder with ``metadata.jsonl``, or of a jsonl file: lines ``{"file_name": ..., "text": ...}``.

    Paths are relative to the list. Every file is decoded once, so that a damaged one is found before training starts,
    unless `known` says of its SHA-256 that it has been. An image that would have to be enlarged by more than
    `max_upscale` to cover `size` (height, width) is bad, too. Captions may have control words of their own
    (`srpo.prompts`), by `groups`, too.

    Raises `InputError` when a line of the list cannot be used, or too many images cannot.
    """
    source = Path(source)
    if not source.exists():
        raise InputError(f"image folder {source} does not exist")
    listing = source / "metadata.jsonl" if source.is_dir() else source
    report = FileReport(f"image list {listing}")
    found = ImageSet([], max_bad_fraction, report)
    for row in read_rows(listing, "image list", _SHAPE):
        try:
            image = _captioned(row.values, listing.parent, row.line, groups, report) if row.values else None
        except ValueError as error:
            report.malformed[row.line] = str(error)
            continue
        if image is None:
            report.malformed[row.line] = _UNUSABLE.get(row.fault, row.fault)
            continue
        try:
            found.images.append(_checked(image, size, max_upscale, known))
        except BadImageError as error:
            found.bad[len(found.images)] = str(error)
            found.images.append(image)
    report.check()
    report.count = len(found.images) - len(found.bad)
    found.check()
    return found


_UNUSABLE = {"undecodable": "is not UTF-8", "empty": f"must be {_SHAPE}"}


def _captioned(
    values: Mapping, root: Path, line: int, groups: Mapping[str, ControlGroup] | None, report: FileReport
) -> CaptionedImage:
    names = [key for key in IMAGE_KEYS if key in values]
    if not names or not isinstance(values[names[0]], str):
        raise ValueError(f"must be {_SHAPE}")
    prompt, ignored = parse_prompt(values, groups, extra=IMAGE_KEYS)
    if prompt is None:
        raise ValueError("has an empty text")
    for name in ignored:
        report.ignored[name] = report.ignored.get(name, 0) + 1
    return CaptionedImage(root / values[names[0]], prompt, line)


def _checked(
    image: CaptionedImage, size: tuple[int, int] | None, max_upscale: float, known: Callable[[str], bool]
) -> CaptionedImage:
    """`image` with its digest. Raises `BadImageError`."""
    try:
        content = image.path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        with Image.open(io.BytesIO(content)) as opened:
            turned = opened.getexif().get(0x0112, 1) >= 5  # a quarter turn, which swaps the sides
            width, height = opened.size[::-1] if turned else opened.size
            if not known(digest):
                opened.load()  # `verify` would let a truncated JPEG pass
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadImageError(f"cannot be read as an image ({error})") from None
    if size is not None and max(size[0] / height, size[1] / width) > max_upscale:
        raise BadImageError(
            f"is too small: {width} x {height} for {size[1]} x {size[0]} (data.max_upscale {max_upscale})"
        )
    return CaptionedImage(image.path, image.prompt, image.line, digest)


def load_image(file: Path | io.BytesIO, size: tuple[int, int]) -> Tensor:
    """The image [3, H, W] in [0, 1], scaled to cover `size` (height, width) and cropped to its centre."""
    with Image.open(file) as opened:
        upright = ImageOps.exif_transpose(opened).convert("RGB")
        fitted = ImageOps.fit(upright, (size[1], size[0]), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 255


def order(count: int, positions: Sequence[int], seed: int, weights: tuple[float, ...] | None = None) -> list[int]:
    """Items seen at `positions` of an endless shuffled pass over `count` items: each pass is a new permutation.

    With `weights` [count], a pass of `count` positions holds an item as often as its share of them, rounded up or down
    at random and right on average.
    """
    if weights is not None and len(set(weights)) == 1:
        weights = None
    chosen = []
    for position in positions:
        epoch, place = divmod(position, count)
        chosen.append(int(_pass(count, seed, epoch, weights)[place]))
    return chosen


@lru_cache(maxsize=4)
def _pass(count: int, seed: int, epoch: int, weights: tuple[float, ...] | None) -> Tensor:
    draws = generator(seed, epoch, 0, "order")
    shuffled = torch.randperm(count, generator=draws)
    if weights is None:
        return shuffled
    ends = torch.tensor(weights, dtype=torch.float64).cumsum(0)
    points = (torch.arange(count, dtype=torch.float64) + torch.rand((), generator=draws, dtype=torch.float64)) / count
    return torch.searchsorted(ends / ends[-1], points, right=True).clamp_(max=count - 1)[shuffled]
