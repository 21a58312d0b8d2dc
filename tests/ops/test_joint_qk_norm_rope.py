"""joint_qk_norm_rope: what it adds to qk_norm_rope, two streams of their own strides and weights, and v."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_qk_norm_rope import DTYPES, resources, rotated
from torch import Tensor

from srpo_kernels._triton import _partials
from srpo_kernels.ops.joint_qk_norm_rope import joint_qk_norm_rope
from srpo_kernels.ops.qk_norm_rope import _backward, _forward, qk_norm_rope
from srpo_kernels.testing import check_against_reference
from srpo_kernels.testing.compile_only import ARCHITECTURES

STREAMS = tuple(f"{stream}_{name}" for stream in ("text", "image") for name in "qkv")
WEIGHTS = tuple(f"{stream}_{name}_weight" for stream in ("text", "image") for name in "qk")
WANTED = STREAMS + WEIGHTS


def tensors(
    batch: int, text: int, image: int, heads: int, width: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(width + text)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    lengths = {"text": text, "image": image}
    made = {name: 2 * drawn(batch, lengths[name[:-2]], heads, width).to(dtype) for name in STREAMS}
    made |= {name: drawn(width).to(dtype) for name in WEIGHTS}
    made |= {name: drawn(text + image, width) for name in ("cos", "sin")}
    return {name: tensor.to(device) for name, tensor in made.items()}


def composed(cos: Tensor, sin: Tensor, **given: Tensor) -> Tensor:
    """The formula in the inputs' dtype: q, k and v stacked."""
    text = given["text_q"].shape[1]

    def joined(name: str) -> Tensor:
        parts = (("text", cos[:text], sin[:text]), ("image", cos[text:], sin[text:]))
        return torch.cat([rotated(given[f"{s}_{name}"], given[f"{s}_{name}_weight"], c, d) for s, c, d in parts], 1)

    return torch.stack([joined("q"), joined("k"), torch.cat([given["text_v"], given["image_v"]], 1)])


def ours(**arguments: Any) -> Tensor:
    return torch.stack(joint_qk_norm_rope(**arguments))


def check(inputs: dict[str, Tensor], function: Callable = ours) -> dict[str, Tensor]:
    return check_against_reference(function, composed, inputs, differentiable=WANTED)


def results(inputs: dict[str, Tensor], upstream: tuple[Tensor, ...]) -> list[Tensor]:
    outs = joint_qk_norm_rope(**inputs)
    gradients = torch.autograd.grad(outs, [inputs[name] for name in WANTED], upstream)
    assert all(tensor.is_contiguous() for tensor in (*outs, *gradients))
    return [*outs, *gradients]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "text", "image", "heads", "width"),
    [(2, 3, 7, 12, 128), (1, 1, 1, 1, 64), (3, 5, 2, 3, 10), (1, 6, 11, 2, 256), (2, 9, 40, 2, 64)],
)
def test_within_budget(
    batch: int, text: int, image: int, heads: int, width: int, dtype: torch.dtype, device: str
) -> None:
    check(tensors(batch, text, image, heads, width, dtype, device))


@pytest.mark.parametrize("wide", [WEIGHTS, WEIGHTS[2:], (*STREAMS, *WEIGHTS[:2]), ("cos", "sin")], ids=len)
def test_mixed_dtypes(wide: tuple[str, ...], device: str) -> None:
    inputs = tensors(2, 3, 5, 3, 32, torch.bfloat16, device)
    inputs |= {name: inputs[name].bfloat16() for name in ("cos", "sin")}
    check(inputs | {name: inputs[name].float() for name in wide})


def test_the_text_decides_the_dtype(device: str) -> None:
    inputs = tensors(1, 3, 5, 2, 8, torch.bfloat16, device)
    expected = joint_qk_norm_rope(**inputs)
    inputs |= {name: inputs[name].float() for name in STREAMS[3:]}
    leaves = [inputs[name].requires_grad_() for name in WANTED]
    outs = joint_qk_norm_rope(**inputs)
    assert all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True))
    gradients = torch.autograd.grad(sum(out.sum() for out in outs), leaves)
    assert [gradient.dtype for gradient in gradients] == [leaf.dtype for leaf in leaves]


