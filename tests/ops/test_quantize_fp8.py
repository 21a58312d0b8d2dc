"""quantize_fp8: kernels (interpreted or real) and reference against e4m3 written out here, bit for bit."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import srpo_kernels.ops.quantize_fp8 as module
from srpo_kernels.ops.quantize_fp8 import GRANULARITIES, Float8, fake_quantize_fp8, quantize_fp8
from srpo_kernels.testing import poisoned_outputs
from srpo_kernels.testing.compile_only import compile_for

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLOATING = "a float32, float16 or bfloat16 tensor"
LEAST = 2.0**-96 / 448  # the scale of zeros


def drawn(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """Normal numbers of magnitudes that differ by row and column, with zeros among them."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    spread = torch.randint(-6, 7, shape, generator=generator).double().exp2()
    return torch.where(torch.rand(shape, generator=generator) < 0.1, 0.0, x * spread).to(device, dtype)


def value_of(code: int) -> float:
    """e4m3fn: sign, 4 bits of exponent with bias 7, 3 of mantissa; no infinities, and NaN where all bits are set."""
    exponent, mantissa = code >> 3 & 15, code & 7
    if (exponent, mantissa) == (15, 7):
        return math.nan
    magnitude = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -magnitude if code & 128 else magnitude


VALUES = torch.tensor([value_of(code) for code in range(256)], dtype=torch.float64)
POSITIVE = VALUES[:127]


def nearest(y: Tensor) -> Tensor:
    """Codes of float64 y: the nearest value, of two the one with an even code, and the largest for all beyond it."""
    middles = (POSITIVE[1:] + POSITIVE[:-1]) / 2
    place = torch.searchsorted(middles, y.abs().contiguous())  # of middles below |y|
    tie = (place < 126) & (middles[place.clamp(max=125)] == y.abs())
    code = torch.where(y.isnan(), 127, place + (tie & (place % 2 == 1)))
    return code + 128 * y.signbit()


def groups(rows: int, columns: int, granularity: str) -> Tensor:
    """Which scale every element has."""
    row, column = torch.arange(rows)[:, None], torch.arange(columns)
    if granularity == "row":
        return row.expand(rows, columns)
    if granularity == "tensor":
        return (row + column) * 0
    return row // 128 * -(-columns // 128) + column // 128


def defined(x: Tensor, granularity: str) -> tuple[Tensor, Tensor]:
    """Codes and scales of a matrix, every fp32 operation rounded from float64."""
    x, group = x.detach().cpu().float().double(), groups(*x.shape, granularity)
    finite = torch.where(x.isfinite(), x.abs(), 0.0)
    scales = int(group.max()) + 1
    largest = torch.zeros(scales, dtype=torch.float64).scatter_reduce(0, group.flatten(), finite.flatten(), "amax")
    largest = largest.clamp(min=2.0**-96)
    inverse = (448 / largest).float().double()[group]
    return nearest((x * inverse).float().double()), (largest / 448).float()


def codes(values: Tensor) -> Tensor:
    """Bits, of NaN only that it is one."""
    bits = values.cpu().view(torch.uint8).long()
    return torch.where(bits & 127 == 127, 127, bits)


def check(x: Tensor, granularity: str) -> Float8:
    """As defined, as the reference does it, contiguous, and back within half an ulp."""
    with poisoned_outputs():
        ours = quantize_fp8(x, granularity)
    assert (ours.values.dtype, ours.scale.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert ours.shape == x.shape
    assert ours.values.is_contiguous()
    rows = x.reshape(-1, x.shape[-1])
    expected, scale = defined(rows, granularity)
    actual = codes(ours.values).view(rows.shape)
    assert torch.equal(actual, torch.where(expected & 127 == 127, 127, expected))
    assert torch.equal(ours.scale.cpu().flatten(), scale)
    reference = module.quantize_fp8_reference(rows.cpu(), granularity)
    assert torch.equal(codes(reference[0]), actual)
    assert torch.equal(reference[1], ours.scale.cpu().reshape(reference[1].shape))
    finite = rows.cpu().isfinite()
    exact, step = rows.cpu().float().double(), scale.double()[groups(*rows.shape, granularity)]
    half = torch.frexp(exact / step).exponent.double().sub(5).exp2().clamp(min=2.0**-10) * step
    error = (ours.dequantize().cpu().view(rows.shape).double() - exact).abs()
    assert (error <= half + 4 * torch.finfo(torch.float32).eps * exact.abs())[finite].all()
    return ours


# --- definition ---------------------------------------------------------------------------------


def test_values_are_torchs() -> None:
    theirs = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    torch.testing.assert_close(VALUES, theirs, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(VALUES.signbit()[:127], theirs.signbit()[:127])


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 64), (3, 129), (2, 3071), (2, 4099), (2, 3, 40)], ids=str)
def test_as_defined(shape: tuple[int, ...], dtype: torch.dtype, granularity: str, device: str) -> None:
    if granularity != "block" or len(shape) == 2:
        check(drawn(*shape, dtype=dtype, device=device), granularity)


