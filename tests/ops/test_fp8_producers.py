"""The operators that end in _fp8: kernels (interpreted or real) and reference against float64, rounded to e4m3."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

import srpo_kernels.ops.fp8_producers as module
from srpo_kernels.ops.fp8_producers import (
    gated_residual_layer_norm_modulate_fp8,
    gelu_concat_fp8,
    gelu_tanh_fp8,
    layer_norm_modulate_fp8,
)
from srpo_kernels.ops.quantize_fp8 import Float8
from srpo_kernels.testing import assert_within_budget, poisoned_outputs
from srpo_kernels.testing.budget import SLACK
from srpo_kernels.testing.compile_only import compile_for

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLOATING = "a float32, float16 or bfloat16 tensor"
LEAST = 2.0**-96 / 448  # the scale of zeros
EPS = torch.finfo(torch.float32).eps


def drawn(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def tokens(*shape: int, gated: bool, dtype: torch.dtype = torch.float32, device: str = "cpu", **other: Any) -> dict:
    """Arguments of the modulation, or the gated one, by name; vectors of another dtype with `vector_dtype`."""
    options: dict[str, Any] = dict(dtype=other.get("vector_dtype", dtype), device=device)
    vectors = {name: drawn(shape[0], shape[-1], **options, seed=ord(name[-1])) for name in ("gate", "scale", "shift")}
    x = drawn(*shape, dtype=dtype, device=device) * 2 + 0.5
    if not gated:
        return {"x": x, "scale": vectors["scale"], "shift": vectors["shift"]}
    return {"residual": x, "branch": drawn(*shape, dtype=dtype, device=device, seed=9), **vectors}


# --- the formulas, in the dtype of what they are given --------------------------------------------


def composed_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    scale, shift = (vector.reshape(x.shape[0], *[1] * (x.ndim - 2), x.shape[-1]) for vector in (scale, shift))
    return layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


def composed_sum(residual: Tensor, gate: Tensor, branch: Tensor, **_: Any) -> Tensor:
    return residual + gate.reshape(residual.shape[0], *[1] * (residual.ndim - 2), residual.shape[-1]) * branch


def composed_gated(
    residual: Tensor, gate: Tensor, branch: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6
) -> Tensor:
    return composed_modulate(composed_sum(residual, gate, branch), scale, shift, eps)


def composed_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    return gelu(x if bias is None else x + bias, approximate="tanh")


def composed_concat(attn: Tensor, mlp: Tensor) -> Tensor:
    return torch.cat([attn, composed_gelu(mlp)], -1)


COMPOSED: dict[Callable, Callable[..., Tensor]] = {
    layer_norm_modulate_fp8: composed_modulate,
    gated_residual_layer_norm_modulate_fp8: composed_gated,
    gelu_tanh_fp8: composed_gelu,
    gelu_concat_fp8: composed_concat,
}


def assert_quantizes(ours: Float8, exact: Tensor, fp32: Tensor) -> None:
    """`exact` to half an ulp of e4m3, its rows' largest magnitudes over 448, and four times the error of eager fp32."""
    assert (ours.values.dtype, ours.scale.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert ours.shape == exact.shape
    assert ours.scale.shape == (*exact.shape[:-1], 1)
    assert ours.values.is_contiguous()
    if not exact.numel():
        assert (ours.scale == torch.tensor(LEAST)).all()
        return
    floor = SLACK * (fp32.double() - exact).abs().max()
    scale = ours.scale.double()
    largest = exact.abs().amax(-1, keepdim=True)
    assert ((scale * 448 - largest).abs() <= 4 * EPS * largest + floor).all()
    half = torch.frexp(exact / scale).exponent.double().sub(5).exp2().clamp(min=2.0**-10) * scale
    error = (ours.values.double() * scale - exact).abs()
    worst = (error / (half + 4 * EPS * exact.abs() + floor)).max().item()
    assert worst <= 1, f"{worst:.3f} x half an ulp"


def check(op: Callable, inputs: Mapping[str, Tensor], **options: float) -> Float8:
    """`op` against its formula, and against its reference; the sum too, where there is one."""
    with poisoned_outputs(), torch.no_grad():
        result = op(**inputs, **options)
    wide, narrow = (
        {name: tensor.to(dtype) for name, tensor in inputs.items()} for dtype in (torch.float64, torch.float)
    )
    ours = result
    if op is gated_residual_layer_norm_modulate_fp8:
        new, ours = result
        assert new.dtype == inputs["residual"].dtype
        assert new.is_contiguous()
        assert_within_budget(new, composed_sum(**wide), composed_sum(**narrow), name="new residual")
    assert_quantizes(ours, COMPOSED[op](**wide, **options), COMPOSED[op](**narrow, **options))
    return ours


def bits(*given: Float8 | Tensor) -> list[Tensor]:
    flat = [tensor for each in given for tensor in (each if isinstance(each, Float8) else (each,))]
    return [tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor for tensor in flat]


def same(first: Any, second: Any) -> bool:
    pairs = (bits(*given) if isinstance(given, tuple) else bits(given) for given in (first, second))
    return all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))


