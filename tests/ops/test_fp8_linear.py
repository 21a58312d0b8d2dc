"""fp8_linear: its reference against float64, and, without a GPU, what it asks of `torch._scaled_mm`."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import srpo_kernels.ops.fp8_linear as module
from srpo_kernels.ops.fp8_linear import fp8_linear, fp8_unsupported
from srpo_kernels.ops.quantize_fp8 import Float8, quantize_fp8
from srpo_kernels.testing import assert_within_budget

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLOATING = "a float32, float16 or bfloat16 tensor"


def drawn(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def operands(*shape: int, outputs: int, device: str = "cpu") -> tuple[Float8, Float8]:
    """x of `shape` and a weight with so many outputs for it, of rows of different sizes."""
    x, weight = drawn(*shape, device=device), drawn(outputs, shape[-1], device=device)
    return quantize_fp8(x * x[..., :1].exp()), quantize_fp8(weight * weight[:, :1].exp())


def composed(x: Float8, weight: Float8, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The product of the dequantised operands in `dtype`."""
    wide = [operand.values.to(dtype) * operand.scale.to(dtype) for operand in (x, weight)]
    out = wide[0] @ wide[1].T
    return out if bias is None else out + bias.to(dtype)


def check(x: Float8, weight: Float8, bias: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    out = fp8_linear(x, weight, bias, dtype=dtype)
    assert out.dtype == dtype
    assert out.is_contiguous()
    exact, fp32 = composed(x, weight, bias, torch.float64), composed(x, weight, bias, torch.float32)
    if out.is_cuda:  # bf16 results, and what the GEMM's accumulators hold
        assert (out.double() - exact).norm() <= 0.01 * exact.norm()
    else:
        assert_within_budget(out, exact, fp32, name="output")
    return out


# --- accuracy -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "outputs"),
    [((5, 64), 32), ((2, 3, 48), 16), ((1, 16), 16), ((33,), 7), ((2, 1, 3, 129), 65), ((4, 1), 1), ((7, 320), 48)],
    ids=str,
)
def test_within_budget(shape: tuple[int, ...], outputs: int, dtype: torch.dtype, device: str) -> None:
    x, weight = operands(*shape, outputs=outputs, device=device)
    assert check(x, weight, dtype=dtype).shape == (*shape[:-1], outputs)
    for bias_dtype in (*DTYPES, torch.float64):
        check(x, weight, drawn(outputs, dtype=bias_dtype, device=device), dtype)


def test_a_tensor_is_quantised_first(device: str) -> None:
    x, weight = drawn(2, 3, 48, dtype=torch.bfloat16, device=device), quantize_fp8(drawn(32, 48, device=device))
    assert torch.equal(fp8_linear(x, weight), fp8_linear(quantize_fp8(x), weight))
    assert fp8_linear(x, weight).dtype == torch.bfloat16


def test_as_near_as_its_operands(device: str) -> None:
    """A linear layer's result, but for some percent that e4m3 leaves out."""
    x, weight = drawn(16, 256, device=device), drawn(48, 256, device=device)
    exact = x.double() @ weight.double().T
    error = (fp8_linear(x, quantize_fp8(weight), dtype=torch.float32) - exact).norm() / exact.norm()
    assert 0.01 < error < 0.05


def test_what_is_not_finite_stays_in_its_row(device: str) -> None:
    x, weight = drawn(4, 32, device=device), quantize_fp8(drawn(16, 32, device=device))
    x[1, 3] = float("nan")
    out = fp8_linear(x, weight)
    assert out[1].isnan().all()
    assert out[[0, 2, 3]].isfinite().all()


def test_autocast_changes_nothing(device: str) -> None:
    x, weight = operands(5, 64, outputs=32, device=device)
    expected = fp8_linear(x, weight, dtype=torch.float32)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(fp8_linear(x, weight, dtype=torch.float32), expected)


