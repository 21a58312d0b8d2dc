"""`srpo` on the operators trains as on the formulas they implement."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import quick_config
from torch import Tensor
from torch.nn.functional import normalize
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as vision

import srpo.objective
import srpo.rewards.preprocess
from srpo.runlog import read_log
from srpo.trainer import Trainer
from srpo_kernels.latents import unpack as unpack_tokens


def _inject(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    levels = sigma.T.reshape(-1, *[1] * (x0.ndim - 1))
    x0, noise = (t.expand_as(x0).repeat(sigma.shape[1], *[1] * (x0.ndim - 1)) for t in (x0, noise))
    return (1 - levels) * x0 + levels * noise


def _recover(x_t: Tensor, noise: Tensor, v: Tensor, start: Tensor, end: Tensor, **layout: object) -> Tensor:
    noise = noise.repeat(x_t.shape[0] // noise.shape[0], 1, 1)
    s, t = (level.T.reshape(-1, 1, 1) for level in (start, end))
    x0_hat = (x_t + (t - s) * v - t * noise) / (1 - t)
    return unpack_tokens(x0_hat, *layout["unpack"]) / layout["scaling_factor"] + layout["shift_factor"]


def _relative(image: Tensor, positive: Tensor, negative: Tensor, kappa: Tensor, *, scale: float, form: str) -> Tensor:
    assert form == "official"
    return scale * ((1 + kappa)[:, None] * positive - negative).mul(normalize(image, dim=-1)).sum(-1)


def _resize(image: Tensor, size: int, mean: tuple, std: tuple, *, value_range: tuple[float, float]) -> Tensor:
    assert value_range == (0, 1)
    resized = vision.resize(image, [size], interpolation=InterpolationMode.BICUBIC, antialias=True)
    return vision.normalize(vision.center_crop(resized, [size, size]), list(mean), list(std))


def test_loss_trajectory_is_that_of_the_formulas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Trainer(quick_config(tmp_path / "operators", "srpo.updates=4")).fit()
    monkeypatch.setattr(srpo.objective, "inject_noise", _inject)
    monkeypatch.setattr(srpo.objective, "recover", _recover)
    monkeypatch.setattr(srpo.rewards.cosine, "relative_reward", _relative)
    monkeypatch.setattr(srpo.rewards.preprocess, "resize_normalize", _resize)
    Trainer(quick_config(tmp_path / "formulas", "srpo.updates=4")).fit()
    ours, plain = (
        torch.tensor([list(record["losses"].values()) for record in read_log(tmp_path / name)])
        for name in ("operators", "formulas")
    )
    assert len(ours) == 4
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("chunk", ["null", "1", "3"])
def test_checkpointed_image_path_trains_the_same(chunk: str, tmp_path: Path) -> None:
    Trainer(quick_config(tmp_path / "plain", "srpo.updates=2")).fit()
    recomputed = ["model.checkpointing=block", f"model.image_chunk={chunk}"]
    Trainer(quick_config(tmp_path / "recomputed", "srpo.updates=2", *recomputed)).fit()
    plain, ours = (read_log(tmp_path / name) for name in ("plain", "recomputed"))
    for a, b in zip(plain, ours, strict=True):
        assert a["losses"]["total"] == pytest.approx(b["losses"]["total"], abs=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
