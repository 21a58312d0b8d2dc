"""gelu_tanh and gelu_concat: kernels (interpreted or real) and reference against float64, and the contract."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu

import srpo_kernels.ops.gelu as module
from srpo_kernels.ops.gelu import gelu_concat, gelu_tanh, quick_gelu
from srpo_kernels.testing import check_against_reference
from srpo_kernels.testing.compile_only import ARCHITECTURES, Compiled, compile_for

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLOATING = "a float32, float16 or bfloat16 tensor"


def drawn(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (2 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(device, dtype)


def composed(x: Tensor, bias: Tensor | None = None) -> Tensor:
    return gelu(x if bias is None else x + bias, approximate="tanh")


def composed_concat(attn: Tensor, mlp: Tensor) -> Tensor:
    return torch.cat([attn, composed(mlp)], -1)


def composed_quick(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def check_quick(x: Tensor, upstream: Tensor | None = None) -> dict[str, Tensor]:
    return check_against_reference(quick_gelu, composed_quick, {"x": x}, differentiable=("x",), upstream=upstream)


def check(inputs: dict[str, Tensor], upstream: Tensor | None = None) -> dict[str, Tensor]:
    """The operator that takes `inputs`, within budget."""
    functions = (gelu_tanh, composed) if "x" in inputs else (gelu_concat, composed_concat)
    return check_against_reference(*functions, inputs, differentiable=tuple(inputs), upstream=upstream)


# --- accuracy -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 64), (5, 129), (1, 3071), (4099,), (2, 1)], ids=str)
def test_within_budget(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    inputs = {"x": drawn(*shape, dtype=dtype, device=device)}
    check(inputs)
    check(inputs | {"bias": drawn(shape[-1], dtype=dtype, device=device)})
    check_quick(inputs["x"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", [(96, 384), (129, 65), (1, 1), (3071, 2), (7, 4099)], ids=str)
def test_concat_within_budget(widths: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    attn, mlp = (drawn(2, 2, width, dtype=dtype, device=device) for width in widths)
    out = check({"attn": attn, "mlp": mlp})["output"]
    assert torch.equal(out[..., : widths[0]], attn)


def test_bias_gradient_of_many_rows(device: str) -> None:
    """More rows than programs, which are not shared out evenly."""
    check({"x": drawn(265, 24, dtype=torch.bfloat16, device=device), "bias": drawn(24, device=device)})


def test_mixed_dtypes(device: str) -> None:
    half, full = drawn(3, 40, dtype=torch.bfloat16, device=device), drawn(3, 40, device=device)
    for x, bias in ((half, full[0]), (full, half[0])):
        results = check({"x": x, "bias": bias})
        assert [results[name].dtype for name in ("output", "dx", "dbias")] == [x.dtype, x.dtype, bias.dtype]
    for attn, mlp in ((half, full), (full, half)):
        results = check({"attn": attn, "mlp": mlp})
        assert [results[name].dtype for name in ("output", "dattn", "dmlp")] == [attn.dtype, attn.dtype, mlp.dtype]


def test_fine_grid(device: str) -> None:
    """Where the sigmoid saturates and around zero, in fp32, with all upstream gradients one."""
    x = torch.linspace(-12, 12, 30001, device=device)
    check({"x": x}, torch.ones_like(x))
    check_quick(x, torch.ones_like(x))
    small = torch.cat([x * 10.0**-power for power in (3, 10, 30)])
    for function, plain in ((gelu_tanh, composed), (quick_gelu, composed_quick)):
        exact = plain(small.double())
        assert ((function(small) - exact).abs() <= 4 * torch.finfo(torch.float32).eps * exact.abs()).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
def test_extremes_are_eagers(device: str) -> None:
    infinity, nan = float("inf"), float("nan")
    x = torch.tensor([infinity, -infinity, nan, 3e38, -3e38, 1e15, -1e15, 0.0, -0.0], device=device)
    expected = composed(x)
    for out in (gelu_tanh(x), gelu_concat(x, x)[9:]):
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(quick_gelu(x), composed_quick(x), rtol=0, atol=0, equal_nan=True)
    finite, large = x[5:].requires_grad_(), x[3:].detach().requires_grad_()
    (gradient,) = torch.autograd.grad(gelu_tanh(finite).sum(), finite)
    assert gradient.tolist() == [1.0, 0.0, 0.5, 0.5]
    (gradient,) = torch.autograd.grad(quick_gelu(large).sum(), large)
    assert gradient.tolist() == [1.0, 0.0, 1.0, 0.0, 0.5, 0.5]


def test_float64_is_computed_in_float64(device: str) -> None:
    x, bias = drawn(3, 33, dtype=torch.float64, device=device), drawn(33, dtype=torch.float64, device=device)
    x.requires_grad_()
    expected = composed(x, bias)
    torch.testing.assert_close(gelu_tanh(x, bias), expected, rtol=1e-13, atol=1e-15)
    gradients = (torch.autograd.grad(out.sum(), x)[0] for out in (gelu_tanh(x, bias), expected))
    torch.testing.assert_close(*gradients, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(quick_gelu(x), composed_quick(x), rtol=1e-13, atol=1e-15)


def test_quick_gelu_on_the_cpu_is_bitwise_the_composed_form() -> None:
    """So that a reward in fp32 scores, and is differentiated, exactly as its library does it."""
    x, upstream = drawn(64, 65).requires_grad_(), drawn(65, 64).T
    plain = composed_quick(x)
    assert torch.equal(module.quick_gelu_reference(x), plain)
    (gradient,) = torch.autograd.grad(plain, x, upstream)
    assert torch.equal(module._quick_backward_reference(upstream, x.detach()), gradient)


def test_gradcheck(device: str) -> None:
    x, bias = (drawn(*shape, dtype=torch.float64, device=device).requires_grad_() for shape in ((2, 3), (3,)))
    assert torch.autograd.gradcheck(gelu_tanh, (x,))
    assert torch.autograd.gradcheck(quick_gelu, (x,))
    assert torch.autograd.gradcheck(gelu_tanh, (x, bias))
    assert torch.autograd.gradcheck(gelu_concat, (x[:, :1].detach().clone().requires_grad_(), x))


# --- edges --------------------------------------------------------------------------------------


def layouts(device: str) -> list[Tensor]:
    """Several ways to hold numbers, as [2, 5, 24]; a slice of a projection first."""
    fused = drawn(2, 5, 60, device=device)
    heads = drawn(2, 3, 5, 8, device=device).transpose(1, 2).flatten(2)
    others = fused[:, :, 1:25], heads, fused[..., ::2][..., :24], fused[:, :1, :24].expand(2, 5, 24)
    return [fused[..., 24:48], *others, drawn(24, 5, 2, device=device).transpose(0, 2), fused[..., :1].expand(2, 5, 24)]


def test_awkward_layouts(device: str) -> None:
    plain = drawn(2, 5, 24, device=device)
    for strange in layouts(device):
        bias = strange[0, 0]
        for given in (dict(x=strange), dict(x=strange, bias=bias), dict(attn=strange, mlp=plain)):
            check(given)
        check(dict(attn=plain, mlp=strange))
        check_quick(strange)


def test_gradients_of_any_layout(device: str) -> None:
    attn, x, bias = (drawn(*shape, device=device) for shape in ((2, 5, 24), (2, 5, 24), (24,)))
    wide = drawn(2, 5, 96, device=device)
    for upstream in (wide[..., :48], wide[..., ::2], wide[0, 0, 0].expand(2, 5, 48), wide[:, :1, :48].expand(2, 5, 48)):
        for inputs in ({"x": x}, {"x": x, "bias": bias}):
            check(inputs, upstream[..., :24])
        check_quick(x, upstream[..., :24])
        check({"attn": attn, "mlp": x}, upstream)


@pytest.mark.parametrize("shape", [(0, 24), (2, 0, 24), (3, 0), (0,)], ids=str)
def test_nothing_to_compute(shape: tuple[int, ...], device: str) -> None:
    x, bias = torch.zeros(shape, device=device), torch.ones(shape[-1:], device=device)
    results = check({"x": x, "bias": bias})
    assert not results["dbias"].any()
    check({"x": x})
    check_quick(x)
    check({"attn": x, "mlp": x})
    if shape[-1] == 0 and x.ndim > 1:  # nothing on one side
        other = drawn(*shape[:-1], 5, device=device)
        check({"attn": x, "mlp": other})
        check({"attn": other, "mlp": x})


def test_scalar(device: str) -> None:
    check({"x": torch.tensor(0.5, device=device)})
    check_quick(torch.tensor(0.5, device=device))


# --- contract -----------------------------------------------------------------------------------


def test_gradients_only_where_wanted(device: str) -> None:
    x, other = drawn(2, 5, 24, device=device), drawn(2, 5, 24, device=device)
    for function, tensors in ((gelu_tanh, (x, x[0, 0])), (gelu_concat, (other, x))):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        expected = torch.autograd.grad(function(*leaves).square().sum(), leaves)
        for index, leaf in enumerate(leaves):
            given = [tensor if place != index else leaf for place, tensor in enumerate(tensors)]
            function(*given).square().sum().backward()
            assert torch.equal(leaf.grad, expected[index])
            assert all(tensor.grad is None for tensor in given if tensor is not leaf)


def kept(function: Callable, *given: Tensor) -> list[tuple[int, tuple[int, ...]]]:
    """Place and shape of what is saved for backward."""
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        function(*given)
    return [(tensor.data_ptr(), tuple(tensor.shape)) for tensor in saved]


def test_saved_for_backward(device: str) -> None:
    """The caller's own tensors, slices included, and of gelu_concat the second only."""
    fused, bias = drawn(2, 5, 60, device=device).requires_grad_(), drawn(24, device=device)
    attn, mlp = fused[..., :24], fused[..., 24:48]
    assert kept(gelu_tanh, mlp) == [(mlp.data_ptr(), (10, 24))]
    assert kept(quick_gelu, mlp) == [(mlp.data_ptr(), (10, 24))]
    assert kept(gelu_tanh, mlp, bias) == [(mlp.data_ptr(), (10, 24)), (bias.data_ptr(), (24,))]
    assert kept(gelu_concat, attn, mlp) == [(mlp.data_ptr(), (10, 24))]
    assert kept(gelu_concat, attn, mlp.detach()) == []


