"""The kernels of `srpo_kernels.optim.AdamW` have the bits of `srpo_kernels.optim.reference`."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from srpo_kernels.ops._register import interpreting
from srpo_kernels.optim import AdamW, adamw, compiled, eager, norm, reference
from srpo_kernels.optim.norm import GradientNorm
from srpo_kernels.optim.reference import BINS, scalars, sums_of_squares, total
from srpo_kernels.optim.sharding import matrix
from srpo_kernels.optim.storage import MOMENTS, WEIGHTS, Storage
from srpo_kernels.testing.compile_only import ARCHITECTURES, Compiled, compile_for

needs_kernels = pytest.mark.skipif(
    not (interpreting() or torch.cuda.is_available()), reason="runs in the interpreter or on a GPU"
)

#: Whole units and parts of them, rows that share a unit, vectors; those of 2064 columns are accessed by vectors.
SHAPES = [(2, 2064), (3, 129), (5, 3), (70,), (0, 6), (1, 1500), (2, 5, 7)]
SEED = 2**40 + 7


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def training(
    weights: str, moments: str, device: str, gradient: torch.dtype, offset: int = 0, spread: float = 2.0
) -> list[tuple[Storage, Tensor]]:
    """Parameters in the middle of training, and gradients."""
    generator = torch.Generator().manual_seed(WEIGHTS.index(weights) * 4 + MOMENTS.index(moments))
    members = []
    for shape in SHAPES:

        def normal(scale: float, shape: tuple[int, ...] = shape) -> Tensor:
            values = torch.randn(shape, generator=generator) * scale
            return (values * torch.exp(spread * torch.randn(shape, generator=generator))).to(device)

        stored = torch.float32 if weights == "fp32" else torch.bfloat16
        storage = Storage(nn.Parameter(normal(0.02).to(stored)), {}, weights, moments, offset, SEED)
        storage._initialise(ema=True)
        storage.state["step"] += len(members)
        second = normal(1e-4).square()
        values = storage.encode(storage.state["step"], moments=(matrix(normal(1e-4)), matrix(second)))
        storage.store(values)
        members.append((storage, normal(1e-4).to(gradient)))
        offset += -(-storage.parameter.numel() // 16) * 16
    return members


def assert_same(found: list[tuple[Storage, Tensor]], wanted: list[tuple[Storage, Tensor]]) -> None:
    for (mine, _), (theirs, _) in zip(found, wanted, strict=True):
        assert torch.equal(bits(mine.parameter.detach()), bits(theirs.parameter.detach())), list(mine.parameter.shape)
        for name, value in theirs.state.items():
            assert torch.equal(bits(mine.state[name]), bits(value)), (name, list(mine.parameter.shape))


def assert_same_telemetry(found: Tensor, wanted: Tensor) -> None:
    """Sums of squares to fp32's last bits, counts exactly."""
    found, wanted = found.cpu(), wanted.cpu()
    for part in (slice(0, BINS), slice(BINS, 2 * BINS)):
        torch.testing.assert_close(total(found[part]), total(wanted[part]), rtol=1e-6, atol=0.0)
    assert found[-1] == wanted[-1]


def numbers(device: str, finite: bool = True) -> tuple[GradientNorm, Tensor]:
    count = torch.zeros((), dtype=torch.int64, device=device)
    return (
        GradientNorm(count.double(), torch.tensor(finite, device=device), count),
        torch.tensor(0.37, device=device),
    )


def group(**given: Any) -> dict[str, Any]:
    return dict(lr=3e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, ema_decay=0.99, ema_every=2) | given


@torch.no_grad()
def both(members: list[tuple[Storage, Tensor]], device: str, finite: bool = True, **given: Any) -> None:
    """A step by the kernels, and one as specified, on a copy."""
    copies = copy.deepcopy(members)
    steps = torch.stack([storage.state["step"] for storage, _ in members]).long() + 1
    found = compiled.advance_alike(group(**given), members, steps, *numbers(device, finite))
    wanted = eager.advance(group(**given), copies, steps, *numbers(device, finite))
    assert_same(members, copies)
    assert_same_telemetry(found, wanted)


