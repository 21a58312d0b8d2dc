"""recover: kernels (interpreted or real) and reference against float64, and the operator contract."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

import srpo_kernels as sk
from srpo_kernels.latents import unpack
from srpo_kernels.ops.recover import _backward, _forward, _forward_prior, recover_reference
from srpo_kernels.testing import check_against_reference
from srpo_kernels.testing.compile_only import ARCHITECTURES, compile_for

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
VAE = dict(scaling_factor=0.3611, shift_factor=0.1159)  # FLUX.1's


def tensors(
    batch: int, shape: tuple[int, ...], branches: int, dtype: torch.dtype, device: str, *, shared: bool = False
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    made = {
        "x_t": torch.randn(branches * batch, *shape, generator=generator).to(dtype),
        "noise": torch.randn(1 if shared else batch, *shape, generator=generator).to(dtype),
        "velocity": torch.randn(branches * batch, *shape, generator=generator).to(dtype),
        "sigma_from": torch.rand(batch, branches, generator=generator),
        "sigma_to": torch.rand(batch, branches, generator=generator) * 0.97,
    }
    return {name: tensor.to(device) for name, tensor in made.items()}


def composed(
    x_t: Tensor,
    noise: Tensor,
    velocity: Tensor,
    sigma_from: Tensor,
    sigma_to: Tensor,
    size: tuple[int, int] | None = None,
    scaling_factor: float = 1.0,
    shift_factor: float = 0.0,
) -> Tensor:
    """The formula row by row, then the layout: no operator of the package takes part but `unpack`."""
    batch, branches = sigma_from.shape
    rows = []
    for row in range(batch * branches):
        start, end = sigma_from[row % batch, row // batch], sigma_to[row % batch, row // batch]
        injected = noise[row % batch if len(noise) > 1 else 0]
        rows.append((x_t[row] + (end - start) * velocity[row] - end * injected) / (1 - end))
    x0_hat = torch.stack(rows) if rows else x_t
    return (unpack(x0_hat, *size) if size else x0_hat) / scaling_factor + shift_factor


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(256,), (3, 43), (1,), (3071,)], ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_within_budget(shape: tuple[int, ...], dtype: torch.dtype, shared: bool, device: str) -> None:
    inputs = tensors(2, shape, 2, dtype, device, shared=shared)
    check_against_reference(sk.recover, composed, inputs, differentiable=("x_t", "noise", "velocity"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("size", "channels"), [((8, 8), 16), ((6, 10), 4), ((2, 2), 1), ((90, 4), 16), ((4, 6), 3)], ids=str
)
def test_unpack_within_budget(size: tuple[int, int], channels: int, dtype: torch.dtype, device: str) -> None:
    inputs = tensors(1, (size[0] * size[1] // 4, 4 * channels), 2, dtype, device)
    fused = partial(sk.recover, unpack=size, **VAE)
    plain = partial(composed, size=size, **VAE)
    results = check_against_reference(fused, plain, inputs, differentiable=("x_t", "noise", "velocity"))
    assert results["output"].shape == (2, channels, *size)
    assert results["output"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("size", [None, (8, 6)], ids=str)
def test_prior_is_the_stored_noise(size: tuple[int, int] | None, shared: bool, device: str) -> None:
    inputs = tensors(3, (12, 16), 2, torch.bfloat16, device)
    prior = sk.NoisePrior(11, 3, shared)
    noise = prior.sample((3, 12, 16), device=device)
    del inputs["noise"]
    check_against_reference(
        partial(sk.recover, noise=prior, unpack=size),
        partial(composed, noise=noise, size=size),
        inputs,
        differentiable=("x_t", "velocity"),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_undoes_inject_noise_for_the_true_velocity(dtype: torch.dtype, device: str) -> None:
    x0 = torch.randn(2, 8, 16, device=device, dtype=torch.float64)
    prior = sk.NoisePrior(5)
    noise = prior.sample((2, 8, 16), device=device).double()
    start, end = (
        torch.tensor([[0.9, 0.2], [0.5, 0.1]], device=device),
        torch.tensor([[0.6, 0.4], [0.3, 0.0]], device=device),
    )
    x_t = sk.inject_noise(x0, prior, start)
    velocity = (noise - x0).repeat(2, 1, 1)
    torch.testing.assert_close(sk.recover(x_t, prior, velocity, start, end), x0.repeat(2, 1, 1), rtol=1e-6, atol=1e-6)
    low = sk.recover(x_t.to(dtype), prior, velocity.to(dtype), start, end)
    assert low.dtype == dtype


def test_awkward_layouts(device: str) -> None:
    inputs = tensors(2, (4, 8), 1, torch.float32, device)
    expected = sk.recover(**inputs)
    strange = {name: inputs[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("x_t", "noise", "velocity")}
    assert torch.equal(sk.recover(**{**inputs, **strange}), expected)
    assert sk.recover(inputs["x_t"][:0], inputs["noise"][:0], inputs["velocity"][:0], 0.5, 0.4).shape == (0, 4, 8)
    velocity = inputs["velocity"].clone().requires_grad_()
    out = sk.recover(inputs["x_t"], inputs["noise"], velocity, 0.5, 0.4, unpack=(4, 4))
    out.sum().backward()  # an expanded gradient
    torch.testing.assert_close(velocity.grad, torch.full_like(velocity, (0.4 - 0.5) / 0.6))


def test_keeps_nothing_but_the_sigmas(device: str) -> None:
    inputs = tensors(2, (4, 8), 2, torch.float32, device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        sk.recover(**{**inputs, "velocity": inputs["velocity"].requires_grad_()}, unpack=(4, 4))
    assert kept == [4, 4]


def test_backward_is_deterministic(device: str) -> None:
    inputs = tensors(2, (25, 64), 2, torch.bfloat16, device)
    wanted = ("x_t", "noise", "velocity")
    run = partial(check_against_reference, sk.recover, composed, inputs, differentiable=wanted)
    assert all(torch.equal(a, b) for a, b in zip(run().values(), run().values(), strict=True))


@pytest.mark.parametrize("size", [[], [4, 4]], ids=str)
def test_opcheck(size: list[int], device: str) -> None:
    x_t, noise, velocity, start, end = tensors(2, (4, 8), 2, torch.float32, device).values()
    start, end = start.T.reshape(-1), end.T.reshape(-1)
    torch.library.opcheck(_forward, (x_t, noise, velocity, start, end, 2, size, 0.5, 0.1))
    torch.library.opcheck(_forward_prior, (x_t, velocity, start, end, 2, 3, 4, False, size, 0.5, 0.1))
    gradient = recover_reference(x_t, noise, velocity, start, end, 2, size, 0.5, 0.1)
    for wrt in ("x_t", "velocity"):
        torch.library.opcheck(_backward, (gradient, start, end, size, 0.5, wrt))


@pytest.mark.parametrize("size", [None, (4, 4)], ids=str)
def test_compiles_without_graph_breaks(size: tuple[int, int] | None, device: str) -> None:
    inputs = tensors(2, (4, 8), 2, torch.float32, device)
    compiled = torch.compile(sk.recover, fullgraph=True, backend="aot_eager")
    wanted = ("x_t", "noise", "velocity")
    plain = partial(composed, size=size)
    check_against_reference(partial(compiled, unpack=size), plain, inputs, differentiable=wanted)


@pytest.mark.parametrize("size", [None, (2, 4)], ids=str)
def test_gradcheck(size: tuple[int, int] | None, device: str) -> None:
    inputs = [tensor.double() for tensor in tensors(1, (2, 8), 2, torch.float32, device).values()]
    given = [tensor.requires_grad_() for tensor in inputs[:3]]
    assert torch.autograd.gradcheck(lambda *a: sk.recover(*a, *inputs[3:], unpack=size, **VAE), given)


# --- compiled for GPUs that are not there -------------------------------------------------------


@pytest.mark.compile_only
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("kind", "block"), [("*bf16", 2048), ("*fp32", 1024)])
@pytest.mark.parametrize("unpack", [False, True])
@pytest.mark.parametrize("prior", [False, True])
def test_forward_resources(architecture: int, kind: str, block: int, unpack: bool, prior: bool) -> None:
    import triton.language as tl

    from srpo_kernels._triton.recover import recover_kernel

    arguments = dict(
        x_t_ptr=kind,
        noise_ptr=kind,
        velocity_ptr=kind,
        sigma_from_ptr="*fp32",
        sigma_to_ptr="*fp32",
        out_ptr=kind,
        count="i32",
        batch="i32",
        noise_stride="i32",
        seed="i64",
        offset="i64",
        width="i32",
        scaling_factor="fp32",
        shift_factor="fp32",
        PRIOR=prior,
        SHARED=False,
        UNPACK=unpack,
        CHANNELS=16,
        ACC=tl.float32,
        BLOCK=block,
    )
    compiled = compile_for(recover_kernel, arguments, architecture=architecture, num_warps=4)
    assert compiled.stack == 0
    assert compiled.widest_load() == 16
    assert compiled.widest_store() == 16


@pytest.mark.compile_only
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("kind", "block"), [("*bf16", 2048), ("*fp32", 1024)])
@pytest.mark.parametrize("unpack", [False, True])
def test_backward_resources(architecture: int, kind: str, block: int, unpack: bool) -> None:
    import triton.language as tl

    from srpo_kernels._triton.recover import recover_backward_kernel

    arguments = dict(
        gradient_ptr=kind,
        sigma_from_ptr="*fp32",
        sigma_to_ptr="*fp32",
        out_ptr=kind,
        count="i32",
        width="i32",
        scaling_factor="fp32",
        WRT="velocity",
        UNPACK=unpack,
        CHANNELS=16,
        ACC=tl.float32,
        BLOCK=block,
    )
    compiled = compile_for(recover_backward_kernel, arguments, architecture=architecture, num_warps=4)
    assert compiled.stack == 0
    assert compiled.widest_load() == 16
    assert compiled.widest_store() == 16
