"""DanceGRPO's formulas in float64, against statistics that know nothing of them."""

from __future__ import annotations

import math
import statistics
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from srpo.baselines.grpo import clipped_loss, group_advantages, log_probability, transition
from srpo.latents import shifted_sigmas

ETA = 0.3


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def sampled_moments(steps: int, eta: float) -> tuple[float, float]:
    """Mean and variance that the SDE leaves of noise, for data of mean 2 and variance 1/4, whose velocity is known."""
    mean, variance = 0.0, 1.0
    for sigma, following in pairwise(shifted_sigmas(steps, 3.0).tolist()):
        total = (1 - sigma) ** 2 / 4 + sigma**2
        x = doubles(0.0, 1.0)
        # E[noise - x0 | x] of two normals whose weighted sum is x.
        velocity = -2 + (sigma - (1 - sigma) / 4) / total * (x - (1 - sigma) * 2)
        (offset, one), deviation = transition(x, velocity, doubles(sigma, sigma), doubles(following, following), eta)
        slope = (one - offset).item()
        mean, variance = slope * mean + offset.item(), slope**2 * variance + deviation[0].item() ** 2
    return mean, variance


@pytest.mark.parametrize("eta", [0.0, ETA, 0.9])
def test_noise_changes_no_marginal(eta: float) -> None:
    """Of first order: twice the steps, half the error."""
    errors = []
    for steps in (400, 800):
        mean, variance = sampled_moments(steps, eta)
        errors.append(max(abs(mean - 2), abs(variance - 0.25)))
    assert errors[0] < 0.01
    assert 1.8 < errors[0] / errors[1] < 2.2


def test_transition_by_hand() -> None:
    x, velocity = doubles(0.5), doubles(-1.0)
    sigma, following = 0.8, 0.6
    x0 = 0.5 + 0.8
    score = -(0.5 - 0.2 * x0) / 0.64
    mean, deviation = transition(x, velocity, doubles(sigma), doubles(following), ETA)
    assert mean.item() == pytest.approx(0.5 + 0.2 + ETA**2 / 2 * score * 0.2, rel=1e-14)
    assert deviation.item() == pytest.approx(ETA * math.sqrt(0.2), rel=1e-14)


def test_rows_have_levels_of_their_own() -> None:
    torch.manual_seed(0)
    x, velocity = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    sigma, following = doubles(1.0, 0.7, 0.3), doubles(0.9, 0.5, 0.1)
    mean, deviation = transition(x, velocity, sigma, following, ETA)
    for row in range(3):
        at = slice(row, row + 1)
        alone = transition(x[at], velocity[at], sigma[at], following[at], ETA)
        assert torch.equal(mean[at], alone[0])
        assert torch.equal(deviation[at], alone[1])


def test_log_probability_is_the_normal_distribution_s() -> None:
    torch.manual_seed(0)
    state, mean = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    mean.requires_grad_()
    deviation = doubles(0.5, 1.0, 0.05)
    found = log_probability(state, mean, deviation)
    normal = torch.distributions.Normal(mean, deviation[:, None, None])
    torch.testing.assert_close(found, normal.log_prob(state).mean((1, 2)), rtol=1e-13, atol=0)
    (gradient,) = torch.autograd.grad(found.sum(), mean)
    torch.testing.assert_close(gradient, (state - mean) / deviation[:, None, None] ** 2 / 20, rtol=1e-13, atol=0)


def test_advantages_are_within_a_prompt_s_group() -> None:
    rewards = [[1.0, 70.0], [2.0, 10.0], [6.0, 10.0]]
    found = group_advantages(torch.tensor(rewards, dtype=torch.float64), 1.1)
    for prompt, group in enumerate(zip(*rewards, strict=True)):
        middle, spread = statistics.mean(map(Fraction, group)), statistics.stdev(group)
        wanted = [max(-1.1, min(1.1, float(reward - middle) / spread)) for reward in group]
        assert found[:, prompt].tolist() == pytest.approx(wanted, rel=1e-8)
    assert found[0, 1] == 1.1, "clipped"
    assert group_advantages(torch.ones(3, 1), 5.0).tolist() == [[0.0]] * 3, "a group without differences"


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.05, 2.0, -2.1, -2.1),  # inside
        (1.5, 2.0, -2.2, 0.0),  # better and already likelier: nothing to gain
        (0.5, 2.0, -1.0, -1.0),  # better and less likely
        (0.5, -2.0, 1.8, 0.0),  # worse and already less likely
        (1.5, -2.0, 3.0, 3.0),  # worse and likelier
    ],
)
def test_clipped_objective_and_its_gradient(ratio: float, advantage: float, loss: float, slope: float) -> None:
    old = doubles(-3.0)
    new = (old + math.log(ratio)).requires_grad_()
    found = clipped_loss(new, old, doubles(advantage), 0.1)
    assert found.item() == pytest.approx(loss, rel=1e-14)
    (gradient,) = torch.autograd.grad(found.sum(), new)
    assert gradient.item() == pytest.approx(slope, rel=1e-14)
