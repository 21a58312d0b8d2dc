"""NoisePrior: Philox4x32-10 by its published answers, and the normal draws made from it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from srpo_kernels import NoisePrior, inject_noise, recover
from srpo_kernels.ops.noise_prior import philox

_M = 0xFFFFFFFF


def _philox_by_hand(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10 in Python integers, after Salmon et al. (SC 2011)."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        low, high = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (high >> 32) ^ c1 ^ k0, high & _M, (low >> 32) ^ c3 ^ k1, low & _M
        k0, k1 = (k0 + 0x9E3779B9) & _M, (k1 + 0xBB67AE85) & _M
    return c0, c1, c2, c3


def _element_by_hand(seed: int, offset: int, image: int, index: int) -> float:
    """Element `index` of an image: lane index % 4 of counter (index // 4, image, offset), by Box-Muller."""
    block, lane = divmod(index, 4)
    words = _philox_by_hand((block, image, offset & _M, offset >> 32), (seed & _M, seed >> 32))
    u, v = ((word + 0.5) / 2**32 for word in words[lane // 2 * 2 : lane // 2 * 2 + 2])
    return math.sqrt(-2 * math.log(u)) * (math.sin if lane % 2 else math.cos)(2 * math.pi * v)


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((_M, _M, _M, _M), (_M, _M), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_random123_s_known_answers(
    counter: tuple[int, ...], key: tuple[int, int], answer: tuple[int, ...]
) -> None:
    c0, c1, c2, c3 = (torch.tensor([word], dtype=torch.int64) for word in counter)
    assert tuple(word.item() for word in philox((c0, c1, c2, c3), key)) == answer
    assert _philox_by_hand(counter, key) == answer


_seeds = st.integers(0, 2**63 - 1)


@settings(max_examples=50, deadline=None)
@given(_seeds, _seeds, st.integers(1, 3), st.integers(1, 40))
def test_every_element_is_the_documented_function(seed: int, offset: int, images: int, count: int) -> None:
    drawn = NoisePrior(seed, offset).sample((images, count))
    rows = [[_element_by_hand(seed, offset, image, i) for i in range(count)] for image in range(images)]
    assert drawn.dtype == torch.float32
    # Words are rounded to fp32 on their way into (0, 1], which moves the angle by up to 2 pi 2^-24.
    torch.testing.assert_close(drawn.double(), torch.tensor(rows, dtype=torch.float64), rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("shape", [(1, 24), (4, 6), (2, 3, 4), (3, 2, 3, 2), (1, 23), (3, 7)])
def test_an_image_s_noise_depends_neither_on_shape_nor_batch(shape: tuple[int, ...]) -> None:
    prior = NoisePrior(5, 9)
    drawn = prior.sample(shape)
    assert tuple(drawn.shape) == shape
    assert torch.equal(drawn.flatten(1), prior.sample((5, 1000))[: shape[0], : math.prod(shape[1:])])


def test_shared_noise_is_that_of_the_first_image() -> None:
    shared, own = (NoisePrior(5, 9, shared=flag).sample((3, 50)) for flag in (True, False))
    assert torch.equal(shared, own[:1].expand(3, -1))
    assert len(own.unique(dim=0)) == 3


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)])
def test_zero_size_draw_is_empty(shape: tuple[int, ...]) -> None:
    assert tuple(NoisePrior(1).sample(shape).shape) == shape


@pytest.mark.parametrize(("seed", "offset"), [(0, 0), (1, 0), (2**63 - 1, 2**63 - 1), (2**40, 7)])
def test_draws_are_standard_normal(seed: int, offset: int) -> None:
    count = 40_000
    drawn = NoisePrior(seed, offset).sample((1, count)).double()[0]
    assert drawn.isfinite().all()
    # Four standard errors of each moment's estimate.
    for power, (moment, variance) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96)], 1):
        assert abs(drawn.pow(power).mean().item() - moment) < 4 * math.sqrt(variance / count)
    assert stats.kstest(drawn.numpy(), "norm").pvalue > 1e-3


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (NoisePrior(1, 0), NoisePrior(1, 1)),
        (NoisePrior(1, 0), NoisePrior(2, 0)),
        (NoisePrior(1, 2), NoisePrior(2, 1)),
        (NoisePrior(1, 0), NoisePrior(1, 1 << 32)),
        (NoisePrior(1, 0), NoisePrior(1 + (1 << 32), 0)),
    ],
)
def test_draws_of_other_seeds_and_offsets_are_independent(one: NoisePrior, other: NoisePrior) -> None:
    count = 20_000
    a, b = one.sample((1, count)).double()[0], other.sample((1, count)).double()[0]
    assert not torch.equal(a, b)
    for x, y in ((a, b), (a.abs(), b.abs()), (a[1:], b[:-1])):
        correlation = torch.corrcoef(torch.stack([x, y]))[0, 1].item()
        assert abs(correlation) < 4 / math.sqrt(count)


@pytest.mark.parametrize("lag", [1, 2, 3, 4])
def test_elements_of_one_draw_are_uncorrelated(lag: int) -> None:
    drawn = NoisePrior(3).sample((1, 20_000)).double()[0]
    for values in (drawn, drawn.abs()):
        correlation = torch.corrcoef(torch.stack([values[lag:], values[:-lag]]))[0, 1].item()
        assert abs(correlation) < 4 / math.sqrt(20_000)


@pytest.mark.parametrize("bad", [-1, 2**63, 1.0, "1", None])
@pytest.mark.parametrize("name", ["seed", "offset"])
def test_bad_seed_or_offset_is_refused_by_name(name: str, bad: Any) -> None:
    with pytest.raises(ValueError, match=rf"^NoisePrior: {name} must be an integer in \[0, 2\*\*63\), got "):
        NoisePrior(**({"seed": 0} | {name: bad}))


@pytest.mark.parametrize("branches", [1, 2])
def test_injected_prior_is_recovered_exactly(branches: int) -> None:
    """With the true velocity e - x0, recovery gives x0 back; the noise is drawn twice, never stored."""
    prior = NoisePrior(42, 3)
    x0 = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = torch.tensor([[0.9, 0.4], [0.8, 0.3], [0.7, 0.2]], dtype=torch.float64)[:, :branches]
    end = torch.tensor([[0.5, 0.6], [0.4, 0.7], [0.3, 0.8]], dtype=torch.float64)[:, :branches]
    x_t = inject_noise(x0, prior, start)
    velocity = (prior.sample((3, 4, 5)) - x0).repeat(branches, 1, 1)
    recovered = recover(x_t, prior, velocity, start, end)
    torch.testing.assert_close(recovered, x0.repeat(branches, 1, 1), rtol=0, atol=1e-13)


def test_prior_equals_the_tensor_it_draws() -> None:
    prior = NoisePrior(8, 1)
    x0 = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(inject_noise(x0, prior, 0.3), inject_noise(x0, prior.sample((2, 3, 4)), 0.3))
