"""qk_norm_rope: kernels (interpreted or real) and reference against float64, and the operator contract."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from srpo_kernels._triton import _partials
from srpo_kernels.ops.qk_norm_rope import _backward, _forward, qk_norm_rope
from srpo_kernels.testing import check_against_reference
from srpo_kernels.testing.compile_only import ARCHITECTURES, Compiled, compile_for

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLOATING = "a float32, float16 or bfloat16 tensor"
NO_GRADIENT = "must not require a gradient: there is none for it"
WANTED = ("q", "k", "q_weight", "k_weight")


def tensors(
    batch: int, length: int, heads: int, width: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> dict[str, Tensor]:
    """Arguments. The angles are no pairs of equal ones, and no cosines and sines."""
    generator = torch.Generator().manual_seed(width + length)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    made = {name: 2 * drawn(batch, length, heads, width).to(dtype) for name in ("q", "k")}
    made |= {name: drawn(width).to(dtype) for name in ("q_weight", "k_weight")}
    made |= {name: drawn(length, width) for name in ("cos", "sin")}
    return {name: tensor.to(device) for name, tensor in made.items()}


def rotated(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float = 1e-6) -> Tensor:
    """The formula in the inputs' dtype."""
    y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    cos, sin = cos[:, None], sin[:, None]
    even = y[..., ::2] * cos[..., ::2] - y[..., 1::2] * sin[..., ::2]
    odd = y[..., 1::2] * cos[..., 1::2] + y[..., ::2] * sin[..., 1::2]
    return torch.stack([even, odd], -1).flatten(-2)


def composed(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float = 1e-6
) -> Tensor:
    return torch.stack([rotated(q, q_weight, cos, sin, eps), rotated(k, k_weight, cos, sin, eps)])


def ours(**arguments: Any) -> Tensor:
    return torch.stack(qk_norm_rope(**arguments))


def check(inputs: dict[str, Tensor], function: Callable = ours) -> dict[str, Tensor]:
    return check_against_reference(function, composed, inputs, differentiable=WANTED)


# --- accuracy -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "length", "heads", "width"),
    [(2, 7, 24, 128), (1, 1, 1, 64), (3, 5, 3, 32), (1, 3, 2, 256), (2, 9, 5, 6), (2, 9, 1, 96), (1, 3, 2, 2)],
)
def test_within_budget(batch: int, length: int, heads: int, width: int, dtype: torch.dtype, device: str) -> None:
    check(tensors(batch, length, heads, width, dtype, device))


@pytest.mark.parametrize("wide", ["weights", "angles", "all but angles"])
def test_mixed_dtypes(wide: str, device: str) -> None:
    inputs = tensors(2, 5, 3, 64, torch.bfloat16, device)
    if wide != "angles":
        inputs |= {name: inputs[name].float() for name in ("q_weight", "k_weight")}
    if wide == "all but angles":
        inputs |= {name: inputs[name].float() for name in "qk"}
    if wide != "weights":
        inputs |= {name: inputs[name].bfloat16() for name in ("cos", "sin")}
    check(inputs)


def test_q_and_k_keep_their_dtypes(device: str) -> None:
    inputs = tensors(1, 3, 2, 8, torch.bfloat16, device)
    expected = qk_norm_rope(**inputs)
    inputs |= {"k": inputs["k"].float(), "q_weight": inputs["q_weight"].float()}
    leaves = [inputs[name].requires_grad_() for name in WANTED]
    q, k = qk_norm_rope(**inputs)
    assert torch.equal(q, expected[0])
    assert k.dtype == torch.float32
    gradients = torch.autograd.grad(q.float().sum() + k.sum(), leaves)
    assert [gradient.dtype for gradient in gradients] == [leaf.dtype for leaf in leaves]


def test_programs_that_sum_many_tiles(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_partials, "_PROGRAMS", 3)
    check(tensors(2, 40, 4, 128, torch.bfloat16, device))


