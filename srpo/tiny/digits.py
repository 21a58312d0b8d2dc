"""Real handwritten digits in coloured ink, with captions measured from their pixels.

The digits are scikit-learn's `load_digits`: 1797 8x8 images of the UCI "Optical Recognition of Handwritten Digits"
data (E. Alpaydin, C. Kaynak; CC BY 4.0).  Each is enlarged to 32x32, moved, sheared and made bolder or thinner, and
written in ink of a colour between red, near-black and blue on white paper.  Over half of them are left out, in
training and held out alike: the illegible (a loop filled or open, a blot, a one like an L) and the least typical.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import distance_transform_edt
from scipy.ndimage import label as components
from sklearn.datasets import load_digits
from torch import Tensor

from srpo.tiny import ATTRIBUTES

__all__ = [
    "HOLES",
    "NAMES",
    "SIZE",
    "Digits",
    "Stats",
    "attribute_words",
    "caption",
    "export_images",
    "ink",
    "load",
    "measure",
    "random_caption",
    "tint",
    "topology",
]

SIZE = 32
FINE = 64  # the digits are drawn at this size first
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HOLES = (1, 0, 0, 0, 0, 0, 1, 0, 2, 1)  # in a legible digit of each class; a four is written open
BOLDEST, THINNEST = -0.31, 0.33  # how far a pen moves a stroke's edge inwards, as a share of half the stroke's width
BLOT = 11.0  # half the width, in fine pixels, of a stroke in which no shape is left to see
LEAN = -0.15  # the slant from which on a one looks like an L
HELD_OUT = 397  # of the 1797 digits, before any are left out
EACH = 100  # training digits of each class
DARKEST = 0.08  # the smallest channel of every ink, so that coverage does not depend on its colour
NAMED = 0.6  # an attribute gets a word when it is this many standard deviations from its class's mean


@dataclass(frozen=True)
class Stats:
    """Mean and standard deviation of every attribute within each digit class: {attribute: [10, 2]} fp32."""

    table: dict[str, Tensor]

    def z_scores(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Attributes of `images` [N, 3, 32, 32] in standard deviations from their class's mean: {attribute: [N]}."""
        values = measure(images)
        return {key: (values[key] - rows[labels, 0]) / rows[labels, 1] for key, rows in self.table.items()}


@dataclass(frozen=True)
class Digits:
    """Images [N, 3, 32, 32] fp32 in [0, 1] with their digits [N] int64, and the training split's statistics."""

    images: Tensor
    labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor
    stats: Stats


def ink(images: Tensor) -> Tensor:
    """Ink coverage [N, 32, 32] in [0, 1] of `images` [N, 3, 32, 32], the same whatever the ink's colour."""
    return ((1 - images.clamp(0, 1).amin(1)) / (1 - DARKEST)).clamp(max=1)


def tint(coverage: Tensor, colour: Tensor) -> Tensor:
    """Images [N, 3, 32, 32] of `coverage` [N, 32, 32] in ink of `colour` [N]: -1 blue, 0 near-black, 1 red."""
    red, blue = colour.clamp(min=0), (-colour).clamp(min=0)
    pigment = DARKEST + torch.stack([0.84 * red, 0.16 * blue, 0.87 * blue], 1)
    return 1 - coverage[:, None] * (1 - pigment[:, :, None, None])


def measure(images: Tensor) -> dict[str, Tensor]:
    """Raw attributes of `images` [N, 3, 32, 32] in [0, 1], each [N] fp32.

    stroke: width in pixels, twice the area over the perimeter (total variation); slant: horizontal shift per
    vertical pixel, positive to the right; aspect: width over height; colour: red minus blue, averaged over the ink.
    """
    x = ink(images).double()
    rows = torch.arange(x.shape[1], dtype=x.dtype, device=x.device)[:, None]
    columns = torch.arange(x.shape[2], dtype=x.dtype, device=x.device)
    area = x.sum((1, 2)) + 1e-6
    dy = rows - ((x * rows).sum((1, 2)) / area)[:, None, None]
    dx = columns - ((x * columns).sum((1, 2)) / area)[:, None, None]
    vyy, vxx, vxy = ((x * d).sum((1, 2)) / area + 1e-6 for d in (dy * dy, dx * dx, dx * dy))
    gradient = (x[:, :-1, 1:] - x[:, :-1, :-1]) ** 2 + (x[:, 1:, :-1] - x[:, :-1, :-1]) ** 2
    perimeter = (gradient + 1e-8).sqrt().sum((1, 2))
    colour = (x * (images[:, 0] - images[:, 2])).sum((1, 2)) / area
    values = {"stroke": 2 * area / perimeter, "slant": -vxy / vyy, "aspect": (vxx / vyy).sqrt(), "colour": colour}
    return {key: value.float() for key, value in values.items()}


