"""The operators against their formulas in float64, written again here, and the latent layout against diffusers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from srpo.latents import image_ids, shifted_sigmas
from srpo_kernels import NoisePrior, inject_noise, recover, relative_reward
from srpo_kernels.latents import pack, unpack

_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _column(sigma: Tensor, like: Tensor) -> Tensor:
    """[N] shaped to multiply the rows of `like` [N, ...]."""
    return sigma.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def _rows(sigma: float | Tensor, rows: int) -> list[Tensor]:
    """Noise levels of each branch, [B] each."""
    if not isinstance(sigma, Tensor):
        return [torch.full((rows,), sigma, dtype=torch.float64)]
    return [sigma] if sigma.ndim == 1 else list(sigma.unbind(1))


def _inject(x0: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
    """The formula, branch by branch, in the arguments' own precision."""
    out = []
    for level in _rows(sigma, len(x0)):
        s = _column(level, x0)
        out.append((1 - s) * x0 + s * noise)
    return torch.cat(out)


def _recover(
    x_t: Tensor, noise: Tensor, velocity: Tensor, sigma_from: float | Tensor, sigma_to: float | Tensor
) -> Tensor:
    """The formula, branch by branch, in the arguments' own precision."""
    branches = sigma_from.shape[1] if isinstance(sigma_from, Tensor) and sigma_from.ndim == 2 else 1
    batch = len(x_t) // branches
    out = []
    for k, (start, end) in enumerate(zip(_rows(sigma_from, batch), _rows(sigma_to, batch), strict=True)):
        x, v = x_t[k * batch : (k + 1) * batch], velocity[k * batch : (k + 1) * batch]
        s, t = _column(start, x), _column(end, x)
        out.append((x + (t - s) * v - t * noise) / (1 - t))
    return torch.cat(out)


def _relative(
    image: Tensor,
    projection: Tensor | None,
    *,
    positive: Tensor,
    negative: Tensor,
    kappa: float | Tensor,
    scale: float = 1.0,
    form: str = "official",
) -> Tensor:
    """The formula, row by row and pair by pair, in the image's precision."""
    features = image if projection is None else image @ projection.T
    features = features / features.square().sum(-1, keepdim=True).sqrt()
    kappas = kappa.tolist() if isinstance(kappa, Tensor) else [kappa] * len(image)
    out = []
    for f, p, n, k in zip(features, positive.to(image.dtype), negative.to(image.dtype), kappas, strict=True):
        liked, disliked = {"official": (1 + k, -1), "difference": (1, -1), "cfg": (k, 1 - k)}[form]
        out.append(scale * (liked * (p @ f) + disliked * (n @ f)))
    return torch.stack(out)


def _assert_accurate(out: Tensor, exact: Tensor, fp32: Tensor) -> None:
    """design.md section 5: one ulp of the output's dtype, and four times the error of eager fp32."""
    assert out.shape == exact.shape
    budget = torch.finfo(out.dtype).eps * exact.abs() + 4 * (fp32.double() - exact).abs().max()
    excess = (out.double() - exact).abs() - budget
    assert not out.isnan().any()
    assert (excess <= 0).all(), f"off by {excess.max().item():.3g} more than allowed"


def _check_accuracy(op: Callable[..., Tensor], formula: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """Forward and every gradient of `op` in the inputs' dtype, against `formula` in float64."""

    def run(function: Callable[..., Tensor], dtype: torch.dtype, grad: Tensor | None) -> list[Tensor]:
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
        out = function(*leaves)
        if grad is None:
            return [out]
        return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]

    dtype = inputs[0].dtype
    (out,) = run(op, dtype, None)
    grad = _randn(*out.shape, seed=99).to(out.dtype)
    exact, fp32 = run(formula, torch.float64, grad), run(formula, torch.float32, grad)
    for got, truth, eager in zip(run(op, dtype, grad), exact, fp32, strict=True):
        _assert_accurate(got.detach(), truth.detach(), eager.detach())


# --- inject_noise and recover ----------------------------------------------------------------------------------------