def test_eps(device: str) -> None:
    inputs = tensors(1, 3, 2, 8, device=device)
    inputs["q"] *= 1e-2
    inputs["k"][:, 0] = 0  # a row of zeros: its gradient is that of eps alone
    check_against_reference(
        lambda **given: ours(**given, eps=1e-4),
        lambda **given: composed(**given, eps=1e-4),
        inputs,
        differentiable=WANTED,
    )


def test_diffusers_agrees(device: str) -> None:
    from diffusers.models.embeddings import apply_rotary_emb

    inputs = tensors(2, 5, 3, 16, device=device)
    angles = inputs["cos"], inputs["sin"]
    for name, out in zip("qk", qk_norm_rope(**inputs), strict=True):
        normal = torch.nn.functional.rms_norm(inputs[name], (16,), inputs[f"{name}_weight"], 1e-6)
        torch.testing.assert_close(out, apply_rotary_emb(normal, angles, sequence_dim=1))


def test_gradcheck(device: str) -> None:
    inputs = {name: tensor.double() for name, tensor in tensors(2, 2, 2, 4, device=device).items()}
    leaves = [inputs[name].requires_grad_() for name in WANTED]
    assert torch.autograd.gradcheck(lambda *given: qk_norm_rope(*given, inputs["cos"], inputs["sin"]), leaves)


# --- layouts ------------------------------------------------------------------------------------


def results(inputs: dict[str, Tensor], upstream: tuple[Tensor, ...]) -> list[Tensor]:
    outs = qk_norm_rope(**inputs)
    assert all(out.is_contiguous() for out in outs)
    return [*outs, *torch.autograd.grad(outs, [inputs[name] for name in WANTED], upstream)]


def test_awkward_layouts(device: str) -> None:
    inputs = tensors(2, 5, 3, 8, torch.bfloat16, device)
    for name in WANTED:
        inputs[name].requires_grad_()
    fused = torch.stack([inputs["q"], inputs["k"], inputs["k"]], 2).detach().requires_grad_()
    transposed = {name: inputs[name].detach().transpose(1, 2).contiguous().transpose(1, 2) for name in "qk"}
    layouts: list[dict[str, Tensor]] = [
        {"q": fused[:, :, 0], "k": fused[:, :, 1]},  # shared strides
        {"q": transposed["q"]},  # strides of their own
        transposed,
        {name: torch.stack([inputs[name]] * 2, -1)[..., 0] for name in inputs if name not in ("cos", "sin")},
        {name: torch.stack([inputs[name]] * 2, -1)[..., 0] for name in ("cos", "sin")},
    ]
    upstream = tuple(torch.randn(2, 3, 5, 8, device=device).bfloat16() for _ in "qk")
    plain = tuple(gradient.transpose(1, 2).contiguous() for gradient in upstream)
    expected = results(inputs, plain)
    odd = tuple(gradient.transpose(1, 2) for gradient in upstream)
    assert all(torch.equal(a, b) for a, b in zip(results(inputs, odd), expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(results(inputs, (odd[0], plain[1])), expected, strict=True))
    for layout in layouts:
        for tensor in layout.values():
            if tensor.is_leaf and tensor is not fused:
                tensor.requires_grad_(tensor.shape != inputs["cos"].shape)
        assert all(torch.equal(a, b) for a, b in zip(results(inputs | layout, plain), expected, strict=True))


def test_expanded(device: str) -> None:
    inputs = tensors(3, 4, 2, 8, device=device)
    inputs |= {name: inputs[name][:1].expand(3, 4, 2, 8) for name in "qk"}
    same = {name: tensor.contiguous() for name, tensor in inputs.items()}
    gradients = []
    for given in (inputs, same):
        leaves = [given[name].detach().requires_grad_() for name in WANTED]
        outs = qk_norm_rope(*leaves, given["cos"], given["sin"])
        upstream = torch.ones((), device=device)  # expanded
        gradients.append(torch.autograd.grad(sum(out.sum() for out in outs), leaves, upstream))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("shape", [(0, 3, 2, 8), (2, 0, 2, 8), (2, 3, 0, 8)])
def test_nothing_to_do(shape: tuple[int, int, int, int], device: str) -> None:
    inputs = tensors(*shape, device=device)
    leaves = [inputs[name].requires_grad_() for name in WANTED]
    outs = qk_norm_rope(**inputs)
    assert all(out.shape == shape for out in outs)
    for leaf, gradient in zip(leaves, torch.autograd.grad(sum(out.sum() for out in outs), leaves), strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


# --- contract -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "subset",
    [{"q"}, {"k"}, {"q", "k"}, {"q_weight"}, {"k_weight"}, {"k", "q_weight"}],
    ids=lambda names: "+".join(sorted(names)),
)
def test_only_what_is_wanted(subset: set[str], device: str) -> None:
    inputs = tensors(2, 5, 3, 8, device=device)

    def gradients(wanted: set[str]) -> dict[str, Tensor | None]:
        given = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in inputs.items()}
        sum(out.square().sum() for out in qk_norm_rope(**given)).backward()
        return {name: tensor.grad for name, tensor in given.items()}

    everything = gradients(set(WANTED))
    for name, gradient in gradients(subset).items():
        torch.testing.assert_close(gradient, everything[name] if name in subset else None)