def topology(written: np.ndarray) -> tuple[int, int]:
    """How many pieces a written digit [H, W] bool is in, and how many holes it has."""
    paper = np.pad(~written, 1, constant_values=True)
    return components(written, np.ones((3, 3)))[1], components(paper)[1] - 1


def caption(label: int, words: Sequence[str] = ()) -> str:
    """The caption of a digit: "digit seven", or "slanted bold digit seven" with attribute words."""
    return " ".join([*words, "digit", NAMES[label]])


def attribute_words(z: dict[str, Tensor]) -> list[list[str]]:
    """The words that are true of each image, from its z-scores: ["bold", "red"] for a broad stroke in red ink."""
    columns = [(ATTRIBUTES[key], value.tolist()) for key, value in z.items()]
    return [
        [pair[values[i] < 0] for pair, values in columns if abs(values[i]) > NAMED]
        for i in range(len(next(iter(z.values()))))
    ]


def random_caption(label: int, words: Sequence[str], rng: np.random.Generator, *, plain: float) -> str:
    """A caption of a digit that names most of its attribute `words`, in random order.

    With probability `plain` it names none, so that "digit seven" stands for every way of writing a seven.  Half of
    the others set the first word apart ("bold. slanted digit seven"), the form in which SRPO puts its control word
    before a prompt.
    """
    if rng.random() < plain:
        return caption(label)
    named = [word for word in words if rng.random() < 0.7]
    rng.shuffle(named)
    if named and rng.random() < 0.5:
        named[0] += "."
    return caption(label, named)


def _outlines(digits: Tensor) -> tuple[Tensor, Tensor]:
    """Signed distance to the stroke's edge (inside positive) and half the width of the strokes nearby, in pixels.

    Both are [N, 64, 64] for 8x8 digits [N, 8, 8].  Offsetting the edge by a fraction of that half width makes
    strokes bolder or thinner without breaking them, which thresholding the grey values does.
    """
    smooth = F.interpolate(digits[:, None], size=(FINE, FINE), mode="bicubic", align_corners=False)
    darkest, lightest = _nearby_maximum(smooth).clamp(min=0.5), -_nearby_maximum(-smooth)
    inside = (smooth > 0.44 * darkest + 0.5 * lightest)[:, 0].numpy()  # small loops stay open: their middle is grey
    within = torch.from_numpy(np.stack([distance_transform_edt(x) for x in inside])).float()
    outside = torch.from_numpy(np.stack([distance_transform_edt(~x) for x in inside])).float()
    distance = F.avg_pool2d((within - outside)[:, None], 3, stride=1, padding=1, count_include_pad=False)
    return distance[:, 0], _nearby_maximum(within[:, None]).clamp(min=2)[:, 0]


def _nearby_maximum(x: Tensor) -> Tensor:
    """Largest value of `x` [N, 1, H, W] within 8 pixels, smoothed."""
    largest = F.max_pool2d(F.max_pool2d(x, (17, 1), 1, (8, 0)), (1, 17), 1, (0, 8))
    return F.avg_pool2d(largest, 9, 1, 4, count_include_pad=False)


def _legible(distance: Tensor, half_width: Tensor, labels: Tensor) -> Tensor:
    """Which outlined digits [N] have no blot and, with the boldest and the thinnest pen, one piece and their holes."""
    legible = distance[:, 12:52].amax((1, 2)) <= BLOT  # where strokes end at the top and bottom edge they look wider
    lean = measure(tint((distance / 3 + 0.5).clamp(0, 1), torch.zeros(len(distance))))["slant"]
    legible &= (labels != 1) | (lean > LEAN)
    for pen in (BOLDEST, THINNEST):
        written = (distance > pen * half_width).numpy()
        legible &= torch.tensor([topology(x) == (1, HOLES[c]) for x, c in zip(written, labels.tolist(), strict=True)])
    return legible


