"""layer_norm_modulate: kernels (interpreted or real) and reference against float64, and the operator contract."""

from __future__ import annotations

import re
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm

import srpo_kernels.ops.layer_norm_modulate as module
from srpo_kernels.ops.layer_norm_modulate import layer_norm_modulate
from srpo_kernels.testing import check_against_reference
from srpo_kernels.testing.compile_only import ARCHITECTURES, compile_for

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMES = ("x", "scale", "shift")
FLOATING = "a float32, float16 or bfloat16 tensor"


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of backward walk several rows, the last one fewer."""
    monkeypatch.setattr("srpo_kernels._triton._partials._PROGRAMS", 4)


def tensors(
    *shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", vector_dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(shape[-1])

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    made = {"x": (0.5 + 2 * drawn(*shape)).to(dtype)}
    for name in NAMES[1:]:
        made[name] = drawn(shape[0], shape[-1]).to(vector_dtype or dtype)
    return {name: tensor.to(device) for name, tensor in made.items()}


def composed(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """The formula in the inputs' dtype."""
    scale, shift = (vector.reshape(x.shape[0], *[1] * (x.ndim - 2), -1) for vector in (scale, shift))
    return layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


def results(inputs: dict[str, Tensor], wanted: tuple[str, ...] = NAMES, upstream: Tensor | None = None) -> list[Tensor]:
    """Output and gradients of `wanted`."""
    given = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in inputs.items()}
    out = layer_norm_modulate(**given)
    if upstream is None:
        upstream = torch.linspace(-1, 2, out.numel(), device=out.device).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, [given[name] for name in wanted], upstream)]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 7, 64), (3, 5, 129), (1, 1, 3071), (2, 3, 1), (4, 33), (1, 2, 3, 65)], ids=str)
