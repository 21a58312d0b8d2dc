"""group_norm_silu: kernels (interpreted or real) and reference against float64, and the operator contract."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import group_norm, silu

import srpo_kernels.ops.group_norm_silu as module
from srpo_kernels.ops.group_norm_silu import group_norm_silu
from srpo_kernels.testing import check_against_reference
from srpo_kernels.testing.compile_only import ARCHITECTURES, compile_for

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMES = ("x", "weight", "bias")
FLOATING = "a float32, float16 or bfloat16 tensor"
LAYOUTS = ("contiguous", "channels last")


@pytest.fixture(autouse=True)
def _small_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs an image, of several tiles, and several blocks of channels."""
    monkeypatch.setattr("srpo_kernels._triton._partials._PROGRAMS", 4)
    monkeypatch.setattr("srpo_kernels._triton.group_norm_silu._TILE", 256)


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def tensors(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    layout: str = "channels last",
    mean: float = 0.5,
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = (mean + 2 * drawn(*shape)).to(device, dtype)
    given = {"x": channels_last(x) if layout == "channels last" else x}
    return given | {name: drawn(shape[1]).to(device, dtype) for name in NAMES[1:]}


def pair(groups: int, eps: float = 1e-6, activation: bool = True) -> tuple[Callable, Callable]:
    """The operator, and its formula in the inputs' dtype."""

    def composed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = group_norm(x, groups, weight, bias, eps)
        return silu(y) if activation else y

    return lambda x, weight, bias: group_norm_silu(x, weight, bias, groups, eps, activation), composed


def results(
    inputs: dict[str, Tensor], groups: int, wanted: tuple[str, ...] = NAMES, upstream: Tensor | None = None
) -> list[Tensor]:
    """Output and gradients of `wanted`."""
    given = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in inputs.items()}
    out = group_norm_silu(**given, num_groups=groups)
    if upstream is None:
        upstream = torch.linspace(-1, 2, out.numel(), device=out.device).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, [given[name] for name in wanted], upstream)]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- accuracy -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_within_budget(layout: str, dtype: torch.dtype, device: str) -> None:
    """Three channels a group, and a last tile, chunk and block of channels that are not full."""
    inputs = tensors(2, 12, 17, 19, dtype=dtype, device=device, layout=layout)
    ours = check_against_reference(*pair(4), inputs, differentiable=NAMES)
    assert all(tensor.dtype == dtype for tensor in ours.values())
    for name in ("output", "dx"):
        assert ours[name].stride() == inputs["x"].stride()


@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((1, 64, 3, 7), 32),
        ((1, 64, 3, 7), 1),
        ((2, 7, 5), 7),
        ((2, 45, 11), 3),
        ((3, 8), 2),
        ((1, 6, 3, 2, 5), 2),
        ((1, 2, 1, 1), 1),
    ],
    ids=str,
)
def test_any_groups(shape: tuple[int, ...], groups: int, device: str) -> None:
    check_against_reference(*pair(groups), tensors(*shape, device=device), differentiable=NAMES)
    if len(shape) > 2:
        inputs = tensors(*shape, device=device, layout="contiguous", dtype=torch.bfloat16)
        check_against_reference(*pair(groups), inputs, differentiable=NAMES)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_activation(layout: str, device: str) -> None:
    inputs = tensors(2, 12, 5, 7, device=device, layout=layout)
    check_against_reference(*pair(4, activation=False), inputs, differentiable=NAMES)


def test_eps(device: str) -> None:
    inputs = tensors(2, 12, 5, device=device)
    inputs["x"] *= 1e-2
    check_against_reference(*pair(4, eps=1e-3), inputs, differentiable=NAMES)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mean", [1e3, 1e4])
def test_large_mean(mean: float, layout: str, device: str) -> None:
    """As accurate as eager; and, whatever that is, means all but the nearest numbers, and deviations right to 1e-4."""
    inputs = tensors(4, 6, 15, 14, device=device, layout=layout, mean=mean)
    check_against_reference(*pair(2), inputs, differentiable=NAMES)
    flat = inputs["x"].flatten(2)
    _, (means, rstd) = module._forward(flat, inputs["weight"], inputs["bias"], 2, 1e-6, True)
    exact = flat.double().unflatten(1, (2, 3)).flatten(2)
    variance, exact_mean = torch.var_mean(exact, -1, correction=0)
    assert ((means - exact_mean).abs() <= 0.65 * torch.finfo(torch.float32).eps * exact_mean.abs()).all()
    assert (rstd * (variance + 1e-6).sqrt() - 1).abs().max() <= 1e-4


