"""gated_residual, alone and with the modulation that follows: kernels and reference against float64, the contract."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm

import srpo_kernels.ops.gated_residual as module
from srpo_kernels.ops.gated_residual import gated_residual, gated_residual_layer_norm_modulate
from srpo_kernels.testing import check_against_reference
from srpo_kernels.testing.compile_only import ARCHITECTURES, compile_for

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PLAIN = ("residual", "gate", "branch")
FUSED = (*PLAIN, "scale", "shift")
BOTH = [(gated_residual, PLAIN), (gated_residual_layer_norm_modulate, FUSED)]
FLOATING = "a float32, float16 or bfloat16 tensor"
both = pytest.mark.parametrize(("function", "names"), BOTH, ids=["plain", "fused"])


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of backward walk several rows, the last one fewer."""
    monkeypatch.setattr("srpo_kernels._triton._partials._PROGRAMS", 4)


def tensors(
    *shape: int,
    names: tuple[str, ...] = FUSED,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    vector_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(shape[-1])
    made = {}
    for name in names:
        vector = name not in ("residual", "branch")
        size = (shape[0], shape[-1]) if vector else shape
        drawn = torch.randn(*size, generator=generator, dtype=torch.float64)
        made[name] = drawn.to(vector_dtype or dtype if vector else dtype).to(device)
    return made


def joined(out: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    return out if isinstance(out, Tensor) else torch.stack(out)


def composed(residual: Tensor, gate: Tensor, branch: Tensor, *modulation: Tensor, eps: float = 1e-6) -> Tensor:
    """The formula in the inputs' dtype."""
    gate, *modulation = (v.reshape(v.shape[0], *[1] * (residual.ndim - 2), -1) for v in (gate, *modulation))
    new = residual + gate * branch
    if not modulation:
        return new
    scale, shift = modulation
    return torch.stack((new, layer_norm(new, new.shape[-1:], eps=eps) * (1 + scale) + shift))


def check(function: Callable, inputs: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Outputs, joined, and all gradients within budget."""
    return check_against_reference(
        lambda **given: joined(function(**given, **options)),
        lambda **given: composed(*given.values(), **options),
        inputs,
        differentiable=tuple(inputs),
    )


def results(
    function: Callable,
    inputs: dict[str, Tensor],
    wanted: tuple[str, ...] | None = None,
    used: tuple[bool, bool] = (True, True),
    upstream: Tensor | None = None,
) -> list[Tensor | None]:
    """Output and gradients of `wanted`, through the outputs that are used."""
    wanted = tuple(inputs) if wanted is None else wanted
    given = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in inputs.items()}
    out = function(**given)
    outs = [out] if isinstance(out, Tensor) else [one for one, use in zip(out, used, strict=True) if use]
    if upstream is None:
        upstream = torch.linspace(-1, 2, outs[0].numel(), device=outs[0].device).view(outs[0].shape).to(outs[0].dtype)
    leaves = [given[name] for name in wanted]
    return [joined(out).detach(), *torch.autograd.grad(outs, leaves, [upstream] * len(outs), allow_unused=True)]


def same(first: list[Tensor | None], second: list[Tensor | None]) -> bool:
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in zip(first, second, strict=True))


def recorded(function: Callable, inputs: dict[str, Tensor]) -> list[Tensor]:
    """What is saved for backward."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        function(**inputs)
    return kept


# --- accuracy -----------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 7, 64), (3, 5, 129), (1, 1, 3071), (4, 33), (1, 2, 3, 65)], ids=str)
def test_within_budget(
    function: Callable, names: tuple[str, ...], shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    ours = check(function, tensors(*shape, names=names, dtype=dtype, device=device))
    assert all(tensor.dtype == dtype for tensor in ours.values())


@both
@pytest.mark.parametrize("width", [1, 4099])
def test_narrow_and_wide(function: Callable, names: tuple[str, ...], width: int, device: str) -> None:
    """Rows of more than 4096 elements take another way backward."""
    inputs = tensors(2, 5, width, names=names, device=device)
    check(function, inputs)
    if width > 1:
        *_, dscale, dshift = results(function, inputs)
        if names == FUSED:
            assert same(results(function, inputs, ("scale", "shift"))[1:], [dscale, dshift])


def test_any_width_of_the_plain_operator(device: str) -> None:
    check(gated_residual, tensors(1, 3, 9001, names=PLAIN, dtype=torch.bfloat16, device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("used", [(True, False), (False, True)], ids=["sum", "modulated"])
def test_one_result_used(used: tuple[bool, bool], dtype: torch.dtype, device: str) -> None:
    """Its gradients are as if the other did not exist."""
    inputs = tensors(2, 7, 33, dtype=dtype, device=device)
    names = PLAIN if used[0] else FUSED
    index = used.index(True)

    def function(**given: Tensor) -> Tensor:
        return gated_residual_layer_norm_modulate(**{**inputs, **given})[index]

    def plain(**given: Tensor) -> Tensor:
        missing = {name: inputs[name].to(given["residual"].dtype) for name in FUSED if name not in given}
        return composed(*{**given, **missing}.values())[index]

    check_against_reference(function, plain, {name: inputs[name] for name in names}, differentiable=names)
    gradients = results(gated_residual_layer_norm_modulate, inputs, used=used)[1:]
    assert [gradient is None for gradient in gradients] == [False] * 3 + [used[0]] * 2


def test_modulation_sees_the_sum_before_it_is_rounded(device: str) -> None:
    inputs = tensors(2, 5, 64, dtype=torch.bfloat16, device=device)
    inputs["residual"] += 256  # a sum rounded to bfloat16 keeps little of branch
    check(gated_residual_layer_norm_modulate, inputs)


def test_eps(device: str) -> None:
    inputs = tensors(2, 5, 40, device=device)
    for name in ("residual", "branch"):
        inputs[name] *= 1e-2
    check(gated_residual_layer_norm_modulate, inputs, eps=1e-3)


@both
@pytest.mark.parametrize(
    ("dtype", "vector_dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("odd", ["branch", "gate"])
def test_mixed_dtypes(
    function: Callable, names: tuple[str, ...], dtype: torch.dtype, vector_dtype: torch.dtype, odd: str, device: str
) -> None:
    inputs = tensors(2, 9, 65, names=names, dtype=dtype, device=device, vector_dtype=vector_dtype)
    inputs[odd] = inputs[odd].half()
    ours = check(function, inputs)
    assert ours["output"].dtype == dtype
    assert all(ours[f"d{name}"].dtype == tensor.dtype for name, tensor in inputs.items())


@both
def test_gradcheck(function: Callable, names: tuple[str, ...], device: str) -> None:
    inputs = [tensor.double().requires_grad_() for tensor in tensors(1, 3, 4, names=names, device=device).values()]
    assert torch.autograd.gradcheck(function, inputs)


# --- layouts ------------------------------------------------------------------------------------


@both
def test_slices_are_not_copied(function: Callable, names: tuple[str, ...], device: str) -> None:
    """Tokens of a joint sequence and chunks of a modulation."""
    joint = tensors(2, 11, 24, names=names, dtype=torch.bfloat16, device=device)
    chunks = torch.randn(2, 6 * 24, device=device).chunk(6, -1)
    inputs = {name: joint[name][:, 3:8] for name in ("residual", "branch")}
    vectors = [name for name in names if name not in inputs]
    inputs = {name: inputs[name] if name in inputs else chunks[vectors.index(name)] for name in names}
    dense = {name: tensor.contiguous() for name, tensor in inputs.items()}
    assert same(results(function, inputs), results(function, dense))
    long = results(function, {name: tensor[:, None] if name in vectors else tensor for name, tensor in inputs.items()})
    flat = [out.squeeze(1) if out.ndim == 3 and out.shape[1] == 1 else out for out in long]
    assert same(flat, results(function, dense))
    kept = recorded(function, {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()})
    own = {tensor.data_ptr() for tensor in inputs.values()}
    assert sum(tensor.data_ptr() in own for tensor in kept) == len(names) - 1  # without residual, or without shift


@both
def test_awkward_layouts(function: Callable, names: tuple[str, ...], device: str) -> None:
    inputs = tensors(2, 4, 12, names=names, device=device)
    for name, tensor in inputs.items():
        strange = [tensor.mT.contiguous().mT, tensor[:1].expand_as(tensor), tensor[..., :1].expand_as(tensor)]
        for layout in [*strange, tensor[:, :1].expand_as(tensor)]:
            expected = results(function, inputs | {name: layout.contiguous()})
            assert same(results(function, inputs | {name: layout}), expected)


@both
def test_awkward_gradients(function: Callable, names: tuple[str, ...], device: str) -> None:
    inputs = tensors(2, 6, 12, names=names, device=device)
    joint = torch.randn(2, 9, 12, device=device)
    column = torch.randn(2, 6, 1, device=device)
    for upstream in (torch.ones((), device=device).expand(2, 6, 12), joint[:, 2:8], column.expand(2, 6, 12)):
        for used in ((True, True), (True, False), (False, True)):
            expected = results(function, inputs, used=used, upstream=upstream.contiguous())
            assert same(results(function, inputs, used=used, upstream=upstream), expected)


@both
@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (2, 3, 0)], ids=str)
def test_nothing_to_add(function: Callable, names: tuple[str, ...], shape: tuple[int, ...], device: str) -> None:
    inputs = tensors(*shape, names=names, device=device)
    out, *gradients = results(function, inputs)
    assert out.shape[-3:] == shape
    for gradient, tensor in zip(gradients, inputs.values(), strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))


# --- contract -----------------------------------------------------------------------------------


@both
def test_only_wanted_gradients(function: Callable, names: tuple[str, ...], device: str) -> None:
    inputs = tensors(2, 5, 33, names=names, dtype=torch.bfloat16, device=device)
    for used in ((True, True), (True, False)):
        out, *gradients = results(function, inputs, used=used)
        for wants in product((False, True), repeat=len(names)):
            if any(wants[:3] if not used[1] else wants):
                wanted = tuple(name for name, want in zip(names, wants, strict=True) if want)
                expected = [gradient for gradient, want in zip(gradients, wants, strict=True) if want]
                assert same(results(function, inputs, wanted, used), [out, *expected])


def test_residual_gets_the_gradient_itself(device: str) -> None:
    inputs = tensors(2, 5, 8, names=PLAIN, device=device)
    upstream = torch.randn(2, 5, 8, device=device)
    _, gradient = results(gated_residual, inputs, ("residual",), upstream=upstream)
    assert gradient.data_ptr() == upstream.data_ptr()


def test_saved_for_backward(device: str) -> None:
    inputs = tensors(2, 5, 8, dtype=torch.bfloat16, device=device)
    plain = {name: inputs[name] for name in PLAIN}
    for wanted, saved in ((("residual",), ()), (("branch",), ("gate",)), (("gate",), ("branch",)), (PLAIN, PLAIN[1:])):
        given = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in plain.items()}
        assert [k.data_ptr() for k in recorded(gated_residual, given)] == [plain[name].data_ptr() for name in saved]
    given = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    *own, statistics = recorded(gated_residual_layer_norm_modulate, given)
    assert [tensor.data_ptr() for tensor in own] == [inputs[name].data_ptr() for name in FUSED[:-1]]
    assert (tuple(statistics.shape), statistics.dtype) == ((2, 2, 5), torch.float32)


@both
def test_deterministic(function: Callable, names: tuple[str, ...], device: str) -> None:
    inputs = tensors(2, 20, 300, names=names, dtype=torch.bfloat16, device=device)
    assert same(results(function, inputs), results(function, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype, device: str) -> None:
    residual, gate, branch = tensors(3, 5, 12, names=PLAIN, dtype=dtype, device=device).values()
    given = residual[:, 1:4], gate, branch[:, :3].float()
    torch.library.opcheck(module._forward, given)
    gradient = torch.randn(3, 5, 12, device=device).to(dtype)[:, 2:]
    for gates, branches in ((gate, None), (None, given[2]), (gate, given[2])):
        torch.library.opcheck(module._backward, (gradient, gates, branches, torch.float32, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_fused(dtype: torch.dtype, device: str) -> None:
    residual, gate, branch, scale, shift = tensors(3, 5, 12, dtype=dtype, device=device).values()
    given = residual[:, 1:4], gate, branch[:, :3].float()
    new, modulated, statistics = module._fused_forward(*given, scale, shift, 1e-6)
    torch.library.opcheck(module._fused_forward, (*given, scale, shift, 1e-6))
    for dnew, *wanted in ((None, True, True, True, True, True), (new, False, True, False, True, False)):
        arguments = dnew, modulated, *given, scale, statistics, wanted, torch.float32
        torch.library.opcheck(module._fused_backward, arguments)


@both
def test_compiles_without_graph_breaks(function: Callable, names: tuple[str, ...], device: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for tokens in (4, 7, 9):  # the second becomes a symbol
        check(compiled, tensors(2, tokens, 16, names=names, device=device))
    inputs = tensors(2, 4, 16, names=names, device=device)
    for used in ((True, False), (False, True)):
        ours, expected = (results(f, inputs, PLAIN, used) for f in (compiled, function))
        torch.testing.assert_close(ours, expected)


@both
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"residual": torch.zeros(2, 4).int()}, TypeError, f"residual must be {FLOATING}, got torch.int32"),
        ({"gate": 1.0}, TypeError, f"gate must be {FLOATING}, got float"),
        ({"gate": torch.zeros(2, 4, device="meta")}, ValueError, "residual is on cpu but gate is on meta"),
        ({"residual": torch.zeros(4)}, ValueError, "residual must be [B, ..., D], got [4]"),
        ({"branch": torch.zeros(2, 1, 4)}, ValueError, "branch must be [2, 3, 4] as residual, got [2, 1, 4]"),
        ({"gate": torch.zeros(2, 3, 4)}, ValueError, "gate must be [2, 4] or [2, 1, 4], got [2, 3, 4]"),
    ],
)
def test_errors_name_the_argument(
    function: Callable, names: tuple[str, ...], change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{function.__name__}: {re.escape(message)}$"):
        function(**tensors(2, 3, 4, names=names) | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": torch.zeros(3, 4)}, "scale must be [2, 4] or [2, 1, 4], got [3, 4]"),
        ({"shift": torch.zeros(4)}, "shift must be [2, 4] or [2, 1, 4], got [4]"),
        (tensors(2, 8193), "residual must be at most 8192 wide, got 8193"),
    ],
)
def test_errors_of_the_modulation(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=f"^gated_residual_layer_norm_modulate: {re.escape(message)}$"):
        gated_residual_layer_norm_modulate(**tensors(2, 3, 4) | change)


# --- compiled for GPUs that are not there -------------------------------------------------------

RESOURCES = [
    pytest.mark.compile_only,
    pytest.mark.parametrize("architecture", ARCHITECTURES),
    pytest.mark.parametrize("kind", ["*bf16", "*fp32"]),
    pytest.mark.parametrize("width", [64, 1024, 3072, 8192]),
    pytest.mark.parametrize("backward", [False, True]),
]


def resources(test: Callable) -> Callable:
    for mark in RESOURCES:
        test = mark(test)
    return test


def compiled_kernel(
    kernel: Any, kind: str, architecture: int, odd: dict[str, Any] | None = None, **options: Any
) -> Any:
    import triton.language as tl

    known = dict.fromkeys(("statistics_ptr", "partials_ptr"), "*fp32") | dict(eps="fp64", ACC=tl.float32)
    known |= {name: options.pop(name) for name in list(options) if name.isupper()} | (odd or {})
    arguments = {name: known.get(name, kind if name.endswith("_ptr") else "i32") for name in kernel.arg_names}
    return compile_for(kernel, arguments, architecture=architecture, **options)


def prefetched(compiled: Any) -> set[str]:
    """Bytes that a thread loads ahead at once."""
    return set(re.findall(r"cp\.async\.c[ag]\.shared\.global .*?, (0x8|0x10), ", compiled.ptx))


def stores(compiled: Any) -> set[str]:
    return set(re.findall(r"st\.global\S*", compiled.ptx))


@resources
def test_resources(backward: bool, width: int, kind: str, architecture: int) -> None:
    from srpo_kernels._triton import gated_residual as kernels

    kernel = kernels.gated_residual_backward_kernel if backward else kernels.gated_residual_kernel
    block, warps = kernels.column_block(width)
    compiled = compiled_kernel(kernel, kind, architecture, BLOCK=block, num_warps=warps)
    assert compiled.stack == 0
    assert compiled.occupancy >= 0.5
    if width >= 256:
        assert compiled.widest_load() == 16
        assert compiled.widest_store() == 16
        if backward:
            assert prefetched(compiled) == {"0x10"}


@resources
def test_resources_fused(backward: bool, width: int, kind: str, architecture: int) -> None:
    from srpo_kernels._triton import gated_residual_layer_norm_modulate as kernels

    wide = width > kernels.ONE_LAUNCH
    if backward:
        kernel = kernels.gated_residual_layer_norm_modulate_backward_kernel
        options = kernels.backward_options(width, 2 if kind == "*bf16" else 4)
        options |= dict(DGATE=True, DSCALE=not wide, DSHIFT=not wide)
    else:
        kernel = kernels.gated_residual_layer_norm_modulate_kernel
        options = dict(zip(("BLOCK", "num_warps"), kernels.row_block(width), strict=True))
    compiled = compiled_kernel(kernel, kind, architecture, **options)
    assert compiled.stack == 0
    if not wide:
        assert compiled.occupancy >= 0.5
    if width >= 256:
        assert compiled.widest_store() == 16
        if backward and not wide:
            assert prefetched(compiled) == {"0x10"}  # every load but those of gate and scale
            assert compiled.ptx.count("ld.global") == 2
        else:
            assert compiled.widest_load() == 16
        if backward:
            assert stores(compiled) == {"st.global.v4.b32"}


@pytest.mark.compile_only
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("kind", "odd", "widths"),
    [
        ("*fp16", {}, {"0x10"}),
        ("*bf16", dict.fromkeys(("gate_ptr", "scale_ptr"), "*fp32"), {"0x10"}),
        ("*bf16", dict.fromkeys(("branch_ptr", "dbranch_ptr"), "*fp32"), {"0x8", "0x10"}),
        ("*bf16", {"dnew_ptr": None}, {"0x8", "0x10"}),
        ("*bf16", {"dresidual_ptr": None}, {"0x10"}),
    ],
)
def test_resources_of_other_gradients(kind: str, odd: dict[str, Any], widths: set[str], architecture: int) -> None:
    """A tensor on its own is read 8 bytes a thread."""
    from srpo_kernels._triton import gated_residual_layer_norm_modulate as kernels

    options = kernels.backward_options(3072, 4 if "branch_ptr" in odd else 2)
    kernel = kernels.gated_residual_layer_norm_modulate_backward_kernel
    sums = dict(DGATE=True, DSCALE=True, DSHIFT=True)
    compiled = compiled_kernel(kernel, kind, architecture, odd, **sums, **options)
    assert compiled.stack == 0
    assert compiled.occupancy >= 0.5
    assert prefetched(compiled) == widths