@pytest.mark.parametrize(("text", "image"), [(3, 60), (60, 3)])
def test_programs_that_sum_many_tiles(text: int, image: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_partials, "_PROGRAMS", 3)
    check(tensors(2, text, image, 4, 128, torch.bfloat16, device))


def test_gradcheck(device: str) -> None:
    inputs = {name: tensor.double() for name, tensor in tensors(1, 1, 2, 1, 4, device=device).items()}
    leaves = [inputs[name].requires_grad_() for name in WANTED]
    fixed = {name: inputs[name] for name in ("cos", "sin")}
    assert torch.autograd.gradcheck(
        lambda *given: joint_qk_norm_rope(**dict(zip(WANTED, given, strict=True)), **fixed), leaves
    )


@pytest.mark.parametrize("batch", [1, 2])
def test_awkward_layouts(batch: int, device: str) -> None:
    inputs = tensors(batch, 3, 5, 2, 8, torch.bfloat16, device)
    for name in WANTED:
        inputs[name].requires_grad_()
    upstream = tuple(torch.randn(batch, 2, 8, 8, device=device).bfloat16().transpose(1, 2) for _ in "qkv")
    plain = tuple(gradient.contiguous() for gradient in upstream)
    expected = results(inputs, plain)
    fused: dict[str, Tensor] = {}
    for names in (STREAMS[:3], STREAMS[3:]):
        whole = torch.stack([inputs[name].detach() for name in names], 2).requires_grad_()
        fused |= {name: whole[:, :, index] for index, name in enumerate(names)}
    stretched = {name: torch.stack([inputs[name]] * 2, -1)[..., 0] for name in ("text_v", "image_q", *WEIGHTS[1:3])}
    for layout in (fused, stretched, {name: fused[name] for name in ("text_q", "image_v")}):
        for gradients in (upstream, plain, (*plain[:2], upstream[2])):
            assert all(torch.equal(a, b) for a, b in zip(results(inputs | layout, gradients), expected, strict=True))


def test_one_stream_is_qk_norm_rope(device: str) -> None:
    """An empty text or image, and no tokens at all."""
    for text, image in ((0, 5), (5, 0), (0, 0)):
        inputs = tensors(2, text, image, 2, 8, torch.bfloat16, device)
        for name in WANTED:
            inputs[name].requires_grad_()
        outs = joint_qk_norm_rope(**inputs)
        gradients = torch.autograd.grad(sum(out.sum() for out in outs), [inputs[name] for name in WANTED])
        stream = "image" if image else "text"
        q, k, v, q_weight, k_weight = (inputs[f"{stream}_{name}"] for name in ("q", "k", "v", "q_weight", "k_weight"))
        expected = (*qk_norm_rope(q, k, q_weight, k_weight, inputs["cos"], inputs["sin"]), v)
        assert all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True))
        for name, gradient in zip(WANTED, gradients, strict=True):
            assert gradient.shape == inputs[name].shape
            assert gradient.any() == (name.startswith(stream) and text + image > 0)


@pytest.mark.parametrize(
    "subset", [{"text_q"}, {"image_k"}, {"text_v"}, {"image_v", "image_q"}, {"text_k_weight"}, set(STREAMS)], ids=len
)
def test_only_what_is_wanted(subset: set[str], device: str) -> None:
    inputs = tensors(2, 3, 5, 2, 8, device=device)

    def gradients(wanted: set[str]) -> dict[str, Tensor | None]:
        given = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in inputs.items()}
        sum(out.square().sum() for out in joint_qk_norm_rope(**given)).backward()
        return {name: tensor.grad for name, tensor in given.items()}

    everything = gradients(set(WANTED))
    for name, gradient in gradients(subset).items():
        torch.testing.assert_close(gradient, everything[name] if name in subset else None)


