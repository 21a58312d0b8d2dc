"""resize_normalize: kernel (interpreted or real) and reference against torchvision, and the operator contract."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as vision

from srpo_kernels.ops._register import interpreting
from srpo_kernels.ops.resize_normalize import _backward, _forward, resize_normalize
from srpo_kernels.testing import assert_within_budget, check_against_reference
from srpo_kernels.testing.compile_only import ARCHITECTURES, compile_for

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
NORMALIZE = dict(mean=MEAN, std=STD)

# Height, width, size: down and up, odd, cropped on either edge, identical, one row, one pixel.
SIZES = [(20, 33, 8), (41, 24, 16), (9, 7, 24), (12, 12, 12), (40, 40, 1), (5, 2, 3), (1, 1, 2)]
LARGE = [(720, 720), (512, 512), (1024, 1024), (640, 427), (333, 500)]


def images(
    height: int, width: int, dtype: torch.dtype, device: str, *, channels_last: bool = False, batch: int = 2
) -> Tensor:
    """Mostly within [-1, 1], a tenth saturated, some exactly on the bounds."""
    generator = torch.Generator().manual_seed(height * 1000 + width)
    made = torch.rand(batch, 3, height, width, generator=generator) * 2.2 - 1.1
    made.view(-1)[::7] = made.view(-1)[::7].sign()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return made.to(device, dtype).contiguous(memory_format=layout)


def chain(
    image: Tensor, size: int, value_range: tuple[float, float] = (-1.0, 1.0), antialias: bool = True, hard: bool = True
) -> Tensor:
    """torchvision's float transforms. The clamp is spelled out, since torch 2.15 changed its gradient on the bounds."""
    low, high = value_range
    clamped = image.clamp(low, high).detach()
    inside = (image >= low) & (image <= high)
    clamped = torch.where(inside, image, clamped) if hard else image + (clamped - image).detach()
    unit = (clamped - low) / (high - low)
    resized = vision.resize(unit, [size], interpolation=InterpolationMode.BICUBIC, antialias=antialias)
    return vision.normalize(vision.center_crop(resized, [size, size]), list(MEAN), list(STD))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(("height", "width", "size"), SIZES, ids=str)
def test_within_budget(
    height: int, width: int, size: int, antialias: bool, channels_last: bool, dtype: torch.dtype, device: str
) -> None:
    image = images(height, width, dtype, device, channels_last=channels_last)
    fused = partial(resize_normalize, size=size, antialias=antialias, **NORMALIZE)
    plain = partial(chain, size=size, antialias=antialias)
    results = check_against_reference(fused, plain, {"image": image}, differentiable=("image",))
    assert results["output"].shape == (2, 3, size, size)
    if size > 1 and width > 1:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        assert results["output"].is_contiguous(memory_format=layout)
        assert results["dimage"].is_contiguous(memory_format=layout)