_FROM = torch.tensor([[0.9, 0.35], [0.95, 0.5], [0.6, 0.1]], dtype=torch.float64)
_TO = torch.tensor([[0.6, 0.65], [0.2, 0.9], [0.0, 0.45]], dtype=torch.float64)
_LEVELS = {"float": (0.9, 0.6), "[B]": (_FROM[:, 0], _TO[:, 0]), "[B, K]": (_FROM, _TO), "[B, 1]": (_FROM[:, :1],
           _TO[:, :1])}  # fmt: skip


def _branch_count(sigma: float | Tensor) -> int:
    return sigma.shape[1] if isinstance(sigma, Tensor) and sigma.ndim == 2 else 1


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["own-noise", "shared-noise"])
@pytest.mark.parametrize("levels", _LEVELS)
@pytest.mark.parametrize("shape", [(3,), (3, 7), (3, 5, 8), (3, 2, 4, 6)], ids=str)
def test_inject_and_recover_are_accurate_forward_and_backward(
    shape: tuple[int, ...], levels: str, shared: bool, dtype: torch.dtype
) -> None:
    start, end = _LEVELS[levels]
    rows = 3 * _branch_count(start)
    noise = _randn(1 if shared else 3, *shape[1:], seed=1, dtype=dtype)
    _check_accuracy(
        lambda x0, e: inject_noise(x0, e, start),
        lambda x0, e: _inject(x0, e, start),
        [_randn(*shape, dtype=dtype), noise],
    )
    _check_accuracy(
        lambda x_t, e, v: recover(x_t, e, v, start, end),
        lambda x_t, e, v: _recover(x_t, e, v, start, end),
        [_randn(rows, *shape[1:], seed=2, dtype=dtype), noise, _randn(rows, *shape[1:], seed=3, dtype=dtype)],
    )


@pytest.mark.parametrize("levels", _LEVELS)
def test_inject_and_recover_pass_gradcheck(levels: str) -> None:
    start, end = _LEVELS[levels]
    rows = 3 * _branch_count(start)
    x0, noise = _randn(3, 2, 4).requires_grad_(), _randn(3, 2, 4, seed=1).requires_grad_()
    x_t, velocity = _randn(rows, 2, 4, seed=2).requires_grad_(), _randn(rows, 2, 4, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, e: inject_noise(x, e, start), (x0, noise))
    assert torch.autograd.gradcheck(lambda x, e, v: recover(x, e, v, start, end), (x_t, noise, velocity))


@pytest.mark.parametrize("dtype", [*_DTYPES, torch.float64], ids=str)
def test_outputs_have_the_input_s_dtype_and_branch_major_rows(dtype: torch.dtype) -> None:
    x0, noise = _randn(3, 4, dtype=dtype), _randn(3, 4, seed=1, dtype=dtype)
    x_t = inject_noise(x0, noise, _FROM)
    assert (x_t.dtype, tuple(x_t.shape)) == (dtype, (6, 4))
    for k in range(2):
        assert torch.equal(x_t[3 * k : 3 * k + 3], inject_noise(x0, noise, _FROM[:, k]))
    x0_hat = recover(x_t, noise, x_t, _FROM, _TO)
    assert (x0_hat.dtype, tuple(x0_hat.shape)) == (dtype, (6, 4))
    for k in range(2):
        rows = slice(3 * k, 3 * k + 3)
        assert torch.equal(x0_hat[rows], recover(x_t[rows], noise, x_t[rows], _FROM[:, k], _TO[:, k]))


def test_noise_levels_may_be_given_per_row_or_as_a_float() -> None:
    x_t, velocity, noise = _randn(6, 4), _randn(6, 4, seed=1), _randn(6, 4, seed=2)
    start, end = _FROM.T.reshape(-1), _TO.T.reshape(-1)
    torch.testing.assert_close(
        recover(x_t, noise, velocity, start, end), _recover(x_t, noise, velocity, start, end), rtol=0, atol=1e-14
    )
    fixed = torch.full((6,), 0.25, dtype=torch.float64)
    assert torch.equal(recover(x_t, noise, velocity, start, 0.25), recover(x_t, noise, velocity, start, fixed))
    assert torch.equal(recover(x_t, noise, velocity, 0.25, end), recover(x_t, noise, velocity, fixed, end))