def test_channels_apart(device: str) -> None:
    """Means of a group's channels, and of parts of the image, that are far from each other."""
    inputs = tensors(1, 8, 40, device=device)
    inputs["x"] *= torch.linspace(1e-3, 1, 40, device=device)
    inputs["x"] += torch.linspace(-50, 50, 8, device=device)[:, None] + torch.linspace(0, 300, 40, device=device)
    check_against_reference(*pair(2), inputs, differentiable=NAMES)


def test_saturated_activation(device: str) -> None:
    inputs = tensors(1, 8, 40, device=device)
    inputs["bias"] = torch.tensor([-1e4, -200, -90, -80, 80, 90, 200, 1e4], device=device)
    check_against_reference(*pair(4), inputs, differentiable=NAMES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mixed_dtypes(dtype: torch.dtype, device: str) -> None:
    inputs = tensors(2, 6, 9, dtype=dtype, device=device)
    inputs |= {"weight": inputs["weight"].float(), "bias": inputs["bias"].half()}
    ours = check_against_reference(*pair(2), inputs, differentiable=NAMES)
    assert [tensor.dtype for tensor in ours.values()] == [dtype, dtype, torch.float32, torch.float16]


def test_gradcheck(device: str) -> None:
    inputs = [tensor.double().requires_grad_() for tensor in tensors(1, 4, 2, device=device).values()]
    assert torch.autograd.gradcheck(pair(2)[0], inputs)


# --- layouts ------------------------------------------------------------------------------------


def test_layouts_agree(device: str) -> None:
    inputs = tensors(2, 12, 5, 7, device=device)
    out, dx, *vectors = results(inputs, 4)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert dx.is_contiguous(memory_format=torch.channels_last)
    plain, plain_dx, *plain_vectors = results(inputs | {"x": inputs["x"].contiguous()}, 4)
    assert plain.is_contiguous()
    assert plain_dx.is_contiguous()
    for ours, other in zip((out, dx, *vectors), (plain, plain_dx, *plain_vectors), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)


def test_channels_last_is_not_copied(device: str) -> None:
    tokens = torch.randn(2, 9, 6, device=device)
    image = torch.randn(2, 6, 3, 3, device=device).contiguous(memory_format=torch.channels_last)
    for x in (tokens.mT, image, image.contiguous(), tokens.mT[1:], image[:1]):
        inputs = tensors(2, 6, 9, device=device) | {"x": x.detach().requires_grad_()}
        assert kept(inputs, 2)[0].data_ptr() == x.data_ptr()


def test_awkward_layouts(device: str) -> None:
    inputs = tensors(2, 8, 4, 6, device=device)
    last, plain = inputs["x"], inputs["x"].contiguous()
    for x in (last[..., 1:], last[:, ::2], last.mT):
        assert same(results(_for(inputs, x), 2), results(_for(inputs, channels_last(x)), 2))
    for x in (plain[..., ::2], plain[..., :1].expand_as(plain), plain[:1].expand_as(plain)):
        assert same(results(_for(inputs, x), 2), results(_for(inputs, x.contiguous()), 2))
    one = inputs["weight"][:1].expand(8)
    assert same(results(inputs | {"weight": one}, 2), results(inputs | {"weight": one.contiguous()}, 2))


def _for(inputs: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    return {"x": x} | {name: inputs[name][: x.shape[1]] for name in NAMES[1:]}


def test_awkward_gradients(device: str) -> None:
    for layout in LAYOUTS:
        inputs = tensors(2, 6, 4, 5, device=device, layout=layout)
        other = torch.randn(2, 6, 4, 5, device=device)
        for upstream in (torch.ones((), device=device).expand(2, 6, 4, 5), other, channels_last(other), other[..., :1]):
            upstream = upstream.expand(2, 6, 4, 5)
            expected = results(inputs, 2, upstream=upstream.contiguous())
            assert same(results(inputs, 2, upstream=upstream), expected)


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0), (2, 0, 3)], ids=str)
def test_nothing_to_normalise(shape: tuple[int, ...], device: str) -> None:
    inputs = tensors(*shape, device=device)
    out, *gradients = results(inputs, 2)
    assert out.shape == shape
    for gradient, tensor in zip(gradients, inputs.values(), strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))