@pytest.mark.parametrize("shape", [(0, 32), (2, 0, 32), (3, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("outputs", [16, 0])
def test_nothing_to_multiply(shape: tuple[int, ...], outputs: int, device: str) -> None:
    x, weight = (quantize_fp8(torch.zeros(*size, device=device)) for size in (shape, (outputs, shape[-1])))
    bias = drawn(outputs, device=device)
    out = fp8_linear(x, weight, bias, dtype=torch.float32)
    assert torch.equal(
        out, bias.bfloat16().float().expand(*shape[:-1], outputs) if out.is_cuda else bias.expand_as(out)
    )
    assert not fp8_linear(x, weight).any()


def test_awkward_layouts(device: str) -> None:
    x, weight = operands(2, 6, 32, outputs=32, device=device)
    for strange, other in (
        (Float8(x.values[:, ::2], x.scale[:, ::2]), weight),
        (Float8(x.values.transpose(0, 1), x.scale.transpose(0, 1)), weight),
        (Float8(x.values[..., :16], x.scale), Float8(weight.values[:, 16:], weight.scale)),
        (x, Float8(weight.values.T, weight.scale)),
        (x, Float8(weight.values[::2], weight.scale[::2])),
        (Float8(x.values[:, :1].expand(2, 6, 32), x.scale[:, :1].expand(2, 6, 1)), weight),
    ):
        plain = [Float8(operand.values.contiguous(), operand.scale.contiguous()) for operand in (strange, other)]
        assert torch.equal(fp8_linear(strange, other), fp8_linear(*plain))
        check(strange, other)


# --- what a GPU is asked for --------------------------------------------------------------------


def pretend(monkeypatch: pytest.MonkeyPatch, *capability: int) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _=None: capability)


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fp8_unsupported((32, 32), "cpu") == "it is on cpu, not on a GPU"
    assert fp8_unsupported((32, 32), torch.device("meta")) == "it is on meta, not on a GPU"
    for capability in ((7, 5), (8, 0), (8, 9)):
        pretend(monkeypatch, *capability)
        assert fp8_unsupported((32, 32), "cuda") == "the GPU is older than compute capability 9.0"
    for capability in ((9, 0), (10, 0), (12, 0)):
        pretend(monkeypatch, *capability)
        assert fp8_unsupported(torch.Size([3072, 12288]), torch.device("cuda:0")) is None
        for shape in ((32, 40), (40, 32), (1, 16)):
            reason = f"its shape {list(shape)} is not of multiples of 16"
            assert fp8_unsupported(shape, "cuda:1") == reason


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gemm_gets_what_it_takes(dtype: torch.dtype, biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and columns contiguous where `_scaled_mm` wants them."""
    calls = []

    def stand_in(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, **options: Any) -> Tensor:
        calls.append(((a, b, a_scale, b_scale), options.copy()))
        out = (a.float() @ b.float()) * a_scale * b_scale
        return (out if options["bias"] is None else out + options["bias"]).to(options["out_dtype"])

    monkeypatch.setattr(module, "fp8_unsupported", lambda *_: None)
    monkeypatch.setattr("torch._scaled_mm", stand_in)
    for rows in (1, 5):
        x, weight = operands(rows, 64, outputs=32)
        bias = drawn(32) if biased else None
        out = module.multiply(*x, *weight, bias, dtype)
        (a, b, a_scale, b_scale), options = calls.pop()
        assert (a.shape, a.stride()) == ((rows, 64), (64, 1))
        assert (b.shape, b.stride()) == ((64, 32), (1, 64))
        assert (a_scale.shape, b_scale.shape) == ((rows, 1), (1, 32))
        assert a_scale.is_contiguous()
        assert b_scale.is_contiguous()
        assert b.data_ptr() == weight.values.data_ptr()
        given = options.pop("bias")
        assert (given is None) != biased
        assert given is None or given.dtype == torch.bfloat16
        assert options == {"out_dtype": torch.bfloat16, "use_fast_accum": True}
        assert out.dtype == dtype
        expected = composed(x, weight, bias, torch.float64)
        assert (out.double() - expected).norm() <= 0.005 * expected.norm()


@pytest.mark.skipif(torch.version.cuda is None, reason="a PyTorch that knows no CUDA tensors")
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("layout", ["plain", "slices", "transposed"])
def test_gemm_takes_what_it_gets(rows: int, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The installed torch's own checks of CUDA tensors, on tensors without memory."""
    pretend(monkeypatch, 9, 0)
    monkeypatch.setattr(module, "_linear", lambda *arguments: module.multiply(*arguments))
    calls = []
    gemm = torch._scaled_mm
    monkeypatch.setattr("torch._scaled_mm", lambda *a, **k: calls.append(a) or gemm(*a, **k))
    with FakeTensorMode():
        e4m3 = dict(dtype=torch.float8_e4m3fn, device="cuda")
        x = Float8(torch.empty(rows, 64, **e4m3), torch.empty(rows, 1, device="cuda"))
        weight = Float8(torch.empty(32, 64, **e4m3), torch.empty(32, 1, device="cuda"))
        if layout == "slices":
            x = Float8(torch.empty(rows, 2, 96, **e4m3)[:, :1, :64], torch.empty(rows, 2, 1, device="cuda")[:, :1])
        elif layout == "transposed":
            weight = Float8(torch.empty(64, 32, **e4m3).T, torch.empty(32, 2, device="cuda")[:, :1])
        out = fp8_linear(x, weight, torch.empty(32, device="cuda"), dtype=torch.float32)
        assert (out.shape, out.dtype, out.device.type) == ((*x.shape[:-1], 32), torch.float32, "cuda")
    assert len(calls) == 1


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(0, 32, 16), (3, 0, 16), (3, 32, 0)])
def test_gemm_is_not_asked_for_nothing(rows: int, inputs: int, outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "fp8_unsupported", lambda *_: None)
    monkeypatch.setattr("torch._scaled_mm", None)
    x, weight = quantize_fp8(torch.zeros(rows, inputs)), quantize_fp8(torch.zeros(outputs, inputs))
    bias = drawn(outputs)
    assert torch.equal(module.multiply(*x, *weight, bias, torch.float32), bias.expand(rows, outputs))


@pytest.mark.skipif(torch.version.cuda is None, reason="a PyTorch that knows no CUDA tensors")
@pytest.mark.parametrize(("capability", "inputs"), [((8, 9), 64), ((9, 0), 72)])
def test_bf16_where_there_is_no_gemm(capability: tuple[int, int], inputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU as PyTorch sees it, without memory; then with memory, where the branch is taken on the CPU."""
    pretend(monkeypatch, *capability)
    seen = []
    plain = module.linear
    monkeypatch.setattr("torch._scaled_mm", None)
    monkeypatch.setattr(module, "linear", lambda *given: seen.append(given) or plain(*given))
    with FakeTensorMode():
        x, weight = (torch.empty(size, inputs, dtype=torch.float8_e4m3fn, device="cuda") for size in (5, 32))
        scales = torch.empty(5, 1, device="cuda"), torch.empty(32, 1, device="cuda")
        out = module.multiply(x, scales[0], weight, scales[1], torch.empty(32, device="cuda"), torch.float32)
        assert (out.shape, out.dtype) == ((5, 32), torch.float32)
    assert [tensor.dtype for tensor in seen.pop()] == [torch.bfloat16] * 3

    x, weight = operands(5, inputs, outputs=32)

    class Elsewhere(Tensor):
        device = torch.device("cuda")

    disguised = x.values.as_subclass(Elsewhere)
    bias = drawn(32)
    out = module.multiply(disguised, x.scale, *weight, bias, torch.float32).as_subclass(Tensor)
    halves = [operand.dequantize(torch.bfloat16) for operand in (x, weight)]
    assert torch.equal(out, plain(*halves, bias.bfloat16()).float())
    exact = composed(x, weight, bias, torch.float64)
    assert (out - exact).norm() <= 0.01 * exact.norm()


# --- contract -----------------------------------------------------------------------------------


def test_forward_only(device: str) -> None:
    """A wanted gradient is refused, and without one nothing is kept."""
    weight, bias = quantize_fp8(drawn(16, 32, device=device)), drawn(16, device=device)
    x = drawn(5, 32, device=device)
    for wanting in ((x.clone().requires_grad_(), bias), (x, bias.clone().requires_grad_())):
        with pytest.raises(RuntimeError, match="fp8_linear is forward only"):
            fp8_linear(wanting[0], weight, wanting[1])
        with torch.no_grad():
            assert not fp8_linear(wanting[0], weight, wanting[1]).requires_grad


def test_deterministic(device: str) -> None:
    x, weight = operands(33, 128, outputs=64, device=device)
    assert torch.equal(fp8_linear(x, weight), fp8_linear(x, weight))


def test_opcheck(device: str) -> None:
    """All but the comparison of inputs before and after, which PyTorch cannot do in e4m3."""
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for shape, outputs in (((5, 32), 16), ((3, 9), 7), ((0, 32), 16)):
        x, weight = (quantize_fp8(drawn(*size, device=device)) for size in (shape, (outputs, shape[1])))
        for bias in (None, drawn(outputs, device=device)):
            for dtype in (torch.bfloat16, torch.float32):
                torch.library.opcheck(module._linear, (*x, *weight, bias, dtype), test_utils=checks)


def test_compiles_without_graph_breaks(device: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(fp8_linear, fullgraph=True, backend="aot_eager")
    weight, bias = quantize_fp8(drawn(16, 32, device=device)), drawn(16, device=device)
    for tokens in (4, 7, 9):  # the second becomes a symbol
        x = drawn(2, tokens, 32, dtype=torch.bfloat16, device=device)
        assert torch.equal(compiled(x, weight, bias), fp8_linear(x, weight, bias))
        assert torch.equal(compiled(quantize_fp8(x), weight), fp8_linear(x, weight))


_X, _WEIGHT = quantize_fp8(torch.ones(2, 3, 8)), quantize_fp8(torch.ones(4, 8))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(weight=torch.zeros(4, 8)), TypeError, "weight must be a Float8, got Tensor; see quantize_fp8"),
        (dict(weight=quantize_fp8(torch.zeros(4, 8), "tensor")), ValueError,
         "weight must be [N, K] quantised by row, with scales [N, 1], got [4, 8] with scales [1, 1]"),
        (dict(weight=quantize_fp8(torch.zeros(300, 8), "block")), ValueError,
         "weight must be [N, K] quantised by row, with scales [N, 1], got [300, 8] with scales [3, 1]"),
        (dict(weight=_X), ValueError,
         "weight must be [N, K] quantised by row, with scales [N, 1], got [2, 3, 8] with scales [2, 3, 1]"),
        (dict(x=[1.0]), TypeError, f"x must be {FLOATING}, got list"),
        (dict(x=torch.zeros(2, 8).int()), TypeError, f"x must be {FLOATING}, got torch.int32"),
        (dict(x=torch.zeros(2, 7)), ValueError, "x must be [..., 8], got [2, 7]"),
        (dict(x=torch.zeros(())), ValueError, "x must be [..., 8], got []"),
        (dict(x=quantize_fp8(torch.zeros(2, 7))), ValueError, "x must be [..., 8], got [2, 7]"),
        (dict(x=quantize_fp8(torch.zeros(2, 8), "tensor")), ValueError,
         "x must be quantised by row, got scales [1, 1]"),
        (dict(bias=torch.zeros(8)), ValueError, "bias must be [4], got [8]"),
        (dict(bias=torch.zeros(4, 1)), ValueError, "bias must be [4], got [4, 1]"),
        (dict(bias=torch.zeros(4).int()), TypeError, f"bias must be {FLOATING}, got torch.int32"),
        (dict(bias=torch.zeros(4, device="meta")), ValueError, "x is on cpu but bias on meta"),
        (dict(weight=Float8(*(tensor.to("meta") for tensor in _WEIGHT))), ValueError,
         "x is on cpu but weight on meta"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^fp8_linear: {re.escape(message)}$"):
        fp8_linear(**dict(x=_X, weight=_WEIGHT) | change)