@pytest.mark.parametrize("given", ["sigma_from", "sigma_to"])
def test_one_level_of_a_branched_recovery_may_be_a_float(given: str) -> None:
    """[B, K] on either side says that there are K branches of noise [B, ...]."""
    x_t, velocity, noise = _randn(6, 4), _randn(6, 4, seed=1), _randn(3, 4, seed=2)
    fixed = torch.full((3, 2), 0.5, dtype=torch.float64)
    pairs = {"sigma_from": ((_FROM, 0.5), (_FROM, fixed)), "sigma_to": ((0.5, _TO), (fixed, _TO))}
    short, long = pairs[given]
    assert torch.equal(recover(x_t, noise, velocity, *short), recover(x_t, noise, velocity, *long))


def _non_contiguous(tensor: Tensor) -> Tensor:
    out = torch.stack([tensor, torch.full_like(tensor, math.nan)], -1)[..., 0]
    assert not out.is_contiguous() or tensor.numel() < 2
    return out


@pytest.mark.parametrize(
    "change", [_non_contiguous, lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)], ids=["strided", "transposed"]
)
def test_layout_of_the_inputs_does_not_matter(change: Callable[[Tensor], Tensor]) -> None:
    x0, noise = _randn(3, 4, 6), _randn(3, 4, 6, seed=1)
    x_t, velocity = _randn(6, 4, 6, seed=2), _randn(6, 4, 6, seed=3)
    levels = _non_contiguous(_FROM)
    assert torch.equal(inject_noise(change(x0), change(noise), levels), inject_noise(x0, noise, _FROM))
    assert torch.equal(
        recover(change(x_t), change(noise), change(velocity), levels, _TO), recover(x_t, noise, velocity, _FROM, _TO)
    )


def test_expanded_inputs_equal_their_copies_and_get_their_gradient() -> None:
    image = _randn(1, 4, 6).requires_grad_()
    noise = _randn(1, 1, 6, seed=1)
    x_t = inject_noise(image.expand(3, 4, 6), noise.expand(3, 4, 6), _FROM)
    assert torch.equal(x_t, inject_noise(image.repeat(3, 1, 1), noise.repeat(3, 4, 1), _FROM))
    (gradient,) = torch.autograd.grad(x_t.sum(), image)
    torch.testing.assert_close(gradient, (1 - _FROM).sum() * torch.ones_like(image), rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0), (3, 4, 0)], ids=str)