# --- accuracy -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 7, 64), (3, 5, 129), (1, 1, 3071), (2, 3, 1), (4, 33), (1, 2, 3, 65), (1, 2, 8192)], ids=str
)
def test_modulations(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    check(layer_norm_modulate_fp8, tokens(*shape, gated=False, dtype=dtype, device=device))
    check(gated_residual_layer_norm_modulate_fp8, tokens(*shape, gated=True, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 64), (5, 129), (1, 3071), (4099,), (2, 1), (2, 8200)], ids=str)
def test_gelu(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x = 2 * drawn(*shape, dtype=dtype, device=device)
    check(gelu_tanh_fp8, {"x": x})
    check(gelu_tanh_fp8, {"x": x, "bias": drawn(shape[-1], dtype=dtype, device=device)})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", [(96, 384), (129, 65), (1, 1), (8193, 2), (7, 4099), (4100, 8193)], ids=str)
def test_gelu_concat(widths: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    attn, mlp = (2 * drawn(2, 2, width, dtype=dtype, device=device) for width in widths)
    check(gelu_concat_fp8, {"attn": attn, "mlp": mlp})
    check(gelu_concat_fp8, {"attn": attn / 64, "mlp": mlp})  # either side may hold the largest
    check(gelu_concat_fp8, {"attn": attn * 64, "mlp": mlp})


def test_eps_and_large_means(device: str) -> None:
    for gated, op in ((False, layer_norm_modulate_fp8), (True, gated_residual_layer_norm_modulate_fp8)):
        inputs = tokens(2, 5, 40, gated=gated, device=device)
        first = next(iter(inputs))
        check(op, inputs | {first: inputs[first] + 1e3})
        small = {name: tensor * 1e-2 if tensor.ndim == 3 else tensor for name, tensor in inputs.items()}
        check(op, small, eps=1e-3)


def test_mixed_dtypes(device: str) -> None:
    half = torch.bfloat16
    for dtype, vector_dtype in ((half, torch.float32), (torch.float32, half), (half, torch.float16)):
        options: dict[str, Any] = dict(dtype=dtype, vector_dtype=vector_dtype, device=device)
        check(layer_norm_modulate_fp8, tokens(2, 3, 65, gated=False, **options))
        inputs = tokens(2, 3, 65, gated=True, **options)
        for dtypes in ({}, {"branch": torch.float16}, {"gate": torch.float32}, {"shift": torch.float32}):
            check(gated_residual_layer_norm_modulate_fp8, inputs | {k: inputs[k].to(v) for k, v in dtypes.items()})
        x, other = inputs["residual"], inputs["branch"].to(vector_dtype)
        check(gelu_tanh_fp8, {"x": x, "bias": other[0, 0]})
        check(gelu_concat_fp8, {"attn": x, "mlp": other})
        check(gelu_concat_fp8, {"attn": other, "mlp": x})


def test_rows_far_apart(device: str) -> None:
    """Every row has a scale of its own."""
    powers = torch.tensor([-30.0, 0.0, 20.0], device=device).exp2()[:, None]
    x = powers * drawn(3, 129, device=device).abs()
    ours = check(gelu_concat_fp8, {"attn": x[:, :65], "mlp": x[:, 65:]})
    for row in range(3):
        alone = gelu_concat_fp8(x[row : row + 1, :65], x[row : row + 1, 65:])
        assert same(Float8(ours.values[row : row + 1], ours.scale[row : row + 1]), alone)
    zero = gelu_tanh_fp8(torch.zeros(3, 65, device=device))
    assert not zero.values.float().any()
    assert (zero.scale == torch.tensor(LEAST)).all()


def test_float64_is_computed_in_fp32(device: str) -> None:
    inputs = tokens(2, 3, 65, gated=True, dtype=torch.float64, device=device)
    new, ours = gated_residual_layer_norm_modulate_fp8(**inputs)
    narrow_new, narrow = gated_residual_layer_norm_modulate_fp8(**{name: t.float() for name, t in inputs.items()})
    assert new.dtype == torch.float64
    assert same((new.float(), ours), (narrow_new, narrow))
    x = inputs["residual"]
    assert same(gelu_concat_fp8(x, x), gelu_concat_fp8(x.float(), x.float()))


# --- what is not finite ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_modulation_of_what_is_not_finite(bad: float, device: str) -> None:
    """It makes its own row NaN, as eager does, and no other."""
    for gated, op in ((False, layer_norm_modulate_fp8), (True, gated_residual_layer_norm_modulate_fp8)):
        inputs = tokens(2, 3, 33, gated=gated, device=device)
        for name in [name for name, tensor in inputs.items() if tensor.ndim == 3]:
            spoiled = inputs | {name: inputs[name].clone()}
            spoiled[name][1, 1, 4] = bad
            plain, ours = (op(**given)[1] if gated else op(**given) for given in (inputs, spoiled))
            assert ours.values.float()[1, 1].isnan().all()
            assert ours.scale[1, 1] == torch.tensor(LEAST)
            others = torch.ones(2, 3, dtype=torch.bool)
            others[1, 1] = False
            assert same(
                Float8(ours.values[others], ours.scale[others]), Float8(plain.values[others], plain.scale[others])
            )
            if gated:
                assert op(**spoiled)[0].isfinite().sum() == 2 * 3 * 33 - 1


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
def test_gelu_of_what_is_not_finite(device: str) -> None:
    """It stays where it is, or saturates, and no scale knows of it."""
    x = drawn(2, 33, device=device)
    x[0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    plain = x.nan_to_num(0.0, 0.0, 0.0)
    for ours, expected, start in (
        (gelu_tanh_fp8(x), gelu_tanh_fp8(plain), 0),
        (gelu_concat_fp8(plain, x), gelu_concat_fp8(plain, plain), 33),
    ):
        assert torch.equal(ours.scale, expected.scale)
        found = ours.values.float()[0, start : start + 3]
        assert found.isnan().tolist() == composed_gelu(x).isnan()[0, :3].tolist() == [True, False, True]
        assert found[1] == 448
        kept = torch.ones(ours.shape, dtype=torch.bool)
        kept[0, start : start + 3] = False
        assert torch.equal(ours.values.float()[kept], expected.values.float()[kept])
    copied = gelu_concat_fp8(x, plain)
    assert copied.values.float()[0, 1:3].tolist() == [448, -448]
    assert copied.values.float()[0].isnan().sum() == 1
    assert torch.equal(copied.scale, gelu_concat_fp8(plain, plain).scale)


# --- layouts --------------------------------------------------------------------------------------


def test_slices_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of a joint sequence, chunks of a modulation and parts of a fused projection."""
    places: list[int] = []

    def seen(*given: Any) -> Any:
        places.extend(tensor.data_ptr() for tensor in given if isinstance(tensor, Tensor))
        return tuple(torch.empty(2, 5, 24) for _ in range(3))[-results:]

    joint, other, chunks = drawn(2, 11, 24), drawn(2, 11, 24), drawn(2, 6 * 24).chunk(6, -1)
    fused = drawn(2, 5, 60)
    monkeypatch.setattr(module, "Float8", lambda *_: None)
    for name in ("_modulate", "_gated_modulate", "_gelu"):
        monkeypatch.setattr(module, name, seen)
    monkeypatch.setattr(torch.Tensor, "view", lambda tensor, *_: tensor)
    x, branch = joint[:, 3:8], other[:, :5]
    results = 2
    layer_norm_modulate_fp8(x, chunks[1][:, None], chunks[0])
    assert places == [tensor.data_ptr() for tensor in (x, chunks[1], chunks[0])]
    places.clear()
    gelu_concat_fp8(fused[..., :24], fused[..., 24:48])
    gelu_tanh_fp8(fused[..., 24:48], fused[0, 0, :24])
    assert places == [fused[..., start:].data_ptr() for start in (0, 24, 24, 0)]
    places.clear()
    results = 3
    gated_residual_layer_norm_modulate_fp8(x, chunks[2], branch, chunks[1], chunks[0])
    assert places == [tensor.data_ptr() for tensor in (x, chunks[2], branch, chunks[1], chunks[0])]


def layouts(device: str) -> list[Tensor]:
    """Several ways to hold numbers, as [2, 4, 12]."""
    dense, fused = drawn(2, 4, 12, device=device), drawn(2, 4, 60, device=device)
    return [
        fused[..., 24:36],
        fused[..., ::5],
        drawn(2, 9, 12, device=device)[:, 1:9:2],
        dense.mT.contiguous().mT,
        dense[:, :1].expand(2, 4, 12),
        fused[:1, :, :1].expand(2, 4, 12),
        dense.transpose(0, 1).contiguous().transpose(0, 1),
    ]


def test_awkward_layouts(device: str) -> None:
    plain = tokens(2, 4, 12, gated=True, device=device)
    vectors = {name: plain[name] for name in ("scale", "shift")}
    every = layouts(device)
    for strange, other in zip(every, every[1:] + every[:1], strict=True):
        x, y = strange.contiguous(), other.contiguous()
        assert same(layer_norm_modulate_fp8(strange, **vectors), layer_norm_modulate_fp8(x, **vectors))
        given = (plain | {"residual": first, "branch": second} for first, second in ((strange, other), (x, y)))
        assert same(*(gated_residual_layer_norm_modulate_fp8(**inputs) for inputs in given))
        assert same(gelu_tanh_fp8(strange, strange[0, 0]), gelu_tanh_fp8(x, x[0, 0]))
        assert same(gelu_concat_fp8(strange, other), gelu_concat_fp8(x, y))
    one, every = plain["gate"][:1].expand(2, 12), plain["gate"].T.contiguous().T
    strange = [one, one[:, None], every, drawn(2, 24, device=device)[:, ::2]]
    for index in range(4):
        given = dict(zip(("gate", "scale", "shift"), (strange[index:] + strange[:index])[:3], strict=True))
        dense = {name: tensor.contiguous() for name, tensor in given.items()}
        assert same(*(gated_residual_layer_norm_modulate_fp8(**plain | vectors) for vectors in (given, dense)))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter: the mean of nothing
@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (2, 3, 0)], ids=str)
def test_nothing_to_compute(shape: tuple[int, ...], device: str) -> None:
    inputs = tokens(*shape, gated=True, device=device)
    check(gated_residual_layer_norm_modulate_fp8, inputs)
    check(layer_norm_modulate_fp8, tokens(*shape, gated=False, device=device))
    x = inputs["residual"]
    check(gelu_tanh_fp8, {"x": x})
    check(gelu_tanh_fp8, {"x": x, "bias": torch.ones(shape[-1], device=device)})
    check(gelu_concat_fp8, {"attn": x, "mlp": x})
    if shape[-1] == 0:  # nothing on one side
        other = drawn(2, 3, 5, device=device)
        check(gelu_concat_fp8, {"attn": x, "mlp": other})
        check(gelu_concat_fp8, {"attn": other, "mlp": x})


# --- contract -------------------------------------------------------------------------------------


def calls(device: str = "cpu") -> list[tuple[Callable, dict[str, Tensor]]]:
    gated, plain = (tokens(2, 2, 24, gated=gated, device=device) for gated in (True, False))
    x, mlp = plain["x"], drawn(2, 2, 7, device=device)
    return [
        (layer_norm_modulate_fp8, plain),
        (gated_residual_layer_norm_modulate_fp8, gated),
        (gelu_tanh_fp8, {"x": x}),
        (gelu_tanh_fp8, {"x": x, "bias": x[0, 0]}),
        (gelu_concat_fp8, {"attn": x, "mlp": mlp}),
    ]


def test_forward_only(device: str) -> None:
    """Where a gradient is wanted they refuse; where none is, nothing is kept."""
    kept: list[Tensor] = []
    for op, inputs in calls(device):
        twin = op.__name__.removesuffix("_fp8")
        message = f"{op.__name__} is forward only: call it under torch.no_grad(), or use {twin}"
        for name in inputs:
            given = inputs | {name: inputs[name].clone().requires_grad_()}
            with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
                op(**given)
            with torch.no_grad():
                assert same(op(**given), op(**inputs))
            with torch.inference_mode():
                op(**inputs)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            op(**inputs)
    assert not kept


def test_deterministic(device: str) -> None:
    for op, inputs in calls(device):
        assert same(op(**inputs), op(**inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype, device: str) -> None:
    residual, gate, branch, scale, shift = (
        tokens(3, 5, 12, gated=True, dtype=dtype, device=device)[name]
        for name in ("residual", "gate", "branch", "scale", "shift")
    )
    for x, added in ((residual[:, 1:4], branch[:, 1:4]), (residual.new_empty(3, 0, 12),) * 2):
        torch.library.opcheck(module._modulate, (x, scale, shift, 1e-6))
        torch.library.opcheck(module._gated_modulate, (x, gate, added, scale, shift, 1e-6))
    fused, bias = drawn(4, 60, dtype=dtype, device=device), drawn(24, device=device)
    for mlp in (fused[:, 24:48], fused.new_empty(0, 24), fused.new_empty(4, 0)):
        torch.library.opcheck(module._gelu, (None, mlp, None))
        torch.library.opcheck(module._gelu, (None, mlp, bias[: mlp.shape[1]]))
        torch.library.opcheck(module._gelu, (mlp.new_empty(mlp.shape[0], 7).fill_(2), mlp, None))


def test_bias_beside_attn(device: str) -> None:
    """Not public, but the operator takes both."""
    attn, mlp, bias = drawn(3, 7, device=device), drawn(3, 24, device=device), drawn(24, device=device)
    wide = (composed_concat(attn.to(dtype), mlp.to(dtype) + bias) for dtype in (torch.float64, torch.float32))
    assert_quantizes(Float8(*module._gelu(attn, mlp, bias)), *wide)


def test_compiles_without_graph_breaks(device: str) -> None:
    for op, inputs in calls(device):
        torch.compiler.reset()
        compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
        for count in (2, 3):  # the second becomes a symbol
            given = {
                name: tensor[:, :1].repeat(1, count, 1) if tensor.ndim == 3 else tensor
                for name, tensor in inputs.items()
            }
            assert same(compiled(**given), op(**given))


_X, _VECTOR = torch.zeros(2, 3, 4), torch.zeros(2, 4)
_MODULATE = dict(x=_X, scale=_VECTOR, shift=_VECTOR)
_GATED = dict(residual=_X, gate=_VECTOR, branch=_X, scale=_VECTOR, shift=_VECTOR)
_CONCAT = dict(attn=_X, mlp=_X)


@pytest.mark.parametrize(
    ("op", "given", "error", "message"),
    [
        (layer_norm_modulate_fp8, _MODULATE | {"x": _X.int()}, TypeError, f"x must be {FLOATING}, got torch.int32"),
        (layer_norm_modulate_fp8, _MODULATE | {"scale": 1.0}, TypeError, f"scale must be {FLOATING}, got float"),
        (layer_norm_modulate_fp8, _MODULATE | {"x": torch.zeros(4)}, ValueError, "x must be [B, ..., D], got [4]"),
        (layer_norm_modulate_fp8, _MODULATE | {"shift": _X}, ValueError,
         "shift must be [2, 4] or [2, 1, 4], got [2, 3, 4]"),
        (layer_norm_modulate_fp8, _MODULATE | {"shift": _VECTOR.to("meta")}, ValueError,
         "x is on cpu but shift is on meta"),
        (layer_norm_modulate_fp8, dict.fromkeys(_MODULATE, torch.zeros(2, 8193)), ValueError,
         "x must be at most 8192 wide, got 8193"),
        (gated_residual_layer_norm_modulate_fp8, _GATED | {"branch": _X.int()}, TypeError,
         f"branch must be {FLOATING}, got torch.int32"),
        (gated_residual_layer_norm_modulate_fp8, _GATED | {"branch": _X[:, :2]}, ValueError,
         "branch must be [2, 3, 4] as residual, got [2, 2, 4]"),
        (gated_residual_layer_norm_modulate_fp8, _GATED | {"gate": torch.zeros(3, 4)}, ValueError,
         "gate must be [2, 4] or [2, 1, 4], got [3, 4]"),
        (gated_residual_layer_norm_modulate_fp8, dict.fromkeys(_GATED, torch.zeros(2, 8193)), ValueError,
         "residual must be at most 8192 wide, got 8193"),
        (gelu_tanh_fp8, dict(x=_X.int()), TypeError, f"x must be {FLOATING}, got torch.int32"),
        (gelu_tanh_fp8, dict(x=_X, bias=[1.0]), TypeError, f"bias must be {FLOATING}, got list"),
        (gelu_tanh_fp8, dict(x=torch.zeros(())), ValueError, "x must be [..., D], got []"),
        (gelu_tanh_fp8, dict(x=_X, bias=torch.zeros(3)), ValueError, "bias must be [4], got [3]"),
        (gelu_tanh_fp8, dict(x=_X, bias=_X), ValueError, "bias must be [4], got [2, 3, 4]"),
        (gelu_tanh_fp8, dict(x=_X, bias=torch.zeros(4, device="meta")), ValueError,
         "x is on cpu but bias is on meta"),
        (gelu_concat_fp8, _CONCAT | {"attn": "attn"}, TypeError, f"attn must be {FLOATING}, got str"),
        (gelu_concat_fp8, _CONCAT | {"mlp": _X.int()}, TypeError, f"mlp must be {FLOATING}, got torch.int32"),
        (gelu_concat_fp8, dict.fromkeys(_CONCAT, torch.zeros(())), ValueError, "attn must be [..., D1], got []"),
        (gelu_concat_fp8, _CONCAT | {"mlp": _X[:1]}, ValueError, "mlp must be [2, 3, D2], got [1, 3, 4]"),
        (gelu_concat_fp8, dict(attn=torch.zeros(4), mlp=torch.zeros(())), ValueError, "mlp must be [D2], got []"),
        (gelu_concat_fp8, _CONCAT | {"mlp": _X.to("meta")}, ValueError, "attn is on cpu but mlp is on meta"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(op: Callable, given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{op.__name__}: {re.escape(message)}$"):
        op(**given)


# --- compiled for GPUs that are not there ---------------------------------------------------------


@pytest.mark.compile_only
@pytest.mark.parametrize(
    ("parts", "width", "architecture"),
    [
        ("modulate", 3072, 90),
        ("gated modulate", 3072, 90),
        ("gated modulate", 3072, 100),
        ("gelu", 12288, 100),
        ("gelu attn", 12288, 90),
        ("gelu bias", 12288, 90),
    ],
)
def test_resources(parts: str, width: int, architecture: int) -> None:
    from srpo_kernels._triton import fp8_producers as kernels

    fixed: dict[str, Any] = dict(values_ptr="*fp8e4nv", row_scale_ptr="*fp32", eps="fp64")
    if "modulate" in parts:
        kernel, options = kernels.modulate_fp8_kernel, kernels.modulate_options(width)
        assert options["num_warps"] == 8
        fixed |= {} if "gated" in parts else dict.fromkeys(("gate_ptr", "branch_ptr", "new_ptr"))
    else:
        kernel, options = kernels.gelu_concat_fp8_kernel, kernels.gelu_options(3072 if "attn" in parts else 0, width)
        fixed |= {f"{name}_ptr": None for name in ("attn", "bias") if name not in parts}
    fixed["BLOCK"] = options["BLOCK"]
    arguments = {name: fixed.get(name, "*bf16" if name.endswith("_ptr") else "i32") for name in kernel.arg_names}
    compiled = compile_for(kernel, arguments, architecture=architecture, num_warps=options["num_warps"])
    assert compiled.stack == 0
    assert compiled.occupancy >= 0.5
    assert compiled.widest_load() == 16
    assert compiled.widest_store() == 16
    assert "cvt.rn.satfinite.e4m3x2" in compiled.ptx