@needs_kernels
@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_step_is_the_specified_one(weights: str, moments: str, device: str) -> None:
    both(training(weights, moments, device, torch.float32 if weights == "fp32" else torch.bfloat16), device)


@needs_kernels
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, on 0 / 0 in slots that are not used
@pytest.mark.parametrize("gradient", [torch.float32, torch.float16])
def test_steps_follow_each_other(gradient: torch.dtype, device: str) -> None:
    """Three, also where the counter of random bits needs its high word, and with no epsilon."""
    members = training("split24", "M2", device, gradient, offset=16 * (2**32 - 3))
    for _ in range(3):
        both(members, device, eps=0.0, ema_decay=0.5)


@needs_kernels
@pytest.mark.parametrize(("weights", "moments"), [("split24", "M2"), ("fp32", "M4")])
def test_a_step_that_is_not_finite_changes_no_byte(weights: str, moments: str, device: str) -> None:
    members = training(weights, moments, device, torch.float32)
    for _, gradient in members:
        gradient.fill_(torch.nan)
    before = copy.deepcopy(members)
    both(members, device, finite=False, ema_every=1)
    assert_same(members, before)


@needs_kernels
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, on infinities
def test_scales_of_extreme_moments(device: str) -> None:
    """Of blocks of zeros, of subnormals and of nearly infinite numbers."""
    members = training("split32", "M2", device, torch.float32, spread=0.0)
    for number, (_, gradient) in enumerate(members):
        gradient.mul_((0.0, 1e-41, 1e-20, 1e22)[number % 4] * 1e4)
        for name in ("exp_avg", "exp_avg_sq"):
            members[number][0].state[name].zero_()
    both(members, device)
    both(members, device)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_of_squares_are_exact(dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from srpo_kernels._triton import adamw as kernels

    monkeypatch.setattr(kernels, "_SQUARES_PROGRAMS", 1)  # on the CPU, all units in one
    found = kernels.sums_of_squares
    generator = torch.Generator().manual_seed(0)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator) * torch.exp(4 * torch.randn(shape, generator=generator))

    gradients = [normal(shape).to(device, dtype) for shape in (*SHAPES, (3, 2064))]
    for gradient in gradients[:2]:
        gradient[1, 7:9] = torch.inf
    assert torch.equal(found(gradients), torch.stack([norm._sums(matrix(gradient)) for gradient in gradients]).sum(0))
    assert torch.equal(found(gradients[2:3])[:BINS], sums_of_squares(gradients[2])[0])


@needs_kernels
def test_scalars_are_the_specified_ones(device: str) -> None:
    from srpo_kernels._triton.adamw import adamw_scalars

    steps = torch.tensor([1, 2, 7, 1000, 2**24 - 1], device=device)
    rate = torch.tensor(3e-4, dtype=torch.float64, device=device)
    found = adamw_scalars(steps, rate, 0.9, 0.999, 1e-8, 0.01)
    wanted = scalars(steps, rate, (0.9, 0.999), 1e-8, 0.01)
    assert torch.equal(found, torch.stack([torch.stack(list(vars(numbers).values())) for numbers in wanted]))


