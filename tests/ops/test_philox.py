"""The kernels draw the very integers of the reference, and its normals to the last bits."""

from __future__ import annotations

import pytest
import torch

from srpo_kernels import NoisePrior, inject_noise, recover
from srpo_kernels.ops._register import interpreting
from srpo_kernels.ops.noise_prior import philox, standard_normal

COUNT = 64
_NEEDS_KERNELS = pytest.mark.skipif(
    not (interpreting() or torch.cuda.is_available()), reason="runs in the interpreter or on a GPU"
)


def counters(offset: int, device: str) -> tuple[torch.Tensor, ...]:
    block = torch.arange(COUNT, device=device)
    low, high = (torch.full_like(block, word) for word in (offset & 0xFFFFFFFF, offset >> 32))
    return block, torch.full_like(block, 5), low, high


@_NEEDS_KERNELS
@pytest.mark.parametrize(("seed", "offset"), [(0, 0), (3, 2**40 + 7), (2**62 + 11, 2**63 - 1)])
def test_integers_are_the_reference_s(seed: int, offset: int, device: str) -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def words_kernel(out_ptr, seed, offset, COUNT: tl.constexpr):  # noqa: N803
        lane = tl.arange(0, COUNT)
        zero = lane.to(tl.uint32) * 0
        stream = tl.cast(offset, tl.uint64)
        low, high = (stream & 0xFFFFFFFF).to(tl.uint32), (stream >> 32).to(tl.uint32)
        u0, u1, u2, u3 = tl.philox(seed, lane.to(tl.uint32), zero + 5, zero + low, zero + high)
        tl.store(out_ptr + lane, u0.to(tl.int64))
        tl.store(out_ptr + COUNT + lane, u1.to(tl.int64))
        tl.store(out_ptr + 2 * COUNT + lane, u2.to(tl.int64))
        tl.store(out_ptr + 3 * COUNT + lane, u3.to(tl.int64))

    drawn = torch.empty(4, COUNT, dtype=torch.int64, device=device)
    words_kernel[(1,)](drawn, seed, offset, COUNT=COUNT)
    expected = torch.stack(philox(counters(offset, device), (seed & 0xFFFFFFFF, seed >> 32)))
    assert torch.equal(drawn & 0xFFFFFFFF, expected)


@pytest.mark.parametrize("shape", [(3, 4096), (2, 1023)])
def test_normals_are_the_reference_s_to_the_last_bits(shape: tuple[int, int], device: str) -> None:
    prior = NoisePrior(2**62 + 1, 2**41)
    drawn = inject_noise(torch.zeros(shape, device=device), prior, 1.0)
    expected = prior.sample(shape, device=device)
    # 2 ulp each of log (under the root, so half), root and sine: 4 ulp of the product.
    tolerance = 4 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(drawn, expected, rtol=tolerance, atol=tolerance)


def test_extreme_words_give_finite_normals() -> None:
    words = torch.tensor([0, 1, 2**31, 2**32 - 2, 2**32 - 1])
    for u in words:
        for v in words:
            assert all(part.isfinite() for part in standard_normal(u, v))


@pytest.mark.parametrize("operator", ["inject_noise", "recover"])
def test_rows_beyond_32_bits_are_refused(operator: str) -> None:
    huge = torch.empty(1, 2**31, device="meta")
    message = rf"^{operator}: .* must have fewer than 2\*\*31 elements an image, got 2147483648$"
    with pytest.raises(ValueError, match=message):
        inject_noise(huge, huge, 0.5) if operator == "inject_noise" else recover(huge, huge, huge, 0.5, 0.4)