@pytest.mark.parametrize("shape", [(128, 128), (129, 127), (257, 130), (1, 300), (300, 1)], ids=str)
def test_edges_of_blocks(shape: tuple[int, int], device: str) -> None:
    ours = check(drawn(*shape, dtype=torch.bfloat16, device=device), "block")
    assert list(ours.scale.shape) == [-(-size // 128) for size in shape]


def test_shapes_of_scales(device: str) -> None:
    x = drawn(2, 3, 40, device=device)
    assert quantize_fp8(x).scale.shape == (2, 3, 1)
    assert quantize_fp8(x, "tensor").scale.shape == (1, 1, 1)
    assert quantize_fp8(x[0, 0]).scale.shape == quantize_fp8(x[0, 0], "tensor").scale.shape == (1,)
    long = drawn(150, 40, device=device)  # longer than a block
    for granularity in GRANULARITIES:
        assert check(long, granularity).dequantize().shape == (150, 40)


def test_every_code_survives(device: str) -> None:
    x = VALUES.float().to(device)
    for power in (0, -60, 70):
        scaled = x * 2.0**power
        ours = check(scaled[None], "row")
        assert ours.scale.item() == 2.0**power
        kept = ~x.isnan()
        expected = torch.where(kept.cpu(), torch.arange(256), 127)
        assert torch.equal(codes(ours.values)[0], expected)
        assert torch.equal(ours.dequantize()[0][kept], scaled[kept])
        again = quantize_fp8(ours.dequantize())
        assert torch.equal(codes(again.values), codes(ours.values))


def test_between_all_codes(device: str) -> None:
    """The middles, which are ties, and their neighbours in fp32; 448 keeps the scale at 1."""
    middle = ((POSITIVE[1:] + POSITIVE[:-1]) / 2).float()
    around = [middle, *(torch.nextafter(middle, torch.tensor(end)) for end in (0.0, 500.0))]
    x = torch.cat([*around, *(-tensor for tensor in around), torch.tensor([448.0])]).to(device)
    ours = check(x[None], "row")
    assert ours.scale.item() == 1
    assert (codes(ours.values)[0, :126] % 2 == 0).all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
def test_what_is_not_finite(granularity: str, device: str) -> None:
    infinity, nan = math.inf, math.nan
    x = torch.tensor([[1.0, infinity, -infinity, nan, -0.25, -0.0], [nan, 2.0, -4.0, 0.0, -nan, 1.0]], device=device)
    ours, plain = (quantize_fp8(given, granularity) for given in (x, x.nan_to_num(0.0, 0.0, 0.0)))
    check(x, granularity)
    assert torch.equal(ours.scale, plain.scale)
    finite = x.isfinite()
    assert torch.equal(codes(ours.values)[finite.cpu()], codes(plain.values)[finite.cpu()])
    assert ours.values.float()[0, 1:3].tolist() == [448, -448]
    assert torch.equal(ours.values.float().isnan(), x.isnan())
    nothing = check(torch.full((1, 5), nan, device=device), granularity)
    assert nothing.scale.item() == torch.tensor(LEAST).item()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_tiny_and_huge(granularity: str, device: str) -> None:
    zero = check(torch.zeros(3, 33, device=device), granularity)
    assert not zero.values.float().any()
    assert (zero.scale == torch.tensor(LEAST)).all()
    for power in (-149, -140, -126, -97, -96, -95, 127):
        x = torch.tensor([[2.0**power, -(2.0 ** max(power - 3, -149)), 0.0]], device=device)
        ours = check(x, granularity)
        assert ours.scale.isfinite().all()
        assert (ours.scale >= torch.finfo(torch.float32).tiny).all()
        assert (ours.values.float()[0, 0] == 448).item() == (power >= -96)
    largest = torch.finfo(torch.float32).max
    ours = check(torch.tensor([[3e38, -largest, 1e30]], device=device), granularity)
    assert ours.dequantize().isfinite().all()
    half = check(torch.tensor([[65504.0, 2.0**-24, -1.0]], device=device, dtype=torch.float16), granularity)
    assert half.values.float()[0, 0] == 448


def test_rows_of_zeros_among_others(device: str) -> None:
    x = drawn(4, 65, device=device)
    x[1] = 0
    ours = check(x, "row")
    assert ours.scale[1].item() == torch.tensor(LEAST).item()
    assert not ours.dequantize()[1].any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
def test_float64_is_rounded_to_fp32_first(device: str) -> None:
    x = drawn(3, 65, dtype=torch.float64, device=device)
    x[0, 0] = 1e300
    for granularity in GRANULARITIES:
        check(x, granularity)
        ours, narrow = quantize_fp8(x, granularity), quantize_fp8(x.float(), granularity)
        assert torch.equal(codes(ours.values), codes(narrow.values))
        assert torch.equal(ours.scale, narrow.scale)


def test_as_a_linear_layers_weight(device: str) -> None:
    """Rows of the weight are independent, so that a slice of it may be quantised alone."""
    x = drawn(9, 48, device=device)
    whole, part = quantize_fp8(x), quantize_fp8(x[3:7])
    assert torch.equal(codes(whole.values)[3:7], codes(part.values))
    assert torch.equal(whole.scale[3:7], part.scale)


# --- layouts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_awkward_layouts(granularity: str, device: str) -> None:
    dense = drawn(5, 60, device=device)
    for x in (
        dense[:, 12:36],
        dense[::2],
        dense[:, ::2],
        dense.T,
        dense[:, :1],
        dense[:1],
        dense[:1].expand(5, 60),
        dense[:, :1].expand(5, 60),
        dense[:1, :1].expand(130, 260),
    ):
        check(x, granularity)
    if granularity != "block":
        heads = drawn(2, 3, 5, 8, device=device)
        for x in (heads.transpose(1, 2), heads[:, 1:, 2:], heads[:, :, :, ::3], heads[:1].expand(2, 3, 5, 8)):
            check(x, granularity)


def test_slices_are_not_copied(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    places = []
    monkeypatch.setattr(module, "_quantize", lambda x, _: places.append(x.data_ptr()) or (x, x.new_empty(x.shape[0])))
    x = drawn(2, 5, 60, device=device)[..., 12:36]
    quantize_fp8(x)
    assert places == [x.data_ptr()]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", [(0, 24), (3, 0), (0, 0), (0, 300), (300, 0), (2, 0, 24), (2, 3, 0), (0,)], ids=str)
def test_nothing_to_quantise(shape: tuple[int, ...], granularity: str, device: str) -> None:
    if granularity == "block" and len(shape) != 2:
        return
    with poisoned_outputs():
        ours = quantize_fp8(torch.zeros(shape, device=device), granularity)
    scales = {"row": (*shape[:-1], 1), "tensor": (1,) * len(shape), "block": tuple(-(-size // 128) for size in shape)}
    assert (ours.shape, ours.scale.shape) == (shape, scales[granularity])
    assert (ours.scale == torch.tensor(LEAST)).all()
    assert ours.dequantize().shape == shape


# --- dequantize and fake_quantize_fp8 -----------------------------------------------------------


def test_dequantize_rounds_once(device: str) -> None:
    for shape in ((3, 40), (130, 260)):
        x = drawn(*shape, device=device)
        for granularity in GRANULARITIES:
            ours = quantize_fp8(x, granularity)
            expected = VALUES[codes(ours.values)].float() * ours.scale.cpu().flatten()[groups(*shape, granularity)]
            for dtype in DTYPES:
                back = ours.dequantize(dtype)
                assert back.dtype == dtype
                assert torch.equal(back.cpu(), expected.to(dtype))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_straight_through(dtype: torch.dtype, granularity: str, device: str) -> None:
    x = drawn(5, 24, dtype=dtype, device=device).requires_grad_()
    out = fake_quantize_fp8(x, granularity)
    assert out.dtype == dtype
    assert torch.equal(out, quantize_fp8(x, granularity).dequantize(dtype))
    wide = drawn(24, 10, dtype=dtype, device=device)
    for upstream in (wide[:, ::2].T, wide[0, :1].expand(5, 24), wide[:5, :1].expand(5, 24)):
        (gradient,) = torch.autograd.grad(out, x, upstream, retain_graph=True)
        assert torch.equal(gradient, upstream)
    (out.square().sum() / 2).backward()
    assert torch.equal(x.grad, out)


def test_nothing_is_kept_nor_differentiable(device: str) -> None:
    x = drawn(5, 24, device=device).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        fake_quantize_fp8(x)
        ours = quantize_fp8(x)
    assert not kept
    assert not ours.values.requires_grad
    assert not ours.scale.requires_grad


# --- contract -----------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_opcheck(granularity: str, device: str) -> None:
    fused = drawn(5, 60, dtype=torch.bfloat16, device=device)
    for x in (fused, fused[:, 12:36], fused[:1].expand(5, 60), fused[:0], fused[:, :0], drawn(3, 7, device=device)):
        torch.library.opcheck(module._quantize, (x, granularity))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_compiles_without_graph_breaks(granularity: str, device: str) -> None:
    torch.compiler.reset()

    def both(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ours = quantize_fp8(x, granularity)
        return ours.values, ours.scale, fake_quantize_fp8(x, granularity)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for rows in (4, 7, 9):  # the second becomes a symbol
        x = drawn(rows, 48, dtype=torch.bfloat16, device=device)[:, 8:40].requires_grad_()
        for actual, expected in zip(compiled(x), both(x), strict=True):
            assert torch.equal(actual.float(), expected.float())
        (gradient,) = torch.autograd.grad(compiled(x)[2].sum(), x)
        assert gradient.eq(1).all()


def test_deterministic(device: str) -> None:
    x = drawn(9, 300, dtype=torch.bfloat16, device=device)
    for granularity in GRANULARITIES:
        first, second = (quantize_fp8(x, granularity) for _ in range(2))
        assert torch.equal(codes(first.values), codes(second.values))
        assert torch.equal(first.scale, second.scale)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (dict(x=torch.zeros(2, 3).int()), TypeError, f"x must be {FLOATING}, got torch.int32"),
        (dict(x=[1.0]), TypeError, f"x must be {FLOATING}, got list"),
        (dict(x=torch.zeros(2, 3), granularity="column"), ValueError,
         "granularity must be one of row, tensor, block, got 'column'"),
        (dict(x=torch.zeros(())), ValueError, "x must be [..., D], got []"),
        (dict(x=torch.zeros(()), granularity="tensor"), ValueError, "x must be [..., D], got []"),
        (dict(x=torch.zeros(4), granularity="block"), ValueError, "x must be [R, C], got [4]"),
        (dict(x=torch.zeros(2, 3, 4), granularity="block"), ValueError, "x must be [R, C], got [2, 3, 4]"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(given: dict[str, Any], error: type[Exception], message: str) -> None:
    for function in (quantize_fp8, partial(fake_quantize_fp8, **{"granularity": "row"} | given)):
        with pytest.raises(error, match=f"^quantize_fp8: {re.escape(message)}$"):
            function(**given)


def test_cpu_tensors_need_no_triton() -> None:
    script = """
import sys
sys.modules["triton"] = None  # importing it raises
import torch, srpo_kernels as sk
x, vector = torch.randn(2, 5, 32), torch.randn(2, 32)
made = [sk.layer_norm_modulate_fp8(x, vector, vector), sk.gelu_tanh_fp8(x), sk.gelu_concat_fp8(x, x)]
made += [sk.quantize_fp8(x), sk.gated_residual_layer_norm_modulate_fp8(x, vector, x, vector, vector)[1]]
for each in made:
    sk.fp8_linear(each, sk.quantize_fp8(torch.randn(8, each.shape[-1])))
"""
    without = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", script], check=True, env=without, timeout=120)


# --- compiled for GPUs that are not there -------------------------------------------------------


@pytest.mark.compile_only
@pytest.mark.parametrize(
    ("kernel", "width", "kind", "architecture"),
    [
        ("rows", 3072, "*bf16", 90),
        ("rows", 3072, "*fp32", 100),
        ("rows", 12288, "*bf16", 100),
        ("rows", 12288, "*fp32", 90),
        ("rows", 15360, "*bf16", 90),
        ("blocks", 3072, "*bf16", 100),
        ("blocks", 3072, "*fp32", 90),
        ("alike", 3072, "*bf16", 90),
    ],
)
def test_resources(kernel: str, width: int, kind: str, architecture: int) -> None:
    from srpo_kernels._triton import quantize_fp8 as kernels

    block, warps = (128, 16) if kernel == "blocks" else kernels.row_block(width)
    function = getattr(kernels, f"quantize_{kernel}_kernel")
    fixed = dict(x_ptr=kind, values_ptr="*fp8e4nv", scale_ptr="*fp32", largest_ptr="*fp32")
    fixed |= dict(BLOCK=block, SIDE=block, WHOLE=width <= block)
    arguments = {name: fixed.get(name, "i32") for name in function.arg_names}
    compiled = compile_for(function, arguments, architecture=architecture, num_warps=warps)
    assert compiled.stack == 0
    assert compiled.occupancy >= 0.5
    assert compiled.widest_load() == 16
    assert compiled.widest_store() == 16
    assert "cvt.rn.satfinite.e4m3x2" in compiled.ptx