# --- contract -----------------------------------------------------------------------------------


def test_only_wanted_gradients(device: str) -> None:
    inputs = tensors(2, 12, 9, dtype=torch.bfloat16, device=device)
    out, *gradients = results(inputs, 4)
    for wants in product((False, True), repeat=3):
        if any(wants):
            wanted = tuple(name for name, want in zip(NAMES, wants, strict=True) if want)
            expected = [gradient for gradient, want in zip(gradients, wants, strict=True) if want]
            assert same(results(inputs, 4, wanted), [out, *expected])


def kept(inputs: dict[str, Tensor], groups: int) -> list[Tensor]:
    """What is saved for backward."""
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        group_norm_silu(**inputs, num_groups=groups)
    return saved


def test_saved_for_backward(device: str) -> None:
    """With frozen weights: the caller's own tensors, and two numbers a group."""
    inputs = tensors(2, 6, 3, 3, dtype=torch.bfloat16, device=device)
    assert kept(inputs, 3) == []
    inputs["x"].requires_grad_()
    own = {tensor.untyped_storage().data_ptr() for tensor in inputs.values()}
    saved = kept(inputs, 3)
    new = [tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in own]
    assert [(tuple(tensor.shape), tensor.dtype) for tensor in new] == [((2, 2, 3), torch.float32)]
    assert len(saved) == 4


def test_deterministic(device: str) -> None:
    inputs = tensors(2, 24, 150, dtype=torch.bfloat16, device=device)
    assert same(results(inputs, 4), results(inputs, 4))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout: str, device: str) -> None:
    x, weight, bias = tensors(2, 6, 5, dtype=torch.bfloat16, device=device, layout=layout).values()
    out, statistics = module._forward(x, weight, bias, 3, 1e-6, True)
    torch.library.opcheck(module._forward, (x, weight, bias, 3, 1e-6, True))
    for wanted in ([True, False, False], [False, True, False], [True, True, True]):
        arguments = (out, x, weight, bias, statistics, True, wanted, torch.float32)
        torch.library.opcheck(module._backward, arguments)


def test_compiles_without_graph_breaks(device: str) -> None:
    ours, composed = pair(2)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for height, layout in ((4, LAYOUTS[0]), (4, LAYOUTS[1]), (5, LAYOUTS[1])):
        inputs = tensors(2, 4, height, 3, device=device, layout=layout)
        out = check_against_reference(compiled, composed, inputs, differentiable=NAMES)["output"]
        assert out.stride() == inputs["x"].stride()