def test_gradient_of_attn_is_a_view(device: str) -> None:
    attn, mlp = drawn(4, 8, device=device).requires_grad_(), drawn(4, 16, device=device).requires_grad_()
    upstream = drawn(4, 24, device=device)
    dattn, _ = torch.autograd.grad(gelu_concat(attn, mlp), (attn, mlp), upstream)
    assert dattn.data_ptr() == upstream.data_ptr()
    assert torch.equal(dattn, upstream[:, :8])
    gelu_concat(attn, mlp).backward(upstream)
    attn.grad.zero_()  # a leaf's own copy
    assert upstream.all()


def test_deterministic(device: str) -> None:
    given = [drawn(*shape, dtype=torch.bfloat16, device=device).requires_grad_() for shape in ((265, 24), (24,))]

    def run() -> list[Tensor]:
        out = gelu_tanh(*given)
        return [out, *torch.autograd.grad(out.square().sum(), given)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
    quick = [torch.autograd.grad(quick_gelu(given[0]).square().sum(), given[0])[0] for _ in range(2)]
    assert torch.equal(*quick)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype, device: str) -> None:
    fused, bias = drawn(4, 60, dtype=dtype, device=device), drawn(24, device=device)
    for x in (fused[:, 24:48], drawn(4, 24, dtype=dtype, device=device)):
        for optional in (None, bias):
            torch.library.opcheck(module._forward, (x, optional))
            torch.library.opcheck(module._backward, (fused[:, :24], x, optional))
        for wants_x in (False, True):
            torch.library.opcheck(module._bias_backward, (fused[:, :24], x, bias, wants_x))
        torch.library.opcheck(module._concat_forward, (fused[:, :7], x))
        torch.library.opcheck(module._quick_forward, (x,))
        torch.library.opcheck(module._quick_backward, (fused[:, :24], x))


