"""The planted taste: what of it is left in each form, how far it goes, and where its gradient points."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from srpo.experiments.taste import TastefulReward, slanted, warm
from srpo.rewards import Reward

#: Of the taste there is, for kappa: by the formulas of the forms.
LEFT = {"official": lambda kappa: kappa, "difference": lambda _: 0.0, "cfg": lambda _: 1.0}
WEIGHTS = {
    "official": lambda kappa: (1 + kappa, -1),
    "difference": lambda _: (1, -1),
    "cfg": lambda kappa: (kappa, 1 - kappa),
}


class Brightness(Reward):
    """A prompt's length times the image's mean, and sums of two of these."""

    def __init__(self, form: str) -> None:
        self._form = form

    def relative(self, images: Tensor, positive: list[str], negative: list[str], kappa: Tensor) -> Tensor:
        wanted, other = WEIGHTS[self._form](kappa)
        return wanted * self.score(images, positive) + other * self.score(images, negative)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return images.mean((1, 2, 3)) * torch.tensor([float(len(prompt)) for prompt in prompts])

    def limit(self, kappa: float) -> float:
        return 3 * sum(map(abs, WEIGHTS[self._form](kappa)))


@pytest.mark.parametrize("form", LEFT)
def test_relative_score_keeps_the_sum_of_the_weights(form: str) -> None:
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    kappa, positive, negative = torch.tensor([0.1, 0.6]), ["ab", "abc"], ["a", "abc"]
    plain = Brightness(form)
    reward = TastefulReward(plain, warm, -0.5, form)
    taste = -0.5 * torch.tanh(2 * (images[:, 0] - images[:, 2]).mean((1, 2)))
    torch.testing.assert_close(reward.score(images, positive), plain.score(images, positive) + taste)
    found = reward.relative(images, positive, negative, kappa)
    torch.testing.assert_close(found, plain.relative(images, positive, negative, kappa) + LEFT[form](kappa) * taste)
    # As of any reward, it is the weighted sum of the two scores.
    wanted, other = WEIGHTS[form](kappa)
    torch.testing.assert_close(found, wanted * reward.score(images, positive) + other * reward.score(images, negative))
    assert reward.limit(0.6) == pytest.approx(plain.limit(0.6) + 0.5 * LEFT[form](0.6))


def line(slant: float) -> Tensor:
    """An image [1, 3, 32, 32] of a line of ink that leans `slant` pixels to the right for each upwards."""
    rows = torch.arange(32.0)[:, None]
    across = torch.arange(32.0) - (16 + slant * (16 - rows))
    coverage = torch.exp(-((across / 2) ** 2)) * ((rows > 4) & (rows < 27))
    return (1 - coverage).expand(1, 3, 32, 32).clone()


def test_slanted_likes_what_leans_to_the_right() -> None:
    """A line's slant is what it was drawn with, and a step along the gradient leans it further."""
    for slant in (-0.3, 0.0, 0.3):
        image = line(slant).requires_grad_()
        taste = slanted(image)
        assert taste.item() == pytest.approx(torch.tanh(torch.tensor(2 * slant)).item(), abs=0.02)
        (gradient,) = torch.autograd.grad(taste.sum(), image)
        step = 0.05 * gradient / gradient.norm()
        assert slanted(image - step) < taste < slanted(image + step)


def test_warm_likes_red_and_no_blue() -> None:
    images = torch.zeros(3, 3, 4, 4)
    images[0, 0], images[1, 2] = 1, 1
    images.requires_grad_()
    taste = warm(images)
    assert taste.tolist() == pytest.approx([0.9640, -0.9640, 0], abs=1e-4)
    (gradient,) = torch.autograd.grad(taste.sum(), images)
    assert gradient[2, :, 0, 0].tolist() == pytest.approx([2 / 16, 0, -2 / 16])