_ZEROS = torch.zeros(2, 4, 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": _ZEROS.int()}, TypeError, f"x must be {FLOATING}, got torch.int32"),
        ({"weight": None}, TypeError, f"weight must be {FLOATING}, got NoneType"),
        ({"bias": torch.zeros(4, device="meta")}, ValueError, "x is on cpu but bias is on meta"),
        ({"x": _ZEROS[0, 0]}, ValueError, "x must be [B, C, ...], got [3]"),
        ({"weight": torch.zeros(3)}, ValueError, "weight must be [4], got [3]"),
        ({"bias": torch.zeros(1, 4)}, ValueError, "bias must be [4], got [1, 4]"),
        ({"num_groups": 3}, ValueError, "num_groups must divide 4 channels, got 3"),
        ({"num_groups": 0}, ValueError, "num_groups must divide 4 channels, got 0"),
        (
            {"x": torch.zeros(1).expand(1, 4, 2**15, 2**15)},
            ValueError,
            "x must have fewer than 2**30 pixels an image, got 1073741824",
        ),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = dict(x=_ZEROS, weight=torch.zeros(4), bias=torch.zeros(4), num_groups=2)
    with pytest.raises(error, match=f"^group_norm_silu: {re.escape(message)}$"):
        group_norm_silu(**arguments | change)


# --- compiled for GPUs that are not there -------------------------------------------------------

DECODER = [(512, 90**2), (512, 180**2), (256, 360**2), (256, 720**2), (128, 720**2), (128, 1024**2)]
PASSES = (
    "group_norm_partials_kernel",
    "group_norm_silu_kernel",
    "group_norm_silu_sums_kernel",
    "group_norm_silu_backward_kernel",
)
SMALL = ("group_norm_statistics_kernel", "group_norm_slopes_kernel")


def arguments(kernel: Any, kind: str, constants: dict[str, Any]) -> dict[str, Any]:
    import triton.language as tl

    known = dict.fromkeys(("statistics_ptr", "partials_ptr", "slopes_ptr"), "*fp32") | constants
    known |= dict(eps="fp64", ACTIVATION=True, ACC=tl.float32)
    return {name: known.get(name, kind if name.endswith("_ptr") else "i32") for name in kernel.arg_names}


@pytest.mark.compile_only
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["*bf16", "*fp32"])
@pytest.mark.parametrize(
    ("channels", "pixels", "layout"), [*((*each, "channels last") for each in DECODER[::2]), (*DECODER[-1], "plain")]
)
@pytest.mark.parametrize("name", PASSES)
def test_resources(
    architecture: int, kind: str, channels: int, pixels: int, layout: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from srpo_kernels._triton import group_norm_silu as kernels

    monkeypatch.undo()  # real tiles
    last = layout == "channels last"
    *_, options = kernels.plan(1, channels, pixels, last, 2 if kind == "*bf16" else 4)
    constants = {name: options.pop(name) for name in ("PIXELS", "WIDTH", "STAGES")}
    constants["channel_stride" if last else "pixel_stride"] = 1
    kernel = getattr(kernels, name)
    compiled = compile_for(kernel, arguments(kernel, kind, constants), architecture=architecture, **options)
    assert compiled.stack == 0
    assert compiled.occupancy >= 0.5
    # x, and the gradient, come by way of shared memory, 16 bytes a thread
    assert set(re.findall(r"cp\.async\.\w+\.shared\.global .*?, (\w+), ", compiled.ptx)) == {"0x10"}
    if "partials_ptr" not in kernel.arg_names:
        assert compiled.widest_store() == 16


@pytest.mark.compile_only
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", SMALL)
def test_resources_of_sums_by_group(architecture: int, name: str) -> None:
    from srpo_kernels._triton import group_norm_silu as kernels

    kernel = getattr(kernels, name)
    given = arguments(kernel, "*bf16", {"BLOCK": 2048})
    compiled = compile_for(kernel, given, architecture=architecture, num_warps=16)
    assert compiled.stack == 0
    assert compiled.occupancy >= 0.5


@pytest.mark.parametrize(("channels", "pixels"), DECODER)
@pytest.mark.parametrize("last", [True, False])
def test_programs_cover_every_pixel(channels: int, pixels: int, last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And are as many as two blocks of 512 threads for every multiprocessor; partial sums stay a fraction of x."""
    from srpo_kernels._triton import group_norm_silu as kernels

    monkeypatch.undo()
    for images in (1, 2, 64):
        rows, chunks, options = kernels.plan(images, channels, pixels, last, 2)
        assert rows % options["PIXELS"] == 0
        assert (chunks - 1) * rows < pixels <= chunks * rows
        assert channels % options["WIDTH"] == 0
        threads = images * chunks * channels // options["WIDTH"] * options["num_warps"] * 32
        if last and images < 64:
            assert 0.8 * 264 * 512 <= threads <= 264 * 512
        assert chunks * 16 <= pixels


@pytest.mark.compile_only
@pytest.mark.parametrize("name", PASSES + SMALL)
def test_offsets_have_64_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is multiplied by a size or a stride in 32 bits: images, and all of x, may exceed 2**31 elements."""
    import triton

    from srpo_kernels._triton import group_norm_silu as kernels

    made: list[Any] = []
    compile_ = triton.compile
    monkeypatch.setattr(triton, "compile", lambda *args, **options: made.append(compile_(*args, **options)) or made[-1])
    kernel = getattr(kernels, name)
    constants = dict(PIXELS=8, WIDTH=128, STAGES=3, BLOCK=1024)
    given = {name: value for name, value in arguments(kernel, "*bf16", constants).items() if name in kernel.arg_names}
    compile_for(kernel, given)
    text = made[0].asm["ttir"]
    sizes = {"%images", "%channels", "%pixels", "%groups", "%pixel_stride", "%channel_stride"}
    sizes |= {copy for copy, value in re.findall(r"(%\w+) = tt\.splat (%\w+)", text) if value in sizes}
    narrow = re.findall(r"arith\.muli (%\w+), (%\w+) : (?:tensor<[^>]*x)?i32>? ", text)
    assert "arith.muli" in text
    assert not [pair for pair in narrow if sizes & set(pair)]