@pytest.mark.parametrize("branches", [1, 2])
def test_zero_size_batches_pass_through(shape: tuple[int, ...], branches: int) -> None:
    x0 = torch.zeros(shape, requires_grad=True)
    sigma = torch.full((shape[0], branches), 0.5)
    x_t = inject_noise(x0, torch.zeros(shape), sigma)
    assert tuple(x_t.shape) == (branches * shape[0], *shape[1:])
    x0_hat = recover(x_t, torch.zeros(shape), x_t, sigma, sigma)
    assert x0_hat.shape == x_t.shape
    (gradient,) = torch.autograd.grad(x0_hat.sum(), x0)
    assert gradient.shape == x0.shape


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 3), st.lists(st.integers(1, 5), max_size=3), st.integers(0, 10**6), st.booleans()
)
def test_any_shape_any_branches(batch: int, branches: int, rest: list[int], seed: int, shared: bool) -> None:
    x0, noise = _randn(batch, *rest, seed=seed), _randn(1 if shared else batch, *rest, seed=seed + 1)
    start = torch.rand(batch, branches, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    end = start.flip(0) * 0.9
    x_t = inject_noise(x0, noise, start)
    torch.testing.assert_close(x_t, _inject(x0, noise, start), rtol=1e-13, atol=1e-13)
    velocity = _randn(*x_t.shape, seed=seed + 2)
    recovered = recover(x_t, noise, velocity, start, end)
    torch.testing.assert_close(recovered, _recover(x_t, noise, velocity, start, end), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
@pytest.mark.parametrize("size", [(4, 6), (2, 2), (6, 2)], ids=str)
def test_recover_with_unpack_equals_the_composed_form(size: tuple[int, int], dtype: torch.dtype) -> None:
    """Unpacked, scaled and shifted in one pass, as the VAE wants it."""
    tokens, scaling, shift = (size[0] * size[1] // 4, 64), 0.3611, 0.1159
    inputs = [_randn(rows, *tokens, seed=rows + i, dtype=dtype) for i, rows in enumerate((6, 3, 6))]

    def fused(x_t: Tensor, noise: Tensor, velocity: Tensor) -> Tensor:
        return recover(
            x_t, noise, velocity, _FROM, _TO, unpack=size, scaling_factor=scaling, shift_factor=shift
        )  # fmt: skip

    def composed(x_t: Tensor, noise: Tensor, velocity: Tensor) -> Tensor:
        packed = _recover(x_t, noise, velocity, _FROM, _TO)
        return FluxPipeline._unpack_latents(packed, size[0] * 8, size[1] * 8, 8) / scaling + shift

    out = fused(*inputs)
    assert tuple(out.shape) == (6, 16, *size)
    assert out.is_contiguous(memory_format=torch.channels_last)
    _check_accuracy(fused, composed, inputs)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda x: inject_noise(x.long(), x, 0.5),
            TypeError,
            "inject_noise: x0 must be a float32, float16 or bfloat16 tensor, got torch.int64",
        ),
        (
            lambda _: inject_noise([1.0], 0, 0.5),
            TypeError,
            "inject_noise: x0 must be a float32, float16 or bfloat16 tensor, got list",
        ),
        (
            lambda x: inject_noise(x, x.long(), 0.5),
            TypeError,
            "inject_noise: noise must be a float32, float16 or bfloat16 tensor, got torch.int64",
        ),
        (lambda x: inject_noise(x[0, 0], x, 0.5), ValueError, "inject_noise: x0 must have a batch dimension"),
        (
            lambda x: inject_noise(x, x[:, :2], 0.5),
            ValueError,
            "inject_noise: noise must have shape [4, 6] (or 1 image), got [4, 2]",
        ),
        (
            lambda x: inject_noise(x, x[:2], 0.5),
            ValueError,
            "inject_noise: noise must have shape [4, 6] (or 1 image), got [2, 6]",
        ),
        (lambda x: inject_noise(x, x, 1.5), ValueError, "inject_noise: sigma must lie in [0, 1], got 1.5"),
        (lambda x: inject_noise(x, x, -0.1), ValueError, "inject_noise: sigma must lie in [0, 1], got -0.1"),
        (lambda x: inject_noise(x, x, math.nan), ValueError, "inject_noise: sigma must lie in [0, 1], got nan"),
        (
            lambda x: inject_noise(x, x, torch.zeros(3)),
            ValueError,
            "inject_noise: sigma must be a float, [4] or [4, K], got [3]",
        ),
        (
            lambda x: inject_noise(x, x, torch.zeros(2, 4)),
            ValueError,
            "inject_noise: sigma must be a float, [4] or [4, K], got [2, 4]",
        ),
        (
            lambda x: inject_noise(x, x, torch.tensor(0.5)),
            ValueError,
            "inject_noise: sigma must be a float, [4] or [4, K], got []",
        ),
        (
            lambda x: inject_noise(x, x.to("meta"), 0.5),
            ValueError,
            "inject_noise: x0 is on cpu but noise is on meta",
        ),
        (
            lambda x: recover(x.long(), x, x, 0.5, 0.1),
            TypeError,
            "recover: x_t must be a float32, float16 or bfloat16 tensor, got torch.int64",
        ),
        (
            lambda x: recover(x, x, x.long(), 0.5, 0.1),
            TypeError,
            "recover: velocity must be a float32, float16 or bfloat16 tensor, got torch.int64",
        ),
        (
            lambda x: recover(x, x, x[:2], 0.5, 0.1),
            ValueError,
            "recover: velocity must have x_t's shape [4, 6], got [2, 6]",
        ),
        (
            lambda x: recover(x, x, x.to("meta"), 0.5, 0.1),
            ValueError,
            "recover: x_t is on cpu but velocity is on meta",
        ),
        (lambda x: recover(x, x.to("meta"), x, 0.5, 0.1), ValueError, "recover: x_t is on cpu but noise is on meta"),
        (
            lambda x: recover(x, x[:2], x, 0.5, 0.1),
            ValueError,
            "recover: noise must have shape [4, 6] (or 1 image), got [2, 6]",
        ),
        (
            lambda x: recover(x, x, x, torch.zeros(2, 2), 0.1),
            ValueError,
            "recover: noise must have shape [2, 6] (or 1 image), got [4, 6]",
        ),
        (
            lambda x: recover(x, x, x, 0.5, 1.0),
            ValueError,
            "recover: sigma_to must be below 1 (nothing of the image is left at 1), got 1.0",
        ),
        (lambda x: recover(x, x, x, 0.5, -0.5), ValueError, "recover: sigma_to must lie in [0, 1], got -0.5"),
        (lambda x: recover(x, x, x, 1.5, 0.5), ValueError, "recover: sigma_from must lie in [0, 1], got 1.5"),
        (
            lambda x: recover(x, x, x, torch.zeros(3), 0.5),
            ValueError,
            "recover: sigma_from must be a float, [4] or [B, K] with B*K = 4, got [3]",
        ),
        (
            lambda x: recover(x, x, x, 0.5, torch.zeros(3)),
            ValueError,
            "recover: sigma_to must be a float, [4] or [B, K] with B*K = 4, got [3]",
        ),
        (
            lambda x: recover(x, x, x, 0.5, 0.1, unpack=(4, 4)),
            ValueError,
            "recover: unpack=(4, 4) needs x_t of [B, h*w/4, 4C], h and w even, got [4, 6]",
        ),
        (
            lambda x: recover(*[x.reshape(2, 3, 4)] * 3, 0.5, 0.1, unpack=(4, 4)),
            ValueError,
            "recover: unpack=(4, 4) needs x_t of [B, h*w/4, 4C], h and w even, got [2, 3, 4]",
        ),
        (
            lambda x: recover(*[x.reshape(4, 1, 6)] * 3, 0.5, 0.1, unpack=(2, 2)),
            ValueError,
            "recover: unpack=(2, 2) needs x_t of [B, h*w/4, 4C], h and w even, got [4, 1, 6]",
        ),
    ],
)
def test_bad_arguments_are_refused_by_name(call: Callable[[Tensor], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call(torch.zeros(4, 6))


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("x_t", lambda x: recover(x[0, 0], x, x[0, 0], 0.5, 0.1)),
        ("unpack", lambda _: recover(*[torch.zeros(2, 3, 8)] * 3, 0.5, 0.1, unpack=(3, 4))),
        ("sigma_to", lambda x: recover(x, x[:2], x, torch.zeros(2, 2), torch.zeros(1, 4))),
    ],
    ids=["no batch dimension", "odd latent size", "branches disagree"],
)
def test_what_recover_cannot_do_is_refused_by_name(name: str, call: Callable[[Tensor], Any]) -> None:
    with pytest.raises(ValueError, match=rf"^recover: .*\b{name}\b"):
        call(torch.zeros(4, 6))