def _typical(distance: Tensor, digits: Tensor) -> Tensor:
    """The two thirds of `digits` [M], outlined and of one class, that have others most like them."""
    shapes = F.avg_pool2d((distance[digits, None] / 3 + 0.5).clamp(0, 1), 4).flatten(1)
    rarity = torch.cdist(shapes, shapes).topk(11, largest=False)[0].sum(1)  # how far it is to the nearest ten
    return digits[rarity <= rarity.quantile(2 / 3)]


def _write(distance: Tensor, half_width: Tensor, rng: np.random.Generator) -> Tensor:
    """Images [N, 3, 32, 32] of outlined digits, each with its own pen: width, scale, shear, place and colour."""
    n = len(distance)
    pen = (BOLDEST + THINNEST) / 2 + (THINNEST - BOLDEST) / 2 * _triangular(rng, n)
    coverage = ((distance - pen[:, None, None] * half_width) / 3 + 0.5).clamp(0, 1)  # an edge of 3 fine pixels
    transform = torch.zeros(n, 2, 3)
    transform[:, 0, 0] = transform[:, 1, 1] = _uniform(rng, 1.15, 1.25, n)
    transform[:, 0, 1] = _uniform(rng, -0.1, 0.1, n)
    transform[:, :, 2] = _uniform(rng, -0.05, 0.05, 2 * n).reshape(n, 2)
    grid = F.affine_grid(transform, [n, 1, SIZE, SIZE], align_corners=False)
    return tint(F.grid_sample(coverage[:, None], grid, align_corners=False)[:, 0], _triangular(rng, n))


def _triangular(rng: np.random.Generator, n: int) -> Tensor:
    """[N] values in [-1, 1], densest at 0: most pens are ordinary, yet the extremes occur."""
    return _uniform(rng, -0.5, 0.5, n) + _uniform(rng, -0.5, 0.5, n)


def _uniform(rng: np.random.Generator, low: float, high: float, n: int) -> Tensor:
    return torch.from_numpy(rng.uniform(low, high, n)).float()


def load(*, seed: int = 0, copies: int = 8) -> Digits:
    """1000 x `copies` differently written images of legible digits, zero to nine in turn, and of others held out, once.

    A class with fewer than 100 such digits to train on repeats them, each time written differently.
    """
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))  # the same digits are held out for every seed
    rng = np.random.default_rng(seed)
    labels = torch.from_numpy(data.target[order]).long()
    distance, half_width = _outlines(torch.from_numpy(data.images[order] / 16).float())
    legible, trained = _legible(distance, half_width, labels), len(order) - HELD_OUT
    classes = [_typical(distance, (legible & (labels == c)).nonzero()[:, 0]) for c in range(len(NAMES))]
    train = torch.from_numpy(np.stack([np.resize(digits[digits < trained], EACH) for digits in classes], 1).flatten())
    test = torch.cat([digits[digits >= trained] for digits in classes]).sort()[0]
    images = torch.cat([_write(distance[train], half_width[train], rng) for _ in range(copies)])
    train_labels = labels[train].repeat(copies)
    values = measure(images)
    table = {
        key: torch.stack([torch.stack([v[train_labels == c].mean(), v[train_labels == c].std()]) for c in range(10)])
        for key, v in values.items()
    }
    return Digits(images, train_labels, _write(distance[test], half_width[test], rng), labels[test], Stats(table))


def export_images(out: Path, count: int, seed: int) -> None:
    """Write `count` training digits as PNG files into `out`, with a `metadata.jsonl` of plain captions.

    Each line is {"file_name": "00000.png", "text": "digit seven"}, the layout of Hugging Face's image folders.
    Raises ValueError when `count` is not between 1 and 8000.
    """
    if not 1 <= count <= len(NAMES) * EACH * 8:
        raise ValueError(f"count must be between 1 and {len(NAMES) * EACH * 8}, got {count}")
    data = load(seed=seed)
    out.mkdir(parents=True, exist_ok=True)
    pixels = (data.images[:count].permute(0, 2, 3, 1) * 255).round().byte().numpy()
    lines = []
    for i, label in enumerate(data.labels[:count].tolist()):
        Image.fromarray(pixels[i]).save(out / f"{i:05d}.png")
        lines.append(json.dumps({"file_name": f"{i:05d}.png", "text": caption(label)}))
    (out / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