@pytest.mark.skipif(interpreting(), reason="the interpreter takes minutes for these")
@pytest.mark.parametrize("size", [224, 384])
@pytest.mark.parametrize(("height", "width"), LARGE, ids=str)
def test_equals_torchvision(height: int, width: int, size: int, device: str) -> None:
    image = images(height, width, torch.float32, device, batch=1, channels_last=size == 384)
    fused = partial(resize_normalize, size=size, **NORMALIZE)
    results = check_against_reference(fused, partial(chain, size=size), {"image": image}, differentiable=("image",))
    torch.testing.assert_close(results["output"], chain(image, size), rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("value_range", [(0.0, 1.0), (0.0, 255.0), (0.1, 0.9)], ids=str)
def test_value_range(value_range: tuple[float, float], device: str) -> None:
    low, high = value_range
    image = images(20, 26, torch.float32, device) * (high - low) / 2 + (high + low) / 2
    fused = partial(resize_normalize, size=8, value_range=value_range, **NORMALIZE)
    plain = partial(chain, size=8, value_range=value_range)
    check_against_reference(fused, plain, {"image": image}, differentiable=("image",))


@pytest.mark.parametrize("channels_last", [False, True])
def test_clamp_gradient(channels_last: bool, device: str) -> None:
    image = images(20, 26, torch.float32, device, channels_last=channels_last)
    image[0, 0, 0, :4] = torch.tensor([-1.0, 1.0, -1.5, 1.5])
    gradients = {}
    for mode in ("hard", "straight_through"):
        fused = partial(resize_normalize, size=16, clamp_gradient=mode, **NORMALIZE)
        plain = partial(chain, size=16, hard=mode == "hard")
        results = check_against_reference(fused, plain, {"image": image}, differentiable=("image",))
        gradients[mode] = results["dimage"]
    outside = image.abs() > 1
    assert outside.any()
    assert not gradients["hard"][outside].any()
    assert torch.equal(gradients["hard"][~outside], gradients["straight_through"][~outside])
    assert gradients["straight_through"][outside].any()


@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("channels_last", [False, True])
def test_channels(channels: int, channels_last: bool, device: str) -> None:
    image = torch.rand(1, channels, 20, 26, device=device)
    image = image.contiguous(memory_format=torch.channels_last) if channels_last else image
    mean, std = [0.1 * index for index in range(channels)], [1.0 + index for index in range(channels)]
    out = resize_normalize(image, 8, mean, std)
    alone = [resize_normalize(image[:, [index]], 8, [mean[index]], [std[index]]) for index in range(channels)]
    torch.testing.assert_close(out, torch.cat(alone, 1), rtol=1e-6, atol=1e-6)


def test_awkward_layouts(device: str) -> None:
    whole = images(40, 44, torch.float32, device)
    for wide in (whole, whole.contiguous(memory_format=torch.channels_last)):
        part = wide[:, :, 3:35:2, 4:40]
        expected = resize_normalize(part.contiguous(), 8, **NORMALIZE)
        torch.testing.assert_close(resize_normalize(part, 8, **NORMALIZE), expected, rtol=1e-6, atol=1e-6)
    expanded = whole[:1].expand(3, -1, -1, -1)
    assert torch.equal(resize_normalize(expanded, 8, **NORMALIZE), resize_normalize(expanded.clone(), 8, **NORMALIZE))
    image = whole[:, :, ::2].clone().requires_grad_()
    resize_normalize(image, 8, **NORMALIZE).sum().backward()  # an expanded gradient
    exact = torch.autograd.grad(chain(image.double(), 8).sum(), image)[0]
    fp32 = torch.autograd.grad(chain(image, 8).sum(), image)[0]
    assert_within_budget(image.grad, exact, fp32, name="dimage")
    empty = whole[:0].requires_grad_()
    out = resize_normalize(empty, 8, **NORMALIZE)
    out.sum().backward()
    assert out.shape == (0, 3, 8, 8)
    assert empty.grad.shape == empty.shape


@pytest.mark.parametrize("mode", ["hard", "straight_through"])
def test_keeps_nothing_but_the_image(mode: str, device: str) -> None:
    image = images(24, 20, torch.float32, device)[:, :, ::2].requires_grad_()  # no copy of a strided one either
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        resize_normalize(image, 8, clamp_gradient=mode, **NORMALIZE)
    assert [tensor.data_ptr() for tensor in kept] == ([image.data_ptr()] if mode == "hard" else [])


def test_deterministic(device: str) -> None:
    inputs = {"image": images(41, 24, torch.bfloat16, device)}
    fused, plain = partial(resize_normalize, size=16, **NORMALIZE), partial(chain, size=16)
    run = partial(check_against_reference, fused, plain, inputs, differentiable=("image",))
    assert all(torch.equal(a, b) for a, b in zip(run().values(), run().values(), strict=True))


def test_coefficients_are_computed_once_and_are_torchs(device: str) -> None:
    from srpo_kernels._triton.resize_normalize import axis

    key: tuple[Any, ...] = (50, 20, 3, 14, True)
    matrix, blocks = axis(*key, 1, False, True, torch.float32, torch.device(device))
    assert axis(*key, 1, False, True, torch.float32, torch.device(device))[0] is matrix
    assert blocks.tolist() == [[0, 1]]
    # Two columns: torch 2.15 resizes a single one wrongly on the CPU (antialiased, the width unchanged).
    columns = torch.rand(50, 2, dtype=torch.float64)
    resized = torch.nn.functional.interpolate(columns[None, None], (20, 2), mode="bicubic", antialias=True)[0, 0]
    torch.testing.assert_close(matrix.cpu().double()[:14, :50] @ columns, resized[3:17], rtol=1e-6, atol=1e-6)
    assert not matrix[14:].any()
    assert not matrix[:, 50:].any()


@pytest.mark.parametrize("antialias", [False, True])
def test_steps_cover_every_coefficient(antialias: bool) -> None:
    from srpo_kernels._triton.resize_normalize import BACKWARD, FORWARD, axis

    for length, resized, start, size, backward in (
        (720, 224, 0, 224, False),
        (500, 336, 56, 224, True),
        (90, 135, 7, 90, True),
    ):
        config = BACKWARD if backward else FORWARD
        key: tuple[Any, ...] = (length, resized, start, size, antialias, 3, backward, False)
        matrix, blocks = axis(*key, torch.float32, torch.device("cpu"))
        covered = torch.zeros_like(matrix)
        for tile, (first, end) in enumerate(blocks.tolist()):
            covered[first * config.step_x : end * config.step_x, tile * config.tile_x : (tile + 1) * config.tile_x] = 1
        assert torch.equal(matrix * covered, matrix)
        assert covered.mean() < 0.5  # and little else


@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(channels_last: bool, device: str) -> None:
    image = images(12, 17, torch.float32, device, channels_last=channels_last)
    window = (8, [8, 11], [0, 2])
    rest = (list(STD), [-1.0, 1.0], True, channels_last)
    torch.library.opcheck(_forward, (image, *window, list(MEAN), *rest))
    gradient = torch.randn(2, 3, 8, 8, device=device)
    for clamped in (image, None):
        torch.library.opcheck(_backward, (gradient, clamped, list(image.shape), *window, *rest))


@pytest.mark.parametrize("mode", ["hard", "straight_through"])
def test_compiles_without_graph_breaks(mode: str, device: str) -> None:
    compiled = torch.compile(resize_normalize, fullgraph=True, backend="aot_eager")
    for height, width in ((12, 17), (19, 14)):  # the second has symbolic sizes
        inputs = {"image": images(height, width, torch.float32, device)}
        fused = partial(compiled, size=8, clamp_gradient=mode, **NORMALIZE)
        plain = partial(chain, size=8, hard=mode == "hard")
        check_against_reference(fused, plain, inputs, differentiable=("image",))


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(("height", "width", "size"), [(7, 5, 3), (3, 4, 5)], ids=str)
def test_gradcheck(height: int, width: int, size: int, antialias: bool, device: str) -> None:
    # Away from the bounds, where the clamp has no derivative.
    image = torch.rand(1, 3, height, width, dtype=torch.float64, device=device) * 1.8 - 0.9
    fused = partial(resize_normalize, size=size, antialias=antialias, **NORMALIZE)
    # One random direction in the interpreter, where a launch takes a tenth of a second.
    assert torch.autograd.gradcheck(fused, [image.requires_grad_()], fast_mode=interpreting())


IMAGE = torch.zeros(1, 3, 4, 4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"image": IMAGE.int()}, TypeError, "image must be a float32, float16 or bfloat16 tensor, got torch.int32"),
        ({"image": IMAGE[0]}, ValueError, "image must be [B, C, H, W] with C, H, W >= 1, got [3, 4, 4]"),
        ({"image": IMAGE[..., :0]}, ValueError, "image must be [B, C, H, W] with C, H, W >= 1, got [1, 3, 4, 0]"),
        ({"size": 0}, ValueError, "size must be at least 1, got 0"),
        ({"mean": (0.5,)}, ValueError, "mean must hold 3 numbers (channels), got 1"),
        ({"std": (1.0, 1.0)}, ValueError, "std must hold 3 numbers (channels), got 2"),
        ({"std": (1.0, 0.0, 1.0)}, ValueError, "std must not be 0, got [1.0, 0.0, 1.0]"),
        ({"value_range": (1.0, -1.0)}, ValueError, "value_range must be (low, high) with low < high, got (1.0, -1.0)"),
        ({"value_range": (1.0, 1.0)}, ValueError, "value_range must be (low, high) with low < high, got (1.0, 1.0)"),
        (
            {"clamp_gradient": "soft"},
            ValueError,
            'clamp_gradient must be "hard" or "straight_through", got \'soft\'',
        ),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        resize_normalize(**{"image": IMAGE, "size": 2, **NORMALIZE, **change})
    assert str(raised.value) == f"resize_normalize: {message}"


