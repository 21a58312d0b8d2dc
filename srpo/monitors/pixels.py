"""What images look like, without a model: colour, clipping, sharpness and grids. Every value is of one image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["clipped", "grid_energy", "lab", "look", "luma", "sharpness"]

# IEC 61966-2-1: linear sRGB to CIE XYZ at D65, for the 2 degree observer.
_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
_WHITE = (0.95047, 1.0, 1.08883)
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_BINS = 8  # of a spectrum, on either side of a harmonic, that it is compared with


def look(images: Tensor, *, factor: int) -> dict[str, Tensor]:
    """All measurements [N] of images [N, 3, H, W] in [0, 1]; `factor`: pixels that one latent pixel of the VAE covers.

    A token is a patch of 2 x 2 latent pixels. Grids are looked for where four of their periods fit.
    """
    _, a, b = lab(images).unbind(1)
    periods = {"grid_vae": factor, "grid_patch": 2 * factor}
    fitting = {name: period for name, period in periods.items() if 4 * period <= min(images.shape[2:])}
    grids = {name: grid_energy(images, period, odd=name == "grid_patch") for name, period in fitting.items()}
    return {
        "lab_a": a.mean((1, 2)),
        "lab_b": b.mean((1, 2)),
        "chroma": torch.hypot(a, b).mean((1, 2)),
        "clipped": clipped(images),
        "sharpness": sharpness(images),
        **grids,
    }


def lab(images: Tensor) -> Tensor:
    """CIE L*a*b* [N, 3, H, W], fp64, of sRGB images [N, 3, H, W] in [0, 1], under D65: L* in [0, 100].

    ``L* = 116 f(Y) - 16, a* = 500 (f(X) - f(Y)), b* = 200 (f(Y) - f(Z))`` of XYZ relative to white, with f the cube
    root but for the darkest, where it is ``7.787 t + 16 / 116`` (CIE 15).
    """
    rgb = images.double()
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    matrix = torch.tensor(_XYZ, dtype=torch.float64) / torch.tensor(_WHITE, dtype=torch.float64)[:, None]
    xyz = torch.einsum("oc,nchw->nohw", matrix.to(rgb.device), linear)
    x, y, z = torch.where(xyz > 0.008856, xyz.clamp(min=0.008856) ** (1 / 3), 7.787 * xyz + 16 / 116).unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def luma(images: Tensor) -> Tensor:
    """Brightness [N, H, W] in 8-bit levels, fp64: ``255 (0.299 R + 0.587 G + 0.114 B)`` (ITU-R BT.601)."""
    return torch.einsum(
        "c,nchw->nhw", torch.tensor(_LUMA, dtype=torch.float64, device=images.device), images.double() * 255
    )


def clipped(images: Tensor) -> Tensor:
    """Share [N] of pixels with a channel at either end of its range in 8 bits."""
    levels = (images.double() * 255).round()
    return ((levels <= 0) | (levels >= 255)).any(1).double().mean((1, 2))


def sharpness(images: Tensor) -> Tensor:
    """Variance [N] of the luma's Laplacian ``4 y - (its four neighbours)``, in 8-bit levels squared. Blur lowers it."""
    y = luma(images)[:, None]
    kernel = torch.tensor([[0.0, -1.0, 0.0], [-1.0, 4.0, -1.0], [0.0, -1.0, 0.0]], dtype=y.dtype, device=y.device)
    return F.conv2d(y, kernel[None, None]).flatten(1).var(1, unbiased=False)


def grid_energy(images: Tensor, period: int, *, odd: bool = False) -> Tensor:
    """How much a pattern of `period` pixels stands out of the spectrum [N]: 1 where nothing does.

    The power of the luma at ``m / period`` cycles per pixel, for every m up to the Nyquist frequency, over the
    geometric mean of the nearest frequencies on either side; the mean over m, and over both directions. The spectrum
    along one direction is that of all lines under a Hann window, averaged.

    `odd`: odd m only, which half the period has not.

    Raises `ValueError` for images that do not hold four periods.
    """
    y = luma(images)
    if min(y.shape[1:]) < 4 * period:
        raise ValueError(f"grid_energy: images must be at least {4 * period} pixels wide and high, got {list(y.shape)}")
    return (_line_energy(y, period, odd) + _line_energy(y.transpose(1, 2), period, odd)) / 2


def _line_energy(lines: Tensor, period: int, odd: bool) -> Tensor:
    """`grid_energy` along the last of three dimensions."""
    length = (
        lines.shape[-1] // period * period
    )  # whole periods, so that each harmonic is one frequency of the transform
    lines = lines[..., :length]
    window = torch.hann_window(length, dtype=lines.dtype, device=lines.device)
    spectrum = torch.fft.rfft((lines - lines.mean(-1, keepdim=True)) * window).abs().square().mean(1)
    # Rounding to 8 bits adds noise of variance 1/12 everywhere: less than this is not there.
    power = spectrum + window.square().sum() / 12
    spacing = length // period
    reach = range(2, min(spacing // 2, _BINS) + 1)  # beyond the window's own width, and half-way to the next harmonic
    ratios = []
    for harmonic in range(spacing, length // 2 + 1, spacing * (2 if odd else 1)):
        near = [k for distance in reach for k in (harmonic - distance, harmonic + distance) if k < power.shape[-1]]
        ratios.append(power[:, harmonic] / power[:, near].log().mean(-1).exp())
    return torch.stack(ratios).mean(0)
