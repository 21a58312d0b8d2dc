"""Pictures on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from srpo.sampling import to_uint8

__all__ = ["make_grid", "make_pairs", "panels", "save_grid"]

_SMALLEST = 96  # pixels a small image is enlarged to, so that it can be looked at
_GAP = 4


def make_grid(images: Tensor, columns: int | None = None) -> Image.Image:
    """Images [N, 3, H, W] in [0, 1] in rows of `columns` (default: about square), small ones enlarged."""
    pixels = to_uint8(images)
    count, height, width, _ = pixels.shape
    columns = columns or int(np.ceil(np.sqrt(count)))
    scale = max(1, _SMALLEST // min(height, width))
    cell = (height * scale + _GAP, width * scale + _GAP)
    rows = -(-count // columns)
    sheet = Image.new("RGB", (columns * cell[1] - _GAP, rows * cell[0] - _GAP), "#808080")
    for index, array in enumerate(pixels):
        tile = Image.fromarray(array).resize((width * scale, height * scale), Image.Resampling.BICUBIC)
        sheet.paste(tile, (index % columns * cell[1], index // columns * cell[0]))
    return sheet


def make_pairs(before: Tensor, after: Tensor) -> Image.Image:
    """`make_grid` of pairs: of each image how it was and, on its right, how it is."""
    return make_grid(torch.cat([before, after], 3))


def save_grid(images: Tensor, path: Path, columns: int | None = None) -> None:
    """Write `make_grid` as PNG, creating the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    make_grid(images, columns).save(path)


def panels(titled: Sequence[tuple[str, Tensor]], columns: int, *, stacked: bool = False) -> Image.Image:
    """Grids side by side, or one above the other, each under its title."""
    grids = [make_grid(images, columns) for _, images in titled]
    bar, gap = 40, 24
    widths, heights = [grid.width for grid in grids], [grid.height + bar for grid in grids]
    if stacked:
        sheet = Image.new("RGB", (max(widths), sum(heights)), "white")
    else:
        sheet = Image.new("RGB", (sum(widths) + gap * (len(grids) - 1), max(heights)), "white")
    draw, left, top = ImageDraw.Draw(sheet), 0, 0
    for (title, _), grid in zip(titled, grids, strict=True):
        font = ImageFont.load_default(24)
        draw.text((left + grid.width / 2, top + bar / 2), title, fill="black", font=font, anchor="mm")
        sheet.paste(grid, (left, top + bar))
        left, top = (left, top + grid.height + bar) if stacked else (left + grid.width + gap, top)
    return sheet