def test_compiles_without_graph_breaks(device: str) -> None:
    attn, x, bias = (drawn(*shape, device=device) for shape in ((2, 5, 7), (2, 5, 24), (24,)))
    for function, plain, inputs in (
        (gelu_tanh, composed, {"x": x}),
        (gelu_tanh, composed, {"x": x, "bias": bias}),
        (gelu_concat, composed_concat, {"attn": attn, "mlp": x}),
        (quick_gelu, composed_quick, {"x": x}),
    ):
        torch.compiler.reset()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        check_against_reference(compiled, plain, inputs, differentiable=tuple(inputs))


_ZEROS = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("function", "given", "error", "message"),
    [
        (gelu_tanh, dict(x=_ZEROS.int()), TypeError, f"x must be {FLOATING}, got torch.int32"),
        (gelu_tanh, dict(x=_ZEROS, bias=[1.0]), TypeError, f"bias must be {FLOATING}, got list"),
        (gelu_tanh, dict(x=_ZEROS, bias=_ZEROS[0, 0, :3]), ValueError, "bias must be [4], got [3]"),
        (gelu_tanh, dict(x=_ZEROS, bias=_ZEROS), ValueError, "bias must be [4], got [2, 3, 4]"),
        (gelu_tanh, dict(x=torch.ones(()), bias=torch.ones(())), ValueError, "bias must be None for scalar x, got []"),
        (gelu_tanh, dict(x=_ZEROS, bias=_ZEROS[0, 0].to("meta")), ValueError, "x is on cpu but bias is on meta"),
        (gelu_concat, dict(attn="attn", mlp=_ZEROS), TypeError, f"attn must be {FLOATING}, got str"),
        (gelu_concat, dict(attn=_ZEROS, mlp=_ZEROS.int()), TypeError, f"mlp must be {FLOATING}, got torch.int32"),
        (gelu_concat, dict(attn=_ZEROS[0, 0, 0], mlp=_ZEROS[0, 0, 0]), ValueError, "attn must be [..., D1], got []"),
        (gelu_concat, dict(attn=_ZEROS, mlp=_ZEROS[:1]), ValueError, "mlp must be [2, 3, D2], got [1, 3, 4]"),
        (gelu_concat, dict(attn=_ZEROS[0, 0], mlp=_ZEROS[0, 0, 0]), ValueError, "mlp must be [D2], got []"),
        (gelu_concat, dict(attn=_ZEROS, mlp=_ZEROS.to("meta")), ValueError, "attn is on cpu but mlp is on meta"),
        (quick_gelu, dict(x=_ZEROS.int()), TypeError, f"x must be {FLOATING}, got torch.int32"),
        (quick_gelu, dict(x=[1.0]), TypeError, f"x must be {FLOATING}, got list"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(
    function: Callable, given: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{function.__name__}: {re.escape(message)}$"):
        function(**given)


# --- compiled for GPUs that are not there -------------------------------------------------------


def compiled(kernel: str, dtype: torch.dtype, width: int, architecture: int, **given: Any) -> tuple[Compiled, bool]:
    """A kernel at a width, and whether that is wide enough for every thread to hold 16 bytes."""
    import triton.language as tl

    from srpo_kernels._triton import gelu as kernels
    from srpo_kernels._triton._common import elementwise

    size = dtype.itemsize
    summing = "partials_ptr" in given
    block, warps = kernels._part_of_row(width, size) if summing else elementwise(width, torch.empty(0, dtype=dtype))
    kind = {2: "*bf16", 4: "*fp32"}[size]
    function = getattr(kernels, kernel)
    known = dict(bias_ptr=None, dx_ptr=kind, partials_ptr=None, rows_each="i32" if summing else 1, QUICK=False) | given
    defaults = {name: kind if name.endswith("_ptr") else "i32" for name in function.arg_names}
    arguments = defaults | known | dict(ACC=tl.float32, BLOCK=block)
    made = compile_for(
        function,
        {name: arguments[name] for name in function.arg_names},
        architecture=architecture,
        num_warps=warps,
    )
    return made, block * size >= warps * 32 * 16


@pytest.mark.compile_only
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [64, 512, 1024, 3072, 8192, 12288])
@pytest.mark.parametrize(
    ("kernel", "given"),
    [
        ("gelu_kernel", {}),
        ("gelu_kernel", {"bias_ptr": "*fp32"}),
        ("gelu_backward_kernel", {}),
        ("gelu_backward_kernel", {"bias_ptr": "*fp32"}),
        ("gelu_backward_kernel", {"bias_ptr": "*fp32", "partials_ptr": "*fp32"}),
        ("gelu_backward_kernel", {"bias_ptr": "*fp32", "partials_ptr": "*fp32", "dx_ptr": None}),
        ("gelu_kernel", {"QUICK": True}),
        ("gelu_backward_kernel", {"QUICK": True}),
    ],
    ids=["forward", "forward bias", "backward", "backward bias", "sums", "sums only", "quick", "quick backward"],
)
def test_resources(architecture: int, dtype: torch.dtype, width: int, kernel: str, given: dict[str, Any]) -> None:
    made, wide = compiled(kernel, dtype, width, architecture, **given)
    assert made.stack == 0
    assert made.occupancy >= 0.5
    if wide:
        assert made.widest_load() == 16
        assert made.widest_store() == 16