@pytest.mark.parametrize("used", [0, 1, 2])
def test_unused_outputs(used: int, device: str) -> None:
    inputs = tensors(2, 3, 5, 2, 8, device=device)
    leaves = [inputs[name].requires_grad_() for name in WANTED]
    outs = joint_qk_norm_rope(**inputs)
    alone = torch.autograd.grad(outs[used].sum(), leaves, retain_graph=True)
    every = torch.autograd.grad(sum(out.sum() * (index == used) for index, out in enumerate(outs)), leaves)
    assert all(torch.equal(a, b) for a, b in zip(alone, every, strict=True))
    for name, gradient in zip(WANTED, alone, strict=True):
        assert gradient.any() == (name.split("_")[1] == "qkv"[used])


def test_only_the_inputs_are_saved_and_no_values(device: str) -> None:
    inputs = tensors(2, 3, 5, 2, 8, device=device)
    for name in WANTED:
        inputs[name].requires_grad_()
    own = {tensor.data_ptr() for name, tensor in inputs.items() if not name.endswith("_v")}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        joint_qk_norm_rope(**inputs)
    assert {tensor.data_ptr() for tensor in saved} == own


def test_deterministic(device: str) -> None:
    inputs = tensors(2, 5, 21, 3, 64, torch.bfloat16, device)
    assert all(torch.equal(a, b) for a, b in zip(check(inputs).values(), check(inputs).values(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype, device: str) -> None:
    given = tensors(2, 3, 4, 2, 8, dtype, device)
    inputs = [given[name] for name in STREAMS if not name.endswith("v")]
    values, weights = [given["text_v"], given["image_v"]], [given[name] for name in WEIGHTS]
    rest = (weights, given["cos"], given["sin"], 1e-6)
    q, k, v = _forward(inputs, values, *rest)
    torch.library.opcheck(_forward, (inputs, values, *rest))
    torch.library.opcheck(_backward, (q, k, v, inputs, *rest, [True] * 4, True))
    torch.library.opcheck(_backward, (q, k, None, inputs, *rest, [False, True, True, False], False))


def test_compiles_without_graph_breaks(device: str) -> None:
    compiled = torch.compile(joint_qk_norm_rope, fullgraph=True, backend="aot_eager")
    check(tensors(2, 3, 5, 2, 8, device=device), lambda **given: torch.stack(compiled(**given)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"image_v": None}, TypeError, "image_v must be a float32, float16 or bfloat16 tensor, got NoneType"),
        ({"text_q": torch.zeros(3, 1, 4)}, ValueError, "text_q must be [B, S, H, D], got [3, 1, 4]"),
        ({"text_v": torch.zeros(2, 5, 1, 4)}, ValueError, "text_v must be [2, 3, 1, 4], got [2, 5, 1, 4]"),
        ({"image_q": torch.zeros(2, 4)}, ValueError, "image_q must be [2, S, 1, 4], got [2, 4]"),
        ({"image_k": torch.zeros(2, 3, 1, 4)}, ValueError, "image_k must be [2, 5, 1, 4], got [2, 3, 1, 4]"),
        ({"image_k_weight": torch.zeros(5)}, ValueError, "image_k_weight must be [4], got [5]"),
        ({"cos": torch.zeros(5, 4)}, ValueError, "cos must be [8, 4], got [5, 4]"),
        ({"sin": torch.zeros(8, 4).requires_grad_()}, ValueError,
         "sin must not require a gradient: there is none for it"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^joint_qk_norm_rope: {re.escape(message)}$"):
        joint_qk_norm_rope(**tensors(2, 3, 5, 1, 4) | change)


@pytest.mark.compile_only
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["*bf16", "*fp32"])
@pytest.mark.parametrize("kernel", ["forward", "backward", "weights"])
def test_resources(architecture: int, kind: str, kernel: str) -> None:
    compiled = resources(architecture, kind, 128, True, kernel)
    assert compiled.stack == 0
    assert compiled.widest_load() == 16
    assert compiled.widest_store() == 16
    assert compiled.occupancy >= 0.5
    assert kernel == "weights" or compiled.shared == 0
