"""Solvers of the flow, and what a recipe's rollouts run on."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import quick_config, quick_overrides

import srpo.batches
from srpo.config import load_config
from srpo.errors import InputError
from srpo.latents import shifted_sigmas
from srpo.sampling import Solver, integrate
from srpo.trainer import Trainer


def error(solver: Solver, steps: int, shift: float) -> float:
    """At sigma 0 of dx/dsigma = x cos(sigma), whose solution is exp(sin(sigma)), from 1 at sigma 1."""
    sigmas = shifted_sigmas(steps, shift).tolist()
    found = integrate(lambda x, step: x * math.cos(sigmas[step]), torch.ones(1, dtype=torch.float64), sigmas, solver)
    return abs(found.item() - math.exp(-math.sin(1.0)))


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("adams2", 2)])
def test_order(solver: Solver, order: int, shift: float) -> None:
    """Twice the steps, 2^order less error; on even schedules and on shifted ones."""
    errors = [error(solver, steps, shift) for steps in (40, 80, 160)]
    orders = [math.log2(more / less) for more, less in itertools.pairwise(errors)]
    assert all(abs(found - order) < 0.15 for found in orders), orders


def test_steps_are_one_call_each_and_the_second_extrapolates() -> None:
    calls: list[int] = []

    def velocity(x: torch.Tensor, step: int) -> torch.Tensor:
        calls.append(step)
        return torch.full_like(x, (2.0, 5.0, 1.0)[step])

    sigmas = [1.0, 0.6, 0.4, 0.0]
    found = integrate(velocity, torch.zeros(1, dtype=torch.float64), sigmas, "adams2")
    second = 5 + 0.5 * (0.2 / 0.4) * (5 - 2)
    third = 1 + 0.5 * (0.4 / 0.2) * (1 - 5)
    assert found.item() == pytest.approx(-0.4 * 2 - 0.2 * second - 0.4 * third, rel=1e-12)
    assert calls == [0, 1, 2]


def test_a_recipe_chooses_solver_and_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rollouts of training get the recipe's solver and e4m3; sample grids are neither."""
    seen: list[dict[str, Any]] = []
    plain = srpo.batches.rollout
    monkeypatch.setattr(
        srpo.batches, "rollout", lambda *given, **options: seen.append(options) or plain(*given, **options)
    )
    config = quick_config(
        tmp_path / "run", "srpo.updates=1", "model.precision=fp8-rollout", "run.rollout_solver=adams2"
    )
    trainer = Trainer(config)
    assert trainer.flux.quantized is not None
    before = [parameter.detach().clone() for parameter in trainer.parameters]
    assert trainer.fit() == 1
    assert seen
    assert all(options["solver"] == "adams2" and options["quantized"] for options in seen)
    assert any(not torch.equal(*pair) for pair in zip(before, trainer.parameters, strict=True))
    assert trainer.flux.quantized.refresh() > 0  # the update is for the next rollout to see


def test_an_unknown_solver_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="rollout_solver"):
        load_config("tiny", quick_overrides(tmp_path, "run.rollout_solver=heun"))