def test_within_budget(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    ours = check_against_reference(
        layer_norm_modulate, composed, tensors(*shape, dtype=dtype, device=device), differentiable=NAMES
    )
    assert all(tensor.dtype == dtype for tensor in ours.values())


def test_many_programs(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More partial sums than the second stage adds at once."""
    monkeypatch.setattr("srpo_kernels._triton._partials._PROGRAMS", 264)
    check_against_reference(layer_norm_modulate, composed, tensors(1, 70, 8, device=device), differentiable=NAMES)


def test_eps(device: str) -> None:
    inputs = tensors(2, 5, 40, device=device)
    inputs["x"] *= 1e-2
    both = (partial(function, eps=1e-3) for function in (layer_norm_modulate, composed))
    check_against_reference(*both, inputs, differentiable=NAMES)


def test_large_mean(device: str) -> None:
    """Variance is not a difference of squares."""
    inputs = tensors(2, 5, 40, device=device)
    inputs["x"] += 1e3
    check_against_reference(layer_norm_modulate, composed, inputs, differentiable=NAMES)


@pytest.mark.parametrize(
    ("dtype", "vector_dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str
)
def test_mixed_dtypes(dtype: torch.dtype, vector_dtype: torch.dtype, device: str) -> None:
    inputs = tensors(2, 9, 65, dtype=dtype, device=device, vector_dtype=vector_dtype)
    for given in (inputs, inputs | {"shift": inputs["shift"].half()}):
        ours = check_against_reference(layer_norm_modulate, composed, given, differentiable=NAMES)
        assert ours["output"].dtype == dtype
        assert all(ours[f"d{name}"].dtype == tensor.dtype for name, tensor in given.items())


def test_gradcheck(device: str) -> None:
    inputs = [tensor.double().requires_grad_() for tensor in tensors(2, 5, 6, device=device).values()]
    assert torch.autograd.gradcheck(layer_norm_modulate, inputs)


# --- layouts ------------------------------------------------------------------------------------


def test_slices_are_not_copied(device: str) -> None:
    """Tokens of a joint sequence and chunks of a modulation."""
    joint = tensors(2, 11, 24, dtype=torch.bfloat16, device=device)["x"]
    modulation = torch.randn(2, 6 * 24, device=device)
    x, (shift, scale, *_) = joint[:, 3:8], modulation.chunk(6, -1)
    given = {"x": x.detach().requires_grad_(), "scale": scale[:, None], "shift": shift}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer_norm_modulate(**given)
    assert [tensor.data_ptr() for tensor in kept[:2]] == [x.data_ptr(), scale.data_ptr()]
    expected = results({"x": x.contiguous(), "scale": scale.contiguous(), "shift": shift.contiguous()})
    assert same(results({"x": x, "scale": scale, "shift": shift}), expected)
    long = results({"x": x, "scale": scale[:, None], "shift": shift[:, None]})
    assert same([tensor.squeeze(1) if tensor.shape[1] == 1 else tensor for tensor in long], expected)


def test_awkward_layouts(device: str) -> None:
    inputs = tensors(3, 6, 12, device=device)
    dense = inputs["x"]
    for x in (
        dense.mT.contiguous().mT,
        dense[..., ::2],
        dense[:, ::2],
        dense[:, :1].expand(3, 6, 12),
        dense[:1].expand(3, 6, 12),
        dense.view(3, 2, 3, 12).transpose(1, 2),
    ):
        vectors = {name: inputs[name][..., : x.shape[-1]] for name in NAMES[1:]}
        assert same(results({"x": x, **vectors}), results({"x": x.contiguous(), **vectors}))
    for name in NAMES[1:]:
        one = inputs[name][:1].expand(3, 12)
        assert same(results(inputs | {name: one}), results(inputs | {name: one.contiguous()}))


def test_awkward_gradients(device: str) -> None:
    inputs = tensors(2, 6, 12, device=device)
    joint = torch.randn(2, 9, 12, device=device)
    column = torch.randn(2, 6, 1, device=device)
    for upstream in (torch.ones((), device=device).expand(2, 6, 12), joint[:, 2:8], column.expand(2, 6, 12)):
        assert same(results(inputs, upstream=upstream), results(inputs, upstream=upstream.contiguous()))


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (2, 3, 0)], ids=str)
def test_nothing_to_normalise(shape: tuple[int, ...], device: str) -> None:
    inputs = tensors(*shape, device=device)
    out, *gradients = results(inputs)
    assert out.shape == shape
    for gradient, tensor in zip(gradients, inputs.values(), strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))


# --- contract -----------------------------------------------------------------------------------


def test_only_wanted_gradients(device: str) -> None:
    inputs = tensors(2, 9, 33, dtype=torch.bfloat16, device=device)
    out, *gradients = results(inputs)
    for wants in product((False, True), repeat=3):
        if any(wants):
            wanted = tuple(name for name, want in zip(NAMES, wants, strict=True) if want)
            expected = [gradient for gradient, want in zip(gradients, wants, strict=True) if want]
            assert same(results(inputs, wanted), [out, *expected])


def test_saved_for_backward(device: str) -> None:
    inputs = tensors(2, 5, 8, dtype=torch.bfloat16, device=device)
    own = {tensor.requires_grad_().untyped_storage().data_ptr() for tensor in inputs.values()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer_norm_modulate(**inputs)
    new = [tensor for tensor in kept if tensor.untyped_storage().data_ptr() not in own]
    assert [(tuple(tensor.shape), tensor.dtype) for tensor in new] == [((2, 2, 5), torch.float32)]
    assert len(kept) == 3


def test_deterministic(device: str) -> None:
    inputs = tensors(2, 20, 300, dtype=torch.bfloat16, device=device)
    assert same(results(inputs), results(inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype, device: str) -> None:
    x, scale, shift = tensors(3, 5, 12, dtype=dtype, device=device).values()
    x = x[:, 1:4]
    out, statistics = module._forward(x, scale, shift, 1e-6)
    torch.library.opcheck(module._forward, (x, scale, shift, 1e-6))
    for wanted in product((False, True), repeat=3):
        torch.library.opcheck(module._backward, (out, x, scale, statistics, list(wanted), torch.float32))


def test_compiles_without_graph_breaks(device: str) -> None:
    compiled = torch.compile(layer_norm_modulate, fullgraph=True, backend="aot_eager")
    for tokens in (4, 7, 9):  # the second becomes a symbol
        check_against_reference(compiled, composed, tensors(2, tokens, 16, device=device), differentiable=NAMES)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 4).int()}, TypeError, f"x must be {FLOATING}, got torch.int32"),
        ({"scale": 1.0}, TypeError, f"scale must be {FLOATING}, got float"),
        ({"shift": torch.zeros(2, 4, device="meta")}, ValueError, "x is on cpu but shift is on meta"),
        ({"x": torch.zeros(4)}, ValueError, "x must be [B, ..., D], got [4]"),
        ({"scale": torch.zeros(3, 4)}, ValueError, "scale must be [2, 4] or [2, 1, 4], got [3, 4]"),
        ({"shift": torch.zeros(2, 3, 4)}, ValueError, "shift must be [2, 4] or [2, 1, 4], got [2, 3, 4]"),
        ({name: torch.zeros(2, 8193) for name in NAMES}, ValueError, "x must be at most 8192 wide, got 8193"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = dict(x=torch.zeros(2, 3, 4), scale=torch.zeros(2, 4), shift=torch.zeros(2, 4))
    with pytest.raises(error, match=f"^layer_norm_modulate: {re.escape(message)}$"):
        layer_norm_modulate(**arguments | change)


# --- compiled for GPUs that are not there -------------------------------------------------------


@pytest.mark.compile_only
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["*bf16", "*fp32"])
@pytest.mark.parametrize("width", [64, 1024, 3072, 8192])
@pytest.mark.parametrize("backward", [False, True])
def test_resources(architecture: int, kind: str, width: int, backward: bool) -> None:
    import triton.language as tl

    from srpo_kernels._triton import layer_norm_modulate as kernels

    if backward:
        kernel = kernels.layer_norm_modulate_backward_kernel
        options = kernels.backward_options(width, 2 if kind == "*bf16" else 4)
    else:
        kernel = kernels.layer_norm_modulate_kernel
        options = dict(zip(("BLOCK", "num_warps"), kernels.row_block(width), strict=True))
    constants = {name: options.pop(name) for name in ("BLOCK", "STAGES") if name in options}
    known = dict.fromkeys(("statistics_ptr", "partials_ptr"), "*fp32") | constants
    known |= dict(eps="fp64", DSCALE=True, DSHIFT=True, ACC=tl.float32)
    arguments = {name: known.get(name, kind if name.endswith("_ptr") else "i32") for name in kernel.arg_names}
    compiled = compile_for(kernel, arguments, architecture=architecture, **options)
    assert compiled.stack == 0
    assert compiled.occupancy >= 0.5
    if width >= 256:
        assert compiled.widest_load() == 16
        assert compiled.widest_store() == 16
        if backward:  # rows to come
            assert set(re.findall(r"cp\.async\.cg\.shared\.global .*?, (\w+), ", compiled.ptx)) == {"0x10"}
