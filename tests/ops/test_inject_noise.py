"""inject_noise: kernels (interpreted or real) and reference against float64, and the operator contract."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

import srpo_kernels as sk
from srpo_kernels.ops.inject_noise import _branch_sum, _forward, _forward_prior, inject_noise_reference
from srpo_kernels.testing import check_against_reference
from srpo_kernels.testing.compile_only import ARCHITECTURES, compile_for

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def tensors(batch: int, count: int, branches: int, dtype: torch.dtype, device: str, *, shared: bool = False) -> dict:
    generator = torch.Generator().manual_seed(count)
    made = {
        "x0": torch.randn(batch, count, generator=generator).to(dtype),
        "noise": torch.randn(1 if shared else batch, count, generator=generator).to(dtype),
        "sigma": torch.rand(batch, branches, generator=generator),
    }
    return {name: tensor.to(device) for name, tensor in made.items()}


def composed(x0: Tensor, noise: Tensor, sigma: Tensor, alpha: Tensor | None = None) -> Tensor:
    """The formula, through the reference, in the public shape."""
    return inject_noise_reference(x0, noise, sigma, alpha).flatten(0, 1)


def variance_preserving(inputs: dict) -> dict:
    """The same with an alpha for every sigma."""
    return {**inputs, "alpha": (1 - inputs["sigma"].double().square()).sqrt().float()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "count", "branches"), [(2, 256, 2), (3, 129, 1), (1, 1, 3), (2, 3071, 2)])
@pytest.mark.parametrize("shared", [False, True])
def test_within_budget(batch: int, count: int, branches: int, dtype: torch.dtype, shared: bool, device: str) -> None:
    inputs = tensors(batch, count, branches, dtype, device, shared=shared)
    check_against_reference(sk.inject_noise, composed, inputs, differentiable=("x0", "noise"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_prior_is_the_stored_noise(dtype: torch.dtype, shared: bool, device: str) -> None:
    inputs = tensors(3, 1027, 2, dtype, device)
    prior = sk.NoisePrior(7, 2**40 + 5, shared)
    noise = prior.sample((3, 1027), device=device)
    del inputs["noise"]
    check_against_reference(
        partial(sk.inject_noise, noise=prior), partial(composed, noise=noise), inputs, differentiable=("x0",)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_any_schedule_within_budget(dtype: torch.dtype, shared: bool, device: str) -> None:
    inputs = variance_preserving(tensors(3, 129, 2, dtype, device, shared=shared))
    check_against_reference(sk.inject_noise, composed, inputs, differentiable=("x0", "noise"))
    prior = sk.NoisePrior(7, 11, shared)
    noise = prior.sample((3, 129), device=device)
    del inputs["noise"]
    check_against_reference(
        partial(sk.inject_noise, noise=prior), partial(composed, noise=noise), inputs, differentiable=("x0",)
    )


def test_adds_noise_as_ddpm_does(device: str) -> None:
    """Both are the same two products and a sum in float64, of levels rounded once by diffusers."""
    ddpm = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    x0, noise = torch.randn(2, 4, 4, 8, 8, device=device, dtype=torch.float64)
    timesteps = torch.tensor([0, 17, 500, 999], device=device)
    signal = ddpm.alphas_cumprod.to(device, torch.float64)[timesteps]
    made = sk.inject_noise(x0, noise, (1 - signal).sqrt(), alpha=signal.sqrt())
    assert torch.equal(made, ddpm.add_noise(x0, noise, timesteps))


def test_alpha_and_sigma_take_each_others_branches(device: str) -> None:
    x0, noise = torch.randn(2, 3, 8, device=device)
    sigma = torch.rand(3, 2, device=device)
    for alpha in (0.25, torch.full((3,), 0.25, device=device)):
        made = sk.inject_noise(x0, noise, sigma, alpha=alpha)
        assert torch.equal(made, sk.inject_noise(x0, noise, sigma, alpha=torch.full_like(sigma, 0.25)))
    assert torch.equal(
        sk.inject_noise(x0, noise, 0.25, alpha=1 - sigma)[:3],
        sk.inject_noise(x0, noise, torch.full_like(sigma[:, 0], 0.25), alpha=1 - sigma[:, 0]),
    )
    assert torch.equal(sk.inject_noise(x0, noise, sigma, alpha=1 - sigma), sk.inject_noise(x0, noise, sigma))


def test_refuses_levels_that_do_not_fit(device: str) -> None:
    x0 = torch.zeros(2, 3, device=device)
    for problem, levels in (
        ("alpha must lie in \\[0, 1\\], got 1.5", dict(sigma=0.5, alpha=1.5)),
        ("sigma must lie in \\[0, 1\\], got 14.6", dict(sigma=14.6)),
        ("sigma must lie in \\[0, inf\\), got inf", dict(sigma=float("inf"), alpha=1.0)),
        (
            "alpha must be a float, \\[2\\] or \\[2, K\\], got \\[3\\]",
            dict(sigma=0.5, alpha=torch.ones(3, device=device)),
        ),
        (
            "alpha has 3 branches, but sigma 2",
            dict(sigma=torch.ones(2, 2, device=device), alpha=torch.ones(2, 3, device=device)),
        ),
    ):
        with pytest.raises(ValueError, match=f"inject_noise: {problem}"):
            sk.inject_noise(x0, x0, **levels)
    assert torch.equal(sk.inject_noise(x0, torch.ones_like(x0), 14.5, alpha=1.0), torch.full_like(x0, 14.5))


def test_prior_does_not_depend_on_the_batch_or_the_blocks(device: str) -> None:
    whole = sk.inject_noise(torch.zeros(3, 5000, device=device), sk.NoisePrior(1), 1.0)
    part = sk.inject_noise(torch.zeros(2, 37, device=device), sk.NoisePrior(1), 1.0)
    assert torch.equal(whole[:2, :37], part)


def test_awkward_layouts(device: str) -> None:
    base = torch.randn(4, 6, 8, device=device, dtype=torch.bfloat16)
    sigma = torch.rand(4, 2, device=device)
    for x0 in (base.transpose(1, 2), base[:, ::2], base[:, :1].expand(4, 6, 8), base[:0], base[:, :0]):
        noise = torch.randn_like(x0.contiguous())
        expected = sk.inject_noise(x0.contiguous(), noise, sigma[: x0.shape[0]])
        assert torch.equal(sk.inject_noise(x0, noise, sigma[: x0.shape[0]]), expected)
    x0 = torch.randn(2, 3, device=device, requires_grad=True)
    sk.inject_noise(x0, torch.randn_like(x0), 0.25).sum().backward()  # an expanded gradient
    torch.testing.assert_close(x0.grad, torch.full_like(x0, 0.75))


def test_backward_is_deterministic(device: str) -> None:
    inputs = tensors(2, 5000, 3, torch.bfloat16, device)
    run = partial(check_against_reference, sk.inject_noise, composed, inputs, differentiable=("x0", "noise"))
    assert all(torch.equal(a, b) for a, b in zip(run().values(), run().values(), strict=True))


def test_opcheck(device: str) -> None:
    x0, noise, sigma = tensors(2, 33, 2, torch.float32, device).values()
    for alpha in (None, sigma.clone()):
        torch.library.opcheck(_forward, (x0, noise, sigma, alpha))
        torch.library.opcheck(_forward_prior, (x0, sigma, alpha, 3, 4, False))
    torch.library.opcheck(_branch_sum, (torch.randn(2, 2, 33, device=device), sigma))


def test_compiles_without_graph_breaks(device: str) -> None:
    inputs = tensors(2, 64, 2, torch.float32, device)
    compiled = torch.compile(sk.inject_noise, fullgraph=True, backend="aot_eager")
    prior = partial(torch.compile(sk.inject_noise, fullgraph=True, backend="aot_eager"), noise=sk.NoisePrior(3))
    check_against_reference(compiled, composed, inputs, differentiable=("x0", "noise"))
    stored = sk.NoisePrior(3).sample((2, 64), device=device)
    del inputs["noise"]
    check_against_reference(prior, partial(composed, noise=stored), inputs, differentiable=("x0",))


def test_gradcheck(device: str) -> None:
    x0, noise, sigma = (t.double() for t in tensors(2, 5, 2, torch.float32, device).values())
    assert torch.autograd.gradcheck(
        lambda a, b: sk.inject_noise(a, b, sigma), (x0.requires_grad_(), noise.requires_grad_())
    )


# --- compiled for GPUs that are not there -------------------------------------------------------


@pytest.mark.compile_only
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("kind", "block"), [("*bf16", 2048), ("*fp32", 1024)])
@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("alpha", [None, "*fp32"])
def test_forward_resources(architecture: int, kind: str, block: int, prior: bool, alpha: str | None) -> None:
    import triton.language as tl

    from srpo_kernels._triton.inject_noise import inject_noise_kernel

    arguments = dict(
        x0_ptr=kind,
        noise_ptr=kind,
        sigma_ptr="*fp32",
        alpha_ptr=alpha,
        out_ptr=kind,
        count="i32",
        noise_stride="i32",
        seed="i64",
        offset="i64",
        BRANCHES=2,
        PRIOR=prior,
        SHARED=False,
        ACC=tl.float32,
        BLOCK=block,
    )
    compiled = compile_for(inject_noise_kernel, arguments, architecture=architecture, num_warps=4)
    assert compiled.stack == 0
    assert compiled.widest_load() == 16
    assert compiled.widest_store() == 16


@pytest.mark.compile_only
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("kind", "block"), [("*bf16", 2048), ("*fp32", 1024)])
def test_branch_sum_resources(architecture: int, kind: str, block: int) -> None:
    import triton.language as tl

    from srpo_kernels._triton.inject_noise import branch_sum_kernel

    arguments = dict(
        gradient_ptr=kind, weight_ptr="*fp32", out_ptr=kind, count="i32", BRANCHES=2, ACC=tl.float32, BLOCK=block
    )
    compiled = compile_for(branch_sum_kernel, arguments, architecture=architecture, num_warps=4)
    assert compiled.stack == 0
    assert compiled.widest_load() == 16
    assert compiled.widest_store() == 16
