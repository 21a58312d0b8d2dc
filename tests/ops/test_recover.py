"""recover: kernels (interpreted or real) and reference against float64, and the operator contract."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler
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


def variance_preserving(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with an alpha for every sigma."""
    return {
        **inputs,
        **{f"alpha_{end}": (1 - inputs[f"sigma_{end}"].double().square()).sqrt().float() for end in ("from", "to")},
    }


def stepped(
    x_t: Tensor,
    noise: Tensor,
    velocity: Tensor,
    sigma_from: Tensor,
    sigma_to: Tensor,
    alpha_from: Tensor,
    alpha_to: Tensor,
    prediction: str,
    size: tuple[int, int] | None = None,
    scaling_factor: float = 1.0,
    shift_factor: float = 0.0,
) -> Tensor:
    """DDIM's step as it is published, row by row, and the known noise taken off what it leads to."""
    batch, branches = sigma_from.shape
    rows = []
    for row in range(batch * branches):
        at = row % batch, row // batch
        start, end, first, last = sigma_from[at], sigma_to[at], alpha_from[at], alpha_to[at]
        injected = noise[row % batch if len(noise) > 1 else 0]
        if prediction == "epsilon":
            epsilon = velocity[row]
            clean = (x_t[row] - start * epsilon) / first
        else:
            epsilon = first * velocity[row] + start * x_t[row]
            clean = first * x_t[row] - start * velocity[row]
        rows.append((last * clean + end * epsilon - end * injected) / last)
    x0_hat = torch.stack(rows)
    return (unpack(x0_hat, *size) if size else x0_hat) / scaling_factor + shift_factor


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("size", [None, (8, 6)], ids=str)
def test_other_predictions_within_budget(
    prediction: str, size: tuple[int, int] | None, shared: bool, dtype: torch.dtype, device: str
) -> None:
    inputs = variance_preserving(tensors(2, (12, 16), 2, dtype, device, shared=shared))
    fused = partial(sk.recover, prediction=prediction, unpack=size, **VAE)
    plain = partial(stepped, prediction=prediction, size=size, **VAE)
    check_against_reference(fused, plain, inputs, differentiable=("x_t", "noise", "velocity"))
    prior = sk.NoisePrior(11, 3, shared)
    noise = prior.sample((2, 12, 16), device=device)
    del inputs["noise"]
    check_against_reference(
        partial(fused, noise=prior), partial(plain, noise=noise), inputs, differentiable=("x_t", "velocity")
    )


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_steps_as_ddim_does(prediction: str, device: str) -> None:
    """In float64, to and fro; fp32 is what diffusers stores its levels in, and both take them as they are."""
    ddim = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, prediction_type=prediction
    )
    ddim.alphas_cumprod = ddim.alphas_cumprod.double()
    ddim.set_timesteps(10)
    x0, noise, predicted = torch.randn(3, 2, 4, 8, 8, device=device, dtype=torch.float64)
    for timestep in (900, 500, 100):
        signals = [ddim.alphas_cumprod[each].to(device).expand(2) for each in (timestep, timestep - 100)]
        (alpha_from, alpha_to), (sigma_from, sigma_to) = [s.sqrt() for s in signals], [(1 - s).sqrt() for s in signals]
        x_t = ddim.add_noise(x0, noise, torch.tensor([timestep] * 2))
        prev = ddim.step(predicted, timestep, x_t).prev_sample
        expected = (prev - sigma_to[0] * noise) / alpha_to[0]
        recovered = partial(sk.recover, x_t, noise, prediction=prediction)
        levels = dict(sigma_from=sigma_from, sigma_to=sigma_to, alpha_from=alpha_from, alpha_to=alpha_to)
        torch.testing.assert_close(recovered(predicted, **levels), expected, rtol=1e-12, atol=1e-12)
        truth = noise if prediction == "epsilon" else alpha_from[0] * noise - sigma_from[0] * x0
        torch.testing.assert_close(recovered(truth, **levels), x0, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_gradcheck_of_other_predictions(prediction: str, device: str) -> None:
    named = variance_preserving(tensors(1, (2, 8), 2, torch.float32, device))
    inputs = {name: tensor.double() for name, tensor in named.items()}
    given = [inputs.pop(name).requires_grad_() for name in ("x_t", "noise", "velocity")]
    run = partial(sk.recover, **inputs, prediction=prediction, unpack=(2, 4), **VAE)
    assert torch.autograd.gradcheck(run, given)


def test_refuses_levels_that_do_not_fit(device: str) -> None:
    x = torch.zeros(2, 3, device=device)
    for problem, arguments in (
        ("prediction must be one of .*, got 'sample'", dict(prediction="sample")),
        ("alpha_from must be None, as the alpha of a velocity is 1 - sigma", dict(alpha_from=0.5)),
        ("alpha_to must be given with prediction='epsilon'", dict(prediction="epsilon", alpha_from=0.5)),
        (
            "alpha_to must be above 0 .*, got 0.0",
            dict(prediction="v_prediction", alpha_from=0.0, alpha_to=0.0),
        ),
        ("alpha_from must be above 0 .*, got 0.0", dict(prediction="epsilon", alpha_from=0.0, alpha_to=0.5)),
        (
            "alpha_to must be a float, .*, got \\[3\\]",
            dict(prediction="epsilon", alpha_from=0.5, alpha_to=torch.ones(3, device=device)),
        ),
    ):
        with pytest.raises(ValueError, match=f"recover: {problem}"):
            sk.recover(x, x, x, 0.5, 0.4, **arguments)


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
    x_t, noise, velocity, *rows = variance_preserving(tensors(2, (4, 8), 2, torch.float32, device)).values()
    start, end, first, last = (row.T.reshape(-1) for row in rows)
    for levels in ((start, end, None, None, "velocity"), (start, end, first, last, "epsilon")):
        torch.library.opcheck(_forward, (x_t, noise, velocity, *levels, 2, size, 0.5, 0.1))
        torch.library.opcheck(_forward_prior, (x_t, velocity, *levels, 2, 3, 4, False, size, 0.5, 0.1))
        gradient = recover_reference(x_t, noise, velocity, *levels, 2, size, 0.5, 0.1)
        for wrt in ("x_t", "predicted"):
            torch.library.opcheck(_backward, (gradient, *levels, size, 0.5, wrt))


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
@pytest.mark.parametrize(
    ("prior", "prediction"), [(False, "velocity"), (True, "velocity"), (False, "epsilon"), (False, "v_prediction")]
)
def test_forward_resources(
    architecture: int, kind: str, block: int, unpack: bool, prior: bool, prediction: str
) -> None:
    import triton.language as tl

    from srpo_kernels._triton.recover import recover_kernel

    arguments = dict(
        x_t_ptr=kind,
        noise_ptr=kind,
        predicted_ptr=kind,
        sigma_from_ptr="*fp32",
        sigma_to_ptr="*fp32",
        alpha_from_ptr=None if prediction == "velocity" else "*fp32",
        alpha_to_ptr=None if prediction == "velocity" else "*fp32",
        out_ptr=kind,
        count="i32",
        batch="i32",
        noise_stride="i32",
        seed="i64",
        offset="i64",
        width="i32",
        scaling_factor="fp32",
        shift_factor="fp32",
        PREDICTION=prediction,
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
@pytest.mark.parametrize(("unpack", "prediction"), [(False, "velocity"), (True, "velocity"), (True, "epsilon")])
def test_backward_resources(architecture: int, kind: str, block: int, unpack: bool, prediction: str) -> None:
    import triton.language as tl

    from srpo_kernels._triton.recover import recover_backward_kernel

    arguments = dict(
        gradient_ptr=kind,
        sigma_from_ptr="*fp32",
        sigma_to_ptr="*fp32",
        alpha_from_ptr=None if prediction == "velocity" else "*fp32",
        alpha_to_ptr=None if prediction == "velocity" else "*fp32",
        out_ptr=kind,
        count="i32",
        width="i32",
        scaling_factor="fp32",
        WRT="predicted",
        PREDICTION=prediction,
        UNPACK=unpack,
        CHANNELS=16,
        ACC=tl.float32,
        BLOCK=block,
    )
    compiled = compile_for(recover_backward_kernel, arguments, architecture=architecture, num_warps=4)
    assert compiled.stack == 0
    assert compiled.widest_load() == 16
    assert compiled.widest_store() == 16