@needs_kernels
def test_tensors_that_are_accessed_alike_take_one_launch(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from srpo_kernels._triton import _adamw_tables
    from srpo_kernels._triton import adamw as kernels

    launches: list[Any] = []

    class Counted:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            launches.append(grid)
            return self.kernel[grid]

    for name in ("step_kernel", "squares_kernel"):
        monkeypatch.setattr(kernels, name, Counted(getattr(kernels, name)))
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3)] * 8 + [(4, 2)] * 8
    parameters = [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = AdamW(parameters, lr=0.1, weights="fp32")
    optimizer.step()
    assert len(launches) == 2
    monkeypatch.setattr(_adamw_tables, "_build", lambda *_: pytest.fail("built the tables again"))
    optimizer.step()
    assert len(launches) == 4


@needs_kernels
@pytest.mark.parametrize(("weights", "moments"), [("split32", "M4"), ("split32", "M2")])
def test_training_is_that_of_pytorch(weights: str, moments: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained() -> tuple[list[Tensor], dict[str, Tensor]]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(1040, 16), nn.GELU(), nn.Linear(16, 3)).to(device, torch.bfloat16)
        optimizer = AdamW(
            model.parameters(), lr=1e-3, weights=weights, moments=moments, max_grad_norm=0.1, ema_decay=0.9, seed=5
        )
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(4, 1040).to(device, torch.bfloat16)).square().sum().backward()
            optimizer.step()
        states = [value for state in optimizer.state.values() for value in state.values()]
        return [*(parameter.detach() for parameter in model.parameters()), *states], optimizer.telemetry

    found, telemetry = trained()
    monkeypatch.setattr(adamw, "takes", lambda _: False)
    monkeypatch.setattr(norm, "available", lambda _: False)
    wanted, expected = trained()
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(bits(one), bits(other))
    assert torch.equal(telemetry["grad_norm"], expected["grad_norm"])
    torch.testing.assert_close(telemetry, expected, rtol=1e-6, atol=0.0)


def test_constants_are_the_reference_s() -> None:
    from srpo_kernels._triton import _adamw_math

    for name in ("BINS", "ROUNDS", "WEIGHT_STREAM", "SECOND_STREAM"):
        assert getattr(_adamw_math, name).value == getattr(reference, name)


# --- compiled for GPUs that are not there -------------------------------------------------------


def resources(weights: str, moments: str, gradient: str, averages: bool, architecture: int, wide: bool) -> Compiled:
    import triton.language as tl

    from srpo_kernels._triton import adamw as kernels

    pointers = dict(table_ptr="*i64", scalars_ptr="*fp32", steps_ptr="*i64", coefficient_ptr="*fp32")
    return compile_for(
        kernels.step_kernel,
        dict(
            **pointers,
            finite_ptr="*i1",
            sums_ptr="*i64",
            seed="i64",
            average_rate="fp32",
            WEIGHTS=weights.upper(),
            MOMENTS=moments.upper(),
            KIND={"bf16": tl.int16, "fp32": tl.float32}[gradient],
            AVERAGES=averages,
            WIDE=wide,
            CONVERTS=True,
        ),
        architecture=architecture,
        **kernels.OPTIONS[wide],
    )


@pytest.mark.compile_only
@pytest.mark.parametrize(
    ("weights", "moments", "gradient", "averages", "architecture"),
    [("split24", "M2", "bf16", True, 90), ("split32", "M4", "bf16", False, 100), ("fp32", "fp32", "fp32", True, 90)],
)
def test_resources(weights: str, moments: str, gradient: str, averages: bool, architecture: int) -> None:
    made = resources(weights, moments, gradient, averages, architecture, wide=True)
    assert made.stack == 0
    assert made.occupancy >= 0.5
    # A thread has four elements of everything.
    assert made.widest_load() == made.widest_store() == (16 if averages else 8)
    assert not re.search(r"\bfma\.", made.ptx)
    if moments != "M2":  # whose codes are searched from an approximate root
        assert not re.search(r"\.(ftz|approx)", made.ptx)
    assert len(re.findall(r"div\.rn\.f32", made.ptx)) == len(re.findall(r"sqrt\.rn\.f32", made.ptx)) == 4


@pytest.mark.compile_only
def test_resources_of_narrow_rows() -> None:
    made = resources("split32", "fp32", "fp32", False, 90, wide=False)
    assert made.stack == 0
    assert not re.search(r"\bfma\.|\.(ftz|approx)", made.ptx)


@pytest.mark.compile_only
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_resources_of_the_norm(architecture: int) -> None:
    import triton.language as tl

    from srpo_kernels._triton import adamw as kernels

    arguments = dict(table_ptr="*i64", sums_ptr="*i64", KIND=tl.int16, WIDE=True)
    made = compile_for(kernels.squares_kernel, arguments, architecture=architecture, **kernels.SQUARES_OPTIONS)
    assert made.stack == 0
    assert made.occupancy >= 0.5
    assert made.widest_load() == 16
    assert not re.search(r"\bfma\.|\.(ftz|approx)", made.ptx)