# --- compiled for GPUs that are not there -------------------------------------------------------


@pytest.mark.compile_only
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["*bf16", "*fp32"])
@pytest.mark.parametrize("lanes", [1, 3], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_resources(architecture: int, kind: str, lanes: int, backward: bool) -> None:
    """One kernel for all sizes, 720 -> 224 and 1024 -> 224 included: they are arguments, not constants."""
    import triton.language as tl

    from srpo_kernels._triton.resize_normalize import BACKWARD, FORWARD, precision, resize_normalize_kernel

    config = BACKWARD if backward else FORWARD
    dtype = {"*bf16": torch.bfloat16, "*fp32": torch.float32}[kind]
    arguments = dict(
        source_ptr=kind,
        left_ptr="*fp32",
        right_ptr="*fp32",
        left_blocks_ptr="*i32",
        right_blocks_ptr="*i32",
        constants_ptr="*fp32",
        image_ptr=kind,
        out_ptr=kind,
        source_height="i32",
        source_width="i32",
        height="i32",
        width="i32",
        left_width="i32",
        right_width="i32",
        BACKWARD=backward,
        CLAMP=backward,
        PLANES=3 // lanes,
        LANES=lanes,
        ACC=tl.float32,
        PRECISION=precision(dtype),
        TILE_Y=config.tile_y,
        TILE_X=config.tile_x,
        STEP_Y=config.step_y,
        STEP_X=config.step_x,
    )
    compiled = compile_for(resize_normalize_kernel, arguments, architecture=architecture, num_warps=config.warps)
    assert compiled.stack == 0
    assert compiled.shared <= 48 * 1024
    assert compiled.widest_load() == 16
    # A thread has four elements of the forward's tile, 8 bytes in bf16.
    assert compiled.widest_store() == (16 if backward or kind == "*fp32" else 8)
    if not backward:  # images are copied to shared memory ahead of use, 16 bytes at a time
        assert "cp.async.cg.shared.global" in compiled.ptx
