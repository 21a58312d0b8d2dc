"""How far the weights of every mode are from AdamW in float64."""

from __future__ import annotations

import pytest
import torch
from adamw_cases import parameters

from benchmarks.optimizer_accuracy import (
    LR,
    Errors,
    Float64,
    displacement_error,
    gradients,
    library_errors,
    moment_errors,
    peer_errors,
)
from srpo_kernels.optim import AdamW

#: Largest relative error of the displacement, and of its gain.
LIMITS = {"M4": (0.01, 0.002), "M3": (0.04, 0.008), "M2": (0.08, 0.012)}


@pytest.mark.parametrize("weights", ["fp32", "split32"])
@pytest.mark.parametrize("shape", [(7,), (), (3, 5), (130, 257), (64, 3, 3, 3), (0,), (256, 192)])
def test_exact_modes_are_as_accurate_as_torch(weights: str, shape: tuple[int, ...]) -> None:
    (parameter,) = parameters(weights, shape)
    twin = torch.nn.Parameter(parameter.detach().to(torch.float32, copy=True))
    start = twin.detach().double()
    ours = AdamW([parameter], LR, weight_decay=0.01, weights=weights, moments="fp32")
    theirs = torch.optim.AdamW([twin], lr=LR, weight_decay=0.01, foreach=False)
    exact = Float64(twin.detach(), weight_decay=0.01)
    generator = torch.Generator().manual_seed(3)
    for _ in range(50):
        twin.grad = 9e-7 * torch.randn(shape, generator=generator)
        parameter.grad = twin.grad.to(parameter.dtype)
        twin.grad = parameter.grad.float()
        before = [ours.master_weights()[0].double(), twin.detach().double()]
        ours.step()
        theirs.step()
        exact.step(twin.grad)
        # One step's own rounding: 2 ulp of the weight between the two.
        moved = [ours.master_weights()[0].double() - before[0], twin.detach().double() - before[1]]
        ulp = torch.maximum(start.abs(), torch.full_like(start, 1e-30)) * 2.0**-23 * 1.1
        assert ((moved[0] - moved[1]).abs() <= 2 * ulp + 1e-5 * LR).all()
    if twin.numel() > 1:
        wanted = exact.weight - start
        own = displacement_error(twin.detach().double() - start, wanted)[0]
        error = displacement_error(ours.master_weights()[0].double() - start, wanted)[0]
        assert error <= max(1.2 * own, 1e-6)
        assert error <= 5e-4


@pytest.mark.parametrize("steps", [1, 200])
def test_split32_is_fp32_bit_by_bit(steps: int) -> None:
    (half,) = parameters("split32", (64, 512))
    whole = torch.nn.Parameter(half.detach().float())
    split = AdamW([half], LR, weights="split32")
    plain = AdamW([whole], LR, weights="fp32")
    for gradient in gradients(9e-7, steps):
        half.grad, whole.grad = gradient.bfloat16(), gradient.bfloat16().float()
        split.step()
        plain.step()
    assert torch.equal(split.master_weights()[0], whole.detach())
    assert (half.detach().float() - whole.detach()).abs().max() <= whole.detach().abs().max() * 2.0**-8


def _check(found: Errors) -> None:
    for name, (error, gain) in found.items():
        assert error <= LIMITS[name][0], (name, error)
        assert abs(gain - 1) <= LIMITS[name][1], (name, gain)


@pytest.mark.parametrize("rms", [1e-4, 9e-7, 9e-8, 1e-8, 1e-9])
def test_compressed_moments_for_20_steps(rms: float) -> None:
    _check(moment_errors(["M4", "M3", "M2"], rms, 20, rows=64))


@pytest.mark.parametrize("rms", [9e-7, 1e-9])
def test_compressed_moments_for_200_steps(rms: float) -> None:
    _check(moment_errors(["M4", "M3", "M2"], rms, 200))


def test_compressed_moments_with_outliers() -> None:
    _check(moment_errors(["M4", "M3", "M2"], 9e-7, 100, spread=2.0))


@pytest.mark.slow
@pytest.mark.parametrize("rms", [1e-4, 9e-7, 9e-8, 1e-8])
def test_compressed_moments_for_1500_steps(rms: float) -> None:
    _check(moment_errors(["M4", "M3", "M2"], rms, 1500))


@pytest.mark.parametrize("steps", [20, 200])
def test_compressed_moments_beat_other_libraries(steps: int) -> None:
    """On the same gradients, at the scale that SRPO clips them to."""
    ours = moment_errors(["M3", "M2"], 9e-7, steps)
    for name, (error, _) in peer_errors(9e-7, steps).items():
        assert max(own for own, _ in ours.values()) < error, name


@pytest.mark.parametrize("library", ["bitsandbytes", pytest.param("torchao", marks=pytest.mark.slow)])
def test_compressed_moments_beat_the_libraries_themselves(library: str) -> None:
    """Where they are installed; torchao compiles for a minute. What is restated above is never the worse of the two."""
    pytest.importorskip(library)
    error, _ = library_errors(library, 9e-7, 20)
    assert max(own for own, _ in moment_errors(["M3", "M2"], 9e-7, 20).values()) < error
    assert peer_errors(9e-7, 20)[library][0] < 1.01 * error


@pytest.mark.parametrize(
    ("weights", "sigma", "mean", "limit"),
    [
        ("split32", 0.05, 0.0, 1e-3),
        ("split24", 0.02, 0.0, 0.03),
        ("split24", 0.05, 0.0, 0.07),
        ("split24", 0.0, 1.0, 1.0),
    ],
)
def test_weights_keep_the_updates(weights: str, sigma: float, mean: float, limit: float) -> None:
    """20 steps; a weight of about 1, whose int8 step is three updates, still moves by the right mean."""
    generator = torch.Generator().manual_seed(5)
    start = (mean + sigma * torch.randn(64, 512, generator=generator)).bfloat16()
    parameter = torch.nn.Parameter(start.clone())
    optimizer = AdamW([parameter], LR, weight_decay=0.0, weights=weights, moments="fp32")
    exact = Float64(start)
    for gradient in gradients(9e-7, 20):
        if mean:
            gradient = gradient.abs() + 1e-7
        parameter.grad = gradient.bfloat16()
        exact.step(parameter.grad)
        optimizer.step()
    error, gain = displacement_error(
        optimizer.master_weights()[0].double() - start.double(), exact.weight - start.double()
    )
    assert error <= limit
    assert abs(gain - 1) <= 0.01


@pytest.mark.parametrize(("every", "decay"), [(1, 0.995), (8, 0.9)])
def test_average_of_the_weights(every: int, decay: float) -> None:
    (parameter,) = parameters("split32", (64, 512))
    start = parameter.detach().double()
    optimizer = AdamW([parameter], LR, ema_decay=decay, ema_every=every, moments="fp32")
    exact = start.clone()
    for number, gradient in enumerate(gradients(9e-7, 24), 1):
        parameter.grad = gradient.bfloat16()
        optimizer.step()
        if number % every == 0:
            exact = decay * exact + (1 - decay) * optimizer.master_weights()[0].double()
    (average,) = optimizer.ema_weights()
    assert average.dtype == torch.float32
    assert displacement_error(average.double() - start, exact - start)[0] <= 0.002