def test_values_of_a_sigma_tensor_are_not_read() -> None:
    """Reading them would wait for the device; so a level outside [0, 1] is the caller's business."""
    x = torch.zeros(2, 3)
    assert inject_noise(x, x, torch.full((2,), 1.5)).shape == (2, 3)
    meta = torch.zeros(2, 3, device="meta")
    sigma = torch.zeros(2, 2, device="meta")
    x_t = inject_noise(meta, meta, sigma)
    assert recover(x_t, meta, x_t, sigma, sigma).shape == (4, 3)


def test_noise_prior_works_in_both_ops() -> None:
    prior, x = NoisePrior(1, 2), _randn(2, 4, 6, dtype=torch.float32)
    drawn = prior.sample((2, 4, 6))
    sigma = torch.tensor([[0.5, 0.25], [0.75, 0.5]])
    assert torch.equal(inject_noise(x, prior, sigma), inject_noise(x, drawn, sigma))
    x_t = x.repeat(2, 1, 1)
    assert torch.equal(recover(x_t, prior, x_t, sigma, sigma / 2), recover(x_t, drawn, x_t, sigma, sigma / 2))


# --- relative_reward -------------------------------------------------------------------------------------------------


_INT = torch.zeros(2, 4, dtype=torch.int32)


def _unit(*shape: int, seed: int) -> Tensor:
    drawn = _randn(*shape, seed=seed)
    return drawn / drawn.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
