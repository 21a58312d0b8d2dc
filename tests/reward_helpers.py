"""Photographs, and small towers of real widths, for the tests of rewards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import skimage.data
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

#: Of the layers of an aesthetic head, and of ImageReward's.
WIDTHS = (1024, 128, 64, 16, 1)
#: How far scores may be from those of images resized by PIL, as a part of all that an embedding can do to a score:
#: PIL rounds to 1/255 twice, which tests/test_reward_scores.py bounds for a cosine.
PIL_BOUND = 2e-3


def photographs() -> list[Image.Image]:
    """Square and wide, larger than a tower's input and smaller."""
    arrays = [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea(), skimage.data.rocket()]
    return [*(Image.fromarray(array) for array in arrays), Image.fromarray(arrays[2][60:240, 100:250])]


def tensor(image: Image.Image) -> Tensor:
    """[1, 3, H, W] in [0, 1]."""
    return v2.functional.pil_to_tensor(image)[None] / 255


def head(layers: tuple[str, ...], width: int, seed: int = 0) -> dict[str, Tensor]:
    """Random weights under the names of `layers`, of such a size that the picture shows in the score."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for layer, size, out in zip(layers, (width, *WIDTHS), WIDTHS, strict=False):
        state[f"{layer}.weight"] = torch.randn(out, size, generator=generator) / size**0.5
        state[f"{layer}.bias"] = torch.randn(out, generator=generator) / 10
    return state


def plain_head(state: dict[str, Tensor], dropouts: tuple[float, ...]) -> nn.Sequential:
    """The published head: linear layers and dropout, each dropout after the linear layer of its place."""
    prefix = next(iter(state)).partition(".")[0]
    sizes = (state[f"{prefix}.0.weight"].shape[1], *WIDTHS)
    layers: list[nn.Module] = []
    for index, (size, out) in enumerate(zip(sizes, WIDTHS, strict=False)):
        layers += [nn.Linear(size, out), *([nn.Dropout(dropouts[index])] if index < len(dropouts) else [])]
    model = nn.Sequential(*layers).eval()
    model.load_state_dict({name.removeprefix(f"{prefix}."): value for name, value in state.items()})
    return model


def slope_error(score: Callable[[Tensor], Tensor], image: Tensor) -> float:
    """Of the gradient in the image, in float64: relative difference to central differences along the sum of itself and
    a random direction. Pixels stay away from the clamp."""
    image = (0.1 + 0.8 * image.double()).requires_grad_()
    (gradient,) = torch.autograd.grad(score(image).sum(), image)
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    direction = gradient / gradient.norm() + noise / noise.norm()
    with torch.no_grad():
        numeric = (score(image + 1e-4 * direction) - score(image - 1e-4 * direction)).sum().item() / 2e-4
    return abs(numeric - (gradient * direction).sum().item()) / gradient.norm().item()


def save(path: Path, state: dict[str, Tensor]) -> Path:
    torch.save(state, path)
    return path