def test_an_unused_output(device: str) -> None:
    inputs = tensors(2, 5, 3, 8, device=device)
    leaves = [inputs[name].requires_grad_() for name in WANTED]
    q, k = qk_norm_rope(**inputs)
    alone = torch.autograd.grad(k.sum(), leaves, retain_graph=True)
    both = torch.autograd.grad(k.sum() + 0 * q.sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(alone, both, strict=True))
    assert not alone[0].any()


def test_only_the_inputs_are_saved(device: str) -> None:
    inputs = tensors(2, 5, 3, 8, device=device)
    fused = torch.randn(2, 5, 3, 3, 8, device=device, requires_grad=True)
    inputs |= {"q": fused[:, :, 0], "k": fused[:, :, 1]}
    own = {tensor.untyped_storage().data_ptr() for tensor in inputs.values()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        qk_norm_rope(**inputs)
    assert len(saved) == 6
    assert all(tensor.untyped_storage().data_ptr() in own for tensor in saved)


def test_deterministic(device: str) -> None:
    inputs = tensors(2, 33, 3, 64, torch.bfloat16, device)
    assert all(torch.equal(a, b) for a, b in zip(check(inputs).values(), check(inputs).values(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weights_wanted", [False, True])
def test_opcheck(dtype: torch.dtype, weights_wanted: bool, device: str) -> None:
    q, k, *weights, cos, sin = tensors(2, 3, 2, 8, dtype, device).values()
    torch.library.opcheck(_forward, ([q, k], [], weights, cos, sin, 1e-6))
    upstream = torch.randn_like(q), torch.randn_like(k)
    for wanted in ([True, True], [False, True]):
        torch.library.opcheck(_backward, (*upstream, None, [q, k], weights, cos, sin, 1e-6, wanted, weights_wanted))


def test_compiles_without_graph_breaks(device: str) -> None:
    compiled = torch.compile(qk_norm_rope, fullgraph=True, backend="aot_eager")
    check(tensors(2, 5, 3, 8, device=device), lambda **given: torch.stack(compiled(**given)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": [1.0]}, TypeError, f"k must be {FLOATING}, got list"),
        ({"cos": torch.zeros(3, 4).int()}, TypeError, f"cos must be {FLOATING}, got torch.int32"),
        ({"sin": torch.zeros(3, 4, device="meta")}, ValueError, "q is on cpu but sin is on meta"),
        ({"q": torch.zeros(3, 1, 4)}, ValueError, "q must be [B, S, H, D], got [3, 1, 4]"),
        ({"q": torch.zeros(2, 3, 1, 5)}, ValueError, "q must have heads of an even width from 2 to 256, got 5"),
        ({"q": torch.zeros(2, 3, 1, 258)}, ValueError, "q must have heads of an even width from 2 to 256, got 258"),
        ({"k": torch.zeros(2, 3, 2, 4)}, ValueError, "k must be [2, 3, 1, 4], got [2, 3, 2, 4]"),
        ({"q_weight": torch.zeros(1, 4)}, ValueError, "q_weight must be [4], got [1, 4]"),
        ({"k_weight": torch.zeros(5)}, ValueError, "k_weight must be [4], got [5]"),
        ({"cos": torch.zeros(3, 2)}, ValueError, "cos must be [3, 4], got [3, 2]"),
        ({"sin": torch.zeros(1, 3, 4)}, ValueError, "sin must be [3, 4], got [1, 3, 4]"),
        ({"cos": torch.zeros(3, 4, requires_grad=True)}, ValueError, f"cos {NO_GRADIENT}"),
        ({"sin": torch.zeros(3, 4, requires_grad=True)}, ValueError, f"sin {NO_GRADIENT}"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^qk_norm_rope: {re.escape(message)}$"):
        qk_norm_rope(**tensors(2, 3, 1, 4) | change)


def test_too_many_rows() -> None:
    x = torch.zeros(1, 1, 1, 2).expand(2**15, 2**15, 1, 2)
    angle, weight = torch.zeros(1, 2).expand(2**15, 2), torch.zeros(2)
    with pytest.raises(
        ValueError, match=r"^qk_norm_rope: q must have fewer than 2\*\*30 heads in all tokens, got 1073741824$"
    ):
        qk_norm_rope(x, x, weight, weight, angle, angle)


# --- compiled for GPUs that are not there -------------------------------------------------------


def resources(architecture: int, kind: str, width: int, text: bool, kernel: str) -> Compiled:
    """`kernel` is "forward", "backward" or "weights", which is backward with the gradients of the weights."""
    import triton.language as tl

    from srpo_kernels._triton import qk_norm_rope as kernels

    function = kernels.qk_norm_rope_kernel if kernel == "forward" else kernels.qk_norm_rope_backward_kernel
    like = torch.empty(width, dtype=torch.float32 if kind == "*fp32" else torch.bfloat16)
    tile = kernels._tile(like, warps=16 if kernel == "weights" else 4)
    options = dict(num_warps=tile.pop("num_warps"), maxnreg=64 if kernel == "weights" else None)
    known: dict[str, Any] = dict(minus="fp64", eps="fp64", HEADS=24, WIDTH=width, ACC=tl.float32, **tile)
    known |= dict(cos_ptr="*fp32", sin_ptr="*fp32", partials_ptr="*fp32" if kernel == "weights" else None)
    for name in function.arg_names:
        if not text and name.endswith("_ptr") and (name.startswith("text") or name.endswith("v_ptr")):
            known[name] = None
        elif name not in known:
            known[name] = kind if name.endswith("_ptr") else "i32"
    arguments = {name: known[name] for name in function.arg_names}
    return compile_for(function, arguments, architecture=architecture, **options)


@pytest.mark.compile_only
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["*bf16", "*fp32"])
@pytest.mark.parametrize("width", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("kernel", ["forward", "backward", "weights"])
def test_resources(architecture: int, kind: str, width: int, kernel: str) -> None:
    compiled = resources(architecture, kind, width, False, kernel)
    assert compiled.stack == 0
    assert compiled.widest_load() == 16
    assert compiled.widest_store() == 16
    assert compiled.occupancy >= 0.5
    if kernel != "weights" and (kind, width) != ("*fp32", 256):  # two warps a row
        assert compiled.shared == 0  # the rotation and a row's sum stay in a warp
