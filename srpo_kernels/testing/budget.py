"""Error budgets: one ulp of the output dtype, plus four times the error of eager fp32 (against float64)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from srpo_kernels.testing.poison import poisoned_outputs

__all__ = ["SLACK", "assert_within_budget", "check_against_reference"]

SLACK = 4.0


def assert_within_budget(actual: Tensor, exact: Tensor, fp32: Tensor, *, name: str) -> None:
    """``|actual - exact| <= eps(dtype) |exact| + 4 max|fp32 - exact|``, element by element.

    `exact` is the reference in float64 and `fp32` the same reference in fp32, both on the very inputs the operator got.
    """
    assert actual.shape == exact.shape, f"{name}: shape {list(actual.shape)}, expected {list(exact.shape)}"
    assert actual.isfinite().all(), f"{name}: non-finite output"
    if actual.numel() == 0:
        return
    error = (actual.double() - exact.double()).abs()
    floor = (fp32.double() - exact.double()).abs().max()
    bound = torch.finfo(actual.dtype).eps * exact.double().abs() + SLACK * floor
    worst = (error / bound.clamp_min(torch.finfo(torch.float64).tiny)).max().item()
    assert worst <= 1.0, f"{name}: {worst:.2f} x the error budget (fp32 error {floor:.1e})"


def check_against_reference(
    operator: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: Mapping[str, Tensor],
    *,
    differentiable: tuple[str, ...],
    upstream: Tensor | None = None,
) -> dict[str, Tensor]:
    """Forward and every gradient of `operator` within the budget of `reference`; returns what the operator gave.

    Both take `inputs` by name. `reference` is called on float64 and on fp32 copies of the floating ones. `upstream` is
    the gradient of the output, random when not given.
    """

    def run(function: Callable[..., Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
        given = {}
        for name, tensor in inputs.items():
            cast = tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)
            given[name] = cast.detach().requires_grad_(name in differentiable)
        output = function(**given)
        gradient = (upstream if upstream is not None else _like(output)).to(output.dtype)
        gradients = torch.autograd.grad(output, [given[name] for name in differentiable], gradient)
        results = dict(zip((f"d{name}" for name in differentiable), gradients, strict=True))
        return {"output": output.detach(), **results}

    if upstream is None:
        upstream = _like(operator(**inputs))
    with poisoned_outputs():
        ours = run(operator, None)
    exact, fp32 = run(reference, torch.float64), run(reference, torch.float32)
    for name, actual in ours.items():
        assert_within_budget(actual, exact[name], fp32[name], name=name)
    return ours


def _like(output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(output.numel())
    return torch.randn(output.shape, generator=generator).to(output.device, output.dtype)