@pytest.mark.parametrize("kappa", [0.2, torch.tensor([0.1, 0.2, 0.6, 0.0])], ids=["float", "[B]"])
@pytest.mark.parametrize("pairs", [(), (3,)], ids=["one-pair", "P-pairs"])
@pytest.mark.parametrize("projected", [False, True], ids=["plain", "projected"])
@pytest.mark.parametrize("form", ["official", "difference", "cfg"])
def test_relative_reward_is_accurate_forward_and_backward(
    form: str, projected: bool, pairs: tuple[int, ...], kappa: float | Tensor, dtype: torch.dtype
) -> None:
    texts = {name: _unit(4, *pairs, 10, seed=i).to(dtype) for i, name in enumerate(("positive", "negative"))}
    options: dict[str, Any] = dict(kappa=kappa, scale=5.0, form=form)
    image = 3 * _randn(4, 14 if projected else 10, seed=5).to(dtype)
    weights = [_randn(10, 14, seed=6).to(dtype)] if projected else []
    score = relative_reward(image, **texts, **options, projection=weights[0] if weights else None)
    assert (score.dtype, tuple(score.shape)) == (torch.float32, (4, *pairs))

    def op(x: Tensor, projection: Tensor | None = None) -> Tensor:
        return relative_reward(x, **texts, **options, projection=projection)

    def formula(x: Tensor, projection: Tensor | None = None) -> Tensor:
        return _relative(x, projection, **texts, **options)

    _check_accuracy(op, formula, [image, *weights])


@pytest.mark.parametrize("projected", [False, True])
def test_relative_reward_passes_gradcheck(projected: bool) -> None:
    texts = _unit(3, 2, 5, seed=1), _unit(3, 2, 5, seed=2)
    kappa = torch.tensor([0.1, 0.5, 0.3], dtype=torch.float64)
    image = _randn(3, 4 if projected else 5).requires_grad_()
    projection = (_randn(5, 4, seed=3).requires_grad_(),) if projected else ()

    def op(x: Tensor, *p: Tensor) -> Tensor:
        return relative_reward(x, *texts, kappa, projection=p[0] if p else None, scale=2.0)

    assert torch.autograd.gradcheck(op, (image, *projection))
    assert op(image, *projection).dtype == torch.float64


def test_relative_reward_sends_gradient_to_image_and_projection_only() -> None:
    leaves = {
        "image": _randn(2, 4), "positive": _unit(2, 3, seed=1), "negative": _unit(2, 3, seed=2),
        "projection": _randn(3, 4, seed=3),
    }  # fmt: skip
    for leaf in leaves.values():
        leaf.requires_grad_()
    relative_reward(**leaves, kappa=0.2).sum().backward()
    assert {name for name, leaf in leaves.items() if leaf.grad is not None} == {"image", "projection"}


def test_norm_of_the_image_embedding_does_not_matter() -> None:
    image, texts = _randn(2, 4), (_unit(2, 4, seed=1), _unit(2, 4, seed=2))
    torch.testing.assert_close(relative_reward(100 * image, *texts, 0.3), relative_reward(image, *texts, 0.3))


