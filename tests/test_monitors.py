"""Monitors on images made for them: formulas against other libraries, and every fault seen by its own monitor."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage import data
from skimage.color import rgb2lab

from srpo.monitors import MONITORS, Limit, ValidationConfig
from srpo.monitors.measured import breaches, mean_by_prompt
from srpo.monitors.pairs import diversity, diversity_pixels, drift
from srpo.monitors.pixels import clipped, grid_energy, lab, look, sharpness

_PROMPTS = ["a cat", "a cup"]


@pytest.fixture(scope="module")
def photos() -> torch.Tensor:
    """Four crops of each of two photographs, [8, 3, 192, 192] in [0, 1], none of them near black or white."""
    crops = []
    for photo in (data.chelsea(), data.coffee()):
        pixels = torch.from_numpy(photo.copy()).permute(2, 0, 1).float() / 255
        crops += [pixels[:, 40 + 16 * n :, 60 + 24 * n :][:, :192, :192] for n in range(4)]
    return 0.05 + 0.9 * torch.stack(crops)


def _measured(images: torch.Tensor) -> dict[str, dict[str, float]]:
    """What a run measures of images without a model, of four images of either prompt."""
    prompts = [prompt for prompt in _PROMPTS for _ in range(4)]
    pixels = (images * 255).round() / 255
    values = look(pixels, factor=8)
    rows = {row: {name: of[row].item() for name, of in values.items()} for row in range(8)}
    pairs = {prompt: diversity_pixels(pixels[4 * n : 4 * n + 4]).item() for n, prompt in enumerate(_PROMPTS)}
    return {**mean_by_prompt(rows, prompts), "diversity_pixels": pairs}


def _stripes(period: int, amplitude: float) -> torch.Tensor:
    wave = torch.cos(2 * math.pi * torch.arange(192) / period)
    return amplitude * (wave[:, None] + wave[None, :])


def _saturated(images: torch.Tensor) -> torch.Tensor:
    grey = images.mean(1, keepdim=True)
    return (grey + 1.6 * (images - grey)).clamp(0.02, 0.98)


_FAULTS = {
    "nothing": (lambda images: images, set()),
    "slightly brighter": (lambda images: images * 1.03, set()),
    "saturated": (_saturated, {"chroma", "lab_a", "lab_b"}),  # these photographs are warm: more of their colour
    "red": (lambda images: images + torch.tensor([0.04, -0.03, 0.0])[:, None, None], {"lab_a"}),
    "blue": (lambda images: images + torch.tensor([-0.02, -0.02, 0.06])[:, None, None], {"lab_b", "chroma"}),
    "blurred": (lambda images: F.avg_pool2d(F.pad(images, (1, 1, 1, 1), "reflect"), 3, 1), {"sharpness"}),
    "burnt out": (lambda images: (images + 0.25).clamp(0, 1), {"clipped"}),
    "grid of 8": (lambda images: images + _stripes(8, 0.015), {"grid_vae"}),
    "grid of 16": (lambda images: images + _stripes(16, 0.03), {"grid_patch"}),
    "stripes of 11": (lambda images: images + _stripes(11, 0.03), set()),
    "collapsed": (lambda images: images[[0, 0, 0, 0, 4, 4, 4, 4]].lerp(images, 0.5), {"diversity_pixels"}),
}


@pytest.mark.parametrize("fault", _FAULTS)
def test_every_fault_trips_its_own_monitor_by_default(fault: str, photos: torch.Tensor) -> None:
    change, expected = _FAULTS[fault]
    found = breaches(_measured(change(photos).clamp(0, 1)), _measured(photos), ValidationConfig().warnings())
    assert {breach.monitor for breach in found} == expected


def test_lab_is_scikit_images(photos: torch.Tensor) -> None:
    dark = torch.rand(1, 3, 192, 192, generator=torch.Generator().manual_seed(0)) * 0.05
    images = torch.cat([photos, dark])
    wanted = rgb2lab(images.permute(0, 2, 3, 1).double().numpy())
    # Both compute in float64; scikit-image's white point is rounded to six digits as ours is.
    np.testing.assert_allclose(lab(images).permute(0, 2, 3, 1).numpy(), wanted, atol=1e-4)


def test_sharpness_and_clipping_of_known_images() -> None:
    checks = ((torch.arange(8)[:, None] + torch.arange(8)) % 2).float().expand(1, 3, 8, 8)
    # The Laplacian of a full-range checkerboard alternates between 4 x 255 and -4 x 255.
    assert sharpness(checks).item() == pytest.approx((4 * 255) ** 2)
    assert sharpness(torch.full((1, 3, 8, 8), 0.3)).item() == pytest.approx(0, abs=1e-20)
    image = torch.full((1, 3, 8, 8), 0.5)
    image[0, 1, 0, :] = 1.0
    image[0, 2, 1, :4] = 0.001  # 0 in 8 bits
    image[0, 2, 2, :4] = 0.003  # 1 in 8 bits
    assert clipped(image).item() == pytest.approx(12 / 64)


def test_grid_energy_is_the_power_over_its_surroundings() -> None:
    noise = torch.rand(64, 3, 96, 96, generator=torch.Generator().manual_seed(0)) * 0.4 + 0.3
    plain = [grid_energy(noise, period, odd=odd).mean().item() for period, odd in ((8, False), (16, True), (12, False))]
    # The spectrum of white noise is flat: averaged over 96 lines the ratio is 1 but for the Jensen gap, below 1/96.
    assert plain == pytest.approx([1, 1, 1], abs=0.02)
    for period, odd in ((8, False), (16, True)):
        weak, strong = (
            grid_energy(noise + _stripes(period, a)[:96, :96], period, odd=odd).mean() for a in (0.02, 0.04)
        )
        assert (strong - 1) / (weak - 1) == pytest.approx(4, rel=0.05)  # power goes with the amplitude squared
        assert grid_energy(noise + _stripes(24 - period, 0.04)[:96, :96], period, odd=odd).mean() == pytest.approx(
            1, abs=0.05
        )
    flat = torch.full((1, 3, 64, 64), 0.5)
    assert grid_energy(flat, 8).item() == pytest.approx(1)
    with pytest.raises(ValueError, match=r"at least 64 pixels wide and high, got \[1, 48, 64\]"):
        grid_energy(flat[:, :, :48], 16)
    assert "grid_patch" not in look(flat[:, :, :48], factor=8)


def test_diversity_and_drift_of_known_vectors() -> None:
    assert diversity(torch.eye(3)).item() == pytest.approx(1)
    assert diversity(torch.ones(4, 5) * torch.arange(1, 5)[:, None]).item() == pytest.approx(0, abs=1e-15)
    images = torch.stack([torch.full((3, 4, 4), value) for value in (0.0, 0.2, 0.6)])
    assert diversity_pixels(images).item() == pytest.approx(255 * (0.2 + 0.6 + 0.4) / 3)
    start = torch.tensor([[[3.0, 4.0]], [[1.0, 0.0]]])
    moved = start + torch.tensor([[[0.0, 1.0]], [[0.0, 0.0]]])
    assert drift(moved, start, (0.9, 0.25)) == {"drift@0.9": pytest.approx(0.2), "drift@0.25": 0.0}


def test_limits_and_the_worst_prompt() -> None:
    start = {"held_out": {"a": 1.0, "b": 3.0}, "clipped": {"a": 0.0, "b": 0.1}, "lab_a": {"a": 1.0, "b": 1.0}}
    limits = {"held_out": Limit.parse("25%"), "clipped": Limit.parse(0.05), "lab_a": Limit.parse(2)}

    def found(**values: tuple[float, float]) -> list[str]:
        now = {name.replace("_at_", "@"): dict(zip("ab", pair, strict=True)) for name, pair in values.items()}
        return [str(breach) for breach in breaches(now, start | {"clipped@64x64": start["clipped"]}, limits)]

    assert found(held_out=(0.7, 2.3), clipped=(0.05, 0.14), lab_a=(3.0, 3.0)) == []
    assert found(held_out=(9.0, 9.0), clipped=(0.0, 0.0)) == []  # the way that does no harm
    (told,) = found(held_out=(0.9, 2.0))
    assert "held_out (held-out reward, score) went from 2 to 1.45, more than 25% away" in told
    assert "worst for 'b', 3 to 2" in told
    assert ["lab_a" in told for told in found(lab_a=(-2.0, -2.0))] == [True]
    assert ["clipped@64x64" in told for told in found(clipped_at_64x64=(0.3, 0.3))] == [True]
    (told,) = found(held_out=(math.nan, 3.0))
    assert "worst for 'a', 1 to nan" in told


@pytest.mark.parametrize("text", ["much", "5 percent", -1, "-3%", True, math.nan, None])
def test_unusable_limits(text: object) -> None:
    with pytest.raises(ValueError, match="must be a number in the monitor's unit or a text such as '25%'"):
        Limit.parse(text)  # type: ignore[arg-type]


def test_every_monitor_is_described() -> None:
    table = (Path(__file__).parents[1] / "docs/monitors.md").read_text(encoding="utf-8")
    for name, monitor in MONITORS.items():
        (row,) = [line for line in table.splitlines() if line.startswith(f"| `{name}`")]
        default = "none" if monitor.warn is None else str(monitor.warn)
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[-3:] == [monitor.unit, monitor.harm, default]