def test_relative_reward_takes_strided_and_empty_inputs() -> None:
    image, texts = _randn(3, 4), (_unit(3, 4, seed=1), _unit(3, 4, seed=2))
    strided = [_non_contiguous(tensor) for tensor in (image, *texts)]
    torch.testing.assert_close(relative_reward(*strided, 0.3), relative_reward(image, *texts, 0.3), rtol=0, atol=1e-15)
    empty = torch.zeros(0, 4, requires_grad=True)
    score = relative_reward(empty, torch.zeros(0, 4), torch.zeros(0, 4), torch.zeros(0))
    assert tuple(score.shape) == (0,)
    (gradient,) = torch.autograd.grad(score.sum(), empty)
    assert gradient.shape == empty.shape


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"image": _INT}, TypeError, "image must be a float32, float16 or bfloat16 tensor, got torch.int32"),
        ({"positive": [1.0]}, TypeError, "positive must be a float32, float16 or bfloat16 tensor, got list"),
        ({"negative": _INT}, TypeError, "negative must be a float32, float16 or bfloat16 tensor, got torch.int32"),
        ({"projection": _INT}, TypeError, "projection must be a float32, float16 or bfloat16 tensor, got torch.int32"),
        ({"negative": torch.zeros(2, 4, device="meta")}, ValueError, "image is on cpu but negative is on meta"),
        ({"form": "paper"}, ValueError, "form must be one of ['cfg', 'difference', 'official'], got 'paper'"),
        ({"image": torch.zeros(2, 1, 4)}, ValueError, "image must be [B, D], got [2, 1, 4]"),
        ({"positive": torch.zeros(3, 4)}, ValueError, "positive must be [2, 4] or [2, P, 4], got [3, 4]"),
        ({"negative": torch.zeros(2, 5)}, ValueError, "negative must be [2, 4] or [2, P, 4], got [2, 5]"),
        (
            {"positive": torch.zeros(2, 3, 4)},
            ValueError,
            "positive and negative must have one shape, got [2, 3, 4] and [2, 4]",
        ),
        ({"kappa": torch.zeros(3)}, ValueError, "kappa must be a float or [2], got [3]"),
        ({"kappa": torch.zeros(2, 1)}, ValueError, "kappa must be a float or [2], got [2, 1]"),
        ({"projection": torch.zeros(4, 3)}, ValueError, "projection must be [D, 4], got [4, 3]"),
        ({"projection": torch.zeros(5, 4)}, ValueError, "positive must be [2, 5] or [2, P, 5], got [2, 4]"),
    ],
)  # fmt: skip
def test_bad_arguments_of_relative_reward_are_refused_by_name(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = dict(
        image=torch.zeros(2, 4), positive=torch.zeros(2, 4), negative=torch.zeros(2, 4), kappa=0.1
    )
    with pytest.raises(error, match=f"^relative_reward: {re.escape(message)}$"):
        relative_reward(**arguments | change)


# --- latent layout and schedule --------------------------------------------------------------------------------------

_SIZES = [(2, 2), (4, 6), (8, 2), (90, 90)]


@pytest.mark.parametrize("size", _SIZES, ids=str)
def test_pack_and_unpack_are_inverse_and_equal_diffusers(size: tuple[int, int]) -> None:
    height, width = size
    latents = _randn(2, 16, height, width)
    tokens = pack(latents)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents, 2, 16, height, width))
    assert torch.equal(unpack(tokens, height, width), latents)
    assert torch.equal(unpack(tokens, height, width), FluxPipeline._unpack_latents(tokens, height * 8, width * 8, 8))


@pytest.mark.parametrize("size", _SIZES, ids=str)
def test_image_ids_equal_diffusers(size: tuple[int, int]) -> None:
    ids = image_ids(*size)
    expected = FluxPipeline._prepare_latent_image_ids(1, size[0] // 2, size[1] // 2, "cpu", torch.float32)
    assert ids.dtype == torch.float32
    assert torch.equal(ids, expected)


@pytest.mark.parametrize("steps", [1, 10, 25, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_shifted_sigmas_equal_the_scheduler_s(steps: int, shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
    sigmas = shifted_sigmas(steps, shift)
    assert (sigmas[0], sigmas[-1], len(sigmas)) == (1.0, 0.0, steps + 1)
    np.testing.assert_allclose(sigmas, scheduler.sigmas.double().numpy(), rtol=0, atol=2.5e-7)  # its fp32


def test_shifted_sigmas_of_the_recipe_s_schedule() -> None:
    sigmas = shifted_sigmas(50, 3.0)
    assert [sigmas[j] for j in (5, 25, 30)] == pytest.approx([27 / 28, 3 / 4, 2 / 3], abs=1e-15)
